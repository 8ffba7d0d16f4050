"""What pbrd tells systemd: the readiness protocol of sd_notify(3), without ever waiting for it."""

import os
import socket
import time
from contextlib import suppress


def listens() -> bool:
    """Say whether there is a service manager to tell."""
    return "NOTIFY_SOCKET" in os.environ


def notify(*assignments: str) -> None:
    """Send assignments such as "READY=1" to the service manager, if there is one.

    One datagram, not blocking: systemd-python's notify holds the interpreter while the manager's
    socket is full.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.sendto("\n".join(assignments).encode(), address)


def reloading() -> None:
    """Tell that a reload begins; `notify("READY=1")` must follow, whatever comes of it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
