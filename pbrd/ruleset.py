"""The text of pbrd's one nftables table, `inet pbrd`; empty where nothing needs one.

It judges each connection once, keeps the verdict in the connection's mark, and gives it to every packet:

    arriving by an uplink   a new connection is INBOUND and pinned there: its replies leave by it; not if it
                            goes on by an uplink (somebody behind a tunnel): that is as from elsewhere
    from elsewhere, local   the class that the policies give it (`classes`), and the pin that it has
    leaving by an uplink    is pinned to it; masqueraded where the uplink has `nat`

Its first chain is empty and has the numbers of the classes in its name, for a daemon that starts.

Only the bits of `fwmark_mask` are written, in packets and connections. Rules then read class and pin
(`rules`): a pin counts only where the connection's class allows that uplink, so that none outlives the
policy which let it leave there. Classes of another `block` than the current one are judged anew.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from pbrd.classes import Classification, Outcome, classify, concerns, in_turn, outcomes_of, uses_nft
from pbrd.marks import ARRIVED, INBOUND, Marks, Numbers, marks_of, pin_of
from pbrd.objects import Key, Standing
from pbrd.prefixes import LONG, listing
from pbrd.rules import ICMP, ICMPV6
from pbrd.settings import Config, Fallback, Family, Match, Policy, Range, Sticky, Uplink
from pbrd.units import set_of

SEED = 0x70627264  # of the hash that keeps a client on its uplink: the same after every restart
BEHIND_DNAT = -90  # what leaves is judged, as by rules; and marks of others are set by then (mangle, -150)
HERE = "{ local, broadcast, multicast }"
ND = "{ nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect }"


@dataclass(frozen=True, slots=True)
class _Writer:
    """What writing the table needs to know. `sets` collects the named sets on the way."""

    config: Config
    marks: Marks
    classes: Classification
    block: int  # number of the first class: that of connections which no policy matched
    units: Mapping[str, tuple[int, ...]]  # unit → levels at which its cgroups may lie
    usable: frozenset[str]
    tunnels: tuple[int, ...]  # marks of packets that carry a tunnel: they go by the rules alone
    sets: dict[str, str] = field(default_factory=dict)  # by name: both chains that judge share them

    @property
    def uplinks(self) -> list[Uplink]:
        return [uplink for uplink in self.config.uplinks if uplink.enabled]

    def class_(self, place: int) -> str:
        return f"{self.marks.class_(self.block + place):#x}"

    def clear(self, bits: int) -> str:
        """Return the mask that keeps all but `bits`."""
        return f"{~bits & 0xFFFFFFFF:#x}"

    # --- chains that set marks ----------------------------------------------------------------

    def class_chains(self) -> Iterator[str]:
        """`cN` gives a connection class N, `mN` a packet the class that its connection has."""
        keep = self.clear(self.marks.classes)
        for place in range(len(self.classes.classes)):
            value = self.class_(place)
            packet = f"meta mark set meta mark & {keep} | {value}"
            yield chain(f"c{place}", packet, f"ct mark set ct mark & {keep} | {value}")
            yield chain(f"m{place}", packet)

    def outcome_chains(self) -> Iterator[str]:
        """`oN` is what outcome N makes of the class that a connection has so far."""
        for number, steps in enumerate(self.classes.steps):
            ways = (f"{'0x0' if old == 0 else self.class_(old)} : goto c{new}" for old, new in steps)
            yield chain(f"o{number}", f"meta mark & {self.marks.classes:#x} vmap {{ {', '.join(ways)} }}")

    def pin_chains(self) -> Iterator[str]:
        """`pN` gives a packet the pin of uplink N, `inN` and `outN` a connection."""
        pins, every = self.marks.pins, self.marks.mask
        for uplink in self.uplinks:
            pin, number = pin_of(self.marks, uplink), uplink.index + 1
            came = self.marks.class_(INBOUND) | pin
            repin = f"ct mark set ct mark & {self.clear(pins)} | {pin:#x}"
            yield chain(f"p{number}", f"meta mark set meta mark & {self.clear(pins)} | {pin:#x}")
            yield chain(f"in{number}", f"ct mark set ct mark & {self.clear(every)} | {came:#x}")
            yield chain(
                f"out{number}",
                f"meta mark & {every:#x} == {every:#x} return",
                f"ct mark & {self.marks.classes:#x} == {self.marks.class_(INBOUND):#x} return",
                *self.unmasked(uplink, pin),
                # What others have bound to an uplink's address (snat) keeps the pin by which it is evicted.
                f"ct direction original ct mark & {pins:#x} == 0x0 {repin}",
                f"ct direction original ct mark & {pins:#x} != {pin:#x} ct status & snat == 0 {repin}",
            )
            here = f"meta mark set meta mark & {self.clear(every)} | {self.marks.class_(ARRIVED) | pin:#x}"
            yield chain(f"back{number}", here)

    def unmasked(self, uplink: Uplink, pin: int) -> Iterator[str]:
        """Drop what comes over from an uplink without NAT: the connection can't be masqueraded any more.

        It is marked, and evicted soon; then it begins anew here.
        """
        for wanted, family in ((uplink.nat, "ipv4"), (uplink.nat6, "ipv6")):
            if wanted:
                yield (
                    f"meta nfproto {family} ct direction original "
                    f"ct mark & {self.marks.pins:#x} != {{ 0x0, {pin:#x} }} ct status & snat == 0 goto gone"
                )

    # --- judging ------------------------------------------------------------------------------

    def decisions(self, local: bool) -> Iterator[str]:
        """Yield a rule or a few for each policy that can match traffic of this host, or of others."""
        for number, policy in enumerate(in_turn(self.config)):
            if not concerns(policy.match, local):
                continue
            verdicts = self.verdicts(policy)
            for family, match in self.matches(f"policy{number}", policy.match, local):
                for only, verdict in verdicts:
                    if None in (family, only) or family is only:
                        yield f"{match} {verdict}".strip()

    def verdicts(self, policy: Policy) -> tuple[tuple[Family | None, str], ...]:
        """Return what follows a match, by family if need be; `goto` ends the judging."""
        goes = "jump" if policy.fallback is Fallback.NEXT else "goto"
        outcomes = outcomes_of(self.config, policy)
        if not policy.balance:
            return ((None, f"{goes} o{self.number(outcomes[0][0])}"),)
        slots = shares(policy.balance, self.usable)
        total = slots[-1][1].last + 1
        numbers = {outcome.via[0]: self.number(outcome) for outcome, _ in outcomes}
        ways = ", ".join(f"{_numbers(part)} : {goes} o{numbers[name]}" for name, part in slots)
        if policy.sticky is Sticky.SOURCE:
            return tuple(
                (family, f"jhash {ip} saddr mod {total} seed {SEED:#x} vmap {{ {ways} }}")
                for family, ip in ((Family.IPV4, "ip"), (Family.IPV6, "ip6"))
            )
        return ((None, f"numgen random mod {total} vmap {{ {ways} }}"),)

    def number(self, outcome: Outcome) -> int:
        return self.classes.outcomes.index(outcome)

    def matches(self, name: str, match: Match, local: bool) -> Iterator[tuple[Family | None, str]]:
        """Yield expressions of which any may hold, with their family; lists share one where they can."""
        everywhere = [self.ports(match), *self.owners(match, local)]
        for way in self.ways_in(match, local):
            for family, addresses in self.address_parts(name, match):
                for unit, mark in product(self.members(match), match.fwmark or (None,)):
                    foreign = f"meta mark & {mark.mask:#x} == {mark.value:#x}" if mark else ""
                    parts = (way, addresses, *everywhere, foreign, unit)
                    yield family, " ".join(part for part in parts if part)

    def members(self, match: Match) -> list[str]:
        """Return an expression for each set of a unit and each level."""
        return [
            f"socket cgroupv2 level {level} @{set_of(unit)}"
            for unit in match.unit
            for level in self.units.get(unit, ())
        ] or ([] if match.unit else [""])

    def ways_in(self, match: Match, local: bool) -> tuple[str, ...]:
        names = [f'"{name}"' for name in match.iif if name != "lo"]
        return tuple(f"iifname {name}" for name in names) if names and not local else ("",)

    def ports(self, match: Match) -> str:
        protos = {p: None for proto in match.proto for p in ((ICMP, ICMPV6) if proto == ICMP else (proto,))}
        parts = [f"meta l4proto {any_of(map(str, protos))}"] if protos else []
        parts += [f"th sport {any_of(map(_numbers, match.sport))}"] if match.sport else []
        parts += [f"th dport {any_of(map(_numbers, match.dport))}"] if match.dport else []
        return " ".join(parts)

    def owners(self, match: Match, local: bool) -> Iterator[str]:
        if match.user:
            yield f"meta skuid {any_of(map(_numbers, match.user))}"
        if match.group:
            yield f"meta skgid {any_of(map(_numbers, match.group))}"
        if match.mac and not local:
            yield f"ether saddr {any_of(match.mac)}"

    def address_parts(self, name: str, match: Match) -> Iterator[tuple[Family | None, str]]:
        """Yield one expression for each family that addresses and DSCP need apart, or an empty one."""
        if not (match.source or match.destination or match.dscp):
            yield None, ""
            return
        for family, ip in ((Family.IPV4, "ip"), (Family.IPV6, "ip6")):
            parts = []
            for side, networks in (("saddr", match.source), ("daddr", match.destination)):
                mine, count, every = listing(networks, family.version)
                if networks and not count:
                    break
                if every:
                    parts.append(f"meta nfproto ipv{family.version}")
                elif count:
                    named = f"{name}_{side}{family.version}"
                    parts.append(f"{ip} {side} {self.prefixes(named, family, mine, count)}")
            else:
                if match.dscp:
                    parts.append(f"{ip} dscp {any_of(map(str, match.dscp))}")
                yield family, " ".join(parts)

    def prefixes(self, name: str, family: Family, elements: str, count: int) -> str:
        """Return an anonymous set, or the name of one for a long list."""
        if count <= LONG:
            return elements if count == 1 else f"{{ {elements} }}"
        kind = "ipv4_addr" if family is Family.IPV4 else "ipv6_addr"
        if name not in self.sets:
            self.sets[name] = (
                f"set {name} {{ type {kind}; flags interval; auto-merge; elements = {{ {elements} }}; }}"
            )
        return f"@{name}"

    # --- hooks --------------------------------------------------------------------------------

    def leaving(self, local: bool) -> str:
        """Return the chain for packets that may leave: known connections keep their class, others get one."""
        where = "local" if local else "forward"
        marks = self.marks
        known = [f"{self.class_(place)} : goto m{place}" for place in range(len(self.classes.classes))]
        known.append(f"{marks.gone:#x} : drop")
        return chain(
            f"leaving_{where}",
            f"ct mark & {marks.classes:#x} == {marks.class_(INBOUND):#x} goto inbound",
            # Answers are not judged. Local ones stay unmarked, as the socket's own look has found their way.
            f"ct direction reply {'return' if local else 'goto m0'}",
            self.restore_pin(),
            f"ct mark & {marks.classes:#x} vmap {{ {', '.join(known)} }}",
            f"meta mark set meta mark & {self.clear(marks.classes)}",
            f"jump decide_{where}",
            # While the table goes its chains are still asked, with empty maps: what they said is void.
            "meta nfproto vmap { ipv4 : goto judged, ipv6 : goto judged }",
            "drop",
        )

    def restore_pin(self) -> str:
        pins = (f"{pin_of(self.marks, u):#x} : jump p{u.index + 1}" for u in self.uplinks)
        return f"ct mark & {self.marks.pins:#x} vmap {{ {', '.join(pins)} }}"

    def by_interface(self, target: str) -> str:
        ways = (f'"{u.interface}" : goto {target}{u.index + 1}' for u in self.uplinks)
        return f"vmap {{ {', '.join(ways)} }}"

    def hooks(self) -> Iterator[str]:
        """Yield the chains that the kernel calls, and those next to them."""
        marks, interfaces = self.marks, any_of(f'"{u.interface}"' for u in self.uplinks)
        came = f"ct mark & {marks.classes:#x} == {marks.class_(INBOUND):#x}"
        yield chain(
            "inbound",
            "ct direction original return",
            self.restore_pin(),
            f"meta mark set meta mark & {self.clear(marks.classes)} | {marks.class_(INBOUND):#x}",
        )
        every = marks.mask
        yield chain("gone", f"ct mark set ct mark & {self.clear(every)} | {marks.gone:#x}", "drop")
        yield chain("returned", f"iifname {self.by_interface('back')}")
        yield chain("judged", f"meta mark & {marks.classes:#x} == 0x0 goto c0")
        yield self.leaving(local=False)
        yield self.leaving(local=True)
        yield chain("arrived", f"iifname {self.by_interface('in')}")
        yield chain(
            "arriving",
            f"fib daddr type {HERE} goto arrived",
            "fib daddr oif missing return",
            f"fib daddr oifname != {interfaces} goto arrived",
        )
        yield chain(
            "by_uplink",
            f"ct state new ct mark & {marks.mask:#x} == 0x0 jump arriving",
            f"{came} goto by_uplink_inbound",
            "ct direction reply goto returned",
            "goto passing",
        )
        yield chain("by_uplink_inbound", "ct direction original goto returned", "goto inbound")
        yield chain("passing", f"fib daddr type {HERE} return", "goto leaving_forward")
        yield chain(
            "prerouting",
            f"type filter hook prerouting priority {BEHIND_DNAT}; policy accept;",
            f"iifname {interfaces} goto by_uplink",
            'iifname "lo" return',
            "goto passing",
        )
        yield chain(
            "output",
            f"type route hook output priority {BEHIND_DNAT}; policy accept;",
            'oifname "lo" return',
            f"meta mark & {marks.mask:#x} == {marks.mask:#x} return",
            self.spare_tunnels(),
            f"icmpv6 type {ND} return",
            f"fib daddr type {HERE} return",
            "goto leaving_local",
        )
        yield chain(
            "postrouting",
            "type filter hook postrouting priority mangle; policy accept;",
            self.spare_tunnels(),
            f"oifname {self.by_interface('out')}",
        )

    def spare_tunnels(self) -> str:
        """Return what ends a chain for packets that carry a tunnel.

        With bits of ours in their mark, a rule `not fwmark N` would send them into the tunnel again. They
        have their source by their route, so that NAT would only hold them on a dead uplink.
        """
        asked = {mark for policy in self.config.policies for mark in policy.match.fwmark}
        spared = [n for n in self.tunnels if not any(n & mark.mask == mark.value for mark in asked)]
        return f"meta mark {any_of(f'{number:#x}' for number in spared)} return" if spared else ""

    def nat(self) -> Iterator[str]:
        """Yield the chain that masquerades, if an uplink wants it."""
        rows = [
            f'oifname "{u.interface}" meta nfproto {family} masquerade'
            for u in self.uplinks
            for wanted, family in ((u.nat, "ipv4"), (u.nat6, "ipv6"))
            if wanted
        ]
        if rows:
            hook = "type nat hook postrouting priority srcnat; policy accept;"
            yield chain("nat", hook, self.spare_tunnels(), *rows)

    def text(self) -> str:
        """Return the table."""
        size = len(self.classes.classes)
        parts = [
            chain(str(Numbers(self.block, size, self.marks.mask, self.marks.pins))),
            *self.class_chains(),
            *self.outcome_chains(),
            chain("decide_forward", *self.decisions(local=False)),
            chain("decide_local", *self.decisions(local=True)),
            *self.pin_chains(),
            *self.hooks(),
            *self.nat(),
        ]
        units = (f"set {set_of(unit)} {{ type cgroupsv2; }}" for unit in sorted(self.units))
        inside = "\n".join(
            f"\t{line}" for part in (*units, *self.sets.values(), *parts) for line in part.splitlines()
        )
        return f"table inet pbrd {{\n{inside}\n}}\n"


def text(
    config: Config,
    block: int,
    units: Mapping[str, tuple[int, ...]],
    usable: Iterable[str],
    tunnels: Iterable[int] = (),
) -> str:
    """Return the table for `config`, or "" if nothing needs it.

    `block` is the number of its first class (`marks.next_block`). `units` has the levels at which the cgroups
    of units may lie; each gets a set (`units.set_of`), which is filled apart from this text. `usable` are the
    uplinks that balanced connections may go to. `tunnels` are the marks of packets that carry tunnels of
    others.
    """
    if not uses_nft(config):
        return ""
    classes = classify(config)
    spared = tuple(sorted(tunnels))
    return _Writer(config, marks_of(config), classes, block, units, frozenset(usable), spared).text()


def balanced(standings: Mapping[Key, Standing]) -> frozenset[str]:
    """Return the uplinks that take part in balancing: those that are up, in a family at least."""
    return frozenset(name for (name, _), s in standings.items() if s.usable and s.preferred and not s.drained)


def shares(balance: Sequence[tuple[str, int]], usable: frozenset[str]) -> tuple[tuple[str, Range], ...]:
    """Return who gets which slots of a hash space: exactly one uplink each, in shares as the weights say.

    The slots of an uplink that is not usable go to the usable others by their weights; theirs stay as they
    were. If none is usable, everybody keeps their own.
    """
    present = [(name, weight) for name, weight in balance if name in usable] or list(balance)
    rest = sum(weight for _, weight in present)
    found: list[tuple[str, Range]] = []
    start = 0
    for name, weight in balance:
        heirs = [(name, 1)] if (name, weight) in present else present
        share = sum(part for _, part in heirs)
        for heir, part in heirs:  # `rest` slots for each unit of weight: divisible by every heir's part
            size = weight * rest * part // share
            found.append((heir, Range(start, start + size - 1)))
            start += size
    return tuple(found)


def chain(name: str, *rules: str) -> str:
    """Return a chain."""
    return f"chain {name} {{\n" + "".join(f"\t{rule}\n" for rule in rules if rule) + "}"


def any_of(items: Iterable[str]) -> str:
    """Return one item as it is, several as an anonymous set."""
    listed = list(items)
    return listed[0] if len(listed) == 1 else f"{{ {', '.join(listed)} }}"


def _numbers(numbers: Range) -> str:
    return str(numbers.first) if numbers.first == numbers.last else f"{numbers.first}-{numbers.last}"
