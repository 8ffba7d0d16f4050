"""What the kernel should hold: `desired`, computed from the config and the facts.

The kernel's own rule walk is the failover (see `rules`), and there are two levers on it: the default
route in an uplink's table (hard: there while the uplink is usable) and the order of a policy's rules
(soft: an uplink that is not preferred stands behind the others).

Two tables for each uplink: its own holds the on-link prefixes and, while usable, the default; the
path table (`NAME-path`) holds the same whatever health says, for probes, bound sockets and
best-effort. docs/how-it-works.md shows the whole layout.
"""

from collections.abc import Iterable, Iterator, Mapping

from pbrd.classes import uses_nft
from pbrd.classrules import class_bands, mark_rules
from pbrd.health import Reason
from pbrd.marks import FIRST
from pbrd.objects import (
    IPV6_METRIC,
    DefaultRoute,
    KernelState,
    Key,
    Link,
    NextHop,
    Route,
    Rule,
    Standing,
    Sysctl,
    default_network,
)
from pbrd.rules import (
    BOUND,
    MOST,
    address_rules,
    fixed_rules,
    has_family,
    keys_of,
    policy_bands,
    policy_rules,
)
from pbrd.settings import PATH_TABLE_OFFSET, Config, Family, GatewayMode, Uplink


def table_names(config: Config) -> tuple[tuple[int, str], ...]:
    """Return (id, name) of both tables of every uplink, as registered in rt_tables.d."""
    own = [(uplink.table, uplink.name) for uplink in config.uplinks]
    return tuple(own + [(uplink.path_table, f"{uplink.name}-path") for uplink in config.uplinks])


def next_hop(
    uplink: Uplink, family: Family, link: Link | None, defaults: Iterable[DefaultRoute]
) -> NextHop | None:
    """Return how to leave by `uplink` now, or None while nobody knows.

    "auto" takes the best default route that the main table has over this interface. A gateway needs an
    address of its family on the interface; if none of their prefixes covers it, the route says `onlink`,
    which is what hosters with /32 addresses need.
    """
    source = None
    wanted = uplink.gateway_of(family)
    if link is None or wanted is GatewayMode.OFF:
        return None
    if wanted is GatewayMode.NONE:
        return NextHop(None, onlink=False, origin="point-to-point")
    if isinstance(wanted, GatewayMode):
        here = [d for d in defaults if d.family is family and d.interface == uplink.interface]
        best = min(here, key=lambda d: d.metric, default=None)
        if best is None:
            return None
        gateway, origin, onlink = best.gateway, best.protocol, best.onlink
        if any(best.source == address.local for address in link.addresses):
            source = best.source
    else:
        gateway, origin, onlink = wanted, "config", False
    if gateway is None:
        return NextHop(None, onlink=False, origin=origin, source=source)
    prefixes = [a.prefix for a in link.addresses if a.prefix.version == family.version]
    if not prefixes:
        return None
    return NextHop(gateway, onlink or not any(gateway in prefix for prefix in prefixes), origin, source)


def path_fault(link: Link | None, hop: NextHop | None) -> Reason | None:
    """Return why nothing can leave here, or None if link and gateway are there."""
    if link is None:
        return Reason.MISSING
    if not link.up:
        return Reason.ADMIN_DOWN
    if not link.carrier:
        return Reason.NO_CARRIER
    return Reason.NO_GATEWAY if hop is None else None


def onlink_routes(link: Link, family: Family, table: int) -> Iterator[Route]:
    """Yield the prefixes that the addresses of `link` make directly reachable, one route each.

    They come from the addresses and not from the main table: reading those routes would mean to
    dump a table that may hold a full BGP feed. Two addresses in one prefix: the first is its source.
    """
    seen = set()
    for address in link.addresses:
        prefix = address.prefix
        alone = prefix.prefixlen == prefix.max_prefixlen and address.local in prefix
        if prefix.version != family.version or alone or prefix in seen:
            continue
        seen.add(prefix)
        source = address.local if family is Family.IPV4 else None
        yield Route(family, table, prefix, link.name, source=source, metric=metric_of(family))


def metric_of(family: Family) -> int:
    """Return the metric of our routes: the kernel's own default for the family."""
    return IPV6_METRIC if family is Family.IPV6 else 0


def default_route(family: Family, table: int, interface: str, hop: NextHop) -> Route:
    """Return the default route of `table` by `hop`."""
    return Route(
        family,
        table,
        default_network(family),
        interface,
        gateway=hop.gateway,
        source=hop.source,
        onlink=hop.onlink,
        metric=metric_of(family),
    )


def uplink_routes(
    uplink: Uplink, family: Family, link: Link | None, hop: NextHop | None, standing: Standing
) -> Iterator[Route]:
    """Yield what belongs into both tables of one uplink and family."""
    if link is None or not link.up:
        return
    for table in (uplink.table, uplink.path_table):
        yield from onlink_routes(link, family, table)
        if link.carrier and hop is not None and (standing.usable or table == uplink.path_table):
            yield default_route(family, table, link.name, hop)


