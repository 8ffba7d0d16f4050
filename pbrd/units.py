"""Units of systemd as nftables sees them: cgroups of the unit's name, whose processes' traffic is matched.

A slice is matched at its own level of the tree, and so is everything that runs below it, now and later.
The names of slices say where they lie: `a-b.slice` is `a.slice/a-b.slice` (systemd.slice(5)).
"""

from dataclasses import dataclass

PREFIX = "uplink-"  # of the slices whose traffic takes one uplink


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


def expression(cgroup: CGroup) -> str:
    """Return the nft expression that holds for traffic of the cgroup's processes, in the output hook."""
    return f'socket cgroupv2 level {cgroup.level} "{file(cgroup)}"'


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
