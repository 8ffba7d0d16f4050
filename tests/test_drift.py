"""What counts as a repair of what others did, and what is a change of our own mind."""

from ipaddress import ip_address, ip_network

from pbrd.drift import repairs
from pbrd.objects import KernelState, Route, Rule
from pbrd.plan import diff
from pbrd.settings import Family

FIRST, SECOND, THIRD = (Rule(Family.IPV4, 11000 + k, table=201) for k in range(3))
LINES = tuple(f"rule  add priority {11000 + k} from all lookup 201" for k in range(3))
DEFAULT = Route(Family.IPV4, 201, ip_network("0.0.0.0/0"), "lte", ip_address("10.0.0.1"))


def rules(*some: Rule) -> KernelState:
    return KernelState(rules=frozenset(some))


def repaired(wanted: KernelState, current: KernelState, target: KernelState) -> list[str]:
    return repairs(diff(current, target), wanted)


def test_what_others_removed_is_put_back() -> None:
    both = rules(FIRST, SECOND)
    assert repaired(wanted=both, current=rules(SECOND), target=both) == [LINES[0]]


def test_what_others_added_in_our_name_is_removed() -> None:
    assert repaired(rules(FIRST), current=rules(FIRST, SECOND), target=rules(FIRST)) == [
        LINES[1].replace("add", "del")
    ]


def test_what_we_want_anew_or_no_longer_is_no_repair() -> None:
    assert repaired(rules(FIRST), current=rules(FIRST), target=rules(SECOND)) == []


def test_repairs_are_seen_beside_changes() -> None:
    """networkd takes the address of an uplink, whose routes we then don't want, and all rules."""
    wanted = KernelState(frozenset({DEFAULT}), frozenset({FIRST, SECOND}))
    current = KernelState(frozenset({DEFAULT}), frozenset())
    assert repaired(wanted, current, target=rules(FIRST, SECOND, THIRD)) == [*LINES[:2]]


def test_starts_and_reloads_repair_nothing() -> None:
    assert repaired(KernelState(), current=rules(SECOND), target=rules(FIRST)) == []
