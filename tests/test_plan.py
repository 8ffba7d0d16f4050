"""The plan between two states: its text, and the promise that its order keeps."""

from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from pbrd.objects import Action, KernelState, Route, Rule
from pbrd.plan import Plan, Step, Verb, diff
from pbrd.settings import Family

V4 = Family.IPV4
EVERYWHERE = ip_network("0.0.0.0/0")
TABLES = ((202, "lte"), (201, "fiber"))


def default(table: int, gateway: str, interface: str) -> Route:
    return Route(V4, table, EVERYWHERE, interface, ip_address(gateway))


def test_the_text_is_what_an_administrator_would_type() -> None:
    current = KernelState(frozenset({default(202, "10.0.0.1", "lte")}), tables=TABLES)
    killed = Rule(V4, 11102, Action.UNREACHABLE, source=ip_network("192.168.1.100"))
    assert str(diff(current, KernelState(rules=frozenset({killed})))) == (
        "rule  add priority 11102 from 192.168.1.100 unreachable\n"
        "route del default via 10.0.0.1 dev lte table lte\n"
    )


def test_equal_states_need_nothing() -> None:
    state = KernelState(frozenset({default(202, "10.0.0.1", "lte")}), frozenset({Rule(V4, 11000, table=202)}))
    assert not diff(state, state)


def test_another_gateway_is_a_replace_without_a_gap() -> None:
    before = KernelState(frozenset({default(202, "10.0.0.1", "lte")}), tables=TABLES)
    after = KernelState(frozenset({default(202, "10.0.0.2", "lte")}), tables=TABLES)
    assert diff(before, after).lines() == ("route replace default via 10.0.0.2 dev lte table lte",)


def test_a_foreign_route_in_the_way_is_left_alone_and_reported() -> None:
    wanted = default(202, "10.0.0.1", "lte")
    plan = diff(KernelState(foreign=frozenset({wanted.key})), KernelState(frozenset({wanted})))
    assert not plan.steps
    assert plan.blocked == (wanted,)


def test_a_dead_default_goes_first_and_a_healed_one_comes_last() -> None:
    rules = frozenset({Rule(V4, 11000, table=202), Rule(V4, 11001, table=201)})
    swapped = frozenset({Rule(V4, 11000, table=201), Rule(V4, 11001, table=202)})
    fiber, lte = default(201, "192.168.1.1", "fiber"), default(202, "10.0.0.1", "lte")
    lines = diff(
        KernelState(frozenset({fiber}), rules), KernelState(frozenset({lte}), swapped, tables=TABLES)
    ).lines()
    assert lines[0] == "route del default via 192.168.1.1 dev fiber table fiber"
    assert lines[-1] == "route add default via 10.0.0.1 dev lte table lte"


def test_a_new_table_is_filled_before_a_rule_looks_there_and_an_old_one_emptied_after() -> None:
    before = KernelState(
        frozenset({default(201, "192.168.1.1", "fiber")}), frozenset({Rule(V4, 11000, table=201)})
    )
    after = KernelState(frozenset({default(202, "10.0.0.1", "lte")}), frozenset({Rule(V4, 11000, table=202)}))
    verbs = [(step.verb, type(step.item)) for step in diff(before, after).steps]
    assert verbs == [(Verb.ADD, Route), (Verb.ADD, Rule), (Verb.DELETE, Rule), (Verb.DELETE, Route)]


# --- the promise ------------------------------------------------------------------------------

PACKETS = tuple(ip_network(f"10.0.0.{n}") for n in range(3))


@st.composite
def rule_lists(draw: st.DrawFn) -> frozenset[Rule]:
    """Policies as pbrd lays them out: at one priority all rules do the same."""
    rules = set()
    for priority in draw(st.sets(st.integers(0, 5))):
        table = draw(st.sampled_from([0, 201, 202, 203]))
        action = Action.LOOKUP if table else Action.UNREACHABLE
        for source in draw(st.sets(st.sampled_from([None, *PACKETS]), min_size=1)):
            rules.add(Rule(V4, priority, action, table, source=source))
    return frozenset(rules)


def decision(walk: list[Rule], packet: object, usable: set[int]) -> int | None:
    """Return the table that decides as in the kernel's rule walk; 0: unreachable, None: the rules end."""
    for rule in walk:
        if rule.source in (None, packet) and (rule.table == 0 or rule.table in usable):
            return rule.table
    return None


def made(walk: list[Rule], step: Step) -> list[Rule]:
    """Do what the kernel does: a new rule goes behind those of its priority."""
    assert isinstance(step.item, Rule)
    if step.verb is Verb.DELETE:
        return [rule for rule in walk if rule != step.item]
    place = sum(rule.priority <= step.item.priority for rule in walk)
    return [*walk[:place], step.item, *walk[place:]]


@given(rule_lists(), rule_lists(), st.sets(st.sampled_from([201, 202, 203])))
def test_no_packet_is_ever_decided_as_neither_the_old_nor_the_new_rules_would(
    old: frozenset[Rule], new: frozenset[Rule], usable: set[int]
) -> None:
    walk = sorted(old, key=lambda rule: rule.priority)
    target = sorted(new, key=lambda rule: rule.priority)
    allowed = {p: {decision(walk, p, usable), decision(target, p, usable)} for p in PACKETS}
    plan: Plan = diff(KernelState(rules=old), KernelState(rules=new))
    for step in plan.steps:
        walk = made(walk, step)
        for packet in PACKETS:
            assert decision(walk, packet, usable) in allowed[packet]
    assert frozenset(walk) == new
