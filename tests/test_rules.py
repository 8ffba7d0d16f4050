"""The rules that a config makes, in the words of `ip rule`."""

import itertools
from ipaddress import ip_address, ip_network

import pytest

from pbrd.config import parse
from pbrd.errors import ConfigError
from pbrd.objects import KernelState, Key, Link, LinkAddress, Standing
from pbrd.plan import diff
from pbrd.routing import desired, next_hop
from pbrd.rules import keys_of, policy_bands, stride_of
from pbrd.settings import Config, Family

UPLINKS = """
[uplinks.fiber]
interface = "eth0"
gateway = "192.168.1.1"
table = 201
[uplinks.lte]
interface = "eth1"
gateway = "10.0.0.1"
gateway6 = "off"
table = 202
"""
LINKS = {
    "eth0": Link(
        "eth0",
        2,
        True,
        True,
        (LinkAddress(ip_address("192.168.1.10"), ip_network("192.168.1.0/24")),),
    ),
    "eth1": Link(
        "eth1", 3, True, True, (LinkAddress(ip_address("10.0.0.5"), ip_network("10.0.0.0/24")),), rp_filter=1
    ),
    "br-guest": Link("br-guest", 4, True, True),
    "br-lab": Link("br-lab", 5, True, True),
    "lo": Link("lo", 1, True, True),
}
UP = Standing(usable=True, preferred=True)
RECOVERING = Standing(usable=True, preferred=False)
DOWN = Standing(usable=False, preferred=False)


def config(text: str) -> Config:
    return parse([("pbrd.toml", UPLINKS + text)], users={"restic": 999, "root": 0}.__getitem__)


def plan(text: str, family: Family = Family.IPV4, **standings: Standing) -> list[str]:
    """Return the lines of the first start with this config."""
    made = config(text)
    hops, known = {}, {}
    for key in keys_of(made, [family]):
        hops[key] = next_hop(made.uplink(key[0]), family, LINKS.get(made.uplink(key[0]).interface), ())
        known[key] = standings.get(key[0], UP)
    return list(diff(KernelState(), desired(made, [family], LINKS, hops, known)).lines())


def rules(text: str, first: int, last: int, family: Family = Family.IPV4, **standings: Standing) -> list[str]:
    """Return the rules from priority `first` to `last`, as "PRIORITY from …"."""
    rows = (line.partition(" priority ")[2] for line in plan(text, family, **standings))
    return [row for row in rows if row and first <= int(row.split()[0]) <= last]


def test_first_start_makes_tables_then_rules() -> None:
    assert plan("") == [
        "sysctl net.ipv4.conf.eth0.ignore_routes_with_linkdown=1",
        "sysctl net.ipv4.conf.eth0.src_valid_mark=1",
        "sysctl net.ipv4.conf.eth1.ignore_routes_with_linkdown=1",
        "sysctl net.ipv4.conf.eth1.rp_filter=2",
        "sysctl net.ipv4.conf.eth1.src_valid_mark=1",
        "route add 192.168.1.0/24 dev eth0 table fiber src 192.168.1.10",
        "route add 10.0.0.0/24 dev eth1 table lte src 10.0.0.5",
        "route add 192.168.1.0/24 dev eth0 table fiber-path src 192.168.1.10",
        "route add 10.0.0.0/24 dev eth1 table lte-path src 10.0.0.5",
        "route add default via 192.168.1.1 dev eth0 table fiber",
        "route add default via 10.0.0.1 dev eth1 table lte",
        "route add default via 192.168.1.1 dev eth0 table fiber-path",
        "route add default via 10.0.0.1 dev eth1 table lte-path",
        "rule  add priority 10000 from all fwmark 0xff000000/0xff000000 oif eth0 lookup fiber-path",
        "rule  add priority 10001 from all fwmark 0xff000000/0xff000000 oif eth1 lookup lte-path",
        "rule  add priority 10099 from all fwmark 0xff000000/0xff000000 unreachable",
        "rule  add priority 10101 from all fwmark 0x1000000/0xff000000 lookup fiber",
        "rule  add priority 10102 from all fwmark 0x2000000/0xff000000 lookup lte",
        "rule  add priority 10900 from all lookup main suppress_prefixlength 0",
        "rule  add priority 30800 from 192.168.1.10 lookup fiber",
        "rule  add priority 30801 from 10.0.0.5 lookup lte",
        "rule  add priority 30900 from all oif eth0 lookup fiber-path",
        "rule  add priority 30901 from all oif eth1 lookup lte-path",
    ]


