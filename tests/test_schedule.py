from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pbrd.schedule import active, next_change
from pbrd.settings import TimeOfDay
from pbrd.values import day, time_of_day

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = [BERLIN, ZoneInfo("America/New_York"), ZoneInfo("Australia/Lord_Howe"), ZoneInfo("Asia/Kolkata"), UTC]

TIMES = st.integers(0, 47).flatmap(
    lambda start: st.integers(1, 48).filter(lambda end: end != start).map(
        lambda end: TimeOfDay(start * 1800, end * 1800)
    )
)  # fmt: skip
WINDOWS = st.lists(TIMES, max_size=3).map(tuple)
DAYS = st.lists(st.integers(0, 6), max_size=7, unique=True).map(tuple)
# near the clock changes of 2026 in Berlin, New York and on Lord Howe
CHANGES = [
    "2026-03-29T01",
    "2026-10-25T01",
    "2026-03-08T07",
    "2026-11-01T06",
    "2026-04-04T15",
    "2026-10-03T15:30",
]
NEAR = st.builds(
    lambda change, away: datetime.fromisoformat(change) + away,
    st.sampled_from(CHANGES),
    st.timedeltas(timedelta(hours=-30), timedelta(hours=30)),
)
MOMENTS = (st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1)) | NEAR).map(
    lambda naive: naive.replace(tzinfo=UTC)
)


def windows(text: str) -> tuple[TimeOfDay, ...]:
    return tuple(map(time_of_day, text.split()))


def weekdays(text: str) -> tuple[int, ...]:
    return tuple(map(day, text.split()))


def berlin(text: str, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold)


@pytest.mark.parametrize(
    ("times", "days", "local", "on"),
    [  # 2026-06-01 is a Monday
        ("01:00-05:00", "", "2026-06-01 00:59:59", False),
        ("01:00-05:00", "", "2026-06-01 01:00", True),
        ("01:00-05:00", "", "2026-06-01 04:59:59", True),
        ("01:00-05:00", "", "2026-06-01 05:00", False),
        ("22:00-24:00", "", "2026-06-01 23:59:59", True),
        ("22:00-24:00", "", "2026-06-01 00:00", False),
        ("01:00-02:00 04:00-05:00", "", "2026-06-01 03:00", False),
        ("01:00-02:00 04:00-05:00", "", "2026-06-01 04:00", True),
        # across midnight: the evening's day counts
        ("22:00-06:00", "mon", "2026-06-01 05:00", False),
        ("22:00-06:00", "mon", "2026-06-01 23:00", True),
        ("22:00-06:00", "mon", "2026-06-02 05:59", True),
        ("22:00-06:00", "mon", "2026-06-02 06:00", False),
        ("22:00-06:00", "mon", "2026-06-02 23:00", False),
        ("22:00-06:00", "sun", "2026-06-01 05:00", True),
        ("22:00-00:00", "mon", "2026-06-02 00:00", False),
        # days without times
        ("", "mon tue", "2026-06-02 23:59:59", True),
        ("", "mon tue", "2026-06-03 00:00", False),
        ("", "", "2026-06-03 00:00", True),
    ],
)
def test_a_policy_is_on_in_its_windows(times: str, days: str, local: str, on: bool) -> None:
    assert active(windows(times), weekdays(days), berlin(local)) is on


