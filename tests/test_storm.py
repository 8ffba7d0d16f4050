"""Clients in the group pbrd that ask for long answers without a pause: root and the loop don't feel it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PROBE, UPLINKS, StartDaemon, all_up, eventually, let_others_in

from pbrd import control
from pbrd.client import call
from pbrd.lab import LAN, Lab

NOBODY = 65534
BUSY = 0.02  # seconds that the server below takes for an answer
FOLK = 20  # connections of nobody's

SERVER = f"""
import asyncio, sys, time
from pathlib import Path
from pbrd.control import Handler, Server

answered = 0

def long(_):
    global answered
    answered += 1
    time.sleep({BUSY})
    return {{"steps": ["root"]}}

async def main():
    named = ("Status", "Monitor", "Drain", "Undrain", "Reload", "Flush")
    handlers = {{name: Handler(lambda _: {{"answered": answered}}) for name in named}}
    handlers["Plan"] = Handler(lambda _: {{"steps": ["root"]}}, others=long)
    server = Server(Path(sys.argv[1]) / "pbrd.sock", handlers)
    server.open()
    print("listening", flush=True)
    await server.run()

asyncio.run(main())
"""

# Argument 1: the socket, 2: the method, 3: how many connections. Ends with its standard input, and prints
# how many answers each connection got.
STORM = """
import select, socket, sys
call = b'{"method":"io.pbrd.Daemon.%s"}\\0' % sys.argv[2].encode()
socks = {}
for _ in range(int(sys.argv[3])):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    socks[sock] = 0
for sock in socks:
    sock.sendall(call * 20)
while True:
    ready = select.select([sys.stdin, *socks], [], [])[0]
    if sys.stdin in ready:
        break
    for sock in ready:
        count = sock.recv(1 << 20).count(b"\\0")
        socks[sock] += count
        sock.sendall(call * count)
print(*socks.values())
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")


@contextmanager
def storm(path: Path, method: str) -> Iterator[list[int]]:
    """Let nobody ask until the end; then the list has how many answers each connection got."""
    os.chown(path, -1, NOBODY)  # as if nobody were in the group pbrd
    path.chmod(0o660)
    argv = ["/usr/bin/env", "python3", "-c", STORM, str(path), method, str(FOLK)]
    process = subprocess.Popen(
        argv,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    answers: list[int] = []
    try:
        yield answers
        answers += map(int, process.communicate("", timeout=20)[0].split())
    finally:
        process.kill()
        process.wait()


def test_all_but_root_share_a_fifth_of_the_loop_and_each_gets_its_turn(tmp_path: Path) -> None:
    runtime = let_others_in(tmp_path) / "run"
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(runtime)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        began = time.monotonic()
        with storm(runtime / "pbrd.sock", "Plan") as answers:
            eventually(lambda: call(runtime, "Status")["answered"] > 2 * FOLK, 30)
            for _ in range(100):
                assert call(runtime, "Plan") == {"steps": ["root"]}  # what only root gets
            done = call(runtime, "Status")["answered"]
            took = time.monotonic() - began
        assert done <= took / (BUSY * (1 + control.REST)) + 1
        assert min(answers) >= 1
        assert max(answers) - min(answers) <= 2
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.parametrize("method", ["Plan", "Status"])
def test_a_failover_waits_for_no_client(lab: Lab, daemon: StartDaemon, tmp_path: Path, method: str) -> None:
    """With 3,000 policies it took 3.0 s instead of 0.5, and `pbrd status` of root's as long."""
    let_others_in(tmp_path)
    policies = "".join(
        f"[[policies]]\nname = 'p{n}'\nmatch.from = '10.{n >> 8}.{n & 255}.0/24'\nvia = 'lte'\n"
        for n in range(3000)
    )
    pbrd = daemon(lab, f"{PROBE}{UPLINKS}{policies}[default]\nvia = ['fiber', 'lte']\n")
    eventually(lambda: all_up(pbrd), 20)
    let_others_in(pbrd.runtime)
    with storm(pbrd.runtime / "pbrd.sock", method):
        lab.silence(0)
        eventually(lambda: lab.exit_of(src=LAN[0], within=0.2) == "lte", 10)
        assert pbrd.uplink("fiber")["state"] == "down"  # as root sees it
        assert call(pbrd.runtime, "Plan")["steps"] == []
        lab.silence(0, False)
