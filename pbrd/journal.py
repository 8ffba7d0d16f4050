"""systemd's journal by its native protocol, without ever waiting for it.

systemd-python's `journal.send` holds the interpreter while the socket is full: with a journald that is
stopped or has a slow disk, the whole daemon stands still, a failover included. Here a datagram that the
journal does not take at once waits in a bounded backlog; what that can't hold is counted, and told later.

Formats: https://systemd.io/JOURNAL_NATIVE_PROTOCOL; JOURNAL_STREAM: systemd.exec(5).
"""

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
from collections import deque
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
BACKLOG = 2000  # entries
BACKLOG_BYTES = 4 << 20
RETRY = 0.25  # seconds between two tries while the journal takes nothing
SEND_BUFFER = 1 << 20  # bytes; the limit of one datagram, as far as net.core.wmem_max allows it
NAME_LIMIT = 64  # characters of a field's name
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
FULL = {errno.EAGAIN, errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOBUFS, errno.ENOMEM}


def is_stderr() -> bool:
    """Say whether standard error is the journal's: JOURNAL_STREAM is its device and inode."""
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def field(name: str) -> str:
    """Return `name` as the journal takes it: capitals, digits and "_", not first a digit or "_"."""
    return re.sub("[^A-Z0-9_]", "_", name.upper()).lstrip("_0123456789")[:NAME_LIMIT]


def encode(fields: Mapping[str, str]) -> bytes:
    """Return the datagram of one entry. Names must be `field` names; values may be any text."""
    parts = []
    for name, value in fields.items():
        data = value.encode(errors="replace")
        if b"\n" in data:
            parts.append(name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n")
        else:
            parts.append(name.encode() + b"=" + data + b"\n")
    return b"".join(parts)


class Journal:
    """The sender. `dropped` counts the entries that neither the journal nor the backlog could take."""

    def __init__(self, path: str = SOCKET) -> None:
        """Send to the journal whose socket is `path`; nothing happens before the first entry."""
        self.path = path
        self.dropped = 0
        self._backlog: deque[bytes] = deque()
        self._waiting = 0  # bytes in the backlog
        self._timer: asyncio.TimerHandle | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def send(self, fields: Mapping[str, str]) -> None:
        """Hand over one entry, now or later, in order; never blocks, never raises."""
        data = encode(fields)
        if not self.flush() or not self._send(data):
            self._keep(data)

    def flush(self) -> bool:
        """Try to get rid of the backlog; say whether it is empty."""
        while self._backlog:
            if not self._send(self._backlog[0]):
                return False
            self._waiting -= len(self._backlog.popleft())
        if self.dropped:
            count = self.dropped
            text = f"{count} log entries are lost: the journal did not take them"
            told = {"MESSAGE": text, "PRIORITY": "4", "SYSLOG_IDENTIFIER": "pbrd", "PBRD_DROPPED": str(count)}
            if not self._send(encode(told)):
                return False
            self.dropped = 0
        return True

    def close(self) -> None:
        """Try a last time and let go."""
        self.flush()
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close()

    def _keep(self, data: bytes) -> None:
        """Put an entry into the backlog. The last ones are lost, so that how it began can be read."""
        if len(self._backlog) >= BACKLOG or self._waiting + len(data) > BACKLOG_BYTES:
            self.dropped += 1
        else:
            self._backlog.append(data)
            self._waiting += len(data)
        if self._timer is None:
            with contextlib.suppress(RuntimeError):  # without a loop, the next entry tries again
                self._timer = asyncio.get_running_loop().call_later(RETRY, self._again)

    def _again(self) -> None:
        self._timer = None
        if not self.flush():
            self._timer = asyncio.get_running_loop().call_later(RETRY, self._again)

    def _send(self, data: bytes) -> bool:
        """Send one entry, and say whether it is done with; one that can never be sent is counted."""
        try:
            self._socket.sendto(data, self.path)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                return self._send_file(data)
            if error.errno in FULL:
                return False
            self.dropped += 1
        return True

    def _send_file(self, data: bytes) -> bool:
        """Send an entry that is too long for a datagram: a sealed file, which journald reads by itself."""
        try:
            fd = os.memfd_create("pbrd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            self.dropped += 1
            return True
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._socket.sendmsg([], rights, 0, self.path)
        except OSError as error:
            if error.errno in FULL:
                return False
            self.dropped += 1
        finally:
            os.close(fd)
        return True
