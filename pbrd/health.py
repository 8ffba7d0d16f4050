"""Whether one family of one uplink is fit for traffic: answers, link facts and `now` in, a state out.

Theory of operation

*Rounds.* A round is one echo to each target. Rounds go out on a grid of the monotonic clock (multiples of
`interval` plus `phase`), so the cadence never drifts, never waits for answers, and uplinks with the same
interval share their wake-ups; only the first round after `path` has a time of its own. A slot missed
in a stall is skipped. A round is good once `quorum` targets have answered within `timeout`, bad if they
have not by then. Rounds are folded in the order in which they were sent: an answer that overtakes an
older round waits for it.

*Doubt.* An answer later than three times the usual one (at least 50 ms, at most `timeout`) puts the verdict
in doubt: from then on extra rounds go out each `confirm_interval`, until the uplink is down or a round
not older than the newest doubtful one is good (the doubtful one itself, answered late but in time, will
do: the path lives). So an outage lasts at most

    interval                            until the first round that it swallows is sent
    + late                              until that round is doubted
    + (fall - 1) * confirm_interval     until the last round that is needed is sent
    + timeout                           until that one is given up

*States.* STARTING believes in the uplink until probes speak. `fall` bad rounds in a row: DOWN. From there
`rise` good rounds in a row: RECOVERING, which is usable but stands behind the others, and UP when no round
was bad for `stable_for` since the first good one. Nothing is promoted while in doubt.

*Damping.* Who falls within 60 s of having come back needs twice the `rise`, then three times; that is
forgotten after 60 s of continuous use. Bounded, because an uplink that is needed must come back.

*Measures.* Streaks can't see a link that loses every other packet, so there is a window besides: loss, mean
round trip and jitter (mean absolute difference of successive round trips; RFC 3550 section 6.4.1 smooths
the same difference) above their limits make an uplink DEGRADED, and only `stable_for` of continuously fine
measures makes it UP again. Samples are the rounds of the grid: confirm rounds cluster in bad moments and
would overstate them. A measure of the uplink is that of its `quorum`-th best target, so a silent target is
not a lossy uplink. Probes younger than `timeout` are not judged, a late answer turns a loss back (but not
the verdict of its round), and samples begin anew with the streak that ends an outage.

*What is no verdict.* A round that could be sent to no target says nothing about the path: after `fall` of
them the reason is UNSENDABLE, the state stays. Nor does what was in flight while this process (or the whole
machine: a paused VM) stood still for longer than `timeout`: answers that the kernel kept are counted, with
the kernel's time, but silence proves nothing, since nobody knows whether anybody could listen.

*Link facts* come through `path` and act at once, without probes. No gateway, no probe: a bound socket
without a route would ask the neighbours for the target and take their silence for the path's.
"""

import math
from collections import deque
from collections.abc import Sequence
from enum import StrEnum

from pbrd.measures import Fate, Measures, Round, Verdict, Window, nth
from pbrd.settings import Address, Probe

LATE_FLOOR = 0.05  # seconds; below this a late answer is scheduling noise, not doubt
LATE_FACTOR = 3.0
USUAL_GAIN = 1 / 8  # of the moving average of the time to quorum, as TCP's (RFC 6298)
DAMPING_MEMORY = 60.0  # seconds of continuous use after which earlier falls are forgotten
DAMPING_BOUND = 3
STALL = 0.5  # seconds; a poll later than this and than `timeout` means that we were not there to listen
ENOUGH = 10  # resolved samples before a measure is judged, fewer if the window holds fewer
ENOUGH_FLOOR = 3


class State(StrEnum):
    """What an uplink is good for; DRAINED and DISABLED are set by the daemon, never here."""

    STARTING = "starting"
    UP = "up"
    RECOVERING = "recovering"
    DEGRADED = "degraded"
    DOWN = "down"
    DRAINED = "drained"
    DISABLED = "disabled"


