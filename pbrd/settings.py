"""What a config says, typed: the values that `config.load` returns and everybody else reads.

Everything is frozen and canonical on entry, so that `==` on two configs is enough to know
whether anything changed. Seconds are floats, ratios are 0.0 to 1.0, addresses are `ipaddress`
objects. Nothing here reads a file or judges: that is `config`.
"""

import socket
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from pbrd.prefixes import Networks

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PROTOCOL = 112  # rtm_protocol and FRA_PROTOCOL of all that pbrd owns
PATH_TABLE_OFFSET = 1000  # the path table of an uplink is its table + 1000
MAIN = "main"  # the reserved uplink name: leave it to the main table
DEFAULT_POLICY = "default"  # how `[default]` appears among the policies


class Family(IntEnum):
    """An address family, with the kernel's number (AF_INET, AF_INET6)."""

    IPV4 = socket.AF_INET
    IPV6 = socket.AF_INET6

    @property
    def version(self) -> int:
        """4 or 6, as `ipaddress` objects have it."""
        return 4 if self is Family.IPV4 else 6


class GatewayMode(StrEnum):
    """How an uplink's gateway is found when the config names no address."""

    AUTO = "auto"  # learned from the main table
    NONE = "none"  # point-to-point: the interface itself is the way
    OFF = "off"  # this family does not exist on this uplink


class Fallback(StrEnum):
    """What becomes of a policy's packets when none of its uplinks is usable."""

    NEXT = "next"
    UNREACHABLE = "unreachable"
    BLACKHOLE = "blackhole"
    PROHIBIT = "prohibit"
    BEST_EFFORT = "best-effort"


KILL_SWITCHES = frozenset({Fallback.UNREACHABLE, Fallback.BLACKHOLE, Fallback.PROHIBIT})


class Failback(StrEnum):
    """Whether live connections move at once when a better uplink heals."""

    GRACEFUL = "graceful"
    IMMEDIATE = "immediate"


class OnStop(StrEnum):
    """What becomes of rules and routes when the daemon stops."""

    KEEP = "keep"
    FLUSH = "flush"


class Sticky(StrEnum):
    """What keeps a balanced client on its uplink."""

    NONE = "none"
    SOURCE = "source"


@dataclass(frozen=True, slots=True)
class Range:
    """An inclusive range of ports or of user or group ids."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A packet mark set by other software: matches when `mark & mask == value`."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class TimeOfDay:
    """A daily stretch of local time in seconds since midnight; `end` below `start` crosses midnight."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Daemon:
    """`[daemon]`."""

    rule_priority: int = 10000
    table_base: int = 200
    names: str = "/etc/iproute2"  # directory; "" registers names nowhere
    fwmark_mask: int = 0xFF000000
    on_stop: OnStop = OnStop.KEEP
    failback: Failback = Failback.GRACEFUL
    metrics: str = ""  # "ADDRESS:PORT" to serve on; "" serves none


@dataclass(frozen=True, slots=True)
class Probe:
    """`[probe]`, or `[uplinks.X.probe]` completed by it. Times in seconds, loss as a ratio; 0: not judged."""

    targets: tuple[Address, ...] = (IPv4Address("1.1.1.1"), IPv4Address("9.9.9.9"))
    interval: float = 1.0
    timeout: float = 1.0
    fall: int = 3
    rise: int = 5
    stable_for: float = 10.0
    quorum: int = 1
    confirm_interval: float = 0.2  # 0: no confirm rounds
    max_loss: float = 0.2
    max_latency: float = 0.0
    max_jitter: float = 0.0
    window: float = 30.0

    def targets_of(self, family: Family) -> tuple[Address, ...]:
        """Return the targets that are addresses of `family`."""
        return tuple(target for target in self.targets if target.version == family.version)


