"""Traps that others fell into, each with real packets (the issue numbers name where)."""

import socket
import time

import pytest
from conftest import HEAD, PROBE, UPLINKS, Leaving, MakeLab, StartDaemon, all_up, eventually

from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab, Uplink

POLICIES = f"""
[[policies]]
name = "backups"
match = {{ from = ["{LAN[1]}", "{LAN6[1]}"] }}
via = ["lte", "fiber"]
[default]
via = ["fiber", "lte"]
"""
CONFIG = HEAD + PROBE + UPLINKS + POLICIES


def default_of(lab: Lab, table: int) -> str:
    return lab.run(lab.router, "ip", "route", "show", "table", str(table), "default", check=False).stdout


def test_probes_of_the_standby_never_leave_by_the_active_uplink(lab: Lab, daemon: StartDaemon) -> None:
    """openwrt/packages#12309: a bound probe's replies and routes must obey the uplink, alive or dead."""
    seen = lab.counter(f"ip daddr {TARGETS[2]} icmp type echo-request ip saddr {lab.uplinks[1].address}")
    seen6 = lab.counter(
        f"ip6 daddr {TARGETS6[2]} icmpv6 type echo-request ip6 saddr {lab.uplinks[1].address6}"
    )
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.silence(1)
    eventually(lambda: pbrd.uplink("lte")["state"] == "down")
    eventually(lambda: seen.read()["lte"] > 8 and seen6.read()["lte"] > 8)
    assert seen.read()["fiber"] == 0
    assert seen6.read()["fiber"] == 0
    lab.silence(1, False)
    eventually(lambda: pbrd.uplink("lte")["state"] == "up")


def test_two_uplinks_with_the_same_gateway_and_subnet(make_lab: MakeLab, daemon: StartDaemon) -> None:
    """opnsense/core#5778, openwrt/packages#13907."""
    lab = make_lab(
        (
            Uplink("fiber", address="10.0.9.2", gateway="10.0.9.1", address6="off"),
            Uplink("lte", address="10.0.9.3", gateway="10.0.9.1", address6="off"),
        )
    )
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + POLICIES.replace(f', "{LAN6[1]}"', ""))
    eventually(lambda: all_up(pbrd))
    assert lab.exit_of() == "fiber"
    assert lab.exit_of(src=LAN[1]) == "lte"
    lab.silence(0)
    eventually(lambda: lab.exit_of() == "lte")
    assert pbrd.uplink("lte")["state"] == "up"


def test_a_gateway_outside_every_prefix(make_lab: MakeLab, daemon: StartDaemon) -> None:
    """Hosters give a /32 address and a gateway that only `onlink` reaches."""
    lab = make_lab((Uplink("fiber", prefix=32), Uplink("lte")))
    text = (
        HEAD
        + PROBE
        + UPLINKS.replace('"fiber"', f'"fiber"\ngateway = "{lab.uplinks[0].gateway}"', 1)
        + POLICIES
    )
    pbrd = daemon(lab, text)
    eventually(lambda: all_up(pbrd))
    assert "onlink" in default_of(lab, 200)
    assert lab.exit_of() == "fiber"


def test_a_point_to_point_uplink(make_lab: MakeLab, daemon: StartDaemon) -> None:
    lab = make_lab((Uplink("fiber"), Uplink("wg0", point_to_point=True)))
    uplinks = '[uplinks.fiber]\ninterface = "fiber"\n'
    uplinks += '[uplinks.wg0]\ninterface = "wg0"\ngateway = "none"\ngateway6 = "none"\n'
    pbrd = daemon(lab, HEAD + PROBE + uplinks + POLICIES.replace('"lte"', '"wg0"'))
    eventually(lambda: all_up(pbrd))
    assert default_of(lab, 201).startswith("default dev wg0")
    assert lab.exit_of(src=LAN[1]) == "wg0"
    assert lab.exit_of(src=LAN6[1]) == "wg0"


def test_dhcp_brings_another_gateway_and_the_same_one_again(lab: Lab, daemon: StartDaemon) -> None:
    """opnsense/core#5956, #7635: follow the new one; the same one again must cause nothing."""
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    transitions = pbrd.uplink("fiber")["transitions"]
    again = f"route replace default via {lab.uplinks[0].gateway} dev fiber proto dhcp metric 100"
    stream = Leaving(lab)
    for _ in range(5):
        lab.ip(lab.router, again)
    lab.ip(lab.router, f"route del default dev fiber metric 100\n{again.replace('replace', 'add')}")
    lab.ip(lab.uplinks[0].isp, "addr add 10.0.1.254/24 dev gw")
    lab.ip(lab.router, "route replace default via 10.0.1.254 dev fiber proto dhcp metric 100")
    eventually(lambda: "10.0.1.254" in default_of(lab, 200))
    eventually(lambda: pbrd.uplink("fiber")["ipv4"]["gateway"] == "10.0.1.254")
    time.sleep(0.3)
    assert stream.stop() == (["fiber"], 0)
    assert pbrd.uplink("fiber")["transitions"] == transitions
    assert "gateway changed" in pbrd.log


