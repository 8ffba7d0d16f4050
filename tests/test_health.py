"""Health read from strip charts: "." is an answered round, "x" a lost one, "u" one that can't be sent."""

import math
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pbrd.health import Health, Reason, State
from pbrd.settings import Address, Probe

A, B = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
CALM = Probe(targets=(A,), fall=3, rise=2, stable_for=0, confirm_interval=0, max_loss=0, timeout=0.9)
Answers = Callable[[float, Address], float | None]  # send time, target → round trip, or None if it is lost


class World:
    """Drives a health on simulated time; `answers` says what becomes of each probe."""

    def __init__(self, health: Health, answers: Answers, now: float = 0.0) -> None:
        self.health, self.answers, self.now = health, answers, now
        self.replies: list[tuple[float, int, Address, float]] = []
        self.sent: list[float] = []
        self.story: list[tuple[float, State]] = [(now, health.state)]
        self.unsendable = False

    def run(self, until: float) -> None:
        while True:
            event = min([self.health.deadline, *(reply[0] for reply in self.replies)])
            if event > until:
                break
            assert event >= self.now, "a deadline lies in the past: this would spin"
            self.now = event
            self.step()
        self.now = until

    def step(self) -> None:
        due = sorted(reply for reply in self.replies if reply[0] <= self.now)
        self.replies = [reply for reply in self.replies if reply[0] > self.now]
        for _, number, target, rtt in due:
            self.health.answered(number, target, rtt, self.now)
        while (number_ := self.health.poll(self.now)) is not None:
            self.send(number_)
        if self.health.state is not self.story[-1][1]:
            self.story.append((self.now, self.health.state))

    def send(self, number: int) -> None:
        self.sent.append(self.now)
        for target in self.health.targets:
            rtt = self.answers(self.now, target)
            if self.unsendable:
                self.health.unsendable(number, target, self.now)
            elif rtt is not None:
                self.replies.append((self.now + rtt, number, target, rtt))

    @property
    def states(self) -> list[State]:
        return [state for _, state in self.story]


def state_of(health: Health) -> State:
    """Return the state as if mypy had never seen it before."""
    return health.state


def always(rtt: float) -> Answers:
    return lambda sent, target: rtt


def begun(probe: Probe, answers: Answers, adopted: State = State.STARTING) -> World:
    world = World(Health(probe, probe.targets, 0.0, adopted), answers)
    world.health.path(None, 0.0)
    return world


def chart(probes: str, probe: Probe = CALM, adopted: State = State.STARTING) -> World:
    """Play one round a second; ends just before the round after the last would be sent."""
    world = begun(probe, lambda sent, _: 0.01 if probes[int(sent)] == "." else None, adopted)
    for second, mark in enumerate(probes):
        world.unsendable = mark == "u"
        world.run(second + 0.95)
    return world


@pytest.mark.parametrize(
    ("probes", "state"),
    [
        (".", State.UP),
        ("..xx.xx", State.UP),
        ("..xxx", State.DOWN),
        ("..xxx.", State.DOWN),
        ("..xxx..", State.UP),
        ("..xxx.x.", State.DOWN),
        ("..xxx.x..", State.UP),
        ("x", State.STARTING),
        ("xx", State.STARTING),
        ("xx.", State.UP),
        ("xxx", State.DOWN),
        ("xxx..xx", State.UP),
        ("xxx..xxx", State.DOWN),
    ],
)
def test_uplink_changes_only_after_enough_probes_in_a_row(probes: str, state: State) -> None:
    assert chart(probes).health.state is state


@pytest.mark.parametrize(
    ("probes", "state"),
    [
        ("xxx..", State.RECOVERING),
        ("xxx......", State.RECOVERING),
        ("xxx.......", State.UP),  # first good round at 3, stable for 6
        ("xxx....x.", State.RECOVERING),
        ("xxx....x......", State.RECOVERING),  # the clock began anew at 8
        ("xxx....x.......", State.UP),
        ("xxx....xx.xxx", State.DOWN),
    ],
)
def test_recovering_uplink_is_up_only_when_it_was_stable(probes: str, state: State) -> None:
    assert chart(probes, replace(CALM, stable_for=6.0)).health.state is state


