"""The chains of nftables that judge a connection: the policies, in order; the first that decides ends it.

A new connection must not walk thousands of policies. So where there are many they lie in groups, each a
chain that begins with what all of its policies ask for, any of them one thing:

    chain group3 {
        meta nfproto ipv4 iif != 0 ip saddr != { 10.0.3.0/24, ... } th dport != { 1026, ... } return
        ...

and whoever has none of these skips the group. A packet that lacks a header asked for there (a port of a
fragment, say) fails that rule, and walks the group: the skip only ever saves work. Who has the policy's
word, `goto oN`, comes to a class and is accepted there, as a chain below another can't end the upper one.

The kernel fills sets of ranges and prefixes a moment after it has switched to another table (6.18: an array
for lookups is made at the end of the commit, 10 ms and more later). Till then they are empty, and a kill
switch for `{ 10.0.0.0/8, 172.16.0.0/12 }` would hold for nobody. So policies do without such sets where they
can; groups, which can't, are used once the sets are filled, and those of long lists judge nobody before:
`entrance` has the last set of all, which is filled last.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from pbrd.classes import Classification, Outcome, classify, concerns, in_turn, outcomes_of
from pbrd.expressions import IN, IP, KINDS, OUT, Expressions, Need, is_long, span_of
from pbrd.objects import Key, Standing
from pbrd.settings import Config, Fallback, Family, Policy, Range, Sticky

SEED = 0x70627264  # of the hash that keeps a client on its uplink: the same after every restart
FEW = 32  # policies that one chain may have
GROUPS = 16  # chains below another
TESTS = 12  # that a group may begin with; more would cost more than they save
SLOTS = 256  # of a balance that are elements of their own; more are ranges


@dataclass(frozen=True, slots=True)
class Judging:
    """What judging needs to know."""

    config: Config
    classes: Classification
    usable: frozenset[str]  # uplinks that take part in balancing
    expressions: Expressions

    def chains(self) -> Iterator[str]:
        """Yield the chain that judges, and those below it."""
        numbered = self.concerned()
        if len(numbered) <= FEW:
            yield chain("decide", *self.rules(numbered))
            return
        needs = list(zip(*(self.expressions.all_needs(*one) for one in numbered), strict=True))
        size = -(-len(numbered) // GROUPS)
        groups = [slice(start, start + size) for start in range(0, len(numbered), size)]
        places = range(len(groups))
        yield chain("decide", *self.skips(needs), *(f"jump group{place}" for place in places))
        yield chain("decide_all", *(f"jump all{place}" for place in places))
        for place, group in zip(places, groups, strict=True):
            yield chain(f"group{place}", *self.skips([of[group] for of in needs]), f"goto all{place}")
            yield chain(f"all{place}", *self.rules(numbered[group]))

    def concerned(self) -> list[tuple[int, Policy]]:
        """Return the policies that may match anything, with their numbers."""
        numbered = enumerate(in_turn(self.config))
        return [
            (n, p) for n, p in numbered if concerns(p.match, local=True) or concerns(p.match, local=False)
        ]

    def entrance(self) -> str:
        """Return the chain that sends to `decided` as soon as all sets are filled: it must be the last one.

        And those who come before that another way, if there is one.
        """
        numbered = self.concerned()
        waits = any(is_long(policy.match) or is_ranged(policy) for _, policy in numbered)
        if not waits and len(numbered) <= FEW:
            return chain("judge", "goto decided")
        filled = "meta mark vmap { 0x0-0xffffffff : goto decided }"
        return chain("judge", filled, "drop" if waits else "goto decided_all")

    def rules(self, policies: Iterable[tuple[int, Policy]]) -> Iterator[str]:
        """Yield the rules of some policies."""
        for number, policy in policies:
            verdicts = self.verdicts(policy)
            for family, match in self.expressions.matches(number, policy.match):
                for only, verdict in verdicts:
                    if None in (family, only) or family is only:
                        yield f"{match} {verdict}".strip()

    def verdicts(self, policy: Policy) -> tuple[tuple[Family | None, str], ...]:
        """Return what follows a match, by family if need be; `goto` ends the judging."""
        goes = "jump" if policy.fallback is Fallback.NEXT else "goto"
        outcomes = outcomes_of(self.config, policy)
        if not policy.balance:
            return ((None, f"{goes} o{self.number(outcomes[0][0])}"),)
        slots = shares(policy.balance, self.usable)
        total = slots[-1][1].last + 1
        numbers = {outcome.via[0]: self.number(outcome) for outcome, _ in outcomes}
        if not is_ranged(policy):
            slots = tuple(
                (name, Range(n, n)) for name, part in slots for n in range(part.first, part.last + 1)
            )
        ways = ", ".join(f"{span_of(part)} : {goes} o{numbers[name]}" for name, part in slots)
        if policy.sticky is Sticky.SOURCE:
            return tuple(
                (family, f"jhash {ip} saddr mod {total} seed {SEED:#x} vmap {{ {ways} }}")
                for family, ip in IP.items()
            )
        return ((None, f"numgen random mod {total} vmap {{ {ways} }}"),)

    def number(self, outcome: Outcome) -> int:
        """Return the N of its chain `oN`."""
        return self.classes.outcomes.index(outcome)

    def skips(self, needs: Sequence[Sequence[tuple[Need, ...] | None]]) -> Iterator[str]:
        """Yield what leaves a chain for those that none of its policies can match: a rule for each of KINDS.

        `needs` are those of its policies, by kind.
        """
        for (family, local), some in zip(KINDS, needs, strict=True):
            tests = self.expressions.unlike(need for one in some for need in one or ())
            if None not in some and len(tests) <= TESTS:
                way = OUT if local else IN
                yield " ".join((f"meta nfproto ipv{family.version} {way}", *tests, "return"))


def is_ranged(policy: Policy) -> bool:
    """Say whether the shares of a balance are ranges, as there are too many slots for elements."""
    total = sum(weight for _, weight in _reduced(policy.balance))
    return total * total > SLOTS


def _reduced(balance: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Return weights in their lowest terms."""
    common = gcd(*(weight for _, weight in balance))
    return tuple((name, weight // common) for name, weight in balance)


Levels = tuple[tuple[str, tuple[int, ...]], ...]  # unit → levels at which its cgroups may lie


@lru_cache(maxsize=4)
def judging_chains(config: Config, units: Levels, usable: frozenset[str]) -> tuple[str, ...]:
    """Return the sets and chains that judge, as nft takes them; `usable` uplinks take part in balancing.

    They don't depend on the numbers of classes, so that it is this text which is made once.
    """
    judging = Judging(config, classify(config), usable, Expressions(dict(units)))
    chains = tuple(judging.chains())
    return (*judging.expressions.sets.values(), *chains)


@lru_cache(maxsize=4)
def entrance(config: Config) -> str:
    """Return the chain that must stand behind all others: see `Judging.entrance`."""
    return Judging(config, classify(config), frozenset(), Expressions({})).entrance()


def balanced(standings: Mapping[Key, Standing]) -> frozenset[str]:
    """Return the uplinks that take part in balancing: those that are up, in a family at least."""
    return frozenset(name for (name, _), s in standings.items() if s.usable and s.preferred and not s.drained)


def shares(balance: Sequence[tuple[str, int]], usable: frozenset[str]) -> tuple[tuple[str, Range], ...]:
    """Return who gets which slots of a hash space: exactly one uplink each, in shares as the weights say.

    The slots of an uplink that is not usable go to the usable others by their weights; theirs stay as they
    were. If none is usable, everybody keeps their own.
    """
    balance = _reduced(balance)
    present = [(name, weight) for name, weight in balance if name in usable] or list(balance)
    rest = sum(weight for _, weight in present)
    found: list[tuple[str, Range]] = []
    start = 0
    for name, weight in balance:
        heirs = [(name, 1)] if (name, weight) in present else present
        share = sum(part for _, part in heirs)
        for heir, part in heirs:  # `rest` slots for each unit of weight: divisible by every heir's part
            size = weight * rest * part // share
            found.append((heir, Range(start, start + size - 1)))
            start += size
    return tuple(found)


def chain(name: str, *rules: str) -> str:
    """Return a chain."""
    return f"chain {name} {{\n" + "".join(f"\t{rule}\n" for rule in rules if rule) + "}"
