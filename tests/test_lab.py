"""The lab itself: packets really go where it says, faults really hurt, and nothing stays behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, MakeLab, eventually

from pbrd import netns
from pbrd.errors import LabError
from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab, Packet, Uplink
from pbrd.stream import Result, Trip

PROTOCOLS = ("udp", "tcp", "icmp", "sctp")
both_families = pytest.mark.parametrize(
    ("src", "dst"), [(LAN[0], TARGETS[0]), (LAN6[0], TARGETS6[0])], ids=["ipv4", "ipv6"]
)


def namespaces(prefix: str) -> list[str]:
    return [name for name in os.listdir(netns.RUN) if name.startswith(prefix)] if netns.RUN.exists() else []


def running(pid: int) -> str:
    """The command that a process runs; "" if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = Path(f"/proc/{pid}/status").read_text()
        return "" if "State:\tZ" in status else status.split()[1]
    return ""


def send_by(lab: Lab, k: int) -> None:
    """Let the main table of the router prefer uplink k."""
    uplink = lab.uplinks[k]
    lab.ip(
        lab.router,
        f"""route replace default via {uplink.gateway} dev {uplink.interface} metric 1
        route replace ::/0 via {uplink.gateway6} dev {uplink.interface} metric 1""",
    )


@pytest.mark.parametrize("proto", PROTOCOLS)
@pytest.mark.parametrize("src", [*LAN, *LAN6])
def test_a_packet_from_the_lan_reaches_the_internet(lab: Lab, src: str, proto: str) -> None:
    assert lab.exit_of(src=src, proto=proto) == "fiber"
    send_by(lab, 1)
    assert lab.exit_of(src=src, proto=proto) == "lte"


@pytest.mark.parametrize("dst", [*TARGETS, *TARGETS6])
def test_every_target_is_reached_by_the_router_itself(lab: Lab, dst: str) -> None:
    assert lab.exit_of(local=True, dst=dst) == "fiber"


@both_families
def test_an_answer_comes_back_by_each_uplink(lab: Lab, src: str, dst: str) -> None:
    for k in range(2):
        send_by(lab, k)
        lab.run(lab.lan, "ping", "-c1", "-W2", "-I", src, dst)


@both_families
@pytest.mark.parametrize("proto", PROTOCOLS)
def test_a_refused_packet_leaves_nowhere_and_says_so_at_once(
    lab: Lab, src: str, dst: str, proto: str
) -> None:
    family = "-6" if ":" in dst else "-4"
    lab.run(lab.router, "ip", family, "rule", "add", "to", dst, "unreachable", "priority", "10")
    begun = time.monotonic()
    assert lab.exit_of(src=src, dst=dst, proto=proto, within=30.0) is None
    assert lab.exit_of(local=True, dst=dst, proto=proto, within=30.0) is None
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("rule", "packet"),
    [
        ("from 192.168.100.11", {"src": LAN[1]}),
        ("to 198.51.100.10", {"dst": TARGETS[1]}),
        ("ipproto tcp dport 443", {"proto": "tcp", "dport": 443}),
        ("ipproto udp sport 5000", {"sport": 5000}),
        ("dsfield 0x10", {"dscp": 4}),
        ("fwmark 0x5", {"mark": 5, "local": True}),
        ("uidrange 1000-1000", {"uid": 1000, "local": True}),
        ("uidrange 1000-1000", {"uid": 1000, "local": True, "proto": "tcp"}),
        ("oif lte", {"device": "lte", "local": True}),
        ("from 10.0.2.2", {"src": "10.0.2.2", "local": True}),
    ],
)
def test_packets_are_as_they_were_asked_for(lab: Lab, rule: str, packet: dict[str, object]) -> None:
    lab.ip(
        lab.router,
        f"rule add {rule} lookup 77 priority 10\nroute add default via 10.0.2.1 dev lte table 77",
    )
    assert lab.exit_of(**packet) == "lte"  # type: ignore[arg-type]
    assert lab.exit_of(local=bool(packet.get("local"))) == "fiber"


@pytest.mark.parametrize("proto", ["udp", "icmp"])
@pytest.mark.parametrize("dst", [TARGETS[0], TARGETS6[0]])
def test_a_flow_goes_on_from_the_same_socket(lab: Lab, dst: str, proto: str) -> None:
    with contextlib.closing(lab.flow(Packet(dst, proto=proto))) as flow:
        assert [flow.exit(), flow.exit()] == ["fiber", "fiber"]
        seen = lab.counter(f"th sport {flow.packet.sport}")
        send_by(lab, 1)
        assert [flow.exit(), flow.exit()] == ["lte", "lte"]
        if proto == "udp":
            assert seen.read() == {"fiber": 0, "lte": 2}