def test_uplink_that_was_stable_while_it_rose_is_up_at_once() -> None:
    world = chart("xxx.....", replace(CALM, rise=5, stable_for=3.5))
    assert world.states == [State.STARTING, State.DOWN, State.UP]
    assert world.health.transitions == 2


@pytest.mark.parametrize(
    ("adopted", "probes", "states"),
    [
        (State.STARTING, "..", [State.STARTING, State.UP]),
        (State.UP, "..", [State.UP]),
        (State.UP, "xxx", [State.UP, State.DOWN]),
        (State.DOWN, "x", [State.DOWN]),
        (State.DOWN, "....", [State.DOWN, State.RECOVERING, State.UP]),
        (State.RECOVERING, "..", [State.RECOVERING]),
        (State.RECOVERING, "....", [State.RECOVERING, State.UP]),
        (State.RECOVERING, "x...", [State.RECOVERING]),
        (State.RECOVERING, "xxx", [State.RECOVERING, State.DOWN]),
        (State.DEGRADED, "....", [State.RECOVERING, State.UP]),
    ],
)
def test_what_the_kernel_holds_is_adopted(adopted: State, probes: str, states: list[State]) -> None:
    assert chart(probes, replace(CALM, stable_for=3.0), adopted).states == states


@pytest.mark.parametrize(
    ("state", "usable", "preferred"),
    [
        (State.STARTING, True, True),
        (State.UP, True, True),
        (State.RECOVERING, True, False),
        (State.DOWN, False, False),
    ],
)
def test_state_says_whether_traffic_is_welcome(state: State, usable: bool, preferred: bool) -> None:
    health = Health(CALM, CALM.targets, 0.0, state)
    assert (health.usable, health.preferred) == (usable, preferred)


# Outages


EPSILON = 1e-6


@st.composite
def probes(draw: st.DrawFn) -> Probe:
    interval = draw(st.sampled_from([0.2, 0.5, 1.0, 3.0, 10.0]))
    confirm = draw(st.sampled_from([share for share in (0.05, 0.2, 0.33, 1.0) if share <= interval]))
    return Probe(
        targets=draw(st.sampled_from([(A,), (A, B)])),
        interval=interval,
        timeout=draw(st.sampled_from([0.03, 0.1, 0.4, 1.0, 4.0])),
        confirm_interval=confirm,
        fall=draw(st.integers(1, 6)),
        quorum=draw(st.integers(1, 2)),
        max_loss=draw(st.sampled_from([0.0, 0.2])),
    )


@given(probes(), st.floats(0.0, 0.3), st.floats(0.0, 1.0), st.floats(0.0, 50.0), st.booleans())
@example(Probe(targets=(A,)), 0.01, 0.0, 20.0, True)
@example(Probe(targets=(A,), timeout=0.03), 0.01, 0.0, 20.0, True)
@example(Probe(targets=(A,), fall=1), 0.01, 0.5, 20.0, False)
def test_no_outage_is_longer_than_the_bound(
    probe: Probe, rtt: float, phase: float, death: float, swallows: bool
) -> None:
    rtt = min(rtt, probe.timeout * 0.9)
    start = 1000.0 + phase

    def answers(sent: float, target: Address) -> float | None:
        gone = sent + rtt >= death + start if swallows else sent >= death + start
        return None if gone else rtt

    world = World(Health(probe, probe.targets, start, State.UP, phase * probe.interval), answers, start)
    world.health.path(None, start)
    late = min(probe.timeout, max(0.05, 3 * rtt))
    bound = probe.interval + late + (probe.fall - 1) * probe.confirm_interval + probe.timeout
    world.run(start + death)
    assert state_of(world.health) in (State.UP, State.DEGRADED)
    begun_early = probe.interval if death < probe.interval else 0.0  # the first round waits for its phase
    world.run(start + death + bound + begun_early + EPSILON)
    assert state_of(world.health) is State.DOWN
    assert world.health.reason is Reason.PROBES


