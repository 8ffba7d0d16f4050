"""The box itself: what the tests that boot a real systemd rely on."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from box import PREFIX, Box
from conftest import eventually

MakeBox = Callable[..., Box]
CRASH = """
import os
from box import Box
box = Box().__enter__()
print(box.name, box.leader, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_box_runs_commands_as_units_and_keeps_a_journal(make_box: MakeBox) -> None:
    box = make_box({"/etc/greeting": "hello", "/opt/greet": "#!/bin/sh\ncat /etc/greeting"})
    assert box.run(["/opt/greet"]).stdout == "hello"
    assert box.run(["pbrd", "--version"]).stdout.startswith("pbrd ")
    assert box.run(["id", "-un"], "User=nobody").stdout == "nobody\n"
    box.run(["sh", "-c", "echo said"], "SyslogIdentifier=someone", "StandardOutput=journal")
    box.enter(["systemd-cat", "-t", "someone", "echo", "heard"])
    assert [entry["MESSAGE"] for entry in box.journal("-t", "someone")] == ["heard"]
    assert box.show("systemd-journald.service", "ActiveState") == {"ActiveState": "active"}


def test_files_outlive_a_reboot_and_a_power_cut(make_box: MakeBox) -> None:
    box = make_box()
    first = box.leader
    box.write({"/var/lib/once": "1"})
    box.halt()
    box.boot()
    assert box.leader != first
    box.write({"/var/lib/twice": "2"})
    box.cut()
    box.boot()
    assert box.run(["cat", "/var/lib/once", "/var/lib/twice"]).stdout == "12"
    assert not Path("/var/lib/once").exists()


def test_with_udevd_devices_are_known_as_on_a_real_machine(make_box: MakeBox) -> None:
    box = make_box(udev=True)
    assert box.show("systemd-udevd.service", "ActiveState") == {"ActiveState": "active"}
    box.enter(["ip", "link", "add", "name", "wan", "type", "veth"])
    eventually(lambda: "ID_NET_DRIVER=veth" in box.enter(["udevadm", "info", "/sys/class/net/wan"]).stdout)


def test_nothing_of_a_box_is_left_when_its_test_is_killed(make_box: MakeBox) -> None:
    make_box()  # or the reason to skip
    died = subprocess.run(
        [sys.executable, "-c", CRASH],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent,
    )
    name, leader = died.stdout.split()
    assert died.returncode == -signal.SIGKILL
    assert name.startswith(PREFIX)
    eventually(lambda: not Path("/proc", leader).exists())
    make_box()  # takes what is left of it away
    assert not Path("/run/netns", name).exists()
    assert not any(Path("/sys/fs/cgroup").glob(f"**/{name}"))
