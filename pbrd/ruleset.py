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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pbrd.classes import Classification, classify, uses_nft
from pbrd.eviction import ways_of
from pbrd.expressions import any_of
from pbrd.judging import Levels, chain, entrance, judging_chains
from pbrd.marks import ARRIVED, INBOUND, Marks, Numbers, marks_of, pin_of
from pbrd.settings import Config, Failback, Fallback, Family, Uplink, has_nat
from pbrd.units import set_of

BEHIND_DNAT = -90  # what leaves is judged, as by rules; and marks of others are set by then (mangle, -150)
# While the table goes its chains are still asked, with empty maps: what they have said is void.
STANDING = ("meta nfproto vmap { ipv4 : accept, ipv6 : accept }", "drop")
TALKS = (("ip", 4), ("ip6", 6))
# Bits of `ct status` (linux/netfilter/nf_conntrack_common.h): past its first packet; has got another source;
# the kernel has decided whether it shall.
CONFIRMED, SNAT, DNAT, DECIDED = 0x8, 0x10, 0x20, 0x80
MIDSTREAM = f"meta l4proto 6 tcp flags & syn == 0x0 ct status & {DNAT:#x} == 0x0"
HERE = "{ local, broadcast, multicast }"
ND = "{ nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect }"


@dataclass(frozen=True, slots=True)
class _Writer:
    """What writing the table needs to know. `sets` collects the named sets on the way."""

    config: Config
    marks: Marks
    classes: Classification
    block: int  # number of the first class: that of connections which no policy matched
    units: Levels
    usable: frozenset[str]
    tunnels: tuple[int, ...]  # marks of packets that carry a tunnel: they go by the rules alone

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
        """`cN` gives a connection class N, `mN` a packet the class that its connection has.

        No policy has a say behind a class that doesn't go on to the next one.
        """
        keep = self.clear(self.marks.classes)
        for place, one in enumerate(self.classes.classes):
            value = self.class_(place)
            packet = f"meta mark set meta mark & {keep} | {value}"
            ends = STANDING if one.end is not Fallback.NEXT else ()
            yield chain(f"c{place}", packet, f"ct mark set ct mark & {keep} | {value}", *ends)
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
            half = self.marks.class_(ARRIVED) | pin
            yield chain(f"in{number}", f"ct mark set ct mark & {self.clear(every)} | {came:#x}")
            yield chain(f"half{number}", f"ct mark set ct mark & {self.clear(every)} | {half:#x}")
            back = f"meta mark set meta mark & {self.clear(every)} | {half:#x}"
            yield chain(f"back{number}", back)
            # What began before we were there, and is pinned where it came in: see `midstream`.
            known = f"ct direction original ct mark & {pins:#x} == {pin:#x}"
            yield chain(f"from{number}", f"{known} {back} accept")
            yield chain(
                f"out{number}",
                f"meta mark & {every:#x} == {every:#x} return",
                f"ct mark & {self.marks.classes:#x} == {self.marks.class_(INBOUND):#x} return",
                *self.unmasked(uplink),
                *self.notes(number),
                # What others have bound to an uplink's address (snat) keeps the pin by which it is evicted.
                f"ct direction original ct mark & {pins:#x} == 0x0 {repin}",
                f"ct direction original ct mark & {pins:#x} != {pin:#x} ct status & snat == 0 {repin}",
            )

    def unmasked(self, uplink: Uplink) -> Iterator[str]:
        """Drop what leaves without NAT though the uplink has it: the kernel decides that but once.

        Be it that the connection comes over from an uplink without NAT, or began before this table was there.
        It is marked, and evicted soon; then it begins anew here. What has the uplink's own address looks the
        same masqueraded or not.
        """
        for family in Family:
            if not has_nat(uplink, family):
                continue
            flow = f"meta nfproto ipv{family.version} ct direction original"
            plain = f"{flow} ct status & {CONFIRMED | SNAT:#x} == {CONFIRMED:#x}"
            yield f"{plain} fib saddr type != local goto gone"
            # Of this host, with an address from elsewhere. What is masqueraded the kernel ends itself.
            fresh = f"ct mark & {self.marks.pins:#x} {{ 0x0, {pin_of(self.marks, uplink):#x} }}"
            yield f"{plain} {fresh} fib saddr . oif type != local goto gone"
            yield f"{flow} ct status & {CONFIRMED | DECIDED:#x} == {CONFIRMED:#x} goto gone"
            bare = [f"{pin_of(self.marks, other):#x}" for other in self.uplinks if not has_nat(other, family)]
            if bare:
                moved = f"ct mark & {self.marks.pins:#x} {any_of(bare)}"
                yield f"{flow} {moved} ct status & {SNAT:#x} == 0x0 goto gone"

    # Whom connections with `failback = "immediate"` talk to, by the uplink that they leave by. They are
    # forgotten to begin anew elsewhere, and the other side may be faster: its packet would begin one, from
    # outside, that stays on this uplink. So what such send waits here until ours has come.

    @property
    def immediate(self) -> list[str]:
        """Return the classes of such connections, as packets bear them."""
        ways = enumerate(ways_of(self.config))
        return [self.class_(place) for place, way in ways if way.failback is Failback.IMMEDIATE]

    def talks(self) -> Iterator[str]:
        """Yield the sets, one for each uplink and family."""
        for uplink in self.uplinks if self.immediate else ():
            for ip, version in TALKS:
                kind = f"ipv{version}_addr . inet_proto . inet_service . inet_service"
                # Shorter than a UDP connection lives without an answer.
                life = "size 65536; flags dynamic, timeout; timeout 20s;"
                yield f"set ours{uplink.index + 1}_{ip} {{ type {kind}; {life} }}"

    def notes(self, number: int) -> Iterator[str]:
        """Yield what remembers with whom a packet talks that leaves by uplink `number`."""
        if self.immediate:
            mark = f"meta mark & {self.marks.classes:#x} {any_of(self.immediate)}"
            for ip, version in TALKS:
                talk = f"{ip} daddr . meta l4proto . th dport . th sport"
                yield (
                    f"{mark} meta nfproto ipv{version} meta l4proto {{ 6, 17 }} "
                    f"update @ours{number}_{ip} {{ {talk} }}"
                )

    def expected(self) -> Iterator[str]:
        """Yield what lets the other side's packets begin no connection."""
        for uplink in self.uplinks if self.immediate else ():
            for ip, version in TALKS:
                talk = f"{ip} saddr . meta l4proto . th sport . th dport"
                yield (
                    f'iifname "{uplink.interface}" ct state new meta nfproto ipv{version} '
                    f"meta l4proto {{ 6, 17 }} {talk} @ours{uplink.index + 1}_{ip} drop"
                )

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
            "ct direction reply return"
            if local
            else f"ct direction reply ct mark & {marks.pins:#x} == 0x0 goto m0",
            self.restore_pin(),
            f"ct mark & {marks.classes:#x} vmap {{ {', '.join(known)} }}",
            f"meta mark set meta mark & {self.clear(marks.classes)}",
            "goto judge",
        )

    def deciding(self) -> Iterator[str]:
        """Yield the chains that judge, and what becomes of those of whom no policy has said anything."""
        for part in judging_chains(self.config, self.units, self.usable):
            yield part
            if part.startswith("chain decide"):
                name = part.split()[1]
                undecided = f"meta mark & {self.marks.classes:#x} == 0x0 jump c0"
                yield chain(name.replace("decide", "decided", 1), f"jump {name}", undecided, *STANDING)

    def restore_pin(self) -> str:
        pins = (f"{pin_of(self.marks, u):#x} : jump p{u.index + 1}" for u in self.uplinks)
        return f"ct mark & {self.marks.pins:#x} vmap {{ {', '.join(pins)} }}"

    def by_interface(self, target: str, verb: str = "goto") -> str:
        ways = (f'"{u.interface}" : {verb} {target}{u.index + 1}' for u in self.uplinks)
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
        yield self.leaving(local=False)
        yield self.leaving(local=True)
        yield chain("arrived", f"iifname {self.by_interface('in')}")
        yield chain(
            "arriving",
            *self.expected(),
            f"fib daddr type {HERE} goto arrived",
            "fib daddr oif missing return",
            f"{MIDSTREAM} fib daddr oifname != {interfaces} goto midstream",
            f"fib daddr oifname != {interfaces} goto arrived",
        )
        # TCP to a host in the LAN: nobody knows who has begun it, so what that host sends is judged.
        yield chain("midstream", f"iifname {self.by_interface('half')}")
        yield chain(
            "by_uplink",
            # Not only new ones: while a first table is loaded the kernel tracks already, without us.
            f"ct direction original ct mark & {marks.mask:#x} == 0x0 jump arriving",
            f"{came} goto by_uplink_inbound",
            "ct direction reply goto returned",
            f"iifname {self.by_interface('from', 'jump')}",
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
            f'oifname "{u.interface}" meta nfproto ipv{family.version} masquerade'
            for u in self.uplinks
            for family in Family
            if has_nat(u, family)
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
            *self.deciding(),
            *self.pin_chains(),
            *self.hooks(),
            *self.nat(),
            entrance(self.config),
        ]
        units = (f"set {set_of(unit)} {{ type cgroupsv2; }}" for unit, _ in self.units)
        inside = "\n".join(
            f"\t{line}" for part in (*units, *self.talks(), *parts) for line in part.splitlines()
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
    classes, spared = classify(config), tuple(sorted(tunnels))
    levels = tuple(sorted(units.items()))
    shared = frozenset(usable if any(policy.balance for policy in config.policies) else ())
    return _Writer(config, marks_of(config), classes, block, levels, shared, spared).text()
