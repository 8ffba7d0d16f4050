"""Tables that pbrd would use and others use already: in the kernel, in files, by name, as VRFs."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count

from pbrd.neighbours import Finding, ForeignRoute, Machine
from pbrd.netfiles import Entry
from pbrd.objects import MAIN_TABLE
from pbrd.plan import prefix_text, route_text
from pbrd.routing import table_names
from pbrd.settings import PATH_TABLE_OFFSET, Config, Family, GatewayMode, Uplink

RESERVED = range(253, 256)  # default, main, local


def tables_of(config: Config) -> dict[int, Uplink]:
    """Return the tables of enabled uplinks, each with its uplink."""
    return {table: u for u in config.uplinks if u.enabled for table in (u.table, u.path_table)}


def findings(config: Config, machine: Machine) -> Iterator[Finding]:
    """Yield what there is to say of each uplink's tables."""
    for table, uplink in tables_of(config).items():
        what = _Occupied(config, machine, uplink, table)
        yield from what.defaults()
        yield from what.specific_routes()
        yield from what.rules()
        yield from what.vrfs()
        yield from what.other_names()
        if table == uplink.table:
            yield from what.gateways_elsewhere()
    yield from _same_names(config, machine)


class _Occupied:
    """What is to be said of one table of an uplink."""

    def __init__(self, config: Config, machine: Machine, uplink: Uplink, table: int) -> None:
        self.config, self.machine, self.uplink, self.table = config, machine, uplink, table
        self.place = f"uplinks.{uplink.name}.table"
        own = (
            f"{uplink.table} takes {table}, too, and that table"
            if table != uplink.table
            else f"table {table}"
        )
        self.subject = own
        self.entries = [entry for entry in machine.entries if entry.table == table]
        self.routes = [r for f in machine.families for r in machine.routes.get((f, table), ())]

    def other_table(self) -> str:
        return f"set table = {free_table(self.config, self.machine)}"

    def defaults(self) -> Iterator[Finding]:
        """A default route of others: pbrd can't take it away, so nothing falls through to the next uplink."""
        routes = [route for route in self.routes if route.route.is_default]
        files = [entry for entry in self.entries if entry.kind == "route" and entry.default]
        if not routes and not files:
            return
        what = "; ".join(
            [f'holds "{_shown(route)}" ({route.origin})' for route in routes[:2]]
            + [f"gets a default route from {entry.place}" for entry in files[:2]]
        )
        yield Finding(
            self.place,
            f"{self.subject} {what}: pbrd leaves routes of others alone, so policies would stay on this "
            "uplink when "
            f"its probes fail; remove that default{self.learned(routes)}, or {self.other_table()}",
        )

    def gateways_elsewhere(self) -> Iterator[Finding]:
        """Yield the families whose default others put into a table of theirs, so that "auto" finds none."""
        ours = (self.uplink.table, self.uplink.path_table)
        found = self.uplink.interface not in self.machine.interfaces
        for family in self.machine.families:
            over = [
                (table, r.route.gateway)
                for (of, table), routes in self.machine.routes.items()
                for r in routes
                if of is family and r.route.is_default and r.route.interface == self.uplink.interface
            ]
            there = [(table, gateway) for table, gateway in over if gateway and table not in ours]
            auto = self.uplink.gateway_of(family) is GatewayMode.AUTO
            found |= bool(over) or not auto or (family, MAIN_TABLE) not in self.machine.routes
            if auto and there and all(table != MAIN_TABLE for table, _ in over):
                key = "gateway" if family is Family.IPV4 else "gateway6"
                yield Finding(
                    f"uplinks.{self.uplink.name}.{key}",
                    f'the main table has no default over "{self.uplink.interface}" from which "auto" would '
                    "learn "
                    f'it, but table {there[0][0]} has; set {key} = "{there[0][1]}"',
                )
        if not found:
            yield Finding(
                f"uplinks.{self.uplink.name}.gateway",
                f'no table has a default route over "{self.uplink.interface}" now, from which "auto" would '
                'learn it; unless one comes later (DHCP, PPP), write gateway = "ADDRESS" of the router there',
                harmless=True,
            )

    def learned(self, routes: Iterable[ForeignRoute]) -> str:
        """Say what else is needed where the gateway stands nowhere but in this table."""
        for route in routes:
            family, gateway = route.route.family, route.route.gateway
            in_main = any(
                r.route.interface == self.uplink.interface
                for r in self.machine.defaults_in(family, MAIN_TABLE)
            )
            if gateway is not None and not in_main and self.uplink.gateway_of(family) is GatewayMode.AUTO:
                key = "gateway" if family is Family.IPV4 else "gateway6"
                return f' and set {key} = "{gateway}", which the main table doesn\'t tell'
        return ""

    def specific_routes(self) -> Iterator[Finding]:
        routes = [route for route in self.routes if not route.route.is_default]
        files = [entry for entry in self.entries if entry.kind == "route" and not entry.default]
        if routes or files:
            number = max(len(routes), len(files))
            first = f'"{_shown(routes[0])}" ({routes[0].origin})' if routes else f"that of {files[0].place}"
            more = f" and {number - 1} more" if number > 1 else ""
            yield Finding(
                self.place,
                f"{self.subject} has routes of others: {first}{more}; they are left alone, and count for "
                "policies "
                f"that look there; {self.other_table()} if that is not meant",
                harmless=True,
            )

    def rules(self) -> Iterator[Finding]:
        """Rules of others that look into the table: they fall through as soon as pbrd empties it."""
        first = self.config.daemon.rule_priority
        looking = [r.rule for r in self.machine.rules if r.rule.table == self.table and not r.rule.goto]
        files = [entry for entry in self.entries if entry.kind == "rule"]
        if not looking and not files:
            return
        what, where = self.named_rule(files) if files else (f"from {prefix_text(looking[0].source)}", "")
        early = any(rule.priority < first for rule in looking) or any(_goes_first(e, first) for e in files)
        when = (
            "comes before all policies while pbrd runs, and falls through to them when the uplink is down"
            if early
            else "is reached only by what no policy decided"
        )
        yield Finding(
            self.place,
            f"{self.subject} is asked by a rule of others ({what}){where}: it {when}; harmless, and not "
            "needed "
            "when a policy says the same",
            harmless=True,
        )

    def named_rule(self, files: list[Entry]) -> tuple[str, str]:
        return files[0].text or "everything", f" from {files[0].place}"

    def vrfs(self) -> Iterator[Finding]:
        for interface in self.machine.interfaces.values():
            if interface.table == self.table:
                yield Finding(
                    self.place,
                    f'{self.subject} is that of the VRF "{interface.name}", whose routes would be taken for '
                    "this "
                    f"uplink's; {self.other_table()}",
                )

    def other_names(self) -> Iterator[Finding]:
        own = dict(table_names(self.config))[self.table]
        for name in self.machine.names:
            if name.table == self.table and name.name != own:
                yield Finding(
                    self.place,
                    f'{self.subject} is called "{name.name}" in {name.place}, so it may be meant for '
                    "something else; "
                    f"remove that line, or {self.other_table()}",
                )


