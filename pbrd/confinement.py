"""What `pbrd.service` can't read and root can: it has no power over modes, no homes, and a /tmp of its own.

The unit says so by CapabilityBoundingSet=, ProtectHome= and PrivateTmp= (systemd.exec(5)).
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress

GROUP = "pbrd"  # of the service
HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - named, not used
PLACE = "/etc/pbrd"
SYSTEMD = "/run/systemd/system"  # is there where systemd runs: sd_booted(3)


def remarks(config: str, files: Iterable[str]) -> Iterator[str]:
    """Yield a line for each of `files` that the service can't read; `config` is the main one among them.

    One in a home or in /tmp is a draft, and what lies beside it will move with it. Nothing without systemd.
    """
    if not os.path.isdir(SYSTEMD):
        return
    beside = os.path.dirname(os.path.realpath(config))
    draft = _below(beside, (*HOMES, *TEMPORARY, "/dev", "/proc"))
    for file in dict.fromkeys(files):
        if not (draft and _below(os.path.realpath(file), (beside, "/dev", "/proc"))) and (
            why := hidden(file)
        ):
            yield f"{file}: pbrd.service cannot read it: {why}"
    folder = os.path.join(beside, "conf.d")
    if not draft and os.path.isdir(folder) and (why := hidden(folder) or unlisted(folder)):
        yield f"{folder}: pbrd.service cannot read it: {why}"


def hidden(file: str) -> str:
    """Return why the service can't read `file`, with a remedy, or "": also for what can't be looked at."""
    real = os.path.realpath(file)
    if _below(real, HOMES):
        return f"it sees no home directories; move the file, to {PLACE} for instance"
    if _below(real, TEMPORARY):
        return f"it has a /tmp of its own; move the file, to {PLACE} for instance"
    with suppress(OSError):
        for part in _parts(real):
            found = os.stat(part)
            wanted = ("x", 0o1) if stat.S_ISDIR(found.st_mode) else ("r", 0o4)
            if reason := _refuses(part, found, *wanted):
                return reason
    return ""


def unlisted(folder: str) -> str:
    """Return why the service can't list what is in `folder`, which it may enter, with a remedy, or ""."""
    with suppress(OSError):
        return _refuses(folder, os.stat(folder), "r", 0o4)
    return ""


def _below(path: str, places: Iterable[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _parts(path: str) -> Iterator[str]:
    """Yield the directories on the way to `path`, and that itself."""
    for end, letter in enumerate(path):
        if letter == "/":
            yield path[:end] or "/"
    yield path


def _refuses(part: str, found: os.stat_result, letter: str, bit: int) -> str:
    """Return why root without CAP_DAC_OVERRIDE has not the right `letter` to a file or a directory."""
    if found.st_uid == 0:
        who, shift = "u", 6
    elif found.st_gid == _group():
        who, shift = "g", 3
    else:
        who, shift = "o", 0
    if found.st_mode >> shift & bit:
        return ""
    remedy = f"chmod {who}+{letter} {part}" + ("" if who == "u" else f", or chown root {part}")
    return f"{part} belongs to {_name(found.st_uid)} and has mode {stat.S_IMODE(found.st_mode):04o}; {remedy}"


def _group() -> int:
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return -1


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
