"""What a policy matches, in nft's words: expressions of which any may hold, each with its family.

Sets of ranges and prefixes are avoided, as `judging` explains: prefixes of one length share a set of
addresses, and ranges are rules of their own, as long as these are few.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from pbrd.classes import concerns
from pbrd.prefixes import LONG, Network, Networks, listing
from pbrd.rules import ICMP, ICMPV6
from pbrd.settings import Family, Match, Policy, Range
from pbrd.units import set_of

SPREAD = 32  # rules that lists of a policy may make instead of sets of ranges and prefixes
Need = tuple[str, str]  # what nft compares, and with which values (some, separated by commas)
NEVER: tuple[Need, ...] = ()
# What may be compared with a named set, and the type of that.
SHARED = {
    **{"ip saddr": "ipv4_addr", "ip daddr": "ipv4_addr", "ip6 saddr": "ipv6_addr", "ip6 daddr": "ipv6_addr"},
    **{"th dport": "inet_service", "th sport": "inet_service", "ether saddr": "ether_addr"},
    **{"meta skuid": "uid", "meta skgid": "gid", "iifname": "ifname"},
}
IP = {Family.IPV4: "ip", Family.IPV6: "ip6"}
KINDS = tuple((family, local) for local in (False, True) for family in Family)  # of packets: whose they are
IN, OUT = "iif != 0", "oif != 0"  # what is forwarded, before its way is known, and what this host sends


@dataclass(frozen=True, slots=True)
class Expressions:
    """What writing them needs to know. `sets` collects the named sets on the way."""

    units: Mapping[str, tuple[int, ...]]  # unit → levels at which its cgroups may lie
    sets: dict[str, str] = field(default_factory=dict)  # by name: both directions share them
    named: dict[str, str] = field(default_factory=dict)  # the names of shared ones, by what they hold

    def matches(self, number: int, match: Match) -> Iterator[tuple[Family | None, str]]:
        """Yield expressions of which any may hold, with their family; lists share one where they can."""
        ranged = is_long(match)
        protocols = f"meta l4proto {any_of(map(str, _protocols(match)))}" if match.proto else ""
        sender = f"ether saddr {any_of(match.mac)}" if match.mac else ""
        marks = [f"meta mark & {mark.mask:#x} == {mark.value:#x}" for mark in match.fwmark] or [""]
        lists = (
            _each("th sport", match.sport, ranged),
            _each("th dport", match.dport, ranged),
            _each("meta skuid", match.user, ranged),
            _each("meta skgid", match.group, ranged),
            [sender],
            marks,
            self.members(match),
        )
        others = [" ".join(filter(None, parts)) for parts in product(*(one for one in lists if one != [""]))]
        for way in ways_of(match):
            for family, addresses in self.address_parts(number, match, ranged):
                for other in others:
                    yield family, " ".join(filter(None, (way, addresses, protocols, other)))

    def members(self, match: Match) -> list[str]:
        """Return an expression for each set of a unit and each level."""
        return [
            f"socket cgroupv2 level {level} @{set_of(unit)}"
            for unit in match.unit
            for level in self.units.get(unit, ())
        ] or ([] if match.unit else [""])

    def address_parts(self, number: int, match: Match, ranged: bool) -> Iterator[tuple[Family | None, str]]:
        """Yield expressions for each family that addresses and DSCP need apart, or an empty one."""
        if not (match.source or match.destination or match.dscp):
            yield None, ""
            return
        for family, ip in IP.items():
            sides = []
            for side, networks in (("saddr", match.source), ("daddr", match.destination)):
                _, count, every = listing(networks, family.version)
                if networks and not count:
                    break
                if every or not count:
                    sides.append([f"meta nfproto ipv{family.version}" if every else ""])
                elif ranged:
                    sides.append([f"{ip} {side} {self.prefixes(number, side, family, networks)}"])
                else:
                    sides.append(_by_length(f"{ip} {side}", networks, family))
            else:
                dscp = f"{ip} dscp {any_of(map(str, match.dscp))}" if match.dscp else ""
                for parts in product(*sides):
                    yield family, " ".join(filter(None, (*parts, dscp)))

    def prefixes(self, number: int, side: str, family: Family, networks: Networks) -> str:
        """Return an anonymous set, or the name of one for a long list."""
        elements, count, _ = listing(networks, family.version)
        if count <= LONG:
            return elements if count == 1 else f"{{ {elements} }}"
        name, kind = name_of(number, side, family), SHARED[f"{IP[family]} {side}"]
        self.sets[name] = (
            f"set {name} {{ type {kind}; flags interval; auto-merge; elements = {{ {elements} }}; }}"
        )
        return f"@{name}"

    def unlike(self, needs: Iterable[Need]) -> list[str]:
        """Return expressions that hold together for a packet that has none of what is needed."""
        listed: dict[str, dict[str, None]] = {}
        alone: dict[str, None] = {}  # sets and patterns: nft takes them one by one
        for compared, values in needs:
            if values.startswith("@") or values.endswith('*"'):
                alone[f"{compared} != {values}"] = None
            else:
                listed.setdefault(compared, {})[values] = None
        tests = (f"{compared} != {self.shared(compared, values)}" for compared, values in listed.items())
        return [*tests, *alone]

    def shared(self, compared: str, values: Collection[str]) -> str:
        """Return a set, or the name of one where it is long: both directions and families share it."""
        elements = ", ".join(values)
        if compared.startswith("th ") and len(values) == 1 and "-" not in elements:
            # nft makes one comparison of two ports: "th sport != 22 th dport != 36" would be "not both".
            return f"{elements}-{elements}"
        kind = SHARED.get(compared)
        if kind is None or len(values) <= LONG:
            return f"{{ {elements} }}"
        flags = "flags interval; auto-merge; " if "-" in elements or "/" in elements else ""
        definition = f"type {kind}; {flags}elements = {{ {elements} }};"
        name = self.named.setdefault(definition, f"any{len(self.named)}")
        self.sets[name] = f"set {name} {{ {definition} }}"
        return f"@{name}"

    def all_needs(self, number: int, policy: Policy) -> tuple[tuple[Need, ...] | None, ...]:
        """Return `needs` for each of KINDS."""
        match = policy.match
        others = tuple(self.needs(number, policy, family, False) for family in Family)
        if not match.iif and concerns(match, local=False) and concerns(match, local=True):
            return (*others, *others)
        return (*others, *(self.needs(number, policy, family, True) for family in Family))

    def needs(self, number: int, policy: Policy, family: Family, local: bool) -> tuple[Need, ...] | None:
        """Return things of which a packet must have one for a match; None if none is known.

        The packet is one of `family`, and of this host (`local`) or of others. NEVER, if it can't match. What
        few packets have is chosen before what many have.
        """
        if not concerns(policy.match, local):
            return NEVER
        match, ip = policy.match, IP[family]
        sides = (("saddr", match.source), ("daddr", match.destination))
        found = [(side, *listing(networks, family.version)) for side, networks in sides if networks]
        units = self.members(match)
        if not units or not all(count for _, _, count, _ in found):
            return NEVER
        for side, elements, count, every in found:
            if not every:
                values = elements if count <= LONG else f"@{name_of(number, side, family)}"
                return ((f"{ip} {side}", values),)
        if match.unit:
            return tuple(
                (compared, f"@{values}") for compared, _, values in (u.partition(" @") for u in units)
            )
        choices: tuple[tuple[str, Iterable[str]], ...] = (
            ("ether saddr", match.mac),
            ("meta skuid", map(span_of, match.user)),
            ("meta skgid", map(span_of, match.group)),
            ("th dport", map(span_of, match.dport)),
            ("th sport", map(span_of, match.sport)),
            ("iifname", () if local else (f'"{name}"' for name in match.iif if name != "lo")),
            (f"{ip} dscp", map(str, match.dscp)),
            ("meta l4proto", map(str, _protocols(match))),
        )
        for compared, listed in choices:
            if chosen := tuple((compared, value) for value in listed):
                return chosen
        return tuple((f"meta mark & {mark.mask:#x}", f"{mark.value:#x}") for mark in match.fwmark) or None


def ways_of(match: Match) -> list[str]:
    """Return an expression for each way of packets into a chain, by interface; of this host or others."""
    others, local = concerns(match, local=False), concerns(match, local=True)
    names = [f'iifname "{name}"' for name in match.iif if name != "lo" and others]
    if local and (match.iif or match.unit):  # who comes from elsewhere may find a socket, too
        names.insert(0, OUT)
    return names or [""]


def _each(compared: str, ranges: Sequence[Range], ranged: bool) -> list[str]:
    """Return expressions of which one must hold; `ranged`: only one, be it with a set of ranges."""
    single = [str(one.first) for one in ranges if one.first == one.last]
    if not ranges or ranged or len(single) == len(ranges):
        return [f"{compared} {any_of(map(span_of, ranges))}" if ranges else ""]
    spans = [f"{compared} {span_of(one)}" for one in ranges if one.first != one.last]
    return [f"{compared} {any_of(single)}", *spans] if single else spans


def _by_length(compared: str, networks: Networks, family: Family) -> list[str]:
    """Return expressions of which one must hold: prefixes of the same length share one."""
    lengths: dict[int, list[Network]] = {}
    for network in networks:
        if network.version == family.version:
            lengths.setdefault(network.prefixlen, []).append(network)
    found = []
    for some in lengths.values():
        if len(some) == 1:
            found.append(f"{compared} {some[0]}")
        else:
            addresses = any_of(str(network.network_address) for network in some)
            found.append(f"{compared} & {some[0].netmask} == {addresses}")
    return found


def is_long(match: Match) -> bool:
    """Say whether `match` needs sets of ranges and prefixes, as rules instead of them would be too many."""
    sides = (match.source, match.destination)
    if any(len(side) > LONG for side in sides):
        return True
    rules = 1
    for ranges in (match.sport, match.dport, match.user, match.group):
        spans = sum(one.first != one.last for one in ranges)
        rules *= max(1, spans + (spans < len(ranges)))
    for side in sides:
        rules *= max(1, *(len({n.prefixlen for n in side if n.version == version}) for version in (4, 6)))
    return rules > SPREAD


def _protocols(match: Match) -> dict[int, None]:
    """Return the protocols of a match; ICMP is that of both families."""
    return {p: None for proto in match.proto for p in ((ICMP, ICMPV6) if proto == ICMP else (proto,))}


def name_of(number: int, side: str, family: Family) -> str:
    """Return the name of the set of a policy's long list."""
    return f"policy{number}_{side}{family.version}"


def any_of(items: Iterable[str]) -> str:
    """Return one item as it is, several as an anonymous set."""
    listed = list(items)
    return listed[0] if len(listed) == 1 else f"{{ {', '.join(listed)} }}"


def span_of(numbers: Range) -> str:
    """Return a number, or a range of them."""
    return str(numbers.first) if numbers.first == numbers.last else f"{numbers.first}-{numbers.last}"
