"""What all tests share: a lab of namespaces for each test, and the real daemon in its router."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any, Protocol, TypeVar

import pytest
from box import Box, NotPossible
from hypothesis import HealthCheck, settings

from pbrd.client import call
from pbrd.errors import ControlError, LabError
from pbrd.lab import LAN, TARGETS, TARGETS6, Lab, Uplink

# Configs of tests are put together from these; `names` must never be the host's.
HEAD = '[daemon]\nnames = ""\n'
PROBE = f"""
[probe]
targets = ["{TARGETS[2]}", "{TARGETS6[2]}"]
interval = "200ms"
timeout = "200ms"
confirm_interval = "50ms"
rise = 3
stable_for = "1s"
"""
UPLINKS = """
[uplinks.fiber]
interface = "fiber"
[uplinks.lte]
interface = "lte"
"""

# Whether an example takes 200 ms says how busy the machine is, and nothing of what is tested.
settings.register_profile("pbrd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pbrd")

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


class MakeLab(Protocol):
    def __call__(
        self,
        uplinks: tuple[str | Uplink, ...] = ("fiber", "lte"),
        *,
        defaults: bool = True,
        rp_filter: int = 0,
        tag: str = "",
    ) -> Lab: ...


class StartDaemon(Protocol):
    def __call__(self, lab: Lab, config: str, *, wait: bool = True) -> "Daemon": ...


def eventually(predicate: Callable[[], T], within: float = 5.0) -> T:
    """Call until it returns something true, and return that; fail when the time (seconds) is over."""
    deadline = time.monotonic() + within
    while not (result := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within} s: {predicate}", pytrace=True)
        time.sleep(0.01)
    return result


@pytest.fixture(scope="session")
def no_lab() -> str:
    """Why this machine can have no lab; "" if it can. Once it can, a lab that fails is a failed test."""
    try:
        with Lab():
            return ""
    except LabError as error:
        return str(error)


@pytest.fixture
def make_lab(no_lab: str) -> Iterator[MakeLab]:
    """Build labs with arguments of one's own; they go when the test ends."""
    if no_lab:
        pytest.skip(f"no lab here: {no_lab}")
    with ExitStack() as labs:

        def make(*arguments: Any, **keywords: Any) -> Lab:
            return labs.enter_context(Lab(*arguments, **keywords))

        yield make


@pytest.fixture
def make_box() -> Iterator[Callable[..., Box]]:
    """Boot boxes, with the arguments of `Box`; they go when the test ends.

    Where no box can be there, the test is skipped; with PBRD_REQUIRE_SYSTEMD=1 it fails.
    """
    with ExitStack() as boxes:

        def make(*arguments: Any, **keywords: Any) -> Box:
            try:
                return boxes.enter_context(Box(*arguments, **keywords))
            except NotPossible as reason:
                if os.environ.get("PBRD_REQUIRE_SYSTEMD") == "1":
                    pytest.fail(f"no box here, though PBRD_REQUIRE_SYSTEMD=1 asks for one: {reason}")
                pytest.skip(f"no box here: {reason}")

        yield make


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    """The default lab: fiber and lte."""
    return make_lab()


def all_up(daemon: "Daemon") -> bool:
    """Whether every uplink of the daemon is up."""
    uplinks = daemon.status().get("uplinks", [])
    return bool(uplinks) and all(uplink["state"] == "up" for uplink in uplinks)


def goes_by(daemon: "Daemon", uplink: str, policy: str = "default") -> bool:
    """Whether a policy takes `uplink` in both families: each is judged on its own, and falls on its own."""
    return set(daemon.policy(policy).get("families", {}).values()) == {uplink}


class Leaving:
    """A stream whose packets are also counted where they leave, by the kernel.

    A busy machine makes answers late, and late is lost; but it makes no packet leave elsewhere or nowhere.
    """

    def __init__(self, lab: Lab, src: str = LAN[0], rate: int = 1000) -> None:
        family = "ip6" if ":" in src else "ip"
        self.counter = lab.counter(f"{family} saddr {src} meta l4proto udp")
        self.stream = lab.traffic(rate=rate, src=src)

    def stop(self) -> tuple[list[str], int]:
        """End it; return its path, and how many packets left by no uplink."""
        result = self.stream.stop()
        return result.path, result.sent - sum(self.counter.read().values())


