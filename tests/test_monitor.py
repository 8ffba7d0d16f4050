"""Monitor: clients that follow events, slow and bad ones, against a real server in a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import as_nobody, eventually, let_others_in

from pbrd import client, control, monitor
from pbrd.errors import ControlError

SERVER = """
import asyncio, sys
from pathlib import Path
from pbrd.control import Handler, Server
from pbrd.monitor import Monitor

def status():
    if broken: raise RuntimeError("a bug")
    return {"version": "0", "padding": "x" * 100_000}

broken = []
monitor = Monitor(status, True)
failures = []

def plan(parameters):
    match parameters["config"].split():
        case ["events", first, last]:
            for number in range(int(first), int(last)):
                monitor.add({"event": str(number), "padding": "x" * 300})
        case ["changed"]: monitor.changed()
        case ["break"]: broken.append(1)
        case ["followers"]: return {"steps": [str(len(monitor.followers))]}
        case ["failures"]: return {"steps": failures}
    return {"steps": []}

async def main():
    nothing = Handler(lambda _: {})
    handlers = {name: nothing for name in ("Status", "Drain", "Undrain", "Reload", "Flush")}
    handlers |= {"Plan": Handler(plan), "Monitor": Handler(monitor.look, stream=monitor.follow)}
    server = Server(Path(sys.argv[1]) / "pbrd.sock", handlers, lambda m, e: failures.append(f"{m}: {e!r}"))
    server.open()
    print("listening", flush=True)
    await server.run()

asyncio.run(main())
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Path]:
    runtime = let_others_in(tmp_path) / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(runtime)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    yield runtime
    process.terminate()
    process.wait(10)
    process.stdout.close()


def do(daemon: Path, *words: object) -> list[str]:
    steps: list[str] = client.call(daemon, "Plan", {"config": " ".join(map(str, words))})["steps"]
    return steps


def followers(daemon: Path) -> int:
    return int(do(daemon, "followers")[0])


