"""What policies can decide for a connection, as classes: each one a mark, and a row of rules.

Where nftables is needed it judges every connection once, top to bottom. A policy whose fallback is `next`
does not end that: what a later one says comes behind it. So a class is not a policy but a way through
them: uplinks in segments (one for each policy on the way), and how it ends. Policies that say the same
share a class, and however many there are, classes are few.

    policies        restic.service → lte (next)    mac 52:… → fiber, wg (unreachable)
    classes         lte · lte, then fiber, wg, then nothing · fiber, wg, then nothing
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from pbrd.prefixes import LONG
from pbrd.settings import KILL_SWITCHES, Config, Failback, Fallback, Match, Policy


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy adds to the way of a connection."""

    via: tuple[str, ...]
    fallback: Fallback
    failback: Failback
    override: bool  # its lookups stand before the main table's specific routes


@dataclass(frozen=True, slots=True)
class Class:
    """A way through the policies. `end` NEXT goes on to `[default]` or the main table."""

    override: tuple[tuple[str, ...], ...] = ()  # segments of `via`, before the main table
    normal: tuple[tuple[str, ...], ...] = ()
    end: Fallback = Fallback.NEXT
    end_via: tuple[str, ...] = ()  # of best-effort: whose path tables end it
    failback: Failback = Failback.GRACEFUL

    @property
    def uplinks(self) -> tuple[str, ...]:
        """All uplinks on the way, in order."""
        return tuple(name for segment in (*self.override, *self.normal) for name in segment)

    def then(self, outcome: Outcome) -> "Class":
        """Return the class of a connection that is of this one and meets another policy."""
        if self.end is not Fallback.NEXT:
            return self
        fresh = tuple(name for name in outcome.via if name not in self.uplinks)
        closed = outcome.fallback
        segments = (
            (fresh,) if fresh or closed is not Fallback.NEXT else ()
        )  # also an empty one says where it ends
        return replace(
            self,
            override=self.override + segments if outcome.override else self.override,
            normal=self.normal if outcome.override else self.normal + segments,
            end=closed,
            end_via=outcome.via if closed is Fallback.BEST_EFFORT else (),
            failback=self.failback if self.uplinks else outcome.failback,
        )

    def then_default(self, via: tuple[str, ...]) -> "Class":
        """Return this way with the uplinks of `[default]` behind its own."""
        return replace(self, normal=(*self.normal, tuple(name for name in via if name not in self.uplinks)))


UNDECIDED = Class()


@dataclass(frozen=True, slots=True)
class Classification:
    """All classes that connections can be of. `steps[outcome]` maps the place of a class to that after it.

    Place 0 in `classes` is `UNDECIDED`: no policy matched.
    """

    classes: tuple[Class, ...] = (UNDECIDED,)
    outcomes: tuple[Outcome, ...] = ()
    steps: tuple[tuple[tuple[int, int], ...], ...] = ()


def outcomes_of(config: Config, policy: Policy) -> tuple[tuple[Outcome, int], ...]:
    """Return what `policy` can decide, with weights: one outcome, or one for each balanced uplink.

    A balanced connection tries its own uplink first and then the others in turn.
    """
    failback = policy.failback or config.daemon.failback
    override = policy.match.override_main
    if not policy.balance:
        return ((Outcome(policy.via, policy.fallback, failback, override), 1),)
    names = tuple(name for name, _ in policy.balance)
    return tuple(
        (Outcome(names[place:] + names[:place], policy.fallback, failback, override), weight)
        for place, (_, weight) in enumerate(policy.balance)
    )


def in_turn(config: Config) -> tuple[Policy, ...]:
    """Return the policies in the order in which they judge: `override_main` ones stand before main."""
    return tuple(sorted(config.policies, key=lambda policy: not policy.match.override_main))


@lru_cache(maxsize=4)
def classify(config: Config) -> Classification:
    """Return the classes that the policies of `config` can make, in the order in which they arise."""
    classes: list[Class] = [UNDECIDED]
    places: dict[Class, int] = {UNDECIDED: 0}
    outcomes: dict[Outcome, dict[int, int]] = {}
    tried: dict[Outcome, int] = {}  # how many classes an outcome has met: thousands of policies share a few
    for policy in in_turn(config):
        reached = len(classes)
        for outcome, _ in outcomes_of(config, policy):
            steps = outcomes.setdefault(outcome, {})
            for place in range(tried.get(outcome, 0), reached):
                before = classes[place]
                after = before.then(outcome)
                if after != before:
                    if after not in places:
                        places[after] = len(classes)
                        classes.append(after)
                    steps[place] = places[after]
            tried[outcome] = reached
    return Classification(
        tuple(classes),
        tuple(outcomes),
        tuple(tuple(sorted(steps.items())) for steps in outcomes.values()),
    )


# --- whether there is a need ------------------------------------------------------------------

NATIVE_RULES = 200  # of a family, for all policies; more are judged by nftables
NATIVE_LAST_PORT = 65534  # the kernel's rules know no range that ends at 65535


def needs_nft(policy: Policy) -> bool:
    """Say whether the kernel's rules alone can't express `policy`."""
    match = policy.match
    ports = (*match.sport, *match.dport)
    return bool(
        policy.balance
        or match.mac
        or match.group
        or match.unit
        or len(match.source) > LONG
        or len(match.destination) > LONG
        or any(port.last > NATIVE_LAST_PORT for port in ports)
    )


def weight(policy: Policy) -> int:
    """Return about how many rules of a family `policy` would be: its lists multiply."""
    match = policy.match
    lists = (match.iif, match.proto, match.sport, match.dport, match.user, match.fwmark, match.dscp)
    product = max(1, len(match.source)) * max(1, len(match.destination))
    for values in lists:
        product *= max(1, len(values))
    return product * (len(policy.via) + 1)


@lru_cache(maxsize=4)
def too_many(config: Config) -> bool:
    """Say whether the policies are too many to be rules of their own: each costs every packet 17 ns."""
    return sum(weight(policy) for policy in config.policies if not needs_nft(policy)) > NATIVE_RULES


def concerns(match: Match, local: bool) -> bool:
    """Say whether `match` can hold for traffic of this host (`local`), or for that of others."""
    if local:
        return not match.mac and (not match.iif or "lo" in match.iif)
    return not (match.user or match.group or match.unit) and match.iif != ("lo",)


@lru_cache(maxsize=4)
def hidden_switches(config: Config) -> tuple[Policy, ...]:
    """Return the kill switches for the traffic of others of which nftables alone knows."""
    many = too_many(config)
    switches = (policy for policy in config.policies if policy.fallback in KILL_SWITCHES)
    return tuple(p for p in switches if concerns(p.match, local=False) and (many or needs_nft(p)))


def needs_guard(config: Config) -> bool:
    """Say whether nothing of others may pass that nftables has not judged."""
    return bool(hidden_switches(config))


def guards_early(config: Config) -> bool:
    """Say whether that goes for what main's specific routes claim, too."""
    return any(policy.match.override_main for policy in hidden_switches(config))


@lru_cache(maxsize=4)
def uses_nft(config: Config) -> bool:
    """Say whether an uplink or a policy needs nftables, or the policies are too many for rules."""
    nat = any(uplink.enabled and (uplink.nat or uplink.nat6) for uplink in config.uplinks)
    return nat or any(map(needs_nft, config.policies)) or too_many(config)
