"""The bits of the packet mark that are pbrd's, and what they say where nftables is in use.

    fwmark_mask   0xff000000 with three uplinks
    pin           0x07000000   the uplink that a live connection stays on: its number from 1, 0 is none
    class         0xf8000000   what the policies decided for the connection: 0 nothing yet, 1 it came in
                               from outside, then `classes`; all bits are the mark of probes

The mark of a connection (ct mark) holds the same, in the same bits.
"""

from dataclasses import dataclass

from pbrd.settings import Config, Mark, Uplink

USUAL_PINS, ROOMY = 3, 8  # bits for pins, in masks of at least so many bits
INBOUND = 1  # class of connections that came in by an uplink: policies don't judge them
FIRST = 2  # the first class that policies may have


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


def blocks_of(config: Config, classes: int) -> tuple[int, ...]:
    """Return the first numbers of the disjoint blocks of `classes` that the mask has room for.

    When the policies change their classes get the numbers of another block, so that connections that
    were judged before are judged anew. () if there is no room for one.
    """
    return tuple(range(FIRST, FIRST + marks_of(config).room - classes + 1, classes))
