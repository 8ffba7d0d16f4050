"""Classes as rules: where nftables has judged a connection, its mark decides, and these rules say what.

priority        rule                                  for class 2 (lte, then fiber, then nothing)
B+990           not fwmark 0/0xf8… goto B+10899       what is judged skips the rules for what is not
B+10900         fwmark 0x0a…/0xff… lookup lte         a live connection stays on its uplink,
B+10900         fwmark 0x09…/0xff… lookup fiber       as long as the class allows it
B+10901         fwmark 0x08…/0xfc… lookup lte
B+10902         fwmark 0x08…/0xfc… lookup fiber
B+10903         fwmark 0x08…/0xfc… unreachable
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from pbrd.classes import Class, classify, guards_early, needs_guard, uses_nft
from pbrd.marks import ARRIVED, INBOUND, Marks, marks_of, pin_of
from pbrd.objects import MAIN_TABLE, Action, Key, Rule, Standing
from pbrd.rules import (
    ARRIVALS,
    ARRIVALS_END,
    CLASS_OVERRIDES,
    CLASS_OVERRIDES_START,
    CLASS_OVERRIDES_WIDTH,
    CLASSES,
    CLASSES_START,
    CLASSES_WIDTH,
    DEFAULT,
    DEFAULT_PINS,
    EARLY,
    FALLBACK_ACTION,
    GUARD,
    GUARD_END,
    GUARD_PASS,
    JUDGED,
    PINS,
    PINS_END,
    bands,
    by_preference,
    has_family,
    is_drained,
    stride_of,
    width_of,
)
from pbrd.settings import MAIN, Config, Fallback, Family, Mark, Uplink


def mark_rules(
    config: Config, family: Family, block: int, standings: Mapping[Key, Standing]
) -> Iterator[Rule]:
    """Yield the rules for marked packets: connections from outside, the classes, and pins of `[default]`."""
    writer = _Writer(config, family, marks_of(config), block, standings)
    yield from writer.inbound()
    yield from writer.arrivals()
    yield from writer.order()
    for place, one, first, overrides in parts(config):
        yield from writer.part(place, one, first, overrides)
    yield from writer.default()


def guard_rule(config: Config, family: Family) -> Rule:
    """Return the rule that nothing of others may pass unless nftables has judged it."""
    shift = EARLY if guards_early(config) else 0
    return Rule(family, config.daemon.rule_priority + GUARD + shift, Action.BLACKHOLE)


class _Writer:
    """Writes the rules of one family."""

    def __init__(
        self,
        config: Config,
        family: Family,
        marks: Marks,
        block: int,
        standings: Mapping[Key, Standing],
    ) -> None:
        self.config, self.family, self.marks = config, family, marks
        self.block, self.standings = block, standings
        self.base = config.daemon.rule_priority

    def uplink(self, name: str) -> Uplink | None:
        """Return the uplink, if it is one and this family may leave by it."""
        if name == MAIN:
            return None
        uplink = self.config.uplink(name)
        return uplink if has_family(uplink, self.family) else None

    def inbound(self) -> Iterator[Rule]:
        """What came in by an uplink is answered there, whatever the policies say, or not at all.

        An answer by another uplink is of no use, and policies that would forbid it are not asked.
        """
        came = Mark(self.marks.class_(INBOUND), self.marks.classes)
        for uplink in self.config.uplinks:
            if has_family(uplink, self.family):
                mark = Mark(came.value | pin_of(self.marks, uplink), self.marks.mask)
                look = Rule(self.family, self.base + PINS + 2, table=uplink.table, fwmark=mark)
                yield look
                yield replace(look, priority=self.base + PINS, suppress_prefixlength=0)
        # Hosts behind a router on the uplink's link: main knows it. Not the halves that VPNs add (0.0.0.0/1).
        priority = self.base + PINS + 1
        yield Rule(self.family, priority, table=MAIN_TABLE, fwmark=came, suppress_prefixlength=1)
        yield Rule(self.family, self.base + PINS_END, Action.UNREACHABLE, fwmark=came)

    def arrivals(self) -> Iterator[Rule]:
        """What comes by an uplink came the right way: so says the kernel's look back (rp_filter).

        That asks for the way of an answer, with the packet's mark and as if it came from where the packet
        goes to. No policy may have a say in it: the uplink that it would name can be down.
        """
        if self.family is not Family.IPV4:  # IPv6 has no such look
            return
        behind = self.base + ARRIVALS_END
        for uplink in self.config.uplinks:
            if has_family(uplink, self.family):
                mark = Mark(self.marks.class_(ARRIVED) | pin_of(self.marks, uplink), self.marks.mask)
                came, looks = self.base + ARRIVALS, self.base + ARRIVALS + 1
                yield Rule(self.family, came, Action.GOTO, fwmark=mark, iif=uplink.interface, goto=behind)
                yield Rule(self.family, looks, table=uplink.path_table, fwmark=mark)
        yield Rule(self.family, behind, Action.NOP)

    def order(self) -> Iterator[Rule]:
        """What nftables has judged skips the rules for what it has not.

        Where a kill switch depends on it, nobody else's packet goes on unjudged (`needs_guard`): the table
        must have gone. Exempt are those that come by an uplink, which are mostly answers.
        """
        yield from self.judged_goes(0, CLASSES_START)
        early = guards_early(self.config)
        shift = EARLY if early else 0
        if early:
            yield from self.judged_goes(EARLY, CLASS_OVERRIDES_START)
        if needs_guard(self.config):
            behind = self.base + GUARD_END + shift
            for interface in ("lo", *(u.interface for u in self.config.uplinks if u.enabled)):
                priority = self.base + GUARD_PASS + shift
                yield Rule(self.family, priority, Action.GOTO, iif=interface, goto=behind)
            yield guard_rule(self.config, self.family)
            yield Rule(self.family, behind, Action.NOP)

    def judged_goes(self, shift: int, start: int) -> Iterator[Rule]:
        """Yield the jump to the classes at `start`, and the place where it ends."""
        unjudged, to = Mark(0, self.marks.classes), self.base + start
        priority = self.base + JUDGED + shift
        yield Rule(self.family, priority, Action.GOTO, fwmark=unjudged, inverted=True, goto=to)
        yield Rule(self.family, to, Action.NOP)

    def default(self) -> Iterator[Rule]:
        """Yield the pins of `[default]`; with best-effort they count once more before its path tables."""
        if self.config.default is None:
            return
        via = self.config.default.via
        yield from self.pins(0, via, self.base + DEFAULT_PINS)
        if self.config.default.fallback is Fallback.BEST_EFFORT:
            for uplink in filter(None, map(self.uplink, via)):
                mark = Mark(pin_of(self.marks, uplink), self.marks.pins)
                yield Rule(self.family, self.base + DEFAULT + len(via), table=uplink.path_table, fwmark=mark)

    def pins(self, place: int, names: Iterable[str], priority: int) -> Iterator[Rule]:
        """A live connection of this class stays on the uplink that it is on, if that is one of `names`."""
        for uplink in filter(None, map(self.uplink, names)):
            value = self.marks.class_(self.block + place) | pin_of(self.marks, uplink)
            yield Rule(self.family, priority, table=uplink.table, fwmark=Mark(value, self.marks.mask))

    def part(self, place: int, one: Class, first: int, overrides: bool) -> Iterator[Rule]:
        """Yield the rules of a class before main's specific routes (`overrides`), or behind them."""
        yield from self.pins(place, one.uplinks, first)
        if self.config.default is not None and one.end is Fallback.NEXT and not overrides:
            others = [name for name in self.config.default.via if name not in one.uplinks]
            yield from self.pins(place, others, first)  # it has passed them on to there
        yield from self.lookups(place, one.override if overrides else one.normal, first + 1)
        if not (overrides and one.normal):
            yield from self.end(place, one, first + 1 + len(one.uplinks))

    def lookups(self, place: int, segments: tuple[tuple[str, ...], ...], priority: int) -> Iterator[Rule]:
        """Yield the lookups for new connections; within each segment who is not preferred stands behind."""
        names = (name for segment in segments for name in by_preference(segment, self.family, self.standings))
        for offset, name in enumerate(names):
            uplink = self.uplink(name)
            if uplink is not None or name == MAIN:
                table = uplink.table if uplink else MAIN_TABLE
                yield Rule(self.family, priority + offset, table=table, fwmark=self.class_(place))

    def end(self, place: int, one: Class, priority: int) -> Iterator[Rule]:
        """Yield how the way ends."""
        if one.end in FALLBACK_ACTION:
            action: Action = FALLBACK_ACTION[one.end]
            yield Rule(self.family, priority, action, fwmark=self.class_(place))
        elif one.end is Fallback.BEST_EFFORT:
            for offset, name in enumerate(one.end_via, start=1):
                uplink = self.uplink(name)
                if uplink is None:
                    continue
                table, pin = uplink.path_table, pin_of(self.marks, uplink)
                pinned = Mark(self.class_(place).value | pin, self.marks.mask)
                yield Rule(self.family, priority, table=table, fwmark=pinned)
                if not is_drained(name, self.family, self.standings):
                    yield Rule(self.family, priority + offset, table=table, fwmark=self.class_(place))

    def class_(self, place: int) -> Mark:
        """Return what matches a class, whatever the pin."""
        return Mark(self.marks.class_(self.block + place), self.marks.classes)


