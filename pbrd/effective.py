"""The config as it counts right now: without policies whose time it is not, with those of slices that exist.

And with uplinks numbered as they were: marks of live connections hold these numbers, and an uplink must not
get another's because a third one left the file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from itertools import count

from pbrd.schedule import active
from pbrd.settings import Config, Fallback, Match, Policy, the_same
from pbrd.units import slice_of


def effective(config: Config, now: datetime, slices: Iterable[str]) -> Config:
    """Return `config` at the local time `now`, while these units exist.

    What runs in `uplink-NAME.slice` takes that uplink or nothing, whatever other policies say. A deeper
    slice is asked first: uplink-a-b.slice lies in uplink-a.slice.
    """
    there = set(slices)
    bound = [
        Policy(
            slice_of(u.name), Match(unit=(slice_of(u.name),)), via=(u.name,), fallback=Fallback.UNREACHABLE
        )
        for u in sorted(config.uplinks, key=lambda uplink: -uplink.name.count("-"))
        if slice_of(u.name) in there
    ]
    timely = (policy for policy in config.policies if is_on(policy, now))
    return the_same(replace(config, policies=(*bound, *timely)))


def is_on(policy: Policy, now: datetime) -> bool:
    """Say whether `policy` holds at the local time `now`."""
    match = policy.match
    return not (match.time or match.days) or active(match.time, match.days, now)


def units_of(config: Config) -> frozenset[str]:
    """Return the units that must be watched: those of policies, and the slices of the uplinks."""
    named = {unit for policy in config.policies for unit in policy.match.unit}
    return frozenset(named | {slice_of(uplink.name) for uplink in config.uplinks})


def renumbered(config: Config, numbers: Mapping[str, int]) -> Config:
    """Return `config` with uplinks that are in `numbers` numbered so, and the others by the free ones."""
    known = {u.name: numbers[u.name] for u in config.uplinks if u.name in numbers}
    free = (number for number in count() if number not in known.values())
    uplinks = (replace(u, index=known[u.name] if u.name in known else next(free)) for u in config.uplinks)
    return the_same(replace(config, uplinks=tuple(uplinks)))