def test_dhcp_brings_another_address_and_subnet(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.ip(
        lab.uplinks[0].isp, "addr add 10.55.0.1/24 dev gw\nroute add 192.168.100.0/24 via 10.55.0.2 metric 1"
    )
    lab.ip(lab.router, "addr del 10.0.1.2/24 dev fiber\naddr add 10.55.0.2/24 dev fiber")
    lab.ip(lab.router, "route add default via 10.55.0.1 dev fiber proto dhcp metric 100")
    eventually(lambda: "via 10.55.0.1" in default_of(lab, 200))
    eventually(lambda: lab.exit_of(local=True, src="10.55.0.2") == "fiber")
    rules = lab.run(lab.router, "ip", "rule").stdout
    assert "10.55.0.2" in rules
    assert "10.0.1.2 " not in rules
    eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)


def test_an_address_that_goes_for_a_moment_takes_its_routes_along_silently(
    lab: Lab, daemon: StartDaemon
) -> None:
    """keepalived#1719, and every restart of systemd-networkd: no route event tells of it."""
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    transitions = pbrd.uplink("fiber")["transitions"]
    gateway = lab.uplinks[0].gateway
    for _ in range(5):
        lab.ip(lab.router, "addr del 10.0.1.2/24 dev fiber")
        time.sleep(0.02)
        lab.ip(lab.router, "addr add 10.0.1.2/24 dev fiber")
        lab.ip(lab.router, f"route add default via {gateway} dev fiber proto dhcp metric 100")
        eventually(lambda: f"via {gateway}" in default_of(lab, 200), within=0.5)
        eventually(lambda: f"via {gateway}" in default_of(lab, 1200), within=0.5)
    assert pbrd.uplink("fiber")["transitions"] == transitions
    assert lab.exit_of() == "fiber"
    assert "refuses" not in pbrd.log


def test_an_interface_that_vanishes_and_returns_with_another_index(lab: Lab, daemon: StartDaemon) -> None:
    """ppp, wg, USB modems (firehol#216): no error loop meanwhile, and everything back afterwards."""
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    rules = lab.run(lab.router, "ip", "rule").stdout
    lab.unplug(1)
    eventually(lambda: pbrd.uplink("lte")["reason"] == "missing", within=1)
    assert lab.exit_of(src=LAN[1]) == "fiber"
    lines = pbrd.log.count("\n")
    time.sleep(1)
    assert pbrd.log.count("\n") == lines
    lab.plug(1)
    eventually(lambda: pbrd.uplink("lte")["state"] == "up", within=10)
    eventually(lambda: lab.exit_of(src=LAN[1]) == "lte", within=1)
    eventually(lambda: lab.exit_of(src=LAN6[1]) == "lte", within=1)
    sysctl = lab.run(lab.router, "sysctl", "-n", "net.ipv4.conf.lte.ignore_routes_with_linkdown").stdout
    assert sysctl == "1\n"
    now = lab.run(lab.router, "ip", "rule").stdout
    assert now.replace("[detached] ", "") == rules


def test_an_uplink_that_is_not_there_at_the_start(lab: Lab, daemon: StartDaemon) -> None:
    lab.unplug(1)
    pbrd = daemon(lab, CONFIG)
    assert (pbrd.uplink("lte")["state"], pbrd.uplink("lte")["reason"]) == ("down", "missing")
    lab.plug(1)
    eventually(lambda: pbrd.uplink("lte")["state"] == "up", within=10)
    eventually(lambda: lab.exit_of(src=LAN[1]) == "lte", within=1)


def test_admin_down_and_up(lab: Lab, daemon: StartDaemon) -> None:
    """The kernel drops the routes of all tables, and tells nobody (IPv4); they come back with the link."""
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    stream = lab.traffic(rate=1000)
    time.sleep(0.2)
    lab.admin(0, False)
    eventually(lambda: pbrd.uplink("fiber")["reason"] == "admin-down", within=1)
    time.sleep(0.2)
    lab.admin(0, True)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
    eventually(lambda: lab.exit_of() == "fiber")
    result = stream.stop()
    assert result.path == ["fiber", "lte", "fiber"]
    assert result.lost <= 20


