"""`pbrd events` where there is no journal: from the daemon's ring, by the real command."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import HEAD, PROBE, ROOT, UPLINKS, Daemon, StartDaemon, all_up, eventually

from pbrd.client import call
from pbrd.history import row
from pbrd.lab import Lab

CONFIG = f"""{HEAD}{PROBE}{UPLINKS}
[default]
via = ["fiber", "lte"]
"""


def said(pbrd: Daemon, *arguments: str) -> list[dict[str, Any]]:
    told = pbrd.command("events", "--json", *arguments)
    assert (told.returncode, told.stderr) == (0, "")
    return [json.loads(line) for line in told.stdout.splitlines()]


@pytest.fixture
def failed_over(lab: Lab, daemon: StartDaemon) -> Daemon:
    """A daemon whose fiber has lost its carrier and got it back."""
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.carrier(0, up=False)
    eventually(lambda: pbrd.policy("default").get("active") == "lte")
    lab.carrier(0, up=True)
    eventually(lambda: all_up(pbrd), within=15)
    return pbrd


def test_a_state_that_the_status_shows_has_been_told(lab: Lab, daemon: StartDaemon) -> None:
    """Else who acts on the status could change things before its event, which then never comes."""
    pbrd = daemon(lab, CONFIG)
    for number in range(1, 4):
        while not all_up(pbrd):  # without a rest: the moment after the change is what counts
            pass
        told = [event["event"] for event in call(pbrd.runtime, "Monitor", {"history": 1000})["events"]]
        assert told.count("uplink-up") == 2 * number
        lab.carrier(0, up=False)
        lab.carrier(1, up=False)
        eventually(lambda: not any(uplink["state"] == "up" for uplink in pbrd.status()["uplinks"]))
        lab.carrier(0, up=True)
        lab.carrier(1, up=True)


def test_an_uplink_that_is_down_from_the_start_is_told_but_once(lab: Lab, daemon: StartDaemon) -> None:
    there, missing = '[uplinks.lte]\ninterface = "lte"\n', '[uplinks.dsl]\ninterface = "dsl"\n'
    pbrd = daemon(lab, HEAD + PROBE + there + missing)

    def told() -> list[tuple[str, str, str]]:
        events = said(pbrd, "--uplink", "dsl")
        return [(event["event"], event["new"], event["reason"]) for event in events]

    eventually(lambda: told() == [("uplink-down", "down", "missing")])
    pbrd.stop()
    pbrd.restart()
    assert said(pbrd)[0]["event"] == "started"
    assert told() == []  # a restart is no news
    assert pbrd.reload(HEAD + PROBE + there + missing.replace("dsl", "sat")).returncode == 0
    assert [event["uplink"] for event in said(pbrd) if event["event"] == "uplink-down"] == ["sat"]


def test_the_past_as_json_is_whole_and_can_be_filtered(failed_over: Daemon) -> None:
    everything = said(failed_over)
    assert everything[0]["event"] == "started"
    fiber = [event for event in everything if event["uplink"] == "fiber"]
    kinds = [
        event["event"] for event in fiber if event["event"] != "uplink-degraded"
    ]  # one family is the first
    assert kinds[-3:] == ["uplink-down", "uplink-recovering", "uplink-up"]
    assert said(failed_over, "--uplink", "fiber") == fiber
    default = [event for event in everything if event["policy"] == "default"]
    assert [event["event"] for event in default] == ["failover", "failback"]
    assert said(failed_over, "--policy", "default") == default
    both = [event for event in everything if event["policy"] == "default" or event["uplink"] == "fiber"]
    assert said(failed_over, "--policy", "default", "--uplink", "fiber") == both
    assert said(failed_over, "-n", "2") == everything[-2:]
    assert said(failed_over, "-n", "0") == []
    assert said(failed_over, "--since", "1h ago", "--lines", "1") == everything[-1:]
    assert said(failed_over, "--since", everything[-1]["time"])[-1] == everything[-1]
    assert said(failed_over, "--since", "@4000000000") == []
    keys = ["time", "event", "uplink", "policy", "interface", "old", "new", "reason", "message", "details"]
    assert all(list(event) == keys for event in everything)


def test_the_past_as_a_table(failed_over: Daemon) -> None:
    told = failed_over.command("events")
    lines = told.stdout.splitlines()
    assert lines[0].split() == ["TIME", "EVENT", "WHAT", "CHANGE", "WHY"]
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d [\d:.]{12}  uplink-down +fiber +up → down +no-carrier",
        next(line for line in lines if "uplink-down" in line),
    )
    failover = next(line for line in lines if "failover" in line)
    assert failover.endswith("fiber is down (no-carrier)")
    starts = {line.index("up → down") for line in lines if "uplink-down" in line}
    assert starts == {lines[0].index("CHANGE")} == {failover.index("fiber → lte")}


def test_a_gateway_that_comes_back_as_another_one_is_told(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    fiber = lab.uplinks[0]
    lab.ip(fiber.isp, "addr add 10.0.1.254/24 dev gw")
    lab.ip(lab.router, f"route del default via {fiber.gateway}")
    eventually(lambda: pbrd.uplink("fiber")["ipv4"]["gateway"] is None)
    eventually(lambda: "no-gateway" in [event["reason"] for event in said(pbrd, "--uplink", "fiber")])
    lab.ip(lab.router, "route add default via 10.0.1.254 dev fiber")
    eventually(lambda: said(pbrd)[-1]["event"] != "uplink-degraded" and all_up(pbrd), within=15)
    (changed,) = [event for event in said(pbrd) if event["event"] == "gateway-changed"]
    assert (changed["old"], changed["new"]) == (fiber.gateway, "10.0.1.254")
    assert changed["details"] == {"family": "ipv4"}


EVENT = {
    "time": "2026-11-22T17:43:48.723Z",
    "event": "reload-refused",
    "uplink": None,
    "policy": None,
    "old": None,
    "new": None,
    "reason": "one\ntwo",
    "message": "reload refused, the running config stays:\n  one\n  two",
}


def test_an_event_of_the_daemon_shows_its_sentence_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert row(EVENT) == (
            "2026-11-22 18:43:48.723",
            "reload-refused",
            "-",
            "-",
            "reload refused, the running config stays: …",
        )
        assert row(EVENT | {"event": "reload", "old": "1", "new": "2"})[3] == "1 → 2"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_wrong_moment_is_told_and_a_wrong_number_is_wrong_usage(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    unknown = pbrd.command("events", "--uplink", "fibre")
    assert unknown.returncode == 0
    assert 'no uplink is called "fibre" now (did you mean "fiber"?)' in unknown.stderr
    told = pbrd.command("events", "--since", "soon")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("pbrd: 'soon' is no point in time; write one as")
    assert pbrd.command("events", "-n", "-1").returncode == 2
    pbrd.stop()
    assert pbrd.command("events").returncode == 3


@contextmanager
def follower(
    pbrd: Daemon, directory: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], list[str]]]]:
    """`pbrd events --follow --json`: its process, and what it has told until now, kind by kind."""
    out = directory / "followed"
    argv = [sys.executable, "-m", "pbrd", "events", "--follow", "--json", "--runtime-dir", str(pbrd.runtime)]
    with out.open("w") as told, (directory / "errors").open("w") as errors:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=told, stderr=errors)
    try:
        yield process, lambda: [json.loads(line)["event"] for line in out.read_text().splitlines()]
    finally:
        process.kill()
        process.wait()


def test_following_goes_on_over_a_restart_and_ends_well_by_ctrl_c(
    lab: Lab, daemon: StartDaemon, tmp_path: Path
) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    with follower(pbrd, tmp_path) as (process, events):
        eventually(lambda: "started" in events())
        lab.carrier(0, up=False)
        eventually(lambda: "failover" in events())
        pbrd.stop()
        pbrd.restart()
        eventually(lambda: events().count("started") == 2)
        pbrd.command("drain", "lte")
        eventually(lambda: "uplink-drained" in events())
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert events().count("uplink-down") == 1
    assert "the daemon has gone; waiting for it" in (tmp_path / "errors").read_text()
