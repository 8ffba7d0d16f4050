"""The config: what is read, what is refused and in which words, over one file and over many."""

import os
import subprocess
import sys
import time
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from pbrd.config import load, parse, unsupported, warnings
from pbrd.errors import ConfigError
from pbrd.policies import LOCAL_ONLY
from pbrd.settings import Config, Daemon, Fallback, Mark, Policy, Range
from pbrd.uplinks import HIGHEST_TABLE, KERNEL_TABLES, assign_tables

REPOSITORY = Path(__file__).parent.parent
MAIN_FILE = "/etc/pbrd/pbrd.toml"

# The whole example of the contract.
CONTRACT = """
[daemon]
rule_priority = 10000
table_base    = 200
names         = "/etc/iproute2"
fwmark_mask   = 0xff000000
on_stop       = "keep"
failback      = "graceful"
metrics       = ""

[probe]
targets  = ["1.1.1.1", "9.9.9.9"]
interval = "1s"
timeout  = "1s"
fall     = 3
rise     = 5
stable_for = "10s"
quorum   = 1
confirm_interval = "200ms"
max_loss    = "20%"
max_latency = "0"
max_jitter  = "0"
window      = "30s"

[uplinks.fiber]
interface = "eth0"
gateway   = "auto"
gateway6  = "auto"
table     = 201
nat       = false
metered   = false
enabled   = true

[uplinks.lte]
interface = "wwan0"
nat       = true
metered   = true
probe     = { targets = ["8.8.8.8"], interval = "10s" }

[[policies]]
name     = "backups"
match    = { from = ["192.168.1.100"] }
via      = ["lte", "fiber"]
failback = "graceful"
fallback = "next"

[[policies]]
name  = "https"
match = { proto = "tcp", dport = [443] }
via   = ["fiber", "lte"]

[[policies]]
name     = "guests"
match    = { iif = "br-guest" }
balance  = { fiber = 3, lte = 1 }
sticky   = "source"

[[policies]]
name  = "office-nets"
match = { to = ["10.8.0.0/16"] }
via   = ["main"]

[default]
via = ["fiber", "lte"]
fallback = "best-effort"
"""

UPLINKS = """
[uplinks.fiber]
interface = "eth0"
[uplinks.lte]
interface = "eth1"
"""
SIX = """
[uplinks.a]
interface = 'a'
gateway6 = 'off'
[uplinks.b]
interface = 'b'
gateway6 = 'off'
[[policies]]
name = 'p'
"""  # uplinks without IPv6, and the beginning of a policy
NO_UPLINK = "no uplink is configured; write at least one [uplinks.NAME]"
USERS = {"backup": 34}


def users(name: str) -> int:
    return USERS[name]


def of(text: str, **kwargs: Any) -> Config:
    return parse([(MAIN_FILE, text)], users, users, **kwargs)


def problems(*texts: str | tuple[str, str], **kwargs: Any) -> list[str]:
    named = [(MAIN_FILE, text) if isinstance(text, str) else text for text in texts]
    with pytest.raises(ConfigError) as caught:
        parse(named, users, users, **kwargs)
    return str(caught.value).replace(f"{MAIN_FILE}: ", "").splitlines()


def policy(match: str, rest: str = 'via = "fiber"') -> str:
    return f'{UPLINKS}\n[[policies]]\nname = "p"\nmatch = {{ {match} }}\n{rest}\n'


def test_the_example_of_the_contract_is_read() -> None:
    config = of(CONTRACT, allow_unsupported=True)
    assert config.daemon == Daemon()
    fiber, lte = config.uplinks
    assert (fiber.name, fiber.index, fiber.table, fiber.path_table) == ("fiber", 0, 201, 1201)
    assert (lte.name, lte.index, lte.table, lte.metered) == ("lte", 1, 200, True)
    assert fiber.probe.targets == (IPv4Address("1.1.1.1"), IPv4Address("9.9.9.9"))
    assert (lte.probe.targets, lte.probe.interval, lte.probe.timeout) == ((IPv4Address("8.8.8.8"),), 10, 1)
    assert [policy.name for policy in config.all_policies] == [
        "backups",
        "https",
        "guests",
        "office-nets",
        "default",
    ]
    assert config.policies[0].match.source == (ip_network("192.168.1.100/32"),)
    assert config.policies[1].match.dport == (Range(443, 443),)
    assert config.policies[2].balance == (("fiber", 3), ("lte", 1))
    assert config.default == Policy("default", via=("fiber", "lte"), fallback=Fallback.BEST_EFFORT)


def test_all_of_the_example_of_the_contract_is_supported() -> None:
    assert of(CONTRACT).policies
    assert unsupported(of("daemon.metrics = '[::1]:9798'" + UPLINKS, allow_unsupported=True))