BACKUPS = """
[[policies]]
name = "backups"
match = { from = ["192.168.1.100"] }
via = ["lte", "fiber"]
"""


@pytest.mark.parametrize(
    ("fallback", "rows"),
    [
        ("next", []),
        ("unreachable", ["11002 from 192.168.1.100 unreachable"]),
        ("blackhole", ["11002 from 192.168.1.100 blackhole"]),
        ("prohibit", ["11002 from 192.168.1.100 prohibit"]),
        (
            "best-effort",
            [
                "11002 from 192.168.1.100 lookup lte-path",
                "11003 from 192.168.1.100 lookup fiber-path",
            ],
        ),
    ],
)
def test_a_policy_is_a_row_of_lookups_and_its_fallback(fallback: str, rows: list[str]) -> None:
    assert rules(BACKUPS + f'fallback = "{fallback}"', 11000, 11099) == [
        "11000 from 192.168.1.100 lookup lte",
        "11001 from 192.168.1.100 lookup fiber",
        *rows,
    ]


@pytest.mark.parametrize(("standing", "first"), [(UP, "lte"), (RECOVERING, "fiber"), (DOWN, "lte")])
def test_an_uplink_that_is_not_preferred_stands_behind(standing: Standing, first: str) -> None:
    """A dead one keeps its place: its failover is one route, whatever the number of policies."""
    assert rules(BACKUPS, 11000, 11000, lte=standing) == [f"11000 from 192.168.1.100 lookup {first}"]


@pytest.mark.parametrize(
    ("match", "rows"),
    [
        ("{ to = '10.8.0.0/16' }", ["from all to 10.8.0.0/16"]),
        ("{ iif = 'lo' }", ["from all iif lo"]),
        ("{ iif = 'br-*' }", ["from all iif br-guest", "from all iif br-lab"]),
        (
            "{ proto = 'tcp', dport = [80, '8000-8100'] }",
            ["from all ipproto tcp dport 80", "from all ipproto tcp dport 8000-8100"],
        ),
        (
            "{ proto = ['tcp', 'udp'], sport = 53 }",
            ["from all ipproto tcp sport 53", "from all ipproto udp sport 53"],
        ),
        ("{ user = 'restic' }", ["from all iif lo uidrange 999-999"]),
        ("{ user = '1000-1999' }", ["from all iif lo uidrange 1000-1999"]),
        ("{ fwmark = '0x1' }", ["from all fwmark 0x1/0xffffff"]),
        ("{ fwmark = '0x1/0xff' }", ["from all fwmark 0x1/0xff"]),
        ("{ dscp = 'ef' }", ["from all dscp 46"]),
        ("{ proto = 'icmp' }", ["from all ipproto icmp"]),
        ("{ from = ['10.1.0.0/16', '2001:db8::/32'] }", ["from 10.1.0.0/16"]),
        ("{ from = '2001:db8::/32' }", []),
        (
            "{ from = ['10.1.0.0/16', '10.2.0.0/16'], to = ['10.8.0.0/16', '10.9.0.0/16'] }",
            [
                "from 10.1.0.0/16 to 10.8.0.0/16",
                "from 10.1.0.0/16 to 10.9.0.0/16",
                "from 10.2.0.0/16 to 10.8.0.0/16",
                "from 10.2.0.0/16 to 10.9.0.0/16",
            ],
        ),
    ],
)
def test_selectors(match: str, rows: list[str]) -> None:
    text = f"[[policies]]\nname = 'one'\nmatch = {match}\nvia = ['lte']\n"
    assert rules(text, 11000, 11099) == [f"11000 {row} lookup lte" for row in rows]


