"""Live connections through NAT: pins, replies, failover, graceful failback; both families, real packets."""

import functools
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
from conftest import HEAD, PROBE, UPLINKS, Daemon, MakeLab, StartDaemon, all_up, eventually, goes_by

from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab, Packet
from pbrd.packet import Flow

NAT = UPLINKS.replace('"fiber"', '"fiber"\nnat = true\nnat6 = true').replace(
    '"lte"', '"lte"\nnat = true\nnat6 = true'
)
POLICIES = f"""
[[policies]]
name = "backups"
match = {{ from = ["{LAN[1]}", "{LAN6[1]}"] }}
via = ["lte", "fiber"]
[[policies]]
name = "secret"
match = {{ from = ["{LAN[2]}", "{LAN6[2]}"] }}
via = ["lte"]
fallback = "unreachable"
[default]
via = ["fiber", "lte"]
"""
# A kill switch that the plain rules can't say: nothing passes that nftables has not judged.
GUARD = """
[[policies]]
name = "nobody"
match = { mac = ["52:54:00:00:00:01"] }
via = ["lte"]
fallback = "unreachable"
"""
CONFIG = HEAD + PROBE + NAT + GUARD + POLICIES

families = pytest.mark.parametrize(
    ("source", "target"), [(LAN[0], TARGETS[0]), (LAN6[0], TARGETS6[0])], ids=["ipv4", "ipv6"]
)


def start(lab: Lab, daemon: StartDaemon, text: str = CONFIG) -> Daemon:
    pbrd = daemon(lab, text)
    eventually(lambda: all_up(pbrd))
    return pbrd


