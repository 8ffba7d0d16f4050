"""Where the cgroups of units lie, and when they come, go, or come back as others.

Facts (Linux 6.18, nft 1.0.6, tried with packets; tests/test_cgroups.py tries them again):

- `socket cgroupv2 level N "PATH"` matches in output (and input, prerouting; postrouting is refused)
  what a process sends whose cgroup has PATH as its ancestor at level N, or is it.
- nft turns PATH into the inode's number by a stat below /sys/fs/cgroup when it loads; it takes no number
  (netlink does: `elements`).
  N is not checked against PATH, so on a hybrid host `level 2 "unified/a.slice/b.service"` is right: no
  mount namespace is needed. Where the hierarchy is mounted elsewhere, PATH may begin with "../".
- A PATH that is not there makes nft refuse the whole transaction: look again, load again.
- The number stays in the rule when the cgroup goes. One of the same name that is made later has another
  number: nothing matches until it is loaded again. `nft list` shows such a number bare.
- The same holds for elements of a set of `type cgroupsv2` (`socket cgroupv2 level 2 @units`); one set
  serves one level. `delete element` with the path of a cgroup that is gone fails: flush the set.
- `ip netns exec` mounts a /sys without cgroups, so nft finds nothing there (the lab mounts it again).
- A socket belongs to the cgroup in which it was made, also when its process is moved afterwards; what a
  listening socket accepts belongs to the listener's.

The race: between the mkdir of a cgroup and the moment at which its number is in the unit's set, the unit's
packets match nothing, and a connection that begins then stays where it began. Here that takes some
milliseconds, of which netlink takes 0.3; a forked nft(8) took 20, and 900 when it replaced a table of 5,000
policies. systemd 252 takes 10 to 20 ms from there to the first line of a program. There is no race where the
number is known before anything runs in the cgroup:

- `NFTSet=cgroup:inet:pbrd:unit_X` in the unit (systemd 255 and later): systemd itself puts the number into
  the set before it starts the program, also while no daemon runs (systemd.resource-control(5); tried with
  257). It does so as it applies controllers: a unit that has none, as in a container without any, needs
  `IPAccounting=yes` beside it;
- a slice that stays: `Slice=backup.slice` beside `systemctl start backup.slice` (or a unit that wants it)
  and `unit = "backup.slice"`; all that starts below it later matches from its first packet;
- `pbrd use`, which waits until the daemon knows its slice.

A name is no proof: users may make cgroups of any name below their user@UID.service. `unit` sorts traffic
that wants to be sorted; it keeps nobody from anything.
"""

import ctypes
import errno
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pbrd.errors import PbrdError
from pbrd.units import CGroup, slice_of, slice_path

__all__ = ["CGroup", "Hierarchy", "Watch", "hierarchy", "paths_of", "slice_of", "slice_path"]

NFT_BASE = "/sys/fs/cgroup"  # compiled into nft: SYSFS_CGROUPSV2_PATH in its src/socket.c
MOST_HOLDERS = 1024  # slices that are looked into: a user may make any number below user@UID.service
UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]+")  # systemd.unit(5)

# linux/inotify.h
IN_CREATE, IN_DELETE, IN_Q_OVERFLOW, IN_ONLYDIR = 0x100, 0x200, 0x4000, 0x01000000
EVENT = struct.Struct("=iIII")
LIBC = ctypes.CDLL(None, use_errno=True)

Visit = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The cgroup2 tree as this process sees it."""

    root: Path  # where it is mounted
    above: int = 0  # levels between the kernel's root and this one, where only a part is mounted

    @property
    def below_nft(self) -> str:
        """`root` as nft finds it from /sys/fs/cgroup; "" is that directory itself."""
        path = os.path.relpath(self.root, NFT_BASE)
        return "" if path == "." else path


def hierarchy() -> Hierarchy:
    """Return where cgroup2 is mounted: on /sys/fs/cgroup, or (hybrid) below it; raises PbrdError."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():  # proc_pid_mountinfo(5)
        fields, _, source = line.partition(" - ")
        _, _, device, root, point, *_ = fields.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        if source.startswith("cgroup2 ") and not root.startswith("/..") and _is_seen(point, device):
            above = len([part for part in root.split("/") if part])
            found.append(Hierarchy(Path(point), above))
    if not found:
        raise PbrdError(f"cannot look for units: no cgroup2 hierarchy is mounted (usually on {NFT_BASE})")
    return min(found, key=lambda one: (one.above, not str(one.root).startswith(NFT_BASE)))


def _is_seen(point: str, device: str) -> bool:
    """Say whether nothing else is mounted over it."""
    try:
        number = os.stat(point).st_dev
    except OSError:
        return False
    return device == f"{os.major(number)}:{os.minor(number)}"