def parts(config: Config) -> Iterator[tuple[int, Class, int, bool]]:
    """Yield (place, class, first priority, whether it stands before main) for each row of rules."""
    base, classes = config.daemon.rule_priority, tuple(enumerate(classify(config).classes))
    overrides = [(place, one) for place, one in classes if one.override]
    others = [(place, one) for place, one in classes if one.normal]
    stride = stride_of(len(overrides), CLASS_OVERRIDES_WIDTH)
    for position, (place, one) in enumerate(overrides):
        yield place, one, base + CLASS_OVERRIDES + position * stride, True
    stride = stride_of(len(others), CLASSES_WIDTH)
    for position, (place, one) in enumerate(others):
        yield place, one, base + CLASSES + position * stride, False


def class_bands(config: Config) -> list[tuple[tuple[str, ...], int, int]]:
    """Return (uplinks of a segment, first priority, one past the last) of the lookups of all classes."""
    found = []
    for _, one, first, overrides in parts(config):
        start = first + 1
        for segment in one.override if overrides else one.normal:
            found.append((segment, start, start + len(segment)))
            start += len(segment)
    return found


def lack_of_room(config: Config) -> str:
    """Return what the mask or the priorities have no room for, and the remedy; "" if all fits."""
    if not uses_nft(config):
        rows = [
            (max(map(width_of, policies), default=0), len(policies), width)
            for policies, _, width in bands(config)
        ]
    else:
        classes = classify(config).classes
        room = marks_of(config).room // 2  # a reload gives them other numbers than those in use
        if len(classes) > room:
            return (
                f"the policies make {len(classes)} different ways, and fwmark_mask has room for {room}; "
                "widen it, as in fwmark_mask = 0xffff0000"
            )
        rows = [
            (max((1 + len(c.uplinks) + 1 + len(c.end_via) for c in some), default=0), len(some), width)
            for some, width in (
                ([c for c in classes if c.override], CLASS_OVERRIDES_WIDTH),
                ([c for c in classes if c.normal], CLASSES_WIDTH),
            )
        ]
    if any(stride_of(count, width) < longest for longest, count, width in rows):
        return "the rules of all policies don't fit into pbrd's priorities; name fewer uplinks in each"
    return ""
