"""What must change in the kernel: `diff(current, desired)`, a value whose text is the dry run and the log.

The order of the steps keeps a promise: no packet, at no moment, leaves by an uplink that neither the
old nor the new state would have chosen for it.

* Rules: all additions first, top down, then all deletions, bottom up. A packet is decided by the first
  rule that matches it. While rules are added top down, the first match is that of the old rules or,
  since what has been added is a *beginning* of the new ones, that of the new; likewise, mirrored, while
  the old ones go bottom up. This holds for any two lists of rules, so none needs a generation switch.
* Routes into tables that no rule looks at yet come before the rules, so that no rule meets a half-filled
  table. A default that heals comes after them: its uplink's rules have then moved behind the others.
* A table that another uplink takes over is emptied first and filled last, behind the rules.
* Defaults that go (an uplink is down) go first of all: that is the failover. Tables that the new state
  has no use for are emptied last, when nothing looks there any more.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain

from pbrd.objects import MAIN_TABLE, Action, KernelState, Route, Rule, Sysctl
from pbrd.settings import Family, Mark, Network, Range

Item = Route | Rule | Sysctl


class Verb(Enum):
    """What a step does to its object."""

    ADD = "add"
    REPLACE = "replace"
    DELETE = "del"
    SET = "set"


@dataclass(frozen=True, slots=True)
class Step:
    """One change of one object."""

    verb: Verb
    item: Item


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in the order in which they must reach the kernel; foreign routes are in the way of `blocked`."""

    steps: tuple[Step, ...] = ()
    blocked: tuple[Route, ...] = ()
    tables: dict[int, str] = field(default_factory=dict)
    live: frozenset[int] = frozenset()  # tables that rules will look at

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self.lines())

    def additions(self, guards: Collection[Rule] = (), hold: bool = True) -> "Plan":
        """Return the plan without the removal of rules, and of what they look at.

        While another nftables table is on its way, packets bear the old marks: their rules must stay. And
        rules that let nothing pass without a mark (`guards`) may go, and must not come yet if `hold`.
        """
        leaving = {s.item.table for s in self.steps if s.verb is Verb.DELETE and isinstance(s.item, Rule)}

        def may_go(step: Step) -> bool:
            if step.item in guards:
                return step.verb is Verb.DELETE or not hold
            if step.verb is Verb.DELETE:
                return isinstance(step.item, Route) and step.item.table in self.live
            # A table that they look at may be another uplink's from now on: so it stays empty until they go.
            default = isinstance(step.item, Route) and step.item.is_default and step.item.table in leaving
            return not (default and step.verb is Verb.ADD)

        return replace(self, steps=tuple(filter(may_go, self.steps)))

    def lines(self) -> tuple[str, ...]:
        """Return one line for each step in the words of ip(8)."""
        return tuple(self.text(step) for step in self.steps)

    def text(self, step: Step) -> str:
        """Return one step in the words of ip(8)."""
        item, verb = step.item, step.verb.value
        if isinstance(item, Sysctl):
            return f"sysctl {sysctl_name(item)}={item.value}"
        prefix = "-6 " if item.family is Family.IPV6 else ""
        if isinstance(item, Route):
            return f"{prefix}route {verb} {route_text(item, self.tables)}"
        return f"{prefix}rule  {verb} {rule_text(item, self.tables)}"


def diff(current: KernelState, desired: KernelState) -> Plan:
    """Return the steps that turn `current` into `desired`; an empty plan if they are equal."""
    missing, unwanted = desired.routes - current.routes, current.routes - desired.routes
    blocked = {route for route in missing if route.key in current.foreign}
    missing -= blocked
    # One that moves to another interface is another uplink's: rules that still look there must not meet it.
    old, new_ = ({(r.key, r.interface) for r in routes} for routes in (unwanted, missing))
    replaced = {key for key, _ in old & new_}
    looked_at = {rule.table for rule in current.rules}
    still_wanted = {rule.table for rule in desired.rules}

    def verb(route: Route) -> Verb:
        return Verb.REPLACE if route.key in replaced else Verb.ADD

    gone = _ordered(r for r in unwanted if r.key not in replaced)
    new = _ordered(missing, onlink_first=True)
    heals = {r for r in missing if r.is_default and r.table in looked_at and r.key not in replaced}
    steps = chain(
        (Step(Verb.SET, item) for item in sorted(desired.sysctls - current.sysctls, key=sysctl_name)),
        (Step(Verb.DELETE, r) for r in gone if r.table in still_wanted),
        (Step(verb(r), r) for r in new if r not in heals),
        _rule_steps(current.rules, desired.rules),
        (Step(verb(r), r) for r in new if r in heals),
        (Step(Verb.DELETE, r) for r in gone if r.table not in still_wanted),
    )
    names = dict(current.tables) | dict(desired.tables) | {MAIN_TABLE: "main"}
    return Plan(tuple(steps), tuple(_ordered(blocked)), names, frozenset(still_wanted))