@given(st.floats(20.0, 30.0))
def test_defaults_detect_within_their_bound(death: float) -> None:
    world = begun(Probe(targets=(A,)), lambda sent, _: 0.011 if sent < death else None)
    world.run(60.0)
    assert world.states == [State.STARTING, State.UP, State.DOWN]
    assert world.story[-1][0] - death <= 2.45 + EPSILON


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.sampled_from([0.01, 0.2, 0.8, 2.5, None])), max_size=30))
def test_whatever_happens_the_health_never_spins_and_forgets_nothing(
    weather: list[tuple[float, float | None]],
) -> None:
    probe = Probe(targets=(A, B), timeout=1.0, stable_for=3.0, max_latency=0.3, max_jitter=0.1, window=8.0)
    spans = [(sum(span for span, _ in weather[: place + 1]), rtt) for place, (_, rtt) in enumerate(weather)]
    world = begun(probe, lambda sent, _: next((rtt for end, rtt in spans if sent < end), 0.01))
    world.run(sum(span for span, _ in weather) + 120.0)
    assert state_of(world.health) is State.UP
    assert world.health.measures().loss == 0.0
    assert world.health.measures().jitter == pytest.approx(0.0, abs=1e-8)
    assert world.health.transitions == len(world.story) - 1


def test_a_late_answer_brings_confirm_rounds_until_a_later_one_is_good() -> None:
    world = begun(Probe(targets=(A,)), lambda sent, _: None if 4.9 < sent < 5.3 else 0.01)
    world.run(6.9)
    assert [sent for sent in world.sent if sent >= 4.9] == pytest.approx([5.0, 5.25, 5.45, 6.0])
    assert state_of(world.health) is State.UP


def test_an_idle_uplink_costs_one_round_an_interval() -> None:
    world = begun(Probe(targets=(A,)), always(0.01))
    world.run(100.5)
    assert world.sent == pytest.approx([float(second) for second in range(101)])


def test_no_confirm_rounds_when_down_or_turned_off() -> None:
    down = begun(Probe(targets=(A,)), lambda sent, _: None, State.DOWN)
    off = begun(Probe(targets=(A,), confirm_interval=0, fall=99), lambda sent, _: None)
    for world in (down, off):
        world.run(5.5)
        assert world.sent == pytest.approx([0, 1, 2, 3, 4, 5])


def test_a_path_that_became_slow_for_good_is_not_doubted_for_ever() -> None:
    world = begun(Probe(targets=(A,)), lambda sent, _: 0.01 if sent < 10 else 0.25)
    world.run(60.5)
    assert world.states == [State.STARTING, State.UP]
    assert [sent for sent in world.sent if sent > 40] == pytest.approx([float(at) for at in range(41, 61)])


def test_answers_that_overtake_are_folded_in_the_order_of_sending() -> None:
    health = Health(replace(CALM, timeout=3.0, rise=1), (A,), 0.0, State.DOWN)
    health.path(None, 0.0)
    assert [health.poll(at) for at in (0.0, 1.0)] == [1, 2]
    health.answered(2, A, 0.01, 1.01)
    assert state_of(health) is State.DOWN  # round 1 may yet be good or bad
    health.answered(1, A, 1.5, 1.5)
    assert state_of(health) is State.UP


# Damping


@pytest.mark.parametrize(
    ("probes", "state"),
    [
        ("." * 70 + "xxx..", State.UP),  # the first fall costs nothing extra
        ("xxx..xxx...", State.DOWN),
        ("xxx..xxx....", State.UP),  # the second within a minute: twice
        ("xxx..xxx....xxx.....", State.DOWN),
        ("xxx..xxx....xxx......", State.UP),  # the third: three times
        ("xxx..xxx....xxx......xxx......", State.UP),  # and no more than that
        ("xxx.." + "." * 62 + "xxx..", State.UP),  # forgotten after a minute in use
    ],
)
def test_uplink_that_flaps_must_show_more(probes: str, state: State) -> None:
    assert chart(probes).health.state is state