def paths_of(units: Iterable[str], tree: Hierarchy | None = None) -> dict[str, tuple[CGroup, ...]]:
    """Return the cgroups that bear the name of each unit; none for a unit that doesn't run.

    There may be several, as a user's manager has units of its own. Raises PbrdError without cgroup2.
    """
    return _walk(frozenset(units), tree or hierarchy(), lambda _: None)


def _walk(units: frozenset[str], tree: Hierarchy, visit: Visit) -> dict[str, tuple[CGroup, ...]]:
    """Look for `units` breadth first; `visit` gets every directory before it is read.

    systemd puts units into slices, and slices into slices (or into a user's manager), so only those are
    looked into: one directory read each, a few dozen on a server. Services, scopes and what other
    programs make at the root are not, however many cgroups a container engine keeps in there.
    """
    found: dict[str, list[CGroup]] = {unit: [] for unit in sorted(units)}
    holders, looked = deque([""]), 0
    while holders and looked < MOST_HOLDERS:
        holder = holders.popleft()
        looked += 1
        directory = os.path.join(tree.root, holder)
        visit(directory)
        for name, inode in _children(directory):
            path = f"{holder}/{name}" if holder else name
            if name in units:
                level = tree.above + path.count("/") + 1
                found[name].append(CGroup(name, path, level, inode, tree.below_nft))
            if holds_units(name):
                holders.append(path)
    return {unit: tuple(sorted(cgroups, key=lambda one: one.path)) for unit, cgroups in found.items()}


def _children(directory: str) -> Iterator[tuple[str, int]]:
    """Yield name and id of the cgroups in `directory`; nothing if it is gone or too deep for a path."""
    with suppress(OSError), os.scandir(directory) as entries:
        yield from ((entry.name, entry.inode()) for entry in entries if entry.is_dir())


def holds_units(name: str) -> bool:
    """Say whether systemd puts units into a cgroup of this name: a slice, or the manager of a user.

    The slices of Kubernetes hold one each for thousands of pods, and no unit anybody writes down. Users
    may make cgroups of any name, which then stands in a text for nft: only a unit's characters are let in.
    """
    if not UNIT_NAME.fullmatch(name):
        return False
    if name.endswith(".slice"):
        return not name.startswith("kubepods")
    return name.startswith("user@") and name.endswith(".service")


class Watch:
    """The cgroups of some units: add it to the loop as a reader, and ask `changed` when it is readable.

    Raises PbrdError where there is no cgroup2, or no inotify to be had.
    """

    def __init__(self, units: Iterable[str]) -> None:
        self._units = frozenset(units)
        self.tree = hierarchy()
        self._fd: int = LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _refused("watch units", "fs.inotify.max_user_instances")
        try:
            self.cgroups = self._look()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the inotify descriptor."""
        return self._fd

    def close(self) -> None:
        """Stop watching; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def changed(self) -> bool:
        """Take in what has happened; say whether `cgroups` are others than before (by id) and must be loaded.

        What doesn't concern our units, as the coming and going of containers, costs a read each time.
        """
        events = list(self._events())  # all of them, or the descriptor stays readable
        return any(self._concerns(mask, name) for mask, name in events) and self.look()

    def look(self) -> bool:
        """Look again whatever inotify says (when nft found one gone, say); the result is as of `changed`."""
        before, self.cgroups = self.cgroups, self._look()
        return self.cgroups != before

    def _look(self) -> dict[str, tuple[CGroup, ...]]:
        return _walk(self._units, self.tree, self._watch)

    def _watch(self, directory: str) -> None:
        """Watch before reading: what comes in between is in both. To watch again changes nothing."""
        mask = IN_CREATE | IN_DELETE | IN_ONLYDIR
        failed = LIBC.inotify_add_watch(self._fd, os.fsencode(directory), mask) < 0
        if failed and ctypes.get_errno() in (errno.ENOSPC, errno.ENOMEM):  # else it has just gone
            raise _refused(f"watch {directory}", "fs.inotify.max_user_watches")

    def _concerns(self, mask: int, name: str) -> bool:
        return bool(mask & IN_Q_OVERFLOW) or name in self._units or holds_units(name)

    def _events(self) -> Iterator[tuple[int, str]]:
        """Yield mask and name of each event that waits."""
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return
            offset = 0
            while offset < len(data):
                _, mask, _, length = EVENT.unpack_from(data, offset)
                offset += EVENT.size + length
                yield mask, os.fsdecode(data[offset - length : offset].rstrip(b"\0"))


def _refused(what: str, limit: str) -> PbrdError:
    return PbrdError(f"cannot {what}: {os.strerror(ctypes.get_errno())} (is {limit} too low?)")
