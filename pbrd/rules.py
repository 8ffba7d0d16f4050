"""Policies as rules: what ip-rule(8) shows, and in which order.

A policy `via = ["lte", "fiber"]` is a row of rules that the kernel walks by itself

    11000: from 192.168.1.100 lookup lte
    11001: from 192.168.1.100 lookup fiber
    11002: from 192.168.1.100 unreachable

because a lookup in a table without a matching route falls through to the next rule. All rules are
computed from values; docs/how-it-works.md shows the bands of priorities and why each stands there.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import ip_network
from itertools import product

from pbrd.classes import needs_nft, too_many, uses_nft
from pbrd.objects import MAIN_TABLE, Action, Key, Link, Rule, Standing
from pbrd.prefixes import versions
from pbrd.settings import MAIN, Config, Fallback, Family, GatewayMode, Mark, Match, Network, Policy, Uplink

ICMP, ICMPV6 = 1, 58
WHOLE = 0xFFFFFFFF  # a mask of all bits of a mark

# Bands of rule priorities, relative to `daemon.rule_priority`.
PROBES, PROBES_END = 0, 99
PINS, PINS_END = 100, 200
ARRIVALS, ARRIVALS_END = 201, 203  # where nftables is in use
OVERRIDES, OVERRIDES_WIDTH = 400, 500
CLASS_OVERRIDES, CLASS_OVERRIDES_WIDTH = 700, 200  # of OVERRIDES, where nftables is in use
MAIN_SPECIFIC = 900
# Where nftables is in use: before the policies, and before those with `override_main`.
JUDGED, GUARD_PASS, GUARD, GUARD_END, OWN_SPECIFIC, OWN_ADDRESS = 990, 991, 992, 993, 994, 995
EARLY = 390 - JUDGED
POLICIES, POLICIES_WIDTH = 1000, 19800
CLASSES_START, CLASS_OVERRIDES_START = 10899, 699
CLASSES, CLASSES_WIDTH = 10900, 9890  # of POLICIES, where nftables is in use
DEFAULT_PINS = 20790
ADDRESSES = 20800
BOUND = 20900
MOST = 99  # uplinks: what the bands of probes, pins, addresses and bound sockets have room for
DEFAULT, DEFAULT_WIDTH = 21000, 1000
STRIDES = (100, 50, 20, 10, 5, 2, 1)  # priorities between two policies: the largest that fits its band


FALLBACK_ACTION = {
    Fallback.UNREACHABLE: Action.UNREACHABLE,
    Fallback.BLACKHOLE: Action.BLACKHOLE,
    Fallback.PROHIBIT: Action.PROHIBIT,
}


def has_family(uplink: Uplink, family: Family) -> bool:
    """Say whether `family` may ever leave by `uplink`, going by the config alone."""
    return uplink.enabled and uplink.gateway_of(family) is not GatewayMode.OFF


def keys_of(config: Config, families: Iterable[Family]) -> tuple[Key, ...]:
    """Return the families of the uplinks that need a gateway, probes and routes."""
    families = tuple(families)
    return tuple((u.name, family) for u in config.uplinks for family in families if has_family(u, family))


def pin_mark(config: Config, uplink: Uplink) -> Mark:
    """Return the mark that keeps a live connection on `uplink`: its number from 1 in the mask's bits."""
    mask = config.daemon.fwmark_mask
    return Mark((uplink.index + 1) * (mask & -mask), mask)


def probe_mark(config: Config) -> Mark:
    """Return the mark of probes: all bits of the mask."""
    return Mark(config.daemon.fwmark_mask, config.daemon.fwmark_mask)


def by_preference(
    names: tuple[str, ...], family: Family, standings: Mapping[Key, Standing]
) -> tuple[str, ...]:
    """Return `names` in the order in which new connections try them: who is not preferred stands behind.

    A dead one keeps its place: nothing leaves there anyway, and its failover must not wait for rules.
    One that is drained is left out.
    """

    def behind(name: str) -> bool:
        standing = standings.get((name, family))
        return standing is not None and standing.usable and not standing.preferred

    return tuple(sorted((n for n in names if not is_drained(n, family, standings)), key=behind))


def is_drained(name: str, family: Family, standings: Mapping[Key, Standing]) -> bool:
    """Say whether no new connections may leave by an uplink."""
    standing = standings.get((name, family))
    return standing is not None and standing.drained