def test_carrier_flaps_are_damped_too() -> None:
    world = chart("...")
    for _ in range(3):
        world.health.path(Reason.NO_CARRIER, world.now)
        world.health.path(None, world.now)
        world.answers = always(0.01)
        world.run(world.now + 20.0)
    assert state_of(world.health) is State.UP
    recovered = [at for at, state in world.story if state is State.UP][1:]
    assert recovered == pytest.approx([3.01, 25.01, 47.01])  # after 2, 4 and 6 rounds, the first one at once


# Measures


JUDGED = Probe(
    targets=(A,), timeout=0.9, window=20, stable_for=5, confirm_interval=0, max_loss=0.2, max_latency=0.1
)


def test_an_alternating_link_does_not_look_healthy() -> None:
    world = chart(".x" * 20, JUDGED)
    assert (world.health.state, world.health.reason) == (State.DEGRADED, Reason.LOSS)
    assert world.health.usable
    assert not world.health.preferred
    assert world.story[-1][0] <= 11.0
    assert world.health.measures().loss == pytest.approx(0.5)


def test_nothing_is_judged_by_a_handful_of_samples() -> None:
    assert chart("x.x.x.x.", JUDGED).health.state is State.UP


def test_degraded_uplink_is_up_only_after_fine_measures_without_a_break() -> None:
    world = chart("." * 15 + "xx.xx.xx." + "." * 40, JUDGED)
    assert world.states == [State.STARTING, State.UP, State.DEGRADED, State.UP]
    degraded, healed = world.story[-2][0], world.story[-1][0]
    assert degraded == pytest.approx(20.0)  # the fourth of 19, the 20th is under way
    assert healed == pytest.approx(37.01 + 5.0)  # since then never above 4 of 20


def test_slow_uplink_is_degraded_by_its_mean_and_says_why() -> None:
    world = begun(JUDGED, lambda sent, _: 0.01 if sent < 20 else 0.3)
    world.run(60.0)
    assert (world.health.state, world.health.reason) == (State.DEGRADED, Reason.LATENCY)
    assert world.health.measures().rtt == pytest.approx(0.3)


def test_jitter_is_the_mean_difference_of_successive_round_trips() -> None:
    probe = replace(JUDGED, max_latency=0.0, max_jitter=0.02)
    world = begun(probe, lambda sent, _: 0.01 if int(sent) % 2 else 0.04)
    world.run(30.5)
    assert world.health.measures().jitter == pytest.approx(0.03)
    assert (world.health.state, world.health.reason) == (State.DEGRADED, Reason.JITTER)


def test_limits_of_zero_are_not_judged() -> None:
    world = chart(".x" * 30, replace(JUDGED, max_loss=0.0, max_latency=0.0))
    assert state_of(world.health) is State.UP


def test_an_outage_does_not_degrade_the_healed_uplink() -> None:
    world = chart("." * 10 + "x" * 10 + "." * 20, JUDGED)
    assert world.states == [State.STARTING, State.UP, State.DOWN, State.RECOVERING, State.UP]
    assert world.health.measures().loss == 0.0


def test_a_late_answer_turns_the_loss_back_but_not_the_verdict() -> None:
    world = begun(replace(JUDGED, fall=99, max_latency=0), lambda sent, _: 1.7)
    world.run(30.0)
    assert state_of(world.health) is State.STARTING  # no round was ever good
    measures = world.health.measures()
    assert measures.loss <= 1 / 18  # the youngest may be given up and not yet answered
    assert measures.rtt == pytest.approx(1.7)


def test_probes_under_way_are_not_lost() -> None:
    world = begun(replace(JUDGED, timeout=5.0), lambda sent, _: None)
    world.run(4.9)
    assert world.health.measures().loss == 0.0
    world.run(5.1)
    assert world.health.measures().loss == 1.0


