"""The bits of the packet mark that are pbrd's, and what they say where nftables is in use.

    fwmark_mask   0xff000000 with three uplinks
    pin           0x07000000   the uplink that a live connection stays on: its number from 1, 0 is none
    class         0xf8000000   what the policies decided for the connection: 0 nothing yet, 1 it came in
                               from outside, then `classes`; all bits are the mark of probes

The mark of a connection (ct mark) holds the same, in the same bits. Two more numbers of classes have a
meaning: of a packet, 2 that it came by the uplink of its pin and is nothing to judge; of a connection, all
bits of the class and no pin that it must end.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pbrd.settings import Config, Mark, Uplink

USUAL_PINS, ROOMY = 3, 8  # bits for pins, in masks of at least so many bits
INBOUND = 1  # class of connections that came in by an uplink: policies don't judge them
ARRIVED = 2  # class of packets that came by an uplink: for the kernel's look whether they came the right way
FIRST = 3  # the first class that policies may have


@dataclass(frozen=True, slots=True)
class Marks:
    """The two fields of a mask; both are masks themselves."""

    mask: int
    pins: int
    classes: int

    @property
    def probe(self) -> Mark:
        """The mark of probes: all bits."""
        return Mark(self.mask, self.mask)

    @property
    def gone(self) -> int:
        """The mark of connections that must end: where they go now they can't be masqueraded."""
        return self.classes

    @property
    def room(self) -> int:
        """How many classes there are for policies: the numbers from FIRST up, without that of probes."""
        return self.classes // (self.classes & -self.classes) - FIRST if self.classes else 0

    def pin(self, number: int) -> int:
        """Return the bits that say uplink `number` (from 1)."""
        return number * (self.pins & -self.pins)

    def class_(self, number: int) -> int:
        """Return the bits that say class `number`."""
        return number * (self.classes & -self.classes)


def marks_of(config: Config) -> Marks:
    """Return the fields for the uplinks of `config`: the bits that number them, the rest for classes.

    There is room for seven uplinks from the start if the mask allows it, because when the fields change
    all live connections must begin anew.
    """
    mask = config.daemon.fwmark_mask
    highest = max((uplink.index for uplink in config.uplinks), default=0) + 1
    bits = max(highest.bit_length(), USUAL_PINS if mask.bit_count() >= ROOMY else 1)
    pins = ((1 << bits) - 1) * (mask & -mask) & mask
    return Marks(mask, pins, mask & ~pins)


def pin_of(marks: Marks, uplink: Uplink) -> int:
    """Return the bits that pin a connection to `uplink`."""
    return marks.pin(uplink.index + 1)


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of classes that a table gives: `size` of them from `block` up, in these fields."""

    block: int
    size: int
    mask: int
    pins: int

    def __str__(self) -> str:
        """The name of a chain that tells them to whoever finds the table."""
        return f"classes_{self.block}_{self.size}_{self.mask:x}_{self.pins:x}"

    @property
    def used(self) -> range:
        """The numbers."""
        return range(self.block, self.block + self.size)


def numbers_in(names: Iterable[str]) -> Numbers | None:
    """Return what the names of a table's chains tell; None if they don't."""
    for name in names:
        if found := re.fullmatch(r"classes_(\d+)_(\d+)_([0-9a-f]+)_([0-9a-f]+)", name):
            return Numbers(int(found[1]), int(found[2]), int(found[3], 16), int(found[4], 16))
    return None


def next_block(marks: Marks, size: int, used: range, turn: int) -> int:
    """Return the first of `size` numbers for other policies than those that gave the numbers `used`.

    Connections that were judged before bear those, and are judged anew because they do. The room has two
    halves, and a block lies in one of them: in the other there is always place. `turn` counts, so that
    numbers come round again as late as can be: those who still bear them then must be forgotten.
    """
    half = marks.room // 2
    starts = (FIRST, FIRST + half)
    start = next((n for n in starts if used.stop <= n or n + half <= used.start), FIRST)
    return start + turn % max(1, half // size) * size