def test_a_gateway_that_is_gone_is_no_gateway(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    for family in ("-4", "-6"):
        lab.run(lab.router, "ip", family, "route", "del", "default", "dev", "fiber", "metric", "100")
    eventually(lambda: pbrd.uplink("fiber")["reason"] == "no-gateway", within=2)
    assert lab.exit_of() == "lte"
    assert default_of(lab, 1200) == ""


def test_short_carrier_losses_are_all_seen(lab: Lab, daemon: StartDaemon) -> None:
    """The kernel's linkwatch holds back a second change within a second (opnsense/core#4160)."""
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    for _ in range(4):
        lab.carrier(0, False)
        eventually(lambda: pbrd.uplink("fiber")["reason"] == "no-carrier", within=0.5)
        lab.carrier(0, True)
        eventually(lambda: pbrd.uplink("fiber")["reason"] != "no-carrier", within=0.5)
    eventually(lambda: all_up(pbrd), within=15)
    assert lab.exit_of() == "fiber"


def test_other_peoples_ipv6_routes_can_still_be_added(lab: Lab, daemon: StartDaemon) -> None:
    """The kernel resolves IPv6 gateways through the rules: a fresh prefix must be found in main."""
    daemon(lab, CONFIG)
    lab.ip(lab.router, "addr add fd99::2/64 dev fiber nodad\nroute add fd98::/64 via fd99::1 dev fiber")
    lab.ip(lab.router, "route add fd97::/64 via fd99::1")


def test_two_halves_of_the_default_route_win_over_policies(lab: Lab, daemon: StartDaemon) -> None:
    """OpenVPN's def1: 0.0.0.0/1 and 128.0.0.0/1 are specific routes of main; override_main is above them."""
    gateway = lab.uplinks[0].gateway
    lab.ip(lab.router, f"route add 0.0.0.0/1 via {gateway}\nroute add 128.0.0.0/1 via {gateway}")
    pbrd = daemon(lab, CONFIG)
    assert lab.exit_of(src=LAN[1]) == "fiber"
    pbrd.reload(CONFIG.replace('"] }', '"], override_main = true }'))
    assert lab.exit_of(src=LAN[1]) == "lte"


@pytest.mark.parametrize("target", ["192.168.100.1", "10.0.1.2"])
def test_the_box_itself_stays_reachable(lab: Lab, daemon: StartDaemon, target: str) -> None:
    daemon(lab, CONFIG)
    assert lab.run(lab.lan, "ping", "-c1", "-W1", "-I", LAN[1], target).returncode == 0


def test_a_neighbour_in_an_uplinks_own_subnet_is_reached_directly(lab: Lab, daemon: StartDaemon) -> None:
    daemon(lab, CONFIG)
    gateway = lab.uplinks[0].gateway
    assert lab.run(lab.lan, "ping", "-c1", "-W1", "-I", LAN[1], gateway, check=False).returncode == 0


def test_a_local_firewall_that_drops_our_probes_fails_nothing_over(lab: Lab, daemon: StartDaemon) -> None:
    """A probe that can't be sent is a reason of its own, not a lost packet."""
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.nft(
        lab.router,
        """table inet fw { chain out { type filter hook output priority 0;
        oifname "fiber" icmp type echo-request drop;
        oifname "fiber" icmpv6 type echo-request drop; }; }""",
    )
    eventually(lambda: pbrd.uplink("fiber")["reason"] == "unsendable")
    assert pbrd.uplink("fiber")["state"] == "up"
    assert lab.exit_of() == "fiber"


def test_netlink_overflow_means_look_again(lab: Lab, daemon: StartDaemon) -> None:
    """More events than the socket holds, while the daemon can't read them: nothing is missed for good."""
    from signal import SIGCONT, SIGSTOP

    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    pbrd.signal(SIGSTOP)
    flood = "\n".join(
        f"rule add priority 5000 from 10.{n >> 8}.{n & 255}.0/24 lookup 5000" for n in range(20000)
    )
    lab.ip(lab.router, flood)
    lab.ip(lab.router, flood.replace("rule add", "rule del"))
    lab.run(lab.router, "ip", "rule", "del", "priority", "11000")
    pbrd.signal(SIGCONT)
    eventually(lambda: "11000:" in lab.run(lab.router, "ip", "rule").stdout, within=10)


def test_churn_in_the_main_table_does_not_reach_the_daemon(lab: Lab, daemon: StartDaemon) -> None:
    """A full BGP feed: neither dumped nor decoded, and a carrier loss is still noticed in milliseconds."""
    feed = "\n".join(
        f"route add {20 + (n >> 16)}.{n >> 8 & 255}.{n & 255}.0/24 via {lab.uplinks[0].gateway} proto bird"
        for n in range(200_000)
    )
    lab.ip(lab.router, feed)
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))

    def cpu() -> int:
        with open(f"/proc/{pbrd.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = cpu()
    some = "\n".join(feed.splitlines()[:50_000])
    lab.ip(lab.router, some.replace("route add", "route del") + "\n" + some)
    ticks = cpu() - before  # of 10 ms, while 100,000 routes changed
    assert ticks < 60
    stream = lab.traffic(rate=1000)
    time.sleep(0.2)
    lab.carrier(0, False)
    time.sleep(0.4)
    result = stream.stop()
    assert result.path == ["fiber", "lte"]
    assert result.lost <= 20
    eventually(lambda: pbrd.uplink("fiber")["reason"] == "no-carrier", within=0.5)


def test_curl_by_interface_leaves_by_an_uplink_that_is_down(lab: Lab, daemon: StartDaemon) -> None:
    """Tables of a dead uplink stay for bound sockets (openwrt/packages#4721): one can look why it is dead."""
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.nft(lab.uplinks[1].isp, "add rule inet fault silence ip protocol icmp drop")
    eventually(lambda: pbrd.uplink("lte")["ipv4"]["state"] == "down")
    assert lab.exit_of(local=True, device="lte") == "lte"
    with lab.inside(lab.router), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lte")
        probe.connect((TARGETS[0], 9))
        assert probe.getsockname()[0] == lab.uplinks[1].address


# --- what a hostile administrator found -------------------------------------------------------


@pytest.mark.parametrize("side", ["from", "to"])
def test_a_prefix_without_length_is_no_selector(lab: Lab, daemon: StartDaemon, side: str) -> None:
    """The kernel shows 0.0.0.0/0 as nothing: comparing it with our words must not start a fight."""
    policy = f'[[policies]]\nname = "one"\nmatch = {{ iif = "lan", {side} = ["0.0.0.0/0", "::/0"] }}\n'
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + policy + 'via = ["lte"]\nfallback = "unreachable"\n')
    leaks = lab.counter(f"ip saddr {LAN[0]}")
    stream = lab.traffic(rate=500)
    time.sleep(0.5)
    assert stream.stop().path == ["lte"]
    assert leaks.read()["fiber"] == 0
    assert pbrd.status()["drift_repairs"] == 0
    assert pbrd.command("plan").returncode == 0


