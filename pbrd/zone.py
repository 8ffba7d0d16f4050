"""The machine's time zone with its clock changes, as `schedule` needs it.

`datetime.astimezone()` gives a fixed offset, which is wrong after the next change.
"""

import os
from datetime import datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

LOCALTIME = Path("/etc/localtime")  # localtime(5)


def local_zone() -> tzinfo:
    """Return the zone of $TZ (a name, ":NAME" or a path), else of /etc/localtime, as it is now.

    Read it again now and then: timedatectl(1) changes it under a running daemon. What is no zone file
    (TZ="CET-1CEST") gives the present offset; a machine without /etc/localtime has UTC.
    """
    name = os.environ.get("TZ", "").removeprefix(":")
    try:
        if not name or name.startswith("/"):
            with Path(name or LOCALTIME).open("rb") as file:
                return ZoneInfo.from_file(file, key=name or None)
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # no such file; not of that format; no such name
        return datetime.now().astimezone().tzinfo or ZoneInfo("UTC")
