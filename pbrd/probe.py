"""The only ICMP: one long-lived raw socket an uplink and family, bound and marked, feeding a `Health`.

The socket is bound to the device by index *and* carries the probe mark: bound, so that the path is the
uplink's; marked, so that the probe rules send it there or nowhere. The kernel drops what is not ours (by
type, id and the first bytes of the payload), so other people's pings cost nothing. A reply counts if id,
sequence, the random payload and the source address are those of the probe. ICMP errors count as nothing:
anybody may forge them, and the round fails by its timeout anyway.

Round trips end at the kernel's receive timestamp, so a busy loop does not lengthen them, and sockets are
read dry before their health is polled: an answer that lies in the buffer is never a loss, however late we
come.

icmplib is the codec (frozen since 2023, so its two private methods hold); its own sockets know neither
device nor mark, and its pings wait for one answer before they send the next.
"""

import asyncio
import ctypes
import errno
import math
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from icmplib.exceptions import ICMPLibError
from icmplib.sockets import ICMPv4Socket, ICMPv6Socket

from pbrd.health import Health, Reason, State
from pbrd.settings import Address, Family

# asm-generic/socket.h, linux/icmp.h, linux/icmpv6.h
SO_ATTACH_FILTER = 26
SO_TIMESTAMPNS = 35
SO_BINDTOIFINDEX = 62
SOL_RAW = 255
ICMP_FILTER = 1
ICMP6_FILTER = 1
ECHO_REPLY = 0
ECHO_REPLY6 = 129

TIMESPEC = struct.Struct("@ll")
CONTROL_SPACE = socket.CMSG_SPACE(TIMESPEC.size)
IPV4_HEADER = 20  # bytes, without options
ICMP_HEADER = 8
PAYLOAD = 56  # bytes, as ping(8); providers drop empty echoes
DRAIN = 1024  # packets at once: more than fit into a socket buffer
SPARE = 64  # probes that are remembered beyond the computed need

Key = tuple[str, Family]  # uplink name and family


@dataclass(frozen=True, slots=True)
class Path:
    """One family of one uplink and where it leaves; `index` is the interface's index, 0 if it is absent."""

    uplink: str
    family: Family
    interface: str
    index: int
    health: Health


@dataclass(slots=True)
class _Echo:
    """A probe under way; `sent` in monotonic seconds."""

    round: int
    target: Address
    sent: float


class Prober:
    """Sends the rounds that healths ask for, and tells them what became of the probes."""

    def __init__(self, mark: int, changed: Callable[[], None]) -> None:
        """Probe with SO_MARK `mark`; `changed` is called when a state or reason changed by probes or time."""
        self.errors: dict[Key, str] = {}  # why the latest round could not be sent, where it couldn't
        self.sent: Counter[Key] = Counter()
        self.lost: Counter[Key] = Counter()
        self._mark = mark
        self._changed = changed
        self._pingers: dict[Key, _Pinger] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._failed: asyncio.Future[None] | None = None
        self._due = math.inf  # when the alarm rings

    def follow(self, paths: Iterable[Path]) -> None:
        """Probe these and no others. Call it again after `Health.path`, so that new deadlines are seen."""
        wanted = {(path.uplink, path.family): path for path in paths}
        for key in [key for key in self._pingers if key not in wanted]:
            self._pingers.pop(key).close()
            for gone in (self.errors, self.sent, self.lost):
                gone.pop(key, None)
        for key, path in wanted.items():
            if key in self._pingers:
                self._pingers[key].follow(path)
            else:
                self._pingers[key] = _Pinger(path, self._mark, self._heard)
        self._arm()

    def mark_with(self, mark: int) -> None:
        """Probe with SO_MARK `mark` from now on; `follow` must come next if it is another one."""
        if mark != self._mark:
            self._mark = mark
            for pinger in self._pingers.values():
                pinger.close()
            self._pingers.clear()

    def overdue(self) -> float:
        """Return for how many seconds the next probe, or verdict, has been due; 0 if none is late."""
        due = min((p.path.health.deadline for p in self._pingers.values()), default=math.inf)
        return max(0.0, time.monotonic() - due)

    async def run(self) -> None:
        """Probe until cancelled; closes the sockets then."""
        self._loop = asyncio.get_running_loop()
        self._failed = self._loop.create_future()
        try:
            self._arm()
            await self._failed  # an error in a timer's callback would only be printed
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            self._loop = None
            for pinger in self._pingers.values():
                pinger.close()

    def _arm(self) -> None:
        """Set the alarm to the next deadline; an answer puts off the one that it would have been late for."""
        due = min((p.path.health.deadline for p in self._pingers.values()), default=math.inf)
        if self._loop is None or due == self._due:
            return
        self._due = due
        if self._alarm is not None:
            self._alarm.cancel()
        # asyncio's clock is time.monotonic
        self._alarm = None if due == math.inf else self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        try:
            self._turn()
        except Exception as error:  # noqa: BLE001 - `run` raises it
            if self._failed is not None and not self._failed.done():
                self._failed.set_exception(error)

    def _turn(self) -> None:
        """Poll the healths that are due, and send their rounds."""
        changed = False
        self._due = math.inf
        for key, pinger in list(self._pingers.items()):
            # The clock first, then the buffer: what had arrived by `now` lies there and is counted.
            now = time.monotonic()
            if pinger.path.health.deadline <= now:
                changed |= self._poll(key, pinger, now)
        self._arm()
        if changed:
            self._changed()

    def _poll(self, key: Key, pinger: "_Pinger", now: float) -> bool:
        health = pinger.path.health
        before, lost = verdict(health), health.lost
        pinger.drain()
        number = health.poll(now)
        if number is not None:
            sent, error = pinger.send(number)
            self.sent[key] += sent
            if error:
                self.errors[key] = error
            else:
                self.errors.pop(key, None)
        self.lost[key] += health.lost - lost
        return verdict(health) != before

    def _heard(self, pinger: "_Pinger") -> None:
        """Take in what a socket that became readable holds."""
        before = verdict(pinger.path.health)
        pinger.drain()
        self._arm()
        if verdict(pinger.path.health) != before:
            self._changed()


