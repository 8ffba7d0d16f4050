"""A box: a real systemd as PID 1, with journald and on demand udevd, that tests boot, use and throw away.

It is a container of systemd-nspawn on an overlay of a root directory (this machine's own, unless
$PBRD_SYSTEMD_ROOT names another): what it writes stays in the overlay, over reboots, and goes with it.
It lives in a network namespace that it is given, a lab's router for instance, or in one of its own.

Nothing of the host's service manager is used. All processes of a box are in one PID namespace, whose first
process the kernel kills with the test that made the box: nothing is left running, however that ends.

/etc/systemd/system begins empty, so that nothing is enabled but what systemd itself brings and the test adds.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Self

import pbrd
from pbrd import netns

# What a box begins with: text, or for a link what it points to. Text that begins with "#!" can be executed.
Seed = dict[str, str | PurePath]

BOOT = 30.0  # seconds until a boot has failed
PREFIX = "pbrd-box"
HALT, POWEROFF = 3, 4  # from SIGRTMIN on, systemd(1)
PACKAGE = Path(pbrd.__file__).resolve().parent
ROOT = Path(os.environ.get("PBRD_SYSTEMD_ROOT", "/"))
EMPTY = (
    "etc/systemd/system",
    "etc/systemd/network",
    "etc/netplan",
    "etc/pbrd",
    "var/lib/pbrd",
    "var/log/journal",
)
PLACE = "/usr/lib/pbrd-box"  # in the box: this source folder, and the libraries of the Python that runs us
_numbers = count()

# The launcher of `pbrd` in a box. `exec` keeps the pid, which systemd expects its notifications from.
LAUNCHER = """#!{python} -I
import sys

sys.path[:0] = ["{place}/source", "{place}/libraries"]
from pbrd.cli import main

sys.exit(main())
"""
JOURNAL = "[Journal]\nStorage=volatile\nRateLimitBurst=0\nReadKMsg=no\nAudit=no\n"
SETTING: Seed = {
    "/etc/systemd/journald.conf.d/box.conf": JOURNAL,
    "/etc/systemd/system/systemd-networkd-wait-online.service": Path("/dev/null"),
    "/etc/systemd/system/systemd-hwdb-update.service": Path("/dev/null"),
    "/etc/systemd/system/getty.target": Path("/dev/null"),
}

# networkd behaves as on a real machine only with udevd, which takes a writable /sys. Only network devices
# are triggered: the others are the host's. Of these /sys shows only the box's, as it is one per namespace.
UDEV: Seed = {
    "/etc/systemd/system/box-sys.service": """[Unit]
DefaultDependencies=no
Before=systemd-udevd.service systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-networkd.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -ec 'for m in $(findmnt -rn -o TARGET -R /sys | grep -v ^/sys/fs); do \
mount -o remount,bind,rw $m; done; mount -o remount,rw,nosuid,nodev,noexec /sys/devices'
""",
    "/etc/systemd/system/box-udev-trigger.service": """[Unit]
DefaultDependencies=no
Wants=systemd-udevd.service
After=systemd-udevd.service box-sys.service
Before=sysinit.target systemd-networkd.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=udevadm trigger --settle --type=devices --subsystem-match=net --action=add
""",
    "/etc/systemd/system/sysinit.target.wants/box-sys.service": Path("../box-sys.service"),
    "/etc/systemd/system/sysinit.target.wants/box-udev-trigger.service": Path("../box-udev-trigger.service"),
    "/etc/systemd/system/systemd-udev-trigger.service": Path("/dev/null"),
    "/etc/systemd/system/systemd-udev-settle.service": Path("/dev/null"),
    "/etc/systemd/system/modprobe@.service": Path("/dev/null"),
}

# The first process of a box's PID namespace, which dies with us, and all others with it.
HOLDER = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--propagation=private"]
HOLDER += ["--pid", "--mount-proc", "--fork", "--kill-child"]
# $1: where the overlay lies; $2: the root below it; then what begins empty. The mount is the holder's own.
DISK = """
mount -t tmpfs -o mode=755 tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay overlay -o lowerdir="$2",upperdir=upper,workdir=work root
cd root
seed=$1.seed
shift 2
rm -rf "$@"
mkdir -p "$@"
cp -a "$seed/." .
echo ready
exec sleep infinity
"""


class NotPossible(Exception):
    """This machine can boot no box; says why and what to do."""


def requirements() -> list[Path]:
    """Return the cgroup hierarchies in which a box gets a group of its own; raises NotPossible."""
    if os.geteuid() != 0:
        raise NotPossible("needs root (mounts, namespaces)")
    tools = {"systemd-nspawn": "systemd-container", "unshare": "util-linux", "setpriv": "util-linux"}
    for tool, package in tools.items():
        if shutil.which(tool) is None:
            raise NotPossible(f"needs the command `{tool}`: install {package}")
    if not os.access(ROOT / "lib/systemd/systemd", os.X_OK):
        raise NotPossible(f"no systemd in {ROOT}")
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        raise NotPossible("needs a kernel with overlayfs")
    groups = list(_hierarchies())
    if not groups or not all(os.access(group, os.W_OK) for group in groups):
        raise NotPossible("needs a cgroup2 hierarchy that can be written to")
    if subprocess.run(
        ["unshare", "-m", "-p", "-n", "-f", "true"], check=False, capture_output=True
    ).returncode:
        raise NotPossible("needs namespaces of mounts, processes and network (CAP_SYS_ADMIN)")
    return groups


def _hierarchies() -> Iterator[Path]:
    """Yield the mount of cgroup2, then that of v1's "name=systemd" where both are in use."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    yield from [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"][:1]
    yield from [Path(fields[1]) for fields in mounts if fields[2] == "cgroup" and "name=systemd" in fields[3]]


