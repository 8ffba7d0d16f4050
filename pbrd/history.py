"""`pbrd events`: the past transitions, and those to come, from systemd's journal or from the daemon's ring.

The ring is all that there is without a journal, without a right to read it, and without systemd-python.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pbrd import journalreader
from pbrd.client import call, follow
from pbrd.document import did_you_mean
from pbrd.errors import ControlError, NotRunning
from pbrd.events import IDS, from_journal
from pbrd.printable import printable, to_json
from pbrd.timestamp import parse

Document = dict[str, Any]

RING = 1000  # more than the daemon keeps is not to be had from it
LIMIT = 1_000_000_000  # more than a journal holds, and fewer than systemd-python can count
UNIT = "pbrd.service"  # as it is shipped
LAST = 10  # events to begin with when following, as journalctl has it
NOWHERE = "no journal is kept here (Storage=none in journald.conf, or no journald)"
PERMISSION = "older ones are in the journal, which root and the groups systemd-journal and adm may read"
INSTALL = "to read the journal, too, install python3-systemd (Debian, Ubuntu), elsewhere systemd-python"
PAUSE = 1.0  # seconds between two tries to reach a daemon that has gone
HEAD = ("TIME", "EVENT", "WHAT", "CHANGE", "WHY")
WIDTHS = (23, max(map(len, IDS)), 8, 18, 0)  # at least, so that the columns of one who follows stand still
COLOURS = {
    "uplink-up": "32",
    "failback": "32",
    "uplink-down": "31",
    "reload-refused": "31",
    "flushed": "31",
    "uplink-degraded": "33",
    "uplink-recovering": "33",
    "failover": "33",
    "drift-repaired": "33",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events: since when, of which uplink or policy ("" is any), how many, and those to come."""

    since: datetime | None
    uplink: str
    policy: str
    lines: int | None
    follow: bool

    def has(self, event: Document) -> bool:
        """Say whether an event is one of them, but for `lines`."""
        if self.since is not None and datetime.fromisoformat(event["time"]) < self.since:
            return False
        if not self.uplink and not self.policy:
            return True
        named = ((self.uplink, event["uplink"]), (self.policy, event["policy"]))
        return any(name and name == found for name, found in named)

    @property
    def last(self) -> int | None:
        """How many of the past ones to show; None is all."""
        if self.lines is None and self.follow and self.since is None:
            return LAST
        return self.lines


def show(runtime_dir: str, wanted: Wanted, *, as_json: bool, colour: bool) -> int:
    """Print what is wanted; return 0. Raises NotRunning if there is neither a journal nor a daemon."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    found = _source(runtime_dir, wanted)
    _remark_unknown(runtime_dir, wanted.uplink)
    try:
        if as_json:
            for event in found:
                print(to_json(event), flush=wanted.follow)
        else:
            _print_table(found, wanted.follow, colour)
    except KeyboardInterrupt:
        if not wanted.follow:
            raise
    return 0


def _remark_unknown(runtime_dir: str, uplink: str) -> None:
    """Say if no uplink has that name now; its events are shown all the same, as it may have had it once."""
    if not uplink:
        return
    with suppress(ControlError):
        known = [one["name"] for one in call(runtime_dir, "Status")["uplinks"]]
        if uplink not in known:
            nearest = did_you_mean(uplink, known)
            print(f'pbrd: no uplink is called "{printable(uplink)}" now{nearest}', file=sys.stderr)


def since(text: str) -> datetime:
    """Return the moment that `--since` means; raises PbrdError."""
    return parse(text, datetime.now().astimezone())


# --- where from -------------------------------------------------------------------------------


def _source(runtime_dir: str, wanted: Wanted) -> Iterator[Document]:
    """Choose the journal if the daemon writes there and we can read it, else its ring."""
    obstacle = _obstacle()
    try:
        logs_there = call(runtime_dir, "Monitor")["journal"]
    except NotRunning:
        if obstacle == INSTALL:
            print(f"pbrd: {obstacle}", file=sys.stderr)
        if obstacle:
            raise
        logs_there = True
    if logs_there and not obstacle:
        return _journal(runtime_dir, wanted)
    if logs_there:
        print(f"pbrd: these are the events since the daemon started; {obstacle}", file=sys.stderr)
    return _ring(runtime_dir, wanted)


def _obstacle() -> str:
    """Return what keeps us from reading the system's journal; "" if nothing does."""
    if not journalreader.is_readable():
        return PERMISSION if journalreader.is_hidden() else NOWHERE
    return "" if journalreader.is_installed() else INSTALL


def _journal(runtime_dir: str, wanted: Wanted) -> Iterator[Document]:
    """Yield what the journal holds. What anybody else wrote there may lack what an event has."""
    last = None if wanted.last is None else min(wanted.last, LIMIT)
    groups = _matches(runtime_dir, wanted)
    for fields in journalreader.entries(groups, wanted.since, last, follow=wanted.follow):
        if fields.get("PBRD_EVENT") in IDS:
            event = from_journal(fields | {"PBRD_TIME": _moment(fields)})
            if wanted.has(event):
                yield event


