"""Policies that hold at some times only: are they on now?

The wall clock decides, as people read it: a policy is on exactly while the local time of day lies in
one of its windows. What follows from that when the clocks change:

- in spring, a window that begins in the skipped hour begins right after it (one that lies wholly in
  it does not happen that day);
- in autumn, the repeated hour counts both times: 02:30-04:00 begins, breaks off when the clock goes
  back from 03:00 to 02:00, and begins again half an hour later.

nftables' `meta hour` is not used: nft turns it into UTC when a ruleset is loaded, so it is an hour off
after the next change. Instead the daemon leaves out policies that are off, and looks every minute.
"""

from datetime import datetime

from pbrd.settings import TimeOfDay


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
