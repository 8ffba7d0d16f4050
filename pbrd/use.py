"""`pbrd use UPLINK -- CMD`: one command with all its traffic on one uplink, from its first packet.

The command runs in a scope below `uplink-NAME.slice`, which the daemon matches. It starts only when the
daemon says that it knows this slice's cgroup: a rule is loaded some milliseconds after a slice comes up.

Under systemd that is `systemd-run --scope`, of the system or of the user's own manager, which becomes the
command: terminal, signals and exit code are its own. The slice stays, as nothing else would keep it.
Without systemd we make the same cgroups ourselves, as root, wait for the command, and remove those that
are empty then. What the command leaves running stays in its scope and on its uplink; the next `pbrd use`
of this uplink clears up after it, and after a `pbrd use` that was killed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pbrd.cgroups import hierarchy
from pbrd.client import call
from pbrd.errors import NeedsRoot, PbrdError
from pbrd.remarks import unknown
from pbrd.settings import DEFAULT_POLICY
from pbrd.units import slice_of, slice_path
from pbrd.varlink import Object

NOT_EXECUTABLE, NOT_FOUND, SIGNALLED = 126, 127, 128  # exit codes, as a shell has them
KNOWN_WITHIN = 3.0  # seconds that the daemon has for taking in a new slice
ASK_EVERY = 0.01  # seconds
SYSTEMD = "/run/systemd/system"  # is there where systemd runs: sd_booted(3)
SCOPE = "pbrd-use-{}.scope"
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # the command gets those as well


def main(uplink: str, argv: list[str], runtime_dir: str = "/run/pbrd") -> int:
    """Run `argv` on `uplink` and return its exit code: 127 not found, 126 can't be run, 128 + signal.

    Raises NotRunning without a daemon, and PbrdError for an uplink that it doesn't have, where there is
    no cgroup2, and where we may not make cgroups. Under systemd it doesn't return.
    """
    status = call(runtime_dir, "Status")
    _judge(uplink, status)
    for doubt in doubts(uplink, status):
        print(f"pbrd: {doubt}", file=sys.stderr)
    if shutil.which(argv[0]) is None:
        there = os.path.exists(argv[0]) and "/" in argv[0]
        print(f"pbrd: cannot run {argv[0]}: {'not executable' if there else 'not found'}", file=sys.stderr)
        return NOT_EXECUTABLE if there else NOT_FOUND
    if os.path.isdir(SYSTEMD):
        return _under_systemd(uplink, argv, runtime_dir)
    return _by_ourselves(uplink, argv, runtime_dir)


def _judge(uplink: str, status: Object) -> None:
    """Raise PbrdError unless the daemon has this uplink in use."""
    uplinks = {one["name"]: one for one in status["uplinks"]}
    if uplink not in uplinks:
        raise PbrdError(unknown("use", uplink, uplinks))
    if status.get("paused"):
        raise PbrdError(f"cannot use {uplink}: the daemon is paused; `pbrd reload` takes over again")
    if uplinks[uplink]["state"] == "disabled":
        raise PbrdError(f"cannot use {uplink}: it is disabled in the config")


def doubts(name: str, status: Object) -> Iterator[str]:
    """Yield why the command's traffic may not come far, going by the daemon's `status`."""
    uplink = next(one for one in status["uplinks"] if one["name"] == name)
    state = uplink["state"]
    if state == "drained":
        yield f"{name} is drained: nothing can leave there until `pbrd undrain {name}`"
    elif state == "down":
        yield f"{name} is down ({uplink.get('reason')}): nothing can leave there until it is up"
    default: Object = next((p for p in status.get("policies", ()) if p["name"] == DEFAULT_POLICY), {})
    if uplink.get("nat") is False and uplink.get("ipv4") and default.get("active") != name:
        yield (
            f"{name} has no nat: programs that bind no address may send with that of another uplink; "
            f"set nat = true in [uplinks.{name}]"
        )


def _wait_until_known(uplink: str, cgroup: Path, runtime_dir: str) -> None:
    """Return when the daemon matches the cgroup by its number; raises PbrdError when it takes too long."""
    number = cgroup.stat().st_ino
    deadline = time.monotonic() + KNOWN_WITHIN
    while True:
        status = call(runtime_dir, "Status")
        _judge(uplink, status)
        known = next(one for one in status["uplinks"] if one["name"] == uplink).get("cgroups")
        if known is None:
            raise PbrdError(f"cannot use {uplink}: the running daemon doesn't route slices")
        if number in known:
            return
        if time.monotonic() > deadline:
            raise PbrdError(
                f"cannot use {uplink}: the daemon has not taken in {cgroup.name} within {KNOWN_WITHIN:g} s"
            )
        time.sleep(ASK_EVERY)


# --- under systemd ----------------------------------------------------------------------------


def scope_command(uplink: str, argv: list[str], manager: list[str]) -> list[str]:
    """Return the command that becomes `argv` in a scope of the uplink's slice (systemd-run(1))."""
    options = ["--scope", "--quiet", "--collect", f"--slice={slice_of(uplink)}"]
    return ["systemd-run", *manager, *options, "--", *argv]


