"""What a config may say and should not: what this version does not do yet, and what was hardly meant.

`gaps_of_…` say what is missing as pairs of (key, remark), so that `config` can name file and place;
`warnings` are lines for people. Everything here judges typed values.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from pbrd.classes import concerns, uses_nft
from pbrd.errors import Problem
from pbrd.prefixes import versions
from pbrd.settings import (
    KILL_SWITCHES,
    MAIN,
    Config,
    Daemon,
    Fallback,
    Family,
    GatewayMode,
    Match,
    Network,
    OnStop,
    Policy,
    Range,
    Uplink,
    has_nat,
)

Gap = tuple[str, Callable[[Any], object], str]  # key, whether it is used, the remedy
Places = Callable[[Any], Iterator[Hashable]]

# What is parsed and not done yet: whoever does it takes the line out.
DAEMON_GAPS: tuple[Gap, ...] = (
    ("metrics", lambda daemon: daemon.metrics, "leave it out, and read `pbrd status --json`"),
)
UPLINK_GAPS: tuple[Gap, ...] = ()
POLICY_GAPS: tuple[Gap, ...] = ()
MATCH_GAPS: tuple[Gap, ...] = ()

GATEWAY_KEYS = {Family.IPV4: "gateway", Family.IPV6: "gateway6"}
EXAMPLES = {Family.IPV4: "1.1.1.1", Family.IPV6: "2606:4700:4700::1111"}  # of targets


def _gaps(table: Sequence[Gap], thing: object) -> Iterator[tuple[str, str]]:
    for key, used, remedy in table:
        if used(thing):
            what = "port 65535" if key.endswith("port") else key
            yield key, f"{what} is not supported yet: {remedy}"


def gaps_of_daemon(daemon: Daemon) -> tuple[tuple[str, str], ...]:
    """Return (key, remark) of all in `[daemon]` that is not done yet."""
    return tuple(_gaps(DAEMON_GAPS, daemon))


def gaps_of_uplink(uplink: Uplink) -> tuple[tuple[str, str], ...]:
    """Return (key, remark) of all in an uplink's section that is not done yet."""
    return tuple(_gaps(UPLINK_GAPS, uplink))


def gaps_of_policy(policy: Policy) -> tuple[tuple[str, str], ...]:
    """Return (key, remark) of all in a policy, but for its match, that is not done yet."""
    return tuple(_gaps(POLICY_GAPS, policy))


def gaps_of_match(match: Match) -> tuple[tuple[str, str], ...]:
    """Return (key, remark) of all in a match that is not done yet."""
    return tuple(_gaps(MATCH_GAPS, match))


def unsupported(config: Config) -> tuple[Problem, ...]:
    """Return a problem for each thing that the config says and this version does not do yet.

    A `Config` no longer knows its files, so policies are placed by name; `config.load` reports the files too.
    """
    found = [(f"daemon.{key}", remark) for key, remark in gaps_of_daemon(config.daemon)]
    for uplink in config.uplinks:
        found += [(f"uplinks.{uplink.name}.{key}", remark) for key, remark in gaps_of_uplink(uplink)]
    for policy in config.all_policies:
        place = _place(policy)
        found += [(f"{place}.{key}", remark) for key, remark in gaps_of_policy(policy)]
        found += [(f"{place}.match.{key}", remark) for key, remark in gaps_of_match(policy.match)]
    return tuple(Problem("", place, remark) for place, remark in found)


def _place(policy: Policy) -> str:
    return "default" if policy.name == "default" else f"policies.{policy.name}"


def warnings(config: Config) -> tuple[str, ...]:
    """Return a line for each thing that is legal and was probably not meant."""
    return (
        *_idle(config),
        *_open_kill_switches(config),
        *_unprobed_families(config),
        *_capped_quorums(config),
        *_shadowed(config),
        *_wrong_sources(config),
        *_nat_of_nothing(config),
        *_without_a_family(config),
        *_local_macs(config),
        *_fragments(config),
    )


