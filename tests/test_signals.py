"""Signals at a bad moment."""

from pathlib import Path
from signal import SIGHUP, SIGTERM, SIGUSR1

from conftest import HEAD, PROBE, UPLINKS, StartDaemon, eventually

from pbrd.lab import Lab

CONFIG = f"""{HEAD}{PROBE}{UPLINKS}
[default]
via = ["fiber", "lte"]
"""


def holds_back(pid: int, number: int) -> bool:
    """Whether a process blocks a signal, proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_reload_asked_for_during_the_start_comes_after_it(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG, wait=False)
    eventually(lambda: holds_back(pbrd.pid, SIGHUP))
    pbrd.signal(SIGHUP)
    pbrd.signal(SIGUSR1)
    pbrd.wait_ready()
    eventually(lambda: pbrd.status()["generation"] == 2)
    assert not holds_back(pbrd.pid, SIGHUP)
    assert pbrd.log.index(" started with ") < pbrd.log.index("config reloaded: no change")
    assert "state" in pbrd.log
    assert "rror" not in pbrd.log
    assert pbrd.stop(SIGTERM) == 0
