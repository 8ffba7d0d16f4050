"""Classes: how policies add up for one connection, and what of it must be evicted when health changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbrd.classes import UNDECIDED, Class, Outcome, classify
from pbrd.config import parse
from pbrd.eviction import cover, evictions
from pbrd.judging import shares
from pbrd.marks import FIRST, Marks, Numbers, marks_of, next_block, numbers_in
from pbrd.objects import Key, Standing
from pbrd.settings import Config, Failback, Fallback, Family

UP, DOWN = Standing(usable=True, preferred=True), Standing(usable=False, preferred=True)
RECOVERING = Standing(usable=True, preferred=False)


def config(text: str, uplinks: int = 2) -> Config:
    names = ("fiber", "lte", "wg", "sat")[:uplinks]
    sections = "".join(f'[uplinks.{name}]\ninterface = "{name}"\nnat = true\n' for name in names)
    return parse([("pbrd.toml", sections + text)], allow_unsupported=True)


def policy(name: str, via: str, fallback: str = "next", more: str = "") -> str:
    match = f'{{ mac = "52:54:00:00:00:{len(name):02x}" }}'
    return f'[[policies]]\nname = "{name}"\nmatch = {match}\nvia = {via}\nfallback = "{fallback}"\n{more}\n'


def test_a_policy_with_next_goes_on_and_another_ends_it() -> None:
    found = classify(config(policy("a", "['lte']") + policy("bb", "['fiber']", "unreachable")))
    assert found.classes == (
        UNDECIDED,
        Class(normal=(("lte",),)),
        Class(normal=(("fiber",),), end=Fallback.UNREACHABLE),
        Class(normal=(("lte",), ("fiber",)), end=Fallback.UNREACHABLE),
    )
    assert found.steps == (((0, 1),), ((0, 2), (1, 3)))


def test_policies_that_say_the_same_share_their_classes() -> None:
    many = "".join(policy("x" * (n + 1), "['lte', 'fiber']", "blackhole") for n in range(30))
    assert len(classify(config(many)).classes) == 2


@given(
    st.lists(
        st.tuples(st.permutations(["fiber", "lte", "wg"]), st.integers(1, 3), st.sampled_from(Fallback)),
        max_size=5,
    )
)
def test_a_connection_tries_what_its_policies_say_in_order_until_one_ends_it(
    policies: list[tuple[list[str], int, Fallback]],
) -> None:
    way = UNDECIDED
    for names, count, fallback in policies:
        way = way.then(Outcome(tuple(names[:count]), fallback, Failback.GRACEFUL, override=False))
    tried: list[str] = []
    for names, count, fallback in policies:
        tried += [name for name in names[:count] if name not in tried]
        if fallback is not Fallback.NEXT:
            break
    assert list(way.uplinks) == tried


@given(st.integers(4, 9), st.data())
def test_a_block_is_never_the_one_in_force(bits: int, data: st.DataObject) -> None:
    """Whoever was judged before bears other numbers than those who are judged now."""
    marks = Marks(0xFFFFFFFF, 0x7, ((1 << bits) - 1) << 3)
    used, seen = range(0), []
    for turn in range(12):
        size = data.draw(st.integers(1, marks.room // 2))
        block = next_block(marks, size, used, turn // 2)
        now = range(block, block + size)
        assert now.start >= FIRST
        assert now.stop <= (1 << bits) - 1  # all bits are the mark of probes, and of what must end
        assert not set(now) & set(used)
        used = now
        seen.append(block)


def test_numbers_come_round_again_as_late_as_can_be() -> None:
    marks = Marks(0xFF000000, 0x07000000, 0xF8000000)
    used, seen = range(0), []
    for turn in range(8):
        block = next_block(marks, 3, used, turn // 2)
        used = range(block, block + 3)
        seen.append(block)
    assert len(set(seen)) == 8


def test_the_table_tells_its_numbers() -> None:
    told = Numbers(17, 5, 0xFF000000, 0x07000000)
    assert numbers_in(["c0", str(told), "m0"]) == told
    assert numbers_in(["c0", "classes"]) is None


weights = st.lists(st.integers(1, 20), min_size=1, max_size=5)


@given(weights, st.data())
def test_the_hash_space_is_shared_exactly(given_weights: list[int], data: st.DataObject) -> None:
    balance = [(f"u{n}", weight) for n, weight in enumerate(given_weights)]
    names = [name for name, _ in balance]
    usable = data.draw(st.sets(st.sampled_from(names)))
    whole, now = shares(balance, frozenset(names)), shares(balance, frozenset(usable))
    for slots in (whole, now):  # every slot once, none left out
        numbers = [number for _, part in slots for number in range(part.first, part.last + 1)]
        assert numbers == list(range(len(numbers)))

    def owners(slots: tuple[tuple[str, object], ...]) -> list[str]:
        return [name for name, part in slots for _ in range(part.last - part.first + 1)]  # type: ignore[attr-defined]

    if usable and usable == set(names):
        total = sum(given_weights)
        assert all(owners(whole).count(n) * total == w * len(owners(whole)) for n, w in balance)
    if usable:
        assert set(owners(now)) == usable
        sizes = {name: owners(now).count(name) for name in usable}
        assert len({sizes[name] * 1000 // weight for name, weight in balance if name in usable}) == 1
        fixed = shares(balance, frozenset(usable))
        assert fixed == now


def standings(**given: Standing) -> dict[Key, Standing]:
    return {(name, Family.IPV4): standing for name, standing in given.items()}


DEFAULT = "[default]\nvia = ['fiber', 'lte']\n"


@pytest.mark.parametrize(
    ("text", "before", "after", "evicted"),
    [
        (DEFAULT, {"fiber": UP, "lte": UP}, {"fiber": DOWN, "lte": UP}, [(0, "fiber")]),
        (DEFAULT, {"fiber": UP, "lte": UP}, {"fiber": UP, "lte": DOWN}, [(0, "lte")]),
        (DEFAULT, {"fiber": UP, "lte": DOWN}, {"fiber": DOWN, "lte": DOWN}, []),  # nobody could take them
        (DEFAULT, {"fiber": RECOVERING, "lte": UP}, {"fiber": UP, "lte": UP}, []),  # graceful
        (
            DEFAULT + "failback = 'immediate'\n",
            {"fiber": RECOVERING, "lte": UP},
            {"fiber": UP, "lte": UP},
            [(0, "lte")],
        ),
        (
            policy("a", "['lte']", "unreachable") + DEFAULT,
            {"fiber": UP, "lte": UP},
            {"fiber": UP, "lte": DOWN},
            [(0, "lte")],  # of class 1 nobody could take them: a kill switch
        ),
        (
            policy("a", "['lte']") + DEFAULT,
            {"fiber": UP, "lte": UP},
            {"fiber": UP, "lte": DOWN},
            [(0, "lte"), (1, "lte")],
        ),
    ],
)  # fmt: skip
def test_only_what_must_leave_and_can_is_evicted(
    text: str, before: dict[str, Standing], after: dict[str, Standing], evicted: list[tuple[int, str]]
) -> None:
    made = config(text)
    marks = marks_of(made)
    found = evictions(made, FIRST, standings(**before), standings(**after))
    numbers = {"fiber": 1, "lte": 2}
    assert {one.family for one in found} <= {Family.IPV4}
    gone = [
        (place, name)
        for name, number in numbers.items()
        for place in range(-FIRST, len(classify(made).classes))  # unjudged ones and those from outside too
        if any((marks.class_(FIRST + place) | marks.pin(number)) & one.mask == one.value for one in found)
    ]
    assert sorted(gone) == sorted(evicted)


@given(st.sets(st.integers(0, 63)), st.sets(st.integers(0, 63)))
def test_ranges_of_classes_have_what_they_should_and_nothing_else(wanted: set[int], kept: set[int]) -> None:
    ranges = list(cover(wanted - kept, kept, 6))
    covered = {number for first, bits in ranges for number in range(first, first + (1 << bits))}
    assert wanted - kept <= covered
    assert not covered & kept
    assert all(first % (1 << bits) == 0 for first, bits in ranges)
    assert len(ranges) <= len(wanted - kept)