@pytest.mark.parametrize(
    ("times", "days", "now", "then"),
    [
        ("01:00-05:00", "", "2026-06-01 00:00", "2026-06-01 01:00"),
        ("01:00-05:00", "", "2026-06-01 01:00", "2026-06-01 05:00"),
        ("01:00-05:00", "", "2026-06-01 05:00", "2026-06-02 01:00"),
        ("01:00-05:00", "", "2026-06-01 05:00:00.5", "2026-06-02 01:00"),
        ("01:00-05:00 05:00-06:00", "", "2026-06-01 03:00", "2026-06-01 06:00"),  # no change where two meet
        ("01:00-05:00", "fri", "2026-06-05 05:00", "2026-06-12 01:00"),
        ("22:00-06:00", "sat", "2026-06-01 00:00", "2026-06-06 22:00"),
        ("22:00-06:00", "sat", "2026-06-06 22:00", "2026-06-07 06:00"),
        ("", "sat sun", "2026-06-01 00:00", "2026-06-06 00:00"),
        ("", "sat sun", "2026-06-06 12:00", "2026-06-08 00:00"),
        ("18:00-24:00", "sat", "2026-06-06 20:00", "2026-06-07 00:00"),
        # spring: 2026-03-29 goes from 02:00 to 03:00
        ("01:00-05:00", "", "2026-03-29 01:30", "2026-03-29 05:00"),
        ("02:30-05:00", "", "2026-03-29 00:00", "2026-03-29 03:00"),
        ("01:00-02:30", "", "2026-03-29 01:30", "2026-03-29 03:00"),
        ("02:15-02:45", "", "2026-03-29 00:00", "2026-03-30 02:15"),
        ("02:15-02:45", "sun", "2026-03-23 00:00", "2026-04-05 02:15"),
        ("22:00-06:00", "sat", "2026-03-28 23:00", "2026-03-29 06:00"),
    ],
)
def test_the_next_change_comes_where_the_wall_clock_says(times: str, days: str, now: str, then: str) -> None:
    change = next_change(windows(times), weekdays(days), berlin(now))
    assert change is not None
    assert change.isoformat() == berlin(then).isoformat()


def test_in_autumn_the_repeated_hour_counts_both_times() -> None:
    # 2026-10-25 goes from 03:00 back to 02:00
    changes = [berlin("2026-10-25 00:00")]
    for _ in range(4):
        change = next_change(windows("02:30-04:00"), (), changes[-1])
        assert change is not None
        changes.append(change)
    assert [str(change) for change in changes[1:]] == [
        "2026-10-25 02:30:00+02:00",
        "2026-10-25 02:00:00+01:00",
        "2026-10-25 02:30:00+01:00",
        "2026-10-25 04:00:00+01:00",
    ]


def test_a_window_across_the_change_lasts_in_wall_clock_time() -> None:
    for now, hours in (("2026-03-29 00:30", 3), ("2026-10-25 00:30", 5), ("2026-06-01 00:30", 4)):
        change = next_change(windows("00:30-04:30"), (), berlin(now))
        assert change is not None
        assert change.astimezone(UTC) - berlin(now).astimezone(UTC) == timedelta(hours=hours)


@pytest.mark.parametrize(
    ("times", "days"),
    [("", ""), ("", "mon tue wed thu fri sat sun"), ("00:00-12:00 12:00-24:00", ""), ("00:00-24:00", "")],
)
def test_what_never_changes_has_no_next_change(times: str, days: str) -> None:
    assert next_change(windows(times), weekdays(days), berlin("2026-06-01 00:00")) is None


@given(
    WINDOWS, DAYS, MOMENTS, st.sampled_from(ZONES), st.lists(st.floats(0, 1, exclude_max=True), max_size=9)
)
@example(windows("02:15-02:45"), (6,), datetime(2026, 3, 23, tzinfo=UTC), BERLIN, [0.5])
def test_nothing_changes_before_the_next_change_and_it_does_then(
    times: tuple[TimeOfDay, ...], days: tuple[int, ...], moment: datetime, zone: ZoneInfo, shares: list[float]
) -> None:
    now = moment.astimezone(zone)
    change = next_change(times, days, now)
    end = moment + timedelta(days=15) if change is None else change.astimezone(UTC)
    assert end > moment
    between = [moment + (end - moment) * share for share in shares]
    between += [moment + timedelta(minutes=30 * step) for step in range(0, 15 * 48, 7)]
    if change is not None:
        assert active(times, days, change) != active(times, days, now)
        between.append(max(moment, end - timedelta(microseconds=1)))
    for at in between:
        if moment <= at < end:
            assert active(times, days, at.astimezone(zone)) == active(times, days, now)


@given(WINDOWS.filter(bool), DAYS, MOMENTS, st.sampled_from(ZONES))
def test_changes_advance_and_alternate(
    times: tuple[TimeOfDay, ...], days: tuple[int, ...], moment: datetime, zone: ZoneInfo
) -> None:
    now = moment.astimezone(zone)
    for _ in range(4):
        change = next_change(times, days, now)
        if change is None:
            return
        assert change.astimezone(UTC) > now.astimezone(UTC)
        assert active(times, days, change) != active(times, days, now)
        now = change
