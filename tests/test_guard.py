"""Kill switches that only nftables knows hold while it knows nothing: nobody's packet passes unjudged."""

from signal import SIGKILL

import pytest
from conftest import HEAD, PROBE, UPLINKS, Daemon, Leaving, StartDaemon, all_up, eventually

from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab

DEFAULT = '[default]\nvia = ["fiber", "lte"]\n'
OPEN = HEAD + PROBE + UPLINKS + DEFAULT
STRANGER = "52:54:00:00:00:01"
NAT = UPLINKS.replace('"lte"', '"lte"\nnat = true')


def guarded(mac: str, uplinks: str = UPLINKS) -> str:
    """What this MAC sends leaves by lte or not at all."""
    policy = (
        f'[[policies]]\nname = "lan"\nmatch = {{ mac = "{mac}" }}\nvia = ["lte"]\nfallback = "unreachable"\n'
    )
    return HEAD + PROBE + uplinks + policy + DEFAULT


def client(lab: Lab) -> str:
    return lab.run(lab.lan, "cat", "/sys/class/net/eth0/address").stdout.strip()


def start(lab: Lab, daemon: StartDaemon, config: str) -> Daemon:
    pbrd = daemon(lab, config)
    eventually(lambda: all_up(pbrd))
    return pbrd


@pytest.mark.parametrize(
    ("source", "target"), [(LAN[0], TARGETS[0]), (LAN6[0], TARGETS6[0])], ids=["ipv4", "ipv6"]
)
def test_nothing_leaks_while_the_ruleset_is_flushed(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    pbrd = start(lab, daemon, guarded(client(lab)))
    leaks = lab.counter("meta l4proto udp")
    stream = lab.traffic(rate=2000, src=source)
    for _ in range(5):
        lab.nft(lab.router, "flush ruleset")
        eventually(lambda: lab.exit_of(src=source, dst=target, within=0.1) == "lte")
    pbrd.stop(SIGKILL)
    lab.nft(lab.router, "flush ruleset")
    assert lab.exit_of(src=source, dst=target, within=0.3) is None
    pbrd.restart()
    eventually(lambda: lab.exit_of(src=source, dst=target, within=0.1) == "lte")
    assert stream.stop().path[-1] == "lte"
    assert leaks.read()["fiber"] == 0


def test_while_nobody_judges_this_machine_and_answers_go_on(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = start(lab, daemon, guarded(client(lab)))
    pbrd.stop(SIGKILL)
    lab.nft(lab.router, "flush ruleset")
    assert lab.exit_of(local=True) == "fiber"
    lab.run(lab.lan, "ping", "-c1", "-W2", "192.168.100.1")
    lab.run(lab.net, "ping", "-c1", "-W2", lab.uplinks[1].address)


def test_it_stands_before_mains_specific_routes_where_the_kill_switch_does(
    lab: Lab, daemon: StartDaemon
) -> None:
    lab.ip(lab.router, f"route add {TARGETS[1]}/32 via 10.0.1.1 dev fiber")
    override = guarded(client(lab)).replace("match = { mac", "match = { override_main = true, mac")
    pbrd = start(lab, daemon, override)
    assert lab.exit_of(dst=TARGETS[1]) == "lte"
    pbrd.stop(SIGKILL)
    lab.nft(lab.router, "flush ruleset")
    assert lab.exit_of(dst=TARGETS[1], within=0.3) is None
    assert lab.exit_of(local=True, dst=TARGETS[1]) == "fiber"
    pbrd.restart()
    assert lab.exit_of(dst=TARGETS[1]) == "lte"


def test_guards_come_and_go_without_the_loss_of_a_packet(lab: Lab, daemon: StartDaemon) -> None:
    """A guard comes after the table that lets people pass it, and goes before."""
    pbrd = start(lab, daemon, OPEN)
    stream = Leaving(lab)
    for config in (guarded(STRANGER), OPEN, HEAD + PROBE + NAT + DEFAULT, guarded(STRANGER, NAT), OPEN) * 2:
        assert pbrd.reload(config).returncode == 0
    path, lost = stream.stop()
    assert lost == 0
    assert path == ["fiber"]


def test_a_client_of_a_service_that_is_elsewhere_is_judged_by_where_it_is(
    lab: Lab, daemon: StartDaemon
) -> None:
    """The box redirects its own port: to nftables before DNAT that was a packet for the box."""
    start(lab, daemon, guarded(client(lab)))
    lab.nft(
        lab.router,
        f"""table ip elsewhere {{ chain pre {{ type nat hook prerouting priority dstnat;
        ip daddr 192.168.100.1 udp dport 53 dnat to {TARGETS[0]}; }}; }}""",
    )
    counter = lab.counter(f"ip daddr {TARGETS[0]} udp dport 53")
    lab.exit_of(dst="192.168.100.1", dport=53, within=0.3)
    assert counter.read()["lte"] > 0
    assert counter.read()["fiber"] == 0
