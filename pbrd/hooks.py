"""Hooks: executables in `hooks.d` beside the config, run on each event, beside the daemon's work.

What keeps a bad hook from doing harm: one runs at a time, for at most `LIMIT` seconds, in a session of its
own that ends with it; it inherits no file descriptor and no environment; its output is read as it comes,
and told up to `OUTPUT_LINES`; events wait in a bounded queue, of which the oldest are dropped; the memory
it takes is the first that the kernel takes back. What others than root could have written is not run.
"""

import asyncio
import contextlib
import os
import re
import signal
import stat
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

LIMIT = 30.0  # seconds for one hook
GRACE = 2.0  # seconds between SIGTERM and SIGKILL, and for the last hooks when the daemon stops
QUEUE = 1000  # events
UNSEEN = 20_000  # while we look whether there is a hook at all: thousands of policies may fail over at once
OUTPUT_LINES = 50  # of one hook and one event
LINE = 1000  # bytes of a line; what is longer becomes more lines
CHUNK = 1 << 16
READ_PACE = 0.01  # seconds between two chunks: who prints without end is slowed down, not the daemon
VALUE_LIMIT = 1 << 15  # characters of a variable; the kernel takes 128 KiB (execve(2))
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/",
}
# The shell starts the hook. To start it here would hold us until its file is read, be the disk ever so slow.
START = ("/bin/sh", "-c", 'exec "$0"')
# What editors and package managers leave beside a file.
LEFT_OVER = re.compile(r"^\.|~$|\.(dpkg-(old|dist|new|tmp)|ucf-(old|dist|new)|rpm(new|save|orig)|bak|swp)$")


def unsafe(path: Path) -> str:
    """Return why somebody else than root could have written `path`, or ""; may raise OSError.

    A symlink is judged with every directory on its way: who can write one of them chooses what is run.
    """
    while True:
        directory = path.parent.resolve()
        path = directory / path.name
        for part in (directory, *directory.parents):
            if reason := _writable(part):
                return reason
        if not path.is_symlink():
            return _writable(path)
        path = directory / path.readlink()


def _writable(part: Path) -> str:
    found = part.stat()
    sticky = (
        stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    )  # as /tmp: nobody replaces others' files
    if found.st_uid not in (0, os.geteuid()):
        return f"{part} belongs to uid {found.st_uid}"
    if found.st_mode & 0o022 and not sticky:
        return f"{part} can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def find(directory: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the hooks of `directory` in name order, and those that are refused, with the reason."""
    hooks, refused = [], {}
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if not LEFT_OVER.search(entry.name))
    except OSError:  # none there: no hooks
        return [], {}
    for path in (directory / name for name in names):
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) or not mode & 0o111:
                continue
            reason = unsafe(path)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason:
            refused[path] = reason
        else:
            hooks.append(path)
    return hooks, refused


