"""Whose connections must be forgotten after a change of health, so that they begin anew elsewhere.

A NATed connection keeps the address of the uplink on which it began, so one on a dead uplink can't move: it
must end, and soon. But nothing else: connections of other uplinks, those that came in from outside, and
those which nobody else could take stay as they are (pfsense and opnsense learned each of these apart).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pbrd.classes import Class, classify, uses_nft
from pbrd.marks import ARRIVED, INBOUND, Marks, marks_of, pin_of
from pbrd.objects import Key, Standing
from pbrd.rules import by_preference, has_family, is_drained
from pbrd.settings import MAIN, Config, Failback, Fallback, Family, has_nat


@dataclass(frozen=True, slots=True)
class Eviction:
    """Connections of `family` whose mark has `value` under `mask`."""

    family: Family
    value: int
    mask: int


def evictions(
    config: Config, block: int, before: Mapping[Key, Standing], after: Mapping[Key, Standing]
) -> tuple[Eviction, ...]:
    """Return what to evict once the routes and rules for `after` are live. Empty without nftables."""
    if not uses_nft(config):
        return ()
    ways = tuple(ways_of(config))
    found: dict[tuple[Family, str], set[int]] = {}
    for family in Family:
        for place, one in enumerate(ways):
            for name in _leaving(config, one, family, before, after):
                found.setdefault((family, name), set()).add(place)
    return tuple(
        eviction
        for (family, name), places in found.items()
        for eviction in _pinned(config, block, family, name, places, _naming(ways, name))
    )


def gone(config: Config) -> tuple[Eviction, ...]:
    """Return the connections that leave without NAT by an uplink with it: other policies moved them there.

    Or they began while the table was missing. They get no NAT any more: the table marks them and drops their
    packets, until they are evicted and begin anew.
    """
    marks, enabled = marks_of(config), [uplink for uplink in config.uplinks if uplink.enabled]
    families = (family for family in Family if any(has_nat(uplink, family) for uplink in enabled))
    return tuple(Eviction(family, marks.gone, marks.mask) for family in families)


def marked(marks: Marks) -> tuple[Eviction, ...]:
    """Return all connections with any of our bits: they have no meaning, or had another."""
    bits = [1 << bit for bit in range(32) if marks.mask >> bit & 1]
    return tuple(Eviction(family, bit, bit) for bit in bits for family in Family)


def _naming(ways: Sequence[Class], name: str) -> set[int]:
    """Return the places of the classes that may use an uplink."""
    return {place for place, one in enumerate(ways) if name in one.uplinks}


def _pinned(
    config: Config, block: int, family: Family, name: str, places: set[int], others: set[int]
) -> Iterator[Eviction]:
    """Yield what is pinned to an uplink in these classes, but not in `others`, nor what came in from outside.

    The kernel goes through all connections for each: so ranges of classes share one. Numbers that no class
    has may be in them; connections that bear them will be judged anew.
    """
    marks, pin = marks_of(config), pin_of(marks_of(config), config.uplink(name))
    kept = {0, INBOUND, ARRIVED} | {block + place for place in others - places}
    ranges = cover({block + place for place in places}, kept, marks.classes.bit_count())
    for first, bits in sorted(ranges, key=lambda found: -found[1]):  # the large ones first
        free = marks.class_((1 << bits) - 1)
        yield Eviction(family, marks.class_(first) | pin, marks.mask & ~free)


def cover(
    wanted: Collection[int], kept: Collection[int], bits: int, first: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield (first, bits) of aligned ranges that together have all of `wanted` and none of `kept`."""
    here = range(first, first + (1 << bits))
    inside, foreign = [n for n in wanted if n in here], [n for n in kept if n in here]
    if not inside:
        return
    if not foreign:
        yield first, bits
        return
    for half in (first, first + (1 << bits - 1)):
        yield from cover(inside, foreign, bits - 1, half)


def stranded(before: Mapping[Key, Standing], after: Mapping[Key, Standing]) -> list[Key]:
    """Return what is down and whose connections another uplink of the family can take, just now or newly."""
    took, takes = (
        {key[1] for key, s in them.items() if s.usable and not s.drained} for them in (before, after)
    )
    was = {key for key, standing in before.items() if standing.usable}
    return [
        key
        for key, standing in after.items()
        if not standing.usable and key[1] in takes and (key in was or key[1] not in took)
    ]


def pins_of(config: Config, names: Iterable[str]) -> tuple[Eviction, ...]:
    """Return all connections that are pinned to these uplinks, whatever let them leave there."""
    marks = marks_of(config)
    return tuple(
        Eviction(family, pin_of(marks, config.uplink(name)), marks.pins)
        for name in names
        for family in Family
    )


def classes_of(config: Config, block: int, size: int) -> tuple[Eviction, ...]:
    """Return all connections of the `size` classes from `block` up."""
    marks = marks_of(config)
    values = [marks.class_(block + place) for place in range(size)]
    return tuple(Eviction(family, value, marks.classes) for value in values for family in Family)


def ways_of(config: Config) -> Iterator[Class]:
    """Yield the classes in their order; those that end in `next` go on to `[default]`."""
    default = config.default
    for one in classify(config).classes:
        if one.end is not Fallback.NEXT or default is None:
            yield one
        elif one.uplinks:
            yield one.then_default(default.via)
        else:
            failback = default.failback or config.daemon.failback
            yield Class(normal=(default.via,), failback=failback)


def _leaving(
    config: Config, one: Class, family: Family, before: Mapping[Key, Standing], after: Mapping[Key, Standing]
) -> Iterator[str]:
    """Yield the uplinks of a class whose connections must leave."""
    names = [n for n in dict.fromkeys(one.uplinks) if n != MAIN and has_family(config.uplink(n), family)]
    takes, took = (_takes(one, names, family, standings) for standings in (after, before))
    for name in names:
        waited = not took  # for somebody who takes them, with an uplink that was down before
        if takes and not _usable(after, name, family) and (waited or _usable(before, name, family)):
            yield name
    if one.failback is Failback.IMMEDIATE:
        yield from _lesser(one, family, before, after)


def _takes(one: Class, names: Iterable[str], family: Family, standings: Mapping[Key, Standing]) -> bool:
    """Say whether connections of a class can go on somewhere."""
    able = (_usable(standings, name, family) and not is_drained(name, family, standings) for name in names)
    return MAIN in one.uplinks or any(able)


def _lesser(
    one: Class, family: Family, before: Mapping[Key, Standing], after: Mapping[Key, Standing]
) -> Iterator[str]:
    """Yield the usable uplinks behind the best one, if that has just become the best."""

    def order(standings: Mapping[Key, Standing]) -> list[str]:
        segments = (*one.override, *one.normal)
        names = [name for segment in segments for name in by_preference(segment, family, standings)]
        return [name for name in names if name == MAIN or _usable(standings, name, family)]

    was, now = order(before), order(after)
    if was and now and now[0] != was[0] and was[0] in now:
        yield from (name for name in now[1:] if name != MAIN)


def _usable(standings: Mapping[Key, Standing], name: str, family: Family) -> bool:
    standing = standings.get((name, family))
    return standing is not None and standing.usable
