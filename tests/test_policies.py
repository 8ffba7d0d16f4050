"""Which packets a policy takes: one real packet for each selector, and what is left when the policy goes."""

import re

import pytest
from conftest import HEAD, UPLINKS, MakeLab, StartDaemon, eventually

from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab, Uplink

BASE = f"{HEAD}[probe]\ntargets = []\n{UPLINKS}"
DEFAULT = '[default]\nvia = ["fiber", "lte"]\n'


def policy(match: str, via: str = '["lte"]', more: str = "") -> str:
    return f'[[policies]]\nname = "one"\nmatch = {match}\nvia = {via}\n{more}\n'


def shown(lab: Lab) -> str:
    """Rules and routes of the router, both families; IPv6 lifetimes and caches are not there in a lab."""
    lines = [lab.run(lab.router, "ip", *words).stdout for words in (
        ("rule",), ("-6", "rule"), ("route", "show", "table", "all"), ("-6", "route", "show", "table", "all"),
    )]  # fmt: skip
    return "".join(lines)


SELECTORS = [
    (f"{{ from = '{LAN[1]}' }}", {"src": LAN[1]}, {"src": LAN[0]}),
    (f"{{ from = '{LAN6[1]}' }}", {"src": LAN6[1]}, {"src": LAN6[0]}),
    (f"{{ to = '{TARGETS[1]}/32' }}", {"dst": TARGETS[1]}, {"dst": TARGETS[0]}),
    (f"{{ to = '{TARGETS6[1]}' }}", {"src": LAN6[0], "dst": TARGETS6[1]}, {"src": LAN6[0]}),
    ("{ iif = 'lan' }", {}, {"local": True}),
    ("{ iif = 'la*' }", {}, {"local": True}),
    ("{ iif = 'lo' }", {"local": True}, {}),
    ("{ proto = 'tcp', dport = 443 }", {"proto": "tcp", "dport": 443}, {"proto": "udp", "dport": 443}),
    ("{ proto = 'udp', dport = '8000-8100' }", {"dport": 8050}, {"dport": 8101}),
    ("{ proto = 'udp', sport = 5060 }", {"sport": 5060}, {"sport": 5061}),
    ("{ proto = 'icmp' }", {"proto": "icmp"}, {"proto": "udp"}),
    ("{ proto = 'icmp' }", {"proto": "icmp", "src": LAN6[0]}, {"src": LAN6[0]}),
    ("{ user = 'daemon' }", {"local": True, "uid": 1}, {"local": True, "uid": 2}),
    ("{ user = 'root' }", {"local": True}, {}),
    ("{ user = '1000-1999' }", {"local": True, "uid": 1500}, {"local": True, "uid": 2000}),
    ("{ fwmark = '0x1' }", {"local": True, "mark": 1}, {"local": True, "mark": 3}),
    ("{ fwmark = '0x1/0xff' }", {"local": True, "mark": 0x101}, {"local": True, "mark": 2}),
    ("{ dscp = 'ef' }", {"dscp": 46}, {"dscp": 10}),
    ("{ dscp = 'ef' }", {"dscp": 46, "src": LAN6[0]}, {"dscp": 10, "src": LAN6[0]}),
    (f"{{ from = ['{LAN[1]}', '{LAN[2]}'] }}", {"src": LAN[2]}, {"src": LAN[0]}),
    (
        f"{{ from = '{LAN[1]}', proto = 'tcp', dport = 22 }}",
        {"src": LAN[1], "proto": "tcp", "dport": 22},
        {"src": LAN[1]},
    ),
]


@pytest.mark.parametrize(("match", "hit", "miss"), SELECTORS, ids=[row[0] for row in SELECTORS])
def test_a_selector_takes_what_it_says_and_nothing_else(
    lab: Lab, daemon: StartDaemon, match: str, hit: dict[str, object], miss: dict[str, object]
) -> None:
    pbrd = daemon(lab, BASE + DEFAULT)
    before = shown(lab)
    assert pbrd.reload(BASE + policy(match) + DEFAULT).returncode == 0
    assert lab.exit_of(**hit) == "lte"  # type: ignore[arg-type]
    assert lab.exit_of(**miss) == "fiber"  # type: ignore[arg-type]
    assert pbrd.reload(BASE + DEFAULT).returncode == 0
    assert shown(lab) == before


def test_the_first_policy_that_matches_decides(lab: Lab, daemon: StartDaemon) -> None:
    first = policy(f"{{ from = '{LAN[1]}', proto = 'tcp', dport = 443 }}", '["fiber"]')
    second = policy(f"{{ from = '{LAN[1]}' }}").replace('"one"', '"two"')
    daemon(lab, BASE + first + second + DEFAULT)
    assert lab.exit_of(src=LAN[1], proto="tcp", dport=443) == "fiber"
    assert lab.exit_of(src=LAN[1], proto="tcp", dport=80) == "lte"


