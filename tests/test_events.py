"""Events: what happened between two snapshots, its sentence, document and journal entry, and the catalog."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pbrd import events, log
from pbrd.events import IDS, Event
from pbrd.status import FamilyChoice, FamilyStatus, PolicyStatus, ProbeStatus, Snapshot, UplinkStatus

CATALOG = Path(__file__).parent.parent / "systemd" / "pbrd.catalog"
AT = "2026-11-22T17:43:48.723Z"
V4 = FamilyStatus("192.0.2.1", "dhcp", installed=True, state="up")
FIBER = UplinkStatus("fiber", "eth0", 201, "up", "ok", AT, 0, V4, None, ProbeStatus())
LTE = UplinkStatus("lte", "wwan0", 202, "up", "ok", AT, 0, None, None, ProbeStatus())
CAMERA = PolicyStatus(
    "camera", ("fiber", "lte"), "fiber", "unreachable", "preferred", FamilyChoice("fiber", None), "ok", AT
)
NOW = Snapshot("0.1.0", 4711, 1, "/etc/pbrd/pbrd.toml", (FIBER, LTE), (CAMERA,))


def with_fiber(**changed: object) -> Snapshot:
    return replace(NOW, uplinks=(replace(FIBER, **changed), LTE))  # type: ignore[arg-type]


def with_camera(**changed: object) -> Snapshot:
    return replace(NOW, policies=(replace(CAMERA, **changed),))  # type: ignore[arg-type]


DOWN = with_fiber(state="down", reason="probes")
OVER = with_camera(active="lte", state="failed-over", reason="fiber is down (probes)")
NOWHERE = with_camera(active=None, state="fallback", reason="no uplink is usable: unreachable")
ASLEEP = with_camera(active=None, state="inactive", reason="not in force now")
WORST = with_camera(active="lte", state="fallback", reason="no uplink is usable: best-effort")


@pytest.mark.parametrize(
    ("before", "after", "kind", "message"),
    [
        (NOW, DOWN, "uplink-down", "uplink fiber is down: probes (was up)"),
        (DOWN, NOW, "uplink-up", "uplink fiber is up (was down)"),
        (DOWN, with_fiber(state="recovering"), "uplink-recovering", "uplink fiber is recovering (was down)"),
        (
            NOW,
            with_fiber(state="degraded", reason="loss"),
            "uplink-degraded",
            "uplink fiber is degraded: loss (was up)",
        ),
        (
            NOW,
            with_fiber(state="drained", reason="drained"),
            "uplink-drained",
            "uplink fiber is drained (was up)",
        ),
        (
            NOW,
            with_fiber(ipv4=replace(V4, gateway="192.0.2.9")),
            "gateway-changed",
            "uplink fiber: gateway changed from 192.0.2.1 to 192.0.2.9 (dhcp)",
        ),
        (
            NOW,
            OVER,
            "failover",
            "policy camera failed over to lte (was fiber): fiber is down (probes)",
        ),
        (OVER, NOW, "failback", "policy camera went back to fiber (was lte)"),
        (NOW, NOWHERE, "failover", "policy camera has no usable uplink: fallback unreachable (was fiber)"),
        (NOWHERE, NOW, "failback", "policy camera went back to fiber (was unreachable)"),
        (
            NOW,
            WORST,
            "failover",
            "policy camera failed over to lte (was fiber): no uplink is usable: best-effort",
        ),
        (NOW, ASLEEP, "policy-ended", "policy camera ended: its time is over (it went to fiber)"),
        (ASLEEP, NOW, "policy-began", "policy camera began and goes to fiber"),
        (
            ASLEEP,
            OVER,
            "policy-began",
            "policy camera began and goes to lte: fiber is down (probes)",
        ),
    ],
)
def test_a_transition_is_one_event_with_a_sentence(
    before: Snapshot, after: Snapshot, kind: str, message: str
) -> None:
    (event,) = events.between(before, after)
    assert (event.kind, event.message) == (kind, message)


def test_nothing_happened_between_equal_snapshots_and_to_what_only_one_knows() -> None:
    assert list(events.between(NOW, NOW)) == []
    assert list(events.between(replace(NOW, uplinks=(), policies=()), NOW)) == []
    assert list(events.between(DOWN, replace(NOW, uplinks=(), policies=()))) == []


def test_an_uplink_that_is_down_when_it_is_first_seen_is_told() -> None:
    (told,) = events.between(replace(NOW, uplinks=(), policies=()), DOWN)
    assert (told.kind, told.old, told.new) == ("uplink-down", "starting", "down")


@pytest.mark.parametrize("lost", [replace(V4, gateway=None, source=None), None])
def test_a_gateway_that_was_lost_may_come_back_as_another_one(lost: FamilyStatus | None) -> None:
    gone = with_fiber(ipv4=lost, state="down", reason="no-gateway")
    known = events.gateways(gone, events.gateways(NOW, {}))
    assert [event.kind for event in events.between(NOW, gone)] == ["uplink-down"]
    assert [event.kind for event in events.between(gone, NOW, known)] == ["uplink-up"]
    other = with_fiber(ipv4=replace(V4, gateway="192.0.2.9", source="ra"))
    changed, up = events.between(gone, other, known)
    assert (changed.kind, changed.old, changed.new) == ("gateway-changed", "192.0.2.1", "192.0.2.9")
    assert (changed.reason, up.kind) == ("ra", "uplink-up")
    assert events.gateways(replace(NOW, uplinks=(LTE,)), known) == {}  # what left the config is forgotten


def test_policies_of_a_paused_daemon_neither_fail_over_nor_begin() -> None:
    paused = replace(ASLEEP, paused=True)
    assert list(events.between(NOW, paused)) == list(events.between(paused, NOW)) == []
    (down,) = events.between(paused, replace(paused, uplinks=DOWN.uplinks))
    assert down.kind == "uplink-down"


def test_what_a_reload_moves_has_neither_failed_nor_healed() -> None:
    swapped = with_camera(via=("lte", "fiber"), active="lte")
    assert list(events.between(NOW, swapped)) == list(events.between(swapped, NOW)) == []
    blackhole = with_camera(active=None, state="fallback", fallback="blackhole")
    assert list(events.between(NOWHERE, blackhole)) == []


def test_an_event_names_the_interface_that_traffic_takes_now() -> None:
    (over,) = events.between(NOW, OVER)
    (nowhere,) = events.between(NOW, NOWHERE)
    (down,) = events.between(NOW, DOWN)
    assert (over.interface, nowhere.interface, down.interface) == ("wwan0", "", "eth0")


def test_the_document_has_every_key_and_null_for_what_does_not_apply() -> None:
    (down,) = events.between(NOW, DOWN)
    assert down.to_json(AT) == {
        "time": AT,
        "event": "uplink-down",
        "uplink": "fiber",
        "policy": None,
        "interface": "eth0",
        "old": "up",
        "new": "down",
        "reason": "probes",
        "message": "uplink fiber is down: probes (was up)",
        "details": {},
    }


EACH = [
    *events.between(NOW, DOWN),
    *events.between(NOW, NOWHERE),
    *events.between(NOW, with_fiber(ipv4=replace(V4, gateway="192.0.2.9"))),
    events.started("0.1.0", "/etc/pbrd/pbrd.toml"),
    events.stopped("keep"),
    events.stopped("flush", "cannot read the rules: no memory"),
    events.reloaded(2, ["rule add priority 11000 ..."]),
    events.reload_refused("a.toml: uplinks.x: wrong\na.toml: worse"),
    events.flushed(12),
    events.drift_repaired(["rule  add priority 11000 ...", "rule  add priority 11001 ..."], 7),
]


@pytest.mark.parametrize("event", EACH, ids=lambda event: event.kind)
def test_the_journal_gives_back_the_document_that_the_ring_has(event: Event) -> None:
    said = {"event": event.message, "happened": event, "time": AT}
    assert events.from_journal(log.fields("info", said, {"runtime_dir": "/run/pbrd"})) == event.to_json(AT)


def test_every_problem_of_a_refused_config_is_told() -> None:
    assert events.reload_refused("one").message == "reload refused, the running config stays: one"
    two = events.reload_refused("one\ntwo").message
    assert two == "reload refused, the running config stays:\n  one\n  two"


def test_thousands_of_problems_are_counted_so_that_no_memory_and_no_log_is_filled() -> None:
    reason = events.reload_refused("\n".join(f"problem {number}" for number in range(5000))).reason
    assert reason.splitlines()[-2:] == ["problem 19", "and 4980 more problems"]
    assert len(events.reload_refused("x" * 10**6).message) < 1000


@pytest.mark.parametrize(
    ("event", "priority"),
    [
        (events.stopped("keep"), "info"),
        (events.stopped("keep", "no memory"), "error"),
        (events.reload_refused("x"), "error"),
        (next(events.between(NOW, DOWN)), "warning"),
        (next(events.between(DOWN, NOW)), "info"),
    ],
)
def test_what_matters_has_a_higher_priority(event: Event, priority: str) -> None:
    assert event.priority == priority


def test_every_event_and_every_fact_is_documented() -> None:
    text = (CATALOG.parent.parent / "docs" / "events.md").read_text()
    assert {kind for kind in IDS if f"`{kind}`" not in text} == set()
    facts = {name for event in EACH for name in event.facts()}
    assert {name for name in facts if f"`PBRD_{name.upper()}`" not in text} == set()


# --- the catalog ------------------------------------------------------------------------------


def entries() -> dict[str, str]:
    found = re.findall(r"^-- ([0-9a-f]{32})\n(.*?)(?=^-- |\Z)", CATALOG.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == len(dict(found))
    return dict(found)


def test_every_kind_has_an_id_of_its_own() -> None:
    assert len(set(IDS.values())) == len(IDS)
    assert all(re.fullmatch("[0-9a-f]{32}", identifier) for identifier in IDS.values())
    assert set(events.KINDS.values()) | events.WARNINGS <= IDS.keys()


def test_the_catalog_explains_every_event_and_nothing_else() -> None:
    assert entries().keys() == set(IDS.values())
    for text in entries().values():
        assert re.match(r"Subject: .+\nDefined-By: pbrd\n(?:\w+: .+\n)*\n.+", text)


def test_the_catalog_uses_fields_that_its_event_has() -> None:
    details: dict[str, set[str]] = {kind: set() for kind in IDS}
    for event in EACH:
        details[event.kind] |= {name for name, _ in event.details}
    for kind, identifier in IDS.items():
        named = {name.lower() for name in re.findall("@PBRD_([A-Z_]+)@", entries()[identifier])}
        assert named <= {*events.FACTS, *details[kind]}, kind
