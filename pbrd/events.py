"""What happened, as values: transitions of uplinks and policies, and what became of the daemon itself.

An event is told in several places, and each of them takes all it needs from here: the journal and the lines
on standard error (`message`, `priority`, `IDS`, `facts`), hooks (`facts`), and `pbrd events --json` with
the `Monitor` of the control socket (`to_json`, and `from_journal` for what lies in the journal).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from pbrd.health import State
from pbrd.status import FamilyStatus, PolicyStatus, Snapshot, UplinkStatus

# MESSAGE_ID of each kind, for ever: the catalog (systemd/pbrd.catalog) and people's scripts go by them.
IDS = {
    "uplink-up": "3f604c1b970e4c65810a7919a506f5f9",
    "uplink-down": "0ecc13cc1e674ccd98f74f497ae5b487",
    "uplink-degraded": "b074de005d2d4409b53c864f2e6100fb",
    "uplink-recovering": "40c4552164c6419eb66d75af4587089a",
    "uplink-drained": "cbf8f6a1f4d64a259355c9515db3d1bb",
    "failover": "017c1f71383546e483638bf454b1e066",
    "failback": "b4b66b5e0b754048996b89315afd078a",
    "policy-began": "511fd371fa4d43b6b0797cab1811adf8",
    "policy-ended": "2b3f86a260a640d2b5c3c3e52a03eeb7",
    "gateway-changed": "db0aaf58e13647c4bf6652aa9d3217b5",
    "drift-repaired": "f24e885ad2814cc2abdedafbdf7bfe4e",
    "reload": "8c8c949f7521414da6dac97cc2328601",
    "reload-refused": "75305c112a69400b89f6c2eb205c3bf7",
    "flushed": "b7a470323f1f40a5b2a7ef14abcffbe5",
    "started": "9567e0d733f8470c80f928f4a70cc080",
    "stopped": "a13fed19d3c649e98e5ef84b986b7a3d",
}
KINDS = {
    State.UP: "uplink-up",
    State.DOWN: "uplink-down",
    State.DEGRADED: "uplink-degraded",
    State.RECOVERING: "uplink-recovering",
    State.DRAINED: "uplink-drained",
}
Gateways = Mapping[tuple[str, str], str]  # uplink and "ipv4" or "ipv6" → its next hop
NONE: Gateways = MappingProxyType({})
WARNINGS = frozenset({"uplink-down", "uplink-degraded", "failover", "drift-repaired", "flushed"})
PROBLEMS = 20  # lines of a refused config that an event tells; `pbrd reload` and `pbrd check` tell all
LINE = 500  # characters of one of them
# The facts that every event has, "" where they do not apply, in the order in which documents show them.
FACTS = ("event", "uplink", "policy", "interface", "old", "new", "reason")


@dataclass(frozen=True, slots=True)
class Event:
    """One transition. `kind` is the journal's PBRD_EVENT; what is "" does not apply.

    `message` is one sentence for people (more lines only where a config has more problems); `interface` that
    of the uplink, or of the one that the policy goes to now; `details` are the facts that only its kind has.
    """

    kind: str
    message: str
    uplink: str = ""
    policy: str = ""
    interface: str = ""
    old: str = ""
    new: str = ""
    reason: str = ""
    details: tuple[tuple[str, str], ...] = ()

    @property
    def priority(self) -> str:
        """How much it matters, in structlog's words: "info", "warning" or "error"."""
        failed = self.kind == "reload-refused" or (self.kind == "stopped" and self.reason)
        return "error" if failed else "warning" if self.kind in WARNINGS else "info"

    def facts(self) -> dict[str, str]:
        """Return `FACTS` and the details; all there, whether they apply or not."""
        return {name: self.kind if name == "event" else getattr(self, name) for name in FACTS} | dict(
            self.details
        )

    def to_json(self, time: str) -> dict[str, Any]:
        """Return the document of what happened at `time` (ISO 8601): null for what does not apply."""
        return _document(time, self.message, self.facts())


