"""What `pbrd status` shows, as values: the daemon fills in a `Snapshot`, `to_json` makes the document of it.

The fields and their order are the public interface (`io.pbrd.Daemon.varlink` says what each means); a field
may be added. Times are ISO 8601 in UTC with milliseconds and Z, as in "2026-11-22T17:43:48.723Z"; `_ms` are
milliseconds, losses and shares run from 0.0 to 1.0. `tables` shows the document to people.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

OMITTED_WHEN_NONE = frozenset({"shares"})  # every other None is written as null


@dataclass(frozen=True, slots=True)
class FamilyStatus:
    """One family of an uplink. `source`: where the gateway was learned, as in "dhcp", "ra" or "config"."""

    gateway: str | None
    source: str | None
    installed: bool
    state: str


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """One probe target."""

    address: str
    answering: bool
    rtt_ms: float | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class ProbeStatus:
    """All targets of an uplink together; None is "not measured yet"."""

    rtt_ms: float | None = None
    jitter_ms: float | None = None
    loss: float | None = None
    targets: tuple[TargetStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class UplinkStatus:
    """One uplink. `ipv4` and `ipv6` are None for a family that it does not have.

    `cgroups` are the numbers of those that uplink-NAME.slice has and whose traffic goes this way now.
    `nat`, `nat6` and `metered` are as in the config.
    """

    name: str
    interface: str
    table: int
    state: str
    reason: str
    since: str
    transitions: int
    ipv4: FamilyStatus | None
    ipv6: FamilyStatus | None
    probe: ProbeStatus
    cgroups: tuple[int, ...] = ()
    nat: bool = False
    nat6: bool = False
    metered: bool = False


@dataclass(frozen=True, slots=True)
class FamilyChoice:
    """The uplink that a policy uses now, for each family."""

    ipv4: str | None
    ipv6: str | None


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    """One policy. `shares` is None unless it is balanced: uplink → part of the new connections."""

    name: str
    via: tuple[str, ...]
    active: str | None
    fallback: str
    state: str
    families: FamilyChoice
    reason: str
    since: str
    shares: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class ReloadStatus:
    """The last reload. `error`: the problems, one a line."""

    at: str
    ok: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole daemon at one moment. `paused`: after a flush, nothing of pbrd is in the kernel."""

    version: str
    pid: int
    generation: int
    config: str
    uplinks: tuple[UplinkStatus, ...]
    policies: tuple[PolicyStatus, ...]
    drift_repairs: int = 0
    last_reload: ReloadStatus | None = None
    paused: bool = False
    paused_since: str | None = None


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return the document: dicts in the order of the fields, lists, strings, numbers, None."""
    document: dict[str, Any] = _plain(snapshot)
    return document


def outline(snapshot: Snapshot) -> dict[str, Any]:
    """Return the document with no more of each policy than its state: with thousands, little of the work."""
    states = [{"state": policy.state} for policy in snapshot.policies]
    return to_json(replace(snapshot, policies=())) | {"policies": states}


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if is_dataclass(value):
        kind: Any = type(value)
        items = ((name, getattr(value, name)) for name in _names(kind))
        return {
            name: _plain(item) for name, item in items if item is not None or name not in OMITTED_WHEN_NONE
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
