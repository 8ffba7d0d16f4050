"""`pbrd demo` as people run it: it shows failover, fails honestly, and leaves nothing behind."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, MakeLab, as_nobody

from pbrd import demo, netns

DEMO = [sys.executable, "-m", "pbrd", "demo"]


def left_by(pid: int) -> list[str]:
    return [name for name in os.listdir(netns.RUN) if name.startswith(f"pbrd-{pid}-")]


def test_the_demo_shows_failover_and_healing_within_a_minute(make_lab: MakeLab) -> None:
    with subprocess.Popen(
        DEMO, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:
        output, _ = running.communicate(timeout=60)
    assert running.returncode == 0, output
    assert "\x1b" not in output
    assert "fiber → lte" in output
    assert "fiber down (no-carrier)" in output
    assert "fiber down (probes)" in output
    assert "packets of the camera that left by lte: 0" in output
    assert left_by(running.pid) == []


def test_a_demo_that_is_stopped_removes_everything(make_lab: MakeLab) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            DEMO, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            assert running.stdout
            assert any("All is well" in line for line in running.stdout)
            assert left_by(running.pid) != []
            running.send_signal(number)
            _, errors = running.communicate(timeout=10)
        assert (running.returncode, errors) == (130, "\nremoved\n")
        assert left_by(running.pid) == []


def test_without_root_the_demo_says_what_to_do(make_lab: MakeLab, capfd: pytest.CaptureFixture[str]) -> None:
    assert as_nobody(lambda: demo.main(keep=False)) == 1
    assert capfd.readouterr().err == "pbrd demo: needs root (network namespaces): try it with sudo\n"
