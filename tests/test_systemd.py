"""What is sent to the service manager, over a real socket like its own."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pbrd import systemd


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def heard(manager: socket.socket) -> list[str]:
    messages = []
    with suppress(BlockingIOError):
        while True:
            messages.append(manager.recv(4096).decode())
    return messages


def test_assignments_arrive_as_one_message(manager: socket.socket) -> None:
    systemd.notify("READY=1", "STATUS=fiber up")
    systemd.reloading()
    ready, reloading = heard(manager)
    assert ready == "READY=1\nSTATUS=fiber up"
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")


def test_what_a_busy_manager_has_no_room_for_is_said_later_and_nobody_waits(manager: socket.socket) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as others,
        suppress(BlockingIOError),
    ):
        while True:
            others.sendto(b"STATUS=other", os.environ["NOTIFY_SOCKET"])
    for message in ("STATUS=one", "READY=1", "WATCHDOG=1", "RELOADING=1"):
        systemd.notify(message)
    assert set(heard(manager)) == {"STATUS=other"}
    systemd.notify("STATUS=two")
    assert heard(manager) == ["READY=1", "RELOADING=1", "STATUS=two"]
    systemd.notify("STOPPING=1")
    assert heard(manager) == ["STOPPING=1"]


def test_without_a_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.listens()
    systemd.notify("READY=1")
