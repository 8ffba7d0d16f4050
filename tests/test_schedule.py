"""Windows of time as people read them, also where the clocks change."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from pbrd.schedule import active
from pbrd.settings import TimeOfDay
from pbrd.values import day, time_of_day

BERLIN = ZoneInfo("Europe/Berlin")


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
    ("utc", "on"),
    [  # 02:30-04:00 in Berlin; spring skips 02:00 to 03:00, autumn repeats it
        ("2026-03-29T00:59:59", False),
        ("2026-03-29T01:00:00", True),
        ("2026-03-29T02:00:00", False),
        ("2026-10-25T00:30:00", True),
        ("2026-10-25T01:00:00", False),
        ("2026-10-25T01:30:00", True),
        ("2026-10-25T03:00:00", False),
    ],
)
def test_the_clock_on_the_wall_decides_when_it_changes(utc: str, on: bool) -> None:
    moment = datetime.fromisoformat(utc + "+00:00").astimezone(BERLIN)
    assert active(windows("02:30-04:00"), (), moment) is on
