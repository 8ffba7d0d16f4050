"""The netlink sockets: what goes wrong with them is told, and passes."""

import os
from pathlib import Path
from resource import RLIMIT_NOFILE, prlimit

import pytest
from conftest import HEAD, PROBE, UPLINKS, StartDaemon, all_up, eventually

from pbrd.errors import KernelError
from pbrd.lab import Lab
from pbrd.netlink import Requests


def test_a_socket_that_cant_be_opened_is_an_error_of_the_kernel() -> None:
    before = prlimit(0, RLIMIT_NOFILE)
    used = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir()) + 1
    spare = [os.dup(0) for _ in range(used)]  # no gaps below the limit
    prlimit(0, RLIMIT_NOFILE, (used, before[1]))
    try:
        with pytest.raises(KernelError, match="cannot open a netlink socket: Too many open files"):
            Requests()
    finally:
        prlimit(0, RLIMIT_NOFILE, before)
        for fd in spare:
            os.close(fd)


def test_a_daemon_without_spare_descriptors_goes_on_and_recovers(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS)
    eventually(lambda: all_up(pbrd))
    before = prlimit(pbrd.pid, RLIMIT_NOFILE)
    prlimit(pbrd.pid, RLIMIT_NOFILE, (3, before[1]))
    lab.ip(lab.router, "route del default dev fiber")
    eventually(lambda: "Too many open files" in pbrd.log)
    prlimit(pbrd.pid, RLIMIT_NOFILE, before)
    eventually(lambda: pbrd.uplink("fiber").get("reason") == "no-gateway")