def test_the_example_file_loads() -> None:
    config = load(REPOSITORY / "etc/pbrd.toml")
    names = (REPOSITORY / "etc/iproute2/rt_tables.d/pbrd.conf").read_text()
    for uplink in config.uplinks:
        assert f"{uplink.table} {uplink.name}\n{uplink.path_table} {uplink.name}-path\n" in names
    assert "\n112 pbrd\n" in (REPOSITORY / "etc/iproute2/rt_protos.d/pbrd.conf").read_text()
    assert config.uplink("secondary_link").table == 200
    assert unsupported(config) == ()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [NO_UPLINK]),  # what a full disk or an editor that dies leaves of a config
        ("daemon.fwmark_mask = 1", [NO_UPLINK, "daemon.fwmark_mask: 0x1 is a single bit; "]),
        ("[uplinks]", [NO_UPLINK]),
        ("[uplink.x]", ['uplink: there is no such section (did you mean "uplinks"?)']),
        ("uplinks = 3", ["uplinks: 3 is a number; write a table [uplinks]"]),
        ("uplinks.x = 3", ["uplinks.x: 3 is a number; write a table [uplinks.x]"]),
        ("[uplinks", ["line 1, column 9: "]),
    ],
)  # fmt: skip
def test_a_config_without_uplinks_is_refused(text: str, lines: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(lines)
    assert all(any(line.startswith(start) for line in found) for start in lines), found


def test_an_uplink_in_any_of_the_files_is_enough() -> None:
    (uplink,) = parse([("pbrd.toml", ""), ("conf.d/a.toml", "uplinks.a.interface = 'a'")]).uplinks
    assert uplink.name == "a"


@pytest.mark.parametrize(
    ("text", "remark"),
    [
        # Sections and keys that do not exist.
        ("[uplink.x]", 'uplink: there is no such section (did you mean "uplinks"?)'),
        (
            "x = 1",
            "x: there is no such section; there are daemon, default, policies, probe, uplinks",
        ),
        ("[daemon]\non_stpo = 1", 'daemon.on_stpo: there is no such key (did you mean "on_stop"?)'),
        ("[probe]\ninterwal = 1", 'probe.interwal: there is no such key (did you mean "interval"?)'),
        (
            f"{UPLINKS}prob = 1",
            'uplinks.lte.prob: there is no such key (did you mean "probe"?)',
        ),
        (
            f"{UPLINKS}probe = {{ targetz = [] }}",
            'uplinks.lte.probe.targetz: there is no such key (did you mean "targets"?)',
        ),
        (policy("form = 1, to = '::1'"), 'policies[0].match.form: there is no such key (did you mean "from"'),
        (policy("'a b' = 1, to = '::1'"), "policies[0].match.\"a b\": there is no such key; there are "),
        (policy("to = '::1'", "vai = 1\nvia = 'lte'"), "policies[0].vai: there is no such key"),
        # Wrong types.
        ("daemon = 1", "daemon: 1 is a number; write a table [daemon]"),
        ("uplinks = []", "uplinks: this is a list; write a table [uplinks]"),
        ("[uplinks]\nx = 1", "uplinks.x: 1 is a number; write a table [uplinks.x]"),
        ("[[uplinks]]", "uplinks: this is a list; write a table [uplinks]"),
        ("[policies]", "policies: this is a table; write each policy as [[policies]]"),
        ("policies = [1]", "policies[0]: 1 is a number; write each policy as [[policies]]"),
        (f"{UPLINKS}probe = 3", "uplinks.lte.probe: 3 is a number; write a table [uplinks.lte.probe]"),
        (f"{UPLINKS}metered = 1", "uplinks.lte.metered: 1 is a number; write true or false"),
        (f"{UPLINKS}table = '201'", 'uplinks.lte.table: "201" is a string; write the number of a table, '),
        # [daemon]
        (
            "[daemon]\nrule_priority = 10767",
            "daemon.rule_priority: 10767 is out of range; write a number from 1 to 10766",
        ),
        ("[daemon]\nfwmark_mask = 0xff00ff", "daemon.fwmark_mask: 0xff00ff has a gap; choose bits side by"),
        ("[daemon]\nfwmark_mask = 0x80", "daemon.fwmark_mask: 0x80 is a single bit; choose at least two"),
        ("[daemon]\nfwmark_mask = 0", "daemon.fwmark_mask: 0 is out of range; choose bits of 0x1 to"),
        ("[daemon]\nnames = 'etc'", 'daemon.names: "etc" is no absolute path; write one, as "/etc/iproute2"'),
        (
            "[daemon]\non_stop = 'flsh'",
            'daemon.on_stop: "flsh" is no choice (did you mean "flush"?); write "keep" or "flush"',
        ),
        ("[daemon]\nmetrics = 9798", "daemon.metrics: 9798 is a number; write an address and a port"),
        (
            f"daemon.fwmark_mask = 0x3000\n{UPLINKS}[uplinks.dsl]\ninterface = 'ppp0'",
            "daemon.fwmark_mask: 0x3000 has room for 2 uplinks and there are 3; give it more bits",
        ),
        # [probe]
        ("[probe]\ninterval = '9ms'", 'probe.interval: "9ms" is out of range; write "10ms" to "1d"'),
        ("[probe]\ntimeout = '0'", 'probe.timeout: "0" is out of range; write "1ms" to "1d"'),
        ("[probe]\nfall = 0", "probe.fall: 0 is out of range; write a number from 1 to 10000"),
        ("[probe]\nmax_loss = '120%'", 'probe.max_loss: "120%" is no percentage; write a percentage'),
        ("[probe]\ntargets = ['::']", 'probe.targets[0]: "::" does not lie behind an uplink; name a host'),
        (
            "[probe]\nquorum = 3",
            "probe.quorum: quorum = 3 needs more targets than the 2 there are; lower it or name more",
        ),
        (
            "[probe]\ninterval = '20s'",
            "probe.interval: a window of 30s holds less than two rounds, one every 20s; "
            'set window = "40s" or more',
        ),
        (
            f"{UPLINKS}probe = {{ confirm_interval = '2s' }}",
            "uplinks.lte.probe.confirm_interval: confirm rounds every 2s are slower than an interval of 1s; "
            'shorten confirm_interval, or set it to "0" to have none',
        ),
        # [uplinks]
        (
            "[uplinks.lte]",
            'uplinks.lte.interface: is missing; name the network interface, as in interface = "eth0"',
        ),
        ("[uplinks.lte]\ninterface = 'lo'", 'uplinks.lte.interface: "lo" leads nowhere; name the interface'),
        (
            f"{UPLINKS}[uplinks.dsl]\ninterface = 'eth1'",
            'uplinks.dsl.interface: "eth1" is the interface of uplink "lte" already; choose another',
        ),
        (
            "[uplinks.'4g']\ninterface = 'w'",
            'uplinks.4g: "4g" can\'t be a name; write 1 to 32 letters, digits, _ - . after a letter',
        ),
        (
            f"{UPLINKS}[uplinks.fiber-path]\ninterface = 'eth2'",
            'uplinks.fiber-path: "fiber-path" is the name of the path table of uplink "fiber"; '
            "choose another name",
        ),
        *(
            (
                f"{UPLINKS}table = {number}",
                f"uplinks.lte.table: {number} is the {name} table; choose 1-252 or 256 and above",
            )
            for number, name in ((0, "unspecified"), (253, "default"), (254, "main"), (255, "local"))
        ),
        (f"{UPLINKS}table = -1", "uplinks.lte.table: -1 is below zero; choose 1-252 or 256 and above"),
        (
            f"{UPLINKS}table = 4294966296",
            "uplinks.lte.table: 4294966296 is too high; choose at most 4294966295, as its path table is",
        ),
        (
            "uplinks.a = { interface = 'a', table = 7 }\nuplinks.b = { interface = 'b', table = 7 }",
            'uplinks.b.table: 7 is the table of uplink "a" already; choose another',
        ),
        (
            "uplinks.a = { interface = 'a', table = 7 }\nuplinks.b = { interface = 'b', table = 1007 }",
            'uplinks.b.table: 1007 is the path table of uplink "a" (7 + 1000); choose another',
        ),
        (
            "uplinks.a = { interface = 'a', table = 1007 }\nuplinks.b = { interface = 'b', table = 7 }",
            'uplinks.b.table: 7 takes 1007 for its path table, but that is uplink "a"; choose another',
        ),
        (
            f"{UPLINKS}gateway = '2001:db8::1'",
            'uplinks.lte.gateway: "2001:db8::1" is an IPv6 address; write an IPv4 address, "auto", "none"',
        ),
        (
            f"{UPLINKS}gateway = 'atuo'",
            'uplinks.lte.gateway: "atuo" is no gateway; write an IPv4 address, "auto", "none" or "off"',
        ),
        (f"{UPLINKS}gateway = '224.0.0.1'", 'uplinks.lte.gateway: "224.0.0.1" can\'t be a gateway; write'),
        (f"{UPLINKS}gateway6 = 'fe80::1%eth1'", 'uplinks.lte.gateway6: "fe80::1%eth1" has a zone; leave'),
        (
            f"{UPLINKS}gateway = 'off'\ngateway6 = 'off'",
            'uplinks.lte.gateway6: "off" for both families leaves nothing; '
            "an uplink is switched off by enabled = false",
        ),
        # [[policies]]
        (
            policy("from = '10.0.0.0/8'", "via = ['lte', 'fibre']"),
            'policies[0].via[1]: no uplink is called "fibre" (did you mean "fiber"?)',
        ),
        (
            policy("from = '::1'", "via = 'q'"),
            'policies[0].via: no uplink is called "q"; there are "fiber", "lte"',
        ),
        ("[default]\nvia = 'q'", 'default.via: no uplink is called "q"; describe it in a section'),
        (policy("from = '::1'", "via = []"), "policies[0].via: is empty; name at least one uplink"),
        (
            policy("from = '::1'", "via = ['lte', 'lte']"),
            'policies[0].via[1]: "lte" stands here twice; keep the first',
        ),
        (policy("from = '::1'", ""), "policies[0].via: is missing; name uplinks, best first, as in via = "),
        (
            policy("from = '::1'", "via = 'lte'\nsticky = 'source'"),
            "policies[0].sticky: needs balance; leave it out, with via a client keeps its uplink anyway",
        ),
        (
            f"{UPLINKS}[[policies]]\nmatch = {{ to = '::1' }}\nvia = 'lte'",
            'policies[0].name: is missing; give the policy a name of its own, as in name = "backups"',
        ),
        (
            f"{UPLINKS}[[policies]]\nname = 'p'\nvia = 'lte'",
            "policies[0].match: is missing; say which traffic, or use [default] for everything",
        ),
        (
            f"{UPLINKS}[[policies]]\nname = 'p'\nmatch = 3\nvia = 'lte'",
            "policies[0].match: 3 is a number; write a table, as in match = ",
        ),
        (policy(""), "policies[0].match: matches everything; say which traffic, or use [default]"),
        (policy("override_main = true"), "policies[0].match: matches everything; say which traffic"),
        (
            f"{UPLINKS}[default]\nvia = 'lte'\nmatch = {{}}",
            "default.match: [default] is everything that no policy decided; leave this out",
        ),
        # match
        (
            policy("from = ['10.0.0.1', '192.168.1.100/24']"),
            'policies[0].match.from[1]: "192.168.1.100/24" has bits set beyond /24; write "192.168.1.0/24" ',
        ),
        (policy("from = []"), "policies[0].match.from: an empty list matches nothing; leave the key out"),
        (
            policy("from = '10.0.0.0/8', to = '2001:db8::/32'"),
            "policies[0].match.to: can never match: from and to are of different IP versions; write both",
        ),
        (
            policy("dport = 443"),
            'policies[0].match.dport: needs a protocol with ports; add proto = "tcp" (or udp, sctp, dccp)',
        ),
        (
            policy("dport = 443, proto = ['tcp', 'icmp']"),
            "policies[0].match.dport: protocol icmp has no ports; leave the ports out, or use tcp,",
        ),
        (
            policy("user = 'bakcup'"),
            'policies[0].match.user: no user is called "bakcup"; write one that `getent passwd` shows',
        ),
        *(
            (
                policy(f"iif = ['lo', 'br0'], {key} = '{value}'"),
                f'policies[0].match.{key}: can never match traffic that comes in by "br0"; '
                'leave iif out, or write "lo"',
            )
            for key, value in zip(LOCAL_ONLY, ("backup", "0-99", "a.service"), strict=True)
        ),
        (
            policy("fwmark = '0x1000001'"),
            'policies[0].match.fwmark: "0x1000001" lies in pbrd\'s own bits, '
            "daemon.fwmark_mask 0xff000000; use the free bits 0x00ffffff",
        ),
        (policy("fwmark = '0/0xf0000000'"), 'policies[0].match.fwmark: "0/0xf0000000" lies in pbrd\'s own'),
        (policy("to_file = 'x.txt'"), 'policies[0].match.to_file: cannot read "/etc/pbrd/x.txt": no such'),
        # What is not there yet.
        ("daemon.metrics = '[::1]:9798'", "daemon.metrics: metrics is not supported yet: leave it out"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_remedy(text: str, remark: str) -> None:
    lines = [line for line in problems(text) if line != NO_UPLINK]
    lines = [line for line in lines if not line.startswith("uplinks.fiber.interface")]
    assert any(line.startswith(remark) for line in lines), lines
    assert len(lines) == 1 or "supported" in "".join(lines[1:]), lines


@pytest.mark.parametrize(
    ("text", "remark"),
    [
        ("[uplinks.x]\ninterface = eth0", 'line 2, column 13: invalid value; strings need quotes, as in'),
        ("a = 1\na = 2", "line 2, column 6: cannot overwrite a value; the key stands there already"),
        ("[probe]\nfall = 1\n[probe]", "line 3, column 7: [probe] stands there already; write all of its"),
        (
            "[uplinks.'a b']\ninterface = 'x'\n[uplinks.'a b']",
            'line 3, column 15: [uplinks."a b"] stands there already; write all of its keys there',
        ),
        (
            "[[policies]]\n[policies]",
            "line 2, column 10: [policies] and [[policies]] exclude each other; write each",
        ),
        ("x = [1,", "line 1, column 8: "),
        ("[x", "line 1, column 3: "),
        ("x = " + "9" * 5000, "is no valid TOML: "),
        ("x = " + "[" * 100_000, "lists or tables are nested too deeply; four levels are enough here"),
    ],
)  # fmt: skip
def test_a_syntax_error_shows_line_and_column(text: str, remark: str) -> None:
    (line,) = problems(text)
    assert line.startswith(remark)


def test_what_may_stand_in_a_broken_file_is_not_reported_as_missing() -> None:
    fragment = ("conf.d/a.toml", "[[policies]]\nname = 'p'\nmatch = { to = '::1/8' }\nvia = 'fiber'")
    assert problems("[uplinks.fiber\n", fragment) == [
        "line 1, column 15: expected ']' at the end of a table declaration",
        'conf.d/a.toml: policies[0].match.to: "::1/8" has bits set beyond /8; '
        'write "::/8" for the network, or "::1" for the one address',
    ]


def test_all_problems_of_all_files_are_shown_at_once() -> None:
    first = """
[daemon]
rule_prority = 3
[uplinks.lte]
interface = "eth1"
table = 254
nat = true
[[policies]]
name = "a"
match = { proto = "tpc", dport = 0 }
via = ["fibre"]
"""
    second = """
[uplinks.lte]
gateway = "fe80::1"
[uplinks.fiber]
interface = "eth1"
[[policies]]
name = "a"
match = { from = "10.0.0.1", mac = "00:00:00:00:00:01" }
via = ["fiber"]
balance = { fiber = 0 }
"""
    places = [line.partition(": ")[0] for line in problems(first)]
    assert places == [
        "daemon.rule_prority",
        "uplinks.lte.table",
        "policies[0].via[0]",
        "policies[0].match.proto",
        "policies[0].match.dport",
    ]
    both = problems(first, ("conf.d/b.toml", second))
    assert [line.split(": ")[1] for line in both if line.startswith("conf.d/b.toml: ")] == [
        "uplinks.lte.gateway",
        "uplinks.fiber.interface",
        "policies[0].balance.fiber",
        "policies[0].balance",
        "policies[0].name",
    ]


def test_files_are_merged_key_by_key_and_later_ones_win() -> None:
    config = parse([
        ("pbrd.toml", '[probe]\nfall = 4\nrise = 7\n[uplinks.b]\ninterface = "eth0"\nprobe.rise = 9\n'
                      '[[policies]]\nname = "one"\nmatch.to = "::1"\nvia = "a"\n[default]\nvia = "b"'),
        ("conf.d/1.toml", '[uplinks.a]\ninterface = "eth1"\n[uplinks.b]\nmetered = true\nprobe.fall = 8'),
        ("conf.d/2.toml", '[probe]\nfall = 5\n[uplinks.b]\ninterface = "eth9"\n'
                          '[[policies]]\nname = "two"\nmatch.to = "::2"\nvia = "b"\n[default]\nvia = "a"'),
    ])  # fmt: skip
    b, a = config.uplinks
    assert (b.name, b.interface, b.metered, b.table, b.probe.fall, b.probe.rise) == (
        "b",
        "eth9",
        True,
        200,
        8,
        9,
    )
    assert (a.name, a.interface, a.table, a.probe.fall, a.probe.rise) == ("a", "eth1", 201, 5, 7)
    assert [(policy.name, policy.via) for policy in config.all_policies] == [
        ("one", ("a",)),
        ("two", ("b",)),
        ("default", ("a",)),
    ]


def test_a_policy_name_taken_twice_names_both_files() -> None:
    one = policy("to = '::1'")
    two = ("conf.d/2.toml", "[[policies]]\nname = 'p'\nmatch.to = '::2'\nvia = 'lte'")
    with pytest.raises(ConfigError) as caught:
        parse([("pbrd.toml", one), two])
    assert str(caught.value) == (
        'conf.d/2.toml: policies[0].name: "p" is the name of policies[0] in pbrd.toml already; choose another'
    )


def test_scalars_may_stand_where_lists_are_allowed() -> None:
    listed = policy("iif = ['br0'], proto = ['tcp'], dport = [443], dscp = ['ef']", "via = ['fiber']")
    assert of(policy("iif = 'br0', proto = 'tcp', dport = 443, dscp = 46")) == of(listed)


def test_marks_leave_the_bits_of_pbrd_alone() -> None:
    match = of(policy("fwmark = ['0x1', '0x2/0xff', 0x30]")).policies[0].match
    assert match.fwmark == (Mark(1, 0x00FFFFFF), Mark(2, 0xFF), Mark(0x30, 0x00FFFFFF))


def test_users_are_looked_up_and_ids_are_not() -> None:
    match = of(policy("user = ['backup', 7, '1000-1999']")).policies[0].match
    assert match.user == (Range(34, 34), Range(7, 7), Range(1000, 1999))


def test_prefixes_come_from_files_beside_the_config() -> None:
    files = {"/etc/pbrd/nets.txt": "# ours\n10.0.0.0/8  # office\n\n192.0.2.1\n"}
    text = policy("from = '192.0.2.1', from_file = 'nets.txt'")
    match = of(text, read_text=files.__getitem__, allow_unsupported=True).policies[0].match
    assert match.source == (ip_network("192.0.2.1/32"), ip_network("10.0.0.0/8"))
    assert match.source_file == "nets.txt"


@pytest.mark.parametrize(
    ("content", "remarks"),
    [
        ("10.0.0.0/8\nx\n10.0.0.1/8\n", [
            '/etc/pbrd/nets.txt: line 2: "x" is no prefix; '
            'write an address or a prefix, as "192.168.1.0/24" or "2001:db8::/32"',
            '/etc/pbrd/nets.txt: line 3: "10.0.0.1/8" has bits set beyond /8; '
            'write "10.0.0.0/8" for the network, or "10.0.0.1" for the one address',
        ]),
        ("# nothing\n", ['policies[0].match.from_file: "/etc/pbrd/nets.txt" holds no prefix, '
                         "so nothing matches; add one or leave the key out"]),
    ],
)  # fmt: skip
def test_a_bad_prefix_file_is_named_with_its_lines(content: str, remarks: list[str]) -> None:
    lines = problems(policy("from_file = 'nets.txt'"), read_text=lambda _: content)
    assert [line for line in lines if "supported" not in line] == remarks


def test_a_prefix_file_of_another_kind_is_not_shown_line_by_line() -> None:
    lines = problems(policy("from_file = 'nets.txt'"), read_text=lambda _: "<html>\n" * 1000)
    assert len(lines) == 11
    assert "/etc/pbrd/nets.txt: 990 more lines are wrong; write one prefix a line" in lines


@pytest.mark.parametrize(
    ("text", "interval", "confirm"),
    [
        ("", 1.0, 0.2),
        ("probe.interval = '100ms'", 0.1, 0.1),
        ("probe = { interval = '100ms', confirm_interval = '0' }", 0.1, 0.0),
    ],
)
def test_fast_rounds_need_no_word_on_confirmation(text: str, interval: float, confirm: float) -> None:
    probe = of(UPLINKS + text).uplinks[1].probe
    assert (probe.interval, probe.confirm_interval) == (interval, confirm)


def test_a_mistake_in_a_shared_default_is_not_repeated_for_each_uplink() -> None:
    assert len(problems(UPLINKS + "[probe]\nquorum = 3")) == 1


def test_a_shared_quorum_may_be_more_than_the_default_targets_if_every_uplink_has_enough() -> None:
    targets = 'probe.targets = ["1.1.1.1", "8.8.8.8", "9.9.9.9"]'
    config = of(f"probe.quorum = 3\n[uplinks.a]\ninterface = 'a'\n{targets}")
    assert config.uplinks[0].probe.quorum == 3


def test_there_are_at_most_99_uplinks() -> None:
    def text(number: int) -> str:
        return "".join(f"[uplinks.u{index}]\ninterface = 'e{index}'\n" for index in range(number))

    assert len(of(text(99)).uplinks) == 99
    assert problems(text(100)) == ["uplinks: there are 100; 99 are possible"]


explicit = st.integers(1, 2300) | st.integers(HIGHEST_TABLE - 5, HIGHEST_TABLE)


@given(st.lists(st.none() | explicit, min_size=1, max_size=99), st.integers(1, 2000))
def test_no_table_is_given_out_twice_or_taken_from_the_kernel(wanted: list[int | None], base: int) -> None:
    text = f"daemon.table_base = {base}\n" + "".join(
        f"[uplinks.u{index}]\ninterface = 'e{index}'\n" + ("" if number is None else f"table = {number}\n")
        for index, number in enumerate(wanted)
    )
    try:
        ids = [uplink.table for uplink in of(text).uplinks]
    except ConfigError as error:
        assert all("choose" in problem.remark for problem in error.problems)  # noqa: PT017 either is right
        return
    both = ids + [number + 1000 for number in ids]
    assert len(set(both)) == len(both)
    assert not set(both) & set(KERNEL_TABLES)
    assert max(both, default=0) < 2**32
    assert all(number in (None, given_out) for number, given_out in zip(wanted, ids, strict=True))


@pytest.mark.parametrize(
    ("wanted", "base", "ids"),
    [
        ([None, None], 200, [200, 201]),
        ([201, None, None], 200, [201, 200, 202]),
        ([None, None, None], 252, [252, 256, 257]),
        ([1200, None], 200, [1200, 201]),
        ([None, 1200, None], 200, [201, 1200, 202]),
    ],
)
def test_tables_are_filled_up_in_order(wanted: list[int | None], base: int, ids: list[int]) -> None:
    assert assign_tables(wanted, base) == ids


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (UPLINKS + "[default]\nvia = 'lte'", [
            'probe.targets: none is IPv6, so IPv6 over "fiber", "lte" is judged by link and gateway alone, '
            'and an outage behind the gateway is not noticed; add a host that answers pings, as '
            '"2606:4700:4700::1111", or set gateway6 = "off" where there is no IPv6'
        ]),
        (
            "daemon.on_stop = 'flush'\n"
            "[uplinks.a]\ninterface = 'a'\ngateway6 = 'off'\n[default]\nvia = 'a'\nfallback = 'prohibit'",
            ['daemon.on_stop: "flush" opens the kill switch of default at every stop; use "keep"'],
        ),
        (
            "probe = { targets = ['1.1.1.1', '2001:db8::1'], quorum = 2 }\n"
            "[uplinks.a]\ninterface = 'a'\ngateway6 = 'off'\n[default]\nvia = 'a'",
            ["uplinks.a.probe.quorum: 2 is capped at 1 for IPv4, which has no more targets; name more"],
        ),
        (
            "[uplinks.a]\ninterface = 'a'\ngateway6 = 'off'",
            ["policies: there are none, so nothing fails over; add [[policies]] or [default]"],
        ),
        (
            "[uplinks.a]\ninterface = 'a'\ngateway6 = 'off'\nenabled = false",
            ["uplinks: none is enabled, so nothing is routed; leave out enabled = false where it is wrong"],
        ),
        ("[uplinks.a]\ninterface = 'a'\ngateway6 = 'off'\n[default]\nvia = 'a'", []),
        (
            "[uplinks.a]\ninterface = 'a'\ngateway6 = 'off'\nnat6 = true\n[default]\nvia = 'a'",
            ['uplinks.a.nat6: does nothing, as gateway6 is "off"; leave one of them out'],
        ),
        (
            SIX + "match.from = '2001:db8::/32'\nvia = ['b', 'a']",
            ['policies.p: matches IPv6 alone, which never leaves by "a", "b" '
             '(gateway6 = "off", or not enabled); name another uplink'],
        ),
        (SIX + "match.from = ['2001:db8::/32', '192.0.2.0/24']\nvia = 'a'", []),
        (SIX + "match.to = '2001:db8::/32'\nvia = ['a', 'main']", []),
        (SIX + "match.to = '2001:db8::/32'\nvia = 'a'\nfallback = 'prohibit'", []),  # to block it is meant
        (
            SIX + "match = { mac = '52:54:00:00:00:01', iif = 'lo' }\nvia = 'a'",
            ['policies.p: never matches, as traffic of this machine (iif = "lo") has no source MAC; '
             'leave one of them out'],
        ),
        (
            SIX + "match = { mac = '52:54:00:00:00:01', user = 'backup' }\nvia = 'a'",
            ['policies.p: never matches, as traffic of this machine (user) has no source MAC; '
             'leave one of them out'],
        ),
        (SIX + "match = { mac = '52:54:00:00:00:01', iif = ['lo', 'lan0'] }\nvia = 'a'", []),
        (
            SIX + "match = { proto = 'udp', dport = 53 }\nvia = 'a'\nfallback = 'blackhole'",
            ["policies.p: fragments have no ports for the kernel's rules, so forwarded datagrams of more "
             "than a packet get past this kill switch; set nat = true on an uplink, or ask for no port"],
        ),
        (SIX + "match = { proto = 'udp', dport = 53, iif = 'lo' }\nvia = 'a'\nfallback = 'blackhole'", []),
        (SIX + "match = { proto = 'udp', dport = 53 }\nvia = 'a'", []),
    ],
)  # fmt: skip
def test_what_was_hardly_meant_is_warned_of(text: str, lines: list[str]) -> None:
    assert list(warnings(of(text))) == lines


@pytest.mark.parametrize(
    ("first", "second", "shadowed"),
    [
        ("match.from = '10.0.0.0/8'\nvia = ['fiber', 'lte']",
         "match.from = '10.1.0.0/16'\nvia = 'lte'", True),
        ("match.from = '10.1.0.0/16'\nvia = ['fiber', 'lte']",
         "match.from = '10.0.0.0/8'\nvia = 'lte'", False),
        ("match.from = '10.0.0.0/8'\nvia = 'fiber'", "match.from = '10.1.0.0/16'\nvia = 'lte'", False),
        ("match.from = '10.0.0.0/8'\nvia = 'fiber'\nfallback = 'prohibit'",
         "match = { from = '10.1.0.0/16', proto = 'tcp' }\nvia = 'lte'", True),
        ("match.from = '10.0.0.0/8'\nvia = 'lte'",
         "match.from = '10.1.0.0/16'\nvia = 'lte'\nfallback = 'blackhole'", False),
        ("match.from = '10.0.0.0/8'\nvia = 'lte'",
         "match = { from = '10.1.0.0/16', override_main = true }\nvia = 'lte'", False),
        ("match.to = '::/0'\nvia = 'lte'", "match.to = '0.0.0.0/0'\nvia = 'lte'", False),
        ("match = { proto = 'tcp', dport = '1-1023' }\nvia = 'lte'",
         "match = { proto = 'tcp', dport = [80, 443] }\nvia = 'lte'", True),
        ("match.iif = 'ppp*'\nvia = 'lte'", "match.iif = 'ppp0'\nvia = 'lte'", True),
    ],
)  # fmt: skip
def test_a_policy_that_never_decides_is_warned_of(first: str, second: str, shadowed: bool) -> None:
    text = f"{UPLINKS}[[policies]]\nname = 'a'\n{first}\n[[policies]]\nname = 'b'\n{second}"
    line = "policies.b: never decides, as policies.a matches the same before it; move it up"
    assert (line in warnings(of(text))) is shadowed


def test_thousands_of_policies_are_judged_at_once() -> None:
    nets = [f"10.{number >> 8}.{number & 255}.0/24" for number in range(4998)]
    texts = [f"match = {{ from = '{net}', proto = 'tcp', dport = 443 }}\nvia = 'lte'" for net in nets]
    texts = ["match.to = '192.0.2.0/24'\nvia = 'lte'", *texts, texts[2500].replace(".0/24", ".64/26")]
    numbered = (f"[[policies]]\nname = 'p{number}'\n{text}\n" for number, text in enumerate(texts))
    config = of(f"probe.targets = ['::1234', '1.1.1.1']\n{UPLINKS}" + "".join(numbered))
    before = time.process_time()
    assert warnings(config) == (
        "policies.p4999: never decides, as policies.p2501 matches the same before it; move it up",
    )
    assert time.process_time() - before < 1


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        ("[policies]\nname = 'a'\n[[policies]]\nname = 'b'", "line 3", "write each policy as [[policies]]"),
        ("x = {\n a = 1 }", "line 1", "must stand on one line"),
        ("[uplinks.a]\ngateway = 10.0.0.1", "line 2", "strings need quotes"),
        ('[uplinks.a]\ninterface = "eth0\n', "line 2", "a quote that closes the string is missing"),
    ],
)
def test_slips_of_syntax_come_with_a_remedy(text: str, place: str, remedy: str) -> None:
    (problem,) = problems(text)
    assert place in problem
    assert remedy in problem


