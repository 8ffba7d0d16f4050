"""Policies that hold at some times only: are they on now, and when does that change next?

The wall clock decides, as people read it: a policy is on exactly while the local time of day lies in
one of its windows. What follows from that when the clocks change:

- in spring, a window that begins in the skipped hour begins right after it (one that lies wholly in
  it does not happen that day);
- in autumn, the repeated hour counts both times: 02:30-04:00 begins, breaks off when the clock goes
  back from 03:00 to 02:00, and begins again half an hour later.

nftables' `meta hour` is not used: nft turns it into UTC when a ruleset is loaded, so it is an hour off
after the next change. Instead the daemon leaves out policies that are off and wakes at `next_change`.
"""

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta

from pbrd.settings import TimeOfDay

DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
HORIZON = 22  # days: a week repeats itself, unless the clock change of a day skips its window


def active(times: tuple[TimeOfDay, ...], days: tuple[int, ...], local: datetime) -> bool:
    """Say whether a policy with `time` and `days` is on at the wall clock time `local`.

    A window across midnight belongs to the day on which it begins; `days` without `times` are whole
    days, and without `days` every day counts. Only the wall clock reading of `local` matters.
    """
    seconds = local.hour * 3600 + local.minute * 60 + local.second
    today = local.weekday()
    on_today = not days or today in days
    on_yesterday = not days or (today - 1) % 7 in days
    if not times:
        return on_today
    for window in times:
        if window.start < window.end:
            if on_today and window.start <= seconds < window.end:
                return True
        elif (on_today and seconds >= window.start) or (on_yesterday and seconds < window.end):
            return True
    return False


def next_change(times: tuple[TimeOfDay, ...], days: tuple[int, ...], now: datetime) -> datetime | None:
    """Return the first moment after `now` at which `active` differs from what it is `now`.

    `now` is aware, in a zone that knows its clock changes (a ZoneInfo, not a fixed offset); so is the
    result. None: it never changes, as with a window for each part of every day.
    """
    was = active(times, days, now)
    for moment in _candidates(times, now):
        if active(times, days, moment) != was:
            return moment
    return None


def _candidates(times: tuple[TimeOfDay, ...], now: datetime) -> Iterator[datetime]:
    """Yield, in order, all moments after `now` at which anything can change."""
    edges = sorted({0, *(window.start for window in times), *(window.end % 86400 for window in times)})
    start = now.astimezone(UTC)
    for _ in range(HORIZON):
        end = start + DAY
        moments = set(_clock_changes(start, end, now))
        for ordinal in range(start.toordinal() - 1, end.toordinal() + 2):  # zones are up to a day off UTC
            moments |= {
                moment for edge in edges for moment in _readings(date.fromordinal(ordinal), edge, now)
            }
        yield from (moment.astimezone(now.tzinfo) for moment in sorted(moments) if start < moment <= end)
        start = end


def _readings(day: date, seconds: int, now: datetime) -> Iterator[datetime]:
    """Yield when (UTC) the clock of `now`'s zone shows this time of the day: once, twice, or around a gap."""
    wall = datetime.combine(day, time.min, now.tzinfo) + timedelta(seconds=seconds)
    for fold in (0, 1):
        yield wall.replace(fold=fold).astimezone(UTC)


def _clock_changes(start: datetime, end: datetime, now: datetime) -> Iterator[datetime]:
    """Yield the clock change between two moments (UTC) no more than a day apart, if there is one."""

    def offset(moment: datetime) -> timedelta | None:
        return moment.astimezone(now.tzinfo).utcoffset()

    before, after = start.replace(microsecond=0), end.replace(microsecond=0) + SECOND
    if offset(before) == offset(after):
        return
    while after - before > SECOND:
        middle = before + (after - before) // (2 * SECOND) * SECOND
        if offset(middle) == offset(before):
            before = middle
        else:
            after = middle
    yield after
