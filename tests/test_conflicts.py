"""What `pbrd check` says of a machine: others' rules, marks, tables, files and switches, in real kernels."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import HEAD, ROOT, UPLINKS, MakeLab, StartDaemon, as_nobody, eventually, let_others_in
from hypothesis import given
from hypothesis.strategies import text

from pbrd import conflicts, firewalls, machine, netfiles
from pbrd.config import parse
from pbrd.firewalls import Flowtable, MarkSetter
from pbrd.lab import Lab
from pbrd.neighbours import Finding, Interface, Machine
from pbrd.netfiles import Entry
from pbrd.settings import Config, Family
from pbrd.units import setting_of

POLICIES = """
[[policies]]
name = "backups"
match = { from = ["192.168.100.11"] }
via = ["lte", "fiber"]
[default]
via = ["fiber", "lte"]
"""
CONFIG = HEAD + UPLINKS + POLICIES
NAT = CONFIG.replace('interface = "fiber"', 'interface = "fiber"\nnat = true')
KILL = CONFIG.replace('["lte", "fiber"]', '["lte"]\nfallback = "unreachable"')

Say = Callable[..., list[str]]


def config_of(text: str) -> Config:
    return parse([("pbrd.toml", text)])


@pytest.fixture
def say(lab: Lab, tmp_path: Path) -> Say:
    """What is found in the lab's router, with files below a directory; each finding one line."""

    def findings(text: str = CONFIG, **files: str) -> list[str]:
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        config = config_of(text)
        with lab.inside(lab.router):
            here = machine.look(config, tmp_path)
        assert conflicts.concerns(config, here)
        return [line(finding) for finding in conflicts.findings(config, here)]

    return findings


def line(finding: Finding) -> str:
    return f"{'note' if finding.harmless else 'warning'}: {finding}"


def one(found: list[str], *parts: str) -> str:
    """The one line, which has all these parts in their order."""
    assert len(found) == 1, found
    rest = found[0]
    for part in parts:
        assert part in rest, found[0]
        rest = rest.partition(part)[2]
    return found[0]


def test_a_machine_without_neighbours_has_no_conflicts(say: Say) -> None:
    assert say() == []
    assert say(NAT) == []