def _document(time: str, message: str, facts: Mapping[str, str]) -> dict[str, Any]:
    known = {name: facts.get(name) or None for name in FACTS}
    details = {name: value for name, value in sorted(facts.items()) if name not in FACTS}
    return {"time": time, **known, "message": message, "details": details}


def from_journal(fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the same document of an entry of the journal, as `log` wrote it there."""
    own = {name[5:].lower(): value for name, value in fields.items() if name.startswith("PBRD_")}
    time = own.pop("time", "")
    own.pop("runtime_dir", None)
    return _document(time, fields.get("MESSAGE", ""), own)


# --- between two snapshots --------------------------------------------------------------------


def gateways(snapshot: Snapshot, known: Gateways) -> Gateways:
    """Return the last known next hops of a snapshot's uplinks: its own, else what was `known` before."""
    return {
        (uplink.name, name): gateway
        for uplink in snapshot.uplinks
        for name, family in (("ipv4", uplink.ipv4), ("ipv6", uplink.ipv6))
        if (gateway := (family and family.gateway) or known.get((uplink.name, name)))
    }


def between(before: Snapshot, after: Snapshot, hops: Gateways = NONE) -> Iterator[Event]:
    """Yield what happened from `before` to `after`; what only one of them knows did not happen.

    `hops` are the next hops of earlier snapshots, for what has none in `before`: one that was lost may come
    back as another one.
    """
    hops = gateways(before, hops)
    uplinks = {uplink.name: uplink for uplink in before.uplinks}
    for uplink in after.uplinks:
        if uplink.name in uplinks:
            yield from _uplink(uplinks[uplink.name], uplink, hops)
        else:
            yield from down_at_first((uplink,))
    if before.paused or after.paused:  # a flush and a reload are events of their own
        return
    if before.policies is after.policies:
        return
    interfaces = {uplink.name: uplink.interface for uplink in after.uplinks}
    policies = {policy.name: policy for policy in before.policies}
    for policy in after.policies:
        known = policies.get(policy.name)
        if known is None or (known.via, known.fallback) != (policy.via, policy.fallback):
            continue  # nothing failed or healed: the reload that did it is an event
        if (known.active, known.state) != (policy.active, policy.state):
            yield _policy(known, policy, interfaces.get(policy.active or "", ""))


def down_at_first(uplinks: Iterable[UplinkStatus]) -> Iterator[Event]:
    """Yield an event for each of `uplinks`, seen for the first time, that is down."""
    for uplink in uplinks:
        if uplink.state == State.DOWN:
            yield from _uplink(replace(uplink, state=State.STARTING.value), uplink, NONE)


def _uplink(old: UplinkStatus, new: UplinkStatus, hops: Gateways) -> Iterator[Event]:
    for family, now in (("ipv4", new.ipv4), ("ipv6", new.ipv6)):
        was = hops.get((new.name, family))
        if was and now and now.gateway and was != now.gateway:
            yield _gateway(new, family, was, now)
    kind = KINDS.get(State(new.state))
    if kind and old.state != new.state:
        why = "" if new.reason in ("ok", new.state) else f": {new.reason}"
        message = f"uplink {new.name} is {new.state}{why} (was {old.state})"
        yield Event(kind, message, new.name, "", new.interface, old.state, new.state, new.reason)


def _gateway(uplink: UplinkStatus, family: str, was: str, new: FamilyStatus) -> Event:
    now, source = new.gateway or "", new.source or ""
    message = f"uplink {uplink.name}: gateway changed from {was} to {now}" + (
        f" ({source})" if source else ""
    )
    details = (("family", family),)
    return Event("gateway-changed", message, uplink.name, "", uplink.interface, was, now, source, details)


def _policy(old: PolicyStatus, new: PolicyStatus, interface: str) -> Event:
    def place(status: PolicyStatus) -> int:
        usable = status.state != "fallback" and status.active in status.via
        return status.via.index(status.active or "") if usable else len(status.via)

    if "inactive" in (old.state, new.state):
        kind = "policy-ended" if new.state == "inactive" else "policy-began"
    else:
        kind = "failback" if place(new) < place(old) else "failover"
    was, now = _goes_to(old), _goes_to(new)
    message = _policy_sentence(kind, old, new)
    return Event(kind, message, "", new.name, interface, was, now, new.reason)


def _goes_to(policy: PolicyStatus) -> str:
    """Return an uplink, or what becomes of the packets without one: "unreachable", "next", "inactive" ..."""
    return policy.state if policy.state == "inactive" else policy.active or policy.fallback


def _policy_sentence(kind: str, old: PolicyStatus, new: PolicyStatus) -> str:
    who, was, now = f"policy {new.name}", _goes_to(old), _goes_to(new)
    if kind == "policy-ended":
        return f"{who} ended: its time is over (it went to {was})"
    if kind == "policy-began":
        return f"{who} began and goes to {now}" + _because(new)
    if kind == "failback":
        return f"{who} went back to {now} (was {was})" + _because(new)
    if new.active is None:
        return f"{who} has no usable uplink: fallback {now} (was {was})"
    if was == now:  # the uplink stays, but another of its uplinks, or its state, changed
        return f"{who} stays on {now}" + _because(new)
    return f"{who} failed over to {now} (was {was})" + _because(new)


def _because(policy: PolicyStatus) -> str:
    return "" if policy.reason in ("", "ok") else f": {policy.reason}"


# --- of the daemon itself ---------------------------------------------------------------------


def started(version: str, config: str) -> Event:
    """The kernel holds what the config says."""
    return Event(
        "started", f"pbrd {version} started with {config}", details=(("version", version), ("config", config))
    )


def stopped(on_stop: str, reason: str = "") -> Event:
    """The daemon ends; `on_stop` is what becomes of the kernel's state, `reason` what it died of."""
    what = "removed" if on_stop == "flush" else "kept"
    message = (
        f"pbrd stopped: cannot go on: {reason}" if reason else f"pbrd stopped; routes and rules are {what}"
    )
    return Event("stopped", message, reason=reason, details=(("on_stop", on_stop),))


def reloaded(generation: int, changed: Sequence[str]) -> Event:
    """Another config is in force; `changed` are the steps it took in the kernel."""
    count = (
        f"{len(changed)} change{'' if len(changed) == 1 else 's'} in the kernel" if changed else "no change"
    )
    return Event(
        "reload",
        f"config reloaded: {count} (generation {generation})",
        old=str(generation - 1),
        new=str(generation),
        details=(("changes", str(len(changed))),),
    )


def reload_refused(reason: str) -> Event:
    """The config was refused and the running one stays; `reason` has a line for each problem."""
    lines = [line if len(line) <= LINE else f"{line[:LINE]} …" for line in reason.splitlines()]
    if len(lines) > PROBLEMS:
        lines[PROBLEMS:] = [f"and {len(lines) - PROBLEMS} more problems"]
    reason = "\n".join(lines)
    told = f" {reason}" if "\n" not in reason else "".join(f"\n  {line}" for line in reason.splitlines())
    return Event("reload-refused", f"reload refused, the running config stays:{told}", reason=reason)


def flushed(removed: int) -> Event:
    """All that is pbrd's was taken out of the kernel, on request; `removed` counts it."""
    message = "flushed: nothing of pbrd is in the kernel until a reload or a restart"
    return Event("flushed", message, details=(("removed", str(removed)),))


def drift_repaired(lines: Sequence[str], repairs: int) -> Event:
    """Others changed what is ours; `lines` put it back, `repairs` are all since the start."""
    more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    details = (("steps", str(len(lines))), ("repairs", str(repairs)))
    return Event("drift-repaired", f"drift repaired: {lines[0]}{more}", reason=lines[0], details=details)