@pytest.mark.parametrize(
    ("file", "found"),
    [("/dev/stdin", "nets"), ("/dev/fd/63", "nets"), ("/etc/pbrd/a.toml", "/etc/pbrd/nets")],
)
def test_relative_paths_of_a_pipe_begin_in_the_working_directory(file: str, found: str) -> None:
    asked: list[str] = []

    def read(path: str) -> str:
        asked.append(path)
        return "10.0.0.0/8"

    text = UPLINKS + "[[policies]]\nname = 'p'\nvia = 'fiber'\nmatch.from_file = 'nets'"
    parse([(file, text)], read_text=read)
    assert asked == [found]


def test_a_port_is_rather_one_of_the_other_side() -> None:
    found = problems(
        UPLINKS + "[[policies]]\nname = 'p'\nvia = 'fiber'\nmatch = { proto = 'tcp', port = 443 }"
    )
    assert any('did you mean "dport"?' in line for line in found)


class TestFiles:
    def test_fragments_are_read_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        (tmp_path / "conf.d").mkdir()
        (tmp_path / "pbrd.toml").write_text("\ufeff[daemon]\ntable_base = 300\n" + UPLINKS)
        for name, base in (("20.toml", 500), ("10.toml", 400), (".#30.toml", 600), ("40.toml~", 700)):
            (tmp_path / "conf.d" / name).write_text(f"daemon.table_base = {base}")
        assert load(tmp_path / "pbrd.toml").daemon.table_base == 500

    def test_a_missing_main_file_is_the_only_problem(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "pbrd.toml")
        assert str(caught.value) == (
            f"{tmp_path}/pbrd.toml: there is no such file; write one, as in share/doc/pbrd/examples/pbrd.toml"
        )

    def test_a_file_where_the_folder_of_fragments_should_be_is_a_problem(self, tmp_path: Path) -> None:
        (tmp_path / "pbrd.toml").write_text(UPLINKS)
        (tmp_path / "conf.d").write_text("[[policies]]")
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "pbrd.toml")
        assert str(caught.value) == (
            f"{tmp_path}/conf.d: is no folder; make one and move the file into it, with a name in .toml"
        )

    def test_an_unreadable_fragment_hides_no_other_problem(self, tmp_path: Path) -> None:
        (tmp_path / "conf.d" / "a.toml").mkdir(parents=True)
        (tmp_path / "conf.d" / "b.toml").write_bytes(b"x = 1\ny = '\xff'")
        (tmp_path / "pbrd.toml").write_text("[default]\nvia = 'fiber'\nfallback = 'x'")
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "pbrd.toml")
        assert [(Path(problem.file).name, problem.place) for problem in caught.value.problems] == [
            ("pbrd.toml", "default.fallback"),
            ("a.toml", ""),
            ("b.toml", "line 2"),
        ]

    @pytest.mark.parametrize("place", ["pbrd.toml", "conf.d/a.toml", "conf.d/nets"])
    def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(self, place: str, tmp_path: Path) -> None:
        (tmp_path / "conf.d").mkdir()
        (tmp_path / "pbrd.toml").write_text(UPLINKS)
        match = "[[policies]]\nname = 'p'\nmatch.from_file = 'nets'\nvia = 'lte'"
        (tmp_path / "conf.d" / "a.toml").write_text(match)
        (tmp_path / place).unlink(missing_ok=True)
        os.mkfifo(tmp_path / place)
        check = [sys.executable, "-m", "pbrd", "check", str(tmp_path / "pbrd.toml")]
        done = subprocess.run(check, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
        assert done.returncode == 78
        words = f"{tmp_path / place}: cannot read it: not a regular file; it must be a readable file"
        if place.endswith("nets"):
            words = ": not a regular file; name a file with one prefix a line"
        assert words in done.stderr

    @pytest.mark.parametrize(
        "words",
        [
            "cat {} | pbrd check -",
            "cat {} | pbrd check /dev/stdin",
            "pbrd check <(cat {})",
            "pbrd check - < {}",
            "pbrd check --config <(cat {})",
        ],
    )
    def test_check_takes_what_a_shell_hands_over(self, words: str, tmp_path: Path) -> None:
        (tmp_path / "pbrd.toml").write_text(UPLINKS)
        function = f'pbrd() {{ {sys.executable} -m pbrd "$@"; }}\n'
        command = ["bash", "-c", function + words.format(tmp_path / "pbrd.toml")]
        done = subprocess.run(
            command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=10
        )
        assert (done.returncode, done.stdout.count("2 uplinks")) == (0, 1), done.stderr

    def test_the_daemon_takes_no_pipe_as_its_config(self) -> None:
        reading, writing = os.pipe()
        os.close(writing)
        with pytest.raises(ConfigError, match="not a regular file"):
            load(Path(f"/proc/self/fd/{reading}"))
        os.close(reading)

    def test_a_device_in_place_of_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "pbrd.toml").symlink_to("/dev/null")
        with pytest.raises(ConfigError, match="cannot read it: not a regular file; it must be a readable"):
            load(tmp_path / "pbrd.toml")

    def test_users_are_those_of_the_machine(self, tmp_path: Path) -> None:
        (tmp_path / "pbrd.toml").write_text(policy("user = ['root', 'no-such-user', \"a\\u0000b\"]"))
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "pbrd.toml")
        assert [problem.place for problem in caught.value.problems] == [
            "policies[0].match.user[1]",
            "policies[0].match.user[2]",
        ]

    def test_prefix_files_lie_beside_the_file_that_names_them(self, tmp_path: Path) -> None:
        (tmp_path / "conf.d").mkdir()
        (tmp_path / "pbrd.toml").write_text(UPLINKS)
        fragment = tmp_path / "conf.d" / "a.toml"
        fragment.write_text("[[policies]]\nname = 'p'\nmatch.to_file = 'nets'\nvia = 'lte'")
        (tmp_path / "conf.d" / "nets").write_text("10.0.0.0/8\n10.0.0.1/8\n")
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "pbrd.toml")
        assert [(problem.file, problem.place) for problem in caught.value.problems] == [
            (str(tmp_path / "conf.d" / "nets"), "line 2"),
        ]