def _wrong_sources(config: Config) -> Iterator[str]:
    bare = {uplink.name for uplink in config.uplinks if uplink.enabled and not uplink.nat}
    for policy in config.policies:
        names = [name for name in (policy.via or tuple(dict(policy.balance))) if name in bare]
        if names and (policy.match.unit or policy.match.group):
            yield (
                f"policies.{policy.name}: units and groups are known only after a socket has its source, "
                f'so it may be another uplink\'s; set nat = true on "{names[0]}"'
            )


def _nat_of_nothing(config: Config) -> Iterator[str]:
    for uplink in config.uplinks:
        for family, key in ((Family.IPV4, "nat"), (Family.IPV6, "nat6")):
            if has_nat(uplink, family) and uplink.gateway_of(family) is GatewayMode.OFF:
                gateway = GATEWAY_KEYS[family]
                yield (
                    f'uplinks.{uplink.name}.{key}: does nothing, as {gateway} is "off"; leave one of them out'
                )


def _without_a_family(config: Config) -> Iterator[str]:
    """Yield a line for each policy of one family whose uplinks don't have it. To block it may be meant."""
    for policy in config.policies:
        occurring = frozenset[int]().union(*map(versions, (policy.match.source, policy.match.destination)))
        names = _offered(policy)
        if len(occurring) != 1 or MAIN in names or policy.fallback in KILL_SWITCHES:
            continue
        family = next(family for family in Family if family.version in occurring)
        uplinks = [config.uplink(name) for name in names]
        if not any(u.enabled and u.gateway_of(family) is not GatewayMode.OFF for u in uplinks):
            listed = ", ".join(f'"{name}"' for name in sorted(names))
            yield (
                f"{_place(policy)}: matches IPv{family.version} alone, which never leaves by {listed} "
                f'({GATEWAY_KEYS[family]} = "off", or not enabled); name another uplink'
            )


def _local_macs(config: Config) -> Iterator[str]:
    for policy in config.policies:
        match = policy.match
        local = [
            word
            for word, said in (
                ('iif = "lo"', match.iif == ("lo",)),
                ("user", match.user),
                ("group", match.group),
                ("unit", match.unit),
            )
            if said
        ]
        if match.mac and local:
            yield (
                f"{_place(policy)}: never matches, as traffic of this machine ({local[0]}) has no "
                "source MAC; leave one of them out"
            )


def _fragments(config: Config) -> Iterator[str]:
    """Yield a line for each kill switch with ports that rules alone keep: fragments have none."""
    for policy in config.policies:
        match = policy.match
        if (
            policy.fallback in KILL_SWITCHES
            and (match.sport or match.dport)
            and concerns(match, local=False)
            and not uses_nft(config)
        ):
            yield (
                f"{_place(policy)}: fragments have no ports for the kernel's rules, so forwarded datagrams "
                "of more than a packet get past this kill switch; set nat = true on an uplink, or ask for "
                "no port"
            )


def _idle(config: Config) -> Iterator[str]:
    if not any(uplink.enabled for uplink in config.uplinks):
        yield "uplinks: none is enabled, so nothing is routed; leave out enabled = false where it is wrong"
    elif not config.all_policies:
        yield "policies: there are none, so nothing fails over; add [[policies]] or [default]"


def _open_kill_switches(config: Config) -> Iterator[str]:
    if config.daemon.on_stop is OnStop.FLUSH:
        for policy in config.all_policies:
            if policy.fallback in KILL_SWITCHES:
                place = _place(policy)
                yield f'daemon.on_stop: "flush" opens the kill switch of {place} at every stop; use "keep"'


def _probed(config: Config) -> Iterator[tuple[Uplink, Family, int]]:
    """Yield each enabled uplink and family that exists there, with its number of targets."""
    for uplink in config.uplinks:
        for family in Family:
            if uplink.enabled and uplink.gateway_of(family) is not GatewayMode.OFF:
                yield uplink, family, len(uplink.probe.targets_of(family))


def _unprobed_families(config: Config) -> Iterator[str]:
    for family in Family:
        names = [f'"{uplink.name}"' for uplink, of, number in _probed(config) if of is family and not number]
        if names:
            ip = f"IPv{family.version}"
            yield (
                f"probe.targets: none is {ip}, so {ip} over {', '.join(names)} is judged by link and gateway "
                f"alone, and an outage behind the gateway is not noticed; add a host that answers pings, as "
                f'"{EXAMPLES[family]}", or set {GATEWAY_KEYS[family]} = "off" where there is no {ip}'
            )


