"""Policies for systemd units, and `pbrd use`: by cgroup, with real packets of real processes."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import HEAD, ROOT, UPLINKS, StartDaemon, eventually

from pbrd.cgroups import hierarchy
from pbrd.errors import PbrdError
from pbrd.lab import TARGETS, Lab

BASE = HEAD + "[probe]\ntargets = []\n" + UPLINKS
DEFAULT = '[default]\nvia = ["fiber", "lte"]\n'
SEND = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('{target}', 7001))"
)


@pytest.fixture
def unit() -> Iterator[Path]:
    """A unit's cgroup under a name of its own, in a slice of its own."""
    try:
        root = hierarchy().root
    except PbrdError as error:
        pytest.skip(f"no units here: {error}")
    path = root / f"pbrdtest{os.getpid()}.slice" / f"pbrdtest{os.getpid()}.service"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"cgroup2 is not ours to change: {error}")
    yield path
    for part in (path, path.parent):
        with contextlib.suppress(OSError):
            part.rmdir()


def sent_by(lab: Lab, cgroup: Path) -> str | None:
    """Send one packet of a process in `cgroup` from the router; say by which uplink it left."""
    seen = lab.counter("udp dport 7001")
    enter = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0'); " + SEND.format(target=TARGETS[0])
    with lab.inside(lab.router):
        subprocess.run([sys.executable, "-c", enter], check=True)
    return next((name for name, count in seen.read().items() if count), None)


def test_traffic_of_a_unit_also_when_it_is_a_new_one(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    policy = f'[[policies]]\nname = "u"\nmatch = {{ unit = "{unit.name}" }}\nvia = ["lte"]\n'
    daemon(lab, BASE + policy + DEFAULT)
    assert sent_by(lab, unit) == "lte"
    assert lab.exit_of(local=True) == "fiber"
    unit.rmdir()
    unit.mkdir()
    eventually(lambda: sent_by(lab, unit) == "lte", within=3)


def test_a_slice_covers_all_that_runs_in_it(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    policy = f'[[policies]]\nname = "s"\nmatch = {{ unit = "{unit.parent.name}" }}\nvia = ["lte"]\n'
    daemon(lab, BASE + policy + DEFAULT)
    assert sent_by(lab, unit) == "lte"


def test_use_runs_a_command_on_an_uplink(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    name = f"lte{os.getpid()}"  # cgroups are the machine's: daemons in other labs would see uplink-lte.slice
    pbrd = daemon(lab, (BASE + DEFAULT).replace("uplinks.lte", f"uplinks.{name}").replace(', "lte"', ""))
    assert "inet pbrd" not in lab.nft(lab.router, "list ruleset")
    seen = lab.counter("udp dport 7001")
    command = [sys.executable, "-m", "pbrd", "--runtime-dir", str(pbrd.runtime), "use", name, "--"]
    command += [sys.executable, "-c", SEND.format(target=TARGETS[0]) + "; raise SystemExit(7)"]
    with lab.inside(lab.router):
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 7, done.stderr
    assert seen.read() == {"fiber": 0, "lte": 1}
    assert lab.exit_of(local=True) == "fiber"
