"""What probes of one uplink amount to: rounds and their samples, and sums over a sliding window.

Samples are kept apart from verdicts, because a late answer turns a loss back but not the verdict of
its round. All sums are integers (nanoseconds), so that what is added for weeks and taken out
again leaves no remainder. `health` says what follows from all this.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from pbrd.settings import Address


@dataclass(frozen=True, slots=True)
class TargetMeasures:
    """One target over the window; `rtt` in seconds, None before any answer; `loss` a ratio."""

    address: Address
    answering: bool
    rtt: float | None
    loss: float


@dataclass(frozen=True, slots=True)
class Measures:
    """The uplink over the window: its `quorum`-th best target; seconds, and a ratio."""

    rtt: float | None
    jitter: float | None
    loss: float
    targets: tuple[TargetMeasures, ...]


class Verdict(Enum):
    """What a round says about the path; the last two say nothing."""

    GOOD = auto()
    BAD = auto()
    UNSENT = auto()  # no target could be sent to
    UNHEARD = auto()  # we were not there to hear the answers


class Fate(Enum):
    """What became of one probe; LOST may still become HEARD."""

    PENDING = auto()
    HEARD = auto()
    LOST = auto()
    UNSENT = auto()


class Sample:
    """One probe of one target; times in integer nanoseconds, so that sums over a window never drift."""

    __slots__ = ("diff", "fate", "rtt")

    def __init__(self) -> None:
        self.fate = Fate.PENDING
        self.rtt = 0
        self.diff: int | None = None


class Round:
    """One echo to each target."""

    __slots__ = ("answers", "number", "regular", "samples", "sent", "slowest", "verdict")

    def __init__(self, number: int, sent: float, regular: bool, targets: int) -> None:
        self.number = number
        self.sent = sent
        self.regular = regular  # on the grid, thus a sample; else a confirm round
        self.samples = tuple(Sample() for _ in range(targets))
        self.answers = 0  # in time
        self.slowest = 0.0  # seconds
        self.verdict: Verdict | None = None


class Tally:
    """Sums over the samples of one target that lie in the window."""

    __slots__ = ("answering", "diff_sum", "diffs", "last", "lost", "resolved", "rtt_sum")

    def __init__(self) -> None:
        self.resolved = self.lost = self.rtt_sum = self.diffs = self.diff_sum = 0
        self.last: int | None = None  # the round trip before, for the jitter
        self.answering = False

    def hear(self, sample: Sample, rtt: int) -> None:
        """Count an answer, taking back the loss if it was given up before."""
        if sample.fate is Fate.LOST:
            self.lost -= 1
        else:
            self.resolved += 1
        sample.rtt = rtt
        self.rtt_sum += rtt
        if self.last is not None:
            sample.diff = abs(rtt - self.last)
            self.diff_sum += sample.diff
            self.diffs += 1
        self.last = rtt

    def miss(self) -> None:
        """Count a loss."""
        self.resolved += 1
        self.lost += 1

    def drop(self, sample: Sample) -> None:
        """Take out a sample that left the window."""
        if sample.fate is Fate.LOST:
            self.lost -= 1
        elif sample.fate is not Fate.HEARD:
            return
        self.resolved -= 1
        self.rtt_sum -= sample.rtt
        if sample.diff is not None:
            self.diff_sum -= sample.diff
            self.diffs -= 1

    @property
    def loss(self) -> float:
        """Ratio of the resolved samples; 0 without any."""
        return self.lost / self.resolved if self.resolved else 0.0

    @property
    def rtt(self) -> float | None:
        """Mean round trip in seconds."""
        heard = self.resolved - self.lost
        return self.rtt_sum / heard / 1e9 if heard else None

    @property
    def jitter(self) -> float | None:
        """Mean absolute difference of successive round trips in seconds."""
        return self.diff_sum / self.diffs / 1e9 if self.diffs else None


class Window:
    """The rounds of the last `span` seconds, found by number, and what they amount to."""

    def __init__(self, targets: int, span: float) -> None:
        self.tallies = tuple(Tally() for _ in range(targets))
        self._span = span
        self._rounds: deque[Round] = deque()  # consecutive numbers

    def add(self, round_: Round) -> None:
        """Append a round that is being sent; its number follows the one before."""
        self._rounds.append(round_)

    def find(self, number: int) -> Round | None:
        """Return the round with this number, unless it left the window."""
        place = number - self._rounds[0].number if self._rounds else -1
        return self._rounds[place] if 0 <= place < len(self._rounds) else None

    def hear(self, round_: Round, place: int, rtt: float) -> None:
        """Count the answer of the target at `place`, after `rtt` seconds."""
        sample, tally = round_.samples[place], self.tallies[place]
        if round_.regular:
            tally.hear(sample, round(rtt * 1e9))
        sample.fate = Fate.HEARD
        tally.answering = True

    def miss(self, round_: Round) -> int:
        """Give up what is still pending in a round; returns how many probes that are."""
        lost = 0
        for sample, tally in zip(round_.samples, self.tallies, strict=True):
            if sample.fate is Fate.PENDING:
                sample.fate = Fate.LOST
                tally.answering = False
                lost += 1
                if round_.regular:
                    tally.miss()
        return lost

    def slide(self, now: float) -> None:
        """Drop what is older than the window."""
        while self._rounds and self._rounds[0].sent <= now - self._span:
            self._drop()

    def begin_at(self, number: int) -> None:
        """Drop all that was sent before round `number`."""
        while self._rounds and self._rounds[0].number < number:
            self._drop()

    def _drop(self) -> None:
        gone = self._rounds.popleft()
        if gone.regular:
            for sample, tally in zip(gone.samples, self.tallies, strict=True):
                tally.drop(sample)

    def break_off(self) -> None:
        """Compare no round trip with one from before an outage."""
        for tally in self.tallies:
            tally.last = None

    def resolved(self, least: int) -> list[Tally]:
        """Return the targets of which at least so many samples are known."""
        return [tally for tally in self.tallies if tally.resolved >= least]

    def measures(self, targets: tuple[Address, ...], rank: int) -> Measures:
        """Say it in seconds and ratios: the `rank`-th best of each measure, and each target's own."""
        return Measures(
            nth([tally.rtt for tally in self.tallies], rank),
            nth([tally.jitter for tally in self.tallies], rank),
            nth([tally.loss for tally in self.tallies], rank) or 0.0,
            tuple(
                TargetMeasures(address, tally.answering, tally.rtt, tally.loss)
                for address, tally in zip(targets, self.tallies, strict=True)
            ),
        )


def nth(values: Sequence[float | None], rank: int) -> float | None:
    """Return the `rank`-th smallest (1 is the smallest) of those that are known, None if there is none."""
    known = sorted(value for value in values if value is not None)
    return known[rank - 1] if 1 <= rank <= len(known) else None
