"""The log: readable lines on standard error, which never wait for whoever reads them."""

import os
import select
import sys
from typing import Any

# structlog imports rich for its tracebacks if it finds it, which costs the daemon 80 ms and 5 MiB.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

import structlog  # noqa: E402

# sd-daemon(3): under systemd a line's priority stands before it.
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
PIPE_BUF = 4096  # bytes; a pipe that says it is writable takes so much at once (pipe(7))


class Lines:
    """Writes whole lines to a file descriptor, and drops them rather than wait for a reader."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.dropped = 0

    def msg(self, message: str) -> None:
        """Write one line if that is possible at once."""
        data = message.encode(errors="replace") + b"\n"
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        for start in range(0, len(data), PIPE_BUF):
            if not poll.poll(0):
                self.dropped += 1
                return
            try:
                os.write(self.fd, data[start : start + PIPE_BUF])
            except OSError:
                self.dropped += 1
                return

    debug = info = warning = error = critical = msg


def _with_priority(_: Any, method: str, line: str) -> str:
    return "\n".join(f"<{PRIORITIES.get(method, 6)}>{part}" for part in line.splitlines())


def _for_people(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Drop the machine's name of the event: the sentence says it."""
    event.pop("event_kind", None)
    return event


def open_log() -> structlog.stdlib.BoundLogger:
    """Configure structlog for this process and return the logger."""
    if sys.stderr is None:  # whoever started us closed it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    journal = "JOURNAL_STREAM" in os.environ
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty() and not journal,
        exception_formatter=structlog.dev.plain_traceback,
        pad_event_to=34,
    )
    processors: list[Any] = [structlog.processors.format_exc_info, _for_people]
    if not journal:
        processors += [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S.%f", utc=False),
        ]
    processors.append(console)
    if journal:
        processors.append(_with_priority)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger("INFO"),
        logger_factory=lambda *_: Lines(sys.stderr.fileno()),
        cache_logger_on_first_use=True,
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger
