"""The netlink sockets: what goes wrong with them is told, and passes."""

import os
from pathlib import Path
from resource import RLIMIT_NOFILE, prlimit

import pytest
from conftest import HEAD, PROBE, UPLINKS, StartDaemon, all_up, eventually

from pbrd.errors import KernelError
from pbrd.lab import Lab
from pbrd.netlink import RTM_DELROUTE, RTM_NEWROUTE, Events, Requests
from pbrd.rtnetlink import route_of


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


def test_events_that_cant_be_heard_are_an_error_of_the_kernel() -> None:
    before = prlimit(0, RLIMIT_NOFILE)
    prlimit(0, RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(KernelError, match="cannot hear the kernel's events: Too many open files"):
            Events()
    finally:
        prlimit(0, RLIMIT_NOFILE, before)


def test_of_routes_only_ours_defaults_and_those_of_our_tables_are_heard(lab: Lab) -> None:
    with lab.inside(lab.router):
        many = [200, 1200, 100_000, *range(300, 495)]  # 99 uplinks have 198 tables
        events = Events(many)
    heard: list[str] = []

    def take(kind: int, message: bytes) -> None:
        if kind in (RTM_NEWROUTE, RTM_DELROUTE):
            _, route = route_of(message, {})
            heard.append(f"{route.destination} {route.table}")

    def listen(*commands: str) -> list[str]:
        lab.ip(lab.router, "\n".join(commands))
        heard.clear()
        assert events.drain(take)
        return list(heard)

    ours = [f"route add 198.18.{n}.0/24 dev fiber table {table}" for n, table in enumerate(many)]
    assert listen(*ours) == [f"198.18.{n}.0/24 {table}" for n, table in enumerate(many)]
    assert listen("route add 2001:db8:5::/48 dev fiber table 1200") == ["2001:db8:5::/48 1200"]
    others = [f"route add 198.18.0.0/24 dev fiber table {table}" for table in (201, 254, 252, 1201, 100_001)]
    assert listen(*others, "route add 2001:db8:5::/48 dev fiber") == []
    assert listen("route add default dev fiber table 77", "route add 198.18.9.0/24 dev fiber proto 112") == [
        "0.0.0.0/0 77",
        "198.18.9.0/24 254",
    ]
    events.heed([1201])
    assert listen("route del 198.18.0.0/24 dev fiber table 1201", "route del 198.18.0.0/24 table 200") == [
        "198.18.0.0/24 1201"
    ]
    events.close()


def test_what_others_do_in_our_tables_is_noticed_at_once(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS)
    eventually(lambda: all_up(pbrd))
    # A replace tells of the new route, which is not ours, and says nothing of the old one, which was.
    lab.ip(lab.router, "route replace 10.0.1.0/24 dev fiber table 200 proto static")
    eventually(lambda: "a foreign route stands where ours belongs" in pbrd.log)
    lab.ip(lab.router, "route del 10.0.1.0/24 dev fiber table 200")
    shown = ("ip", "-N", "route", "show", "table", "200", "10.0.1.0/24")
    eventually(lambda: "proto 112" in lab.run(lab.router, *shown).stdout)


def test_a_daemon_without_spare_descriptors_goes_on_and_recovers(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS)
    eventually(lambda: all_up(pbrd))
    before = prlimit(pbrd.pid, RLIMIT_NOFILE)
    prlimit(pbrd.pid, RLIMIT_NOFILE, (3, before[1]))
    lab.ip(lab.router, "route del default dev fiber")
    eventually(lambda: "Too many open files" in pbrd.log)
    prlimit(pbrd.pid, RLIMIT_NOFILE, before)
    eventually(lambda: pbrd.uplink("fiber").get("reason") == "no-gateway")
