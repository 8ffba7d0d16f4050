"""What happened, told from two snapshots: transitions of uplinks and policies, changed gateways."""

from collections.abc import Iterator
from dataclasses import dataclass

from pbrd.health import State
from pbrd.status import FamilyStatus, PolicyStatus, Snapshot, UplinkStatus

SENTENCES = {
    "uplink-up": "uplink is up",
    "uplink-down": "uplink is down",
    "uplink-degraded": "uplink is degraded",
    "uplink-recovering": "uplink is recovering",
    "uplink-drained": "uplink is drained",
    "failover": "policy failed over",
    "failback": "policy went back",
    "gateway-changed": "gateway changed",
}
KINDS = {
    State.UP: "uplink-up",
    State.DOWN: "uplink-down",
    State.DEGRADED: "uplink-degraded",
    State.RECOVERING: "uplink-recovering",
    State.DRAINED: "uplink-drained",
}


@dataclass(frozen=True, slots=True)
class Event:
    """One transition; `kind` is the journal's PBRD_EVENT. Empty fields do not apply."""

    kind: str
    uplink: str = ""
    policy: str = ""
    reason: str = ""
    old: str = ""
    new: str = ""

    @property
    def sentence(self) -> str:
        """What happened, as a constant sentence."""
        return SENTENCES[self.kind]

    def facts(self) -> dict[str, str]:
        """The fields that apply."""
        fields = ("uplink", "policy", "old", "new", "reason")
        return {name: value for name in fields if (value := getattr(self, name))}


def between(before: Snapshot, after: Snapshot) -> Iterator[Event]:
    """Yield what happened from `before` to `after`; what only one of them knows did not happen."""
    uplinks = {uplink.name: uplink for uplink in before.uplinks}
    for uplink in after.uplinks:
        if uplink.name in uplinks:
            yield from _uplink(uplinks[uplink.name], uplink)
    policies = {policy.name: policy for policy in before.policies}
    for policy in after.policies:
        known = policies.get(policy.name)
        if known is not None and (known.active, known.state) != (policy.active, policy.state):
            yield _policy(known, policy)


def _uplink(old: UplinkStatus, new: UplinkStatus) -> Iterator[Event]:
    for was, now in ((old.ipv4, new.ipv4), (old.ipv6, new.ipv6)):
        if was and now and None not in (was.gateway, now.gateway) and was.gateway != now.gateway:
            yield _gateway(new.name, was, now)
    kind = KINDS.get(State(new.state))
    if kind and old.state != new.state:
        yield Event(kind, uplink=new.name, reason=new.reason, old=old.state, new=new.state)


def _gateway(name: str, old: FamilyStatus, new: FamilyStatus) -> Event:
    return Event(
        "gateway-changed", name, reason=new.source or "", old=old.gateway or "", new=new.gateway or ""
    )


def _policy(old: PolicyStatus, new: PolicyStatus) -> Event:
    def place(status: PolicyStatus) -> int:
        usable = status.state != "fallback" and status.active in status.via
        return status.via.index(status.active or "") if usable else len(status.via)

    kind = "failback" if place(new) < place(old) else "failover"
    return Event(
        kind,
        policy=new.name,
        reason=new.reason,
        old=old.active or old.fallback,
        new=new.active or new.fallback,
    )