@pytest.mark.parametrize(
    "match",
    ["proto = 'tcp', dport = 22", "proto = 'udp', sport = '1000-2000'", "dscp = 'ef'", "fwmark = '0x0/0x1'"],
)
def test_rules_are_read_back_as_they_were_written(lab: Lab, daemon: StartDaemon, match: str) -> None:
    """Newer kernels add attributes to what they show (masks of ports and DSCP)."""
    policy = f'[[policies]]\nname = "one"\nmatch = {{ {match} }}\nvia = ["lte"]\n'
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + policy)
    assert pbrd.command("plan").stdout == "nothing to change\n"
    assert pbrd.status()["drift_repairs"] == 0


def test_rules_of_multicast_routing_concern_nobody(lab: Lab, daemon: StartDaemon) -> None:
    """They come on the same netlink groups; the first VRF of a machine makes some, too."""
    pbrd = daemon(lab, CONFIG)
    made = lab.run(lab.router, "ip", "mrule", "add", "iif", "lan", "table", "700", check=False)
    if made.returncode:
        pytest.skip(f"no multicast routing here: {made.stderr}")
    lab.run(lab.router, "ip", "-6", "mrule", "add", "iif", "lan", "table", "700", check=False)
    time.sleep(0.2)
    assert pbrd.status()["pid"] == pbrd.pid


def test_interfaces_that_come_and_go_without_end_tear_nothing_down(lab: Lab, daemon: StartDaemon) -> None:
    """A dump of links is then never whole; the mirror must not be left empty."""
    lab.ip(lab.router, "\n".join(f"link add v{n} type veth peer name w{n}" for n in range(150)))
    churn = "while :; do ip link add x0 type veth peer name x1; ip link del x0; done 2>/dev/null"
    for n in range(2):
        lab.spawn(lab.router, ["sh", "-c", churn.replace("x0", f"x{n}a").replace("x1", f"x{n}b")])
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    transitions = [uplink["transitions"] for uplink in pbrd.status()["uplinks"]]
    for _ in range(8):
        pbrd.command("plan")
    assert [uplink["transitions"] for uplink in pbrd.status()["uplinks"]] == transitions
    assert "missing" not in pbrd.log