def _ordered(routes: Iterable[Route], onlink_first: bool = False) -> list[Route]:
    """Sort for stable texts, defaults first; `onlink_first`: a gateway must be on-link before it is used."""

    def place(route: Route) -> tuple[object, ...]:
        default = not route.is_default if not onlink_first else route.is_default
        return (
            default,
            route.family,
            route.table,
            route.destination.network_address,
            route.destination.prefixlen,
        )

    return sorted(routes, key=place)


def _rule_steps(current: frozenset[Rule], desired: frozenset[Rule]) -> Iterator[Step]:
    for rule in sorted(desired - current, key=_rule_place):
        yield Step(Verb.ADD, rule)
    for rule in sorted(current - desired, key=_rule_place, reverse=True):
        yield Step(Verb.DELETE, rule)


def _rule_place(rule: Rule) -> tuple[bool, int, int, str]:
    """Sort from the top down, but first the places that others go to: these decide nothing themselves."""
    return rule.action is not Action.NOP, rule.family, rule.priority, rule_text(rule, {})


# --- words ------------------------------------------------------------------------------------


def route_text(route: Route, tables: dict[int, str]) -> str:
    """Return a route as `ip route` would show it, with its table."""
    words = ["default" if route.is_default else str(route.destination)]
    if route.gateway is not None:
        words.append(f"via {route.gateway}")
    words.append(f"dev {route.interface}")
    if route.onlink:
        words.append("onlink")
    words.append(f"table {table_text(route.table, tables)}")
    if route.source is not None:
        words.append(f"src {route.source}")
    return " ".join(words)


def rule_text(rule: Rule, tables: dict[int, str]) -> str:
    """Return a rule as `ip rule` would show it."""
    words = [f"priority {rule.priority}", *(["not"] * rule.inverted), f"from {prefix_text(rule.source)}"]
    if rule.destination is not None:
        words.append(f"to {prefix_text(rule.destination)}")
    if rule.fwmark is not None:
        words.append(f"fwmark {mark_text(rule.fwmark)}")
    words += [f"{word} {name}" for word, name in (("iif", rule.iif), ("oif", rule.oif)) if name]
    if rule.user is not None:
        words.append(f"uidrange {rule.user.first}-{rule.user.last}")
    if rule.proto:
        words.append(f"ipproto {PROTOCOLS.get(rule.proto, str(rule.proto))}")
    for word, ports in (("sport", rule.sport), ("dport", rule.dport)):
        if ports is not None:
            words.append(f"{word} {range_text(ports)}")
    if rule.dscp is not None:
        words.append(f"dscp {rule.dscp}")
    if rule.action is Action.LOOKUP:
        words.append(f"lookup {table_text(rule.table, tables)}")
        if rule.suppress_prefixlength is not None:
            words.append(f"suppress_prefixlength {rule.suppress_prefixlength}")
    elif rule.action is Action.GOTO:
        words.append(f"goto {rule.goto}")
    else:
        words.append(rule.action.value)
    return " ".join(words)


PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 58: "ipv6-icmp", 132: "sctp"}


def table_text(table: int, tables: dict[int, str]) -> str:
    """Return a table's name if it has one."""
    return tables.get(table, str(table))


def prefix_text(prefix: Network | None) -> str:
    """Return a prefix as ip(8) shows it: `all`, a bare address for a host, else with its length."""
    if prefix is None:
        return "all"
    return str(prefix.network_address) if prefix.prefixlen == prefix.max_prefixlen else str(prefix)


def mark_text(mark: Mark) -> str:
    """Return a mark as ip(8) shows it; a full mask is not shown."""
    return f"{mark.value:#x}" if mark.mask == 0xFFFFFFFF else f"{mark.value:#x}/{mark.mask:#x}"


def range_text(ports: Range) -> str:
    """Return a range of ports; a single one stands alone."""
    return str(ports.first) if ports.first == ports.last else f"{ports.first}-{ports.last}"


def sysctl_name(sysctl: Sysctl) -> str:
    """Return the dotted name of a sysctl."""
    return f"net.{'ipv6' if sysctl.family is Family.IPV6 else 'ipv4'}.conf.{sysctl.interface}.{sysctl.key}"
