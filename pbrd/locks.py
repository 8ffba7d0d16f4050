"""Who is alone: one daemon in a runtime directory, and one in a network namespace.

The first is a lock of flock(2) on a file. The second is the name of an abstract socket, of which the kernel
keeps one list for each network namespace, and which goes with its process (unix(7)). Any user could take
that name first, so it counts only in the hands of root, or of whoever we are.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pbrd.errors import ControlError

NAME = "\0pbrd"  # abstract: of this network namespace
BACKLOG = 128
MODE = 0o600  # who may open a file may lock it, and keep the daemon from starting


def lock(path: Path) -> int:
    """Take the lock of a runtime directory: return the file descriptor that holds it, or raise ControlError.

    The file is never removed: a third daemon could then lock a new file of the same name. May raise OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
    with suppress(PermissionError):  # somebody else's, and we are no root with all powers
        os.fchmod(fd, MODE)  # of a version that let others read it
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pid = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise ControlError(
            f"another pbrd already runs with this runtime dir (pid {pid}): {path.parent}"
        ) from None
    os.ftruncate(fd, 0)
    with suppress(OSError):  # a full disk: who it is will not be known, but nobody else gets in
        os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def unlock(fd: int) -> None:
    """Let go of the lock of a runtime directory."""
    os.ftruncate(fd, 0)
    os.close(fd)


@contextmanager
def alone(act: str) -> Iterator[str]:
    """Be the only pbrd of this network namespace; raises ControlError ("cannot `act`: …") if one is there.

    Yields what is odd, or "": somebody who is not root has taken the name, and so nobody is kept out.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.bind(NAME)
            sock.listen(BACKLOG)  # what makes our credentials known to those who connect
            odd = ""
        except OSError:
            if (pid := _holder()) is not None:
                raise ControlError(
                    f"cannot {act}: another pbrd already runs in this network namespace "
                    f"(pid {pid or 'unknown'}); stop it first"
                ) from None
            odd = "somebody who is not root holds the socket @pbrd: another pbrd would not be noticed"
        yield odd


@contextmanager
def undisturbed(runtime_dir: Path, act: str) -> Iterator[None]:
    """Keep daemons away from what is done here in their stead; raises ControlError if one is there.

    It may be one whose socket file was removed, so that nobody can ask it.
    """
    with alone(act):
        try:
            fd = lock(runtime_dir / "pbrd.pid") if (runtime_dir / "pbrd.pid").exists() else None
        except ControlError as error:
            raise ControlError(f"cannot {act}: {error}; stop it first") from None
        except OSError as error:
            raise ControlError(f"cannot {act}: {error.strerror}: {error.filename or runtime_dir}") from None
        try:
            yield
        finally:
            if fd is not None:
                unlock(fd)


def _holder() -> int | None:
    """Return the pid of who listens on NAME (0: of another PID namespace); None if that proves nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(NAME)
        except OSError:  # it doesn't listen, or takes no more: as it pleases a stranger
            return None
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        return pid if uid in (0, os.geteuid()) else None
