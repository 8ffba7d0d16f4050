"""What journald gets and gives back: fields, explanations, history; and that nobody waits for it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from box import PLACE, Box, python
from conftest import PROBE, UPLINKS, Leaving, eventually
from service import HERE, Service, start

from pbrd import journal
from pbrd.client import call, follow
from pbrd.events import IDS, from_journal
from pbrd.lab import Lab

MakeBox = Callable[..., Box]
CATALOG = "/usr/lib/systemd/catalog/pbrd.catalog"
USER = "/etc/systemd/system/pbrd.service.d/user.conf"
BACK = ("uplink-recovering", "uplink-up")  # "degraded" may come between: one family is always the first
IN_BOX = f"import sys; sys.path[:0] = ['{PLACE}/source', '{PLACE}/libraries']\n"


def in_box(box: Box, code: str, *properties: str) -> str:
    """Run Python with pbrd as a unit of the box, and return what it prints."""
    return box.run([python(), "-I", "-c", IN_BOX + code], *properties).stdout


def with_reader(box: Box) -> None:
    """Skip the test if the box's Python has no systemd-python; that of the tests is built for another one."""
    if box.enter([python(), "-I", "-c", f"{IN_BOX}import systemd.journal"], check=False).returncode:
        pytest.skip(f"no systemd-python for {python()}: `make setup` builds it if a compiler is there")


