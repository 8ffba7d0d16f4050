"""What people are told of the daemon: how it is now, and what has happened since they were told last."""

import asyncio
import math
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pbrd import __version__, events, remarks, snapshot, status, systemd, tables
from pbrd.drift import Drift
from pbrd.events import Event
from pbrd.hooks import Hooks
from pbrd.judge import Judge
from pbrd.kernel import Kernel
from pbrd.log import in_journal
from pbrd.monitor import Monitor
from pbrd.netfilter import Netfilter, table_steps
from pbrd.objects import KernelState
from pbrd.paths import Paths
from pbrd.plan import diff

FRESH = (
    0.1  # seconds for which a document is good, unless something happens: many may ask, and it may be long
)
SLICE = 0.005  # seconds; the loop has a turn between two slices: thousands of policies may fail over at once


class Sinks:
    """Where events go: the log, the clients that follow them, and hooks. None of them is waited for."""

    def __init__(
        self, config: Path, runtime_dir: Path, status: Callable[[], dict[str, Any]], log: Any
    ) -> None:
        """Run the hooks beside the file `config`; `status` returns the document of `pbrd status`."""
        runtime = str(runtime_dir.absolute())
        self.log = log
        self.waiting: deque[tuple[Event, str]] = deque()  # with when they happened
        self.monitor = Monitor(status, in_journal())
        self.hooks = Hooks(config.absolute().parent / "hooks.d", log, runtime)

    def tell(self, *happened: Event) -> None:
        """Tell events everywhere, in order: at once as far as a slice goes, the rest while the loop turns."""
        now, idle = snapshot.iso(time.time()), not self.waiting
        self.waiting.extend((event, now) for event in happened)
        if self.waiting and self.waiting[-1][0].kind == "stopped":
            self._deliver(math.inf)  # the loop won't turn any more
        elif idle:
            self._deliver()

    def _deliver(self, seconds: float = SLICE) -> None:
        until = time.monotonic() + seconds
        while self.waiting:
            if time.monotonic() > until:
                asyncio.get_running_loop().call_soon(self._deliver)
                return
            self._tell(*self.waiting.popleft())

    def _tell(self, event: Event, time_: str) -> None:
        getattr(self.log, event.priority)(event.message, happened=event, time=time_)
        self.monitor.add(event.to_json(time_))
        self.hooks.add(event.facts() | {"message": event.message, "time": time_})


class Report:
    """The daemon as others see it. `shown` is what they saw last; None when the next look begins anew."""

    def __init__(
        self,
        path: Path,
        kernel: Kernel,
        paths: Paths,
        judge: Judge,
        netfilter: Netfilter,
        drift: Drift,
        sinks: Sinks,
    ) -> None:
        """Look at the parts of one daemon, whose config is the file `path`."""
        self.path, self.sinks = path, sinks
        self.kernel, self.paths, self.judge = kernel, paths, judge
        self.netfilter, self.drift = netfilter, drift
        self.generation = 1
        self.last_reload: status.ReloadStatus | None = None
        self.shown: status.Snapshot | None = None
        self.said: snapshot.Said | None = None
        self._document: dict[str, Any] = {}
        self._written_for: tuple[object, ...] = ()
        self._fresh_until = 0.0
        self.gateways = events.NONE  # the last ones that were shown, also of uplinks that have none now

    def publish(self, paused: bool) -> None:
        """Tell what has happened since the last time; nothing while a gateway may come back in a moment."""
        if self.shown is not None and self.paths.held:
            return
        now = self.snapshot(paused)
        if self.shown is not None:
            self.sinks.tell(*events.between(self.shown, now, self.gateways))
        self.gateways = events.gateways(now, self.gateways)
        if self.sinks.monitor.watched and (self.shown is None or _changes(self.shown) != _changes(now)):
            self.sinks.monitor.changed()
        self.shown = now
        if systemd.listens():
            systemd.notify(f"STATUS={tables.line(status.outline(now))}")

    def started(self) -> None:
        """Tell that the kernel holds the plan, and which uplinks are down from the beginning."""
        self.sinks.tell(events.started(__version__, str(self.path)))
        uplinks = self.shown.uplinks if self.shown else ()
        fresh = (uplink for uplink in uplinks if uplink.name not in self.judge.remembered)
        self.sinks.tell(*events.down_at_first(fresh))

    def reloaded(self, changed: list[str]) -> None:
        """Tell that another config is in force; `changed` are the steps that it took."""
        self.generation += 1
        self.last_reload = status.ReloadStatus(snapshot.iso(time.time()), ok=True, error=None)
        self.sinks.tell(events.reloaded(self.generation, changed))

    def reload_refused(self, error: Exception) -> None:
        """Tell that the old config stays in force, and why."""
        self.last_reload = status.ReloadStatus(snapshot.iso(time.time()), ok=False, error=str(error))
        self.sinks.tell(events.reload_refused(str(error)))

    def document(self, paused: bool) -> dict[str, Any]:
        """Return what `pbrd status --json` shows, as it was FRESH seconds ago at most. Not to be changed."""
        now = time.monotonic()
        key = (paused, self.generation, self.shown, self.last_reload)
        if not (now < self._fresh_until and all(map(operator.is_, key, self._written_for))):
            self._document = status.to_json(self.snapshot(paused))
            self._fresh_until, self._written_for = now + FRESH, key
        return self._document

    def plan(self, target: KernelState, unread: Sequence[str], table: bool) -> dict[str, Any]:
        """Return what `pbrd plan` shows: the steps to `target`; with `table`, nftables' text as well.

        `unread` are the files of the config that have changed since they were read.
        """
        text = self.netfilter.text
        steps = diff(self.kernel.state(), target).lines()
        return {
            "steps": [*steps, *table_steps(self.netfilter.applied, text)],
            "table": text if table else "",
            "remarks": remarks.unread(str(self.path), unread),
            "standings": self.paths.rows(),
        }

    def snapshot(self, paused: bool) -> status.Snapshot:
        """Return the daemon at this moment; `paused`: nothing of ours is in the kernel."""
        now = time.monotonic()
        state = self.kernel.state()
        view = snapshot.View(
            self.judge.config,
            self.kernel.families,
            self.kernel.links,
            self.paths,
            self.paths.standings(),
            state,
            frozenset() if paused else self.judge.names,
            snapshot.open_tables(self.judge.config, state),
            self.judge.slices() if self.netfilter.settled and not paused else {},
            time.time() - now,
        )
        self.said = snapshot.policies(view, self.said, now)
        known = self.shown.paused_since if self.shown else None
        return status.Snapshot(
            __version__,
            os.getpid(),
            self.generation,
            str(self.path),
            snapshot.uplinks(view, now),
            self.said.policies,
            self.drift.repairs + self.netfilter.repairs,
            self.last_reload,
            paused,
            (known or snapshot.iso(time.time())) if paused else None,
        )


def _changes(shown: status.Snapshot) -> status.Snapshot:
    """Return a snapshot without what is another at each look: the measures of probes."""
    still = tuple(replace(uplink, probe=status.ProbeStatus()) for uplink in shown.uplinks)
    return replace(shown, uplinks=still)