KEYS = {
    "daemon": ["rule_priority", "table_base", "names", "fwmark_mask", "on_stop", "failback", "metrics"],
    "probe": ["targets", "interval", "timeout", "fall", "rise", "stable_for", "quorum", "confirm_interval",
              "max_loss", "max_latency", "max_jitter", "window"],
    "uplink": ["interface", "gateway", "gateway6", "table", "nat", "nat6", "metered", "enabled", "probe"],
    "policy": ["name", "match", "via", "balance", "sticky", "fallback", "failback"],
    "match": ["from", "to", "from_file", "to_file", "iif", "proto", "sport", "dport", "user", "group",
              "fwmark", "dscp", "mac", "unit", "time", "days", "override_main"],
}  # fmt: skip
WORDS = [
    *(
        "1s",
        "0",
        "20%",
        "auto",
        "off",
        "keep",
        "source",
        "next",
        "main",
        "a",
        "b",
        "10.0.0.0/8",
        "10.0.0.1/8",
        "::1",
    ),
    *(
        "tcp",
        "443",
        "1-65535",
        "ef",
        "0x1/0xff",
        "lo",
        "ppp*",
        "aa:bb:cc:dd:ee:ff",
        "01:00-05:00",
        "mon",
        "x.slice",
    ),
]
scalars = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 300),
    st.booleans(),
    st.floats(),
    st.dates(),
    st.datetimes(),
    st.times(),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "c d"]), inner),
    max_leaves=6,
)  # fmt: skip