def test_one_silent_target_is_neither_a_lossy_nor_a_dead_uplink() -> None:
    probe = replace(JUDGED, targets=(A, B), confirm_interval=0.2)
    world = begun(probe, lambda sent, target: 0.01 if target == B else None)
    world.run(60.5)
    assert state_of(world.health) is State.UP
    assert len(world.sent) == 61
    measures = world.health.measures()
    assert measures.loss == 0.0
    assert measures.rtt == pytest.approx(0.01)
    silent, fine = measures.targets
    assert (silent.address, silent.answering, silent.rtt, silent.loss) == (A, False, None, 1.0)
    assert (fine.address, fine.answering, fine.loss) == (B, True, 0.0)


@pytest.mark.parametrize(("quorum", "state"), [(1, State.UP), (2, State.DOWN), (9, State.DOWN)])
def test_quorum_is_how_many_targets_must_answer_and_at_most_all(quorum: int, state: State) -> None:
    probe = replace(JUDGED, targets=(A, B), quorum=quorum, max_loss=0.0)
    world = begun(probe, lambda sent, target: 0.01 if target == B else None)
    world.run(10.0)
    assert world.health.state is state


def test_a_long_life_needs_no_more_memory_and_leaves_no_remainder() -> None:
    probe = Probe(targets=(A,), interval=0.05, window=5.0, timeout=1.0)
    world = begun(probe, lambda sent, _: 0.01 + sent % 0.0007)
    world.run(2000.0)
    world.answers = always(0.02)
    world.run(2006.0)
    assert world.health.measures().rtt == pytest.approx(0.02, abs=1e-12)
    assert world.health.measures().jitter == 0.0
    assert len(world.health._window._rounds) <= 101


# What is no verdict


def test_unsendable_rounds_are_no_verdict_but_a_reason() -> None:
    world = chart("..uu")
    assert (world.health.state, world.health.reason) == (State.UP, Reason.OK)
    world = chart("..uuuuuu")
    assert (world.health.state, world.health.reason) == (State.UP, Reason.UNSENDABLE)
    assert world.health.measures().loss == 0.0
    world = chart("..uuuuuu.")
    assert (world.health.state, world.health.reason) == (State.UP, Reason.OK)
    assert world.health.transitions == 1


def test_unsendable_rounds_neither_break_nor_lengthen_a_streak() -> None:
    assert chart("..xxux").health.state is State.DOWN
    assert chart("..xxuu").health.state is State.UP
    assert chart("xxx.u.").health.state is State.UP


def test_unsendable_when_down_says_so_and_goes_back_to_probes() -> None:
    assert chart("xxxuuu").health.reason is Reason.UNSENDABLE
    assert chart("xxxuuux").health.reason is Reason.PROBES


def test_one_unsendable_target_leaves_the_verdict_to_the_others() -> None:
    health = Health(replace(CALM, targets=(A, B)), (A, B), 0.0)
    health.path(None, 0.0)
    number = health.poll(0.0)
    assert number is not None
    health.unsendable(number, A, 0.0)
    health.answered(number, B, 0.01, 0.01)
    assert state_of(health) is State.UP


def test_silence_while_nobody_listened_is_no_verdict() -> None:
    health = Health(replace(CALM, fall=1), (A,), 0.0, State.UP)
    health.path(None, 0.0)
    assert health.poll(0.0) == 1
    assert health.poll(50.0) == 2  # one round, not fifty
    assert state_of(health) is State.UP
    assert health.poll(50.9) is None
    assert state_of(health) is State.DOWN  # now we did listen


def test_answers_from_before_the_stall_count_with_their_own_time() -> None:
    health = Health(replace(CALM, fall=1, rise=1), (A,), 0.0, State.DOWN)
    health.path(None, 0.0)
    assert health.poll(0.0) == 1
    health.answered(1, A, 0.02, 30.0)  # the kernel's time says 20 ms
    assert state_of(health) is State.UP
    assert health.measures().rtt == pytest.approx(0.02)


def test_a_missed_slot_is_skipped_and_the_grid_stays() -> None:
    health = Health(CALM, (A,), 0.0)
    health.path(None, 0.0)
    assert [at for at in (0.0, 0.5, 1.0, 3.7, 3.8, 4.0, 4.5) if health.poll(at)] == [0.0, 1.0, 3.7, 4.0]


