"""The daemon: facts in, one reconcile loop, the kernel kept as `routing.desired` wants it.

Everything only says "look again" (`wake`): netlink events, a health that changed, a reload, a timer.
`turn` then acts from the mirror first, so that a failover waits for nothing, and reads back what was
touched or marked until nothing is left to do. One task writes to the kernel: this one.
"""

import asyncio
import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pbrd import changes, control, drains, events, names, offline, remarks, sources, systemd
from pbrd.drift import Drift
from pbrd.errors import ConfigError, ControlError, KernelError, PbrdError
from pbrd.judge import Judge
from pbrd.kernel import Kernel
from pbrd.log import open_log
from pbrd.lookout import Lookout
from pbrd.netfilter import Netfilter, table_steps
from pbrd.nftables import digest
from pbrd.objects import KernelState
from pbrd.paths import Paths
from pbrd.plan import diff
from pbrd.probe import Path as ProbePath
from pbrd.probe import Prober
from pbrd.refusals import Refusals
from pbrd.report import Report, Sinks
from pbrd.routing import adopted_standings, desired
from pbrd.rules import probe_mark
from pbrd.settings import Config, OnStop
from pbrd.watchdog import Watchdog, period

REST = 0.002  # seconds between two turns: what arrives meanwhile is taken together
RESYNC = 60.0  # seconds between two looks at everything
WATCH = 1.2  # seconds after a link event in which linkwatch may hold back the next one
WATCH_PACE = 0.025
RETRY = 2.0  # seconds until the kernel is read again that could not be read
READ_BACKS = 4  # in one turn; then others have a turn