class Writes:
    """Everything that changes in the router's rules and routes, as `ip monitor` sees it."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.path = directory / "monitor"
        with self.path.open("w") as file:
            lab.spawn(lab.router, ["ip", "monitor", "rule", "route"], stdout=file, stdin=subprocess.DEVNULL)
        time.sleep(0.3)  # until it listens: it says nothing

    def seen(self) -> str:
        time.sleep(0.3)  # what was written has been printed by then
        return self.path.read_text()


def as_nobody(act: Callable[[], int]) -> int:
    """Call `act` in a child that is nobody, and return its exit code.

    Whatever it needs must be imported before: nobody may be unable to read our Python.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            code = act()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def let_others_in(directory: Path) -> Path:
    """Open a temporary directory to other users: pytest makes it, and those above it, for ours alone."""
    for part in (directory, *directory.parents):
        if part == Path(tempfile.gettempdir()):
            break
        part.chmod(0o755)
    return directory


class Daemon:
    """The real `pbrd run` in a lab's router."""

    def __init__(self, lab: Lab, config: str, directory: Path) -> None:
        self._lab, self._directory = lab, directory
        self.config, self.runtime = directory / "pbrd.toml", directory / "run"
        self.runtime.mkdir(parents=True, exist_ok=True)
        (directory / "state").mkdir(exist_ok=True)
        self.config.write_text(config)
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        run = ["run", "--config", str(self.config), "--runtime-dir", str(self.runtime)]
        run += ["--state-dir", str(self._directory / "state")]
        with (self._directory / "log").open("a") as log:
            return self._lab.spawn(
                self._lab.router,
                [sys.executable, "-m", "pbrd", *run],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """All that it has printed, over restarts."""
        return (self._directory / "log").read_text()

    def command(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        """Run `pbrd ARGV` beside it, in the router, to its end; never raises."""
        pbrd = [sys.executable, "-m", "pbrd", *argv, "--runtime-dir", str(self.runtime)]
        return subprocess.run(
            ["ip", "netns", "exec", self._lab.router, *pbrd],
            check=False,
            cwd=ROOT,
            env=_environment(),
            text=True,
            capture_output=True,
            timeout=30,
        )

    def status(self) -> dict[str, Any]:
        """What `pbrd status --json` says; {} while nobody answers."""
        try:
            return call(self.runtime, "Status", timeout=5.0)  # as the command does, without starting one
        except ControlError:
            return {}

    def uplink(self, name: str) -> dict[str, Any]:
        """One uplink of the status."""
        return next((one for one in self.status().get("uplinks", []) if one["name"] == name), {})

    def policy(self, name: str) -> dict[str, Any]:
        """One policy of the status."""
        return next((one for one in self.status().get("policies", []) if one["name"] == name), {})

    def wait_ready(self, within: float = 10.0) -> None:
        """Wait until it answers; fail with its log if it ends instead."""
        deadline = time.monotonic() + within
        while not self.status():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"pbrd run did not become ready (exit {self._process.poll()}):\n{self.log}")
            time.sleep(0.02)

    def reload(self, text: str) -> "subprocess.CompletedProcess[str]":
        """Write another config and run `pbrd reload`, which waits until it is in force or refused."""
        self.config.write_text(text)
        return self.command("reload")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self, number: int = SIGTERM) -> int:
        """Signal it, wait for its end, return its exit code (negative: the signal that ended it)."""
        if self._process.poll() is None:
            self.signal(number)
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            pytest.fail(f"pbrd run did not stop within 10 s of signal {number}:\n{self.log}")

    def restart(self, *, wait: bool = True) -> None:
        """Start it again after `stop`, with the same directories."""
        self._process = self._start()
        if wait:
            self.wait_ready()


def _environment() -> dict[str, str]:
    """The tests' environment without what belongs to a service manager that started them."""
    services = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM")
    kept = {key: value for key, value in os.environ.items() if key not in services}
    return kept | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Start the daemon in a lab's router with this config and wait until it answers."""
    started: list[Daemon] = []

    def start(lab: Lab, config: str, *, wait: bool = True) -> Daemon:
        made = Daemon(lab, config, tmp_path / f"daemon{len(started)}")
        started.append(made)
        if wait:
            made.wait_ready()
        return made

    yield start
    for one in started:
        one.stop(SIGKILL)