def tables(noun: str, **special: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    entries = {key: special.get(key, anything) | anything for key in KEYS[noun]}
    return st.fixed_dictionaries({}, optional={**entries, "unknown": anything})


policies = tables("policy", match=tables("match"))
documents = st.fixed_dictionaries(
    {},
    optional={
        "daemon": tables("daemon") | anything,
        "probe": tables("probe") | anything,
        "uplinks": st.dictionaries(
            st.sampled_from(["a", "b", "a-path", "é"]), tables("uplink", probe=tables("probe")) | anything
        )
        | anything,
        "policies": st.lists(policies | anything, max_size=3) | anything,
        "default": policies | anything,
        "unknown": anything,
    },
)


@given(st.lists(documents, min_size=1, max_size=2))
def test_no_document_causes_anything_but_a_config_error(found: list[dict[str, Any]]) -> None:
    texts = [(f"{index}.toml", tomli_w.dumps(document)) for index, document in enumerate(found)]
    for allow in (True, False):
        lines = []
        try:
            config = parse(texts, users, users, lambda _: "10.0.0.0/8\nx", allow_unsupported=allow)
            warnings(config)
        except ConfigError as error:
            lines = str(error).splitlines()
        assert all(line.split(".toml", 1)[0].isdigit() or ": line 2: " in line for line in lines), lines


@given(st.text(alphabet="[]{}=.,'\"\n#ab1 \\-:T", max_size=60))
def test_no_text_causes_anything_but_a_config_error(text: str) -> None:
    try:
        parse([("x.toml", text)])
    except ConfigError as error:
        assert all(problem.file == "x.toml" for problem in error.problems)  # noqa: PT017 none is right too


def test_traffic_of_units_without_nat_is_warned_of() -> None:
    lines = warnings(of(policy("unit = 'restic.service'", "via = ['lte']")))
    assert [line for line in lines if 'set nat = true on "lte"' in line]
    native = warnings(of(policy("user = 'backup'", "via = ['lte']")))
    assert not [line for line in native if "nat = true" in line]
