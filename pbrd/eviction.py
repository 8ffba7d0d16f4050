"""Whose connections must be forgotten after a change of health, so that they begin anew elsewhere.

A NATed connection keeps the address of the uplink on which it began, so one on a dead uplink can't move: it
must end, and soon. But nothing else: connections of other uplinks, those that came in from outside, and
those which nobody else could take stay as they are (pfsense and opnsense learned each of these apart).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pbrd.classes import Class, classify, uses_nft
from pbrd.marks import marks_of, pin_of
from pbrd.objects import Key, Standing
from pbrd.rules import by_preference, has_family, is_drained
from pbrd.settings import MAIN, Config, Failback, Fallback, Family


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
    marks = marks_of(config)
    found = []
    for family in Family:
        for place, one in enumerate(_ways(config)):
            for name in _leaving(config, one, family, before, after):
                pin = pin_of(marks, config.uplink(name))
                found.append(Eviction(family, marks.class_(block + place) | pin, marks.mask))
    return tuple(found)


def stranded(before: Mapping[Key, Standing], after: Mapping[Key, Standing]) -> list[Key]:
    """Return what has gone down while another uplink of the family could take the connections."""
    takers = {key[1] for key, standing in after.items() if standing.usable and not standing.drained}
    was = {key for key, standing in before.items() if standing.usable}
    return [key for key, standing in after.items() if key in was and not standing.usable and key[1] in takers]


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


def _ways(config: Config) -> Iterator[Class]:
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
    usable = [name for name in names if _usable(after, name, family)]
    takers = any(not is_drained(name, family, after) for name in usable) or MAIN in one.uplinks
    for name in names:
        if _usable(before, name, family) and name not in usable and takers:
            yield name
    if one.failback is Failback.IMMEDIATE:
        yield from _lesser(one, family, before, after)


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