def _moment(fields: dict[str, str]) -> str:
    """Return when it happened; when it arrived, if nothing usable says more."""
    with suppress(KeyError, ValueError, OverflowError):
        told = datetime.fromisoformat(fields["PBRD_TIME"])
        if told.tzinfo is not None:
            told.astimezone()  # the first and the last year of all have no local time
            return fields["PBRD_TIME"]
    return fields["time"]


def _matches(runtime_dir: str, wanted: Wanted) -> list[list[str]]:
    """Return the journal's matches: one of MESSAGE_ID's, and one of each kind of what is asked for.

    Anybody may write fields like ours. Those that journald adds itself (systemd.journal-fields(7)) tell who
    did: root, whoever the daemon's directory belongs to, or the unit, whoever its user was at that time.
    """
    every = ["SYSLOG_IDENTIFIER=pbrd", f"PBRD_RUNTIME_DIR={os.path.abspath(runtime_dir)}"]
    every += [f"MESSAGE_ID={identifier}" for identifier in IDS.values()]
    named = [[f"PBRD_UPLINK={wanted.uplink}"]] * bool(wanted.uplink)
    named += [[f"PBRD_POLICY={wanted.policy}"]] * bool(wanted.policy)
    writers = [[f"_UID={user}" for user in sorted({0, _owner(runtime_dir)})], [f"_SYSTEMD_UNIT={UNIT}"]]
    return [[*every, *writer, *name] for writer in writers for name in named or [[]]]


def _owner(runtime_dir: str) -> int:
    """Return the user id that a daemon there has; root's if the directory is not there."""
    try:
        return os.stat(runtime_dir).st_uid
    except OSError:
        return 0


def _ring(runtime_dir: str, wanted: Wanted) -> Iterator[Document]:
    """Yield the daemon's own events. Its restart is waited for: a new daemon begins a new ring."""
    if not wanted.follow:
        answer = call(runtime_dir, "Monitor", {"history": RING})
        yield from _last(answer["events"], wanted)
        return
    newest = None
    while True:
        begun = False
        try:
            for answer in follow(runtime_dir, "Monitor", {"history": RING}):
                events = answer["events"]
                if newest is None:
                    yield from _last(events, wanted)
                else:
                    fresh = events if begun else [event for event in events if event["time"] > newest]
                    yield from filter(wanted.has, fresh)
                if answer["missed"]:
                    print(f"pbrd: {answer['missed']} events were missed", file=sys.stderr)
                begun, newest = True, max([newest or "", *(event["time"] for event in events)])
        except ControlError:
            if newest is None:
                raise
        print("pbrd: the daemon has gone; waiting for it", file=sys.stderr)
        while _is_away(runtime_dir):
            time.sleep(PAUSE)


def _is_away(runtime_dir: str) -> bool:
    with suppress(ControlError):
        call(runtime_dir, "Monitor")
        return False
    return True


def _last(events: Sequence[Document], wanted: Wanted) -> list[Document]:
    found = [event for event in events if wanted.has(event)]
    return found if wanted.last is None else found[max(0, len(found) - wanted.last) :]


# --- for people -------------------------------------------------------------------------------


def _print_table(events: Iterator[Document], following: bool, colour: bool) -> None:
    """Print aligned lines; all at once, or each as it comes, in columns of fixed widths."""
    rows = ((event["event"], row(event)) for event in events)
    if following:
        print(_line(HEAD, WIDTHS, "1" if colour else ""), flush=True)
        for kind, cells in rows:
            print(_line(cells, WIDTHS, COLOURS.get(kind, "") if colour else ""), flush=True)
        return
    all_rows = list(rows)
    if not all_rows:
        print("no events", file=sys.stderr)
        return
    widths = [max(len(cells[column]) for cells in (HEAD, *(c for _, c in all_rows))) for column in range(4)]
    print(_line(HEAD, [*widths, 0], "1" if colour else ""))
    for kind, cells in all_rows:
        print(_line(cells, [*widths, 0], COLOURS.get(kind, "") if colour else ""))


def row(event: Document) -> tuple[str, ...]:
    """Return the cells of one event: local time, kind, whose it is, "old → new", why."""
    local = datetime.fromisoformat(event["time"]).astimezone()
    whose = event["uplink"] or event["policy"] or "-"
    change = f"{event['old'] or '-'} → {event['new'] or '-'}" if event["old"] or event["new"] else "-"
    why = event["reason"] if event["uplink"] or event["policy"] else event["message"]
    first, _, more = (why or "-").partition("\n")
    time_ = local.isoformat(" ", "milliseconds")[:23]
    cells = (time_, event["event"], whose, change, f"{first} …" if more else first)
    return tuple(map(printable, cells))


def _line(cells: Sequence[str], widths: Sequence[int], colour: str) -> str:
    """Join cells; the second is the coloured one, or all of the head's."""
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
    if colour:
        padded[1] = f"\x1b[{colour}m{padded[1]}\x1b[0m"
    return "  ".join(padded).rstrip()