def test_a_config_that_needs_nft_where_there_is_none(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROGRAMS", "/nowhere")
    assert say() == []
    one(say(NAT), "warning: nftables: nft is not installed", "apt-get install nftables")


def test_a_gateway_that_nobody_tells(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(defaults=False)
    lab.ip(lab.router, "route add default dev fiber via 10.0.1.1")
    with lab.inside(lab.router):
        found = conflicts.findings(config_of(CONFIG), machine.look(config_of(CONFIG), tmp_path))
        written = CONFIG.replace('interface = "lte"', 'interface = "lte"\ngateway = "10.0.2.1"')
        assert not conflicts.findings(config_of(written), machine.look(config_of(written), tmp_path))
    one([line(finding) for finding in found], "note: uplinks.lte.gateway:", 'write gateway = "ADDRESS"')


# --- rules ------------------------------------------------------------------------------------


def tunnel(lab: Lab, table: int, family: str = "-4") -> str:
    lab.ip(lab.router, "link add wg0 type veth peer name wg1\nlink set wg0 up\naddr add 10.99.0.2/24 dev wg0")
    return f"{family} route add default dev wg0 table {table}"


def add(lab: Lab, *lines: str) -> None:
    for words in lines:
        lab.run(lab.router, "ip", *words.split())


def test_wg_quick_started_after_pbrd(lab: Lab, say: Say) -> None:
    """Without a priority the kernel takes the one before the first rule: 9999."""
    add(lab, "rule add priority 10000 lookup 200 protocol 112", tunnel(lab, 51820))
    add(lab, "rule add not fwmark 51820 lookup 51820", "rule add lookup main suppress_prefixlength 0")
    one(
        say(),
        "warning: ip rule 9999: ",
        '"not from all fwmark 0xca6c lookup 51820" takes all traffic',
        "Table = off",
    )


def test_wg_quick_started_before_pbrd(lab: Lab, say: Say) -> None:
    add(lab, tunnel(lab, 51820), "rule add not fwmark 51820 lookup 51820")
    one(
        say(),
        "warning: ip rule 32765: ",
        "is reached by what no policy decided; but",
        "(at 9999)",
        "Table = off",
    )


def test_wg_quicks_mark_is_spared_though_it_covers_the_bits_of_pbrd(lab: Lab, say: Say) -> None:
    add(lab, tunnel(lab, 51820), "rule add not fwmark 51820 lookup 51820 priority 40000")
    one(say(), "ip rule 40000: ")
    assert say(NAT) == say()


def test_both_families_are_told_in_one_line(lab: Lab, say: Say) -> None:
    add(lab, tunnel(lab, 77), "-6 route add default dev wg0 table 77")
    add(lab, "rule add lookup 77 priority 5000", "-6 rule add lookup 77 priority 5000")
    one(
        say(),
        "ip rule 5000 and ip -6 rule 5000: ",
        '"from all lookup 77" takes all traffic before the policies',
    )


def test_tailscale_is_no_conflict_but_its_exit_node_is(lab: Lab, say: Say) -> None:
    add(
        lab,
        "rule add priority 5210 fwmark 0x80000/0xff0000 lookup main",
        "rule add priority 5230 fwmark 0x80000/0xff0000 lookup default",
        "rule add priority 5250 fwmark 0x80000/0xff0000 unreachable",
        "rule add priority 5270 lookup 52",
        "route add 100.100.100.100 dev lan table 52",
    )
    assert say() == []
    assert say(NAT) == []
    add(lab, "route add default dev lan table 52")
    one(say(), "warning: ip rule 5270: ", "Tailscale exit node", "tailscale set --exit-node=")


def test_a_mask_that_others_use(lab: Lab, say: Say) -> None:
    add(lab, "rule add priority 5210 fwmark 0x80000/0xff0000 lookup main")
    mask = CONFIG.replace(HEAD, HEAD + "fwmark_mask = 0x00ff0000\n")
    one(
        say(mask),
        "ip rule 5210: ",
        "asks for bits that are pbrd's (daemon.fwmark_mask is 0x00ff0000)",
        "8 bits",
    )


def test_a_rule_for_a_whole_mark_where_nftables_is_in_use(lab: Lab, say: Say) -> None:
    add(lab, "rule add fwmark 0x1 lookup 100 priority 5000")
    assert say() == []
    one(say(NAT), "ip rule 5000: ", "matches no packet that pbrd has marked", "fwmark 0x1/0xffffff")


def test_a_rule_among_those_of_pbrd(lab: Lab, say: Say) -> None:
    add(lab, "rule add from 172.16.0.0/12 lookup 77 priority 12345")
    one(say(), "ip rule 12345: ", "stands among the rules of pbrd (10000-31999)", "set daemon.rule_priority")


def test_a_rule_before_those_of_pbrd_hurts_where_there_is_a_kill_switch(lab: Lab, say: Say) -> None:
    add(lab, "rule add from 172.16.0.0/12 lookup 77 priority 500")
    one(say(), "note: ip rule 500: ", "obeys none of them; give it a priority above 31999")
    one(say(KILL), "warning: ip rule 500: ", "obeys none of them, kill switches neither")


def test_many_rules_of_a_kind_are_counted(lab: Lab, say: Say) -> None:
    lab.ip(lab.router, "\n".join(f"rule add from 10.77.0.{n} lookup 77 priority 12000" for n in range(200)))
    found = say()
    assert len(found) == 4
    assert "and 197 more like that" in found[3]


def test_what_skips_all_policies(lab: Lab, say: Say) -> None:
    add(lab, "rule add goto 32766 priority 9000")
    one(say(), "ip rule 9000: ", '"from all goto 32766" takes all traffic')


def test_main_first_takes_away_override_main(lab: Lab, say: Say) -> None:
    add(lab, "rule add lookup main suppress_prefixlength 0 priority 9000")
    assert say() == []
    one(
        say(CONFIG.replace('11"] }', '11"], override_main = true }')),
        "ip rule 9000: ",
        "override_main has no effect",
    )


def test_rules_of_vrfs_and_what_matches_nothing_are_passed_over(lab: Lab, say: Say) -> None:
    add(
        lab, "rule add not from all lookup 77 priority 500", "rule add fwmark 0x7/0xff lookup 77 priority 501"
    )
    assert say() == []


# --- marks ------------------------------------------------------------------------------------


def test_nft_rules_that_set_marks(lab: Lab, say: Say) -> None:
    head = "table inet foo { chain a { type filter hook prerouting priority mangle; "
    lab.nft(lab.router, head + "tcp dport 80 meta mark set 0x42; }; }")
    assert say() == []
    one(
        say(NAT), "warning: nft table inet foo, chain a: overwrites the bits", "meta mark & 0xff000000 | 0x42"
    )
    lab.nft(
        lab.router,
        "flush chain inet foo a; add rule inet foo a meta mark set meta mark and 0xff000000 or 0x42",
    )
    assert say(NAT) == []
    lab.nft(lab.router, "flush chain inet foo a; add rule inet foo a meta mark set 0x6d6f6c65")
    one(say(), "nft table inet foo, chain a: sets bits of the mark that are pbrd's")


def test_iptables_rules_that_set_marks(lab: Lab, say: Say) -> None:
    add_rule = ("iptables", "-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "-j", "MARK")
    if lab.run(lab.router, "sh", "-c", "command -v iptables iptables-save", check=False).returncode:
        pytest.skip("no iptables here")
    lab.run(lab.router, *add_rule, "--set-mark", "0x1")
    one(say(NAT), "iptables -t mangle, chain PREROUTING: overwrites", "--set-xmark 0x1/0xffffff")
    lab.run(lab.router, "iptables", "-t", "mangle", "-F")
    lab.run(lab.router, *add_rule, "--or-mark", "0x4000")
    assert say(NAT) == []


@pytest.mark.parametrize(
    ("value", "changed", "sets"),
    [
        (66, 0xFFFFFFFF, 66),
        ({"|": [{"&": [{"meta": {"key": "mark"}}, 0xFF000042]}, 66]}, 0x00FFFFFF, 66),
        ({"|": [{"meta": {"key": "mark"}}, 0x4000]}, 0x4000, 0x4000),
        ({"^": [{"meta": {"key": "mark"}}, 0x4000]}, 0x4000, 0x4000),
        ({"&": [{"meta": {"key": "mark"}}, 0xFFFFFFF0]}, 0xF, 0),
        ({"ct": {"key": "mark"}}, 0, 0),
        ({"&": [{"ct": {"key": "mark"}}, 0xFFFF]}, 0xFFFF0000, 0),
        ({"numgen": {"mode": "random", "mod": 2, "offset": 0}}, 0xFFFFFFFF, 0),
    ],
)
def test_what_nft_does_to_a_mark(value: object, changed: int, sets: int) -> None:
    rule = {
        "family": "ip",
        "table": "t",
        "chain": "c",
        "expr": [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": value}}],
    }
    setters, _ = firewalls.of_nft(json.dumps({"nftables": [{"metainfo": {}}, {"rule": rule}]}))
    assert setters == (MarkSetter("nft table ip t, chain c", changed, sets),)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"nftables": []}'])
def test_what_is_no_ruleset_is_passed_over(text: str) -> None:
    assert firewalls.of_nft(text) == ((), ())


# --- tables -----------------------------------------------------------------------------------

NETPLAN = """network:
  ethernets:
    lte:
      addresses: [10.0.2.2/24]
      routes:
        - to: default
          via: 10.0.2.1
          table: 200
      routing-policy:
        - from: 192.168.100.11
          table: 200
"""
TABLE_200 = CONFIG.replace('interface = "lte"', 'interface = "lte"\ntable = 200')


def test_the_netplan_file_that_already_has_a_table_of_its_own(lab: Lab, say: Say) -> None:
    """networkd has done what it says: a default route in the table, and a rule without a priority."""
    lab.ip(lab.router, "route del default dev lte metric 101")
    add(
        lab,
        "route add default via 10.0.2.1 dev lte proto static table 200",
        "rule add from 192.168.100.11 lookup 200 protocol static",
    )
    found = say(TABLE_200, **{"etc/netplan/50.yaml": NETPLAN})
    assert found == [
        'warning: uplinks.lte.table: table 200 holds "default via 10.0.2.1 dev lte" (static); gets a default '
        "route "
        "from /etc/netplan/50.yaml:8: pbrd leaves routes of others alone, so policies would stay on this "
        "uplink when "
        'its probes fail; remove that default and set gateway = "10.0.2.1", which the main table doesn\'t '
        "tell, "
        "or set table = 202",
        "note: uplinks.lte.table: table 200 is asked by a rule of others (from 192.168.100.11) from "
        "/etc/netplan/50.yaml:11: it comes before all policies while pbrd runs, and falls through to them "
        "when the "
        "uplink is down; harmless, and not needed when a policy says the same",
    ]
    add(lab, "route del default table 200")
    one(
        say(TABLE_200, **{"etc/netplan/50.yaml": NETPLAN.replace("- to: default", "- to: 10.8.0.0/16")})[1:],
        "note",
    )


def test_a_rule_in_a_file_without_a_priority(say: Say) -> None:
    files = {"etc/netplan/50.yaml": NETPLAN.replace("200", "77").replace("default", "10.8.0.0/16")}
    one(say(**files), "warning: /etc/netplan/50.yaml:11: ", "names no priority", "(at 9999)", "(32000, say)")
    assert say(**{"etc/netplan/50.yaml": files["etc/netplan/50.yaml"] + "          priority: 32100\n"}) == []


def test_specific_routes_in_our_table(lab: Lab, say: Say) -> None:
    add(lab, "route add 10.7.0.0/16 dev lan table 200", "route add 10.8.0.0/16 dev lan table 1201")
    first, second = say()
    assert first.startswith(
        'note: uplinks.fiber.table: table 200 has routes of others: "10.7.0.0/16 dev lan" (boot);'
    )
    assert second.startswith(
        "note: uplinks.lte.table: 201 takes 1201, too, and that table has routes of others"
    )


def test_tables_with_other_names(say: Say) -> None:
    found = say(
        **{
            "etc/iproute2/rt_tables": "255\tlocal\n254\tmain\n200 vpn\n",
            "etc/iproute2/rt_tables.d/x.conf": "7 lte\n",
        }
    )
    one(
        found,
        'uplinks.fiber.table: table 200 is called "vpn" in /etc/iproute2/rt_tables:3',
        "set table = 202",
    )
    named = CONFIG.replace('names = ""', 'names = "/etc/iproute2"')
    assert 'x.conf:1 calls table 7 "lte", too' in say(named)[1]


def test_routes_of_networkd_and_networkmanager_in_our_table(say: Say) -> None:
    unit = "[Match]\nName=lte\n[Network]\nDHCP=yes\n[DHCPv4]\nRouteTable=201\n"
    profile = "[connection]\ninterface-name=fiber\n[ipv4]\nmethod=auto\nroute-table=200\n"
    first, second = say(
        **{
            "etc/systemd/network/10-lte.network": unit,
            "etc/NetworkManager/system-connections/fiber.nmconnection": profile,
        }
    )
    assert "gets a default route from /etc/NetworkManager/system-connections/fiber.nmconnection:5" in first
    assert (
        "uplinks.lte.table: table 201 gets a default route from /etc/systemd/network/10-lte.network:6"
        in second
    )


def test_a_default_that_is_in_no_table_of_ours(lab: Lab, say: Say) -> None:
    """NetworkManager with route-table=77: the main table has nothing for gateway = "auto"."""
    lab.ip(
        lab.router, "route del default dev lte metric 101\nroute add default via 10.0.2.1 dev lte table 77"
    )
    profile = "[ipv4]\nmethod=auto\nroute-table=77\n"
    found = say(**{"etc/NetworkManager/system-connections/lte.nmconnection": profile})
    one(
        found,
        "uplinks.lte.gateway: the main table has no default",
        "table 77 has",
        'set gateway = "10.0.2.1"',
    )


def test_the_table_of_a_vrf() -> None:
    """This kernel may have no VRFs: judged from values."""
    here = Machine(interfaces={"fiber": Interface("fiber"), "red": Interface("red", table=200)})
    found = [str(finding) for finding in conflicts.findings(config_of(CONFIG), here)]
    assert found[0].startswith('uplinks.fiber.table: table 200 is that of the VRF "red"')


# --- files ------------------------------------------------------------------------------------


def test_netplan_is_read_with_its_lines() -> None:
    text = NETPLAN.replace("to: default", 'to: "0.0.0.0/0"') + (
        "      routing-policy:\n      - {from: 10.0.0.0/8, table: 7, priority: 5}  # a comment\n      mtu: "
        "1400\n"
        "      routes: [{to: default, via: 1.2.3.4, table: 9}, {to: 10.0.0.0/8, via: 1.1.1.1}]\n"
    )
    assert list(netfiles.netplan_entries("f", text)) == [
        Entry("f:8", "route", 200, default=True),
        Entry("f:11", "rule", 200, text="from 192.168.100.11"),
        Entry("f:13", "rule", 7, priority=5, text="from 10.0.0.0/8"),
        Entry("f:15", "route", 9, default=True),
    ]


@pytest.mark.parametrize("filler", ["a", " ", "a ", "a-", "{", '"', 'a: "', "-", "9", "0x9"])
def test_files_of_others_with_endless_words_take_no_more_than_their_length(filler: str) -> None:
    """A key of 90 KB took 18 s, in which the daemon stood still: all of this must be over long before."""
    text = "      routes:\n        - table: " + filler * (1_000_000 // len(filler))
    began = time.process_time()
    list(netfiles.netplan_entries("f", text))
    list(netfiles.networkd_entries("f", "[Route]\nTable=" + text, {}))
    list(netfiles.keyfile_entries("f", "[ipv4]\nrouting-rule1=table " + text))
    list(netfiles.keyfile_entries("f", "[ipv4]\nrouting-rule1=priority 5 table " + filler * 1000))
    list(netfiles.table_names("f", text))
    assert time.process_time() - began < 5


def test_of_a_file_of_others_only_its_beginning_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "etc/netplan"
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text(NETPLAN + "#" * machine.FILE + "\n" + NETPLAN)
    [(_, text)] = machine._texts(tmp_path, ["/etc/netplan"], "*.yaml")
    assert len(text) == machine.FILE
    assert len(list(netfiles.netplan_entries("x", text))) == len(list(netfiles.netplan_entries("x", NETPLAN)))


def test_network_files_and_keyfiles_are_read_with_their_lines() -> None:
    unit = (
        "[Route]\nGateway=10.0.0.1\nTable=200\n[RoutingPolicyRule]\nFrom=10.1.1.1\nTable=7\nPriority=32100\n"
    )
    assert list(netfiles.networkd_entries("f", unit + "[Route]\nTable=main\n", {})) == [
        Entry("f:3", "route", 200, default=True),
        Entry("f:6", "rule", 7, priority=32100, text="from 10.1.1.1"),
    ]
    profile = "[ipv4]\nroute1=10.0.0.0/8\nroute1_options=table=201\n"
    profile += "routing-rule1=priority 5 from 192.168.1.0/24 table 200\n"
    assert list(netfiles.keyfile_entries("f", profile)) == [
        Entry("f:3", "route", 201),
        Entry("f:4", "rule", 200, priority=5, text="from 192.168.1.0/24"),
    ]


@given(text(alphabet=sorted("[]{}-=:, \n\t#RouteTabl200.x/'\"")) | text())
def test_whatever_stands_in_their_files_is_no_error(content: str) -> None:
    for read in (netfiles.netplan_entries, netfiles.keyfile_entries, netfiles.table_names):
        list(read("f", content))
    list(netfiles.networkd_entries("f", content, {}))
    netfiles.setting([("f", content)], "ManageForeignRoutes")
    firewalls.of_nft(content)
    firewalls.of_iptables("iptables", content)


NETWORKD = {"run/systemd/netif/state": "OPER_STATE=routable\n"}
NO = "[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n"


def test_networkd_that_removes_what_others_made(say: Say) -> None:
    one(say(**NETWORKD), "warning: systemd-networkd: removes pbrd's rules", "10-pbrd.conf")
    assert "kill switches neither" in say(KILL)[0]
    assert say(**{"usr/lib/systemd/networkd.conf.d/10-pbrd.conf": NO}) == []
    yes = "[Network]\n# a comment\nManageForeignRoutingPolicyRules=yes\n"
    one(
        say(**{"etc/systemd/networkd.conf.d/20-local.conf": yes}),
        "/etc/systemd/networkd.conf.d/20-local.conf: removes",
    )


def test_a_drop_in_can_be_masked_and_the_main_file_comes_first(say: Say, tmp_path: Path) -> None:
    assert say(**NETWORKD, **{"etc/systemd/networkd.conf": NO}) == []
    say(**{"usr/lib/systemd/networkd.conf.d/50.conf": NO.replace("=no", "=yes")})
    assert len(say()) == 1
    mask = tmp_path / "etc/systemd/networkd.conf.d/50.conf"
    mask.parent.mkdir(parents=True)
    mask.symlink_to("/dev/null")
    assert say() == []


# --- the main table, interfaces, switches -----------------------------------------------------


def test_halves_of_the_default_route(lab: Lab, say: Say) -> None:
    add(lab, "route add 0.0.0.0/1 dev lan", "route add 128.0.0.0/1 dev lan")
    one(
        say(),
        'warning: ip route: "0.0.0.0/1 dev lan" in the main table',
        "redirect-gateway",
        "make lan an uplink",
    )
    add(lab, "-6 route add 2000::/3 dev lan")
    assert say()[1].startswith('warning: ip -6 route: "2000::/3 dev lan"')


def test_an_error_default_in_main(lab: Lab, say: Say) -> None:
    add(lab, "route add unreachable default metric 4000")
    one(
        say(),
        'ip route: "unreachable default" in the main table ends the walk',
        "ip route del unreachable default",
    )


def test_an_uplink_that_is_a_port_or_is_not_there(lab: Lab, say: Say) -> None:
    add(lab, "link add br0 type bridge", "link set lte master br0")
    one(say(), 'uplinks.lte.interface: "lte" is a port of the bridge "br0"', 'set interface = "br0"')
    add(lab, "link set lte nomaster", "link set lte down", "link set lte name lte0")
    one(say(), 'note: uplinks.lte.interface: there is no "lte" here now (did you mean "lte0"?)')


def test_forwarding_is_off(lab: Lab, say: Say) -> None:
    lab.run(lab.router, "sysctl", "-w", "net.ipv4.ip_forward=0")
    assert say() == []
    text = CONFIG.replace("match = {", 'match = { iif = "lan",')
    one(say(text), "sysctl net.ipv4.ip_forward: is 0", "policies.backups", "set it to 1")


def test_router_advertisements_that_a_router_does_not_hear(lab: Lab, say: Say) -> None:
    lab.run(lab.router, "sysctl", "-w", "net.ipv6.conf.fiber.accept_ra=1")
    one(say(), "sysctl net.ipv6.conf.fiber.accept_ra: is 1", "set it to 2")
    lab.run(lab.router, "sysctl", "-w", "net.ipv6.conf.fiber.accept_ra=2")
    assert say() == []


def test_flowtables() -> None:
    """As libnftables-json(5) has them: this kernel may have none."""
    table = {
        "family": "inet",
        "name": "ft",
        "table": "fw",
        "handle": 1,
        "hook": "ingress",
        "prio": 0,
        "dev": ["fiber", "lan"],
    }
    _, found = firewalls.of_nft(json.dumps({"nftables": [{"flowtable": table}]}))
    assert found == (Flowtable("nft flowtable inet ft", ("fiber", "lan")),)
    here = Machine(interfaces={"fiber": Interface("fiber"), "lte": Interface("lte")}, flowtables=found)
    one(
        [line(f) for f in conflicts.findings(config_of(CONFIG), here)],
        "nft flowtable inet ft: ",
        "leave fiber out",
    )


def test_kill_switches_on_units_that_systemd_could_close_at_once() -> None:
    policy = '[[policies]]\nname = "u"\nmatch = {{ unit = "{0}" }}\nvia = ["lte"]\nfallback = "blackhole"\n'
    for unit, section in (("a@b.service", "Service"), ("x.slice", "Slice")):
        here = Machine(interfaces={"fiber": Interface("fiber"), "lte": Interface("lte")}, unfilled=(unit,))
        found = [
            f
            for f in conflicts.findings(
                config_of(CONFIG.replace("[default]", policy.format(unit) + "[default]")), here
            )
            if f.harmless
        ]
        wanted = f"systemctl edit {unit}, and {setting_of(unit)} below [{section}]"
        one([line(f) for f in found], "policies.u.match.unit: ", wanted)


# --- the command ------------------------------------------------------------------------------


def check(lab: Lab, file: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    return lab.run(lab.router, sys.executable, "-m", "pbrd", "check", str(file), *more, check=False)


def test_check_warns_of_this_machine_and_its_exit_code_stays(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "pbrd.toml"
    file.write_text(CONFIG)
    add(lab, "rule add from 172.16.0.0/12 lookup 77 priority 12345")
    told = check(lab, file)
    assert told.returncode == 0
    assert "warning: ip rule 12345: " in told.stderr
    assert "ip rule" not in check(lab, file, "--no-machine").stderr
    file.write_text(CONFIG.replace('interface = "', 'interface = "other-'))
    assert "ip rule" not in check(lab, file).stderr


def test_nobody_sees_rules_and_tables_too(lab: Lab, tmp_path: Path) -> None:
    add(lab, "rule add from 172.16.0.0/12 lookup 77 priority 12345", "route add default dev lan table 200")
    seen = let_others_in(tmp_path) / "seen"
    seen.touch()
    seen.chmod(0o666)
    config = config_of(CONFIG)

    def look() -> int:
        here = machine.look(config, tmp_path)
        seen.write_text("\n".join(map(str, conflicts.findings(config, here))))
        return 0

    with lab.inside(lab.router):
        assert as_nobody(look) == 0
    assert "ip rule 12345" in seen.read_text()
    assert "table 200 holds" in seen.read_text()


def test_the_daemon_tells_conflicts_in_one_line(lab: Lab, daemon: StartDaemon) -> None:
    add(lab, "rule add from 172.16.0.0/12 lookup 77 priority 12345", "route add 0.0.0.0/1 dev lan")
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: "conflict with this machine" in pbrd.log, within=10)
    (told,) = [line for line in pbrd.log.splitlines() if "conflict with" in line]
    assert "conflict with this machine: ip rule 12345: " in told
    assert told.endswith("(and 1 more: pbrd check)")


def test_a_full_feed_in_the_main_table_is_not_read(lab: Lab, say: Say) -> None:
    lab.ip(lab.router, "\n".join(f"route add 20.{n >> 8}.{n & 255}.0/24 dev lan" for n in range(20_000)))
    with lab.inside(lab.router):
        here = machine.look(config_of(CONFIG))
    assert len(here.routes[Family.IPV4, 254]) == 2
    assert len(here.defaults_in(Family.IPV4, 254)) == 2
