"""The daemon's facts as the `Snapshot` that people see: the state of uplinks, and where each policy goes.

Pure: monotonic times become wall clock ones by an offset that the caller gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache

from pbrd.health import Health, Reason, State
from pbrd.judging import balanced, shares
from pbrd.objects import KernelState, Key, Link, Standing
from pbrd.paths import Paths
from pbrd.routing import path_fault
from pbrd.rules import by_preference, has_family, is_drained, policy_families
from pbrd.settings import MAIN, Config, Fallback, Family, GatewayMode, Policy, Uplink
from pbrd.status import (
    FamilyChoice,
    FamilyStatus,
    PolicyStatus,
    ProbeStatus,
    TargetStatus,
    UplinkStatus,
)

# The worse of two states stands further right.
SEVERITY = (State.UP, State.STARTING, State.RECOVERING, State.DEGRADED, State.DOWN)


@dataclass(frozen=True, slots=True)
class View:
    """All facts that a snapshot is made of."""

    config: Config
    families: tuple[Family, ...]
    links: Mapping[str, Link]
    paths: Paths
    standings: Mapping[Key, Standing]
    state: KernelState
    in_force: frozenset[str]  # names of policies; the others wait for their time
    open: frozenset[Key]  # tables with a default route: who looks there goes there
    slices: Mapping[str, tuple[int, ...]]  # cgroups of uplink-NAME.slice that nftables knows, by uplink
    clock: float  # wall clock minus monotonic, seconds


def open_tables(config: Config, state: KernelState) -> frozenset[Key]:
    """Return the uplinks and families whose table has a default route, be it ours or in its place."""
    keys = [route.key for route in state.routes] + list(state.foreign)
    names = {uplink.table: uplink.name for uplink in config.uplinks}
    return frozenset((names[k[1]], k[0]) for k in keys if k[2].prefixlen == 0 and k[1] in names)


def iso(seconds: float) -> str:
    """Return wall clock seconds as ISO 8601 in UTC with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- uplinks ----------------------------------------------------------------------------------


def uplinks(view: View, now: float) -> tuple[UplinkStatus, ...]:
    """Return the status of every uplink, in the order of the config."""
    return tuple(_uplink(view, uplink, now) for uplink in view.config.uplinks)


def _uplink(view: View, uplink: Uplink, now: float) -> UplinkStatus:
    keys = [(uplink.name, f) for f in view.families if has_family(uplink, f)]
    present = [key for key in keys if key in view.paths.seen] or keys
    if not uplink.enabled:
        state, reason, since, transitions = State.DISABLED, Reason.DISABLED, now, 0
    else:
        healths = [view.paths.healths[key] for key in present]
        state, reason = _together(healths)
        if uplink.name in view.paths.drained and state is not State.DOWN:
            state, reason = State.DRAINED, Reason.DRAINED
        since = max(health.since for health in healths)
        if state is State.DRAINED:
            since = view.paths.turned.get(uplink.name, since)
        elif state is not State.DOWN:  # which hides whether it is drained
            since = max(since, view.paths.turned.get(uplink.name, since))
        transitions = sum(health.transitions for health in healths)
    return UplinkStatus(
        uplink.name,
        uplink.interface,
        uplink.table,
        state.value,
        reason.value,
        iso(view.clock + since),
        transitions,
        _family(view, uplink, Family.IPV4),
        _family(view, uplink, Family.IPV6),
        _probe(view, present if uplink.enabled else []),
        view.slices.get(uplink.name, ()),
        uplink.nat,
        uplink.nat6,
        uplink.metered,
    )


def _together(healths: list[Health]) -> tuple[State, Reason]:
    """Sum up the families of an uplink: all alike, or degraded if one is worse than another."""
    worst = max(healths, key=lambda health: SEVERITY.index(health.state))
    best = min(healths, key=lambda health: SEVERITY.index(health.state))
    if worst.state is State.DOWN and best.state is not State.DOWN:
        return State.DEGRADED, worst.reason
    return worst.state, worst.reason


def _family(view: View, uplink: Uplink, family: Family) -> FamilyStatus | None:
    key = (uplink.name, family)
    if key not in view.paths.seen or key not in view.paths.healths:
        return None
    hop = view.paths.hops.get(key)
    installed = any(
        route.is_default and route.family is family and route.table == uplink.table
        for route in view.state.routes
    )
    gateway = str(hop.gateway) if hop and hop.gateway else _configured(uplink, family)
    origin = hop.origin if hop else ("config" if gateway else None)
    return FamilyStatus(gateway, origin, installed, view.paths.healths[key].state.value)


def _configured(uplink: Uplink, family: Family) -> str | None:
    wanted = uplink.gateway_of(family)
    return None if isinstance(wanted, GatewayMode) else str(wanted)


def _probe(view: View, keys: list[Key]) -> ProbeStatus:
    """Return the measures of an uplink: all its targets, and the figures of its first family that has any."""
    measures = [view.paths.healths[key].measures() for key in keys]
    targets = tuple(
        TargetStatus(str(t.address), t.answering, _ms(t.rtt), _rounded(t.loss))
        for m in measures
        for t in m.targets
    )
    first = next((m for m in measures if m.targets), None)
    if first is None:
        return ProbeStatus()
    return ProbeStatus(_ms(first.rtt), _ms(first.jitter), _rounded(first.loss), targets)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 4)


# --- policies ---------------------------------------------------------------------------------


def chosen(view: View, policy: Policy, family: Family) -> str | None:
    """Return the uplink that new connections of `policy` take now; "main" counts as usable."""
    for name in by_preference(names_of(policy), family, view.standings):
        if name == MAIN or (name, family) in view.open:
            return name
    if policy.fallback is Fallback.BEST_EFFORT:
        return next((name for name in names_of(policy) if _reachable(view, name, family)), None)
    return None


