"""A stream of packets through the lab, and what became of each: the measure of every failover.

Measured from outside, by packets: nothing here asks the daemon. The stream is sent and answered by
processes of their own (`python -m pbrd.stream`), on sockets that the lab opened in its namespaces and
handed over, and stamped by the kernel on arrival: a busy test neither delays nor disturbs it.
"""

import contextlib
import gc
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO

from pbrd.errors import LabError

LATE = 0.2  # seconds; what takes longer was parked in a queue for an address to be resolved: lost
SO_TIMESTAMPNS = 35  # asm-generic/socket.h
_PAYLOAD = struct.Struct("=qq")  # sequence number, time of sending in ns of CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True)
class Trip:
    """What became of one packet of a stream. Times are seconds of time.monotonic()."""

    sent: float
    uplink: str | None  # by which it came to the internet; None = it did not, or too late
    arrived: float | None  # there
    echoed: float | None  # back at the sender; None = lost


@dataclass(frozen=True)
class Result:
    """What a stream went through, packet by packet, in the order of sending."""

    trips: tuple[Trip, ...]

    @property
    def sent(self) -> int:
        """How many were sent."""
        return len(self.trips)

    @cached_property
    def lost(self) -> int:
        """Packets without an answer within LATE."""
        return sum(trip.echoed is None for trip in self.trips)

    @cached_property
    def by_uplink(self) -> dict[str, int]:
        """How many came to the internet by each uplink."""
        return dict(Counter(trip.uplink for trip in self.trips if trip.uplink is not None))

    @cached_property
    def moves(self) -> list[tuple[float, str]]:
        """When the stream came by another uplink than before, and by which; the first entry is its start."""
        moves: list[tuple[float, str]] = []
        arrivals = [
            (t.arrived, t.uplink) for t in self.trips if t.arrived is not None and t.uplink is not None
        ]
        for arrived, uplink in sorted(arrivals):
            if not moves or moves[-1][1] != uplink:
                moves.append((arrived, uplink))
        return moves

    @property
    def path(self) -> list[str]:
        """The uplinks in the order of `moves`."""
        return [uplink for _, uplink in self.moves]

    def outage(self) -> float:
        """The longest time without an answer at the sender, its beginning and end included; seconds."""
        if not self.trips:
            return 0.0
        echoes = sorted(trip.echoed for trip in self.trips if trip.echoed is not None)
        edges = [self.trips[0].sent, *echoes, max(self.trips[-1].sent, *echoes[-1:])]
        return max(later - earlier for earlier, later in itertools.pairwise(edges))

    def gap(self, old: str, new: str) -> float | None:
        """Seconds from the last packet by `old` to the first by `new` after it; None = it did not move so."""
        for (_, before), (moved, after) in itertools.pairwise(self.moves):
            if (before, after) == (old, new):
                times = [t.arrived for t in self.trips if t.uplink == old and t.arrived is not None]
                return moved - max(time for time in times if time < moved)
        return None

    def between(self, start: float, end: float) -> "Result":
        """The part that was sent between two times of time.monotonic()."""
        return Result(tuple(trip for trip in self.trips if start <= trip.sent < end))


class Stream:
    """A running measurement: packets at a fixed rate to the internet, which echoes each; until `stop()`."""

    def __init__(
        self, client: socket.socket, server: socket.socket, rate: int, names: dict[str, str]
    ) -> None:
        self.source, self.target = client.getsockname(), server.getsockname()
        self._names = names
        self._server = _worker(server, "echo")
        self._client = _worker(client, "send", str(rate), *map(str, self.target[:2]))
        self.workers = (self._server, self._client)
        try:
            for worker in self.workers:
                if worker.stdout is None or worker.stdout.readline() != "ready\n":
                    raise LabError("cannot measure: the sender did not start")
        except BaseException:
            for worker in self.workers:
                worker.kill()
                worker.communicate()
            raise

    def stop(self) -> Result:
        """End it, wait for the last answers (LATE), and say what happened."""
        client: dict[str, list[int]] = json.loads(self._client.communicate()[0])
        server: list[tuple[int, int, int, str]] = json.loads(self._server.communicate()[0])
        arrived = {seq: (at, source) for seq, at, sent, source in server if at - sent < LATE * 1e9}
        echoed = dict(zip(client["seqs"], client["echoes"], strict=True))
        trips = []
        for seq, sent in enumerate(client["sent"]):
            at, source = arrived.get(seq, (None, ""))
            back = echoed.get(seq)
            back = back if back is not None and back - sent < LATE * 1e9 else None
            uplink = self._names.get(source, source) or None
            trips.append(Trip(sent / 1e9, uplink, at and at / 1e9, back and back / 1e9))
        return Result(tuple(trips))


