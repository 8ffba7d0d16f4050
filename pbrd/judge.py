"""What policies say now, and how nftables is to judge by it: the part of the plan that isn't routing.

The daemon asks `look` in every turn. What can change between two reloads are the policies in force (time
of day, slices that appear), the cgroups of units, and who takes part in balancing. When the policies change,
the classes move to another block of numbers, so that live connections are judged anew.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache

from pbrd import judging, ruleset
from pbrd.cgroups import Watch
from pbrd.classes import classify, uses_nft
from pbrd.classrules import lack_of_room
from pbrd.effective import effective, renumbered, units_of
from pbrd.errors import PbrdError
from pbrd.eviction import Eviction, classes_of, marked, pins_of
from pbrd.marks import FIRST, Numbers, marks_of, next_block, numbers_in
from pbrd.objects import KernelState, Key, Standing
from pbrd.routing import adopted_numbers
from pbrd.settings import Config
from pbrd.units import CGroup, levels_of, slice_of

Members = Mapping[str, tuple[CGroup, ...]]  # unit → its cgroups


class Judge:
    """The policies in force: `current` is the config to compile, `block` the number of its first class."""

    def __init__(
        self,
        wake: Callable[[], None],
        warn: Callable[..., object],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Without a loop it takes one look at the units and watches nothing."""
        self.wake, self.warn, self.loop = wake, warn, loop
        # Is told at once of the cgroups of units: their first packets won't wait for a turn.
        self.tell: Callable[[Members], object] = lambda _: None
        self.config = self.current = Config()
        self.names: frozenset[str] = frozenset()  # of the policies in force
        self.remembered: frozenset[str] = (
            frozenset()
        )  # uplinks of which the kernel knew when we turned to them
        self.block = FIRST
        self.used = range(0)  # the numbers that the kernel's table gives
        self.turn = 0  # counts blocks
        self.watch: Watch | None = None
        self.recycled: list[Eviction] = []  # connections that must go before the new table is live
        self.stale: list[Eviction] = []  # and those that must go after it
        self.tunnels: frozenset[int] = frozenset()  # marks of packets that carry tunnels of others
        self._levels: dict[str, tuple[int, ...]] = {}  # of units, also where they lay before
        self._minute: tuple[int, frozenset[str]] | None = None
        self._written: tuple[object, ...] | None = None
        self._text = ""

    def follow(self, config: Config, state: KernelState, table: Iterable[str]) -> Config:
        """Turn to `config`; return it with its uplinks numbered as in `state`, as far as they are there.

        `table` are the names of the chains in the kernel's table.
        """
        before = self.config
        numbers = adopted_numbers(config, state)
        self.remembered = frozenset(numbers)
        self.config = renumbered(config, numbers)
        self._watch_units()
        self._minute = None
        if before == Config():
            self.current = effective(self.config, _here(), self._slices())
            self._adopt(numbers_in(table))
        else:
            self.stale += _outlived(before, self.config)
        self.look()
        return self.config

    def _adopt(self, known: Numbers | None) -> None:
        """Go on, at a start, with the numbers that the table in the kernel gives, if it gives as many.

        Without a table, or with one that had other bits, nobody knows what connections bear.
        """
        marks, size = marks_of(self.current), len(classify(self.current).classes)
        if known is None or (known.mask, known.pins) != (marks.mask, marks.pins):
            self.recycled += marked(marks) if uses_nft(self.current) else ()
        else:
            self.used = known.used
        if len(self.used) == size:
            self.block = self.used.start
        else:
            self._next_block(self.current)

    def look(self) -> None:
        """Bring `current` up to date."""
        now = _here()
        minute = (now.hour * 60 + now.minute, self._slices())
        if minute == self._minute:
            return
        self._minute = minute
        fresh = effective(self.config, now, minute[1])
        if minute[1] and (reason := lack_of_room(fresh)):
            self.warn("no room for the slices of uplinks", reason=reason)
            fresh = effective(self.config, now, ())
        if fresh != self.current:
            if uses_nft(fresh) and _neutral(self.current) != _neutral(fresh):
                self._next_block(fresh)
            self.current = fresh
        self.names = frozenset(policy.name for policy in fresh.all_policies)

    def units_again(self) -> bool:
        """Look at the units whatever we heard of them; say whether they are others than before."""
        changed = self.watch is not None and self.watch.look()
        if changed:
            self._take_units()
        return changed

    def in_force(self) -> None:
        """Take note that the kernel's table is the one of the policies in force."""
        self.used = range(self.block, self.block + len(classify(self.current).classes))

    def judge_anew(self) -> None:
        """Give the classes other numbers: what connections bear now was made for other policies."""
        self._next_block(self.current)

    def text(self, standings: Mapping[Key, Standing]) -> str:
        """Return the nftables table that should be in force."""
        usable = frozenset[str]()
        if any(policy.balance for policy in self.current.policies):
            usable = judging.balanced(standings)
        named = _named(self.config) | _named(self.current)
        levels = {unit: self._levels[unit] for unit in sorted(named & self._levels.keys())}
        key = (self.current, self.block, levels, usable, self.tunnels)
        if key != self._written:
            self._written = key
            self._text = ruleset.text(self.current, self.block, levels, usable, self.tunnels)
        return self._text

    def slices(self) -> dict[str, tuple[int, ...]]:
        """Return the cgroups of each uplink's slice."""
        cgroups = self.watch.cgroups if self.watch else {}
        names = [uplink.name for uplink in self.config.uplinks]
        return {name: tuple(one.id for one in cgroups.get(slice_of(name), ())) for name in names}

    def close(self) -> None:
        """Stop watching units."""
        if self.watch is not None:
            if self.loop is not None:
                self.loop.remove_reader(self.watch.fileno())
            self.watch.close()
            self.watch = None

    def _next_block(self, fresh: Config) -> None:
        size = len(classify(fresh).classes)
        self.block = next_block(marks_of(fresh), size, self.used, self.turn // 2)
        self.turn += 1
        self.recycled += classes_of(fresh, self.block, size)  # of when these numbers were last in use

    def _slices(self) -> frozenset[str]:
        cgroups = self.watch.cgroups if self.watch else {}
        names = (slice_of(uplink.name) for uplink in self.config.uplinks)
        return frozenset(name for name in names if cgroups.get(name))

    def _watch_units(self) -> None:
        self.close()
        self._levels = {}
        try:
            self.watch = Watch(units_of(self.config))
        except PbrdError as error:
            if any(policy.match.unit for policy in self.config.policies):
                self.warn("policies with units can't match", reason=str(error))
            return
        if self.loop is not None:
            self.loop.add_reader(self.watch.fileno(), self._units_changed)
        self._take_units()

    def _units_changed(self) -> None:
        if self.watch is not None and self.watch.changed():
            self._take_units()
            self.wake()

    def _take_units(self) -> None:
        if self.watch is not None:
            for unit, cgroups in self.watch.cgroups.items():
                known = self._levels.get(unit) or levels_of(unit, self.watch.tree.above)
                self._levels[unit] = tuple(sorted({*known, *(one.level for one in cgroups)}))
            self.tell(self.watch.cgroups)


def _here() -> datetime:
    """Return the local time: policies go by the clock on the wall."""
    return datetime.now().astimezone()


@lru_cache(maxsize=2)
def _neutral(config: Config) -> str:
    """Return the table of `config` apart from what may change without judging anew."""
    levels = {unit: levels_of(unit) for unit in _named(config)}
    return ruleset.text(config, FIRST, levels, frozenset(uplink.name for uplink in config.uplinks))


@lru_cache(maxsize=4)
def _named(config: Config) -> frozenset[str]:
    """Return the units that policies name."""
    return frozenset(unit for policy in config.policies for unit in policy.match.unit)


def _outlived(before: Config, after: Config) -> list[Eviction]:
    """Return whose pins mean nothing any more: uplinks that are gone, or all if the fields have moved."""
    if not uses_nft(before):
        return []
    names = [uplink.name for uplink in before.uplinks]
    if marks_of(before) == marks_of(after):
        kept = {(u.name, u.index) for u in after.uplinks if u.enabled}
        names = [uplink.name for uplink in before.uplinks if (uplink.name, uplink.index) not in kept]
    return list(pins_of(before, names))
