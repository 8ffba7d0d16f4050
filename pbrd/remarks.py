"""What commands say of what they have done, in lines for people, where the bare result says too little."""

from collections.abc import Container, Iterable, Sequence

from pbrd.classes import uses_nft
from pbrd.document import did_you_mean
from pbrd.settings import DEFAULT_POLICY, KILL_SWITCHES, Config, Fallback, OnStop
from pbrd.status import PolicyStatus, Snapshot, UplinkStatus

NAMED = 5  # policies in one line


def unknown(act: str, name: str, known: Iterable[str]) -> str:
    """Return what is wrong with an uplink that doesn't exist, with the nearest that does."""
    return f'cannot {act} "{name}": no uplink is called that{did_you_mean(name, known)}'


def drained(config: Config, name: str, was: bool, before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """Return what it means that uplink `name` has been drained; `was`: it had been before."""
    if was:
        return (f"{name} was drained already",)
    now = _uplink(after, name)
    if uses_nft(config):
        first = f"{name} is drained: new connections avoid it, live ones finish there"
    else:
        first = f"{name} is drained: what took it moves at once, as nftables is not in use"
    if after.paused:
        first = f"{name} will be drained when pbrd takes over again"
    elif now.state in ("down", "disabled"):
        first = f"{name} is drained; it was {now.state} ({now.reason}) before"
    return first, *_fallen(before, after)


def still_drained(config: Config, drained: Container[str]) -> tuple[str, ...]:
    """Return which uplinks of `config` are drained from before a start."""
    found = [uplink.name for uplink in config.uplinks if uplink.name in drained]
    return tuple(f"{name} is still drained; `pbrd undrain {name}` puts it back" for name in found)


def undrained(name: str, was: bool, after: Snapshot) -> tuple[str, ...]:
    """Return what it means that uplink `name` is not drained any more; `was`: it had been before."""
    if not was:
        return (f"{name} was not drained",)
    now = _uplink(after, name)
    if now.state in ("down", "disabled"):
        return (f"{name} is no longer drained, but {now.state} ({now.reason})",)
    return (f"{name} is back in service: new connections may take it",)


def stopped(on_stop: OnStop) -> str:
    """Say what the service manager shows of a daemon that has ended."""
    return f"stopped; routes and rules are {'removed' if on_stop is OnStop.FLUSH else 'kept'}"


def unread(path: str, files: Sequence[str]) -> tuple[str, ...]:
    """Return that `files` of the config at `path` are not as they were read, and what shows their plan."""
    if not files:
        return ()
    verb = "was" if len(files) == 1 else "were"
    what = f"{_listed(files)} {verb} changed since the config was read"
    return (f"{what}; for what a reload would do: pbrd plan --config {path}",)


def opened(config: Config) -> tuple[str, ...]:
    """Return which kill switches of `config` are open without rules in the kernel."""
    names = [policy.name for policy in config.all_policies if policy.fallback in KILL_SWITCHES]
    if not names:
        return ()
    if len(names) == 1:
        return (f"the kill switch of {names[0]} is open now: its packets go by the main table",)
    return (f"the kill switches of {_listed(names)} are open now: their packets go by the main table",)


def _uplink(snapshot: Snapshot, name: str) -> UplinkStatus:
    return next(uplink for uplink in snapshot.uplinks if uplink.name == name)


def _fallen(before: Snapshot, after: Snapshot) -> list[str]:
    """Return a line for each fallback that policies have come to, between two moments."""
    known = {policy.name: policy.state for policy in before.policies}
    ends: dict[str, list[str]] = {}
    for policy in after.policies:
        if policy.state == "fallback" and known.get(policy.name) != "fallback":
            ends.setdefault(_end(policy), []).append(policy.name)
    return [f"no uplink is left for {_listed(names)}: {end}" for end, names in ends.items()]


def _end(policy: PolicyStatus) -> str:
    if policy.fallback == Fallback.BEST_EFFORT and policy.active:
        return f"packets keep to {policy.active}"
    if policy.fallback in (Fallback.BEST_EFFORT, Fallback.NEXT):
        where = "the main table" if policy.name == DEFAULT_POLICY else "the next policy"
        return f"packets go on to {where}"
    return f"packets leave nowhere ({policy.fallback})"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