def _under_systemd(uplink: str, argv: list[str], runtime_dir: str) -> int:
    manager = [] if os.geteuid() == 0 else ["--user"]
    name = slice_of(uplink)
    _systemctl(uplink, [*manager, "start", name])
    path = _systemctl(uplink, [*manager, "show", "--property=ControlGroup", "--value", name]).strip()
    _wait_until_known(uplink, hierarchy().root / path.lstrip("/"), runtime_dir)
    command = scope_command(uplink, argv, manager)
    os.execvp(command[0], command)  # noqa: S606 - no shell is meant


def _systemctl(uplink: str, arguments: list[str]) -> str:
    done = subprocess.run(["systemctl", *arguments], text=True, capture_output=True, check=False)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"systemctl failed with {done.returncode}"])[0]
        if os.geteuid() != 0 and "bus" in cause:  # no session, so no manager of this user's own
            raise NeedsRoot(f"cannot use {uplink}: {cause}")
        raise PbrdError(f"cannot use {uplink}: {cause}")
    return done.stdout


# --- without ----------------------------------------------------------------------------------


def _by_ourselves(uplink: str, argv: list[str], runtime_dir: str) -> int:
    slice_ = hierarchy().root / slice_path(slice_of(uplink))
    scope = slice_ / SCOPE.format(os.getpid())
    try:
        _make(scope)
        procs = os.open(scope / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        text = f"cannot use {uplink}: cannot make {scope}: {error.strerror}"
        if isinstance(error, PermissionError):
            raise NeedsRoot(f"{text}; without systemd only root may") from None
        raise PbrdError(text) from None
    try:
        _wait_until_known(uplink, slice_, runtime_dir)
        return _run(argv, procs)
    finally:
        os.close(procs)
        _clear_up(slice_, scope)


def _make(scope: Path) -> None:
    """Make the scope and all above it, against another `pbrd use` that removes what is empty."""
    for attempt in range(10):
        try:
            return scope.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:
            if attempt == 9:
                raise
    return None


def _clear_up(slice_: Path, scope: Path) -> None:
    """Remove our scope, those of the dead, and the slices that are empty then."""
    dead = [one for one in slice_.glob(SCOPE.format("*")) if not Path(f"/proc/{_maker(one)}").exists()]
    for cgroup in (scope, *dead):
        with suppress(OSError):  # the command left something running
            cgroup.rmdir()
    with suppress(OSError):  # others run in there
        while slice_.name.startswith("uplink"):
            slice_.rmdir()
            slice_ = slice_.parent


def _maker(scope: Path) -> str:
    found = re.search(r"[0-9]+", scope.name)
    return found[0] if found else ""


def _run(argv: list[str], procs: int) -> int:
    """Run the command in the cgroup behind `procs`, hand signals on, and return its exit code."""
    early: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _: FrameType | None) -> None:
        if child is None:
            early.append(number)
        elif number in FORWARDED:
            child.send_signal(number)

    for number in (*FORWARDED, *FROM_TERMINAL):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) means it
            signal.signal(number, hand_on)
    try:
        # "0" is whoever writes; no thread runs here that preexec_fn could hurt
        child = subprocess.Popen(argv, preexec_fn=lambda: os.write(procs, b"0"))  # noqa: PLW1509
    except OSError as error:
        print(f"pbrd: cannot run {argv[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    for missed in early:
        child.send_signal(missed)
    code = child.wait()
    return code if code >= 0 else SIGNALLED - code
