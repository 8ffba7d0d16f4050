"""What pbrd tells systemd: the readiness protocol of sd_notify(3), without ever waiting for it."""

import os
import socket
import time
from collections import deque
from contextlib import suppress

PASSING = (b"STATUS=", b"WATCHDOG=")  # said again and again
_waiting: deque[bytes] = deque(maxlen=16)  # messages that the service manager had no room for


def listens() -> bool:
    """Say whether there is a service manager to tell."""
    return "NOTIFY_SOCKET" in os.environ


def notify(*assignments: str) -> None:
    """Send assignments such as "READY=1" to the service manager, if there is one.

    One datagram, not blocking: systemd-python's notify holds the interpreter while the manager's socket is
    full. Then the message waits for the next one, as a lost READY=1 would end a service that is well;
    what will be said again anyway (STATUS, WATCHDOG) is lost.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    message = "\n".join(assignments).encode()
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        if not message.startswith(PASSING):
            _waiting.append(message)
        while _waiting:
            sock.sendto(_waiting[0], address)
            _waiting.popleft()
        if message.startswith(PASSING):
            sock.sendto(message, address)


def reloading() -> None:
    """Tell that a reload begins; `notify("READY=1")` must follow, whatever comes of it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
