"""What the kernel would not take: tried again, soon and then less often, and told once."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from pbrd.kernel import Failure
from pbrd.objects import Route
from pbrd.plan import Plan, route_text
from pbrd.settings import Family

RETRY = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds until a refused step is tried again
PATIENCE = 1.0  # seconds until a refused step is worth a line: an address may be on its way


class Refusals:
    """The steps that the kernel refused, and the routes that others' stand in the place of."""

    def __init__(self, log: Any) -> None:
        self.log = log
        self.counts: dict[str, int] = {}  # step → how often in a row
        self.since: dict[str, float] = {}  # step → when first, or infinity once it is told; monotonic seconds
        self.blocked: tuple[Route, ...] = ()
        self.dead_ends: dict[Family, str] = {}

    def clear(self) -> None:
        """Forget: the plan is empty."""
        self.counts.clear()
        self.since.clear()

    def note(self, plan: Plan, failures: Iterable[Failure]) -> float | None:
        """Take in what failed of `plan`; return in how many seconds to try again."""
        counts, since, now = {}, {}, time.monotonic()
        for failure in failures:
            text = plan.text(failure.step)
            counts[text] = self.counts.get(text, 0) + 1
            since[text] = self.since.get(text, now)
            if now - since[text] >= PATIENCE:
                since[text] = math.inf
                self.log.warning("kernel refuses a change", step=text, reason=str(failure.error))
        self.counts, self.since = counts, since
        return RETRY[min(*counts.values(), len(RETRY)) - 1] if counts else None

    def tell_dead_ends(self, found: Mapping[Family, str]) -> None:
        """Say once that a default route of the main table ends the walk of rules before the policies."""
        for family, kind in found.items():
            if kind and kind != self.dead_ends.get(family):
                self.log.warning(
                    "an error route is the default of the main table: without a better one there, "
                    "it ends the walk of rules before the policies",
                    kind=kind,
                    family=f"IPv{family.version}",
                    remedy=f"ip -{family.version} route del {kind} default",
                )
        self.dead_ends = dict(found)

    def tell_blocked(self, plan: Plan) -> None:
        """Say once which routes can't be ours."""
        for route in plan.blocked:
            if route not in self.blocked:
                self.log.warning(
                    "a foreign route stands where ours belongs; it is left alone",
                    route=route_text(route, plan.tables),
                    remedy="remove it, or give the uplink another table",
                )
        self.blocked = plan.blocked