def following(daemon: Path, **parameters: Any) -> socket.socket:
    """A client that asks and then reads nothing."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(daemon / "pbrd.sock"))
    call = {"method": "io.pbrd.Daemon.Monitor", "parameters": parameters, "more": True}
    sock.sendall(json.dumps(call).encode() + b"\0")
    return sock


def numbers(answer: dict[str, Any]) -> list[int]:
    return [int(event["event"]) for event in answer["events"]]


def test_without_more_it_is_one_answer_with_the_past(daemon: Path) -> None:
    do(daemon, "events", 0, 5)
    assert client.call(daemon, "Monitor") == {"events": [], "missed": 0, "journal": True, "status": None}
    assert numbers(client.call(daemon, "Monitor", {"history": 3})) == [2, 3, 4]
    assert numbers(client.call(daemon, "Monitor", {"history": -1})) == []
    assert client.call(daemon, "Monitor", {"status": True})["status"]["version"] == "0"


def test_the_ring_is_bounded(daemon: Path) -> None:
    do(daemon, "events", 0, monitor.PAST + 10)
    past = numbers(client.call(daemon, "Monitor", {"history": 10**12}))
    assert past == list(range(10, monitor.PAST + 10))


def test_who_follows_gets_the_past_and_then_each_event_once_in_order(daemon: Path) -> None:
    do(daemon, "events", 0, 5)
    answers = client.follow(daemon, "Monitor", {"history": 2})
    seen = numbers(next(answers))
    assert seen == [3, 4]
    for number in range(5, 50):
        do(daemon, "events", number, number + 1)
        if number % 10 == 0:
            time.sleep(0.15)
    while seen[-1] != 49:
        answer = next(answers)
        assert answer["missed"] == 0
        seen += numbers(answer)
    assert seen == list(range(3, 50))


def test_the_status_comes_when_it_has_changed_to_who_asked_for_it(daemon: Path) -> None:
    with_status = client.follow(daemon, "Monitor", {"status": True})
    without = client.follow(daemon, "Monitor")
    assert next(with_status)["status"]["version"] == "0"
    assert next(without)["status"] is None
    do(daemon, "changed")
    assert next(with_status)["status"]["version"] == "0"
    do(daemon, "events", 0, 1)
    answer = next(with_status)
    assert (numbers(answer), answer["status"]) == ([0], None)
    assert numbers(next(without)) == [0]


def test_the_status_comes_at_an_interval_too(daemon: Path) -> None:
    begun = time.monotonic()
    answers = client.follow(daemon, "Monitor", {"status": True, "interval": 1}, timeout=10)
    statuses = [next(answers)["status"]["version"] for _ in range(4)]  # the first at once, then one a second
    assert statuses == ["0"] * 4
    assert time.monotonic() - begun > 2.9
    for strange in (-5, 0, 10**400):
        answers = client.follow(daemon, "Monitor", {"status": True, "interval": strange})
        next(answers)
        do(daemon, "changed")
        assert next(answers)["status"]["version"] == "0"


def test_a_silent_daemon_is_not_waited_for_without_an_end(daemon: Path) -> None:
    answers = client.follow(daemon, "Monitor", timeout=0.3)
    next(answers)
    with pytest.raises(ControlError, match="no answer within"):
        next(answers)


def test_a_follower_that_does_not_read_is_told_what_it_missed_or_left(daemon: Path) -> None:
    with following(daemon) as lazy:
        eventually(lambda: followers(daemon) == 1)
        for start in range(0, 20_000, 1000):
            do(daemon, "events", start, start + 1000)
        eventually(lambda: followers(daemon) == 0, within=control.TAKE + 5)  # it took nothing
        lazy.settimeout(30)
        data = b""
        while chunk := lazy.recv(1 << 20):
            data += chunk
    first = json.loads(data.split(b"\0")[0])
    assert first["continues"] is True


def test_events_beyond_a_followers_queue_are_counted(daemon: Path) -> None:
    answers = client.follow(daemon, "Monitor")
    next(answers)
    do(daemon, "events", 0, 1500)  # in one go: the follower's task had no turn
    answer = next(answers)
    assert answer["missed"] == 1500 - monitor.PAST
    assert numbers(answer) == list(range(1500 - monitor.PAST, 1500))


def test_a_follower_that_leaves_or_speaks_out_of_turn_is_forgotten(daemon: Path) -> None:
    quiet, loud = following(daemon), following(daemon)
    eventually(lambda: followers(daemon) == 2)
    quiet.close()
    eventually(lambda: followers(daemon) == 1)
    loud.sendall(b"x")
    eventually(lambda: followers(daemon) == 0)
    loud.close()


def test_followers_leave_room_for_others(daemon: Path) -> None:
    socks = [following(daemon) for _ in range(control.CLIENTS)]
    eventually(lambda: followers(daemon) == control.STREAMS)
    for sock in socks[control.STREAMS :]:
        sock.settimeout(30)
        assert b"io.pbrd.Daemon.Busy" in sock.recv(4096)
    for sock in socks:
        sock.close()
    eventually(lambda: followers(daemon) == 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_who_may_only_read_gets_half_of_the_places(daemon: Path) -> None:
    os.chown(daemon / "pbrd.sock", -1, 65534)
    (daemon / "pbrd.sock").chmod(0o660)

    def crowd() -> int:
        socks = [following(daemon) for _ in range(control.STREAMS)]
        refused = 0
        for sock in socks:
            sock.settimeout(30)
            refused += b"io.pbrd.Daemon.Busy" in sock.recv(4096)
        return refused

    assert as_nobody(crowd) == control.STREAMS // 2


def test_a_bug_in_a_stream_ends_the_stream_and_nothing_else(daemon: Path) -> None:
    answers = client.follow(daemon, "Monitor", {"status": True})
    next(answers)
    do(daemon, "break")
    do(daemon, "changed")
    with pytest.raises(ControlError, match="hung up"):
        next(answers)
    assert "a bug" in do(daemon, "failures")[0]
    assert followers(daemon) == 0
