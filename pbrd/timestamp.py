"""Points in time as people write them: the words that `journalctl --since` takes, and ISO 8601."""

import re
from datetime import UTC, datetime, timedelta

from pbrd.errors import PbrdError

# Seconds; systemd.time(7).
UNITS = {
    ("ms", "msec"): 0.001,
    ("", "s", "sec", "second", "seconds"): 1.0,
    ("m", "min", "minute", "minutes"): 60.0,
    ("h", "hr", "hour", "hours"): 3600.0,
    ("d", "day", "days"): 86400.0,
    ("w", "week", "weeks"): 604800.0,
    ("M", "month", "months"): 2629800.0,
    ("y", "year", "years"): 31557600.0,
}
SECONDS = {name: seconds for names, seconds in UNITS.items() for name in names}
SPAN = re.compile(r"(?:\d+(?:\.\d+)?\s*[a-zA-Z]*\s*)+")
PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")
CLOCK = re.compile(r"\d{1,2}:\d{2}(:\d{2})?")


def parse(text: str, now: datetime) -> datetime:
    """Return the moment that `text` means; raises PbrdError if it means none.

    `now` has a zone. A time without one is local time of its day, be it summer or winter.
    """
    words = text.strip()
    today = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    named = {"today": today, "yesterday": today - timedelta(days=1)}
    try:
        if words == "now":
            return now
        if words in named:
            return named[words].astimezone()
        if words.startswith("@"):
            return datetime.fromtimestamp(float(words[1:]), UTC)
        if words.endswith("ago") or words.startswith("-"):
            return now - timedelta(seconds=_span(words.removesuffix("ago").removeprefix("-").strip()))
        if CLOCK.fullmatch(words):
            words = f"{today:%Y-%m-%d} {words if words[2] == ':' else '0' + words}"
        if words.endswith(" UTC"):
            return datetime.fromisoformat(words.removesuffix(" UTC")).replace(tzinfo=UTC)
        moment = datetime.fromisoformat(words)
        return moment if moment.tzinfo else moment.astimezone()
    except (ValueError, OverflowError, OSError):
        raise PbrdError(
            f'{text!r} is no point in time; write one as "2026-11-22 17:00", "17:00", "yesterday" or "1h ago"'
        ) from None


def _span(text: str) -> float:
    """Return the seconds of "1h 30min"; raises ValueError."""
    if not SPAN.fullmatch(text):
        raise ValueError(text)
    total = 0.0
    for number, unit in PART.findall(text):
        if unit not in SECONDS:
            raise ValueError(unit)
        total += float(number) * SECONDS[unit]
    return total
