"""The control socket against a real server in a process of its own; the handlers stand in for the daemon."""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import let_others_in

from pbrd import client, control, varlink
from pbrd.control import Handler, Server
from pbrd.errors import ControlError, NotRunning

NOBODY = 65534
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")

SERVER = '''
import asyncio, sys, time
from pathlib import Path
from pbrd.control import Handler, Server
from pbrd.errors import ConfigError, KernelError, Problem
from pbrd.varlink import CallError

worst = {"wall_ms": 0.0, "cpu_ms": 0.0}
failures = []

async def tick():
    """Note how late the loop is, by the clock and in processor time (which a busy machine can't spoil)."""
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(0.002)
        worst["wall_ms"] = max(worst["wall_ms"], (time.perf_counter() - wall) * 1e3 - 2)
        worst["cpu_ms"] = max(worst["cpu_ms"], (time.process_time() - cpu) * 1e3)

def status(parameters):
    return {"version": "0", "uplinks": ["x" * 40] * 500, **worst, "failures": failures}

def plan(parameters):
    match parameters.get("config"):
        case "/kernel": raise KernelError("cannot read the rules: no memory")
        case "/bug": raise RuntimeError("a bug")
        case "/nan": return {"steps": float("nan")}
        case "/own": raise CallError("io.pbrd.Daemon.NoSuchUplink", "no uplink is called 'x'")
        case config: return {"steps": [str(config)]}

async def reload(parameters):
    await asyncio.sleep(0.3)
    raise ConfigError((Problem("a.toml", "uplinks.x", "wrong"), Problem("a.toml", "", "worse")))

async def main():
    handlers = {
        "Status": Handler(status), "Plan": Handler(plan, root_parameters=frozenset({"config"})),
        "Reload": Handler(reload, changes=True), "Flush": Handler(lambda _: {"removed": []}, changes=True),
        "Monitor": Handler(lambda _: {}),
        "Drain": Handler(lambda _: {}, changes=True), "Undrain": Handler(lambda _: {}, changes=True),
    }
    server = Server(Path(sys.argv[1]) / "pbrd.sock", handlers, lambda m, e: failures.append(f"{m}: {e}"))
    server.open()
    print("listening", flush=True)
    ticking = asyncio.create_task(tick())
    await server.run()

asyncio.run(main())
'''

METHODS = ("Status", "Monitor", "Plan", "Drain", "Undrain", "Reload", "Flush")


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    return let_others_in(tmp_path) / "run"


@pytest.fixture
def daemon(runtime: Path) -> Iterator[Path]:
    process = start(runtime)
    yield runtime
    process.terminate()
    process.wait(10)


def start(runtime: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(runtime)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def connected(runtime: Path, timeout: float = 10.0) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(runtime / "pbrd.sock"))  # without a timeout: that would fail on a full backlog
    sock.settimeout(timeout)
    return sock


def ask(sock: socket.socket, data: bytes) -> dict[str, Any]:
    sock.sendall(data)
    return answer(sock)


def answer(sock: socket.socket) -> dict[str, Any]:
    buffer = b""
    while not buffer.endswith(b"\0"):
        byte = sock.recv(1)
        assert byte, f"hung up after {buffer!r}"
        buffer += byte
    message: dict[str, Any] = json.loads(buffer[:-1])
    return message


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def calling(method: str, **parameters: object) -> bytes:
    return varlink.encode({"method": f"io.pbrd.Daemon.{method}", "parameters": parameters})


