"""The log: readable lines where there is no journal, and it never stops the daemon, wherever its lines go."""

import fcntl
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from conftest import HEAD, PROBE, ROOT, UPLINKS, Leaving, StartDaemon, all_up, eventually

from pbrd import journal, log
from pbrd.client import call
from pbrd.errors import ControlError
from pbrd.lab import Lab

CONFIG = f"""{HEAD}{PROBE}{UPLINKS}
[default]
via = ["fiber", "lte"]
"""
LINE = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d) \[(\w+) *\] (.*)"


def state_of(runtime: Path, uplink: int = 0) -> str:
    try:
        return str(call(runtime, "Status")["uplinks"][uplink]["state"])
    except ControlError:
        return ""


def run_in(directory: Path) -> list[str]:
    """The command that runs a daemon with its files in `directory`."""
    directories = ["--runtime-dir", str(directory / "run"), "--state-dir", str(directory / "state")]
    return [sys.executable, "-m", "pbrd", "run", "--config", str(directory / "pbrd.toml"), *directories]


@contextmanager
def running(lab: Lab, directory: Path, stderr: str | int) -> Iterator["subprocess.Popen[str]"]:
    """The daemon with its standard error redirected: as the shell has it ("2>&-"), or a descriptor."""
    (directory / "pbrd.toml").write_text(CONFIG)
    run = run_in(directory)
    redirected = ["sh", "-c", f'exec "$@" {stderr}', "sh", *run] if isinstance(stderr, str) else run
    daemon = lab.spawn(
        lab.router,
        redirected,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr if isinstance(stderr, int) else None,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"},
    )
    try:
        eventually(lambda: daemon.poll() is not None or state_of(directory / "run") == "up", within=15)
        yield daemon
        daemon.terminate()
        assert daemon.wait(10) == 0
    finally:
        daemon.kill()
        daemon.wait()


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_the_daemon_does_its_work_with_standard_error_closed_or_full(
    lab: Lab, tmp_path: Path, stderr: str
) -> None:
    with running(lab, tmp_path, stderr):
        lab.carrier(0, up=False)
        eventually(lambda: state_of(tmp_path / "run") == "down")
        assert lab.exit_of() == "lte"


def test_a_pipe_that_nobody_reads_stalls_no_failover(lab: Lab, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, b"x" * 4096)  # full from the start
    with running(lab, tmp_path, writing):
        stream = Leaving(lab)
        lab.silence(0)
        eventually(lambda: lab.exit_of() == "lte", within=6)
        eventually(lambda: state_of(tmp_path / "run") == "down")
        assert stream.stop()[0] == ["fiber", "lte"]
        os.set_blocking(reading, False)
        while select.select([reading], [], [], 0)[0]:
            os.read(reading, 65536)
        lab.silence(0, on=False)
        eventually(lambda: state_of(tmp_path / "run") == "up", within=15)
        told = os.read(reading, 65536).decode()
    os.close(reading)
    os.close(writing)
    assert re.match(r"\d+ log lines are lost: nobody read them\n", told), told
    assert "uplink fiber is recovering (was down)" in told


def test_lines_have_time_with_zone_level_and_sentence(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd) and "uplink fiber is up" in pbrd.log)
    lab.carrier(0, up=False)
    eventually(lambda: "policy default failed over" in pbrd.log)
    pbrd.stop()
    lines = [re.fullmatch(LINE, line) for line in pbrd.log.splitlines()]
    assert all(lines), pbrd.log
    told = [(line[2], line[3]) for line in lines if line]
    assert abs(datetime.fromisoformat(lines[0][1]).timestamp() - datetime.now().timestamp()) < 60  # type: ignore[index]
    assert told[0] == ("info", f"pbrd 0.1.0 started with {pbrd.config}")
    assert ("warning", "uplink fiber is down: no-carrier (was up)") in told
    assert (
        "warning",
        "policy default failed over to lte (was fiber): fiber is down (no-carrier)",
    ) in told
    assert told[-1] == ("info", "pbrd stopped; routes and rules are kept")


def test_what_the_daemon_dies_of_is_said_once_and_last(lab: Lab, tmp_path: Path) -> None:
    needs_nft = '[[policies]]\nname = "camera"\nmatch = { mac = ["02:00:00:00:00:01"] }\nvia = ["lte"]\n'
    (tmp_path / "pbrd.toml").write_text(CONFIG.replace("[default]", f"{needs_nft}[default]"))
    with (tmp_path / "log").open("w") as file:
        daemon = lab.spawn(
            lab.router,
            ["sh", "-c", 'PATH=/nowhere exec "$@"', "sh", *run_in(tmp_path)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=ROOT,
        )
        assert daemon.wait(15) == 1
    told = (tmp_path / "log").read_text()
    assert re.search(r"\[error +\] pbrd stopped: cannot go on: .*nft.*\n\Z", told), told
    assert told.count("cannot go on") == 1


def test_a_journal_is_standard_error_only_if_it_is_that_very_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
    assert journal.is_stderr()
    for other in (f"{stat.st_dev}:{stat.st_ino + 1}", f"{stat.st_ino}", "", "x"):
        monkeypatch.setenv("JOURNAL_STREAM", other)
        assert not journal.is_stderr()
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not journal.is_stderr()


@pytest.mark.parametrize(
    ("name", "field"),
    [("reason", "REASON"), ("PBRD_x-y.z", "PBRD_X_Y_Z"), ("_9a", "A"), ("ü", ""), ("x" * 80, "X" * 64)],
)
def test_names_become_fields_that_the_journal_takes(name: str, field: str) -> None:
    assert journal.field(name) == field


def test_what_libraries_log_waits_for_nobody_either() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    code = """
import asyncio, logging, os, sys, warnings
from pbrd.log import open_log
open_log()
logging.getLogger("asyncio").error("never retrieved", exc_info=ValueError("a bug"))
os.write(1, os.read(int(sys.argv[1]), 9999))
os.write(2, b"x" * 4096)
logging.getLogger("asyncio").error("never retrieved")
warnings.warn("old")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(reading)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=writing,
        pass_fds=[reading],
        timeout=20,
        text=True,
    )
    os.close(reading)
    os.close(writing)
    assert re.search(r"\[error +\] never retrieved +library=asyncio\n", done.stdout)
    assert done.stdout.endswith("ValueError: a bug\n")


def test_a_long_line_that_breaks_off_is_ended_before_the_next() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 8192)
    os.set_blocking(reading, False)
    lines = log.Lines(writing)
    lines.msg("x" * 10_000)
    assert lines.dropped == 1
    told = os.read(reading, 65536)
    lines.msg("next")
    told += os.read(reading, 65536)
    os.close(reading)
    os.close(writing)
    assert told == b"x" * 8192 + b"\n1 log lines are lost: nobody read them\nnext\n"
