"""What can go wrong, one class a layer.

PbrdError
├── ConfigError      the TOML files are wrong: every problem, each with file, key, value and remedy
├── KernelError      a netlink request that the kernel refused
├── ControlError     the control socket: a refused or broken request
│   └── NotRunning   no daemon listens there
├── NeedsRoot        only root may; the command line adds how to ask again
└── LabError         the lab of namespaces can't be built here
"""

from typing import NamedTuple


class PbrdError(Exception):
    """Base of all that pbrd raises on purpose; `str()` is one line for people."""


class Problem(NamedTuple):  # no dataclass: importing those would cost `pbrd status` a fifth of its time
    """One mistake in a config: where it stands and what would be right."""

    file: str
    place: str  # dotted key as in `uplinks.lte.table`; "" is the file as a whole
    remark: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.place, self.remark) if part)


class ConfigError(PbrdError):
    """A config that can't be used; carries every problem found, not just the first."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class KernelError(PbrdError):
    """A netlink request that failed: "cannot ACT: CAUSE"."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class ControlError(PbrdError):
    """The daemon refused a request, or the talk with it broke off."""


class NotRunning(ControlError):
    """No daemon listens on the control socket."""


class NeedsRoot(PbrdError):
    """What only root may do; says what. The command line adds the command with sudo."""


class LabError(PbrdError):
    """The lab of namespaces can't be built on this machine; says why."""
