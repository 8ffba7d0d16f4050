"""Live connections: which stay where they are, and which can't; both families, real packets."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from signal import SIGKILL

import pytest
from conftest import HEAD, PROBE, UPLINKS, MakeLab, StartDaemon, all_up, eventually, goes_by
from test_nat import NAT, bound, connected, families, served, start, talks

from pbrd.errors import LabError
from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab

DSL = '[uplinks.dsl]\ninterface = "dsl"\nnat = true\nnat6 = true\n'
SOME = f"""
[[policies]]
name = "some"
match = {{ from = ["{LAN[0]}", "{LAN6[0]}"] }}
via = ["fiber"]
[default]
via = ["lte", "dsl"]
"""
BEST = '[default]\nvia = ["fiber", "lte"]\nfallback = "best-effort"\n'
DEFAULT = '[default]\nvia = ["fiber", "lte"]\n'


@contextmanager
def talk(lab: Lab, source: str, target: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection of the LAN client."""
    with ExitStack() as stack:
        server = stack.enter_context(served(lab, lab.net, target, 8080))
        client = stack.enter_context(connected(lab, lab.lan, source, target, 8080))
        yield client, stack.enter_context(server.accept()[0])


def stays(lab: Lab, pair: tuple[socket.socket, socket.socket], uplink: str) -> None:
    counter = lab.counter("tcp dport 8080")
    for _ in range(10):
        assert talks(*pair)
    assert {name for name, packets in counter.read().items() if packets} == {uplink}


@families
def test_what_a_policy_passed_on_to_default_stays_when_the_policys_uplink_heals(
    make_lab: MakeLab, daemon: StartDaemon, source: str, target: str
) -> None:
    lab = make_lab(("fiber", "lte", "dsl"))
    pbrd = start(lab, daemon, HEAD + PROBE + NAT + DSL + SOME)
    lab.silence(0)
    lab.silence(1)
    eventually(lambda: goes_by(pbrd, "dsl"))
    eventually(lambda: pbrd.policy("some")["state"] == "fallback")
    with talk(lab, source, target) as pair:
        stays(lab, pair, "dsl")
        for healed in (1, 0):  # the better one of [default], then that of the policy
            lab.silence(healed, False)
            name = lab.uplinks[healed].name
            eventually(lambda name=name: pbrd.uplink(name)["state"] == "up", within=10)  # type: ignore[misc]
            stays(lab, pair, "dsl")
        pbrd.command("drain", "dsl")
        stays(lab, pair, "dsl")