def selectors(match: Match, family: Family, interfaces: Iterable[str]) -> tuple[dict[str, object], ...]:
    """Return the rule selectors that together say `match` in `family`; () if it can't match there.

    Lists mean "any of", so they multiply. `iif = "br-*"` becomes the interfaces that are there now:
    the kernel's rules know no patterns.
    """
    sources = [n for n in match.source if n.version == family.version]
    destinations = [n for n in match.destination if n.version == family.version]
    if (match.source and not sources) or (match.destination and not destinations):
        return ()
    # To the kernel a prefix of no length is no selector, and it shows none.
    sources, destinations = (
        [] if any(n.prefixlen == 0 for n in ns) else ns for ns in (sources, destinations)
    )
    # Forwarded packets carry the uid of the namespace's owner, so that "user root" would match them all.
    iifs = ("lo",) if match.user and not match.iif else _interfaces(match.iif, interfaces)
    if match.iif and not iifs:
        return ()
    protos = [ICMPV6 if p == ICMP and family is Family.IPV6 else p for p in match.proto]
    fields: dict[str, Iterable[object]] = {
        "source": sources,
        "destination": destinations,
        "iif": iifs,
        "proto": protos,
        "sport": match.sport,
        "dport": match.dport,
        "user": match.user,
        "fwmark": match.fwmark,
        "dscp": match.dscp,
    }
    used = {name: tuple(values) for name, values in fields.items() if values}
    return tuple(dict(zip(used, values, strict=True)) for values in product(*used.values()))


def _interfaces(patterns: tuple[str, ...], interfaces: Iterable[str]) -> tuple[str, ...]:
    names = sorted(set(interfaces) - {"lo"})
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern.endswith("*"):
            found.update(dict.fromkeys(name for name in names if name.startswith(pattern[:-1])))
        else:
            found[pattern] = None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Compiler:
    """What compiling a policy into rules of one family needs to know."""

    config: Config
    family: Family
    standings: Mapping[Key, Standing]
    interfaces: tuple[str, ...]
    unmarked: bool = False  # nftables decides for what it has marked; these are for a socket's first look

    def uplink(self, name: str) -> Uplink | None:
        """Return the uplink if this family may leave by it."""
        uplink = self.config.uplink(name)
        return uplink if has_family(uplink, self.family) else None

    def policy(self, policy: Policy, priority: int) -> Iterator[Rule]:
        """Yield the rules of one policy, from `priority` up: `via` as ranked, then the fallback."""
        matches = selectors(policy.match, self.family, self.interfaces)
        for offset, name in enumerate(by_preference(policy.via, self.family, self.standings)):
            uplink = None if name == MAIN else self.uplink(name)
            if name == MAIN or uplink is not None:
                table = uplink.table if uplink else MAIN_TABLE
                yield from self.rows(matches, priority + offset, Action.LOOKUP, table)
        behind = priority + len(policy.via)
        if policy.fallback in FALLBACK_ACTION:
            yield from self.rows(matches, behind, FALLBACK_ACTION[policy.fallback], 0)
        elif policy.fallback is Fallback.BEST_EFFORT:
            pins = int(policy is self.config.default and uses_nft(self.config))  # before them (`classrules`)
            for offset, name in enumerate(policy.via, start=pins):
                uplink = None if name == MAIN else self.uplink(name)
                if uplink is not None and not is_drained(name, self.family, self.standings):
                    yield from self.rows(matches, behind + offset, Action.LOOKUP, uplink.path_table)

    def rows(
        self, matches: Iterable[dict[str, object]], priority: int, action: Action, table: int
    ) -> Iterator[Rule]:
        for match in matches:
            rule = Rule(self.family, priority, action, table, **match)  # type: ignore[arg-type]  # names are Rule's
            yield without_mark(rule, self.config.daemon.fwmark_mask) if self.unmarked else rule


def without_mark(rule: Rule, mask: int) -> Rule:
    """Return `rule` for packets only that bear none of the bits of `mask`."""
    foreign = rule.fwmark or Mark(0, 0)
    return replace(rule, fwmark=Mark(foreign.value, foreign.mask | mask))


def tunnel_mark(rule: Rule) -> int:
    """Return N of a rule `not fwmark N`, which sends all but what carries a tunnel into it; else 0."""
    mark = rule.fwmark
    return mark.value if rule.inverted and mark is not None and mark.mask == WHOLE else 0


def stride_of(count: int, width: int) -> int:
    """Return how many priorities each of `count` policies gets in a band of `width`; 0 if they don't fit."""
    return next((stride for stride in STRIDES if stride * count <= width), 0)


def width_of(policy: Policy) -> int:
    """Return how many priorities the rules of `policy` take."""
    fallback = 1 + len(policy.via) if policy.fallback is Fallback.BEST_EFFORT else 1
    return len(policy.via) + fallback


def fixed_rules(config: Config, family: Family) -> Iterator[Rule]:
    """Yield what depends on the config alone: probes, pins, specific routes of main, bound sockets."""
    base = config.daemon.rule_priority
    probe = probe_mark(config)
    for uplink in config.uplinks:
        if has_family(uplink, family):
            interface, k = uplink.interface, uplink.index
            yield Rule(family, base + PROBES + k, table=uplink.path_table, oif=interface, fwmark=probe)
            if not uses_nft(config):
                yield Rule(family, base + PINS + k + 1, table=uplink.table, fwmark=pin_mark(config, uplink))
            yield Rule(family, base + BOUND + k, table=uplink.path_table, oif=interface)
    yield Rule(family, base + PROBES_END, Action.UNREACHABLE, fwmark=probe)
    yield Rule(family, base + MAIN_SPECIFIC, table=MAIN_TABLE, suppress_prefixlength=0)