def _goes_first(entry: Entry, first: int) -> bool:
    return entry.priority is None or entry.priority < first


def _shown(route: ForeignRoute) -> str:
    if route.kind:
        return f"{route.kind} {'default' if route.route.is_default else route.route.destination}"
    return route_text(route.route, {}).partition(" table ")[0]


def _same_names(config: Config, machine: Machine) -> Iterator[Finding]:
    """Say where a table's name would stand for two tables."""
    if not config.daemon.names:
        return
    ours = {name: table for table, name in table_names(config)}
    for name in machine.names:
        if ours.get(name.name, name.table) != name.table:
            yield Finding(
                f"uplinks.{name.name.removesuffix('-path')}",
                f'{name.place} calls table {name.table} "{name.name}", too, so `ip route show table '
                f"{name.name}` may "
                f"show that one; rename one of them",
            )


def free_table(config: Config, machine: Machine) -> int:
    """Return a table for an uplink that nobody uses, nor its path table."""
    used = Counter(table for _, table in machine.routes if machine.routes[_, table])
    used.update(tables_of(config).keys())
    used.update(entry.table for entry in machine.entries)
    used.update(name.table for name in machine.names)
    used.update(rule.rule.table for rule in machine.rules)
    used.update(interface.table for interface in machine.interfaces.values())
    used.update(RESERVED)
    return next(n for n in count(config.daemon.table_base) if not used[n] and not used[n + PATH_TABLE_OFFSET])