def test_a_spawned_command_sees_the_interfaces_and_the_cgroups(lab: Lab, tmp_path: Path) -> None:
    with (tmp_path / "seen").open("w") as output:
        child = lab.spawn(lab.router, ["ls", "/sys/class/net", "/sys/fs/cgroup"], stdout=output)
    assert child.wait(5) == 0
    seen = (tmp_path / "seen").read_text().split()
    assert {"fiber", "lte", "lan", "cgroup.procs"} <= set(seen)
    assert "eth0" not in seen


def test_sockets_of_a_group_match_in_nftables(lab: Lab) -> None:
    lab.nft(
        lab.router,
        """table inet t { chain out { type filter hook output priority 0; meta skgid 2000 counter drop
        meta skuid 3000 counter drop; }; }""",
    )
    assert lab.exit_of(local=True, gid=2000, within=0.1) is None
    assert lab.exit_of(local=True, uid=3000, within=0.1) is None
    assert lab.exit_of(local=True) == "fiber"


def test_counters_miss_no_packet_and_count_no_other(lab: Lab) -> None:
    both, one = lab.counter(f"ip saddr {LAN[0]}"), lab.counter(f"ip saddr {LAN[1]}")
    stream = lab.traffic(rate=2000)
    time.sleep(1)
    result = stream.stop()
    assert both.read() == {"fiber": result.sent, "lte": 0}
    assert one.read() == {"fiber": 0, "lte": 0}
    assert result.lost == 0
    assert result.sent > 1900


@both_families
def test_a_stream_sees_where_its_packets_came_by(lab: Lab, src: str, dst: str) -> None:
    stream = lab.traffic(src=src, dst=dst)
    time.sleep(0.2)
    send_by(lab, 1)
    time.sleep(0.2)
    result = stream.stop()
    assert result.path == ["fiber", "lte"]
    assert sum(result.by_uplink.values()) == result.sent
    assert result.gap("fiber", "lte") is not None
    assert result.gap("lte", "fiber") is None


def test_the_routers_own_stream_is_measured_too(lab: Lab) -> None:
    lab.ip(lab.router, "rule add fwmark 7 lookup 77\nroute add default via 10.0.2.1 dev lte table 77")
    stream = lab.traffic(local=True, mark=7)
    time.sleep(0.2)
    assert stream.stop().path == ["lte"]


@both_families
def test_silence_stops_everything_but_the_gateway(lab: Lab, src: str, dst: str) -> None:
    assert lab.exit_of(src=src, dst=dst) == "fiber"
    lab.silence(0)
    assert lab.exit_of(src=src, dst=dst, within=0.1) is None
    gateway = lab.uplinks[0].gateway6 if ":" in dst else lab.uplinks[0].gateway
    lab.ip(lab.router, "neigh flush dev fiber")
    lab.run(lab.router, "ping", "-c1", "-W2", gateway)
    lab.silence(0, on=False)
    assert lab.exit_of(src=src, dst=dst) == "fiber"


@both_families
def test_a_mute_gateway_answers_nothing_while_the_carrier_stays(lab: Lab, src: str, dst: str) -> None:
    gateway = lab.uplinks[0].gateway6 if ":" in dst else lab.uplinks[0].gateway
    lab.mute_gateway(0)
    assert lab.run(lab.router, "ping", "-c1", "-W1", gateway, check=False).returncode
    assert "LOWER_UP" in lab.run(lab.router, "ip", "link", "show", "fiber").stdout
    lab.mute_gateway(0, on=False)
    lab.ip(lab.router, "neigh flush dev fiber")
    assert lab.exit_of(src=src, dst=dst) == "fiber"


def test_loss_takes_its_share(lab: Lab) -> None:
    lab.loss(0, 30)
    stream = lab.traffic(rate=2000)
    time.sleep(1)
    result = stream.stop()
    assert 0.2 < result.lost / result.sent < 0.4
    lab.loss(0, 0)
    assert all(lab.exit_of() == "fiber" for _ in range(50))


@pytest.mark.parametrize("fault", ["carrier", "admin"])
def test_the_router_sees_a_link_go_and_come_at_once(lab: Lab, tmp_path: Path, fault: str) -> None:
    set_link, events = getattr(lab, fault), tmp_path / "events"
    with events.open("w") as output:
        lab.spawn(lab.router, ["ip", "-o", "monitor", "link"], stdout=output)

    def seen(pattern: str) -> bool:
        return bool(re.search(pattern, events.read_text()))

    time.sleep(1.1)  # the second event within a second may be late
    set_link(0, False)
    eventually(lambda: seen("fiber.* state DOWN"), within=0.5)
    time.sleep(1.1)
    set_link(0, True)
    eventually(lambda: seen("fiber.* state UP"), within=0.5)


