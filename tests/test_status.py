"""The status as a document, as tables for people, as one line, and as an exit code."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbrd import control, tables
from pbrd.status import (
    FamilyChoice,
    FamilyStatus,
    PolicyStatus,
    ProbeStatus,
    ReloadStatus,
    Snapshot,
    TargetStatus,
    UplinkStatus,
    outline,
    to_json,
)

NOW = datetime(2026, 11, 22, 20, 0, 0, tzinfo=UTC)

FIBER = UplinkStatus(
    name="fiber",
    interface="eth0",
    table=201,
    state="up",
    reason="ok",
    since="2026-11-22T17:43:48.723Z",
    transitions=4,
    ipv4=FamilyStatus("192.168.1.1", "dhcp", installed=True, state="up"),
    ipv6=None,
    probe=ProbeStatus(11.2, 0.4, 0.0, (TargetStatus("1.1.1.1", answering=True, rtt_ms=11.2, loss=0.0),)),
)
LTE = UplinkStatus(
    name="lte",
    interface="wwan0",
    table=202,
    state="down",
    reason="probes",
    since="2026-11-21T19:40:48.723Z",
    transitions=1,
    ipv4=FamilyStatus(None, None, installed=False, state="down"),
    ipv6=FamilyStatus("fe80::1", "ra", installed=False, state="down"),
    probe=ProbeStatus(None, None, 1.0, (TargetStatus("8.8.8.8", answering=False, rtt_ms=None, loss=1.0),)),
)
BACKUPS = PolicyStatus(
    name="backups",
    via=("lte", "fiber"),
    active="fiber",
    fallback="next",
    state="failed-over",
    families=FamilyChoice("fiber", None),
    reason="lte is down (probes)",
    since="2026-11-22T19:40:48.723Z",
)
GUESTS = replace(
    BACKUPS, name="guests", active="fiber", state="preferred", shares={"fiber": 0.75, "lte": 0.25}
)
KILL = replace(
    BACKUPS,
    name="kill",
    via=("lte",),
    active=None,
    fallback="unreachable",
    state="fallback",
    families=FamilyChoice(None, None),
    reason="no uplink is usable",
)
SNAPSHOT = Snapshot("0.1.0", 4711, 3, "/etc/pbrd/pbrd.toml", (FIBER, LTE), (BACKUPS, GUESTS, KILL))


def document(
    *uplinks: UplinkStatus, policies: tuple[PolicyStatus, ...] = (), **changes: Any
) -> dict[str, Any]:
    return to_json(replace(SNAPSHOT, uplinks=uplinks, policies=policies, **changes))


# The document


def test_the_document_is_that_of_the_contract() -> None:
    preferred = replace(BACKUPS, active="lte", state="preferred")
    reload = ReloadStatus("2026-11-22T17:43:48.723Z", ok=True, error=None)
    assert json.dumps(document(FIBER, policies=(preferred,), last_reload=reload)) == (
        '{"version": "0.1.0", "pid": 4711, "generation": 3, "config": "/etc/pbrd/pbrd.toml", '
        '"uplinks": [{"name": "fiber", "interface": "eth0", "table": 201, '
        '"state": "up", "reason": "ok", "since": "2026-11-22T17:43:48.723Z", "transitions": 4, '
        '"ipv4": {"gateway": "192.168.1.1", "source": "dhcp", "installed": true, "state": "up"}, '
        '"ipv6": null, '
        '"probe": {"rtt_ms": 11.2, "jitter_ms": 0.4, "loss": 0.0, '
        '"targets": [{"address": "1.1.1.1", "answering": true, "rtt_ms": 11.2, "loss": 0.0}]}, '
        '"cgroups": [], "nat": false, "nat6": false, "metered": false}], '
        '"policies": [{"name": "backups", "via": ["lte", "fiber"], "active": "lte", "fallback": "next", '
        '"state": "preferred", "families": {"ipv4": "fiber", "ipv6": null}, '
        '"reason": "lte is down (probes)", "since": "2026-11-22T19:40:48.723Z"}], '
        '"drift_repairs": 0, "last_reload": {"at": "2026-11-22T17:43:48.723Z", "ok": true, "error": null}, '
        '"paused": false, "paused_since": null}'
    )


def test_only_balanced_policies_have_shares() -> None:
    first, second = document(policies=(BACKUPS, GUESTS))["policies"]
    assert "shares" not in first
    assert second["shares"] == {"fiber": 0.75, "lte": 0.25}


def test_the_document_is_what_the_interface_declares() -> None:
    text = re.sub(r"#[^\n]*|\s+", "", control.description("io.pbrd.Daemon"))
    types = dict(re.findall(r"type(\w+?)\((.*?)\)(?=type|method)", text))
    declared = re.search(r"methodStatus\(\)->\((.*?)\)(?:method|type)", text)
    assert declared
    reload = ReloadStatus("2026-11-22T17:43:48.723Z", ok=False, error="x")
    for value in (SNAPSHOT, replace(SNAPSHOT, last_reload=reload)):
        assert_fits(to_json(value), f"({declared[1]})", types)


def assert_fits(value: Any, type_: str, types: dict[str, str]) -> None:
    """Fail unless `value` is of a Varlink type (written without spaces)."""
    plain = {"string": str, "int": int, "float": float, "bool": bool}
    if type_.startswith("?"):
        if value is not None:
            assert_fits(value, type_[1:], types)
    elif type_.startswith("[]"):
        for item in value:
            assert_fits(item, type_[2:], types)
    elif type_.startswith("[string]"):
        for item in value.values():
            assert_fits(item, type_[8:], types)
    elif type_.startswith("("):
        fields = dict(re.findall(r"(\w+):(\([^)]*\)|[^,]+)", type_[1:-1]))
        assert value.keys() <= fields.keys()
        for name, field in fields.items():
            assert_fits(value.get(name), field, types)
    elif type_ in plain:
        assert type(value) is plain[type_], (value, type_)
    else:
        assert_fits(value, f"({types[type_]})", types)


# The exit code


@pytest.mark.parametrize(
    ("uplink", "policy", "code"),
    [
        ("up", "preferred", 0),
        ("up", "failed-over", 0),
        ("degraded", "preferred", 0),
        ("recovering", "preferred", 0),
        ("drained", "preferred", 0),
        ("disabled", "preferred", 0),
        ("starting", "preferred", 0),
        ("down", "preferred", 4),
        ("up", "fallback", 4),
    ],
)
def test_the_exit_code_says_whether_somebody_should_look(uplink: str, policy: str, code: int) -> None:
    shown = document(replace(FIBER, state=uplink), policies=(replace(BACKUPS, state=policy),))
    assert tables.exit_code(shown) == code


# The line


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        (document(), "no uplinks"),
        (document(FIBER), "fiber up 11 ms"),
        (document(replace(FIBER, probe=ProbeStatus(rtt_ms=0.42))), "fiber up 0.4 ms"),
        (document(replace(FIBER, probe=ProbeStatus())), "fiber up"),
        (
            document(FIBER, replace(LTE, since=FIBER.since), policies=(BACKUPS, replace(BACKUPS, name="b"))),
            "fiber up 11 ms, lte down (probes) since 17:43 · 2 policies failed over",
        ),
        (document(LTE, policies=(KILL,)), "lte down (probes) since 2026-11-21 19:40 · 1 policy in fallback"),
        (
            document(replace(FIBER, state="drained", reason="drained"), paused=True),
            "paused · fiber drained since 17:43",
        ),
        (document(*[FIBER] * 20, LTE), "20 uplinks up, lte down (probes) since 2026-11-21 19:40"),
    ],
)
def test_the_line_says_what_an_administrator_wants_to_know(shown: dict[str, Any], line: str) -> None:
    assert tables.line(shown, NOW) == line


def test_the_line_needs_no_more_than_the_outline() -> None:
    policies = (BACKUPS, KILL, replace(BACKUPS, name="b", state="preferred"))
    shown = Snapshot("0.1.0", 1, 1, "/x", (FIBER, LTE), policies, paused=True)
    assert tables.line(outline(shown), NOW) == tables.line(to_json(shown), NOW)


# The tables


def test_the_tables_show_each_uplink_and_policy() -> None:
    assert tables.table(to_json(SNAPSHOT), NOW) == (
        "pbrd 0.1.0  pid 4711  generation 3  /etc/pbrd/pbrd.toml\n"
        "\n"
        "UPLINK  INTERFACE  STATE  REASON  SINCE                       RTT      JITTER  LOSS   GATEWAYS\n"
        "fiber   eth0       up     ok      17:43:48 (2h16m)            11.2 ms  0.4 ms  0 %"
        "    192.168.1.1 (dhcp)\n"
        "lte     wwan0      down   probes  2026-11-21 19:40:48 (1d0h)  -        -       100 %"
        "  no gateway (down), fe80::1 (ra, down)\n"
        "\n"
        "POLICY   VIA        GOES TO            STATE        WHY                   SINCE\n"
        "backups  lte,fiber  fiber              failed-over  lte is down (probes)  19:40:48 (19m11s)\n"
        "guests   lte,fiber  fiber 75% lte 25%  preferred    lte is down (probes)  19:40:48 (19m11s)\n"
        "kill     lte        unreachable        fallback     no uplink is usable   19:40:48 (19m11s)"
    )


def test_times_are_local() -> None:
    shown = tables.table(document(FIBER), NOW.astimezone(timezone(timedelta(hours=1))))
    assert "18:43:48 (2h16m)" in shown


def test_families_that_differ_are_both_shown() -> None:
    policy = replace(BACKUPS, families=FamilyChoice("fiber", "lte"))
    assert "fiber (ipv4), lte (ipv6)" in tables.table(document(policies=(policy,)), NOW)


def test_a_pause_a_refused_reload_and_repairs_are_remarked() -> None:
    refused = ReloadStatus("2026-11-22T19:59:00.000Z", ok=False, error="a.toml: one\nb.toml: two")
    shown = tables.table(document(FIBER, paused=True, drift_repairs=3, last_reload=refused), NOW)
    assert "/etc/pbrd/pbrd.toml\npaused: pbrd let go of the kernel; `pbrd reload` takes over again\n" in shown
    assert "put back 3 times" in shown
    assert shown.endswith(
        "refused at 19:59:00 (1m0s); the config before it is in force:\n  a.toml: one\n  b.toml: two"
    )


def test_a_pause_says_since_when() -> None:
    shown = tables.table(document(FIBER, paused=True, paused_since="2026-11-22T19:59:00.000Z"), NOW)
    assert "paused: pbrd let go of the kernel at 19:59:00 (1m0s); `pbrd reload` takes over again\n" in shown


def test_a_metered_uplink_is_shown_as_such() -> None:
    assert "wwan0 (metered)  down" in tables.table(document(replace(LTE, metered=True)), NOW)


def test_what_has_not_been_answered_yet_has_no_loss() -> None:
    starting = replace(LTE, state="starting", reason="ok", probe=ProbeStatus(None, None, 0.0))
    assert " %" not in tables.table(document(starting), NOW)
    assert "100 %" in tables.table(document(LTE), NOW)


@pytest.mark.parametrize(
    ("name", "state", "fallback", "goes_to"),
    [
        ("backups", "fallback", "next", "the next policy"),
        ("default", "fallback", "next", "main table"),
        ("default", "fallback", "prohibit", "prohibit"),
        ("backups", "inactive", "unreachable", "-"),
    ],
)
def test_a_policy_without_an_uplink_says_what_its_fallback_does(
    name: str, state: str, fallback: str, goes_to: str
) -> None:
    policy = replace(KILL, name=name, state=state, fallback=fallback)
    row = tables.table(document(policies=(policy,)), NOW).splitlines()[-1]
    assert f"  {goes_to}  " in row


def test_colours_change_nothing_but_colours() -> None:
    coloured = tables.table(to_json(SNAPSHOT), NOW, colour=True)
    assert "\x1b[31mdown\x1b[0m" in coloured
    plain = "\n".join(line.rstrip() for line in re.sub(r"\x1b\[\d+m", "", coloured).splitlines())
    assert plain == tables.table(to_json(SNAPSHOT), NOW)


def test_nothing_in_a_document_reaches_the_terminal_as_a_command() -> None:
    evil = "\x1b]0;owned\x07\n"
    error = ReloadStatus(FIBER.since, ok=False, error=evil)
    shown = document(
        replace(FIBER, reason=evil), config=evil, policies=(replace(KILL, reason=evil),), last_reload=error
    )
    assert not set(tables.table(shown, NOW)) & {"\x1b", "\x07"}


def test_a_document_with_fields_missing_is_still_shown() -> None:
    shown = {"uplinks": [{"name": "fiber"}], "policies": [{"name": "p"}]}
    assert "fiber" in tables.table(shown, NOW)
    assert tables.exit_code(shown) == 0
    assert tables.table({}, NOW)
    assert tables.line({}, NOW) == "no uplinks"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([None, None], "××"),
        ([1, 2, 4, 8], "▂▃▅█"),
        ([5, None, 5], "█×█"),
        ([0.0, 0.0], "▁▁"),
    ],
)
def test_a_sparkline_has_a_bar_for_each_value(values: list[float | None], line: str) -> None:
    assert tables.sparkline(values) == line


def test_the_history_stands_where_a_narrow_terminal_shows_it() -> None:
    shown = tables.table(document(FIBER, LTE), NOW, history={"fiber": [1.0, None]})
    assert ["█×" in line[:80] for line in shown.splitlines()[3:5]] == [True, False]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (7.9, "7s"),
        (60, "1m0s"),
        (312, "5m12s"),
        (7380, "2h3m"),
        (86400, "1d0h"),
        (1e7, "115d17h"),
    ],
)
def test_an_age_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert tables.age(seconds) == text


@given(st.floats(0, 1e10))
def test_an_age_is_right_to_its_smaller_unit(seconds: float) -> None:
    sizes = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([dhms])", tables.age(seconds))
    shown = sum(int(count) * sizes[unit] for count, unit in parts)
    assert 0 <= seconds - shown < sizes[parts[-1][1]]


@given(st.lists(st.none() | st.floats(0, 1e6), max_size=60))
def test_a_sparkline_never_fails_and_keeps_its_length(values: list[float | None]) -> None:
    assert len(tables.sparkline(values)) == len(values)
