"""The sysctls of the uplinks' interfaces: read, written, and put back as they were.

What a key was before pbrd first wrote it is kept in the runtime directory, so that `pbrd flush` restores it
even after a crash of the daemon. Like the sysctls, what lies in /run begins anew at each boot. The kernel's
boot_id is no witness: systemd-nspawn mounts another one over it, which a confined unit doesn't see.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from pbrd import statefile
from pbrd.objects import Sysctl
from pbrd.settings import Family

ROOT = Path("/proc/sys/net")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def path_of(sysctl: Sysctl) -> Path:
    """Return where the kernel shows a sysctl; interface names may hold dots, so no sysctl(8) spelling."""
    return (
        ROOT / ("ipv6" if sysctl.family is Family.IPV6 else "ipv4") / "conf" / sysctl.interface / sysctl.key
    )


def has_ipv6() -> bool:
    """Say whether this kernel has IPv6 at all."""
    return (ROOT / "ipv6").exists()


def read(sysctl: Sysctl) -> Sysctl | None:
    """Return `sysctl` with the value that the kernel has; None if interface or key are not there."""
    with suppress(OSError, ValueError):
        return Sysctl(sysctl.family, sysctl.interface, sysctl.key, int(path_of(sysctl).read_text()))
    return None


def rp_filter(interface: str) -> int:
    """Return the reverse path filter that counts for `interface`: the larger of its own and `all`."""
    values = [read(Sysctl(Family.IPV4, name, "rp_filter", 0)) for name in ("all", interface)]
    return max((found.value for found in values if found), default=0)


class Originals:
    """The values before pbrd, kept at `path`; `trouble` is what was wrong with the file, or "".

    `former` is where a version before 0.1.0 kept them; what it has of this boot is taken over.
    """

    def __init__(self, path: Path, former: Path | None = None) -> None:
        self.path = path
        kept, self.trouble = statefile.load(path, _kept)
        if kept is None and former is not None:
            kept, trouble = statefile.load(former, _kept_in_this_boot)
            self.trouble = self.trouble or trouble
        self.former = former
        self.values = kept or {}
        if kept and former is not None and not path.exists() and not self._save():
            self._forget_former()

    def write(self, sysctl: Sysctl) -> None:
        """Write a sysctl and remember what it was; raises OSError."""
        path = path_of(sysctl)
        before = int(path.read_text())
        if str(path) not in self.values:
            self.values[str(path)] = before
            self._save()
        path.write_text(str(sysctl.value))

    def restore(self) -> list[str]:
        """Put everything back; return the lines of what changed. Interfaces that are gone are skipped."""
        changed = []
        for name, value in self.values.items():
            with suppress(OSError, ValueError):
                if int(Path(name).read_text()) != value:
                    Path(name).write_text(str(value))
                    changed.append(f"sysctl {'.'.join(Path(name).parts[3:])}={value}")
        self.values = {}
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._forget_former()
        return changed

    def _forget_former(self) -> None:
        if self.former is not None:
            with suppress(OSError):
                self.former.unlink(missing_ok=True)

    def _save(self) -> str:
        # A lost file costs a sysctl that stays as it is after a flush: no reason to stop routing.
        return statefile.save(self.path, {"values": self.values})


def _kept(document: Any) -> dict[str, int]:
    """Return the values that an earlier daemon kept; ValueError and its like if they can't be."""
    values = {str(name): int(value) for name, value in document["values"].items()}
    if not all(Path(name).is_relative_to(ROOT) for name in values):
        raise ValueError
    return values


def _kept_in_this_boot(document: Any) -> dict[str, int]:
    """Return what `_kept` does, if it was in this boot."""
    boot = ""  # where the kernel does not name it, what is kept counts over boots
    with suppress(OSError):
        boot = BOOT_ID.read_text().strip()
    return _kept(document) if document["boot"] == boot else {}