def verdict(health: Health) -> tuple[State, Reason]:
    """Return that of which a change is news."""
    return health.state, health.reason


class _Pinger:
    """The socket of one path and its probes under way. Opens when it must send, and again after a failure."""

    def __init__(self, path: Path, mark: int, readable: Callable[["_Pinger"], None]) -> None:
        self.path = path
        self._mark = mark
        self._readable = readable
        self._icmp: ICMPv4Socket | ICMPv6Socket | None = None
        self._sequence = int.from_bytes(os.urandom(2), "big")
        self._echoes: dict[int, _Echo] = {}  # by sequence
        self._memory = memory(path.health)

    def follow(self, path: Path) -> None:
        """Go on with `path`: another device needs another socket, another health begins with no probes."""
        if (path.interface, path.index) != (self.path.interface, self.path.index):
            self.close()
        if path.health is not self.path.health:
            self._echoes.clear()
            self._memory = memory(path.health)
        self.path = path

    def close(self) -> None:
        """Give up the socket and the probes under way."""
        if self._icmp is not None:
            self._loop.remove_reader(self._icmp.sock)
            self._icmp.close()
            self._icmp = None
        self._echoes.clear()

    def send(self, number: int) -> tuple[int, str]:
        """Send round `number`; returns how many probes left, and why one did not ("" if all did)."""
        health, problem, sent = self.path.health, "", 0
        for target in health.targets:
            try:
                self._send(number, target)
                sent += 1
            except OSError as error:
                problem = f"cannot send to {target} on {self.path.interface}: {os.strerror(error.errno or 0)}"
                health.unsendable(number, target, time.monotonic())
                if error.errno == errno.ENODEV:
                    self.close()
        return sent, problem

    def _send(self, number: int, target: Address) -> None:
        icmp = self._icmp or self._open()
        self._sequence = sequence = (self._sequence + 1) & 0xFFFF
        packet = icmp._create_packet(self._id, sequence, self._cookie)
        self._echoes.pop((sequence - self._memory) & 0xFFFF, None)
        echo = _Echo(number, target, time.monotonic())
        icmp.sock.sendto(packet, self._destination(target))
        self._echoes[sequence] = echo

    def _destination(self, target: Address) -> tuple[str, int] | tuple[str, int, int, int]:
        if target.version == 4:
            return str(target), 0
        return str(target), 0, 0, self.path.index if target.is_link_local else 0

    def _open(self) -> ICMPv4Socket | ICMPv6Socket:
        """Open, filter, bind and watch a socket; raises OSError."""
        if self.path.index <= 0:
            raise OSError(errno.ENODEV, "no such interface")  # the kernel takes index 0 for "not bound"
        self._id = int.from_bytes(os.urandom(2), "big") or 1
        self._cookie = os.urandom(PAYLOAD)
        try:
            icmp = ICMPv4Socket() if self.path.family is Family.IPV4 else ICMPv6Socket()
        except ICMPLibError as error:
            cause = error.__context__
            raise OSError(getattr(cause, "errno", None) or errno.EIO, str(error)) from error
        try:
            filter_replies(icmp.sock, self.path.family, self._id, self._cookie)
            icmp.sock.setblocking(False)
            icmp.sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", self._mark))
            icmp.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            icmp.sock.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, self.path.index)
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(icmp.sock, self._readable, self)
        except OSError:
            icmp.close()
            raise
        self._icmp = icmp
        return icmp

    def drain(self) -> None:
        """Read the socket dry and tell the health of the answers."""
        if self._icmp is None:
            return
        for _ in range(DRAIN):
            try:
                data, control, _, source = self._icmp.sock.recvmsg(2048, CONTROL_SPACE)
            except BlockingIOError:
                return
            except OSError:
                continue  # ENETDOWN once after the link went down; netlink tells the daemon
            self._hear(self._icmp, data, control, source[0])

    def _hear(
        self,
        icmp: ICMPv4Socket | ICMPv6Socket,
        data: bytes,
        control: list[tuple[int, int, bytes]],
        source: str,
    ) -> None:
        now, lain = (
            time.monotonic(),
            waited(control),
        )  # side by side: what lies between them is taken for delay
        header = 0
        if self.path.family is Family.IPV4:
            header = IPV4_HEADER
            data = data[
                (data[0] & 0x0F) * 4 - header :
            ]  # icmplib knows no IP options: leave out as many bytes
        reply = icmp._parse_reply(data, source, now)
        if reply is None or reply.id != self._id or data[header + ICMP_HEADER :] != self._cookie:
            return
        echo = self._echoes.get(reply.sequence)
        if echo is None or socket.inet_pton(self.path.family, source.partition("%")[0]) != echo.target.packed:
            return
        del self._echoes[reply.sequence]
        rtt = now - echo.sent
        self.path.health.answered(echo.round, echo.target, min(rtt, max(0.0, rtt - lain)), now)