def test_main_leaves_it_to_the_main_table(lab: Lab, daemon: StartDaemon) -> None:
    everything = policy("{ iif = 'lan' }", '["lte"]').replace('"one"', '"rest"')
    daemon(lab, BASE + policy(f"{{ to = '{TARGETS[1]}' }}", '["main"]') + everything)
    assert lab.exit_of(dst=TARGETS[1]) == "fiber"
    assert lab.exit_of(dst=TARGETS[0]) == "lte"


def test_specific_routes_of_main_win_unless_overridden(lab: Lab, daemon: StartDaemon) -> None:
    lab.ip(lab.router, f"route add {TARGETS[1]} via {lab.uplinks[0].gateway}")
    pbrd = daemon(lab, BASE + policy("{ iif = 'lan' }"))
    assert lab.exit_of(dst=TARGETS[1]) == "fiber"
    assert lab.exit_of(dst=TARGETS[0]) == "lte"
    pbrd.reload(BASE + policy("{ iif = 'lan', override_main = true }"))
    assert lab.exit_of(dst=TARGETS[1]) == "lte"


@pytest.mark.parametrize(
    ("fallback", "where"),
    [
        ("next", "fiber"),
        ("unreachable", None),
        ("blackhole", None),
        ("prohibit", None),
        ("best-effort", "lte"),
    ],
)
def test_fallbacks(lab: Lab, daemon: StartDaemon, fallback: str, where: str | None) -> None:
    probed = BASE.replace('interface = "lte"', f'interface = "lte"\nprobe = {{ targets = ["{TARGETS[2]}"] }}')
    probed = probed.replace("targets = []", 'targets = []\ninterval = "100ms"\ntimeout = "100ms"', 1)
    lab.nft(lab.uplinks[1].isp, "add rule inet fault silence ip protocol icmp drop")
    pbrd = daemon(lab, probed + policy(f"{{ from = '{LAN[1]}' }}", more=f'fallback = "{fallback}"') + DEFAULT)
    eventually(lambda: pbrd.uplink("lte")["ipv4"]["state"] == "down")
    assert lab.exit_of(src=LAN[1]) == where
    assert pbrd.policy("one")["state"] == "fallback"


@pytest.mark.parametrize("nat", ["false", "true"])
def test_the_users_own_example(make_lab: MakeLab, daemon: StartDaemon, nat: str) -> None:
    """eth0 and eth1; a local address by eth1, all else by eth0; https and a mark the other way; table 200."""
    lab = make_lab(
        (
            Uplink("primary", "eth0", "192.168.1.10", "192.168.1.1", extra=("192.168.1.100/24",)),
            Uplink("secondary_link", "eth1", "10.0.0.5", "10.0.0.1"),
        )
    )
    daemon(
        lab,
        f"""
        [daemon]
        names = ""
        [probe]
        targets = []
        [uplinks.primary]
        interface = "eth0"
        gateway = "192.168.1.1"
        table = 199
        [uplinks.secondary_link]
        interface = "eth1"
        gateway = "10.0.0.1"
        table = 200
        nat = {nat}
        [[policies]]
        name = "https"
        match = {{ proto = "tcp", dport = 443 }}
        via = ["secondary_link", "primary"]
        [[policies]]
        name = "marked"
        match = {{ fwmark = "1" }}
        via = ["secondary_link", "primary"]
        [[policies]]
        name = "second-address"
        match = {{ from = "192.168.1.100" }}
        via = ["secondary_link", "primary"]
        [default]
        via = ["primary", "secondary_link"]
        """,
    )
    rewritten = lab.counter("ip saddr 10.0.0.5")
    assert lab.exit_of(local=True, src="192.168.1.100") == "secondary_link"
    assert (rewritten.read()["secondary_link"] > 0) == (nat == "true")
    assert lab.exit_of(local=True, src="192.168.1.10") == "primary"
    assert lab.exit_of(local=True) == "primary"
    assert lab.exit_of(local=True, proto="tcp", dport=443) == "secondary_link"
    assert lab.exit_of(local=True, proto="tcp", dport=80) == "primary"
    assert lab.exit_of(local=True, mark=1) == "secondary_link"
    table = lab.run(lab.router, "ip", "-N", "route", "show", "table", "200").stdout
    assert re.match(
        r"default via 10\.0\.0\.1 dev eth1 proto 112\s*\n10\.0\.0\.0/24 dev eth1 proto 112 .*src 10\.0\.0\.5",
        table,
    )


@pytest.mark.parametrize("uplink", ["fiber", "lte"])
def test_a_socket_bound_to_an_uplink_or_its_address_leaves_there(
    lab: Lab, daemon: StartDaemon, uplink: str
) -> None:
    daemon(lab, BASE)
    address = {u.name: u.address for u in lab.uplinks}[uplink]
    assert lab.exit_of(local=True, device=uplink) == uplink
    assert lab.exit_of(local=True, src=address) == uplink


def test_a_bound_socket_does_not_slip_past_a_kill_switch(lab: Lab, daemon: StartDaemon) -> None:
    daemon(lab, BASE + policy("{ user = 'daemon' }", '["lte"]', 'fallback = "unreachable"'))
    fiber = lab.uplinks[0].address
    lab.carrier(1, False)
    assert lab.exit_of(local=True, uid=1, src=fiber, within=0.3) is None
