"""The watchdog: tell systemd that pbrd does its work, and nothing while it does not (sd_watchdog_enabled(3)).

That the process lives says little. What counts is that the loop was woken and took a whole turn, that the
kernel answers a question now, and that no probe is overdue. If that fails for WatchdogSec=, systemd ends the
daemon by SIGABRT, which leaves a traceback in the journal, and starts it again. Forwarding goes on meanwhile.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from pbrd import systemd
from pbrd.kernel import Kernel
from pbrd.probe import Prober

LATE = 1.0  # seconds; on a loop that turns, the prober's alarm rings within milliseconds


def period(environment: Mapping[str, str], pid: int) -> float | None:
    """Return how often, in seconds, systemd is to be told: half of its limit; None if it does not ask us.

    WATCHDOG_PID names whom it asks; a child that has inherited the environment is not meant.
    """
    limit, asked = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(pid))
    if not (limit.isascii() and limit.isdigit() and int(limit)) or asked != str(pid):
        return None
    return int(limit) / 2e6


def complaint(woken: float, turned: float, answering: bool, overdue: float) -> str:
    """Say why systemd must not be told that all is well; "" if it may.

    `woken`: when the loop was last asked for a turn; `turned`: when it ended a whole one (monotonic seconds).
    `answering`: whether the kernel just answered; `overdue`: seconds since the next probe was due.
    """
    if turned < woken:
        return "the control loop takes no whole turn"
    if not answering:
        return "the kernel does not answer over netlink"
    if overdue > LATE:
        return "probes are not sent on time"
    return ""


class Watchdog:
    """Feeds systemd's watchdog with what the daemon really does; `wake` asks the loop for a turn."""

    def __init__(self, wake: Callable[[], None], kernel: Kernel, prober: Prober, log: Any) -> None:
        self.wake, self.kernel, self.prober, self.log = wake, kernel, prober, log
        self.turned_at = 0.0

    def turned(self) -> None:
        """Note that the loop has ended a turn, with all that it reads and writes."""
        self.turned_at = time.monotonic()

    async def feed(self, every: float | None) -> None:
        """Tell systemd `every` so many seconds (see `period`) that all is well, if it is."""
        if every is None:
            return
        said = ""
        while True:
            woken = time.monotonic()
            self.wake()
            await asyncio.sleep(every)
            why = complaint(woken, self.turned_at, self.kernel.answers(), self.prober.overdue())
            if not why:
                systemd.notify("WATCHDOG=1")
            elif why != said:
                self.log.error("systemd is not told that all is well, and will start us anew", reason=why)
            said = why