def test_uplinks_with_the_same_interval_share_their_wake_ups() -> None:
    deadlines = set()
    for start in (0.0, 0.3, 17.21):
        world = World(Health(CALM, (A,), start), always(0.01), start)
        world.health.path(None, start)
        world.run(19.5)
        deadlines.add(world.health.deadline)
    assert deadlines == {20.0}


def test_phase_moves_the_first_round_and_the_grid() -> None:
    world = World(Health(CALM, (A,), 5.0, phase=0.25), always(0.01), 5.0)
    world.health.path(None, 5.0)
    world.run(7.5)
    assert world.sent == pytest.approx([5.25, 6.25, 7.25])


# Link facts


@pytest.mark.parametrize(
    "reason", [Reason.MISSING, Reason.ADMIN_DOWN, Reason.NO_CARRIER, Reason.NO_GATEWAY], ids=str
)
def test_link_facts_act_at_once_and_silence_the_probes(reason: Reason) -> None:
    world = chart("...")
    world.health.path(reason, 3.0)
    assert (world.health.state, world.health.reason, world.health.since) == (State.DOWN, reason, 3.0)
    assert world.health.deadline == math.inf
    assert world.health.poll(4.0) is None
    world.health.answered(3, A, 0.01, 4.0)  # of before
    assert state_of(world.health) is State.DOWN


def test_returning_link_is_probed_at_once_and_must_rise() -> None:
    world = chart("...")
    world.health.path(Reason.NO_CARRIER, 3.0)
    world.health.path(None, 7.3)
    world.now, world.answers = 7.3, always(0.01)
    assert (world.health.state, world.health.reason) == (State.DOWN, Reason.PROBES)
    world.run(9.5)
    assert world.sent[-3:] == pytest.approx([7.3, 8.0, 9.0])
    assert state_of(world.health) is State.UP


def test_the_same_fact_again_changes_nothing() -> None:
    world = chart("...")
    before = world.health.deadline
    world.health.path(None, 2.95)
    assert world.health.deadline == before
    world.health.path(Reason.MISSING, 3.0)
    world.health.path(Reason.MISSING, 4.0)
    assert (world.health.since, world.health.transitions) == (3.0, 2)


def test_another_reason_is_no_other_outage() -> None:
    world = chart("xxx")
    world.health.path(Reason.NO_CARRIER, 3.0)
    world.health.path(Reason.MISSING, 4.0)
    assert (world.health.reason, world.health.transitions) == (Reason.MISSING, 1)


def test_nothing_is_sent_before_the_link_is_known() -> None:
    health = Health(CALM, (A,), 0.0)
    assert health.deadline == math.inf
    assert health.poll(10.0) is None


def test_without_targets_link_and_gateway_decide() -> None:
    world = begun(replace(CALM, targets=(), stable_for=10.0), always(0.01))
    assert state_of(world.health) is State.UP
    world.health.path(Reason.NO_CARRIER, 5.0)
    assert state_of(world.health) is State.DOWN
    world.health.path(None, 6.0)
    assert state_of(world.health) is State.RECOVERING
    assert world.health.deadline == 16.0
    world.run(15.9)
    assert state_of(world.health) is State.RECOVERING
    world.run(16.0)
    assert state_of(world.health) is State.UP
    assert world.sent == []
    assert world.health.deadline == math.inf


@pytest.mark.parametrize(
    ("adopted", "state"),
    [(State.DOWN, State.RECOVERING), (State.RECOVERING, State.RECOVERING), (State.UP, State.UP)],
)
def test_without_targets_what_was_there_is_adopted(adopted: State, state: State) -> None:
    world = begun(replace(CALM, targets=(), stable_for=10.0), always(0.01), adopted)
    assert world.health.state is state
    world.run(10.0)
    assert state_of(world.health) is State.UP


def test_states_of_the_daemon_are_not_adopted() -> None:
    with pytest.raises(ValueError, match="cannot adopt"):
        Health(CALM, (A,), 0.0, State.DRAINED)
