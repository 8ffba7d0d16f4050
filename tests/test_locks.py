"""One daemon in a runtime directory and in a network namespace, whatever other users do."""

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest
from conftest import HEAD, UPLINKS, StartDaemon, as_nobody, let_others_in

from pbrd import locks, netns
from pbrd.errors import ControlError
from pbrd.lab import Lab

CONFIG = f"{HEAD}[probe]\ntargets = []\n{UPLINKS}"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")


def test_a_second_daemon_in_a_network_namespace_is_refused(lab: Lab, daemon: StartDaemon) -> None:
    first = daemon(lab, CONFIG)
    rules = lab.run(lab.router, "ip", "rule").stdout
    second = daemon(lab, f'{CONFIG}[default]\nvia = ["lte"]\n', wait=False)  # its directories are its own
    assert second.stop(0) == 1
    assert (
        f"another pbrd already runs in this network namespace (pid {first.pid}); stop it first" in second.log
    )
    assert lab.run(lab.router, "ip", "rule").stdout == rules
    first.stop()
    second.restart()


def test_a_full_disk_keeps_nobody_from_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    fd = locks.lock(tmp_path / "pbrd.pid")
    with pytest.raises(ControlError, match=r"already runs with this runtime dir \(pid unknown\)"):
        locks.lock(tmp_path / "pbrd.pid")
    locks.unlock(fd)


def test_every_network_namespace_may_have_its_own(lab: Lab) -> None:
    with netns.inside(lab.router), locks.alone("run"):
        with (
            pytest.raises(ControlError, match=rf"cannot run: another pbrd .* \(pid {os.getpid()}\)"),
            locks.alone("run"),
        ):
            pass
        with netns.inside(lab.lan), locks.alone("run") as odd:
            assert odd == ""
    with netns.inside(lab.router), locks.alone("run") as odd:
        assert odd == ""


@pytest.mark.parametrize("listens", [False, True])
def test_the_name_of_the_lock_in_the_hands_of_others_keeps_no_daemon_out(
    lab: Lab, daemon: StartDaemon, listens: bool
) -> None:
    with netns.inside(lab.router), socket.socket(socket.AF_UNIX) as squatter:

        def squat() -> int:
            squatter.bind(locks.NAME)
            if listens:
                squatter.listen()
            return 0

        assert as_nobody(squat) == 0  # the socket is ours, the credentials are nobody's
        pbrd = daemon(lab, CONFIG)
    assert "warning: somebody who is not root holds the socket @pbrd" in pbrd.log


@ROOT_ONLY
def test_nobody_else_can_open_the_lock_file_and_lock_it(tmp_path: Path) -> None:
    file = let_others_in(tmp_path) / "pbrd.pid"
    file.touch()
    file.chmod(0o644)  # as a version left it that was run by hand
    locks.unlock(locks.lock(file))

    def hold() -> int:
        try:
            fcntl.flock(os.open(file, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError:
            return 0
        return 1

    assert as_nobody(hold) == 0
    file.unlink()
    locks.unlock(locks.lock(file))
    assert file.stat().st_mode & 0o777 == 0o600