class Reason(StrEnum):
    """Why the state is what it is."""

    OK = "ok"
    PROBES = "probes"
    LOSS = "loss"
    LATENCY = "latency"
    JITTER = "jitter"
    NO_CARRIER = "no-carrier"
    ADMIN_DOWN = "admin-down"
    MISSING = "missing"
    NO_GATEWAY = "no-gateway"
    DRAINED = "drained"
    BUDGET = "budget"
    DISABLED = "disabled"
    UNSENDABLE = "unsendable"


class Health:
    """One family of one uplink. Mutable, no clock, no I/O; every `now` is monotonic seconds."""

    def __init__(
        self,
        probe: Probe,
        targets: tuple[Address, ...],
        now: float,
        adopted: State = State.STARTING,
        phase: float = 0.0,
    ) -> None:
        """Begin silent, until the first `path`. `adopted` is what the kernel says of the time before us."""
        if adopted in (State.DRAINED, State.DISABLED):
            raise ValueError(f"cannot adopt a health that is {adopted}")
        self.probe = probe
        self.targets = targets
        self.state: State = State.RECOVERING if adopted is State.DEGRADED else adopted
        self.since = now
        self.transitions = 0
        self.lost = 0  # probes given up, ever
        self._why = Reason.PROBES if adopted is State.DOWN else Reason.OK
        self._phase = phase
        self._needed = min(probe.quorum, len(targets))
        self._places = {target: place for place, target in enumerate(targets)}
        self._told = False  # whether `path` was ever called
        self._link: Reason | None = None
        self._number = 0
        self._usual: float | None = None  # moving average of the time to quorum
        self._usable_since = -math.inf
        self._damping = 1
        self._forget()

    def _forget(self) -> None:
        """Begin anew with rounds, streaks and measures."""
        self._window = Window(len(self.targets), max(self.probe.window, self.probe.timeout))
        self._unfolded: deque[Round] = deque()
        self._unexpired: deque[Round] = deque()
        self._undoubted: deque[Round] = deque()  # neither answered nor late yet
        self._doubt: int | None = None  # number of the newest round that was late
        self._slot = self._confirm_at = math.inf
        self.good = self._bad = self._unsent = 0  # rounds in a row
        self._good_since: float | None = None
        self._fine_since: float | None = None

    @property
    def reason(self) -> Reason:
        """Why: that of the state, unless probes can't be sent at all."""
        return Reason.UNSENDABLE if self._unsent >= self.probe.fall else self._why

    @property
    def usable(self) -> bool:
        """Whether the default route belongs into the uplink's table."""
        return self.state in (State.STARTING, State.UP, State.RECOVERING, State.DEGRADED)

    @property
    def preferred(self) -> bool:
        """Whether the uplink's rules stand in their place, else behind the others'."""
        return self.state in (State.STARTING, State.UP)

    @property
    def deadline(self) -> float:
        """When `poll` must be called next; inf if never."""
        if self._link is not None or not self._told:
            return math.inf
        due = min(self._slot, self._ripe)
        if self._unfolded:
            due = min(due, self._unfolded[0].sent + self.probe.timeout)
        if self._undoubted:
            due = min(due, self._undoubted[0].sent + self._late)
        return due if self._doubt is None else min(due, self._confirm_at)

    def path(self, reason: Reason | None, now: float) -> None:
        """Take in the link facts: None if link and gateway are there, else why there is no way out."""
        if self._told and reason is self._link:
            return
        first, self._told, self._link = not self._told, True, reason
        self._forget()
        if reason is not None:
            self._fall(reason, now)
        elif self.targets:
            if self.state is State.DOWN:
                self._why = Reason.PROBES
            self._slot = now + (self._phase if first else 0.0)
        else:
            self._trust(now)

    def _trust(self, now: float) -> None:
        """Without targets, take link and gateway for the whole truth."""
        self._good_since = now
        if self.state is State.STARTING:
            self._enter(State.UP, Reason.OK, now)
        elif self.state is State.DOWN:
            self._recover(now)

    def poll(self, now: float) -> int | None:
        """Do what is due by time; returns the number of the round that must be sent now, if any."""
        if self._link is not None or not self._told:
            return None
        if now - self.deadline > max(STALL, self.probe.timeout):
            self._disown()
        self._doubt_late(now)
        self._expire(now)
        self._window.slide(now)
        self._settle(now)
        self._judge(now)
        return self._next_round(now)

    def answered(self, round: int, target: Address, rtt: float, now: float) -> None:
        """Take in an answer `rtt` seconds after its probe was sent; unknown or repeated ones are ignored."""
        found, place = self._window.find(round), self._places.get(target)
        if found is None or place is None:
            return
        if found.samples[place].fate not in (Fate.PENDING, Fate.LOST):
            return
        self._window.hear(found, place, rtt)
        if found.verdict is None and rtt <= self.probe.timeout:
            found.answers += 1
            found.slowest = max(found.slowest, rtt)
            if found.answers >= self._needed:
                self._prove(found)
        self._settle(now)

    def unsendable(self, round: int, target: Address, now: float) -> None:
        """Take in that a probe could not be sent: not a lost packet."""
        found, place = self._window.find(round), self._places.get(target)
        if found is None or place is None or found.verdict is not None:
            return
        found.samples[place].fate = Fate.UNSENT
        if all(sample.fate is Fate.UNSENT for sample in found.samples):
            found.verdict = Verdict.UNSENT
        self._settle(now)

    def measures(self) -> Measures:
        """Return the measures as of the last poll."""
        return self._window.measures(self.targets, self._needed)

    # What time does to rounds

    @property
    def _late(self) -> float:
        usual = 0.0 if self._usual is None else self._usual
        return min(self.probe.timeout, max(LATE_FLOOR, LATE_FACTOR * usual))

    def _disown(self) -> None:
        """Take back what was in flight while nobody listened."""
        for round_ in self._unfolded:
            if round_.verdict is None:
                round_.verdict = Verdict.UNHEARD
        self._unexpired.clear()
        self._doubt = None

    def _doubt_late(self, now: float) -> None:
        late = self._late
        while self._undoubted and self._undoubted[0].sent + late <= now:
            round_ = self._undoubted.popleft()
            if round_.verdict is not None or self.state is State.DOWN:
                continue
            if self._doubt is None:
                step = self.probe.confirm_interval or math.inf
                self._confirm_at = round_.sent + late + step
            self._doubt = round_.number

    def _expire(self, now: float) -> None:
        while self._unexpired and self._unexpired[0].sent + self.probe.timeout <= now:
            round_ = self._unexpired.popleft()
            if round_.verdict is None:
                round_.verdict = Verdict.BAD
            self.lost += self._window.miss(round_)

    def _next_round(self, now: float) -> int | None:
        regular = now >= self._slot
        confirm = self._doubt is not None and now >= self._confirm_at
        if not regular and not confirm:
            return None
        if regular:
            self._slot = self._slot_after(now)
        if confirm:
            step = self.probe.confirm_interval
            self._confirm_at = self._confirm_at + step if self._confirm_at + step > now else now + step
        self._number += 1
        round_ = Round(self._number, now, regular, len(self.targets))
        self._window.add(round_)
        for queue in (self._unfolded, self._unexpired, self._undoubted):
            queue.append(round_)
        return self._number

    def _slot_after(self, now: float) -> float:
        """Return the first point of the grid after `now`, counted from zero so that errors don't add up."""
        interval = self.probe.interval
        slot = (math.floor((now - self._phase) / interval) + 1) * interval + self._phase
        return slot if slot > now else slot + interval

    # What rounds do to the state

    def _prove(self, round_: Round) -> None:
        round_.verdict = Verdict.GOOD
        if self._usual is None:
            self._usual = round_.slowest
        self._usual += (round_.slowest - self._usual) * USUAL_GAIN
        if self._doubt is not None and round_.number >= self._doubt:
            self._doubt = None

    def _settle(self, now: float) -> None:
        """Fold what is decided, judge the measures, and promote."""
        while self._undoubted and self._undoubted[0].verdict is not None:
            self._undoubted.popleft()
        while self._unfolded and self._unfolded[0].verdict is not None:
            self._fold(self._unfolded.popleft(), now)
        if now >= self._ripe:
            self._enter(State.UP, Reason.OK, now)

    @property
    def _ripe(self) -> float:
        """When the uplink will be UP if nothing happens until then."""
        if self._doubt is not None or self._unsent:
            return math.inf
        if self.state is State.RECOVERING and self._good_since is not None:
            return self._good_since + self.probe.stable_for
        if self.state is State.DEGRADED and self._fine_since is not None:
            return self._fine_since + self.probe.stable_for
        return math.inf

    def _fold(self, round_: Round, now: float) -> None:
        if round_.verdict is Verdict.UNSENT:
            self._unsent += 1
            if self._unsent >= self.probe.fall:
                self._doubt = None  # more of the same confirms nothing
        elif round_.verdict is Verdict.GOOD:
            self._fold_good(round_, now)
        elif round_.verdict is Verdict.BAD:
            self._unsent = self.good = 0
            self._good_since = None
            self._bad += 1
            if self._bad >= self.probe.fall and self.state is not State.DOWN:
                self._fall(Reason.PROBES, now)

    def _fold_good(self, round_: Round, now: float) -> None:
        self._unsent = self._bad = 0
        self.good += 1
        if self._good_since is None:
            self._good_since = round_.sent
        if self.state is State.STARTING:
            self._enter(State.UP, Reason.OK, now)
        elif self.state is State.DOWN:
            if self.good == 1:
                self._window.begin_at(round_.number)  # the outage's losses are not the healed uplink's
            if self.good >= self.probe.rise * self._damping:
                self._recover(now)

    def _fall(self, reason: Reason, now: float) -> None:
        if self.state is not State.DOWN:
            again = now - self._usable_since <= DAMPING_MEMORY
            self._damping = min(self._damping + 1, DAMPING_BOUND) if again else 1
        self._enter(State.DOWN, reason, now)
        self._doubt = None
        self.good = self._bad = 0
        self._good_since = None
        self._window.break_off()

    def _recover(self, now: float) -> None:
        self._usable_since = now
        stable = self._good_since is not None and now >= self._good_since + self.probe.stable_for
        _, complaint = self._complaint()
        if complaint is not None:
            self._enter(State.DEGRADED, complaint, now)
        else:
            self._enter(State.UP if stable else State.RECOVERING, Reason.OK, now)

    def _judge(self, now: float) -> None:
        """Compare the measures with their limits; with too few samples the last judgement stands."""
        if self.state not in (State.UP, State.RECOVERING, State.DEGRADED):
            return
        judged, complaint = self._complaint()
        if complaint is not None:
            self._fine_since = None
            self._enter(State.DEGRADED, complaint, now)
        elif judged and self._fine_since is None:
            self._fine_since = now

    def _complaint(self) -> tuple[bool, Reason | None]:
        """Return whether there are samples enough, and what is wrong with them."""
        probe = self.probe
        enough = max(ENOUGH_FLOOR, min(ENOUGH, int(probe.window / probe.interval)))
        tallies = self._window.resolved(enough)
        if len(tallies) < max(self._needed, 1):
            return False, None
        if self._above(probe.max_loss, [tally.loss for tally in tallies]):
            return True, Reason.LOSS
        if probe.max_latency and self._above(probe.max_latency, [tally.rtt for tally in tallies]):
            return True, Reason.LATENCY
        if probe.max_jitter and self._above(probe.max_jitter, [tally.jitter for tally in tallies]):
            return True, Reason.JITTER
        return True, None

    def _above(self, limit: float, values: Sequence[float | None]) -> bool:
        """Whether a measure of the uplink is above its limit; 0 is none."""
        value = nth(values, self._needed)
        return limit > 0 and value is not None and value > limit

    def _enter(self, state: State, why: Reason, now: float) -> None:
        self._why = why
        if state is not self.state:
            self.state = state
            self.since = now
            self.transitions += 1
            self._fine_since = None
