"""The control socket: a Varlink server that no client can use to stall the daemon's loop.

Who may ask: the mode of the socket file (0660 root:pbrd; 0600 without such a group) lets root and the
group read; what changes something is for root alone, judged by SO_PEERCRED (unix(7)).

What holds a hostile client: a message has at most `MESSAGE_LIMIT` bytes and must be complete within
`IDLE` seconds; there are at most `CLIENTS` of them, the last few places kept for root; a client has one
call in work and one answer on its way, which it must take within `TAKE` seconds; calls begin no faster
than one every `PACE` seconds, so that between two of them the loop has a turn. Those who are not root stand
in one row, first come, first served, and after each answer the row rests `REST` times as long as it took:
with thousands of policies a status takes tens of milliseconds. Root does not wait for them.
Clients that follow something ("more") keep their place for as long as they take what comes; they get at
most `STREAMS` of the places.
"""

import asyncio
import contextlib
import grp
import inspect
import os
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pbrd import __version__, varlink
from pbrd.errors import ConfigError, ControlError, PbrdError
from pbrd.locks import lock, unlock
from pbrd.varlink import INTERFACE, SERVICE, CallError, Object

MESSAGE_LIMIT = 1 << 16  # bytes
CLIENTS = 32
BACKLOG = 128
FOR_ROOT = 8  # of the CLIENTS: places that only root gets
STREAMS = 16  # of the CLIENTS: places of those that follow something; half of them only root gets
IDLE = 30.0
TAKE = 5.0
PACE = 0.001
REST = 4.0  # so all clients but root's together get a fifth of the loop
GROUP = "pbrd"
RETRY_ACCEPT = 0.5  # seconds, when the process has no file descriptor left
LOOK = 5.0  # seconds between two looks whether the socket file is still there


@dataclass(frozen=True, slots=True)
class Handler:
    """What answers a method: parameters → parameters of the answer, at once or later.

    It may raise ConfigError (the client gets its problems), CallError or any PbrdError (a message).
    """

    call: Callable[[Object], Object | Awaitable[Object]]
    stream: Callable[[Object], AsyncGenerator[Object, None]] | None = (
        None  # answers a call with "more", without an end
    )
    changes: bool = False  # only root may call it
    others: Callable[[Object], Object] | None = None  # answers those who are not root, if not `call`
    root_parameters: frozenset[str] = field(default_factory=frozenset)  # only root may give these


def description(interface: str) -> str:
    """Return the Varlink description of an interface of ours; raises InterfaceNotFound."""
    if interface not in (INTERFACE, SERVICE):
        raise varlink.InterfaceNotFound(interface)
    return Path(__file__).with_name(f"{interface}.varlink").read_text(encoding="utf-8")


def _listen(path: Path) -> socket.socket:
    """Return a socket that listens at `path`; whoever may not connect never could, not even for a moment."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)  # of a dead daemon: we hold the lock
        sock.bind(str(path))
        path.chmod(0o600)  # before listen(2), connect(2) is refused
        with contextlib.suppress(KeyError, PermissionError):
            group = grp.getgrnam(GROUP).gr_gid
            if path.stat().st_gid != group:  # as a service we are in the group, and may not chown
                os.chown(path, -1, group)
            path.chmod(0o660)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ControlError(f"cannot listen at {path}: {error.strerror or error}") from None
    return sock


def _peer_is_root(sock: socket.socket) -> bool:
    """Say whether the other end was root when it connected, or whoever the daemon itself runs as."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid in (0, os.geteuid())