@dataclass(frozen=True, slots=True)
class Uplink:
    """`[uplinks.NAME]`. `index` counts from 0 in the order of the files; `table` is always filled in."""

    name: str
    index: int
    interface: str
    table: int
    gateway: IPv4Address | GatewayMode = GatewayMode.AUTO
    gateway6: IPv6Address | GatewayMode = GatewayMode.AUTO
    nat: bool = False
    nat6: bool = False
    metered: bool = False
    enabled: bool = True
    probe: Probe = field(default_factory=Probe)

    @property
    def path_table(self) -> int:
        """The table that says how to get out here whatever health says."""
        return self.table + PATH_TABLE_OFFSET

    def gateway_of(self, family: Family) -> Address | GatewayMode:
        """Return what the config says of the gateway of `family`."""
        return self.gateway if family is Family.IPV4 else self.gateway6


def has_nat(uplink: Uplink, family: Family) -> bool:
    """Say whether what leaves by `uplink` is masqueraded."""
    return uplink.nat6 if family is Family.IPV6 else uplink.nat


@dataclass(frozen=True, slots=True)
class Match:
    """`match` of a policy. A tuple means "any of its items", an empty one "anything"; all keys must hold."""

    source: Networks = ()  # `from`, and the prefixes of `from_file`; long lists are `Prefixes`
    destination: Networks = ()  # `to`, and the prefixes of `to_file`
    source_file: str = ""  # path as written; "" is none
    destination_file: str = ""
    iif: tuple[str, ...] = ()  # exact, or ending in `*`; "lo" is this host itself
    proto: tuple[int, ...] = ()  # IP protocol numbers
    sport: tuple[Range, ...] = ()
    dport: tuple[Range, ...] = ()
    user: tuple[Range, ...] = ()  # uid ranges
    group: tuple[Range, ...] = ()  # gid ranges
    fwmark: tuple[Mark, ...] = ()  # masked with the complement of `daemon.fwmark_mask` already
    dscp: tuple[int, ...] = ()  # 0 to 63
    mac: tuple[str, ...] = ()  # "aa:bb:cc:dd:ee:ff", lower case
    unit: tuple[str, ...] = ()
    time: tuple[TimeOfDay, ...] = ()
    days: tuple[int, ...] = ()  # 0 is Monday
    override_main: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """`[[policies]]`, or `[default]` under the name "default". One of `via` and `balance` is filled."""

    name: str
    match: Match = field(default_factory=Match)
    via: tuple[str, ...] = ()  # uplink names or "main", best first
    balance: tuple[tuple[str, int], ...] = ()  # uplink name, weight
    sticky: Sticky = Sticky.NONE
    fallback: Fallback = Fallback.NEXT
    failback: Failback | None = None  # None: as `daemon.failback`


@dataclass(frozen=True, slots=True)
class Config:
    """All files together. `policies` stand in their order; `default` is None without `[default]`."""

    daemon: Daemon = field(default_factory=Daemon)
    uplinks: tuple[Uplink, ...] = ()
    policies: tuple[Policy, ...] = ()
    default: Policy | None = None
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        """Return the hash of everything, worked out once.

        Configs are keys of caches in every turn of the loop, and hold thousands of policies: two with the
        same hash are compared policy by policy.
        """
        if not self._hash:
            everything = hash((self.daemon, self.uplinks, self.policies, self.default))
            object.__setattr__(self, "_hash", everything or 1)
        return self._hash

    def uplink(self, name: str) -> Uplink:
        """Return the uplink called `name`; KeyError if there is none."""
        for uplink in self.uplinks:
            if uplink.name == name:
                return uplink
        raise KeyError(name)

    @property
    def all_policies(self) -> tuple[Policy, ...]:
        """The policies in the order in which a packet meets them, `[default]` last."""
        return self.policies if self.default is None else (*self.policies, self.default)


@lru_cache(maxsize=16)
def the_same(config: Config) -> Config:
    """Return `config`, or an equal one that was asked for before.

    Caches find that one without comparing thousands of policies, when a config comes again.
    """
    return config
