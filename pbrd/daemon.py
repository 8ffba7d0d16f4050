"""The daemon: facts in, one reconcile loop, the kernel kept as `routing.desired` wants it.

Everything only says "look again" (`wake`): netlink events, a health that changed, a reload, a timer.
`turn` then acts from the mirror first, so that a failover waits for nothing, and reads back what was
touched or marked until nothing is left to do. One task writes to the kernel: this one.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pbrd import __version__, config, control, events, names, offline, snapshot, status, systemd, tables
from pbrd.drift import Drift
from pbrd.errors import ConfigError, KernelError
from pbrd.kernel import Failure, Kernel
from pbrd.log import open_log
from pbrd.objects import KernelState, Route
from pbrd.paths import Paths
from pbrd.plan import Plan, diff, route_text
from pbrd.probe import Path as ProbePath
from pbrd.probe import Prober
from pbrd.routing import adopted_standings, desired
from pbrd.rules import probe_mark
from pbrd.settings import Config, OnStop
from pbrd.sysctl import Originals

REST = 0.002  # seconds between two turns: what arrives meanwhile is taken together
RESYNC = 60.0  # seconds between two looks at everything
WATCH = 1.2  # seconds after a link event in which linkwatch may hold back the next one
WATCH_PACE = 0.025
RETRY = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds until a refused step is tried again
PATIENCE = 5  # tries before a refused step is worth a line
READ_BACKS = 4  # in one turn; then others have a turn


class Daemon:
    """One daemon in one network namespace."""

    def __init__(self, path: Path, runtime_dir: Path, state_dir: Path, log: Any) -> None:
        self.path, self.runtime_dir, self.log = path, runtime_dir, log
        self.config = config.load(path)
        self.kernel = Kernel(self.config, Originals(state_dir / offline.SYSCTLS))
        self.paths = Paths()
        self.prober = Prober(probe_mark(self.config).value, self.wake)
        self.awake = asyncio.Event()
        self.disturbed = asyncio.Event()
        self.stopping = asyncio.Event()
        self.drift = Drift(self.wake, log)
        self.wanted = KernelState()  # what the last plan was made for
        self.refused: dict[str, int] = {}  # step → how often the kernel refused it in a row
        self.blocked: tuple[Route, ...] = ()  # of the last plan: foreign routes stand in their place
        self.generation = 1
        self.paused = False
        self.last_reload: status.ReloadStatus | None = None
        self.shown: status.Snapshot | None = None

    # --- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until SIGTERM. Returns when `on_stop` has been done."""
        loop = asyncio.get_running_loop()
        server = control.Server(self.runtime_dir / "pbrd.sock", self.handlers(), self.request_failed)
        server.open()  # takes the lock: two daemons must not write to one kernel
        try:
            loop.add_reader(self.kernel.listen(), self.wake)
            self.take_over(self.config)
            self.log.info("started", event_kind="started", config=str(self.path), version=__version__)
            for number, act in self.signals().items():
                loop.add_signal_handler(number, act)
            async with asyncio.TaskGroup() as group:
                tasks = (self.reconcile(), self.watch_links(), self.resync(), self.prober.run(), server.run())
                running = [group.create_task(task) for task in tasks]
                systemd.notify("READY=1")
                await self.stopping.wait()
                systemd.notify("STOPPING=1")
                for task in running:
                    task.cancel()
        finally:
            self.let_go()
            server.close()

    def let_go(self) -> None:
        """Leave the kernel as `on_stop` says."""
        on_stop = self.config.daemon.on_stop
        if on_stop is OnStop.FLUSH:
            offline.flush_kernel(self.kernel, self.config)
        self.kernel.close()
        self.log.info("stopped", event_kind="stopped", on_stop=on_stop.value)

    def signals(self) -> dict[signal.Signals, Callable[[], object]]:
        """Return what each signal does."""
        return {
            signal.SIGHUP: self.reload_by_signal,
            signal.SIGTERM: self.stopping.set,
            signal.SIGINT: self.stopping.set,
            signal.SIGUSR1: self.log_state,
        }

    # --- the loop -----------------------------------------------------------------------------

    def wake(self) -> None:
        """Say that something may have changed."""
        self.awake.set()

    def later(self, seconds: float) -> None:
        """Wake in a while."""
        asyncio.get_running_loop().call_later(seconds, self.wake)

    async def reconcile(self) -> None:
        """Take a turn whenever somebody woke us."""
        while True:
            await self.awake.wait()
            self.awake.clear()
            self.turn()
            await asyncio.sleep(REST)

    async def resync(self) -> None:
        """Look at everything now and then: what no event told must not stay for ever."""
        while True:
            await asyncio.sleep(RESYNC)
            self.kernel.changes.everything = True
            self.wake()

    async def watch_links(self) -> None:
        """Ask for the links in the second after a link event, while the kernel holds the next one back."""
        while True:
            await self.disturbed.wait()
            self.disturbed.clear()
            until = time.monotonic() + WATCH
            while time.monotonic() < until:
                await asyncio.sleep(WATCH_PACE)
                self.kernel.look_at_links()
                if self.kernel.disturbed:
                    self.wake()

    def turn(self) -> None:
        """Bring the kernel to what the facts ask for: act from the mirror, then read back until quiet."""
        try:
            self.kernel.collect()
            if self.kernel.take_disturbance():
                self.disturbed.set()
            self.enforce()
            for _ in range(READ_BACKS):
                if not self.kernel.changes:
                    break
                self.kernel.read()
                self.enforce()
        except KernelError as error:
            self.log.error("kernel refused to be read", reason=str(error))
            self.kernel.changes.everything = True
            self.later(RETRY[-1])
        self.follow_probes()
        self.publish()

    def enforce(self) -> None:
        """Plan from the mirror, and apply."""
        again = self.paths.look(self.kernel.links, self.kernel.all_defaults(), time.monotonic())
        if again is not None:
            self.later(again)
        target = self.target()
        plan = diff(self.kernel.state(), target)
        self.tell_blocked(plan)
        unchanged, self.wanted = target == self.wanted, target
        if self.paused or not plan:
            self.refused.clear()
        elif self.drift.allows(plan, unchanged, self.refused):
            self.note_refusals(plan, self.kernel.apply(plan))

    def target(self) -> KernelState:
        """Return what the kernel should hold now."""
        kernel, paths = self.kernel, self.paths
        return desired(self.config, kernel.families, kernel.links, paths.hops, paths.standings())

    def note_refusals(self, plan: Plan, failures: list[Failure]) -> None:
        """Try refused steps again, soon and then less often; tell of those that stay refused, once."""
        counts = {}
        for failure in failures:
            text = plan.text(failure.step)
            counts[text] = self.refused.get(text, 0) + 1
            if counts[text] == PATIENCE:
                self.log.warning("kernel refuses a change", step=text, reason=str(failure.error))
        self.refused = counts
        if counts:
            self.later(RETRY[min(*counts.values(), len(RETRY)) - 1])

    def tell_blocked(self, plan: Plan) -> None:
        """Say once which routes can't be ours because others' stand in their place."""
        for route in plan.blocked:
            if route not in self.blocked:
                self.log.warning(
                    "a foreign route stands where ours belongs; it is left alone",
                    route=route_text(route, plan.tables),
                    remedy="remove it, or give the uplink another table",
                )
        self.blocked = plan.blocked

    def follow_probes(self) -> None:
        """Probe over the interfaces that are there."""
        links = self.kernel.links
        found = []
        for (name, family), health in self.paths.healths.items():
            link = links.get(self.config.uplink(name).interface)
            if link is not None:
                found.append(ProbePath(name, family, link.name, link.index, health))
        self.prober.follow(found)

    # --- what people see ----------------------------------------------------------------------

    def publish(self) -> None:
        """Log what happened since the last turn."""
        now = self.snapshot()
        for event in events.between(self.shown, now) if self.shown else ():
            level = self.log.warning if event.kind in ("uplink-down", "failover") else self.log.info
            level(event.sentence, event_kind=event.kind, **event.facts())
        self.shown = now
        if systemd.listens():
            systemd.notify(f"STATUS={tables.line(status.to_json(now))}")

    def snapshot(self) -> status.Snapshot:
        """Return the daemon at this moment."""
        now = time.monotonic()
        kernel, paths = self.kernel, self.paths
        view = snapshot.View(
            self.config,
            kernel.families,
            kernel.links,
            paths,
            paths.standings(),
            kernel.state(),
            time.time() - now,
        )
        before = {policy.name: policy for policy in self.shown.policies} if self.shown else {}
        return status.Snapshot(
            __version__,
            os.getpid(),
            self.generation,
            str(self.path),
            snapshot.uplinks(view, now),
            snapshot.policies(view, before, now),
            self.drift.repairs,
            self.last_reload,
            self.paused,
        )

    def log_state(self) -> None:
        """Log the whole state (SIGUSR1)."""
        now = self.snapshot()
        for uplink in now.uplinks:
            self.log.info("uplink", name=uplink.name, state=uplink.state, reason=uplink.reason)
        for policy in now.policies:
            self.log.info("policy", name=policy.name, active=policy.active, state=policy.state)

    # --- requests -----------------------------------------------------------------------------

    def handlers(self) -> dict[str, control.Handler]:
        """Return what the control socket can ask for."""
        return {
            "Status": control.Handler(lambda _: status.to_json(self.snapshot())),
            "Plan": control.Handler(self.answer_plan, root_parameters=frozenset({"config"})),
            "Reload": control.Handler(lambda _: self.reload(), changes=True),
            "Flush": control.Handler(lambda _: {"removed": self.pause()}, changes=True),
        }

    def request_failed(self, method: str, error: Exception) -> None:
        """Log a request that failed through a fault of ours."""
        self.log.error("control request failed", method=method, exc_info=error)

    def answer_plan(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Say what would change now, or by a reload with another file."""
        if parameters.get("config"):
            return {"steps": offline.plan(Path(parameters["config"]), self.paths.standings())}
        self.kernel.changes.everything = True
        self.kernel.read()
        self.wake()
        return {"steps": list(diff(self.kernel.state(), self.target()).lines())}

    def reload(self) -> dict[str, Any]:
        """Take the config anew. Raises ConfigError, and then nothing has changed."""
        systemd.reloading()
        try:
            fresh = config.load(self.path)
            changed = self.take_over(fresh)
        except ConfigError as error:
            self.last_reload = status.ReloadStatus(snapshot.iso(time.time()), ok=False, error=str(error))
            self.log.error("reload refused", event_kind="reload-refused", reason=str(error))
            raise
        finally:
            systemd.notify("READY=1")
        self.generation += 1
        self.last_reload = status.ReloadStatus(snapshot.iso(time.time()), ok=True, error=None)
        self.log.info("reloaded", event_kind="reload", generation=self.generation, changes=len(changed))
        return {"changed": changed, "generation": self.generation}

    def reload_by_signal(self) -> None:
        """Reload because of SIGHUP: who sent it looks into the log."""
        try:
            self.reload()
        except ConfigError:
            return

    def take_over(self, fresh: Config) -> list[str]:
        """Put a config into force, adopting what the kernel holds; return the lines of what changed there."""
        self.kernel.follow(fresh)
        self.kernel.read()
        before = self.kernel.state()
        self.paths.follow(fresh, self.kernel.families, adopted_standings(fresh, before), time.monotonic())
        self.config = fresh
        self.prober.mark_with(probe_mark(fresh).value)
        self.paused = False
        self.wanted = KernelState()  # what changes now is no drift
        reason = names.register(fresh)
        if reason:
            self.log.warning("table names are not registered", reason=reason)
        self.turn()
        return list(diff(before, self.kernel.state()).lines())

    def pause(self) -> list[str]:
        """Let go of the kernel until a reload."""
        self.paused = True
        removed = offline.flush_kernel(self.kernel, self.config)
        self.log.warning("paused: nothing of ours is in the kernel until a reload", removed=len(removed))
        self.publish()
        return removed


def main(path: Path, runtime_dir: Path, state_dir: Path) -> int:
    """Run the daemon in the foreground. Raises ConfigError for a config that can't be used."""
    log = open_log()
    daemon = Daemon(path, runtime_dir, state_dir, log)
    failed = False
    try:
        asyncio.run(daemon.run())
    except* KernelError as group:
        failed = True
        log.error("cannot go on", reason=str(group.exceptions[0]))
    return int(failed)