def waited(control: list[tuple[int, int, bytes]]) -> float:
    """Return for how many seconds a packet with these control messages has lain in the socket."""
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = TIMESPEC.unpack(data[: TIMESPEC.size])
            return time.time() - (int(seconds) + int(nanoseconds) * 1e-9)
    return 0.0


def memory(health: Health) -> int:
    """Return how many probes are sent until the oldest is twice its timeout old, and some to spare."""
    probe = health.probe
    rounds = 1 / probe.interval + (1 / probe.confirm_interval if probe.confirm_interval else 0.0)
    return min(1 << 15, SPARE + math.ceil(2 * probe.timeout * rounds * len(health.targets)))


def filter_replies(sock: socket.socket, family: Family, identifier: int, cookie: bytes) -> None:
    """Let the kernel drop all but echo replies with this id, whose payload begins like `cookie`.

    A classic BPF program (linux/filter.h). A raw IPv4 socket sees the IP header, whose length goes into X
    first; a raw IPv6 socket begins at the ICMPv6 header.
    """
    kind = ECHO_REPLY if family is Family.IPV4 else ECHO_REPLY6
    program = [
        (0xB1, 0, 0, 0) if family is Family.IPV4 else (0x01, 0, 0, 0),  # ldxb 4*([0]&0xf), or ldx #0
        (0x50, 0, 0, 0),  # ldb [x + 0]
        (0x15, 0, 5, kind),  # jeq, else drop
        (0x48, 0, 0, 4),  # ldh [x + 4]
        (0x15, 0, 3, identifier),
        (0x40, 0, 0, ICMP_HEADER),  # ld [x + 8]
        (0x15, 0, 1, int.from_bytes(cookie[:4])),
        (0x06, 0, 0, 0xFFFF),  # ret: keep
        (0x06, 0, 0, 0),  # ret: drop
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    fprog = struct.pack("HL", len(program), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)
    # In front of the program, a bit set means "drop", so that other types don't even reach it.
    if family is Family.IPV4:
        sock.setsockopt(SOL_RAW, ICMP_FILTER, struct.pack("=I", ~(1 << ECHO_REPLY) & 0xFFFFFFFF))
    else:
        words = [0xFFFFFFFF] * 8
        words[ECHO_REPLY6 >> 5] &= ~(1 << (ECHO_REPLY6 & 31))
        sock.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, struct.pack("=8I", *words))