class Server:
    """Serves `handlers`, one for each method that the description of io.pbrd.Daemon declares.

    `failed` is told of an exception that a handler should not have raised.
    """

    def __init__(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        failed: Callable[[str, Exception], None] = lambda _method, _error: None,
    ) -> None:
        self._path = path
        self._declared = varlink.methods(description(INTERFACE))
        if self._declared.keys() != handlers.keys():
            raise ValueError(
                f"handlers {sorted(handlers)} are not the methods declared {sorted(self._declared)}"
            )
        self._handlers = handlers
        self._failed = failed
        self._lock: int | None = None
        self._socket: socket.socket | None = None
        self._file: tuple[int, int] | None = None  # device and inode of our socket file
        self._clients = 0
        self._streams = 0
        self._next_call = 0.0  # of root
        self._others = asyncio.Lock()  # the row of all others; it wakes them in order
        self._rest_until = 0.0

    def open(self) -> None:
        """Take the runtime directory and listen; raises ControlError if another daemon has it.

        Meant to be called before anything touches the kernel; clients wait until `run`.
        """
        if self._socket is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._path.with_suffix(".pid"))
        except OSError as error:
            raise ControlError(f"cannot use {self._path.parent}: {error.strerror}") from None
        try:
            self._listen()
        except BaseException:
            self.close()
            raise

    def _listen(self) -> socket.socket:
        self._socket = _listen(self._path)
        stat = self._path.stat()
        self._file = stat.st_dev, stat.st_ino
        return self._socket

    def close(self) -> None:
        """Stop listening, remove the socket file if it is still ours, and let go of the lock."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(OSError):
                stat = self._path.stat()
                if (stat.st_dev, stat.st_ino) == self._file:
                    self._path.unlink()
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    async def run(self) -> None:
        """Serve until cancelled. If it had to open first it closes, too; else that is for who opened.

        So a daemon can keep the lock until it has put the kernel in order.
        """
        ours = self._socket is None
        self.open()
        assert self._socket is not None  # noqa: S101 - for mypy
        try:
            async with asyncio.TaskGroup() as group:
                accepting = group.create_task(self._accept(self._socket, group))
                while True:
                    await self._vanished()
                    with contextlib.suppress(ControlError, OSError):  # not even the directory is there
                        former, fresh = self._socket, self._listen()
                        accepting.cancel()
                        await asyncio.wait({accepting})
                        former.close()
                        accepting = group.create_task(self._accept(fresh, group))
        finally:
            if ours:
                self.close()

    async def _vanished(self) -> None:
        """Wait until somebody has removed the socket file: without it nobody can steer the daemon."""
        while True:
            await asyncio.sleep(LOOK)
            if not self._is_there():
                return

    def _is_there(self) -> bool:
        return os.path.lexists(self._path)

    async def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:  # EMFILE, ENFILE, ENOMEM; the client waits in the backlog
                await asyncio.sleep(RETRY_ACCEPT)
                continue
            root = _peer_is_root(sock)
            if self._clients >= (CLIENTS if root else CLIENTS - FOR_ROOT):
                with contextlib.suppress(OSError), sock:
                    sock.send(varlink.error_reply(varlink.Busy()))  # fits into an empty buffer: never blocks
            else:
                self._clients += 1
                group.create_task(self._serve(sock, root))
            await asyncio.sleep(PACE)  # sock_accept does not yield while somebody waits

    async def _serve(self, sock: socket.socket, root: bool) -> None:
        """Answer one client, call by call, until it leaves or misbehaves."""
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        try:
            with sock:
                going_on = True
                while going_on:
                    async with asyncio.timeout(IDLE):
                        message = await _receive(sock, buffer)
                    if message is None:
                        return
                    async with self._turn(root):
                        answer, going_on = await self._answer(message, root)
                    if not isinstance(answer, bytes):
                        await self._stream(sock, answer, root)
                        return
                    async with asyncio.timeout(TAKE):
                        await loop.sock_sendall(sock, answer)
        except OSError:  # TimeoutError is one: the client's trouble, and nobody else's
            return
        finally:
            self._clients -= 1

    @contextlib.asynccontextmanager
    async def _turn(self, root: bool) -> AsyncIterator[None]:
        """Wait for the next free place in a row of calls, which begin `PACE` apart, and answer there."""
        clock = asyncio.get_running_loop().time
        if root:  # nobody else waits meanwhile: a reload takes seconds
            now = clock()
            turn = max(now, self._next_call)
            self._next_call = turn + PACE
            await asyncio.sleep(turn - now)
            yield
            return
        async with self._others:
            await asyncio.sleep(max(0.0, self._rest_until - clock()))
            began = clock()
            try:
                yield
            finally:
                self._rest_until = clock() + max(PACE, REST * (clock() - began))

    async def _stream(self, sock: socket.socket, messages: AsyncGenerator[Object, None], root: bool) -> None:
        """Send what comes until the client leaves, says anything, or does not take a message in time."""
        self._streams += 1
        try:
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(self._send_each(sock, messages, root))
                await asyncio.get_running_loop().sock_recv(sock, 1)
                sending.cancel()
        except* OSError:
            pass  # the client's trouble
        except* Exception as error:  # noqa: BLE001 - as in `_answer`
            self._failed("Monitor", error)
        finally:
            self._streams -= 1

    async def _send_each(
        self, sock: socket.socket, messages: AsyncGenerator[Object, None], root: bool
    ) -> None:
        async with contextlib.aclosing(messages):
            async for message in messages:
                async with self._turn(root):
                    answer = varlink.reply(message, continues=True)
                async with asyncio.timeout(TAKE):
                    await asyncio.get_running_loop().sock_sendall(sock, answer)

    async def _answer(self, message: bytes, root: bool) -> tuple[bytes | AsyncGenerator[Object, None], bool]:
        """Return the answer (empty to a oneway call) or a stream of them, and whether we go on listening."""
        if len(message) > MESSAGE_LIMIT:
            long = varlink.BadMessage(f"the message is longer than {MESSAGE_LIMIT} bytes")
            return varlink.error_reply(long), False
        try:
            request = varlink.request(message)
        except CallError as error:
            return varlink.error_reply(error), False
        try:
            found = await self._dispatch(request, root)
            if isinstance(found, AsyncGenerator):
                return found, False
            answer = varlink.reply(found)
        except varlink.Busy as error:
            return varlink.error_reply(error), False
        except CallError as error:
            answer = varlink.error_reply(error)
        except ConfigError as error:
            problems = tuple(str(problem) for problem in error.problems)
            answer = varlink.error_reply(varlink.ConfigInvalid(problems))
        except PbrdError as error:
            answer = varlink.error_reply(varlink.Failed(str(error)))
        except Exception as error:  # noqa: BLE001 - top of the client's task: one bad handler must not end the daemon
            self._failed(request.method, error)
            answer = varlink.error_reply(varlink.Failed(f"internal error, see the log: {error!r}"))
        return b"" if request.oneway else answer, True

    async def _dispatch(self, request: varlink.Request, root: bool) -> Object | AsyncGenerator[Object, None]:
        interface, _, method = request.method.rpartition(".")
        if interface == SERVICE:
            return _describe_service(method, request)
        if interface != INTERFACE:
            raise varlink.InterfaceNotFound(interface)
        if method not in self._handlers:
            raise varlink.MethodNotFound(request.method)
        handler = self._handlers[method]
        parameters = varlink.check(self._declared[method], request.parameters)
        if not root and (handler.changes or handler.root_parameters & parameters.keys()):
            raise varlink.PermissionDenied
        if handler.stream is not None and request.more and not request.oneway:
            if self._streams >= (STREAMS if root else STREAMS // 2):
                raise varlink.Busy("too many clients follow already; try again")
            return handler.stream(parameters)
        call = handler.call if root or handler.others is None else handler.others
        answer = call(parameters)
        return await answer if inspect.isawaitable(answer) else answer


async def _receive(sock: socket.socket, buffer: bytearray) -> bytes | None:
    """Take the next message out of `buffer`, filled from `sock`; None at its end.

    A message above MESSAGE_LIMIT is returned cut off, just long enough to be recognised.
    """
    loop = asyncio.get_running_loop()
    searched = 0
    while (end := buffer.find(b"\0", searched)) < 0:
        searched = len(buffer)
        if searched > MESSAGE_LIMIT:
            return bytes(buffer)
        chunk = await loop.sock_recv(sock, MESSAGE_LIMIT + 1)
        if not chunk:
            return None
        buffer += chunk
    message = bytes(buffer[:end])
    del buffer[: end + 1]
    return message


def _describe_service(method: str, request: varlink.Request) -> Object:
    """Answer a method of org.varlink.service."""
    declared = varlink.methods(description(SERVICE))
    if method not in declared:
        raise varlink.MethodNotFound(request.method)
    parameters = varlink.check(declared[method], request.parameters)
    if method == "GetInterfaceDescription":
        return {"description": description(parameters["interface"])}
    return {
        "vendor": "pbrd",
        "product": "pbrd",
        "version": __version__,
        "url": "man:pbrd(8)",
        "interfaces": [SERVICE, INTERFACE],
    }