def wanted_sysctls(uplink: Uplink, family: Family, link: Link) -> Iterator[Sysctl]:
    """Yield the sysctls that an uplink's interface needs.

    Without carrier its routes must not count (the kernel then fails over by itself); strict reverse path
    filtering (1) drops what comes back by another uplink than the main table says, so it becomes loose (2).
    """
    yield Sysctl(family, uplink.interface, "ignore_routes_with_linkdown", 1)
    if family is Family.IPV4:
        yield Sysctl(family, uplink.interface, "src_valid_mark", 1)
        if link.rp_filter:
            yield Sysctl(family, uplink.interface, "rp_filter", 2)


def wanted_rules(
    config: Config, family: Family, links: Mapping[str, Link], standings: Mapping[Key, Standing], block: int
) -> Iterator[Rule]:
    """Yield all rules of a family."""
    yield from fixed_rules(config, family)
    yield from address_rules(config, family, links)
    yield from policy_rules(config, family, standings, links)
    if uses_nft(config):
        yield from mark_rules(config, family, block, standings)


def desired(
    config: Config,
    families: Iterable[Family],
    links: Mapping[str, Link],
    hops: Mapping[Key, NextHop | None],
    standings: Mapping[Key, Standing],
    block: int = FIRST,
) -> KernelState:
    """Return what the kernel should hold, given the config and the facts.

    `families` are those that the kernel has at all. `hops` and `standings` have an entry for each of
    `keys_of(config, families)`. `block` is the first class of the nftables table, where there is one. Pure:
    equal arguments, equal state, whatever happened before.
    """
    routes: set[Route] = set()
    rules: set[Rule] = set()
    sysctls: set[Sysctl] = set()
    for family in families:
        rules.update(wanted_rules(config, family, links, standings, block))
        for uplink in config.uplinks:
            if not has_family(uplink, family):
                continue
            key, link = (uplink.name, family), links.get(uplink.interface)
            routes.update(uplink_routes(uplink, family, link, hops[key], standings[key]))
            if link is not None:
                sysctls.update(wanted_sysctls(uplink, family, link))
    return KernelState(frozenset(routes), frozenset(rules), frozenset(sysctls), tables=table_names(config))


def adopted_standings(config: Config, state: KernelState) -> dict[Key, Standing]:
    """Return what the kernel remembers of each uplink's health, for those of which it knows anything.

    A path default without an own default: probes had failed. An own default behind one that the config
    puts after it: it was not preferred. So a restart carries on where the last daemon stopped, also when
    the tables have other numbers now: what counts is the interface.
    """
    tables: dict[tuple[Family, str], set[int]] = {}
    for route in state.routes:
        if route.is_default:
            tables.setdefault((route.family, route.interface), set()).add(route.table)
    own = {
        key: next((t for t in found if t + PATH_TABLE_OFFSET in found), 0) for key, found in tables.items()
    }
    demoted = _demoted(config, state, own)
    found = {}
    for name, family in keys_of(config, Family):
        key = (family, config.uplink(name).interface)
        if key in own:
            found[name, family] = Standing(bool(own[key]), bool(own[key]) and (name, family) not in demoted)
    return found


def _demoted(config: Config, state: KernelState, own: Mapping[tuple[Family, str], int]) -> set[Key]:
    """Return the uplinks that stand behind one which comes after them in a policy's `via`."""
    found: set[Key] = set()
    interfaces = {uplink.interface: uplink.name for uplink in config.uplinks}
    names = {(family, table): interfaces.get(interface, "") for (family, interface), table in own.items()}
    rows = [(policy.via, first, last) for policy, first, last in policy_bands(config)]
    if uses_nft(config):
        rows += class_bands(config)
    for via, first, last in rows:
        for family in Family:
            here = [r for r in state.rules if r.family is family and first <= r.priority < last]
            place = {names.get((family, rule.table), ""): rule.priority for rule in here}
            for better, worse in _pairs(via):
                if better in place and worse in place and place[worse] < place[better]:
                    found.add((better, family))
    return found


def adopted_numbers(config: Config, state: KernelState) -> dict[str, int]:
    """Return how the uplinks of `config` were numbered when the rules in the kernel were made.

    The rules of bound sockets say so: one for each uplink, at its number.
    """
    first = config.daemon.rule_priority + BOUND
    names = {uplink.interface: uplink.name for uplink in config.uplinks}
    rows = {rule.oif: rule.priority - first for rule in state.rules if rule.oif and rule.fwmark is None}
    return {names[oif]: number for oif, number in rows.items() if oif in names and 0 <= number < MOST}


def _pairs(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    return ((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