class Hooks:
    """The queue of events and the one who works on it. `log` gets what hooks print and how they fail."""

    def __init__(self, directory: Path, log: Any, runtime_dir: str, limit: float = LIMIT) -> None:
        """Run what is in `directory`; `runtime_dir` is where a hook finds the daemon."""
        self.directory, self.log, self.limit = directory, log, limit
        self.environment = ENVIRONMENT | {"RUNTIME_DIRECTORY": runtime_dir, "PBRD_RUNTIME_DIR": runtime_dir}
        self.refused: dict[Path, str] = {}
        self.dropped = 0
        self._on = ""  # the event that hooks run on now
        self._looking = False
        self._queue: deque[Mapping[str, str]] = deque()
        self._awake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, facts: Mapping[str, str]) -> None:
        """Have the hooks run with these facts (name → value), soon."""
        if _is_echo(self._on, facts):
            return
        while len(self._queue) >= (UNSEEN if self._looking else QUEUE):
            self._queue.popleft()
            if not self.dropped:
                self.log.warning("hooks are too slow: the oldest events are dropped", waiting=QUEUE)
            self.dropped += 1
        self._queue.append(facts)
        self._idle.clear()
        self._awake.set()

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Run hooks while the block runs, and `GRACE` seconds longer for those that still wait."""
        task = asyncio.create_task(self._work())  # ends below; a TaskGroup would wrap the block's errors
        try:
            yield
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE):
                    await self._idle.wait()
            task.cancel()
            await asyncio.wait([task])

    async def _work(self) -> None:
        while True:
            await self._awake.wait()
            self._awake.clear()
            while self._queue:
                facts, waiting = self._queue.popleft(), len(self._queue)
                self._on = facts.get("event", "")
                try:
                    self._looking = True
                    try:
                        hooks = await asyncio.to_thread(self._look)
                    finally:
                        self._looking = False
                    if not hooks:  # nor for what was waiting when we looked
                        for _ in range(min(waiting, len(self._queue))):
                            self._queue.popleft()
                    for hook in hooks:
                        await self._run(hook, facts)
                except Exception as error:  # noqa: BLE001 - top of the task; no process, thread or descriptor left
                    self.log.warning("hooks cannot be run", on=facts.get("event"), reason=repr(error))
            if self.dropped:
                self.log.warning("hooks have caught up", dropped=self.dropped)
                self.dropped = 0
            self._on = ""
            self._idle.set()

    def _look(self) -> list[Path]:
        """Return the hooks that are there now; say once which are refused."""
        hooks, refused = find(self.directory)
        for path, reason in refused.items():
            if self.refused.get(path) != reason:
                self.log.error(
                    f"hook {path.name} is not run: only root may be able to write it",
                    hook=path.name,
                    reason=reason,
                )
        self.refused = refused
        return hooks

    async def _run(self, hook: Path, facts: Mapping[str, str]) -> None:
        """Run one hook to its end, or to the end of its time."""
        reading, writing = os.pipe()
        output = Output(self.log, hook.name)
        try:
            try:
                process = _start(hook, writing, self.environment | _variables(facts))
            finally:
                os.close(writing)
            os.set_blocking(reading, False)
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(output.listen(reading))
                in_time = await self._wait(process)
                listening.cancel()
            output.rest(reading)
        finally:
            os.close(reading)
        output.close()
        self._tell(hook, facts.get("event", ""), process.poll(), in_time)

    def _tell(self, hook: Path, event: str, code: int | None, in_time: bool) -> None:
        if not in_time:
            self.log.warning(
                f"hook {hook.name} was ended: it took longer than {self.limit:g} s", hook=hook.name, on=event
            )
        elif code is not None and code != 0:
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            self.log.warning(f"hook {hook.name} failed", hook=hook.name, on=event, reason=how)

    async def _wait(self, process: "subprocess.Popen[bytes]") -> bool:
        """Wait for the end of a hook, or end it with all its session's processes; say whether it was in time.

        The group is killed before its leader is reaped: until then its number can be nobody else's. A
        process that even SIGKILL does not end (it waits for a disk) is left behind.
        """
        pidfd = os.pidfd_open(process.pid)
        try:
            in_time = await _ends(pidfd, self.limit)
            if not in_time:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGTERM)
                await _ends(pidfd, GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            os.close(pidfd)
        for _ in range(100):
            if process.poll() is not None:
                break
            await asyncio.sleep(0.01)
        return in_time


def _is_echo(on: str, facts: Mapping[str, str]) -> bool:
    """Say whether a hook that runs on the event `on` got these by asking for the same again, in vain.

    A hook that reloads on each reload would run for ever.
    """
    in_vain = on == "reload-refused" or (on == "reload" and facts.get("changes") == "0")
    return in_vain and facts.get("event") == on


def _start(hook: Path, output: int, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a hook that prints into the file descriptor `output`; this takes as long as to start a shell."""
    process = subprocess.Popen(
        [*START, str(hook)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd="/",
        env=environment,
        start_new_session=True,
    )
    with contextlib.suppress(OSError):
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
    return process


def _variables(facts: Mapping[str, str]) -> dict[str, str]:
    """Return PBRD_NAME=value for each fact, as execve(2) takes it."""
    return {f"PBRD_{name.upper()}": value.replace("\0", "")[:VALUE_LIMIT] for name, value in facts.items()}


async def _readable(fd: int) -> None:
    """Wait until there is something to read."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


async def _ends(pidfd: int, within: float) -> bool:
    """Wait for the end of a process; say whether it came within so many seconds."""
    try:
        async with asyncio.timeout(within):
            await _readable(pidfd)
    except TimeoutError:
        return False
    return True


class Output:
    """What one run of a hook prints: told line by line, up to a limit, and counted beyond it."""

    def __init__(self, log: Any, hook: str) -> None:
        self.log, self.hook = log, hook
        self.lines = 0
        self._begun = b""

    async def listen(self, fd: int) -> None:
        """Read until the end, not faster than a chunk every `READ_PACE` seconds."""
        while True:
            await _readable(fd)
            if not self._read(fd):
                return
            await asyncio.sleep(READ_PACE)

    def rest(self, fd: int) -> None:
        """Take what is there now, as far as it would be told."""
        while self.lines < OUTPUT_LINES and self._read(fd):
            pass

    def close(self) -> None:
        """Tell what came without an end of line, and how much was not told."""
        if self._begun:
            self._line(self._begun)
        if self.lines > OUTPUT_LINES:
            more = self.lines - OUTPUT_LINES
            self.log.warning(f"hook {self.hook} printed {more} more lines", hook=self.hook)

    def _read(self, fd: int) -> bool:
        """Take in one chunk; say whether there may be more."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        *lines, self._begun = (self._begun + data).split(b"\n")
        if self.lines > OUTPUT_LINES:
            self.lines += len(lines)
            self._begun = self._begun[:LINE]
            return bool(data)
        for line in lines:
            self._line(line)
        if len(self._begun) > LINE:
            self._line(self._begun)
            self._begun = b""
        return bool(data)

    def _line(self, line: bytes) -> None:
        for start in range(0, len(line) or 1, LINE):
            self.lines += 1
            if self.lines <= OUTPUT_LINES:
                text = line[start : start + LINE].decode(errors="replace")
                self.log.info(f"hook {self.hook}: {text}", hook=self.hook)
