"""Repairs of what somebody else changed: counted, limited, and told in one line for each burst."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from pbrd.events import Event, drift_repaired
from pbrd.objects import KernelState
from pbrd.plan import Item, Plan, Verb

BURST = 100  # repairs at full speed: a restart of systemd-networkd takes up to a handful
REFILL = 2.0  # repairs a second in an endless fight
QUIET = 1.0  # seconds without a repair that end a burst


def repairs(plan: Plan, wanted: KernelState) -> list[str]:
    """Return the lines of those steps of `plan` that undo what others did since `wanted` was in the kernel.

    They put back what was wanted before, too, or remove what was not: what comes or goes because we want
    something else is no repair. Nothing `wanted` is what starts and reloads begin with: they repair nothing.
    """
    if wanted == KernelState():
        return []
    known: frozenset[Item] = wanted.routes | wanted.rules | wanted.sysctls
    return [plan.text(step) for step in plan.steps if (step.verb is Verb.DELETE) == (step.item not in known)]


class Drift:
    """The ledger of repairs. `wake` is called when a repair that had to wait may go on, `tell` after one."""

    def __init__(self, wake: Callable[[], None], log: Any, tell: Callable[[Event], None]) -> None:
        self.wake, self.log, self.tell = wake, log, tell
        self.repairs = 0
        self.credit = float(BURST)
        self.counted = time.monotonic()
        self.burst: list[str] = []
        self.timer: asyncio.TimerHandle | None = None
        self.fighting = False

    def allows(self, plan: Plan, wanted: KernelState, unchanged: bool, refused: Mapping[str, int]) -> bool:
        """Say whether `plan` may be applied now, and note what it repairs; `wanted` is what was before.

        Only if that is `unchanged` it may have to wait: no fight holds up a failover. Steps that the kernel
        refused before are a retry, not a repair.
        """
        lines = [line for line in repairs(plan, wanted) if line not in refused]
        if not lines:
            return True
        now = time.monotonic()
        self.credit = min(BURST, self.credit + (now - self.counted) * REFILL)
        self.counted = now
        loop = asyncio.get_running_loop()
        if self.credit < 1 and unchanged:
            loop.call_later(1 / REFILL, self.wake)
            self._tell_fight(lines)
            return False
        self.credit = max(0.0, self.credit - 1)
        self.repairs += 1
        self.burst += lines
        if self.timer is not None:
            self.timer.cancel()
        self.timer = loop.call_later(QUIET, self._tell)
        return True

    def _tell(self) -> None:
        self.timer, self.fighting = None, False
        lines, self.burst = self.burst, []
        self.tell(drift_repaired(lines, self.repairs))

    def _tell_fight(self, lines: list[str]) -> None:
        if not self.fighting:
            self.fighting = True
            self.log.error(
                "somebody keeps undoing our changes; repairing twice a second",
                first=lines[0],
                repairs=self.repairs,
            )