@both_families
@pytest.mark.parametrize("fault", ["carrier", "admin"])
def test_after_a_link_came_back_everything_is_as_before(lab: Lab, src: str, dst: str, fault: str) -> None:
    def configured() -> str:
        texts = [
            lab.run(space, "ip", family, "route", "show", "table", "all").stdout
            for space in (lab.router, lab.uplinks[0].isp)
            for family in ("-4", "-6")
        ]
        return "\n".join(sorted(line for line in "".join(texts).splitlines() if "fe80" not in line))

    before = configured()
    getattr(lab, fault)(0, False)
    getattr(lab, fault)(0, True)
    assert configured() == before
    assert lab.exit_of(src=src, dst=dst, within=3.0) == "fiber"


def test_an_interface_that_comes_back_has_a_new_index(lab: Lab) -> None:
    def index() -> int:
        return int(lab.run(lab.router, "cat", "/sys/class/net/fiber/ifindex").stdout)

    before = index()
    lab.unplug(0)
    assert "fiber" not in lab.run(lab.router, "ip", "link").stdout
    assert lab.exit_of() == "lte"
    lab.plug(0)
    assert index() != before
    assert lab.exit_of() == "fiber"
    lab.mute_gateway(0)
    assert lab.exit_of(within=0.1) is None


def test_interfaces_addresses_and_gateways_can_be_chosen(make_lab: MakeLab) -> None:
    fiber = Uplink("fiber", "eth0", "192.168.1.10", "192.168.1.1", extra=("192.168.1.100/24",))
    lab = make_lab((fiber, Uplink("lte", "eth1", "10.0.0.5", "10.0.0.1", gateway6="fe80::1")))
    routes = lab.run(lab.router, "ip", "route", "show", "default").stdout
    assert routes.split("\n") == [
        "default via 192.168.1.1 dev eth0 proto dhcp metric 100 ",
        "default via 10.0.0.1 dev eth1 proto dhcp metric 101 ",
        "",
    ]
    assert lab.exit_of(local=True, src="192.168.1.100") == "fiber"
    send_by(lab, 1)
    assert lab.exit_of() == "lte"
    assert lab.exit_of(src=LAN6[0]) == "lte"
    lab.run(lab.router, "ping", "-c1", "-W2", "-I", "192.168.1.100", "192.168.1.1")


SHAPES = {
    "same gateway": (
        Uplink("fiber", address="10.0.0.2", gateway="10.0.0.1", address6="fd00:9::2", gateway6="fd00:9::1"),
        Uplink("lte", address="10.0.0.3", gateway="10.0.0.1", address6="fd00:9::3", gateway6="fd00:9::1"),
    ),
    "link-local gateways": (Uplink("fiber", gateway6="fe80::1"), Uplink("lte", gateway6="fe80::1")),
    "onlink gateways": (Uplink("fiber", prefix=32, prefix6=128), Uplink("lte", prefix=32, prefix6=128)),
    "point-to-point": (Uplink("ppp0", point_to_point=True), Uplink("wg0", point_to_point=True)),
    "six": ("a", "b", "c", "d", "e", "f"),
}


@pytest.mark.parametrize("shape", SHAPES)
@both_families
def test_other_kinds_of_uplinks_work_as_well(make_lab: MakeLab, shape: str, src: str, dst: str) -> None:
    lab = make_lab(SHAPES[shape])
    family = "-6" if ":" in dst else "-4"
    for uplink in lab.uplinks:
        gateway = uplink.gateway6 if ":" in dst else uplink.gateway
        via = [] if gateway == "none" else ["via", gateway]
        way = [*via, "dev", uplink.interface, *(["onlink"] if uplink.prefix == 32 and via else [])]
        lab.run(lab.router, "ip", family, "route", "replace", "default", *way, "metric", "1")
        assert lab.exit_of(src=src, dst=dst) == uplink.name
        stream = lab.traffic(src=src, dst=dst)
        time.sleep(0.05)
        assert stream.stop().by_uplink.keys() == {uplink.name}


def test_a_family_can_be_absent(make_lab: MakeLab) -> None:
    lab = make_lab((Uplink("fiber", address6="off"), Uplink("lte", address="off")), defaults=True)
    assert lab.exit_of() == "fiber"
    assert lab.exit_of(src=LAN6[0]) == "lte"