def test_table_ids_that_shift_leak_nothing(lab: Lab, daemon: StartDaemon) -> None:
    """An uplink that is put before others takes over their tables, while rules still look there."""
    kill = f'[[policies]]\nname = "k"\nmatch = {{ from = "{LAN[1]}" }}\nvia = ["lte"]\n'
    kill += 'fallback = "unreachable"\n'
    fiber, lte = '[uplinks.fiber]\ninterface = "fiber"\n', '[uplinks.lte]\ninterface = "lte"\n'
    probe = "[probe]\ntargets = []\n"
    pbrd = daemon(lab, HEAD + probe + fiber + lte + kill)
    leaks = lab.counter(f"ip saddr {LAN[1]}")
    stream = lab.traffic(rate=2000, src=LAN[1])
    for order in (lte + fiber, fiber + lte) * 10:
        assert pbrd.reload(HEAD + probe + order + kill).returncode == 0
    stream.stop()
    assert leaks.read()["fiber"] == 0


def test_a_restart_with_another_order_of_uplinks_keeps_their_health(lab: Lab, daemon: StartDaemon) -> None:
    fiber, lte = '[uplinks.fiber]\ninterface = "fiber"\n', '[uplinks.lte]\ninterface = "lte"\n'
    pbrd = daemon(lab, HEAD + PROBE + fiber + lte + POLICIES)
    eventually(lambda: all_up(pbrd))
    lab.silence(0)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
    pbrd.stop()
    pbrd.config.write_text(HEAD + PROBE + lte + fiber + POLICIES)
    pbrd.restart()
    assert pbrd.uplink("lte")["state"] != "down"
    assert lab.exit_of() == "lte"


def test_an_error_route_as_default_of_main_is_named(lab: Lab, daemon: StartDaemon) -> None:
    """It ends the walk of rules at `lookup main`, whatever suppress_prefixlength says."""
    lab.ip(lab.router, "route add unreachable default metric 50")
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: "an error route is the default of the main table" in pbrd.log)


def test_a_default_by_a_gateway_of_the_other_family_is_no_gateway(lab: Lab, daemon: StartDaemon) -> None:
    lab.ip(lab.router, "route del default dev fiber metric 100")
    lab.run(
        lab.router,
        "ip",
        "-4",
        "route",
        "add",
        "default",
        "via",
        "inet6",
        lab.uplinks[0].gateway6,
        "dev",
        "fiber",
    )
    pbrd = daemon(lab, CONFIG)
    assert default_of(lab, 200) == ""
    assert pbrd.uplink("fiber")["ipv4"] is None


def test_the_source_address_of_the_learned_default_is_kept(lab: Lab, daemon: StartDaemon) -> None:
    lab.ip(lab.router, "addr add 10.0.1.77/24 dev fiber")
    gateway = lab.uplinks[0].gateway
    lab.ip(lab.router, f"route replace default via {gateway} dev fiber src 10.0.1.77 proto dhcp metric 100")
    daemon(lab, CONFIG)
    assert "src 10.0.1.77" in default_of(lab, 200)


def test_what_bears_our_number_but_is_not_ours_goes(lab: Lab, daemon: StartDaemon) -> None:
    odd = ("not from 10.9.9.9 lookup 200 priority 12000", "from 10.9.9.8 goto 32766 priority 12001")
    for rule in odd:
        lab.run(lab.router, "ip", "rule", "add", *rule.split(), "protocol", "112")
    lab.ip(lab.router, "route add blackhole 10.99.0.0/16 table 200 proto 112")
    pbrd = daemon(lab, CONFIG)
    rules = lab.run(lab.router, "ip", "rule").stdout
    assert "12000:" not in rules
    assert "12001:" not in rules
    assert "blackhole" not in lab.run(lab.router, "ip", "route", "show", "table", "200").stdout
    assert pbrd.command("plan").returncode == 0


def test_status_does_not_claim_an_uplink_whose_route_the_kernel_refuses(
    lab: Lab, daemon: StartDaemon
) -> None:
    own = lab.uplinks[0].address6
    pbrd = daemon(lab, CONFIG.replace('interface = "fiber"', f'interface = "fiber"\ngateway6 = "{own}"'))
    assert pbrd.policy("default")["families"]["ipv6"] == "lte"