def events_of(service: Service, *arguments: str, unit: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What `pbrd events --json` says in the box."""
    with_reader(service.box)
    service.box.enter(["journalctl", "--sync"])
    told = service.box.run(["pbrd", "events", "--json", *arguments], *unit).stdout
    return [json.loads(line) for line in told.splitlines()]


def ring(service: Service) -> list[dict[str, Any]]:
    """The same from the daemon itself."""
    runtime = service.box.root / "run/pbrd"
    found: list[dict[str, Any]] = call(runtime, "Monitor", {"history": 1000})["events"]
    return found


@pytest.fixture
def failed_over(make_box: MakeBox, lab: Lab) -> Service:
    """The service, after fiber has lost its carrier and got it back."""
    service = start(make_box, lab, seed={CATALOG: (HERE / "systemd/pbrd.catalog").read_text()})
    lab.carrier(0, False)
    eventually(lambda: service.events("failover"))
    lab.carrier(0, True)
    eventually(lambda: service.box.journal("PBRD_EVENT=failback", "PBRD_POLICY=default"), within=15)
    service.wait_up()
    return service


def test_an_event_is_one_entry_with_all_its_fields(failed_over: Service) -> None:
    (down,) = failed_over.box.journal("-t", "pbrd", "PBRD_UPLINK=fiber", "PBRD_EVENT=uplink-down")
    wanted = {
        "MESSAGE": "uplink fiber is down: no-carrier (was up)",
        "MESSAGE_ID": IDS["uplink-down"],
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "pbrd",
        "SYSLOG_FACILITY": "3",
        "PBRD_EVENT": "uplink-down",
        "PBRD_UPLINK": "fiber",
        "PBRD_INTERFACE": "fiber",
        "PBRD_OLD": "up",
        "PBRD_NEW": "down",
        "PBRD_REASON": "no-carrier",
        "PBRD_RUNTIME_DIR": "/run/pbrd",
        "_SYSTEMD_UNIT": "pbrd.service",
        "_TRANSPORT": "journal",
    }
    assert {name: down.get(name) for name in wanted} == wanted
    assert "PBRD_POLICY" not in down
    (over,) = failed_over.box.journal("-t", "pbrd", "PBRD_POLICY=default", "PBRD_EVENT=failover")
    assert (over["PBRD_OLD"], over["PBRD_NEW"], over["PBRD_INTERFACE"]) == ("fiber", "lte", "lte")


def test_the_journal_is_an_uplinks_history_and_explains_itself(failed_over: Service) -> None:
    box = failed_over.box
    history = [entry["PBRD_EVENT"] for entry in box.journal("-t", "pbrd", "PBRD_UPLINK=fiber")]
    assert [kind for kind in history if kind != "uplink-degraded"] == [*("uplink-up", "uplink-down"), *BACK]
    box.enter(["journalctl", "--update-catalog"])
    told = box.enter(["journalctl", "-x", "-t", "pbrd"]).stdout
    for subject in ("Uplink fiber is down", "Policy default goes to lte", "pbrd has started"):
        assert f"Subject: {subject}" in told
    assert "@PBRD_" not in told
    listed = box.enter(["journalctl", "--list-catalog", *IDS.values()]).stdout
    assert listed.count("pbrd:") == len(IDS)


def test_events_come_from_the_journal_as_the_daemon_has_them(failed_over: Service) -> None:
    service = failed_over
    assert events_of(service) == ring(service)
    fiber = events_of(service, "--uplink", "fiber")
    kinds = [event["event"] for event in fiber if event["event"] != "uplink-degraded"]
    assert kinds == [*("uplink-up", "uplink-down"), *BACK]
    both = events_of(service, "--uplink", "fiber", "--policy", "default")
    assert both == [
        event for event in ring(service) if event["uplink"] == "fiber" or event["policy"] == "default"
    ]
    assert events_of(service, "-n", "1") == ring(service)[-1:]
    assert events_of(service, "--since", "1h ago") == ring(service)
    assert events_of(service, "--since", fiber[2]["time"], "--uplink", "fiber") == fiber[2:]
    assert events_of(service, "--since", "@4000000000") == []
    assert events_of(service, "--since", "@-1", "-n", "3") == ring(service)[-3:]
    last = ring(service)[-1:]
    assert events_of(service, "--since", last[0]["time"], "-n", "1000")[-1:] == last
    assert events_of(service, "-n", "0") == []


def test_the_past_outlives_the_daemon(failed_over: Service) -> None:
    before = ring(failed_over)
    failed_over.systemctl("restart")
    assert events_of(failed_over)[: len(before)] == before
    failed_over.systemctl("stop")
    after = [event["event"] for event in events_of(failed_over)[len(before) :]]
    assert (after[:2], after[-1]) == (["stopped", "started"], "stopped")
    table = failed_over.box.run(["pbrd", "events"]).stdout.splitlines()
    assert table[0].split() == ["TIME", "EVENT", "WHAT", "CHANGE", "WHY"]
    down = next(line.split() for line in table if "uplink-down" in line)
    assert down[2:] == ["uplink-down", "fiber", "up", "→", "down", "no-carrier"]


def test_who_may_not_read_the_journal_gets_the_daemons_own_events(failed_over: Service) -> None:
    member = ("User=nobody", "SupplementaryGroups=pbrd")
    assert events_of(failed_over, unit=member) == ring(failed_over)
    told = failed_over.box.run(["pbrd", "events"], *member).stderr
    assert "older ones are in the journal" in told


@contextmanager
def following(
    service: Service, directory: Path, *arguments: str
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """`pbrd events --follow` in the box: what it has told until now. Ended by Ctrl-C."""
    with_reader(service.box)
    out = directory / "followed"
    inside = ["nsenter", f"--target={service.box.leader}", "--all", "--"]
    command = [*inside, "pbrd", "events", "--follow", "--json", *arguments]
    with out.open("w") as file:
        process = subprocess.Popen(command, stdout=file, start_new_session=True)
    try:
        yield lambda: [json.loads(line) for line in out.read_text().splitlines()]
    finally:
        os.killpg(process.pid, signal.SIGINT)  # nsenter, too, as Ctrl-C does
        process.wait(10)


def test_following_shows_what_happens_and_ends_at_ctrl_c(make_box: MakeBox, lab: Lab, tmp_path: Path) -> None:
    service = start(make_box, lab)
    with following(service, tmp_path) as told:
        eventually(lambda: told() and told() == ring(service))
        lab.carrier(0, False)
        eventually(lambda: service.events("failover"))
        eventually(lambda: told() == ring(service))
        service.systemctl("restart")
        eventually(lambda: [event["event"] for event in told()].count("started") == 2)
        service.box.enter(["journalctl", "--rotate"])
        service.box.enter(["pbrd", "drain", "lte"])
        eventually(lambda: told()[-1]["event"] in ("uplink-drained", "failover"))


def test_following_begins_where_it_is_told_to(make_box: MakeBox, lab: Lab, tmp_path: Path) -> None:
    service = start(make_box, lab)
    lte = ("--uplink", "lte", "--policy", "none of this name")
    for name, arguments in (("none", ("-n", "0", *lte)), ("never", ("--since", "@4000000000"))):
        (tmp_path / name).mkdir()
        with following(service, tmp_path / name, *arguments) as told:
            time.sleep(0.5)  # nothing is told meanwhile, and what is told later is new
            assert told() == []
            if name == "none":
                service.box.enter(["pbrd", "drain", "lte"])
                eventually(told)
                assert told()[0]["event"] == "uplink-drained"
    (tmp_path / "empty").mkdir()
    with following(service, tmp_path / "empty", "--uplink", "fiber", "-n", "0") as told:
        time.sleep(0.5)
        service.box.enter(["pbrd", "drain", "fiber"])
        eventually(told)
        assert [event["event"] for event in told()] == ["uplink-drained"]


def test_what_others_write_into_the_journal_breaks_nothing(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    code = r"""
from pbrd.events import IDS
from pbrd.journal import Journal
entry = {"SYSLOG_IDENTIFIER": "pbrd", "MESSAGE_ID": IDS["reload"], "PBRD_RUNTIME_DIR": "/run/pbrd"}
journal = Journal()
journal.send(entry | {"MESSAGE": "no event"})
journal.send(entry | {"MESSAGE": "no time", "PBRD_EVENT": "reload", "COREDUMP_TIMESTAMP": "9" * 30})
journal.send(entry | {"MESSAGE": "no zone", "PBRD_EVENT": "reload", "PBRD_TIME": "2026-11-22"})
journal.send(entry | {"MESSAGE": "no word of time", "PBRD_EVENT": "reload", "PBRD_TIME": "garbage"})
journal.send(entry | {"MESSAGE": "too early", "PBRD_EVENT": "reload", "PBRD_TIME": "0001-01-01T00:00+14:00"})
journal.send(entry | {"MESSAGE": "\x00\xff\n", "PBRD_EVENT": "reload", "PBRD_UPLINK": "\x1b[2J"})
journal._send(b"SYSLOG_IDENTIFIER=pbrd\nPBRD_EVENT=reload\nPBRD_POLICY=one\nPBRD_POLICY=two\n"
              + b"MESSAGE_ID=" + IDS["reload"].encode() + b"\nPBRD_RUNTIME_DIR=/run/pbrd\nMESSAGE=\xff\n")
"""
    in_box(service.box, code)
    forged = [event for event in events_of(service) if event not in ring(service)]
    odd = ["no time", "no zone", "no word of time", "too early"]
    assert [event["message"] for event in forged] == [*odd, "\0ÿ\n", "\ufffd"]
    assert forged[-1]["policy"] in ("one", "two")
    assert all(event["time"].endswith("Z") for event in forged)
    table = service.box.run(["pbrd", "events", "--since", "1h ago"]).stdout
    assert table.count("reload") == 6
    assert all(line.isprintable() for line in table.splitlines())


FORGED = """
from pbrd.events import IDS
from pbrd.journal import Journal
Journal().send({"SYSLOG_IDENTIFIER": "pbrd", "MESSAGE_ID": IDS["uplink-down"], "MESSAGE": "forged",
                "PBRD_RUNTIME_DIR": "/run/pbrd", "PBRD_EVENT": "uplink-down", "PBRD_UPLINK": "fiber",
                "_UID": "0", "_SYSTEMD_UNIT": "pbrd.service", "PBRD_TIME": "2026-11-22T17:43:48.723Z"})
"""


def test_nobody_else_can_write_what_passes_for_an_event(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    in_box(service.box, FORGED, "User=nobody")
    assert service.box.journal("MESSAGE=forged", "PBRD_EVENT=uplink-down", "_UID=65534")
    assert events_of(service) == ring(service)
    assert events_of(service, "--uplink", "fiber", "-n", "1")[0]["event"] == "uplink-up"
    assert events_of(service, "-n", "99999999999999999999", "--since", "1h ago") == ring(service)


def test_events_of_a_user_of_its_own_are_shown_and_those_before_it(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    before = ring(service)
    drop_in = "[Service]\nUser=pbrd\nAmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW\n"
    service.box.write({"/etc/sysusers.d/pbrd.conf": "u pbrd -\n", USER: drop_in})
    for command in (["systemd-sysusers"], ["systemctl", "daemon-reload"]):
        service.box.enter(command)
    service.systemctl("restart")
    service.wait_up()
    in_box(service.box, FORGED, "User=nobody")
    events = events_of(service)
    assert events[: len(before)] == before
    assert events[len(before) + 1 :] == ring(service)  # between them, one has stopped
    (service.box.root / USER.lstrip("/")).unlink()
    service.box.enter(["systemctl", "daemon-reload"])
    service.systemctl("restart")
    assert events_of(service)[: len(events)] == events


def test_events_in_a_namespace_of_the_journal_are_found(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab, drop_in="LogNamespace=apart")
    assert service.box.enter(["journalctl", "--namespace=apart", "-t", "pbrd", "-q"]).stdout
    assert events_of(service) == ring(service)


def test_without_a_journal_it_is_the_daemons_own_events_and_says_why(make_box: MakeBox, lab: Lab) -> None:
    none = {"/etc/systemd/journald.conf.d/none.conf": "[Journal]\nStorage=none\n"}
    service = start(make_box, lab, seed=none)
    told = service.box.run(["pbrd", "events", "--json"])
    assert [json.loads(line) for line in told.stdout.splitlines()] == ring(service)
    assert "no journal is kept here" in told.stderr


def test_without_systemd_python_it_is_the_daemons_own_events(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    places = (f"{PLACE}/libraries/systemd", "/usr/lib/python3/dist-packages/systemd")
    without = f"InaccessiblePaths={' '.join(f'-{place}' for place in places)}"
    told = service.box.run(["pbrd", "events", "--json"], without)
    assert [json.loads(line) for line in told.stdout.splitlines()] == ring(service)
    assert told.stderr.count("\n") == 1
    assert "install python3-systemd" in told.stderr
    service.systemctl("stop")
    told = service.box.run(["pbrd", "events"], without, check=False)
    assert (told.returncode, told.stdout) == (3, "")
    assert "install python3-systemd" in told.stderr


def test_thousands_of_failovers_at_once_are_all_told_in_order(make_box: MakeBox, lab: Lab) -> None:
    names = [f"p{number}" for number in range(2000)]
    policies = "".join(
        f'[[policies]]\nname = "{name}"\nmatch = {{ to = ["198.18.{k // 256}.{k % 256}"] }}\n'
        'via = ["fiber", "lte"]\n'
        for k, name in enumerate(names)
    )
    service = start(make_box, lab, f"{PROBE}{UPLINKS}{policies}")
    lab.carrier(0, False)
    eventually(lambda: len(service.events("failover")) >= len(names), within=30)
    assert [event["PBRD_POLICY"] for event in service.events("failover")] == names
    kept = [event["policy"] for event in ring(service) if event["event"] == "failover"]
    assert kept == names[-len(kept) :]
    assert "hooks are too slow" not in service.log  # there is none


def test_lines_without_an_event_have_their_facts_as_fields(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    service.kill("USR1")
    (state,) = eventually(
        lambda: [entry for entry in service.box.journal("-t", "pbrd") if "PBRD_DOCUMENT" in entry]
    )
    assert json.loads(state["PBRD_DOCUMENT"])["uplinks"][0]["name"] == "fiber"
    assert state["MESSAGE"].startswith("state: document={")
    assert state.keys() & {"MESSAGE_ID", "PBRD_EVENT"} == set()


def test_any_text_and_any_size_arrive(make_box: MakeBox) -> None:
    code = """
from pbrd.journal import Journal
journal = Journal()
common = {"SYSLOG_IDENTIFIER": "sizes"}
for size in (0, 1, 100_000, 3_000_000):
    journal.send(common | {"MESSAGE": f"{size}", "PBRD_BIG": "x" * size})
journal.send(common | {"MESSAGE": "one\\ntwo=three\\n", "PBRD_TEXT": "ü = \\x00\\n"})
journal.send(common | {"MESSAGE": "last \\udcff"})
print(journal.dropped)
"""
    box = make_box()
    assert in_box(box, code) == "0\n"
    entries = box.journal("-t", "sizes")
    assert [len(entry.get("PBRD_BIG") or "") for entry in entries[:4]] == [0, 1, 100_000, 3_000_000]
    text = entries[4]
    assert text["MESSAGE"] == "one\ntwo=three\n"
    assert bytes(text["PBRD_TEXT"]).decode() == "ü = \0\n"
    assert entries[5]["MESSAGE"] == "last ?"


# --- nobody waits for it ----------------------------------------------------------------------


@pytest.fixture
def stalled(make_box: MakeBox, lab: Lab) -> Iterator[Service]:
    """The service beside a journald that is stopped, with its socket full."""
    service = start(make_box, lab)
    room = int(service.box.enter(["cat", "/proc/sys/net/unix/max_dgram_qlen"]).stdout)
    service.box.enter(["systemctl", "kill", "--signal=STOP", "systemd-journald.service"])
    for _ in range(room // 2 + 50):  # two entries each
        for method in ("Drain", "Undrain"):
            call(service.box.root / "run/pbrd", method, {"uplink": "lte"})
    yield service
    service.box.enter(["systemctl", "kill", "--signal=CONT", "systemd-journald.service"])


def test_a_stalled_journal_stalls_no_failover(stalled: Service, lab: Lab) -> None:
    stream = Leaving(lab)
    pid = stalled.pid
    begun = time.monotonic()
    lab.silence(0)
    eventually(lambda: lab.exit_of() == "lte", within=6)
    lasted = time.monotonic() - begun
    assert stream.stop()[0] == ["fiber", "lte"]
    assert stalled.status()["uplinks"][0]["state"] == "down"
    stalled.box.enter(["systemctl", "kill", "--signal=CONT", "systemd-journald.service"])
    (down,) = eventually(lambda: stalled.events("uplink-down"), within=10)
    assert from_journal(down) in ring(stalled)
    assert (stalled.pid, stalled.show("NRestarts")) == (pid, "0")
    print(f"failover beside a stalled journal: {lasted:.2f} s")


def test_what_a_stalled_journal_can_not_take_is_counted_and_told(make_box: MakeBox) -> None:
    code = """
import asyncio, os, signal, sys, time
from pbrd.journal import BACKLOG, Journal

async def main():
    journal, pid, worst = Journal(), int(sys.argv[1]), 0.0
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(BACKLOG + 2000):
            begun = time.perf_counter()
            journal.send({"SYSLOG_IDENTIFIER": "stalled", "MESSAGE": f"{number}"})
            worst = max(worst, time.perf_counter() - begun)
        dropped = journal.dropped
    finally:
        os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(20):
        while journal.dropped or journal._backlog:
            await asyncio.sleep(0.05)  # by itself, without another entry
    print(dropped, round(worst * 1000, 3))

asyncio.run(main())
"""
    box = make_box()
    pid = box.show("systemd-journald.service", "MainPID")["MainPID"]
    told = box.enter([python(), "-I", "-c", IN_BOX + code, pid]).stdout.split()
    dropped = int(told[0])
    assert dropped > 0
    entries = [int(entry["MESSAGE"]) for entry in box.journal("-t", "stalled")]
    assert entries == list(range(journal.BACKLOG + 2000 - dropped))
    (lost,) = box.journal("-t", "pbrd", f"PBRD_DROPPED={dropped}")
    assert lost["MESSAGE"] == f"{dropped} log entries are lost: the journal did not take them"
    print(f"slowest of {journal.BACKLOG + 2000} sends: {told[1]} ms")


def test_a_full_disk_of_the_journal_stalls_no_failover(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    fill = (
        "cd /run/log/journal && mount -t tmpfs -o size=64k tmpfs . && cd . && ! head -c 99999 /dev/zero >full"
    )
    service.box.enter(["sh", "-c", fill])
    service.box.enter(["journalctl", "--rotate"])  # it needs a new file, and gets none
    pid = service.pid
    for _ in range(50):
        for method in ("Drain", "Undrain"):
            call(service.box.root / "run/pbrd", method, {"uplink": "lte"})
    lab.carrier(0, False)
    eventually(lambda: service.status()["uplinks"][0]["state"] == "down")
    assert lab.exit_of() == "lte"
    assert (service.pid, service.show("NRestarts")) == (pid, "0")
    assert ring(service)[-1]["event"] in ("failover", "uplink-down")


def test_a_journal_that_is_restarted_loses_nothing_of_ours(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    service.box.enter(["systemctl", "restart", "systemd-journald.service"])
    lab.carrier(0, False)
    eventually(lambda: service.events("uplink-down"))
    assert os.path.exists(service.box.root / "run/systemd/journal/socket")


def test_monitor_tells_where_the_events_are(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    answers = follow(service.box.root / "run/pbrd", "Monitor", {"history": 10, "status": True})
    first = next(answers)
    assert first["journal"] is True
    assert first["events"][0]["event"] == "started"
    lab.carrier(0, False)
    events: list[dict[str, Any]] = []
    status = None
    while not events or status is None:
        answer = next(answers)
        events += answer["events"]
        status = answer["status"] or status
    assert events[0]["event"] in ("uplink-down", "uplink-degraded")
    assert status["uplinks"][0]["name"] == "fiber"