def _worker(handed: socket.socket, *argv: str) -> subprocess.Popen[str]:
    """Start this module as a program that owns the socket; it runs until its input is closed."""
    command = [sys.executable, "-S", "-m", "pbrd.stream", str(handed.fileno()), *argv]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with handed:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[handed.fileno()],
            env=environment,
            start_new_session=True,  # Ctrl-C is for whoever reads the result
        )


def _receive(sock: socket.socket) -> Iterator[tuple[bytes, int, tuple[str, int]]]:
    """What waits on the socket: (data, time of arrival in ns of CLOCK_MONOTONIC, sender)."""
    offset = time.time_ns() - time.monotonic_ns()  # the kernel stamps with the wall clock
    while True:
        try:
            data, ancillary, _, peer = sock.recvmsg(64, 64)
        except OSError:
            return  # nothing more, or an error that some router reported: the packet counts as lost anyway
        seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
        yield data, seconds * 1_000_000_000 + nanoseconds - offset, peer


def _echo(sock: socket.socket) -> object:
    """Send everything back; returns [sequence, arrival, sending, source address] of each packet."""
    log = []
    while sys.stdin not in select.select([sock, sys.stdin], [], [])[0]:
        for data, arrived, peer in _receive(sock):
            with contextlib.suppress(OSError):
                sock.sendto(data, peer)
            seq, sent = _PAYLOAD.unpack(data)
            log.append((seq, arrived, sent, peer[0]))
    return log


def _send(sock: socket.socket, rate: int, target: tuple[str, int]) -> object:
    """Send at a fixed cadence; returns when each was sent and which came back when."""
    sent: list[int] = []
    echoes: list[tuple[int, int]] = []
    step, due, end = 1_000_000_000 // rate, time.monotonic_ns(), 0
    waited: list[socket.socket | TextIO] = [sock, sys.stdin]
    while not end or time.monotonic_ns() < end:
        timeout = ((end or due) - time.monotonic_ns()) / 1e9
        ready = select.select(waited, [], [], max(0.0, timeout))[0]
        if sock in ready:
            echoes += [(_PAYLOAD.unpack(data)[0], arrived) for data, arrived, _ in _receive(sock)]
        if sys.stdin in ready:
            end, waited = time.monotonic_ns() + round(LATE * 1e9), [sock]
        while not end and (now := time.monotonic_ns()) >= due:
            with contextlib.suppress(OSError):  # no route: counts as lost
                sock.sendto(_PAYLOAD.pack(len(sent), now), target)
            sent.append(now)
            due += step
    return {"sent": sent, "seqs": [seq for seq, _ in echoes], "echoes": [at for _, at in echoes]}


def main(argv: list[str]) -> None:
    """Be one end of a stream: `FD echo`, or `FD send RATE ADDRESS PORT`."""
    gc.disable()
    with contextlib.suppress(OSError):  # measure, rather than wait for a CPU
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    sock = socket.socket(fileno=int(argv[0]))
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    print("ready", flush=True)
    result = _echo(sock) if argv[1] == "echo" else _send(sock, int(argv[2]), (argv[3], int(argv[4])))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BrokenPipeError:
        os._exit(1)  # whoever wanted the result is gone