def address_rules(config: Config, family: Family, links: Mapping[str, Link]) -> Iterator[Rule]:
    """Yield `from ADDRESS lookup UPLINK` for every address of every uplink.

    Where nftables judges, sockets that have such an address take their first look there, before the policies:
    an answer must not fail on a kill switch that it does not obey. What does obey it is stopped once judged.
    """
    for uplink in config.uplinks:
        link = links.get(uplink.interface)
        if link is None or not has_family(uplink, family):
            continue
        priority = config.daemon.rule_priority + ADDRESSES + uplink.index
        for address in link.addresses:
            if address.local.version == family.version and not address.local.is_link_local:
                source = ip_network(address.local)
                yield Rule(family, priority, table=uplink.table, source=source)
                if uses_nft(config):
                    yield from _first_look(config, family, source, uplink.table)


@lru_cache(maxsize=4)
def _overrides(config: Config) -> bool:
    """Say whether some policy stands before main's specific routes."""
    return any(policy.match.override_main for policy in config.policies)


def _first_look(config: Config, family: Family, source: Network, table: int) -> Iterator[Rule]:
    """Yield the rules by which sockets of this host with the address `source` look for their way.

    Before those of policies with `override_main`, too; there main's specific routes come first, as elsewhere.
    """
    plain = Mark(0, WHOLE)  # what carries somebody's tunnel is marked, and not judged later
    look = Rule(family, config.daemon.rule_priority + OWN_ADDRESS, Action.LOOKUP, table, source)
    look = replace(look, iif="lo", fwmark=plain)
    yield look
    if _overrides(config):
        yield replace(look, priority=look.priority + EARLY)
        specific = config.daemon.rule_priority + OWN_SPECIFIC + EARLY
        yield replace(look, priority=specific, table=MAIN_TABLE, suppress_prefixlength=0)


@lru_cache(maxsize=16)
def _policy_rules(
    config: Config,
    family: Family,
    standings: tuple[tuple[Key, Standing], ...],
    interfaces: tuple[str, ...],
) -> frozenset[Rule]:
    """Return the rules of all policies. Cached: a failover changes routes and must not pay for these."""
    compiler = _Compiler(config, family, dict(standings), interfaces)
    judged = replace(compiler, unmarked=uses_nft(config))
    return frozenset(
        rule
        for policy, first, _ in policy_bands(config)
        for rule in (compiler if policy is config.default else judged).policy(policy, first)
    )


def policy_rules(
    config: Config, family: Family, standings: Mapping[Key, Standing], links: Mapping[str, Link]
) -> frozenset[Rule]:
    """Return the rules of all policies of one family, for the order that `standings` ask for."""
    order = tuple(
        (key, Standing(usable=True, preferred=s.preferred, drained=s.drained))
        for key, s in sorted(standings.items())
        if key[1] is family and (s.drained or (s.usable and not s.preferred))
    )
    patterns = any(pattern.endswith("*") for p in config.policies for pattern in p.match.iif)
    return _policy_rules(config, family, order, tuple(sorted(links)) if patterns else ())


@lru_cache(maxsize=4)
def bands(config: Config) -> tuple[tuple[list[Policy], int, int], ...]:
    """Return the policies that are rules of their own, by bands, with first priority (relative) and width.

    Where nftables judges, they serve local sockets, whose source address is chosen before: as long as they
    are few.
    """
    nft = uses_nft(config)
    policies = [] if nft and too_many(config) else [p for p in config.policies if not needs_nft(p)]
    overrides = [p for p in policies if p.match.override_main]
    others = [p for p in policies if not p.match.override_main]
    default = [config.default] if config.default else []
    return (
        (overrides, OVERRIDES, CLASS_OVERRIDES - OVERRIDES if nft else OVERRIDES_WIDTH),
        (others, POLICIES, CLASSES - POLICIES if nft else POLICIES_WIDTH),
        (default, DEFAULT, DEFAULT_WIDTH),
    )


def policy_bands(config: Config) -> Iterator[tuple[Policy, int, int]]:
    """Yield each policy with its priorities: first, and one past the last."""
    base = config.daemon.rule_priority
    for policies, start, width in bands(config):
        stride = stride_of(len(policies), width)
        for position, policy in enumerate(policies):
            first = base + start + position * stride
            yield policy, first, first + stride


def policy_families(match: Match) -> tuple[Family, ...]:
    """Return the families in which `match` can match at all."""
    sides = [versions(side) for side in (match.source, match.destination) if side]
    return tuple(family for family in Family if all(family.version in side for side in sides))