def names_of(policy: Policy) -> tuple[str, ...]:
    """Return the uplinks that a policy names, in order."""
    return policy.via or tuple(name for name, _ in policy.balance)


def _reachable(view: View, name: str, family: Family) -> bool:
    if name == MAIN or (name, family) not in view.paths.hops or is_drained(name, family, view.standings):
        return False
    link = view.links.get(view.config.uplink(name).interface)
    return path_fault(link, view.paths.hops[name, family]) is None


@dataclass(frozen=True, slots=True)
class Said:
    """The status of every policy, and what it depends on."""

    config: Config
    in_force: frozenset[str]
    kinds: tuple[tuple[object, ...], ...]
    policies: tuple[PolicyStatus, ...]


def policies(view: View, before: Said | None, now: float) -> Said:
    """Return the status of every policy. `before` keeps `since` of those that did not change.

    Policies that say the same go the same way: of thousands few must be worked out. If all is as before, it
    is the very object, so that to compare it costs nothing.
    """
    moment = iso(view.clock + now)
    kinds = _kinds(view.config, view.in_force)
    examples = dict(kinds)
    worked_out = {kind: _policy(view, policy, kind[1], moment) for kind, policy in examples.items()}
    says = tuple(map(_says, worked_out.values()))
    if before and before.config is view.config and (before.in_force, before.kinds) == (view.in_force, says):
        return before
    known = {policy.name: policy for policy in before.policies} if before else {}
    found = (_since(worked_out[kind], policy.name, known.get(policy.name)) for kind, policy in kinds)
    return Said(view.config, view.in_force, says, tuple(found))


def _since(status: PolicyStatus, name: str, known: PolicyStatus | None) -> PolicyStatus:
    """Return `status` as that of the policy `name`, which was `known` so before."""
    if known is None or (known.active, known.state) != (status.active, status.state):
        return replace(status, name=name)
    return known if _says(known) == _says(status) else replace(status, name=name, since=known.since)


def _says(status: PolicyStatus) -> tuple[object, ...]:
    """Return all but the name and the time."""
    s = status
    return s.active, s.state, s.reason, s.families, s.via, s.fallback, s.shares


@lru_cache(maxsize=2)
def _kinds(config: Config, in_force: frozenset[str]) -> tuple[tuple[tuple[int, bool], Policy], ...]:
    """Return each policy with what those share which say the same: a number, and whether it is in force."""
    numbers: dict[object, int] = {}
    found = []
    for policy in config.all_policies:
        kind = (policy.via, policy.balance, policy.fallback, policy_families(policy.match))
        found.append(((numbers.setdefault(kind, len(numbers)), policy.name in in_force), policy))
    return tuple(found)


def _policy(view: View, policy: Policy, is_on: bool, since: str) -> PolicyStatus:
    choices = {family: chosen(view, policy, family) if is_on else None for family in view.families}
    family = _counting(view, policy)
    active = choices[family]
    state, reason = _judged(view, policy, family, active) if is_on else ("inactive", "not in force now")
    return PolicyStatus(
        policy.name,
        names_of(policy),
        active,
        policy.fallback.value,
        state,
        FamilyChoice(choices.get(Family.IPV4), choices.get(Family.IPV6)),
        reason,
        since,
        shares_of(view, policy),
    )


def _counting(view: View, policy: Policy) -> Family:
    """Return the family that a policy's `active` speaks of: the first that it and its uplinks have."""
    matching = [family for family in view.families if family in policy_families(policy.match)]
    for family in matching:
        names = names_of(policy)
        if MAIN in names or any((name, family) in view.paths.seen for name in names):
            return family
    return (matching or list(view.families))[0]


def _judged(view: View, policy: Policy, family: Family, active: str | None) -> tuple[str, str]:
    """Return (state, reason): the reason is why the first choice is not taken."""
    if active is None or (active != MAIN and (active, family) not in view.open):
        return "fallback", f"no uplink is usable: {policy.fallback.value}"
    names = names_of(policy)
    missed = next(
        (name for name in names if name not in (MAIN, active) and _is_missed(view, policy, name, family)), ""
    )
    if active == names[0] and not (policy.balance and missed):
        return "preferred", "ok"
    missed = missed or names[0]
    return "failed-over", f"{missed} is {_condition(view, missed, family)}"


def _condition(view: View, name: str, family: Family) -> str:
    health = view.paths.healths.get((name, family))
    if health is None:
        return "not there"
    if health.usable and name in view.paths.drained:
        return State.DRAINED.value
    if health.state is State.DOWN and health.good:
        return f"{health.state.value} (answers again, but not yet for `rise` rounds)"
    return f"{health.state.value} ({health.reason.value})"


def _is_missed(view: View, policy: Policy, name: str, family: Family) -> bool:
    """Say whether an uplink that should carry this policy does not: the first one, or one that shares."""
    if not policy.balance:
        return name == policy.via[0]
    standing = view.standings.get((name, family))
    return (name, family) not in view.open or standing is None or not standing.preferred


def shares_of(view: View, policy: Policy) -> dict[str, float] | None:
    """Return which part of the new connections each uplink of a balanced policy gets."""
    if not policy.balance:
        return None
    slots = shares(policy.balance, balanced(view.standings))
    total = slots[-1][1].last + 1
    parts: dict[str, float] = {}
    for name, part in slots:
        parts[name] = parts.get(name, 0.0) + (part.last - part.first + 1) / total
    return {name: round(part, 4) for name, part in parts.items()}