def _capped_quorums(config: Config) -> Iterator[str]:
    for uplink, family, number in _probed(config):
        if 0 < number < uplink.probe.quorum:
            yield (
                f"uplinks.{uplink.name}.probe.quorum: {uplink.probe.quorum} is capped at {number} for "
                f"IPv{family.version}, which has no more targets; name more"
            )


def _shadowed(config: Config) -> Iterator[str]:
    """Yield a line for each policy that is sure never to decide.

    To compare 5,000 policies by pairs takes a minute. So each key of `match` has an index, and sets of
    policies are numbers: bit N is policy N in the order in which packets meet them.
    """
    # Rules of policies with override_main come before all others.
    order = sorted(config.policies, key=lambda policy: not policy.match.override_main)
    indexes = {key: _Index(places) for key, places in PLACES.items()}
    stopping = 0  # the policies behind which nothing goes on
    trying: dict[frozenset[str], int] = {}  # by the uplinks that are all unusable when a packet goes on
    for number, later in enumerate(order):
        policy, names, before = 1 << number, _offered(later), stopping
        if later.fallback is Fallback.NEXT:  # else it has more to offer than uplinks
            before |= _union(policies for tried, policies in trying.items() if names <= tried)
        for key, index in indexes.items():
            items = getattr(later.match, key)
            before = before and before & index.covering(items)
            index.add(items, policy)
        if before:
            other = _place(order[(before & -before).bit_length() - 1])
            yield f"{_place(later)}: never decides, as {other} matches the same before it; move it up"
        if later.fallback in KILL_SWITCHES:
            stopping |= policy
        trying[names] = trying.get(names, 0) | policy


def _offered(policy: Policy) -> frozenset[str]:
    return frozenset((*policy.via, *(name for name, _ in policy.balance)))


def _union(sets: Iterable[int]) -> int:
    return reduce(or_, sets, 0)


class _Index:
    """What the policies so far say under one key of `match`, each item at its place."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.silent = 0  # the policies that leave the key out
        self.said: dict[Hashable, dict[Any, int]] = {}  # place → item → policies

    def add(self, items: Sequence[Any], policy: int) -> None:
        """Take in what a policy says."""
        if not items:
            self.silent |= policy
        for item in items:
            here = self.said.setdefault(next(self.places(item)), {})
            here[item] = here.get(item, 0) | policy

    def covering(self, items: Sequence[Any]) -> int:
        """Return the policies that match all of `items`."""
        found = -1 if items else 0
        for item in items:
            found = found and found & _union(self._holding(item))
        return self.silent | found

    def _holding(self, item: Any) -> Iterator[int]:
        for place in self.places(item):
            for outer, policies in self.said.get(place, {}).items():
                if not isinstance(item, Range) or (outer.first <= item.first and item.last <= outer.last):
                    yield policies


def _prefixes(network: Network) -> Iterator[Hashable]:
    number, width = int(network.network_address), network.max_prefixlen
    return ((width, length, number >> width - length) for length in range(network.prefixlen, -1, -1))


def _blocks(numbers: Range) -> Iterator[Hashable]:
    """Return the blocks, as prefixes are, that hold a range. What holds it stands at one of them."""
    smallest = (numbers.first ^ numbers.last).bit_length()
    return ((bits, numbers.first >> bits) for bits in range(smallest, 33))


def _patterns(interface: str) -> Iterator[Hashable]:
    yield interface
    yield from (f"{interface[:length]}*" for length in range(len(interface) + 1))


def _itself(item: Hashable) -> Iterator[Hashable]:
    yield item


# Where an item stands, and then all the places where one may stand that holds it.
PLACES: Mapping[str, Places] = {
    "source": _prefixes,
    "destination": _prefixes,
    "iif": _patterns,
    **dict.fromkeys(("sport", "dport", "user", "group"), _blocks),
    **dict.fromkeys(("proto", "fwmark", "dscp", "mac", "unit", "time", "days"), _itself),
}
