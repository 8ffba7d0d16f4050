"""`pbrd status --watch`: the status as it changes and every second, with the round trips seen meanwhile."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime

from pbrd.client import follow
from pbrd.errors import ControlError, NotRunning
from pbrd.printable import printable, to_json
from pbrd.tables import Document, table

SECOND = 1.0
SILENCE = 5.0  # seconds until a daemon that says nothing is called stuck
HISTORY = 30  # values of a sparkline: narrow terminals have room for that
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # alternate screen, no cursor, long lines are cut, not wrapped
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


def watch(runtime_dir: str, *, as_json: bool, colour: bool) -> int:
    """Show the status until Ctrl-C; return 0. Raises NotRunning if there is no daemon to begin with.

    A daemon that goes away later is waited for: its restart is what one may want to watch.
    """
    texts = _texts(runtime_dir, as_json, colour)
    text = next(texts)
    in_place = sys.stdout.isatty() and not as_json
    signal.signal(signal.SIGTERM, _stop)  # or it would leave the terminal in the alternate screen
    try:
        if in_place:
            sys.stdout.write(ENTER)
        while True:
            _draw(text, in_place, as_json)
            text = next(texts)
    except KeyboardInterrupt:
        return 0
    finally:
        if in_place:
            sys.stdout.write(LEAVE)
            sys.stdout.flush()


def _stop(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _texts(runtime_dir: str, as_json: bool, colour: bool) -> Iterator[str]:
    """Yield what to show: each status as the daemon tells it, or why it tells none; never ends."""
    histories = Histories()
    began = False
    while True:
        try:
            for answer in follow(runtime_dir, "Monitor", {"status": True, "interval": 1}, SILENCE):
                began = True
                if answer["status"] is not None:
                    yield _shown(answer["status"], histories, as_json, colour)
        except ControlError as error:
            if not began:
                raise
            reason = "no daemon is running" if isinstance(error, NotRunning) else str(error)
            remark = f"{reason}; waiting for it"
            yield to_json({"error": remark}) if as_json else printable(remark)
        time.sleep(SECOND)


def _shown(document: Document, histories: "Histories", as_json: bool, colour: bool) -> str:
    """Return what to show for one document, and note its round trips."""
    if as_json:
        return to_json(document)
    histories.add(document, time.monotonic())
    return table(document, datetime.now().astimezone(), colour=colour, history=histories.values)


class Histories:
    """The last round trips of each uplink, one a second, however often something else changes."""

    def __init__(self) -> None:
        self.values: dict[str, deque[float | None]] = {}
        self._next = 0.0

    def add(self, document: Document, now: float) -> None:
        """Note those of a document of `now` (monotonic seconds), unless this second has one already."""
        if now >= self._next:
            self._next = now + 0.75 * SECOND
            note(document, self.values)


def note(document: Document, histories: dict[str, deque[float | None]]) -> None:
    """Add the round trip of each uplink to its history; a lost one if no target answers."""
    for uplink in document.get("uplinks", ()):
        probe = uplink.get("probe") or {}
        targets = probe.get("targets", ())
        answering = any(target.get("answering") for target in targets)
        if targets or probe.get("rtt_ms") is not None:
            history = histories.setdefault(uplink["name"], deque(maxlen=HISTORY))
            history.append(probe.get("rtt_ms") if answering or not targets else None)


def _draw(text: str, in_place: bool, as_json: bool) -> None:
    if in_place:
        rows = text.splitlines()[: os.get_terminal_size(sys.stdout.fileno()).lines or 24]
        sys.stdout.write("\x1b[H" + "\r\n".join(f"{row}\x1b[K" for row in rows) + "\x1b[J")
    else:
        sys.stdout.write(text + ("\n" if as_json else "\n\n"))
    sys.stdout.flush()