def unprivileged(test: Callable[[], object]) -> str:
    """Run `test` as nobody in a child; return what it raised, "" if nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            test()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


# The talk


def test_a_call_gets_what_the_handler_returns(daemon: Path) -> None:
    assert client.call(daemon, "Status")["version"] == "0"
    assert client.call(daemon, "Plan", {"config": "/a"}) == {"steps": ["/a"]}
    assert client.call(daemon, "Plan", {"config": None}) == {"steps": ["None"]}


def test_a_refused_config_tells_its_problems(daemon: Path) -> None:
    with pytest.raises(varlink.ConfigInvalid) as caught:
        client.call(daemon, "Reload")
    assert caught.value.problems == ("a.toml: uplinks.x: wrong", "a.toml: worse")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("/kernel", "io.pbrd.Daemon.Failed", "cannot read the rules: no memory"),
        ("/bug", "io.pbrd.Daemon.Failed", "internal error, see the log: RuntimeError('a bug')"),
        ("/own", "io.pbrd.Daemon.NoSuchUplink", "no uplink is called 'x'"),
    ],
)
def test_an_exception_becomes_an_error_and_the_connection_lives(
    daemon: Path, config: str, error: str, message: str
) -> None:
    with connected(daemon) as sock:
        assert ask(sock, calling("Plan", config=config)) == {
            "error": error,
            "parameters": {"message": message},
        }
        assert "parameters" in ask(sock, calling("Status"))


def test_unexpected_exceptions_are_reported_to_the_daemon(daemon: Path) -> None:
    for config in ("/bug", "/nan", "/own", "/kernel"):
        with pytest.raises(varlink.CallError):
            client.call(daemon, "Plan", {"config": config})
    failures = client.call(daemon, "Status")["failures"]
    assert [failure.partition(":")[0] for failure in failures] == ["io.pbrd.Daemon.Plan"] * 2


@pytest.mark.parametrize(
    ("request_", "error", "parameters"),
    [
        ({"method": "io.pbrd.Daemon.Nope"}, "MethodNotFound", {"method": "io.pbrd.Daemon.Nope"}),
        ({"method": "org.x.Y"}, "InterfaceNotFound", {"interface": "org.x"}),
        ({"method": "Status"}, "InterfaceNotFound", {"interface": ""}),
        ({"method": "org.varlink.service.Nope"}, "MethodNotFound", {"method": "org.varlink.service.Nope"}),
        ({"method": "io.pbrd.Daemon.Plan", "parameters": {"x": 1}}, "InvalidParameter", {"parameter": "x"}),
        (
            {"method": "io.pbrd.Daemon.Plan", "parameters": {"config": 1}},
            "InvalidParameter",
            {"parameter": "config"},
        ),
        (
            {"method": "org.varlink.service.GetInterfaceDescription"},
            "InvalidParameter",
            {"parameter": "interface"},
        ),
    ],
)
def test_wrong_calls_get_the_errors_of_varlink(
    daemon: Path, request_: dict[str, Any], error: str, parameters: dict[str, str]
) -> None:
    with connected(daemon) as sock:
        want = {"error": f"org.varlink.service.{error}", "parameters": parameters}
        assert ask(sock, varlink.encode(request_)) == want
        assert "parameters" in ask(sock, calling("Status"))


def test_pipelined_calls_are_answered_in_order(daemon: Path) -> None:
    with connected(daemon) as sock:
        sock.sendall(b"".join(calling("Plan", config=f"/{number}") for number in range(200)))
        sock.shutdown(socket.SHUT_WR)
        steps = [answer(sock)["parameters"]["steps"] for _ in range(200)]
        assert steps == [[f"/{number}"] for number in range(200)]
        assert hung_up(sock)


def test_a_oneway_call_gets_no_answer(daemon: Path) -> None:
    with connected(daemon) as sock:
        sock.sendall(varlink.encode({"method": "io.pbrd.Daemon.Status", "oneway": True}))
        assert ask(sock, calling("Plan", config="/x")) == {"parameters": {"steps": ["/x"]}}


def test_a_slow_handler_holds_up_nobody_else(daemon: Path) -> None:
    with connected(daemon) as slow:
        slow.sendall(calling("Reload"))
        before = time.monotonic()
        client.call(daemon, "Status")
        assert time.monotonic() - before < 0.25
        assert answer(slow)["error"] == "io.pbrd.Daemon.ConfigInvalid"


# Introspection


def test_introspection_is_true(daemon: Path) -> None:
    info = client.call(daemon, "org.varlink.service.GetInfo")
    assert info["interfaces"] == ["org.varlink.service", "io.pbrd.Daemon"]
    for interface in info["interfaces"]:
        parameters = {"interface": interface}
        text = client.call(daemon, "org.varlink.service.GetInterfaceDescription", parameters)["description"]
        assert f"\ninterface {interface}\n" in f"\n{text}"
    assert set(varlink.methods(text)) == set(METHODS)


def test_a_server_must_have_a_handler_for_each_declared_method(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="declared"):
        Server(tmp_path / "pbrd.sock", {"Status": Handler(lambda _: {})})


@pytest.mark.skipif(not shutil.which("varlinkctl"), reason="no varlinkctl here")
def test_varlinkctl_reads_our_interface_and_calls_it(daemon: Path) -> None:
    address = str(daemon / "pbrd.sock")
    shown = subprocess.check_output(["varlinkctl", "introspect", address, "io.pbrd.Daemon"], text=True)
    assert "method Status" in shown
    told = subprocess.check_output(["varlinkctl", "call", address, "io.pbrd.Daemon.Plan", "{}"], text=True)
    assert json.loads(told) == {"steps": ["None"]}


# Who may


@ROOT_ONLY
def test_nobody_can_not_even_connect(daemon: Path) -> None:
    told = unprivileged(lambda: client.call(daemon, "Status"))
    assert told.startswith("ControlError: cannot open")
    assert "group pbrd" in told


@ROOT_ONLY
def test_who_may_only_read_can_change_nothing(daemon: Path) -> None:
    os.chown(daemon / "pbrd.sock", -1, NOBODY)  # as if nobody were in group pbrd
    (daemon / "pbrd.sock").chmod(0o660)
    assert unprivileged(lambda: client.call(daemon, "Status")) == ""
    assert unprivileged(lambda: client.call(daemon, "Plan")) == ""
    for method in ("Reload", "Flush"):
        told = unprivileged(partial(client.call, daemon, method))
        assert told.startswith("PermissionDenied:")


@ROOT_ONLY
def test_only_root_may_name_a_file_that_the_daemon_reads(daemon: Path) -> None:
    os.chown(daemon / "pbrd.sock", -1, NOBODY)
    (daemon / "pbrd.sock").chmod(0o660)
    told = unprivileged(lambda: client.call(daemon, "Plan", {"config": "/etc/shadow"}))
    assert told.startswith("PermissionDenied:")


def test_without_a_group_the_socket_is_for_root_alone(daemon: Path) -> None:
    group = (
        shutil.which("getent") and subprocess.run(["getent", "group", "pbrd"], check=False).returncode == 0
    )
    assert (daemon / "pbrd.sock").stat().st_mode & 0o777 == (0o660 if group else 0o600)


# One daemon a runtime directory


def test_a_second_daemon_is_refused_and_told_the_first_ones_pid(runtime: Path) -> None:
    first = start(runtime)
    try:
        handlers = {name: Handler(lambda _: {}) for name in METHODS}
        server = Server(runtime / "pbrd.sock", handlers)
        with pytest.raises(ControlError, match=rf"another pbrd already runs .*\(pid {first.pid}\)"):
            server.open()
        server.close()
        assert client.call(runtime, "Status")["version"] == "0"
    finally:
        first.terminate()
        first.wait(10)


def test_the_socket_of_a_killed_daemon_is_replaced(runtime: Path) -> None:
    first = start(runtime)
    first.kill()
    first.wait(10)
    assert (runtime / "pbrd.sock").exists()
    with pytest.raises(NotRunning):
        client.call(runtime, "Status")
    second = start(runtime)
    assert client.call(runtime, "Status")["version"] == "0"
    second.terminate()
    second.wait(10)


def test_the_socket_goes_when_the_server_ends(runtime: Path) -> None:
    handlers = {name: Handler(lambda _: {}) for name in METHODS}
    server = Server(runtime / "pbrd.sock", handlers)
    for _ in range(2):
        server.open()
        assert (runtime / "pbrd.sock").is_socket()
        server.close()
        assert not (runtime / "pbrd.sock").exists()


def test_a_socket_file_that_somebody_removed_is_made_anew(daemon: Path) -> None:
    with connected(daemon) as before:
        (daemon / "pbrd.sock").unlink()
        with pytest.raises(NotRunning):
            client.call(daemon, "Status")
        eventually((daemon / "pbrd.sock").exists, 20)
        assert client.call(daemon, "Status")["version"] == "0"
        assert "parameters" in ask(before, calling("Status"))  # who was connected still is
    assert client.call(daemon, "Status")["version"] == "0"


def test_no_daemon_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="no daemon is running"):
        client.call(tmp_path, "Status")


# Clients that mean harm, or are broken


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"[1]\0",
        b'{"method": "\xff\xfe"}\0',
        b'{"method": 7}\0',
        b'{"parameters": {}}\0',
        b'{"method": "io.pbrd.Daemon.Plan", "parameters": 7}\0',
        b'{"method": "io.pbrd.Daemon.Plan", "parameters": {"config": NaN}}\0',
        b'{"method": ' + b"1" * 6000 + b"}\0",
        b"[" * 60000 + b"\0",
        b'{"a":' * 10000 + b"\0",
        '{"method":"x"}'.encode("utf-16") + b"\0",
        b"x" * 200_000 + b"\0",
        b"x" * (control.MESSAGE_LIMIT + 2),  # no end in sight
    ],
)
def test_garbage_gets_an_error_and_the_connection_is_closed(daemon: Path, garbage: bytes) -> None:
    with connected(daemon) as sock:
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(garbage)
        assert answer(sock)["error"] == "io.pbrd.Daemon.BadMessage"
        assert hung_up(sock)
    assert client.call(daemon, "Status")["version"] == "0"


def test_a_message_of_the_full_size_is_fine(daemon: Path) -> None:
    padding = " " * (control.MESSAGE_LIMIT - len(calling("Plan")) + 1)
    with connected(daemon) as sock:
        assert "parameters" in ask(sock, calling("Plan").replace(b"{}", b"{" + padding.encode() + b"}"))


def test_a_call_may_come_byte_by_byte(daemon: Path) -> None:
    with connected(daemon) as sock:
        for byte in calling("Plan", config="/slow"):
            sock.send(bytes([byte]))
            time.sleep(0.0005)
        assert answer(sock) == {"parameters": {"steps": ["/slow"]}}


def test_too_many_clients_are_told_so_and_root_still_has_room(daemon: Path) -> None:
    socks = [connected(daemon) for _ in range(100)]
    taken = [ask(sock, calling("Plan", config="/x")) for sock in socks[: control.CLIENTS]]
    assert all("error" not in answer for answer in taken)
    refused = socks[control.CLIENTS :]
    assert {answer(sock)["error"] for sock in refused} == {"io.pbrd.Daemon.Busy"}
    with pytest.raises(varlink.CallError, match="too many clients"):
        client.call(daemon, "Status")
    for sock in socks:
        sock.close()
    eventually(lambda: client.call(daemon, "Status")["version"] == "0")


@ROOT_ONLY
def test_readers_can_not_lock_root_out(daemon: Path) -> None:
    os.chown(daemon / "pbrd.sock", -1, NOBODY)
    (daemon / "pbrd.sock").chmod(0o660)

    crowded, go = os.pipe(), os.pipe()

    def crowd() -> None:
        socks = [connected(daemon) for _ in range(control.CLIENTS)]
        busy = {answer(sock)["error"] for sock in socks[control.CLIENTS - control.FOR_ROOT :]}
        assert busy == {"io.pbrd.Daemon.Busy"}
        os.write(crowded[1], b".")
        os.read(go[0], 1)

    told: list[str] = []
    crowding = threading.Thread(target=lambda: told.append(unprivileged(crowd)))
    crowding.start()
    assert select.select([crowded[0]], [], [], 10)[0]
    version = client.call(daemon, "Status")["version"]
    os.write(go[1], b".")
    crowding.join()
    assert (version, told) == ("0", [""])


def test_no_client_stalls_the_loop(daemon: Path) -> None:
    """Everything at once, and the loop goes on turning: see `tick` in SERVER."""
    stop = time.monotonic() + 4
    attacks = [silent, never_reading, flooding, leaving_in_the_middle, nesting, hammering, hammering]
    threads = [threading.Thread(target=attack, args=(daemon, stop)) for attack in attacks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: client.call(daemon, "Status")["version"] == "0")
    late = client.call(daemon, "Status")
    print(f"worst lateness of the loop: {late['wall_ms']:.1f} ms, of it computing {late['cpu_ms']:.1f} ms")
    assert late["cpu_ms"] < 50
    assert late["wall_ms"] < 500  # a busy machine, not us; a blocking call would be seconds
    assert late["failures"] == []


def silent(runtime: Path, stop: float) -> None:
    socks = [connected(runtime) for _ in range(5)]
    time.sleep(max(0, stop - time.monotonic()))
    for sock in socks:
        sock.close()


def never_reading(runtime: Path, stop: float) -> None:
    with connected(runtime, timeout=max(0.1, stop - time.monotonic())) as sock, suppress(OSError):
        sock.sendall(calling("Status") * 10_000)


def flooding(runtime: Path, stop: float) -> None:
    while time.monotonic() < stop:
        with suppress(OSError), connected(runtime) as sock:
            sock.sendall(b"x" * 1_000_000)


def leaving_in_the_middle(runtime: Path, stop: float) -> None:
    while time.monotonic() < stop:
        with suppress(OSError), connected(runtime) as sock:
            sock.sendall(calling("Status") * 3 + b'{"meth')
            sock.recv(10)


def nesting(runtime: Path, stop: float) -> None:
    while time.monotonic() < stop:
        with suppress(OSError), connected(runtime) as sock:
            sock.sendall(b'{"a":[' * 10_000 + b"\0")
            sock.recv(100)


def hammering(runtime: Path, stop: float) -> None:
    with connected(runtime) as sock:
        sending = threading.Thread(target=pour, args=(sock, stop))
        sending.start()
        with suppress(OSError):
            while time.monotonic() < stop:
                sock.recv(1 << 20)
            sock.close()
        sending.join()


def pour(sock: socket.socket, stop: float) -> None:
    with suppress(OSError):
        while time.monotonic() < stop:
            sock.sendall(calling("Status") * 100)


def test_a_client_that_never_reads_is_dropped(monkeypatch: pytest.MonkeyPatch, daemon: Path) -> None:
    with connected(daemon, timeout=control.TAKE + 5) as sock:
        before = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            sock.sendall(calling("Status") * 100_000)
        assert control.TAKE - 1 < time.monotonic() - before < control.TAKE + 4


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(ControlError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)