class Daemon:
    """One daemon in one network namespace."""

    def __init__(self, path: Path, runtime_dir: Path, state_dir: Path, log: Any) -> None:
        self.path, self.runtime_dir, self.log = path, runtime_dir, log
        self.config, self.sources = sources.load(path)
        originals = offline.originals(runtime_dir, state_dir)
        self.kernel = Kernel(self.config, originals)
        self.drains = state_dir / "drained.json"
        self.paths = Paths()
        drained, trouble = drains.load(self.drains)
        self.paths.drain(drained, time.monotonic())
        for reason in filter(None, (trouble, originals.trouble)):
            log.warning("going on without what was written down", reason=reason)
        self.judge = Judge(self.wake, log.warning, asyncio.get_running_loop())
        self.sinks = Sinks(path, runtime_dir, lambda: self.report.document(self.paused), log)
        self.netfilter = Netfilter(self.wake, self.judge.units_again, log, self.sinks.tell)
        self.judge.tell = self.netfilter.follow_units
        self.prober = Prober(probe_mark(self.config).value, self.wake)
        self.awake = asyncio.Event()
        self.disturbed = asyncio.Event()
        self.stopping = asyncio.Event()
        self.hangup = asyncio.Event()
        self.one_reload = asyncio.Lock()
        self.drift = Drift(self.wake, log, self.sinks.tell)
        self.watchdog = Watchdog(self.wake, self.kernel, self.prober, log)
        self.wanted = KernelState()  # what the last plan was made for
        self.refusals = Refusals(log)
        self.lookout = Lookout(log)
        self.report = Report(
            path, self.kernel, self.paths, self.judge, self.netfilter, self.drift, self.sinks
        )
        self.paused = False

    # --- life ---------------------------------------------------------------------------------

    async def run(self) -> bool:
        """Run until SIGTERM, and do what `on_stop` says; return whether it was that that ended it."""
        server = control.Server(self.runtime_dir / "pbrd.sock", self.handlers(), self.request_failed)
        server.open()  # takes the lock: two daemons must not write to one kernel
        async with self.sinks.hooks.working():
            reason = "an error of pbrd's own"
            try:
                await self.work(server)
                reason = ""
            except* KernelError as group:
                reason = str(group.exceptions[0])
            finally:
                await self.let_go(reason)
                server.close()
        return not reason

    async def work(self, server: control.Server) -> None:
        """Take over the kernel, and keep it until SIGTERM."""
        loop = asyncio.get_running_loop()
        routing = self.kernel.listen()
        self.netfilter.listen()
        for number, act in self.signals().items():
            loop.add_signal_handler(number, act)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals())  # `pbrd run` holds some back until now
        await self.take_over(self.config)
        loop.add_reader(routing, self.wake)  # what has happened meanwhile is still there
        self.report.started()
        for remark in remarks.still_drained(self.config, self.paths.drained):
            self.log.warning(remark)
        async with asyncio.TaskGroup() as group:
            tasks = (
                self.reconcile(),
                self.watch_links(),
                self.resync(),
                self.reload_by_signal(),
                self.netfilter.keep(),
                self.netfilter.expel(),
                self.prober.run(),
                self.lookout.keep(),
                server.run(),
                self.watchdog.feed(period(os.environ, os.getpid())),
            )
            running = [group.create_task(task) for task in tasks]
            systemd.notify("READY=1")
            await self.stopping.wait()
            systemd.notify("STOPPING=1", f"STATUS={remarks.stopped(self.config.daemon.on_stop)}")
            for task in running:
                task.cancel()

    async def let_go(self, reason: str) -> None:
        """Leave the kernel as `on_stop` says; `reason` is what we die of, if not of a wish to stop."""
        on_stop = self.config.daemon.on_stop
        if on_stop is OnStop.FLUSH and self.stopping.is_set():  # a crash is no wish to stop
            await offline.flush_all(self.kernel, self.netfilter.table, self.config)
        self.judge.close()
        self.netfilter.close()
        self.kernel.close()
        self.sinks.tell(events.stopped(on_stop.value, reason))

    def signals(self) -> dict[signal.Signals, Callable[[], object]]:
        """Return what each signal does."""
        return {
            signal.SIGHUP: self.hangup.set,
            signal.SIGTERM: self.stopping.set,
            signal.SIGINT: self.stopping.set,
            signal.SIGUSR1: lambda: self.log.info("state", document=self.report.document(self.paused)),
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
        """Look at everything at each full minute: at what no event told, and at policies with times."""
        while True:
            await asyncio.sleep(RESYNC - time.time() % RESYNC)
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
            self.netfilter.look()
            if not self.netfilter.replacing:  # the next block depends on which one is in force
                self.judge.look()
            if self.kernel.take_disturbance():
                self.disturbed.set()
            self.enforce()
            for _ in range(READ_BACKS):
                if not self.kernel.changes:
                    break
                self.kernel.read()
                self.enforce()
            if not self.paused and self.netfilter.settled:
                self.netfilter.follow_health(self.judge, self.paths.standings(), self.kernel.links)
            self.watchdog.turned()
        except KernelError as error:
            self.log.error("kernel refused to be read", reason=str(error))
            self.kernel.changes.everything = True
            self.later(RETRY)
        self.follow_probes()
        self.report.publish(self.paused)

    def enforce(self) -> None:
        """Plan from the mirror, and apply."""
        again = self.paths.look(self.kernel.links, self.kernel.all_defaults(), time.monotonic())
        if again is not None:
            self.later(again)
        target = self.target()
        plan = diff(self.kernel.state(), target)
        recycled, self.judge.recycled = self.judge.recycled, []
        self.judge.tunnels = self.kernel.tunnel_marks
        self.lookout.notice(self.config, self.kernel.others)
        self.netfilter.want("" if self.paused else self.judge.text(self.paths.standings()), recycled)
        plan = self.netfilter.restrain(plan, self.judge, self.kernel.families)
        self.refusals.tell_blocked(plan)
        self.refusals.tell_dead_ends(self.kernel.dead_ends)
        before, unchanged = self.wanted, target == self.wanted
        self.wanted = target if self.netfilter.settled else KernelState()  # what is held back is no drift
        if self.paused or not plan:
            self.refusals.clear()
        elif self.drift.allows(plan, before, unchanged, self.refusals.counts):
            retry = self.refusals.note(plan, self.kernel.apply(plan))
            if retry is not None:
                self.later(retry)

    def target(self) -> KernelState:
        """Return what the kernel should hold now."""
        kernel, paths, judge = self.kernel, self.paths, self.judge
        standings = paths.standings()
        return desired(judge.current, kernel.families, kernel.links, paths.hops, standings, judge.block)

    def follow_probes(self) -> None:
        """Probe over the interfaces that are there."""
        links = self.kernel.links
        found = []
        for (name, family), health in self.paths.healths.items():
            link = links.get(self.config.uplink(name).interface)
            if link is not None:
                found.append(ProbePath(name, family, link.name, link.index, health))
        self.prober.follow(found)

    # --- requests -----------------------------------------------------------------------------

    def handlers(self) -> dict[str, control.Handler]:
        """Return what the control socket can ask for."""
        return {
            "Status": control.Handler(lambda _: self.status()),
            "Monitor": control.Handler(self.sinks.monitor.look, stream=self.sinks.monitor.follow),
            "Plan": control.Handler(
                self.answer_plan, root_parameters=frozenset({"config"}), others=self.known_plan
            ),
            "Drain": control.Handler(lambda asked: self.drain(asked["uplink"], drained=True), changes=True),
            "Undrain": control.Handler(
                lambda asked: self.drain(asked["uplink"], drained=False), changes=True
            ),
            "Reload": control.Handler(self.reload, changes=True),
            "Flush": control.Handler(self.pause, changes=True),
        }

    def request_failed(self, method: str, error: Exception) -> None:
        """Log a request that failed through a fault of ours."""
        self.log.error("control request failed", method=method, exc_info=error)

    def status(self) -> dict[str, Any]:
        """Return the document of `pbrd status`: what stands in it is in the kernel, and told."""
        if self.awake.is_set():
            self.awake.clear()
            self.turn()
        return self.report.document(self.paused)

    def answer_plan(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Say what would change now, or by a reload with another file."""
        if parameters.get("config"):
            steps, table = offline.plan(Path(parameters["config"]), self.paths.standings())
            return {"steps": steps, "table": table if parameters.get("table") else ""}
        self.kernel.changes.everything = True
        self.kernel.read()
        self.wake()
        return self.known_plan(parameters)

    def known_plan(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Say what would change now as far as we know: who isn't root can't have the kernel read."""
        unread = sources.changed(self.path, self.sources)
        return self.report.plan(self.target(), unread, table=bool(asked.get("table")))

    async def reload(self, _: dict[str, Any] | None = None) -> dict[str, Any]:
        """Take the config anew. Raises ConfigError, and then nothing has changed."""
        systemd.reloading()
        try:
            async with self.one_reload:  # thousands of policies take a while to read
                (fresh, read), old = await asyncio.to_thread(sources.load, self.path), self.config
                try:
                    changed = await self.take_over(fresh)
                except KernelError:  # such as nft that is not there: nothing may be half applied
                    with contextlib.suppress(KernelError):
                        await self.take_over(old)
                    raise
        except (ConfigError, KernelError) as error:
            self.report.reload_refused(error)
            raise
        finally:
            systemd.notify("READY=1")
        self.sources = read
        self.report.reloaded(changed)
        different = changes.between(old, fresh)
        return {"changed": changed, "config": different, "generation": self.report.generation}

    async def reload_by_signal(self) -> None:
        """Reload at every SIGHUP: who sent it looks into the log."""
        while True:
            await self.hangup.wait()
            self.hangup.clear()
            with contextlib.suppress(ConfigError, KernelError):
                await self.reload()

    async def take_over(self, fresh: Config) -> list[str]:
        """Put a config into force, adopting what the kernel holds; return the lines of what changed there."""
        await self.netfilter.quiet()
        self.kernel.follow(fresh)
        self.kernel.read()
        self.judge.tunnels = self.kernel.tunnel_marks
        self.netfilter.adopt()
        before, table = self.kernel.state(), self.netfilter.applied
        names.move(self.config, fresh)
        self.config = self.judge.follow(fresh, before, self.netfilter.table.chains())
        known = adopted_standings(self.judge.current, before)
        self.paths.follow(fresh, self.kernel.families, known, time.monotonic())
        if self.report.shown is None and table not in (None, digest(self.judge.text(known))):
            self.judge.judge_anew()  # a start with other policies than connections were judged by
        self.prober.mark_with(probe_mark(fresh).value)
        self.paused = False
        self.wanted = KernelState()  # what changes now is no drift
        if reason := names.register(fresh):
            self.log.warning("table names are not registered", reason=reason)
        self.turn()
        while not self.netfilter.settled:
            await self.netfilter.settle()
            self.wanted = KernelState()
            self.turn()
        changed = diff(before, self.kernel.state()).lines()
        return [*changed, *table_steps(table, self.netfilter.text)]

    def drain(self, name: str, drained: bool) -> dict[str, Any]:
        """Take an uplink out of service for new connections, or back into it. Raises ControlError."""
        known = [uplink.name for uplink in self.config.uplinks]
        if name not in known:
            raise ControlError(remarks.unknown("drain" if drained else "undrain", name, known))
        was, before = name in self.paths.drained, self.report.snapshot(self.paused)
        wanted = self.paths.drained | {name} if drained else self.paths.drained - {name}
        self.paths.drain(wanted, time.monotonic())
        if reason := drains.save(self.drains, self.paths.drained):
            self.log.warning("drained uplinks are not written down", reason=reason)
        self.turn()
        after = self.report.snapshot(self.paused)
        if drained:
            return {"remarks": remarks.drained(self.judge.current, name, was, before, after)}
        return {"remarks": remarks.undrained(name, was, after)}

    async def pause(self, _: dict[str, Any]) -> dict[str, Any]:
        """Let go of the kernel until a reload."""
        self.paused = True
        removed = await offline.flush_all(self.kernel, self.netfilter.table, self.config)
        self.netfilter.adopt()
        self.sinks.tell(events.flushed(len(removed)))
        self.report.shown = None
        self.report.publish(self.paused)
        return {"removed": removed, "remarks": remarks.opened(self.config)}


async def run(path: Path, runtime_dir: Path, state_dir: Path, log: Any) -> bool:
    """Make a daemon and run it. A fault of ours goes into the log: to print it could wait for a reader."""
    try:
        return await Daemon(path, runtime_dir, state_dir, log).run()
    except PbrdError:
        raise
    except Exception:
        log.exception("an error of pbrd's own ended it")
        return False


def main(path: Path, runtime_dir: Path, state_dir: Path) -> int:
    """Run the daemon in the foreground. Raises ConfigError for a config that can't be used."""
    log = open_log(runtime_dir=str(runtime_dir.absolute()))
    faulthandler.enable()  # what systemd's watchdog ends tells where it stood
    well = False
    try:
        well = asyncio.run(run(path, runtime_dir, state_dir, log))
    except* KernelError as group:  # before it had begun, or in letting go
        log.error("cannot go on", reason=str(group.exceptions[0]))
    return int(not well)
