"""The machine beside pbrd: what others have put into its kernel and its files, as values.

Read by `machine`; judged by `conflicts` and `occupied`, which return findings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pbrd.firewalls import Flowtable, MarkSetter
from pbrd.netfiles import Entry, TableName
from pbrd.objects import ForeignRule, Route
from pbrd.settings import Family


@dataclass(frozen=True, slots=True)
class Finding:
    """What a config and its machine do to each other: where it stands, what would happen, the remedy.

    `harmless`: nothing needs to be done.
    """

    place: str
    remark: str
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.remark}"


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface, and the bridge, bond, team or VRF that it is a port of ("": none)."""

    name: str
    master: str = ""
    master_kind: str = ""
    table: int = 0  # of a VRF
    accept_ra: int = 0  # net.ipv6.conf.NAME.accept_ra


@dataclass(frozen=True, slots=True)
class ForeignRoute:
    """A route of others; `kind` is "" for a unicast one, else "unreachable" and the like."""

    route: Route
    origin: str  # the name of its protocol
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """All that was to be seen; what wasn't (no root, no such program) is empty."""

    families: tuple[Family, ...] = (Family.IPV4, Family.IPV6)
    interfaces: Mapping[str, Interface] = field(default_factory=dict)
    rules: tuple[ForeignRule, ...] = ()  # of both families, by priority; without local, main and default
    routes: Mapping[tuple[Family, int], tuple[ForeignRoute, ...]] = field(default_factory=dict)
    names: tuple[TableName, ...] = ()
    entries: tuple[Entry, ...] = ()
    networkd: Mapping[str, tuple[bool, str]] | None = None  # setting → its value and file; None: not in use
    forwarding: Mapping[Family, bool] = field(default_factory=dict)
    setters: tuple[MarkSetter, ...] = ()
    flowtables: tuple[Flowtable, ...] = ()
    nft: bool = True  # the command is there
    unfilled: tuple[str, ...] = ()  # units of kill switches whose sets systemd could fill and does not

    def defaults_in(self, family: Family, table: int) -> tuple[ForeignRoute, ...]:
        """Return the default routes of others in a table."""
        return tuple(r for r in self.routes.get((family, table), ()) if r.route.is_default)
