"""The log: entries of the journal with fields, or readable lines on standard error; it waits for neither.

An event (`events.Event`) comes under the key `happened`, with its `time`: its sentence says it all to
people, and its facts become fields. Of anything else, every key of structlog's becomes a field PBRD_KEY.
"""

import atexit
import json
import logging
import os
import select
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

# structlog imports rich for its tracebacks if it finds it, which costs the daemon 80 ms and 5 MiB.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

import structlog  # noqa: E402

from pbrd import journal  # noqa: E402
from pbrd.events import IDS, Event  # noqa: E402
from pbrd.printable import printable  # noqa: E402

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # syslog(3)
DAEMON = "3"  # the facility, syslog(3)
SAID = frozenset({"hook"})  # facts that their sentences name
KEPT = "\n\t"  # of what has no shape; what hooks print and how others name files is not obeyed
PIPE_BUF = 4096  # bytes; a pipe that says it is writable takes so much at once (pipe(7))

Document = dict[str, Any]  # what structlog hands from processor to processor
Processor = Callable[[Any, str, Document], Any]


class Lines:
    """Writes whole lines to a file descriptor, and drops them rather than wait for a reader."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.dropped = 0
        self.cut = False  # the last line lacks its end

    def msg(self, message: str) -> None:
        """Write a message if that is possible at once; then say, too, how many were not."""
        text = f"{message}\n"
        if self.dropped:
            text = f"{self.dropped} log lines are lost: nobody read them\n{text}"
        if self._write(("\n" if self.cut else "") + text):
            self.dropped = 0
        else:
            self.dropped += 1

    def _write(self, text: str) -> bool:
        data = text.encode(errors="replace")
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        for start in range(0, len(data), PIPE_BUF):
            try:
                if not poll.poll(0):
                    return False
                os.write(self.fd, data[start : start + PIPE_BUF])
            except OSError:  # a full disk, a reader that is gone
                return False
            self.cut = start + PIPE_BUF < len(data)
        return True

    debug = info = warning = error = critical = msg


def _text(value: object) -> str:
    """Return a value as a field's text: documents as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _for_people(_: Any, __: str, document: Document) -> Document:
    """Leave an event's sentence alone: it says what the facts say."""
    if document.pop("happened", None):
        document.pop("time")
    for name in SAID & document.keys():
        del document[name]
    return {
        name: printable(_text(value), KEPT) if isinstance(value, str | dict | list) else value
        for name, value in document.items()
    }


def _with_time(_: Any, __: str, document: Document) -> Document:
    """Add the local time, with its zone."""
    return document | {"timestamp": datetime.now().astimezone().isoformat(" ", "milliseconds")}


def _with_priority(_: Any, method: str, line: str) -> str:
    """Put its priority before each line, as sd-daemon(3) has it."""
    return "\n".join(f"<{PRIORITIES.get(method, 6)}>{part}" for part in line.splitlines())


def fields(method: str, document: Document, always: Mapping[str, str]) -> dict[str, str]:
    """Return the journal's fields of one entry, logged by `method` ("info", ...), with the facts `always`."""
    rest = dict(document)
    message, happened = str(rest.pop("event", "")), rest.pop("happened", None)
    exception = rest.pop("exception", "")
    entry = {
        "PRIORITY": str(PRIORITIES.get(method, 6)),
        "SYSLOG_IDENTIFIER": "pbrd",
        "SYSLOG_FACILITY": DAEMON,
    }
    own = dict(always) | {name: _text(value) for name, value in rest.items()}
    if isinstance(happened, Event):
        entry["MESSAGE_ID"] = IDS[happened.kind]
        own |= {name: value for name, value in happened.facts().items() if value}
    else:
        own.setdefault("time", datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"))
        facts = [f"{name}={_text(value)}" for name, value in rest.items() if name not in SAID]
        message += f": {', '.join(facts)}" if facts else ""
    if exception:
        message, own["exception"] = f"{message}\n{exception}", exception
    return (
        entry
        | {"MESSAGE": printable(message, KEPT)}
        | {journal.field(f"PBRD_{name}"): own[name] for name in own}
    )


def _to_journal(sender: journal.Journal, always: Mapping[str, str]) -> Processor:
    def send(_: Any, method: str, document: Document) -> Any:
        sender.send(fields(method, document, always))
        raise structlog.DropEvent  # it is where it belongs

    return send


def _to_lines() -> list[Callable[[Any, str, Any], Any]]:
    """Return what makes a line: with time and level, or for the journal (which has both) with a priority."""
    for_journal = journal.is_stderr()
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty() and not for_journal,
        exception_formatter=structlog.dev.plain_traceback,
        pad_event_to=34,
    )
    if for_journal:
        return [_for_people, console, _with_priority]
    return [_for_people, structlog.processors.add_log_level, _with_time, console]


class _Libraries(logging.Handler):
    """Hands on what libraries log (asyncio does, of errors nobody awaited): their own way could block."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.WARNING)
        self.logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record of theirs."""
        level = "error" if record.levelno >= logging.ERROR else "warning"
        getattr(self.logger, level)(record.getMessage(), library=record.name, exc_info=record.exc_info)


def open_log(**always: str) -> structlog.stdlib.BoundLogger:
    """Configure structlog for this process and return the logger; each entry has the facts `always`."""
    if sys.stderr is None:  # whoever started us closed it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    processors: list[Any] = [structlog.processors.format_exc_info]
    if in_journal():
        sender = journal.Journal()
        atexit.register(sender.close)
        processors.append(_to_journal(sender, always))
    else:
        processors += _to_lines()
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger("INFO"),
        logger_factory=lambda *_: Lines(sys.stderr.fileno()),
        cache_logger_on_first_use=True,
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    logging.basicConfig(handlers=[_Libraries(logger)], force=True)
    logging.captureWarnings(True)
    return logger


def in_journal() -> bool:
    """Say whether this process's log goes into the journal, with fields."""
    return journal.is_stderr() and os.path.exists(journal.SOCKET)
