"""Classes as rules: where nftables has judged a connection, its mark decides, and these rules say what.

priority        rule                                  for class 2 (lte, then fiber, then nothing)
B+10900         fwmark 0x0a…/0xff… lookup lte         a live connection stays on its uplink,
B+10900         fwmark 0x09…/0xff… lookup fiber       as long as the class allows it
B+10901         fwmark 0x08…/0xfc… lookup lte
B+10902         fwmark 0x08…/0xfc… lookup fiber
B+10903         fwmark 0x08…/0xfc… unreachable
"""

from collections.abc import Iterator, Mapping

from pbrd.classes import Class, classify
from pbrd.marks import INBOUND, Marks, marks_of, pin_of
from pbrd.objects import MAIN_TABLE, Action, Key, Rule, Standing
from pbrd.rules import (
    CLASS_OVERRIDES,
    CLASS_OVERRIDES_WIDTH,
    CLASSES,
    CLASSES_WIDTH,
    DEFAULT_PINS,
    FALLBACK_ACTION,
    PINS,
    by_preference,
    has_family,
    stride_of,
)
from pbrd.settings import MAIN, Config, Fallback, Family, Mark, Uplink


def mark_rules(
    config: Config, family: Family, block: int, standings: Mapping[Key, Standing]
) -> Iterator[Rule]:
    """Yield the rules for marked packets: connections from outside, the classes, and pins of `[default]`."""
    writer = _Writer(config, family, marks_of(config), block, standings)
    yield from writer.inbound()
    classes = classify(config).classes
    for place, one in enumerate(classes):
        yield from writer.override_part(place, one, stride_of(len(classes), CLASS_OVERRIDES_WIDTH))
        yield from writer.normal_part(place, one, stride_of(len(classes), CLASSES_WIDTH))
    if config.default is not None:
        yield from writer.pins(0, config.default.via, writer.base + DEFAULT_PINS)


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
        """What came in by an uplink is answered there, whatever the policies say."""
        for uplink in self.config.uplinks:
            if has_family(uplink, self.family):
                value = self.marks.class_(INBOUND) | pin_of(self.marks, uplink)
                mark = Mark(value, self.marks.mask)
                yield Rule(self.family, self.base + PINS + uplink.index + 1, table=uplink.table, fwmark=mark)

    def pins(self, place: int, names: tuple[str, ...], priority: int) -> Iterator[Rule]:
        """A live connection of this class stays on the uplink that it is on, if that is one of `names`."""
        for uplink in filter(None, map(self.uplink, names)):
            value = self.marks.class_(self.block + place) | pin_of(self.marks, uplink)
            yield Rule(self.family, priority, table=uplink.table, fwmark=Mark(value, self.marks.mask))

    def override_part(self, place: int, one: Class, stride: int) -> Iterator[Rule]:
        """Yield what stands before the main table's specific routes."""
        if not one.override:
            return
        first = self.base + CLASS_OVERRIDES + place * stride
        yield from self.pins(place, one.uplinks, first)
        yield from self.lookups(place, one.override, first + 1)
        if not one.normal:
            yield from self.end(place, one, first + 1 + len(one.uplinks))

    def normal_part(self, place: int, one: Class, stride: int) -> Iterator[Rule]:
        """Yield what stands behind them."""
        if not one.normal:
            return
        first = self.base + CLASSES + place * stride
        yield from self.pins(place, one.uplinks, first)
        yield from self.lookups(place, one.normal, first + 1)
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
            for offset, name in enumerate(one.end_via):
                uplink = self.uplink(name)
                if uplink is not None:
                    table = uplink.path_table
                    yield Rule(self.family, priority + offset, table=table, fwmark=self.class_(place))

    def class_(self, place: int) -> Mark:
        """Return what matches a class, whatever the pin."""
        return Mark(self.marks.class_(self.block + place), self.marks.classes)


def class_bands(config: Config) -> list[tuple[tuple[str, ...], int, int]]:
    """Return (uplinks of a segment, first priority, one past the last) of the lookups of all classes."""
    found = []
    base, classes = config.daemon.rule_priority, classify(config).classes
    for start, width, part in (
        (CLASS_OVERRIDES, CLASS_OVERRIDES_WIDTH, "override"),
        (CLASSES, CLASSES_WIDTH, "normal"),
    ):
        stride = stride_of(len(classes), width)
        for place, one in enumerate(classes):
            first = base + start + place * stride + 1
            for segment in getattr(one, part):
                found.append((segment, first, first + len(segment)))
                first += len(segment)
    return found
