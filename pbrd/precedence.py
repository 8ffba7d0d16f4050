"""Rules of others before, among and behind ours: which traffic they take from the policies."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pbrd.neighbours import Finding, Machine
from pbrd.objects import MAIN_TABLE, Action, ForeignRule
from pbrd.occupied import tables_of
from pbrd.plan import rule_text
from pbrd.settings import KILL_SWITCHES, Config, Family

OWNED = 22_000  # priorities from `daemon.rule_priority` on
KERNEL_MAIN = 32766  # priority of `lookup main`
HALVES = {Family.IPV4: 1, Family.IPV6: 4}  # the longest prefixes that together stand for a default route
TAILSCALE_TABLE = 52
NAMED = 3  # of a kind; the rest is only counted


def findings(config: Config, machine: Machine) -> Iterator[Finding]:
    """Yield what there is to say of their order."""
    first = config.daemon.rule_priority
    last = first + OWNED - 1
    ours = tables_of(config)
    inside: list[ForeignRule] = []
    narrow: list[ForeignRule] = []
    taking: list[ForeignRule] = []
    for rule in machine.rules:
        number = rule.rule.priority
        if first <= number <= last:
            inside.append(rule)
        elif takes_all(rule, machine):
            if number < first or is_wg_quick(rule):
                taking.append(rule)
        elif number < first and _overtakes(rule) and rule.rule.table not in ours:
            narrow.append(rule)
        elif number < first and _is_main_first(rule):
            overriding = [policy.name for policy in config.policies if policy.match.override_main]
            if overriding:
                yield Finding(
                    place_of(rule),
                    f'"{text_of(rule)}" comes before all policies, so that override_main has no effect '
                    f"(policies.{overriding[0]}); give it a priority above {last}",
                )
    for place, rule in _merged(taking):
        early = rule.rule.priority < first
        yield Finding(place, _swallowing(rule, last) if early else _waiting(rule, first))
    yield from several(
        inside,
        f"stands among the rules of pbrd ({first}-{last}), and which policies it precedes may change at "
        f"every reload; give it a priority below or above, or set daemon.rule_priority",
    )
    yield from several(
        narrow,
        "comes before all policies, so what it matches obeys none of them" + kill_switch(config) + "; "
        f"give it a priority above {last} if that is not meant",
        harmless=not kill_switch(config),
    )


def kill_switch(config: Config) -> str:
    """Return what to add where policies don't hold, if any of them is a kill switch."""
    return ", kill switches neither" if any(p.fallback in KILL_SWITCHES for p in config.all_policies) else ""


def takes_all(rule: ForeignRule, machine: Machine) -> bool:
    """Say whether packets without a mark go no further than this rule, wherever they come from or go to."""
    selected = rule.rule
    bare = replace(
        selected,
        priority=0,
        action=Action.LOOKUP,
        table=0,
        fwmark=None,
        suppress_prefixlength=None,
        inverted=False,
        goto=0,
    )
    everything = bare == type(selected)(selected.family, 0)
    marked = selected.fwmark is not None and selected.fwmark.value != 0
    if rule.odd or (not rule.rule.inverted and (not everything or marked)):
        return False
    if rule.rule.inverted and everything and not marked:
        return False  # "not from all": nothing
    if rule.rule.goto:
        return rule.rule.goto >= KERNEL_MAIN
    return selected.action is not Action.LOOKUP or _leads_out(rule, machine)


def _leads_out(rule: ForeignRule, machine: Machine) -> bool:
    if _is_main_first(rule):  # halves of a default there are told of by themselves
        return False
    selected, limit = rule.rule, HALVES[rule.rule.family]
    shortest = -1 if selected.suppress_prefixlength is None else selected.suppress_prefixlength
    lengths = {
        r.route.destination.prefixlen for r in machine.routes.get((selected.family, selected.table), ())
    }
    return any(shortest < length <= limit for length in lengths)


def _swallowing(rule: ForeignRule, last: int) -> str:
    text = f'"{text_of(rule)}" takes all traffic before the policies, so they decide nothing'
    if is_wg_quick(rule):
        return f"{text}: so wg-quick sends everything into its tunnel; {WG_QUICK}"
    if rule.rule.table == TAILSCALE_TABLE:
        return f"{text}: a Tailscale exit node is in use; tailscale set --exit-node= ends that"
    return f"{text}; give it a priority above {last}, or remove it: {_removal(rule)}"


WG_QUICK = 'set Table = off in its config and make the tunnel an uplink with gateway = "none"'


def _waiting(rule: ForeignRule, first: int) -> str:
    return (
        f'"{text_of(rule)}" is reached by what no policy decided; but wg-quick names no priority, so when it '
        "is "
        f"started while pbrd runs, the kernel puts its rules before all policies (at {first - 1}) and they "
        "decide "
        f"nothing; {WG_QUICK}"
    )


def is_wg_quick(rule: ForeignRule) -> bool:
    """Say whether all but the tunnel's own goes into a tunnel: `not fwmark N lookup N`."""
    mark = rule.rule.fwmark
    return rule.rule.inverted and mark is not None and mark.value == rule.rule.table != 0


def _is_main_first(rule: ForeignRule) -> bool:
    return rule.rule.table == MAIN_TABLE and rule.rule.suppress_prefixlength is not None


def _overtakes(rule: ForeignRule) -> bool:
    """Say whether a rule before ours may take traffic of policies: not what software marked as its own."""
    return (
        not rule.odd
        and not rule.rule.goto
        and not _is_main_first(rule)
        and rule.rule.fwmark is None
        and bool(
            rule.rule.source or rule.rule.destination or rule.rule.iif or rule.rule.user or rule.rule.proto
        )
    )


def several(rules: Sequence[ForeignRule], remark: str, harmless: bool = False) -> Iterator[Finding]:
    """Yield a finding for each rule; many of a kind become one that counts them."""
    shown = _merged(rules)
    for place, rule in shown[:NAMED]:
        yield Finding(place, f'"{text_of(rule)}" {remark}', harmless)
    if len(shown) > NAMED:
        place, rule = shown[NAMED]
        yield Finding(
            place, f"and {len(shown) - NAMED} more like that, the first of them {text_of(rule)!r}", harmless
        )


def _merged(rules: Iterable[ForeignRule]) -> list[tuple[str, ForeignRule]]:
    """Return each rule with its place; what both families have alike is one."""
    found: dict[tuple[int, str], list[ForeignRule]] = {}
    for rule in rules:
        found.setdefault((rule.rule.priority, text_of(rule)), []).append(rule)
    return [(" and ".join(map(place_of, alike)), alike[0]) for alike in found.values()]


def place_of(rule: ForeignRule) -> str:
    """Return how people look a rule up: "ip rule 9999" or "ip -6 rule 9999"."""
    return f"ip {'-6 ' if rule.rule.family is Family.IPV6 else ''}rule {rule.rule.priority}"


def text_of(rule: ForeignRule) -> str:
    """Return a rule's selectors and action as ip-rule(8) shows them."""
    return rule_text(rule.rule, {MAIN_TABLE: "main"}).removeprefix(f"priority {rule.rule.priority} ")


def _removal(rule: ForeignRule) -> str:
    return f"{place_of(rule).rpartition(' ')[0]} del priority {rule.rule.priority}"