def test_icmp_is_icmpv6_where_the_packet_is_ipv6() -> None:
    text = "[[policies]]\nname = 'one'\nmatch = { proto = 'icmp' }\nvia = ['fiber']\n"
    assert rules(text, 11000, 11099, Family.IPV6) == ["11000 from all ipproto ipv6-icmp lookup fiber"]


def test_a_kill_switch_holds_for_a_family_that_no_uplink_has() -> None:
    text = "[[policies]]\nname = 'one'\nmatch = { user = 0 }\nvia = ['lte']\nfallback = 'unreachable'\n"
    assert rules(text, 11000, 11099, Family.IPV6) == ["11001 from all iif lo uidrange 0-0 unreachable"]


def test_main_as_an_uplink_is_the_main_table() -> None:
    text = "[[policies]]\nname = 'one'\nmatch = { to = '10.8.0.0/16' }\nvia = ['main']\n"
    assert rules(text, 11000, 11099) == ["11000 from all to 10.8.0.0/16 lookup main"]


def test_override_main_stands_before_the_main_table_and_default_behind_all() -> None:
    text = (
        "[[policies]]\nname = 'one'\nmatch = { from = '10.1.1.1', override_main = true }\nvia = ['lte']\n"
        "[default]\nvia = ['fiber', 'lte']\nfallback = 'best-effort'\n"
    )
    assert rules(text, 10400, 10899) == ["10400 from 10.1.1.1 lookup lte"]
    assert rules(text, 31000, 31999) == [
        "31000 from all lookup fiber",
        "31001 from all lookup lte",
        "31002 from all lookup fiber-path",
        "31003 from all lookup lte-path",
    ]


def test_policies_keep_their_order_and_never_share_a_priority() -> None:
    many = "".join(
        f"[[policies]]\nname = 'p{n}'\nmatch = {{ to = '10.0.{n}.0/24' }}\n"
        "via = ['lte', 'fiber']\nfallback = 'prohibit'\n"
        for n in range(60)
    )
    bands = list(policy_bands(config(many)))
    assert [policy.name for policy, _, _ in bands] == [f"p{n}" for n in range(60)]
    assert all(last <= first for (_, _, last), (_, first, _) in itertools.pairwise(bands))
    assert bands[-1][2] <= 30800


@pytest.mark.parametrize(
    ("count", "stride"), [(1, 100), (198, 100), (199, 50), (1980, 10), (19800, 1), (19801, 0)]
)
def test_the_stride_between_policies_is_the_largest_that_fits(count: int, stride: int) -> None:
    assert stride_of(count, 19800) == stride


def test_more_ways_than_the_mask_has_room_for_are_refused() -> None:
    more = "".join(f"[uplinks.u{n}]\ninterface = 'u{n}'\n" for n in range(4))
    names = ["fiber", "lte", "u0", "u1", "u2", "u3"]
    policies = "".join(
        f"[[policies]]\nname = 'p{n}'\nmatch = {{ mac = '02:00:00:00:00:{n:02x}' }}\n"
        f"via = ['{names[n % 6]}', '{names[(n // 6 + n + 1) % 6]}']\nfallback = 'prohibit'\n"
        for n in range(30)
    )
    with pytest.raises(
        ConfigError, match=r"policies make 31 different ways, and fwmark_mask has room for 14"
    ):
        config(more + policies)
    assert config(more + policies + "[daemon]\nfwmark_mask = 0xffff0000\n")


def test_keys_leave_out_what_can_never_leave_there() -> None:
    keys: tuple[Key, ...] = keys_of(config(""), [Family.IPV4, Family.IPV6])
    assert keys == (("fiber", Family.IPV4), ("fiber", Family.IPV6), ("lte", Family.IPV4))
