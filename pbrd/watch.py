"""`pbrd status --watch`: the status every second, with the round trips seen meanwhile."""

import json
import os
import signal
import sys
import time
from collections import deque
from datetime import datetime

from pbrd.client import call
from pbrd.errors import ControlError, NotRunning
from pbrd.tables import Document, table

SECOND = 1.0
HISTORY = 40  # values of a sparkline
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # alternate screen, no cursor, long lines are cut, not wrapped
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"

Histories = dict[str, deque[float | None]]


def watch(runtime_dir: str, *, as_json: bool, colour: bool) -> int:
    """Show the status until Ctrl-C; return 0. Raises NotRunning if there is no daemon to begin with.

    A daemon that goes away later is waited for: its restart is what one may want to watch.
    """
    histories: Histories = {}
    text = _shown(call(runtime_dir, "Status"), histories, as_json, colour)
    in_place = sys.stdout.isatty() and not as_json
    signal.signal(signal.SIGTERM, _stop)  # or it would leave the terminal in the alternate screen
    try:
        if in_place:
            sys.stdout.write(ENTER)
        following = time.monotonic()
        while True:
            _draw(text, in_place, as_json)
            following = max(following + SECOND, time.monotonic())
            time.sleep(following - time.monotonic())
            text = _next(runtime_dir, histories, as_json, colour)
    except KeyboardInterrupt:
        return 0
    finally:
        if in_place:
            sys.stdout.write(LEAVE)
            sys.stdout.flush()


def _stop(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _next(runtime_dir: str, histories: Histories, as_json: bool, colour: bool) -> str:
    try:
        return _shown(call(runtime_dir, "Status", timeout=5 * SECOND), histories, as_json, colour)
    except NotRunning:
        remark = "no daemon is running; waiting for it"
    except ControlError as error:
        remark = str(error)
    return json.dumps({"error": remark}) if as_json else remark


def _shown(document: Document, histories: Histories, as_json: bool, colour: bool) -> str:
    """Return what to show for one document, and note its round trips."""
    if as_json:
        return json.dumps(document, ensure_ascii=False)
    note(document, histories)
    return table(document, datetime.now().astimezone(), colour=colour, history=histories)


def note(document: Document, histories: Histories) -> None:
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
