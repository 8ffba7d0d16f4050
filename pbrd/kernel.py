"""The kernel's routing as pbrd sees it: a mirror kept by events, and the one way to change it.

The mirror holds links, the uplinks' addresses, the rules and routes that pbrd owns, and the default
routes of the main table. Events say only "look again": they mark a part of the mirror, `read` reads
that part. The exception is a link event, which is taken as it is, so that a carrier loss waits for
nothing. Foreign tables are never dumped: the kernel filters, and of the main table just the default
routes are looked for.
"""

import errno
import struct
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

from pbrd import rtnetlink, sysctl
from pbrd.errors import KernelError
from pbrd.netlink import Events, Requests
from pbrd.objects import MAIN_TABLE, DefaultRoute, KernelState, Link, LinkAddress, Route, Rule, Sysctl
from pbrd.plan import Plan, Step, Verb
from pbrd.routing import table_names, wanted_sysctls
from pbrd.rules import tunnel_mark
from pbrd.settings import PROTOCOL, Config, Family, GatewayMode, Uplink

LOOPBACK = 1  # its index, in every network namespace
# A deletion that finds nothing has reached its aim; interfaces take their routes along.
ALREADY_GONE = {errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL}


@dataclass(slots=True)
class Changes:
    """Which parts of the mirror are out of date."""

    everything: bool = True
    links: set[int] = field(default_factory=set)  # uplink interfaces: addresses and sysctls
    tables: set[tuple[Family, int]] = field(default_factory=set)
    rules: set[Family] = field(default_factory=set)
    defaults: set[Family] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.everything or self.links or self.tables or self.rules or self.defaults)


@dataclass(frozen=True, slots=True)
class Failure:
    """A step that the kernel refused, and why."""

    step: Step
    error: KernelError


