"""The standard streams, whatever has become of them: closed from the beginning, full, or read by nobody."""

import errno
import os
import sys
from contextlib import suppress

UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def prepare() -> None:
    """Make all three usable; to be called first.

    A descriptor that is closed (`pbrd check >&-`) would be given to the next thing we open, such as the
    daemon's socket, and Python has None for its stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that isn't UTF-8 gets question marks


def abandon() -> None:
    """Let go of those that can't be written to, or the interpreter complains at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(null, stream.fileno())