def python() -> str:
    """Return a Python in ROOT that pbrd runs on and every unit may read; raises NotPossible."""
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
        found = re.fullmatch(r"python3\.(\d+)", (ROOT / "usr/bin" / name).resolve().name)
        if found and int(found[1]) >= 11 and (ROOT / "usr/bin" / name).exists():
            return f"/usr/bin/{name}"
    raise NotPossible(f"needs Python 3.11 or newer in {ROOT / 'usr/bin'}")


class Box:
    """A box, up from `with Box(…) as box:` on; raises NotPossible, or RuntimeError if it fails.

    `seed`: files by their absolute path, see `Seed`. `network`: the namespace to live in, as `ip netns` has
    it. `binds`: read-only mounts, path in the box → path here. `udev`: with udevd, as networkd needs it.
    `source`: with the `pbrd` of this source folder as a command.
    """

    def __init__(
        self,
        seed: Seed | None = None,
        *,
        network: str = "",
        binds: Mapping[str, Path] | None = None,
        udev: bool = False,
        source: bool = True,
        target: str = "multi-user.target",
    ) -> None:
        self._hierarchies = requirements()
        if udev and not (ROOT / "lib/systemd/systemd-udevd").exists():
            raise NotPossible("needs udevd: install udev")
        self.name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.network = network or self.name
        self._target = target
        self._seed, self._binds = {**SETTING, **(UDEV if udev else {})}, dict(binds or {})
        if source:
            self._seed["/usr/bin/pbrd"] = LAUNCHER.format(python=python(), place=PLACE)
            self._binds[f"{PLACE}/source/pbrd"] = PACKAGE
            self._binds[f"{PLACE}/libraries"] = Path(sysconfig.get_path("purelib"))
        self._seed |= seed or {}
        self._stack = ExitStack()
        self._groups = [hierarchy / self.name for hierarchy in self._hierarchies]
        self._holder: subprocess.Popen[bytes] | None = None
        self._machine: subprocess.Popen[bytes] | None = None
        self.leader = 0  # the pid, here, of the box's PID 1

    def __enter__(self) -> Self:
        try:
            self._build()
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the box at once and remove all of it."""
        self._stack.close()

    # Building

    def _build(self) -> None:
        _remove_stale(self._hierarchies)
        if self.network == self.name:
            netns.create([self.name])
            self._stack.callback(netns.remove, [self.name])
        for group in self._groups:
            group.mkdir()
            self._stack.callback(_remove_group, group)
        self._directory = Path(tempfile.mkdtemp(prefix=f"{self.name}."))
        self._stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._disk = self._directory / "disk"
        self._disk.mkdir()
        self._sow(Path(f"{self._disk}.seed"))
        self._stack.callback(self._let_go)
        self._holder = subprocess.Popen(
            [*HOLDER, "sh", "-ec", DISK, "sh", str(self._disk), str(ROOT), *EMPTY],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError("cannot build a box: its overlay can't be mounted")

    def _sow(self, directory: Path) -> None:
        """Lay out what the overlay begins with."""
        for name, content in self._seed.items():
            file = directory / name.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, PurePath):
                file.symlink_to(content)
            else:
                file.write_text(content)
                file.chmod(0o755 if content.startswith("#!") else 0o644)

    def _let_go(self) -> None:
        if self._holder is not None:
            self._holder.kill()  # and the kernel all that runs in its PID namespace
            self._holder.communicate()
        if self._machine is not None:
            self._machine.wait(10)

    # Power

    def boot(self) -> None:
        """Switch it on, and wait until it is up; raises RuntimeError with the end of its console."""
        assert self._holder is not None
        inside = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[0]
        enter = "".join(f"echo $$ >{group}/cgroup.procs; " for group in self._groups)
        binds = [f"--bind-ro={here}:{there}" for there, here in self._binds.items()]
        options = ["--quiet", f"--machine={self.name}", f"--directory={self._disk}/root"]
        # Neither the host's systemd nor machined is needed; --keep-unit stays in the cgroup that we made.
        options += [
            "--register=no",
            "--keep-unit",
            "--link-journal=no",
            "--resolv-conf=off",
            "--timezone=off",
        ]
        # Joining a namespace doesn't give CAP_NET_ADMIN in it, as making one does.
        options += [f"--network-namespace-path=/run/netns/{self.network}", "--capability=CAP_NET_ADMIN"]
        options += ["--system-call-filter=bpf", "--console=pipe", *binds, "--boot"]
        options += [f"systemd.unit={self._target}", f"systemd.hostname={self.name}"]
        command = ["nsenter", f"--target={inside}", "--mount", "--pid", "systemd-nspawn", *options]
        with (self._directory / "console").open("ab") as console:
            self._machine = subprocess.Popen(
                ["sh", "-ec", f'{enter}exec "$@"', "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=os.environ
                | {
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",  # cgroup2 inside, whatever is used here
                    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",  # /proc/sys/net; the rest is read-only
                },
            )
        deadline = time.monotonic() + BOOT
        while not self._is_up():
            if self._machine.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"cannot boot {self.name}:\n{self.console[-2000:]}")
            time.sleep(0.02)

    def _is_up(self) -> bool:
        self.leader = 0
        with suppress(OSError, IndexError):
            self.leader = int((self._groups[0] / "payload/init.scope/cgroup.procs").read_text().split()[0])
        if not self.leader:
            return False
        state = self.enter(["systemctl", "is-system-running"], check=False).stdout.strip()
        return state in ("running", "degraded")

    def halt(self) -> None:
        """Shut it down in order, as `systemctl poweroff` does."""
        assert self._machine is not None
        os.kill(self.leader, signal.SIGRTMIN + POWEROFF)
        self._machine.wait(BOOT)

    def cut(self) -> None:
        """Pull the plug: whatever runs is dead at once."""
        assert self._machine is not None
        os.kill(self.leader, signal.SIGKILL)
        self._machine.wait(BOOT)

    # Inside

    @property
    def console(self) -> str:
        """All that was printed to the console, over boots."""
        return (self._directory / "console").read_text(errors="replace")

    @property
    def root(self) -> Path:
        """The box's root directory, to read and write files in it."""
        return Path(f"/proc/{self.leader}/root")

    def write(self, seed: Seed) -> None:
        """Write files into the running box."""
        for name, content in seed.items():
            file = self.root / name.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            assert isinstance(content, str)
            file.write_text(content)
            file.chmod(0o755 if content.startswith("#!") else 0o644)

    def enter(
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 60.0
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in it as root with all powers, outside its units: for `systemctl` and the like."""
        return subprocess.run(
            ["nsenter", f"--target={self.leader}", "--all", "--", *argv],
            check=check,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
        )

    def run(
        self, argv: Sequence[str], *properties: str, check: bool = True, timeout: float = 60.0
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command as a transient unit with `properties` ("User=nobody") of systemd.exec(5)."""
        options = ["--quiet", "--wait", "--collect", "--pipe", *(f"--property={one}" for one in properties)]
        return self.enter(["systemd-run", *options, "--", *argv], check=check, timeout=timeout)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as `systemctl show` has them; all without names."""
        lines = self.enter(["systemctl", "show", unit, *(f"-p{one}" for one in properties)]).stdout
        return dict(line.split("=", 1) for line in lines.splitlines() if "=" in line)

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """The journal's entries with these matches ("PBRD_EVENT=reload", "-b", …), oldest first."""
        self.enter(["journalctl", "--sync"])
        lines = self.enter(["journalctl", "--output=json", "--all", "--no-pager", *matches]).stdout
        return [json.loads(line) for line in lines.splitlines()]


def _remove_stale(hierarchies: Iterable[Path]) -> None:
    """Remove namespaces, groups and directories of boxes whose makers are dead."""
    netns.remove(netns.stale(PREFIX))
    temporary = Path(tempfile.gettempdir())
    for left in (path for place in (temporary, *hierarchies) for path in place.glob(f"{PREFIX}-*")):
        if Path("/proc", left.name.removeprefix(f"{PREFIX}-").partition("-")[0]).exists():
            continue
        if left.parent == temporary:
            shutil.rmtree(left, ignore_errors=True)
        else:
            _remove_group(left)


def _remove_group(group: Path) -> None:
    """Remove a cgroup and those below it, as soon as the last process in them is gone."""
    deadline = time.monotonic() + 5
    while group.exists() and time.monotonic() < deadline:
        for directory, _, _ in os.walk(group, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)
        time.sleep(0.01)
