"""Units of systemd as nftables sees them: cgroups of the unit's name, whose processes' traffic is matched.

A slice is matched at its own level of the tree, and so is everything that runs below it, now and later.
The names of slices say where they lie: `a-b.slice` is `a.slice/a-b.slice` (systemd.slice(5)).

Each unit has a set of cgroups of its own in our table, also while it doesn't run. Its rules ask for the set
at every depth at which the unit may lie: a number belongs to one cgroup alone, so at most one of them
matches, and a unit that starts somewhere changes elements and no rule. systemd fills the same set with
`NFTSet=`.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "uplink-"  # of the slices whose traffic takes one uplink
SET = "unit_"  # how the names of the units' sets begin
SET_NAME = 31  # characters that systemd takes, and of these only letters, digits, "_", "." and "/" (NFTSet=)
# Depths of services and scopes: from system.slice/x.service by system.slice/system-x.slice/x@1.service to
# user.slice/user-1000.slice/user@1000.service/app.slice/app-x.slice/x.service
DEPTHS = (2, 3, 4, 5, 6)
USER_MANAGER = 3  # user.slice/user-1000.slice/user@1000.service


@dataclass(frozen=True, slots=True)
class CGroup:
    """One cgroup of a unit. Another `id` at its path is another one, which a loaded rule doesn't match."""

    unit: str
    path: str  # below the root of the cgroup2 hierarchy: "system.slice/restic.service"
    level: int  # depth below the kernel's root, as `socket cgroupv2 level` counts it; children of the root: 1
    id: int  # inode of the directory = the number that a loaded rule compares
    mount: str = ""  # where the hierarchy lies below /sys/fs/cgroup: "", "unified" (hybrid), or "../…"


def file(cgroup: CGroup) -> str:
    """Return the path that nft(8) resolves below /sys/fs/cgroup when it loads a rule or an element."""
    return f"{cgroup.mount}/{cgroup.path}" if cgroup.mount else cgroup.path


def set_of(unit: str) -> str:
    """Return the name of the unit's set: "unit_restic.service".

    What nft or systemd don't take in a name is written "/" and its two hexadecimal digits, as in
    "unit_foo/40bar.service" for foo@bar.service. What is too long is cut, and ends in "//" and 8 digits
    of its SHA-256.
    """
    name = SET + re.sub(r"[^A-Za-z0-9_.]", lambda found: f"/{ord(found[0]):02x}", unit)
    if len(name) <= SET_NAME:
        return name
    return f"{name[: SET_NAME - 10]}//{hashlib.sha256(unit.encode()).hexdigest()[:8]}"


def setting_of(unit: str) -> str:
    """Return the line by which systemd (255 and later) fills the unit's set before anything runs in it."""
    return f"NFTSet=cgroup:inet:pbrd:{set_of(unit)}"


def fills(text: str, unit: str) -> bool:
    """Say whether the files of a unit (`systemctl cat`) have systemd fill the unit's set."""
    wanted = setting_of(unit).removeprefix("NFTSet=")
    found = False
    for line in text.splitlines():
        key, is_setting, value = line.partition("=")
        if is_setting and key.strip() == "NFTSet":
            found = wanted in value.split() or (found and bool(value.strip()))  # an empty one forgets all
    return found


def levels_of(unit: str, above: int = 0) -> tuple[int, ...]:
    """Return the levels at which `unit` may lie, of the system's manager or of a user's.

    `above` are the levels between the kernel's root and that of the hierarchy that we see.
    """
    own = slice_path(unit).count("/") + 1
    depths = (own, USER_MANAGER + own) if unit.endswith(".slice") else DEPTHS
    return tuple(above + depth for depth in depths)


def additions(members: Mapping[str, tuple[CGroup, ...]]) -> str:
    """Return the nft(8) commands that put these cgroups into the sets of their units."""
    return "".join(
        f"add element inet pbrd {set_of(unit)} {{ {', '.join(_quoted(one) for one in cgroups)} }}\n"
        for unit, cgroups in members.items()
        if cgroups
    )


def _quoted(cgroup: CGroup) -> str:
    return f'"{file(cgroup)}"'


def slice_of(uplink: str) -> str:
    """Return the slice whose traffic takes `uplink`: uplink-NAME.slice.

    systemd takes no slice with "--" or a dash at its end: the dashes of such names are escaped as
    systemd-escape(1) does it. A dash that stays nests: uplink-a-b.slice lies in uplink-a.slice, so
    where both a and a-b are uplinks, the deeper level must be asked first.
    """
    if "--" in uplink or uplink.endswith("-"):
        uplink = uplink.replace("-", "\\x2d")
    return f"{PREFIX}{uplink}.slice"


def slice_path(name: str) -> str:
    """Return where systemd puts a slice below its root: "a.slice/a-b.slice" for "a-b.slice"."""
    parts = name.removesuffix(".slice").split("-")
    return "/".join(f"{'-'.join(parts[:end])}.slice" for end in range(1, len(parts) + 1))
