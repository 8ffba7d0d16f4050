"""What lies in systemd's journal, read by systemd-python: the entries that match, and those to come.

Only `pbrd events` reads, and the library is imported only then. The daemon never does: what it sends goes by
`journal`, as the library waits for a stopped journald and holds the interpreter meanwhile.
"""

import errno
import os
import select
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from pbrd.errors import PbrdError

PLACES = ("/var/log/journal", "/run/log/journal")
DAMAGED = {errno.EBADMSG, errno.EADDRNOTAVAIL}  # an entry in a file that was cut off, say by a power failure
ALL_NAMESPACES = 1 << 5  # sd_journal_open(3), systemd 245; a unit may have LogNamespace=
PATIENCE = 1000  # damaged entries in a row until we give up

Fields = dict[str, str]
Entry = dict[str, Any]


def is_hidden() -> bool:
    """Say whether there may be a journal that this process may not read: with Storage=none there is none."""
    found = chain.from_iterable([Path(place), *Path(place).glob("*"), *_files(place)] for place in PLACES)
    return any(path.exists() and not os.access(path, os.R_OK) for path in found)


def is_readable() -> bool:
    """Say whether this process may read the system's journal."""
    return any(os.access(file, os.R_OK) for place in PLACES for file in _files(place))


def _files(place: str) -> Iterator[Path]:
    return Path(place).glob("*/system.journal")


def is_installed() -> bool:
    """Say whether systemd-python is there, for this Python."""
    try:
        from systemd import journal  # noqa: F401, PLC0415 - see above
    except ImportError:
        return False
    return True


def entries(
    matches: Sequence[Sequence[str]], since: datetime | None = None, last: int | None = None, *, follow: bool
) -> Iterator[Fields]:
    """Yield the fields of entries, oldest first, each as text; "time" is that of arrival, ISO 8601 in UTC.

    `matches` are alternatives, each of which is a list of "FIELD=value": the same field more than once means
    any of its values. `since`: what the journal took then or later. `last`: no more than so many of
    the past. `follow`: go on with what comes. Raises PbrdError.
    """
    try:
        with _open(matches) as reader:
            if follow:
                reader.fileno()  # from here on it is told of what comes; what came before is read below
            fields = _seek(reader, since, last)
            while True:
                while fields:
                    yield _text(fields)
                    fields = _next(reader)
                if not follow:
                    return
                _wait(reader)
                fields = _next(reader)
    except OSError as error:
        raise PbrdError(f"cannot read the journal: {error.strerror or error}") from None


def _open(matches: Sequence[Sequence[str]]) -> Any:
    from systemd import journal  # noqa: PLC0415 - see above

    # Its own conversions fail on values that anybody may have written, such as a time in the year 10^20.
    plain = {name: bytes.decode for name in journal.DEFAULT_CONVERTERS if not name.startswith("__")}
    reader = journal.Reader(journal.LOCAL_ONLY | ALL_NAMESPACES, converters=plain)
    for number, group in enumerate(matches):
        if number:
            reader.add_disjunction()
        reader.add_match(*group)
    return reader


def _seek(reader: Any, since: datetime | None, last: int | None) -> Entry:
    """Go to the first entry that is wanted, and return it; {} if none has come yet."""
    moment = None if since is None else max(0, round(since.timestamp() * 1e6))
    if last is None and moment is None:
        reader.seek_head()
        return _next(reader)
    if last is not None:
        reader.seek_tail()
        # Backwards also for none: what sd_journal_next(3) finds from the tail on depends on its version.
        found = _next(reader, -max(last, 1))
        if not found:
            reader.seek_head()  # none matches: the first to do so will be new
            return {}
        if not last:
            return {}
        if moment is None or found["__REALTIME_TIMESTAMP"].timestamp() * 1e6 >= moment:
            return found
    reader.seek_realtime(moment)
    return _next(reader)


def _next(reader: Any, skip: int = 1) -> Entry:
    """Return the next entry, or the one `skip` further, or {}. Damaged ones are passed over."""
    for _ in range(PATIENCE):
        try:
            found: Entry = reader.get_next(skip)
            return found
        except OSError as error:
            if error.errno not in DAMAGED:
                raise
            skip = 1
    raise PbrdError("cannot read the journal: it is damaged; `journalctl --verify` says where")


def _wait(reader: Any) -> None:
    """Wait until there may be more. Not `Reader.wait`, which Ctrl-C doesn't end (sd_journal_wait(3))."""
    poll = select.poll()
    poll.register(reader.fileno(), reader.get_events())
    poll.poll(reader.get_timeout_ms())
    reader.process()


def _text(entry: Entry) -> Fields:
    """Return an entry's fields as text. Of those that stand twice, the last; unprintable ones are bytes."""
    fields = {}
    for name, values in entry.items():
        value = values[-1] if isinstance(values, list) else values
        fields[name] = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    arrived = entry["__REALTIME_TIMESTAMP"].astimezone(UTC).isoformat(timespec="milliseconds")
    return fields | {"time": arrived.replace("+00:00", "Z")}