def test_without_defaults_the_main_table_has_none(make_lab: MakeLab) -> None:
    lab = make_lab(defaults=False)
    assert lab.run(lab.router, "ip", "route", "show", "default").stdout == ""
    assert lab.exit_of() is None
    lab.admin(0, False)
    lab.admin(0, True)
    assert lab.run(lab.router, "ip", "route", "show", "default").stdout == ""


def test_two_labs_do_not_meet(make_lab: MakeLab) -> None:
    one, two = make_lab(tag="one"), make_lab()
    assert one.name.endswith("-one")
    send_by(two, 1)
    seen = one.counter(f"ip saddr {LAN[0]}")
    assert (one.exit_of(), two.exit_of()) == ("fiber", "lte")
    assert seen.read() == {"fiber": 1, "lte": 0}
    two.close()
    assert one.exit_of() == "fiber"
    assert namespaces(two.name + "-") == []


def test_nothing_stays_behind_not_even_after_a_failure(make_lab: MakeLab) -> None:
    with contextlib.suppress(ZeroDivisionError), Lab() as lab:
        child = lab.spawn(lab.router, ["sleep", "1000"])
        stranger = subprocess.Popen(["ip", "netns", "exec", lab.lan, "sleep", "1000"])
        eventually(lambda: running(stranger.pid) == "sleep")
        lab.traffic()
        raise ZeroDivisionError
    assert namespaces(lab.name) == []
    assert child.poll() is not None
    assert stranger.wait(5) == -signal.SIGKILL


def test_the_lab_of_a_killed_process_is_removed_by_the_next(make_lab: MakeLab) -> None:
    program = """if True:
        from pbrd.lab import Lab
        lab = Lab().__enter__()
        child = lab.spawn(lab.router, ["sleep", "1000"])
        print(lab.name, child.pid, flush=True)
        child.wait()"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE
    ) as dying:
        assert dying.stdout
        name, pid = dying.stdout.readline().split()
        assert len(namespaces(name)) == 5
        eventually(lambda: running(int(pid)) == "sleep")
        dying.kill()
    make_lab()
    assert namespaces(name) == []
    eventually(lambda: running(int(pid)) == "")


def test_the_host_network_is_left_alone(make_lab: MakeLab) -> None:
    def host() -> str:
        commands = (
            ["ip", "addr"],
            ["ip", "rule"],
            ["ip", "route", "show", "table", "all"],
            ["nft", "list", "ruleset"],
        )
        texts = [subprocess.run(c, text=True, capture_output=True, check=True).stdout for c in commands]
        return re.sub(r"valid_lft \d+sec preferred_lft \d+sec", "", "".join(texts))

    before = host()
    lab = make_lab()
    lab.carrier(0, False)
    lab.exit_of()
    assert host() == before


def test_errors_name_the_command(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"cannot do `ip -n .* route add default via 1.2.3.4`: .*"):
        lab.ip(lab.router, "link show\nroute add default via 1.2.3.4")
    with pytest.raises(LabError, match=r"cannot run nft: .*syntax error"):
        lab.nft(lab.router, "add nonsense")
    with pytest.raises(OSError, match="assign requested address"):
        lab.flow(Packet(dst=TARGETS[0], src="1.2.3.4"))


def test_a_result_tells_loss_outage_and_moves() -> None:
    path = [("fiber", 3), (None, 4), ("lte", 3)]
    uplinks = [uplink for uplink, count in path for _ in range(count)]
    trips = [
        Trip(t, uplink, t + 0.25 if uplink else None, t + 0.5 if uplink else None)
        for t, uplink in enumerate(uplinks)
    ]
    result = Result(tuple(trips))
    assert (result.sent, result.lost) == (10, 4)
    assert result.by_uplink == {"fiber": 3, "lte": 3}
    assert result.moves == [(0.25, "fiber"), (7.25, "lte")]
    assert result.gap("fiber", "lte") == 5.0
    assert result.outage() == 5.0
    assert result.between(0, 7).outage() == 3.5  # from the last answer to the last packet sent
    assert result.between(3, 7).lost == result.between(3, 7).sent == 4
    assert Result(()).outage() == 0.0


def test_who_sees_no_cgroups_sees_no_slices_of_the_machine(lab: Lab) -> None:
    look = "from pbrd.cgroups import hierarchy; print(hierarchy())"
    errors = {}
    for cgroups in (True, False):
        argv = [sys.executable, "-c", look]
        child = lab.spawn(
            lab.router, argv, cgroups=cgroups, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        errors[cgroups] = child.communicate(timeout=30)[1]
    assert "no cgroup2 hierarchy is mounted" in errors[False]
    if "no cgroup2 hierarchy" in errors[True]:
        pytest.skip("needs a cgroup2 hierarchy")
    assert errors[True] == ""
