"""The objects of ip(8) as values: links, addresses, routes, rules, and the state they make up.

Interfaces go by name, never by index: one that vanishes and comes back is the same to an
administrator, and has another index to the kernel.
"""

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Network

from pbrd.settings import Address, Family, Mark, Network, Range

MAIN_TABLE = 254
IPV6_METRIC = 1024  # what the kernel gives an IPv6 route that names none (IP6_RT_PRIO_USER)

Key = tuple[str, Family]  # one family of one uplink: what has a gateway and a health of its own


class Action(Enum):
    """What a rule does with a packet that it matches; the value is ip-rule(8)'s word."""

    LOOKUP = "lookup"
    UNREACHABLE = "unreachable"
    BLACKHOLE = "blackhole"
    PROHIBIT = "prohibit"
    GOTO = "goto"
    NOP = "nop"  # only a place to go to


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route; `gateway` None means that the destination is on-link."""

    family: Family
    table: int
    destination: Network
    interface: str
    gateway: Address | None = None
    source: Address | None = None  # preferred source address
    onlink: bool = False  # the gateway is on this link although no address here says so
    metric: int = 0
    raw: bytes = b""  # as read, where it is of a kind that pbrd never makes: only to delete it

    @property
    def key(self) -> tuple[Family, int, Network, int]:
        """What the kernel takes for the same route: a replace with an equal key replaces."""
        return self.family, self.table, self.destination, self.metric

    @property
    def is_default(self) -> bool:
        """Whether this is 0.0.0.0/0 or ::/0."""
        return self.destination.prefixlen == 0


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of ip-rule(8); an absent selector matches everything."""

    family: Family
    priority: int
    action: Action = Action.LOOKUP
    table: int = 0
    source: Network | None = None
    destination: Network | None = None
    iif: str = ""
    oif: str = ""
    fwmark: Mark | None = None
    user: Range | None = None
    proto: int = 0
    sport: Range | None = None
    dport: Range | None = None
    dscp: int | None = None
    suppress_prefixlength: int | None = None
    inverted: bool = False  # `not`: for what the selectors do not match
    goto: int = 0  # the priority of the next rule to ask
    raw: bytes = b""  # as read, where it is of a kind that pbrd never makes: only to delete it


@dataclass(frozen=True, slots=True)
class ForeignRule:
    """A rule of others."""

    rule: Rule
    protocol: int  # FRA_PROTOCOL: who says to have made it
    odd: bool = False  # narrowed by what `Rule` has no word for (tos, l3mdev, tunnel ids), or does nothing


@dataclass(frozen=True, slots=True)
class Sysctl:
    """`net.ipv4.conf.INTERFACE.KEY = value`, or net.ipv6."""

    family: Family
    interface: str
    key: str
    value: int


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An address of an interface. `prefix` is what it makes on-link: the peer's on point-to-point links."""

    local: Address
    prefix: Network


@dataclass(frozen=True, slots=True)
class Link:
    """An interface as the kernel shows it now. `carrier` is the device's own word, not linkwatch's."""

    name: str
    index: int
    up: bool
    carrier: bool
    addresses: tuple[LinkAddress, ...] = ()
    rp_filter: int = 0  # what counts: the larger of the interface's own and `all`


@dataclass(frozen=True, slots=True)
class DefaultRoute:
    """A default route of the main table, as somebody else put it there."""

    family: Family
    interface: str
    gateway: Address | None
    metric: int
    protocol: str  # "dhcp", "ra", "static", …
    onlink: bool = False
    source: Address | None = None


@dataclass(frozen=True, slots=True)
class NextHop:
    """How packets leave by an uplink; `gateway` None is point-to-point. `origin` says who told us."""

    gateway: Address | None
    onlink: bool
    origin: str
    source: Address | None = None  # preferred source address, as the main table's route has it


@dataclass(frozen=True, slots=True)
class Standing:
    """What health says of one family of an uplink."""

    usable: bool  # the default route belongs into its table
    preferred: bool  # its rules stand in the order of the config; else behind the others
    drained: bool = False  # no new connections


@dataclass(frozen=True, slots=True)
class KernelState:
    """All that pbrd owns in the kernel: as wanted, or as it is.

    `foreign` are the keys of other people's routes in our tables (only as read): never touched, and in
    the way of ours. `tables` names the tables, for people.
    """

    routes: frozenset[Route] = frozenset()
    rules: frozenset[Rule] = frozenset()
    sysctls: frozenset[Sysctl] = frozenset()
    foreign: frozenset[tuple[Family, int, Network, int]] = frozenset()
    tables: tuple[tuple[int, str], ...] = ()


def default_network(family: Family) -> Network:
    """Return 0.0.0.0/0 or ::/0."""
    return IPv4Network("0.0.0.0/0") if family is Family.IPV4 else IPv6Network("::/0")
