"""The blocking client of the control socket: one call, one answer or many. Imports next to nothing."""

import os
import socket
import time
from collections.abc import Iterator

from pbrd import varlink
from pbrd.errors import ControlError, NotRunning
from pbrd.varlink import Object

TIMEOUT = 10.0  # seconds; the daemon answers a status within a millisecond
RETRY = 0.01  # seconds
ANSWER_LIMIT = 64 << 20  # bytes; a document of 1,000 uplinks has 1 MB


def call(
    runtime_dir: str | os.PathLike[str],
    method: str,
    parameters: Object | None = None,
    timeout: float = TIMEOUT,
) -> Object:
    """Call `method` ("Status", or a full name) of the daemon in `runtime_dir` and return what it answers.

    `timeout` is in seconds, for the whole call. Raises NotRunning if no daemon listens, ConfigInvalid
    with its problems for a refused config, PermissionDenied, CallError for what else the daemon
    answered, and ControlError if the talk broke off.
    """
    name = method if "." in method else f"{varlink.INTERFACE}.{method}"
    message = {"method": name, "parameters": parameters or {}}
    path = os.path.join(runtime_dir, varlink.SOCKET)  # pathlib would cost 5 ms
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        _connect(sock, path, deadline)
        try:
            _send(sock, varlink.encode(message))
            answer = _receive(sock, deadline)
        except TimeoutError:
            raise ControlError(f"cannot {method.lower()}: no answer within {timeout:g} s") from None
        except OSError as error:
            raise ControlError(f"cannot {method.lower()}: {error.strerror}: {path}") from None
    return varlink.result(answer)


def follow(
    runtime_dir: str | os.PathLike[str],
    method: str,
    parameters: Object | None = None,
    timeout: float | None = None,
) -> Iterator[Object]:
    """Call `method` with "more" and yield each answer as it comes.

    `timeout` is in seconds, for each answer. Raises what `call` does; ControlError, too, when the daemon
    hangs up, as it does when it stops or when answers are not taken within seconds.
    """
    message = {"method": f"{varlink.INTERFACE}.{method}", "parameters": parameters or {}, "more": True}
    buffer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _connect(sock, os.path.join(runtime_dir, varlink.SOCKET), time.monotonic() + TIMEOUT)
        sock.settimeout(timeout)
        try:
            _send(sock, varlink.encode(message))
            while chunk := sock.recv(1 << 16):
                buffer += chunk
                while (end := buffer.find(b"\0")) >= 0:
                    answer = bytes(buffer[:end])
                    del buffer[: end + 1]
                    yield varlink.result(answer)
        except TimeoutError:
            raise ControlError(f"cannot {method.lower()}: no answer within {timeout:g} s") from None
        except OSError as error:
            raise ControlError(f"cannot {method.lower()}: {error.strerror}") from None
    raise ControlError(f"cannot {method.lower()} any longer: the daemon hung up")


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    try:
        while True:
            try:
                return sock.connect(path)
            except BlockingIOError:  # the daemon's backlog is full; unix sockets do not wait (connect(2))
                if time.monotonic() > deadline:
                    raise ControlError(f"cannot open {path}: too many clients wait for the daemon") from None
                time.sleep(RETRY)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise NotRunning(f"no daemon is running (nobody listens on {path})") from None
    except PermissionError:
        raise ControlError(f"cannot open {path}: only root and group pbrd may talk to the daemon") from None
    except OSError as error:
        raise ControlError(f"cannot open {path}: {error.strerror or error}") from None


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return  # a daemon with too many clients says so and hangs up: its words are there to read


def _receive(sock: socket.socket, deadline: float) -> bytes:
    """Return one message without its NUL."""
    buffer = bytearray()
    while not buffer.endswith(b"\0"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        chunk = sock.recv(1 << 16)
        if not chunk:
            raise ControlError("cannot read the daemon's answer: it hung up")
        buffer += chunk
        if len(buffer) > ANSWER_LIMIT:
            raise ControlError("cannot read the daemon's answer: it has no end")
    return bytes(buffer[:-1])
