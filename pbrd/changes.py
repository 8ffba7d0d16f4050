"""What is different between two configs, in lines for people: much of it changes nothing in the kernel."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pbrd.settings import Config, Match, Policy, Probe, Uplink

MOST = 10  # lines of a kind; a router may have thousands of policies

# Keys as they stand in the file, where the fields are called otherwise. None: no key of the file.
KEYS: Mapping[str, str | None] = {
    "index": None,
    "name": None,
    "source": "from",
    "destination": "to",
    "source_file": "from_file",
    "destination_file": "to_file",
}


def between(old: Config, new: Config) -> tuple[str, ...]:
    """Return a line for each uplink, policy or section that differs, with the keys that do."""
    lines = [_line("[daemon]", _keys(old.daemon, new.daemon))] if old.daemon != new.daemon else []
    lines += _things("uplink", old.uplinks, new.uplinks)
    lines += _things("policy", old.policies, new.policies)
    lines += _order(old.policies, new.policies)
    if old.default != new.default:
        lines.append(_default(old.default, new.default))
    return tuple(lines)


def _line(what: str, keys: Sequence[str]) -> str:
    return f"config: {what}: {', '.join(keys)}"


def _default(old: Policy | None, new: Policy | None) -> str:
    if old is None or new is None:
        return f"config: [default] is {'gone' if new is None else 'new'}"
    return _line("[default]", _keys(old, new))


def _things(noun: str, old: Sequence[Uplink | Policy], new: Sequence[Uplink | Policy]) -> Iterator[str]:
    """Yield what became of uplinks or policies; they are the same if their names are."""
    before = {thing.name: thing for thing in old}
    after = {thing.name: thing for thing in new}
    gone = [f"config: {noun} {name} is gone" for name in before if name not in after]
    fresh = [f"config: {noun} {name} is new" for name in after if name not in before]
    pairs = [(name, before[name], thing) for name, thing in after.items() if name in before]
    keys = ((name, _keys(one, other)) for name, one, other in pairs if one != other)
    other = [_line(f"{noun} {name}", found) for name, found in keys if found]
    for lines, rest in ((gone, "are gone"), (fresh, "are new"), (other, "are different")):
        yield from lines[:MOST]
        if len(lines) > MOST:
            yield f"config: {len(lines) - MOST:,} more {noun.replace('y', 'ie')}s {rest}"


def _order(old: Sequence[Policy], new: Sequence[Policy]) -> Iterator[str]:
    before, after = [policy.name for policy in old], [policy.name for policy in new]
    both = set(before) & set(after)
    if [name for name in before if name in both] != [name for name in after if name in both]:
        yield "config: the order of the policies"


def _keys(old: Any, new: Any) -> list[str]:
    """Return the keys of the file by which two values of one type differ: "nat", "probe.interval"."""
    found = []
    for field in fields(old):
        key = KEYS.get(field.name, field.name)
        one, other = getattr(old, field.name), getattr(new, field.name)
        if key is None or one == other:
            continue
        if isinstance(one, Probe | Match):
            found += [f"{key}.{inner}" for inner in _keys(one, other)]
        else:
            found.append(key)
    return found
