"""What is known of each way out, one family of one uplink at a time: its next hop and its health.

No clock and no I/O: links and default routes are handed in with the moment at which they were so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from pbrd.health import Health, Reason, State
from pbrd.objects import DefaultRoute, Key, Link, NextHop, Standing
from pbrd.routing import next_hop, path_fault
from pbrd.rules import keys_of
from pbrd.settings import Config, Family, GatewayMode

# Seconds that a gateway may be missing: networkd restarts and DHCP renewals take it away for a moment.
GATEWAY_HOLD = 0.5
# And in which its routes stay: whoever replaces a default by deleting it first is not done yet.
ROUTES_HOLD = 0.02


class Paths:
    """The next hops and healths of all uplinks; `seen` are those that ever had a gateway."""

    def __init__(self) -> None:
        self.config = Config()
        self.healths: dict[Key, Health] = {}
        self.hops: dict[Key, NextHop | None] = {}
        self.seen: set[Key] = set()
        self.drained: frozenset[str] = frozenset()  # names of uplinks
        self.turned: dict[str, float] = {}  # when uplinks were drained or put back into service
        self._gone: dict[Key, float] = {}  # since when a usable uplink's gateway is missing

    def follow(
        self, config: Config, families: Iterable[Family], known: Mapping[Key, Standing], now: float
    ) -> None:
        """Turn to the uplinks of `config`. A health whose probing did not change goes on.

        `known` is what the kernel remembers (`routing.adopted_standings`) of those that are new.
        """
        kept, self.healths, self.config = self.healths, {}, config
        for key in keys_of(config, families):
            probe = config.uplink(key[0]).probe
            targets = probe.targets_of(key[1])
            old = kept.get(key)
            if old is not None and (old.probe, old.targets) == (probe, targets):
                self.healths[key] = old
                continue
            state = old.state if old is not None else _state(known.get(key))
            self.healths[key] = Health(probe, targets, now, state)
        self.hops = {key: self.hops.get(key) for key in self.healths}
        self.seen &= set(self.healths)

    def drain(self, names: Iterable[str], now: float) -> None:
        """Have the uplinks `names` drained, and no others."""
        wanted = frozenset(names)
        self.turned |= dict.fromkeys(wanted ^ self.drained, now)
        self.drained = wanted

    def look(self, links: Mapping[str, Link], defaults: Iterable[DefaultRoute], now: float) -> float | None:
        """Take in links and gateways; return in how many seconds to look again, if a gateway is held."""
        again = None
        for key, health in self.healths.items():
            uplink = self.config.uplink(key[0])
            link = links.get(uplink.interface)
            known = self.hops[key]
            self.hops[key] = hop = next_hop(uplink, key[1], link, defaults)
            if hop is not None or not isinstance(uplink.gateway_of(key[1]), GatewayMode):
                self.seen.add(key)
            fault = path_fault(link, hop)
            rest = self._hold(key, fault, now)
            if rest > 0:
                if known is not None and rest > GATEWAY_HOLD - ROUTES_HOLD and _has_address(link, key[1]):
                    self.hops[key], rest = known, rest - (GATEWAY_HOLD - ROUTES_HOLD)
                again = rest if again is None else min(again, rest)
            else:
                self._gone.pop(key, None)
                health.path(fault, now)
        return again

    def _hold(self, key: Key, fault: Reason | None, now: float) -> float:
        """Return how many more seconds a missing gateway is not believed. Its routes are gone meanwhile."""
        if fault is not Reason.NO_GATEWAY or not self.healths[key].usable or key not in self.seen:
            self._gone.pop(key, None)
            return 0.0
        return self._gone.setdefault(key, now) + GATEWAY_HOLD - now

    @property
    def held(self) -> bool:
        """Whether the loss of some gateway is not believed yet."""
        return bool(self._gone)

    def standings(self) -> dict[Key, Standing]:
        """Return what health says of every uplink and family."""
        return {
            key: Standing(health.usable, health.preferred, key[0] in self.drained)
            for key, health in self.healths.items()
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return `standings` as the control socket tells them."""
        return [
            {"uplink": key[0], "family": int(key[1]), **asdict(standing)}
            for key, standing in self.standings().items()
        ]


def standings_of(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Standing]:
    """Return what `Paths.rows` said."""
    return {
        (row["uplink"], Family(row["family"])): Standing(row["usable"], row["preferred"], row["drained"])
        for row in rows
    }


def _has_address(link: Link | None, family: Family) -> bool:
    """Say whether a gateway can be reached over `link`: the kernel takes no route without an address."""
    return link is not None and any(a.local.version == family.version for a in link.addresses)


def _state(standing: Standing | None) -> State:
    """Return what a health begins with that the kernel remembers so."""
    if standing is None:
        return State.STARTING
    if not standing.usable:
        return State.DOWN
    return State.UP if standing.preferred else State.RECOVERING