def served(lab: Lab, space: str, address: str, port: int) -> socket.socket:
    """Listen for TCP in a namespace."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with lab.inside(space):
        server = socket.create_server((address, port), family=family, backlog=20)
    server.settimeout(3)
    return server


def connected(lab: Lab, space: str, source: str, target: str, port: int) -> socket.socket:
    """Connect by TCP from an address of a namespace."""
    with lab.inside(space):
        client = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET)
    client.settimeout(3)
    if source:
        client.bind((source, 0))
    client.connect((target, port))
    return client


def talks(client: socket.socket, peer: socket.socket) -> bool:
    client.sendall(b"ping")
    assert peer.recv(4) == b"ping"
    peer.sendall(b"pong")
    return client.recv(4) == b"pong"


def is_reset(client: socket.socket) -> bool:
    try:
        client.sendall(b"more")
    except ConnectionResetError:
        return True
    return False


@families
def test_what_leaves_bears_the_address_of_its_uplink(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    start(lab, daemon)
    by_fiber = lab.counter(f"ip saddr {lab.uplinks[0].address} udp dport 7777")
    by_fiber6 = lab.counter(f"ip6 saddr {lab.uplinks[0].address6} udp dport 7777")
    assert lab.exit_of(src=source, dst=target, dport=7777) == "fiber"
    assert by_fiber.read()["fiber"] + by_fiber6.read()["fiber"] == 1


@families
def test_a_connection_on_lte_survives_the_healing_of_fiber(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    pbrd = start(lab, daemon)
    lab.silence(0)
    eventually(lambda: goes_by(pbrd, "lte"))
    with served(lab, lab.net, target, 8080) as server:
        client = connected(lab, lab.lan, source, target, 8080)
        peer, address = server.accept()
        with client, peer:
            assert address[0] in (lab.uplinks[1].wan, lab.uplinks[1].wan6)
            lab.silence(0, False)
            eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
            eventually(lambda: lab.exit_of(src=source, dst=target) == "fiber", within=1)
            counter = lab.counter("tcp dport 8080")
            for _ in range(20):
                assert talks(client, peer)
            assert counter.read()["fiber"] == 0
            assert counter.read()["lte"] >= 20


@families
def test_immediate_failback_moves_them_at_once(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    pbrd = start(lab, daemon, CONFIG.replace("[default]", '[default]\nfailback = "immediate"'))
    lab.silence(0)
    eventually(lambda: goes_by(pbrd, "lte"))
    with closing(lab.flow(Packet(dst=target, src=source, sport=5555))) as flow:
        assert flow.exit() == "lte"
        lab.silence(0, False)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
        eventually(lambda: flow.exit() == "fiber", within=2)


TUNNEL = """
[[policies]]
name = "tunnel"
match = { iif = "lo", proto = "udp", dport = 51820 }
via = ["fiber", "lte"]
failback = "immediate"
"""


@families
def test_immediate_failback_moves_a_flow_whose_other_side_never_rests(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    """As a tunnel of this machine. What the other side sends must not begin a connection from outside."""
    pbrd = start(lab, daemon, CONFIG.replace("[default]", TUNNEL + "[default]"))
    lab.silence(0)
    eventually(lambda: goes_by(pbrd, "lte") and goes_by(pbrd, "lte", "tunnel"))
    far, near = bound(lab, lab.net, target, 51820), bound(lab, lab.router, "", 51820, ":" in source)
    near.connect((target, 51820))
    with far, near, talking(near, far):
        lab.silence(0, False)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
        seen = lab.counter("udp dport 51820")
        eventually(lambda: seen.read()["fiber"] > 20)
        before = seen.read()["lte"]
        eventually(lambda: seen.read()["fiber"] > 50)
        assert seen.read()["lte"] == before


def bound(lab: Lab, space: str, address: str, port: int, ipv6: bool = False) -> socket.socket:
    """Open a UDP socket in a namespace."""
    with lab.inside(space):
        made = socket.socket(socket.AF_INET6 if ipv6 or ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, port))
    made.settimeout(0.01)
    return made


@contextmanager
def talking(near: socket.socket, far: socket.socket) -> Iterator[None]:
    """Let the near side send every 5 ms, and the far side every millisecond once it has heard of it."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.005):
            with suppress(OSError):
                near.send(b"near")

    def answer() -> None:
        peer = None
        while not stop.wait(0.001):
            with suppress(OSError):
                far.settimeout(0 if peer else 0.1)
                peer = far.recvfrom(100)[1]
            if peer:
                far.sendto(b"far", peer)

    threads = [threading.Thread(target=send), threading.Thread(target=answer)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@families
def test_a_udp_flow_moves_when_its_uplink_dies_and_stays_where_it_went(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    pbrd = start(lab, daemon)
    with closing(lab.flow(Packet(dst=target, src=source, sport=5555))) as flow:
        assert flow.exit() == "fiber"
        lab.silence(0)
        eventually(lambda: goes_by(pbrd, "lte"))
        eventually(lambda: flow.exit() == "lte", within=2)
        lab.silence(0, False)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
        eventually(lambda: lab.exit_of(src=source, dst=target) == "fiber", within=1)
        assert flow.exit() == "lte"


@families
def test_a_connection_on_dead_fiber_is_reset_within_a_second(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    pbrd = start(lab, daemon)
    with served(lab, lab.net, target, 8080) as server:
        client = connected(lab, lab.lan, source, target, 8080)
        peer, _ = server.accept()
        with client, peer:
            assert talks(client, peer)
            lab.carrier(0, False)
            eventually(lambda: goes_by(pbrd, "lte"))
            eventually(lambda: is_reset(client), within=2)


def test_flows_of_the_other_uplink_and_of_the_lan_are_not_touched(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon)
    with served(lab, lab.net, TARGETS[0], 8080) as far, served(lab, lab.router, "192.168.100.1", 22) as near:
        backup = connected(lab, lab.lan, LAN[1], TARGETS[0], 8080)
        backup_peer, _ = far.accept()
        ssh = connected(lab, lab.lan, LAN[0], "192.168.100.1", 22)
        ssh_peer, _ = near.accept()
        with backup, backup_peer, ssh, ssh_peer:
            for _ in range(2):
                lab.silence(0)
                eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
                assert talks(backup, backup_peer)
                assert talks(ssh, ssh_peer)
                lab.silence(0, False)
                eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
            assert talks(backup, backup_peer)
            assert talks(ssh, ssh_peer)


@pytest.mark.parametrize("uplink", [0, 1], ids=["fiber", "lte"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("rp_filter", [0, 1])
def test_a_service_on_the_box_answers_by_the_uplink_of_the_request(
    make_lab: MakeLab, daemon: StartDaemon, uplink: int, version: int, rp_filter: int
) -> None:
    lab = make_lab(rp_filter=rp_filter)
    # a policy that would send every answer by fiber, were answers judged
    everything = '[[policies]]\nname = "rest"\nmatch = { iif = "lo" }\nvia = ["fiber"]\n[default]'
    start(lab, daemon, CONFIG.replace("[default]", everything))
    side = lab.uplinks[uplink]
    address = side.address if version == 4 else side.address6
    other = lab.counter("tcp sport 8443")
    route_to(lab, uplink, address)
    with served(lab, lab.router, "::" if version == 6 else "0.0.0.0", 8443) as server:
        client = connected(lab, lab.net, "", address, 8443)
        peer, _ = server.accept()
        with client, peer:
            assert talks(client, peer)
    counts = other.read()
    assert counts[side.name] > 0
    assert sum(counts.values()) == counts[side.name]


def route_to(lab: Lab, uplink: int, address: str) -> None:
    """Let the internet reach an address of the router through a provider."""
    side = lab.uplinks[uplink]
    via = side.wan6 if ":" in address else side.wan
    lab.ip(lab.net, f"route replace {address} via {via} dev isp{uplink}")


@pytest.mark.parametrize("uplink", [0, 1], ids=["fiber", "lte"])
def test_a_port_forward_answers_by_the_uplink_of_the_request(
    lab: Lab, daemon: StartDaemon, uplink: int
) -> None:
    start(lab, daemon)
    lab.nft(
        lab.router,
        f"""table ip forward {{ chain pre {{ type nat hook prerouting priority dstnat;
        tcp dport 8443 dnat to {LAN[0]}:443; udp dport 8443 dnat to {LAN[0]}:443; }}; }}""",
    )
    side = lab.uplinks[uplink]
    route_to(lab, uplink, side.address)
    with served(lab, lab.lan, LAN[0], 443) as server:
        client = connected(lab, lab.net, "", side.address, 8443)
        peer, _ = server.accept()
        with client, peer:
            assert talks(client, peer)


@families
def test_a_kill_switch_holds_for_live_connections(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    pbrd = start(lab, daemon)
    secret = LAN6[2] if ":" in source else LAN[2]
    leaks = lab.counter("udp sport 5555")
    # After masquerading the source is the uplink's: the port tells the flow.
    with closing(lab.flow(Packet(dst=target, src=secret, sport=5555))) as flow:
        assert flow.exit() == "lte"
        lab.carrier(1, False)
        for _ in range(50):
            flow.exit(0.01)
        eventually(lambda: pbrd.uplink("lte")["state"] == "down")
        assert flow.exit(0.1) is None
        lab.carrier(1, True)
        eventually(lambda: flow.exit(0.1) == "lte", within=10)
        lab.nft(lab.router, "flush ruleset")
        assert flow.exit(0.1) in ("lte", None)
        pbrd.stop(SIGKILL)
        assert flow.exit(0.2) in ("lte", None)
    assert leaks.read()["fiber"] == 0


def test_a_kill_switch_that_a_reload_brings_holds_for_live_connections(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon)
    with closing(lab.flow(Packet(dst=TARGETS[0], src=LAN[0], sport=5555))) as flow:
        assert flow.exit() == "fiber"
        only_lte = f'[[policies]]\nname = "new"\nmatch = {{ from = "{LAN[0]}" }}\nvia = ["lte"]\n'
        only_lte += 'fallback = "unreachable"\n'
        lab.carrier(1, False)
        assert pbrd.reload(CONFIG.replace("[[policies]]", only_lte + "[[policies]]", 1)).returncode == 0
        leaks = lab.counter("udp sport 5555")
        for _ in range(20):
            assert flow.exit(0.02) is None
        assert leaks.read()["fiber"] == 0


def test_the_table_survives_a_flush_of_all_rules(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon)
    lab.nft(lab.router, "table ip other { chain c { type filter hook input priority 0; }; }")
    before = lab.nft(lab.router, "list table inet pbrd")
    lab.nft(lab.router, "flush ruleset")
    eventually(lambda: "inet pbrd" in lab.nft(lab.router, "list ruleset"))
    eventually(lambda: lab.nft(lab.router, "list table inet pbrd") == before, within=1)
    assert lab.exit_of() == "fiber"
    eventually(lambda: "drift repaired" in pbrd.log)


def test_a_restart_writes_nothing_to_nftables(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon)
    handles = lab.run(lab.router, "nft", "-a", "list", "table", "inet", "pbrd").stdout
    pbrd.stop(SIGKILL)
    pbrd.restart()
    assert pbrd.command("plan").stdout == "nothing to change\n"
    assert lab.run(lab.router, "nft", "-a", "list", "table", "inet", "pbrd").stdout == handles
    assert pbrd.reload("# same\n" + CONFIG).stdout == "nothing changed\n"
    assert lab.run(lab.router, "nft", "-a", "list", "table", "inet", "pbrd").stdout == handles


def test_no_table_where_none_is_needed_and_flush_takes_it_away(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + POLICIES)
    assert "inet pbrd" not in lab.nft(lab.router, "list ruleset")
    pbrd.reload(CONFIG)
    assert "inet pbrd" in lab.nft(lab.router, "list ruleset")
    assert lab.exit_of() == "fiber"
    pbrd.command("flush")
    assert "inet pbrd" not in lab.nft(lab.router, "list ruleset")
    assert "112" not in lab.run(lab.router, "ip", "-N", "rule").stdout


@families
def test_foreign_mark_bits_survive(lab: Lab, daemon: StartDaemon, source: str, target: str) -> None:
    start(lab, daemon)
    lab.nft(
        lab.router,
        """table inet theirs {
        chain pre { type filter hook prerouting priority -200; iifname "lan" meta mark set 0x42; };
        chain post { type filter hook postrouting priority 300; meta mark & 0xffffff == 0x42 counter; }; }""",
    )
    with closing(lab.flow(Packet(dst=target, src=source, sport=5555))) as flow:
        assert [flow.exit(), flow.exit()] == ["fiber", "fiber"]
    assert "packets 2" in lab.nft(lab.router, "list table inet theirs")


def test_connections_of_the_box_itself_are_pinned_too(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon)
    lab.silence(0)
    eventually(lambda: goes_by(pbrd, "lte"))
    with served(lab, lab.net, TARGETS[0], 8080) as server:
        client = connected(lab, lab.router, "", TARGETS[0], 8080)
        peer, _ = server.accept()
        with client, peer:
            lab.silence(0, False)
            eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
            eventually(lambda: lab.exit_of(local=True) == "fiber", within=1)
            assert talks(client, peer)


def test_drain_takes_no_new_connections_and_lets_live_ones_finish(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon)
    with served(lab, lab.net, TARGETS[0], 8080) as server:
        client = connected(lab, lab.lan, LAN[0], TARGETS[0], 8080)
        peer, address = server.accept()
        with client, peer:
            assert address[0] == lab.uplinks[0].wan
            assert pbrd.command("drain", "fiber").returncode == 0
            assert lab.exit_of() == "lte"
            counter = lab.counter("tcp dport 8080")
            assert talks(client, peer)
            assert counter.read()["fiber"] > 0
            assert pbrd.uplink("fiber")["state"] == "drained"
            assert pbrd.command("status").returncode == 0
            pbrd.stop()
            pbrd.restart()
            assert pbrd.command("plan").stdout == "nothing to change\n"
            assert lab.exit_of() == "lte"
            assert pbrd.command("undrain", "fiber").returncode == 0
            assert lab.exit_of() == "fiber"
    assert 'no uplink is called that (did you mean "fiber"?)' in pbrd.command("drain", "fibre").stderr


def test_a_program_on_the_box_learns_at_once_that_its_uplink_is_dead(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon)
    with served(lab, lab.net, TARGETS[0], 8080) as server:
        client = connected(lab, lab.router, "", TARGETS[0], 8080)
        peer, _ = server.accept()
        client.settimeout(5)
        with client, peer:
            lab.silence(0)
            eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
            with pytest.raises(OSError, match=r"abort|reset"):
                client.recv(1)


def test_a_reload_that_needs_nft_where_there_is_none_changes_nothing(
    lab: Lab, daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for tool in ("ip", "mount", "sh"):  # all that starting the daemon in the lab takes; nft is not among it
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tmp_path))
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + POLICIES)
    monkeypatch.undo()
    rules = lab.run(lab.router, "ip", "rule").stdout
    refused = pbrd.reload(CONFIG)
    assert refused.returncode == 1
    assert "nft is not installed" in refused.stderr
    assert lab.run(lab.router, "ip", "rule").stdout == rules
    assert pbrd.status()["last_reload"]["ok"] is False
    assert lab.exit_of() == "fiber"


def busy(client: socket.socket, peer: socket.socket, seconds: float) -> None:
    """Talk without a pause."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert talks(client, peer)


def test_reloads_of_other_policies_break_no_live_connection(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon)
    other = (
        '[[policies]]\nname = "other{n}"\nmatch = {{ from = "192.168.100.{n}" }}\nvia = ["lte"]\n[[policies]]'
    )
    with served(lab, lab.net, TARGETS[0], 8080) as server:
        client = connected(lab, lab.lan, LAN[0], TARGETS[0], 8080)
        peer, _ = server.accept()
        with client, peer:
            for n in range(70, 76):
                text = CONFIG.replace("[[policies]]", other.format(n=n), 1)
                assert pbrd.reload(text).returncode == 0
                busy(client, peer, 0.2)


@pytest.mark.parametrize("number", [SIGKILL, SIGTERM])
def test_a_kill_switch_that_a_restart_brings_holds_for_live_connections(
    lab: Lab, daemon: StartDaemon, number: int
) -> None:
    pbrd = start(lab, daemon)
    with closing(lab.flow(Packet(dst=TARGETS[0], src=LAN[0], sport=5555))) as flow:
        assert flow.exit() == "fiber"
        only_lte = f'[[policies]]\nname = "new"\nmatch = {{ from = "{LAN[0]}" }}\nvia = ["lte"]\n'
        only_lte += 'fallback = "unreachable"\n[[policies]]'
        pbrd.stop(number)
        pbrd.config.write_text(CONFIG.replace("[[policies]]", only_lte, 1))
        pbrd.restart()
        flow.exit(0.1)  # the packet that meets the old NAT ends it
        assert flow.exit() == "lte"


def test_flows_stay_when_another_uplink_joins_or_leaves(make_lab: MakeLab, daemon: StartDaemon) -> None:
    lab = make_lab(("wg", "fiber", "lte"))
    wg = '[uplinks.wg]\ninterface = "wg"\nnat = true\n'
    pbrd = start(lab, daemon, HEAD + PROBE + wg + NAT + POLICIES)
    lab.silence(1)
    eventually(lambda: goes_by(pbrd, "lte"))
    with closing(lab.flow(Packet(dst=TARGETS[0], src=LAN[0], sport=5555))) as flow:
        eventually(lambda: flow.exit() == "lte", within=2)
        lab.silence(1, False)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
        for text in (HEAD + PROBE + NAT + POLICIES, HEAD + PROBE + wg + NAT + POLICIES):
            assert pbrd.reload(text).returncode == 0
            assert flow.exit() == "lte"


def test_no_private_address_leaves_by_an_uplink_with_nat(lab: Lab, daemon: StartDaemon) -> None:
    """A flow that began where no NAT is must not just move over, as the kernel would have it."""
    text = CONFIG.replace('"fiber"\nnat = true\nnat6 = true', '"fiber"', 1)
    pbrd = start(lab, daemon, text)
    private = lab.counter(f"ip saddr {LAN[0]}")
    with closing(lab.flow(Packet(dst=TARGETS[0], src=LAN[0], sport=5555))) as flow:
        assert flow.exit() == "fiber"
        lab.carrier(0, False)
        eventually(lambda: goes_by(pbrd, "lte"))
        eventually(lambda: flow.exit(0.1) == "lte", within=3)
    assert private.read()["lte"] == 0


def test_a_flow_without_nat_goes_on_where_a_reload_sends_it_to_be_masqueraded(
    lab: Lab, daemon: StartDaemon
) -> None:
    """The kernel decides about NAT once in a connection's life: it has to begin anew."""
    tail = '[default]\nvia = ["fiber"]\n'
    half = HEAD + PROBE + UPLINKS.replace('"lte"', '"lte"\nnat = true\nnat6 = true')
    pbrd = start(lab, daemon, half + tail)
    for source, target in ((LAN[2], TARGETS[0]), (LAN6[2], TARGETS6[0])):
        with closing(lab.flow(Packet(src=source, dst=target))) as flow:
            assert pbrd.reload(half + tail).returncode == 0
            assert flow.exit() == "fiber"
            assert pbrd.reload(half + POLICIES).returncode == 0
            eventually(functools.partial(leaves_by, flow, "lte"))


def leaves_by(flow: Flow, uplink: str) -> bool:
    return flow.exit(0.1) == uplink


FROM = f'from = ["{LAN[2]}", "{LAN6[2]}"]'
MORE = [f"10.{number}.0.0/{16 + number % 9}" for number in range(200, 217)]
SWITCHES = {  # with sets of prefixes or ranges, which the kernel fills only after the table is live
    "plain": FROM,
    "few": FROM.replace("]", "".join(f', "{prefix}"' for prefix in MORE[:3]) + "]"),
    "ports": FROM + ", proto = 'udp', sport = ['1-5', '10000-39999', '40000-59999']",
    "long": FROM.replace("]", "".join(f', "{prefix}"' for prefix in MORE) + "]"),
}


@pytest.mark.parametrize(("switch", "others"), [("plain", 0), *((switch, 600) for switch in SWITCHES)])
def test_swapped_uplinks_leak_nothing(lab: Lab, daemon: StartDaemon, switch: str, others: int) -> None:
    """Many policies take nft a while: nobody may feel that, not even connections that begin right then."""
    macs = (f"52:54:00:00:{number >> 8:02x}:{number & 255:02x}" for number in range(others))
    many = "".join(
        f'[[policies]]\nname = "m{mac[-5:-3]}{mac[-2:]}"\nmatch = {{ mac = ["{mac}"] }}\nvia = ["fiber"]\n'
        for mac in macs
    )
    fiber, lte = NAT.split("[uplinks.lte]")
    policies = POLICIES.replace("[default]", many + "[default]").replace(FROM, SWITCHES[switch])
    there, swapped = (HEAD + PROBE + uplinks + policies for uplinks in (NAT, "[uplinks.lte]" + lte + fiber))
    pbrd = start(lab, daemon, there)
    leaks = lab.counter(f"ip saddr {{ {lab.uplinks[0].address}, {LAN[2]} }} udp sport 10000-59999")
    stop = threading.Event()

    def flood() -> None:
        for sport in range(10000, 60000):
            if stop.is_set():
                return
            with closing(lab.flow(Packet(dst=TARGETS[0], src=LAN[2], sport=sport))) as flow:
                flow.exit(0.001)

    flooding = threading.Thread(target=flood)
    flooding.start()
    for text in (swapped, there) * 3:
        assert pbrd.reload(text).returncode == 0
    stop.set()
    flooding.join()
    assert leaks.read()["fiber"] == 0


def test_a_small_mask_has_no_room_for_slices_and_the_daemon_lives(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + "fwmark_mask = 0x0f000000\n" + PROBE + UPLINKS + POLICIES)
    assert lab.exit_of() == "fiber"
    assert pbrd.reload(HEAD + "fwmark_mask = 0x03000000\n" + PROBE + NAT + POLICIES).returncode == 78
    assert lab.exit_of() == "fiber"


def test_answers_of_a_dead_uplink_leave_by_no_other(lab: Lab, daemon: StartDaemon) -> None:
    """They are not judged by policies, so a kill switch could not hold them back elsewhere."""
    pbrd = start(lab, daemon)
    side = lab.uplinks[1]
    route_to(lab, 1, side.address)
    lab.nft(
        lab.router,
        f"""table ip forward {{ chain pre {{ type nat hook prerouting priority dstnat;
        tcp dport 8443 dnat to {LAN[2]}:443; }}; }}""",
    )
    leaks = lab.counter("tcp sport { 443, 8443 }")
    with served(lab, lab.lan, LAN[2], 443) as server:
        client = connected(lab, lab.net, "", side.address, 8443)
        peer, _ = server.accept()
        with client, peer:
            assert talks(client, peer)
            lab.silence(1)
            eventually(lambda: pbrd.uplink("lte")["state"] == "down")
            for _ in range(10):
                peer.sendall(b"secret")
                time.sleep(0.05)
    assert leaks.read()["fiber"] == 0
