"""What systemd is told of the daemon's life, and when it is told nothing."""

import pytest

from pbrd.watchdog import LATE, complaint, period


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "7"}, 10.0),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "8"}, None),  # inherited from a parent
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": ""}, None),
        ({"WATCHDOG_USEC": "0", "WATCHDOG_PID": "7"}, None),
        ({"WATCHDOG_USEC": "soon", "WATCHDOG_PID": "7"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({}, None),
    ],
)
def test_systemd_is_told_twice_in_each_limit_if_it_asks_us(
    environment: dict[str, str], seconds: float | None
) -> None:
    assert period(environment, pid=7) == seconds


@pytest.mark.parametrize(
    ("woken", "turned", "answering", "overdue", "why"),
    [
        (10.0, 10.5, True, 0.0, ""),
        (10.0, 10.0, True, LATE, ""),
        (10.0, 9.9, True, 0.0, "the control loop takes no whole turn"),
        (10.0, 0.0, True, 0.0, "the control loop takes no whole turn"),
        (10.0, 10.5, False, 0.0, "the kernel does not answer over netlink"),
        (10.0, 10.5, True, LATE + 0.1, "probes are not sent on time"),
    ],
)
def test_all_is_well_only_while_the_work_is_done(
    woken: float, turned: float, answering: bool, overdue: float, why: str
) -> None:
    assert complaint(woken, turned, answering, overdue) == why
