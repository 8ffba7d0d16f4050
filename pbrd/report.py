"""What people are told of the daemon: how it is now, and what has happened since they were told last."""

import os
import time
from pathlib import Path
from typing import Any

from pbrd import __version__, events, snapshot, status, systemd, tables
from pbrd.drift import Drift
from pbrd.judge import Judge
from pbrd.kernel import Kernel
from pbrd.netfilter import Netfilter
from pbrd.paths import Paths


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
        log: Any,
    ) -> None:
        """Look at the parts of one daemon, whose config is the file `path`."""
        self.path, self.log = path, log
        self.kernel, self.paths, self.judge = kernel, paths, judge
        self.netfilter, self.drift = netfilter, drift
        self.generation = 1
        self.last_reload: status.ReloadStatus | None = None
        self.shown: status.Snapshot | None = None

    def publish(self, paused: bool) -> None:
        """Tell what has happened since the last time."""
        now = self.snapshot(paused)
        for event in events.between(self.shown, now) if self.shown else ():
            level = self.log.warning if event.kind in ("uplink-down", "failover") else self.log.info
            level(event.sentence, event_kind=event.kind, **event.facts())
        self.shown = now
        if systemd.listens():
            systemd.notify(f"STATUS={tables.line(status.to_json(now))}")

    def reloaded(self, changed: list[str]) -> None:
        """Tell that another config is in force; `changed` are the steps that it took."""
        self.generation += 1
        self.last_reload = status.ReloadStatus(snapshot.iso(time.time()), ok=True, error=None)
        self.log.info("reloaded", event_kind="reload", generation=self.generation, changes=len(changed))

    def reload_refused(self, error: Exception) -> None:
        """Tell that the old config stays in force, and why."""
        self.last_reload = status.ReloadStatus(snapshot.iso(time.time()), ok=False, error=str(error))
        self.log.error("reload refused", event_kind="reload-refused", reason=str(error))

    def document(self, paused: bool) -> dict[str, Any]:
        """Return what `pbrd status --json` shows."""
        return status.to_json(self.snapshot(paused))

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
        before = {policy.name: policy for policy in self.shown.policies} if self.shown else {}
        known = self.shown.paused_since if self.shown else None
        return status.Snapshot(
            __version__,
            os.getpid(),
            self.generation,
            str(self.path),
            snapshot.uplinks(view, now),
            snapshot.policies(view, before, now),
            self.drift.repairs,
            self.last_reload,
            paused,
            (known or snapshot.iso(time.time())) if paused else None,
        )