@families
def test_best_effort_leaves_connections_where_they_are_when_only_the_targets_die(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    pbrd = start(lab, daemon, HEAD + PROBE + NAT + BEST)
    lab.silence(0)
    eventually(lambda: goes_by(pbrd, "lte"))
    with talk(lab, source, target) as pair:
        lab.silence(0, False)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
        stays(lab, pair, "lte")
        lab.nft(lab.net, "table inet deaf { chain in { type filter hook input priority 0; }; }")
        for kind in ("icmp", "icmpv6"):
            lab.nft(lab.net, f"add rule inet deaf in {kind} type echo-request drop")
        eventually(lambda: all(u["state"] == "down" for u in pbrd.status()["uplinks"]), within=10)
        stays(lab, pair, "lte")


def sent(lab: Lab, match: str, sender: socket.socket, times: int = 40) -> dict[str, int]:
    """Send so many packets; return by which uplinks those that match have left."""
    counter = lab.counter(match)
    for _ in range(times):
        with suppress(OSError):  # nobody takes them, and the kernel drops one as it forgets a connection
            sender.send(b"x")
        time.sleep(0.005)
    return {name: packets for name, packets in counter.read().items() if packets}


@families
def test_a_flow_of_this_machine_with_an_uplinks_address_fails_over_and_stays(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    """It looks the same masqueraded or not, and was taken for one without NAT."""
    pbrd = start(lab, daemon, HEAD + PROBE + NAT + DEFAULT)
    with bound(lab, lab.router, "", 51820, ":" in source) as near:
        near.connect((target, 51820))
        assert sent(lab, "udp dport 51820", near).keys() == {"fiber"}
        lab.silence(0)
        eventually(lambda: goes_by(pbrd, "lte"))
        eventually(lambda: sent(lab, "udp dport 51820", near).keys() == {"lte"})
        lab.silence(0, False)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
        if "." in source:  # IPv6 masquerading begins anew with the address that it has
            assert sent(lab, "udp dport 51820", near).keys() == {"lte"}


@pytest.mark.parametrize("lost", ["nat", "table", "ruleset"])
@families
def test_what_began_without_nat_begins_anew_with_it(
    lab: Lab, daemon: StartDaemon, source: str, target: str, lost: str
) -> None:
    """Be it that the config had none, or that there was no table for a while, with a daemon or without."""
    plain = NAT.replace("nat = true", "nat = false").replace("nat6 = true", "nat6 = false")
    pbrd = start(lab, daemon, HEAD + PROBE + (plain if lost == "nat" else NAT) + DEFAULT)
    private = f"ip6 saddr {source}" if ":" in source else f"ip saddr {source}"
    if lost == "table":
        pbrd.stop(SIGKILL)
    if lost != "nat":
        lab.nft(lab.router, "flush ruleset")
    with bound(lab, lab.lan, source, 40000) as client:
        client.connect((target, 40000))
        sent(lab, private, client)
        if lost == "nat":
            assert pbrd.reload(HEAD + PROBE + NAT + DEFAULT).returncode == 0
        elif lost == "table":
            pbrd.restart()
        eventually(lambda: all_up(pbrd))
        eventually(lambda: not sent(lab, private, client))
        assert sent(lab, "udp dport 40000", client).keys() == {"fiber"}


@families
def test_a_kill_switch_holds_for_what_began_before_nftables_was_in_use(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    """Nobody has tracked it, and what the other side sends looks like a connection from outside."""
    pbrd = start(lab, daemon, HEAD + PROBE + UPLINKS + DEFAULT)
    mac = lab.run(lab.lan, "cat", "/sys/class/net/eth0/address").stdout.strip()
    switch = (
        f'[[policies]]\nname = "s"\nmatch = {{ mac = "{mac}" }}\nvia = ["lte"]\nfallback = "unreachable"\n'
    )
    with talk(lab, source, target) as (client, peer):
        stop = threading.Event()
        client.settimeout(0.1)
        peer.settimeout(0.1)
        threads = [threading.Thread(target=pour, args=one) for one in ((peer, stop), (client, stop))]
        for thread in threads:
            thread.start()
        assert pbrd.reload(HEAD + PROBE + UPLINKS + switch + DEFAULT).returncode == 0
        counter = lab.counter("tcp dport 8080")
        time.sleep(1)
        stop.set()
        for thread in threads:
            thread.join()
        assert counter.read()["fiber"] == 0


def pour(end: socket.socket, stop: threading.Event) -> None:
    """Send without a rest, and take what comes."""
    while not stop.wait(0.001):
        with suppress(OSError):
            end.send(b"x" * 1000)
        with suppress(OSError):
            end.recv(1 << 16, socket.MSG_DONTWAIT)


@families
def test_a_host_behind_a_router_on_the_uplinks_link_is_answered_by_that(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    """As the main table has it: answers leave by the uplink of the request, but not to its gateway."""
    start(lab, daemon, HEAD + PROBE + NAT + DEFAULT)
    isp, fiber, mac = lab.uplinks[0].isp, lab.uplinks[0], "02:00:00:00:00:fe"
    ipv6 = ":" in source
    site, router = ("fd00:50::1", "fd00:1::fe") if ipv6 else ("10.50.0.1", "10.0.1.254")
    lab.ip(lab.router, f"route add {site} via {router} dev fiber")
    lab.ip(lab.router, f"neigh replace {router} lladdr {mac} dev fiber nud permanent")
    lab.ip(isp, f"addr add {site}/{128 if ipv6 else 32} dev lo" + (" nodad" if ipv6 else ""))
    lab.nft(isp, 'table netdev link { chain in { type filter hook ingress device "gw" priority -5; }; }')
    lab.nft(isp, f"add rule netdev link in tcp sport 22 ether daddr {mac} counter")
    lab.nft(isp, f"add rule netdev link in tcp sport 22 ether daddr != {mac} counter")
    ours = fiber.address6 if ipv6 else fiber.address
    with served(lab, lab.router, ours, 22), suppress(TimeoutError):  # the answer comes to nobody
        connected(lab, isp, site, ours, 22)
    counts = re.findall(r"counter packets (\d+)", lab.nft(isp, "list chain netdev link in"))
    assert int(counts[0]) > 0
    assert int(counts[1]) == 0


OWN = """
[[policies]]
name = "own"
match = { iif = "lo", override_main = true }
via = ["lte"]
fallback = "unreachable"
"""


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS6[0]])
def test_services_answer_while_a_policy_before_main_holds_this_machine_back(
    lab: Lab, daemon: StartDaemon, target: str
) -> None:
    pbrd = start(lab, daemon, HEAD + PROBE + NAT + OWN + DEFAULT)
    lab.silence(1)
    eventually(lambda: pbrd.policy("own")["state"] == "fallback")
    fiber = lab.uplinks[0]
    ours = fiber.address6 if ":" in target else fiber.address
    with served(lab, lab.router, ours, 22) as server:
        client = connected(lab, fiber.isp, "", ours, 22)
        peer, _ = server.accept()
        with closing(client), closing(peer):
            assert talks(client, peer)


def test_a_flow_with_an_address_from_elsewhere_is_masqueraded_when_it_comes_to_an_uplink(
    lab: Lab, daemon: StartDaemon
) -> None:
    """It went through somebody's tunnel, whose route is gone: no answer could find back."""
    start(lab, daemon, HEAD + PROBE + NAT + DEFAULT)
    lab.ip(
        lab.router,
        f"""link add tun9 type veth peer name tun9p
        link set dev tun9 up
        link set dev tun9p up
        addr add 10.99.0.2/32 dev tun9
        route add {TARGETS[0]}/32 dev tun9 src 10.99.0.2
        neigh replace {TARGETS[0]} lladdr 02:00:00:00:00:99 dev tun9""",
    )
    with bound(lab, lab.router, "", 7777) as near:
        near.connect((TARGETS[0], 7777))
        sent(lab, "udp dport 7777", near)
        lab.ip(lab.router, f"route del {TARGETS[0]}/32")
        eventually(lambda: sent(lab, f"ip saddr {lab.uplinks[0].address} udp dport 7777", near), within=15)
        assert not sent(lab, "ip saddr 10.99.0.2", near)


TFTP = """table ip helped { ct helper tftp { type "tftp" protocol udp; };
chain pre { type filter hook prerouting priority filter; udp dport 69 ct helper set "tftp"; }; }"""


@pytest.mark.parametrize("override", ["", ", override_main = true"])
def test_related_connections_are_answered_where_they_come_in(
    lab: Lab, daemon: StartDaemon, override: str
) -> None:
    """The other side opens a second connection, which the kernel's helper expects (FTP, SIP, TFTP)."""
    match = f'{{ from = ["{LAN[1]}"]{override} }}'
    backups = f'[[policies]]\nname = "b"\nmatch = {match}\nvia = ["lte", "fiber"]\n'
    start(lab, daemon, HEAD + PROBE + NAT + backups + DEFAULT)
    try:
        for space in (lab.router, lab.uplinks[1].isp):
            lab.nft(space, TFTP)
    except LabError as error:
        pytest.skip(f"no helper for TFTP in this kernel: {error}")
    server, data = bound(lab, lab.net, TARGETS[0], 69), bound(lab, lab.net, TARGETS[0], 4567)
    with server, data, bound(lab, lab.lan, LAN[1], 2345) as client:
        for one in (server, data, client):
            one.settimeout(2)
        client.sendto(b"\0\1file\0octet\0", (TARGETS[0], 69))
        data.sendto(b"\0\3\0\1data", server.recvfrom(100)[1])
        assert client.recv(100) == b"\0\3\0\1data"
        acknowledged = lab.counter("udp dport 4567")
        client.sendto(b"\0\4\0\1", (TARGETS[0], 4567))
        assert data.recv(100) == b"\0\4\0\1"
        assert acknowledged.read() == {"fiber": 0, "lte": 1}


def test_immediate_failback_holds_nobody_off_who_talks_to_another_uplink(
    lab: Lab, daemon: StartDaemon
) -> None:
    """Two tunnels to one peer, with the same ports."""
    there = f'from = ["{lab.uplinks[1].address}"]'
    second = f'[[policies]]\nname = "b"\nmatch = {{ {there} }}\nvia = ["lte"]\n'
    start(lab, daemon, HEAD + PROBE + NAT + second + DEFAULT + 'failback = "immediate"\n')
    lab.ip(lab.net, f"route replace {lab.uplinks[1].address} via {lab.uplinks[1].wan}")
    first = bound(lab, lab.router, lab.uplinks[0].address, 4500)
    other = bound(lab, lab.router, lab.uplinks[1].address, 4500)
    with first, other, bound(lab, lab.net, TARGETS[0], 4500) as peer:
        for one in (other, peer):
            one.settimeout(2)
        first.sendto(b"one", (TARGETS[0], 4500))
        assert peer.recv(100) == b"one"
        peer.sendto(b"two", (lab.uplinks[1].address, 4500))
        assert other.recv(100) == b"two"
