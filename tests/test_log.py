"""The log: it never stops the daemon, wherever its lines go."""

import subprocess
import sys
from pathlib import Path

from conftest import HEAD, UPLINKS, eventually

from pbrd.client import call
from pbrd.errors import ControlError
from pbrd.lab import Lab


def test_the_daemon_runs_with_its_standard_error_closed(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "pbrd.toml").write_text(f"{HEAD}[probe]\ntargets = []\n{UPLINKS}")
    directories = ["--runtime-dir", str(tmp_path / "run"), "--state-dir", str(tmp_path / "state")]
    run = [sys.executable, "-m", "pbrd", "run", "--config", str(tmp_path / "pbrd.toml"), *directories]
    daemon = lab.spawn(
        lab.router,
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *run],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent,
    )

    def answers() -> bool:
        assert daemon.poll() is None
        try:
            return bool(call(tmp_path / "run", "Status")["uplinks"])
        except ControlError:
            return False

    eventually(answers, within=10)
    daemon.terminate()
    assert daemon.wait(10) == 0