class Kernel:
    """Mirror of and access to the routing of the network namespace in which it was made."""

    def __init__(self, config: Config, originals: sysctl.Originals | None = None) -> None:
        self.requests = Requests()
        self.events: Events | None = None
        self.originals = originals
        self.families = (Family.IPV4, Family.IPV6) if sysctl.has_ipv6() else (Family.IPV4,)
        self.devices: dict[int, Link] = {}  # all interfaces by index; addresses only of uplinks
        self.defaults: dict[Family, tuple[DefaultRoute, ...]] = {}
        self.dead_ends: dict[Family, str] = {}  # kind of an error default in the main table, or ""
        self.rules: dict[Family, frozenset[Rule]] = {}
        self.others: dict[Family, frozenset[Rule]] = {}  # rules that aren't ours
        self.tunnels: dict[Family, frozenset[int]] = {}  # marks of others: see `tunnel_marks`
        self.routes: dict[tuple[Family, int], frozenset[Route]] = {}
        self.foreign: dict[tuple[Family, int], frozenset[Route]] = {}
        self.sysctls: dict[str, frozenset[Sysctl]] = {}
        self.disturbed = False  # a link event of an uplink came in since the last `take_disturbance`
        self.follow(config)

    def follow(self, config: Config) -> None:
        """Turn to the uplinks and tables of `config`; the next `read` reads everything."""
        self.config = config
        self.uplinks: dict[str, Uplink] = {u.interface: u for u in config.uplinks if u.enabled}
        self.tables = {table: u for u in self.uplinks.values() for table in (u.table, u.path_table)}
        if self.events is not None:
            self.events.heed(self.tables)
        self.changes = Changes(everything=True)

    def listen(self) -> int:
        """Subscribe to events, before the first read; return the file descriptor to wait for."""
        self.events = Events(self.tables)
        return self.events.socket.fileno()

    def close(self) -> None:
        """Close the sockets. What is in the kernel stays."""
        self.requests.close()
        if self.events is not None:
            self.events.close()

    # --- the mirror ---------------------------------------------------------------------------

    @property
    def links(self) -> dict[str, Link]:
        """All interfaces by name."""
        return {link.name: link for link in self.devices.values()}

    def all_defaults(self) -> tuple[DefaultRoute, ...]:
        """Return the main table's default routes over uplinks, both families."""
        return tuple(route for routes in self.defaults.values() for route in routes)

    @property
    def tunnel_marks(self) -> frozenset[int]:
        """Return the marks that tunnels of others put on the packets that carry them."""
        return frozenset().union(*self.tunnels.values())

    def state(self) -> KernelState:
        """Return what the mirror holds of pbrd's."""
        return KernelState(
            frozenset().union(*self.routes.values()),
            frozenset().union(*self.rules.values()),
            frozenset().union(*self.sysctls.values()),
            frozenset(route.key for routes in self.foreign.values() for route in routes),
            table_names(self.config),
        )

    def collect(self) -> None:
        """Take the waiting events in: links as they are, all else as a mark in `changes`."""
        if self.events is not None and not self.events.drain(self._event):
            self.changes.everything = True

    def take_disturbance(self) -> bool:
        """Say whether an uplink's link event came since the last call."""
        disturbed, self.disturbed = self.disturbed, False
        return disturbed

    def _event(self, kind: int, message: bytes) -> None:
        try:
            self._note(kind, message)
        except (ValueError, LookupError, struct.error, TypeError):
            self.changes.everything = True  # what we can't read may still concern us

    def _note(self, kind: int, message: bytes) -> None:
        if kind in (rtnetlink.RTM_NEWLINK, rtnetlink.RTM_DELLINK):
            if message[16] == 0:  # not AF_BRIDGE: a port that leaves its bridge is no link that vanishes
                self._link_event(message, gone=kind == rtnetlink.RTM_DELLINK)
        elif kind in (rtnetlink.RTM_NEWADDR, rtnetlink.RTM_DELADDR):
            self._suspect(int.from_bytes(message[20:24], "little"))
        elif message[16] not in self.families:
            return  # rules and routes of multicast routing come on the same groups
        elif kind in (rtnetlink.RTM_NEWRULE, rtnetlink.RTM_DELRULE):
            self.changes.rules.add(Family(message[16]))
        elif kind in (rtnetlink.RTM_NEWROUTE, rtnetlink.RTM_DELROUTE):
            protocol, route = rtnetlink.route_of(message, {})
            if route.table == MAIN_TABLE and route.is_default:
                self.changes.defaults.add(route.family)
            elif route.table in self.tables or protocol == PROTOCOL:
                self.changes.tables.add((route.family, route.table))

    def _link_event(self, message: bytes, gone: bool) -> None:
        index, name, up, carrier = rtnetlink.link_of(message)
        known = self.devices.pop(index, None)
        if not gone:
            self.devices[index] = Link(name, index, up, carrier, known.addresses if known else ())
            if known is not None:
                self.devices[index] = replace(self.devices[index], rp_filter=known.rp_filter)
        if name in self.uplinks or (known is not None and known.name in self.uplinks):
            self.disturbed = True
            self._suspect(index)

    def _suspect(self, index: int) -> None:
        """Mark all that hangs on an uplink's interface.

        The kernel drops the IPv4 routes of a link that goes down, and those of its last address, without
        a route event.
        """
        self.changes.links.add(index)
        link = self.devices.get(index)
        uplink = self.uplinks.get(link.name) if link else None
        for family in self.families:
            self.changes.defaults.add(family)
            if uplink is not None:
                self.changes.tables |= {(family, uplink.table), (family, uplink.path_table)}

    def look_at_links(self) -> None:
        """Read the uplinks' links. Being asked makes the kernel tell a carrier change at once.

        Its linkwatch holds back a second change within a second, and marks the routes dead just as late.
        """
        for index, link in list(self.devices.items()):
            if link.name in self.uplinks:
                with suppress(KernelError):
                    for _, _, message in self.requests.answers(rtnetlink.link_dump(index)):
                        now = rtnetlink.link_of(message)
                        if now != (index, link.name, link.up, link.carrier):
                            self._link_event(message, gone=False)

    def answers(self) -> bool:
        """Ask for the loopback interface, which every namespace has; say whether the kernel answered."""
        with suppress(KernelError):
            return any(True for _ in self.requests.answers(rtnetlink.link_dump(LOOPBACK)))
        return False

    # --- reading ------------------------------------------------------------------------------

    def read(self) -> None:
        """Bring the marked parts of the mirror up to date. Raises KernelError."""
        changes, self.changes = self.changes, Changes(everything=False)
        try:
            self._read(changes)
        except KernelError:
            self.changes.everything = True
            raise

    def _read(self, changes: Changes) -> None:
        if changes.everything:
            self._read_everything()
            return
        for index in changes.links:
            self._read_link(index)
        for family in changes.rules:
            self._read_rules(family)
        for family, table in changes.tables:
            self._read_table(family, table)
        for family in changes.defaults:
            self._read_defaults(family)

    def _read_everything(self) -> None:
        # Where interfaces come and go all the time no dump of them is ever whole: events tell the rest.
        dump = self.requests.dump(rtnetlink.link_dump(), partial=True)
        links = (Link(name, index, up, carrier) for index, name, up, carrier in map(rtnetlink.link_of, dump))
        self.devices = {link.index: link for link in links}
        for index in list(self.devices):
            self._read_link(index)
        for stray in [key for key in self.routes if key[1] not in self.tables]:
            del self.routes[stray], self.foreign[stray]
        for family in self.families:
            self._read_rules(family)
            self._read_defaults(family)
            for table in self.tables:
                self._read_table(family, table)
            self._read_strays(family)

    def _read_link(self, index: int) -> None:
        """Read addresses and sysctls of an uplink's interface."""
        link = self.devices.get(index)
        if link is None or link.name not in self.uplinks:
            return
        addresses: list[LinkAddress] = []
        with suppress(KernelError):  # the interface may be gone already: its event follows
            for message in self.requests.dump(rtnetlink.address_dump(index)):
                where, address = rtnetlink.address_of(message)
                if where == index:
                    addresses.append(address)
        link = replace(link, addresses=tuple(addresses), rp_filter=sysctl.rp_filter(link.name))
        self.devices[index] = link
        wanted = [s for f in self.families for s in wanted_sysctls(self.uplinks[link.name], f, link)]
        self.sysctls[link.name] = frozenset(
            sysctl.read(s) or s for s in wanted
        )  # what is not there needs no writing

    def _read_rules(self, family: Family) -> None:
        dump = self.requests.dump(rtnetlink.rule_dump(family))
        rules = [rtnetlink.rule_of(message) for message in dump]
        self.rules[family] = frozenset(rule for owner, rule in rules if owner == PROTOCOL)
        self.others[family] = frozenset(rule for owner, rule in rules if owner != PROTOCOL)
        self.tunnels[family] = frozenset(filter(None, map(tunnel_mark, self.others[family])))

    def _read_table(self, family: Family, table: int) -> None:
        owner = 0 if table in self.tables else PROTOCOL  # of a foreign table only what is ours
        self._keep(family, table, self._dump_routes(rtnetlink.route_dump(family, table, owner)))

    def _read_strays(self, family: Family) -> None:
        """Find our routes in tables that are no longer ours: a former config's."""
        strays = self._dump_routes(rtnetlink.route_dump(family, protocol=PROTOCOL))
        for table in {route.table for _, route in strays} - set(self.tables):
            self._keep(family, table, [pair for pair in strays if pair[1].table == table])

    def _dump_routes(self, request: bytes) -> list[tuple[int, Route]]:
        names = {index: link.name for index, link in self.devices.items()}
        try:
            return [rtnetlink.route_of(message, names) for message in self.requests.dump(request)]
        except KernelError as error:
            if error.errno == errno.ENOENT:  # no such table yet
                return []
            raise

    def _keep(self, family: Family, table: int, routes: Iterable[tuple[int, Route]]) -> None:
        routes = tuple(routes)
        self.routes[family, table] = frozenset(route for owner, route in routes if owner == PROTOCOL)
        self.foreign[family, table] = frozenset(route for owner, route in routes if owner != PROTOCOL)

    def _read_defaults(self, family: Family) -> None:
        """Find the default routes of the main table without reading it.

        IPv4 dumps a table in the order of its addresses, so 0.0.0.0/0 comes early and the rest is left
        unread. IPv6 dumps ::/0 last: there the kernel filters by interface, for uplinks that want "auto".
        """
        names = {index: link.name for index, link in self.devices.items()}
        messages: list[bytes] = []
        if family is Family.IPV4:
            messages = self._first_routes(rtnetlink.route_dump(family, MAIN_TABLE))
        else:  # error routes lie on lo
            auto = {u.interface for u in self.uplinks.values() if u.gateway6 is GatewayMode.AUTO}
            for index in (index for index, name in names.items() if name in auto | {"lo"}):
                try:
                    messages += self.requests.dump(rtnetlink.route_dump(family, MAIN_TABLE, interface=index))
                except KernelError as error:
                    if error.errno != errno.ENODEV:  # gone already: its event follows
                        raise
        self.dead_ends[family] = next(filter(None, map(rtnetlink.error_default_of, messages)), "")
        found = (route for m in messages if m[17] == 0 for route in rtnetlink.defaults_of(m, names))
        self.defaults[family] = tuple(route for route in found if route.interface in self.uplinks)

    def _first_routes(self, request: bytes) -> list[bytes]:
        """Return the routes to 0.0.0.0/n at the beginning of a dump, on a socket that is then thrown away.

        All of them share a leaf of the kernel's trie, the longest prefix first: OpenVPN's 0.0.0.0/1, say.
        """
        found = []
        with closing(Requests()) as once:
            for kind, _, message in once.answers(request):
                if kind != rtnetlink.RTM_NEWROUTE:
                    break
                _, route = rtnetlink.route_of(message, {})
                if int(route.destination.network_address) != 0:
                    break
                found.append(message)
        return found

    # --- writing ------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> list[Failure]:
        """Make the steps of `plan`, in order, in one batch; return those that failed.

        What they touch is marked, so that the next `read` reads it back.
        """
        indexes = {link.name: link.index for link in self.devices.values()}
        failures: list[Failure] = []
        requests: list[tuple[Step, bytes]] = []
        for step in plan.steps:
            try:
                self._mark(step)
                if isinstance(step.item, Sysctl):
                    self._write_sysctl(step.item)
                elif isinstance(step.item, Route):
                    index = indexes.get(step.item.interface, 0)
                    requests.append((step, rtnetlink.route_request(step.verb, step.item, index)))
                else:
                    requests.append((step, rtnetlink.rule_request(step.verb, step.item)))
            except OSError as error:
                failures.append(Failure(step, KernelError(f"cannot set: {error.strerror}", error.errno or 0)))
        results = self.requests.transact([request for _, request in requests])
        for (step, _), refusal in zip(requests, results, strict=True):
            if refusal is not None and not (step.verb is Verb.DELETE and refusal.errno in ALREADY_GONE):
                failures.append(Failure(step, refusal))
        return failures

    def _mark(self, step: Step) -> None:
        if isinstance(step.item, Route):
            self.changes.tables.add((step.item.family, step.item.table))
        elif isinstance(step.item, Rule):
            self.changes.rules.add(step.item.family)
        else:
            link = self.links.get(step.item.interface)
            self.changes.links |= {link.index} if link else set()

    def _write_sysctl(self, wanted: Sysctl) -> None:
        if self.originals is None:
            sysctl.path_of(wanted).write_text(str(wanted.value))
        else:
            self.originals.write(wanted)
