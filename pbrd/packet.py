"""Single packets in the lab: real ones, sent to learn by which uplink they leave.

Nothing here asks the daemon or the routing tables: a packet is sent from a socket in one namespace
and heard on its arrival in another.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from pbrd.netns import LIBC, inside

SO_ATTACH_FILTER = 26  # asm-generic/socket.h
RECVERR = {
    socket.AF_INET: (socket.IPPROTO_IP, 11),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25),
}  # linux/in.h, in6.h
BPF_LDH, BPF_JEQ, BPF_RET = 0x28, 0x15, 0x06  # linux/bpf_common.h: half word, absolute; jump if equal; return
_ports = itertools.cycle(
    range(20000, 32000)
)  # below the ephemeral ports: NAT meets no port twice and keeps it


@dataclass(frozen=True, slots=True)
class Packet:
    """What a packet looks like, and who sends it. Empty or 0 = the kernel's choice."""

    dst: str
    src: str = ""
    proto: str = "udp"  # tcp (a SYN), icmp (an echo request, of either family), or another name or number
    sport: int = 0
    dport: int = 33434
    mark: int = 0
    uid: int = 0
    gid: int = 0
    dscp: int = 0
    device: str = ""  # bound to this interface

    @property
    def family(self) -> int:
        """The address family's number."""
        return socket.AF_INET6 if ":" in self.dst else socket.AF_INET

    @property
    def number(self) -> int:
        """The IP protocol's number."""
        if self.proto == "icmp":
            return socket.IPPROTO_ICMP if self.family == socket.AF_INET else socket.IPPROTO_ICMPV6
        return int(self.proto) if self.proto.isdigit() else socket.getprotobyname(self.proto)


@contextlib.contextmanager
def _as_user(uid: int, gid: int) -> Iterator[None]:
    """Let sockets made inside belong to a user, for this thread alone (uidrange, skuid)."""
    LIBC.setfsgid(gid)
    LIBC.setfsuid(uid)
    try:
        yield
    finally:
        LIBC.setfsuid(0)
        LIBC.setfsgid(0)


def open_socket(space: str, packet: Packet) -> socket.socket:
    """Open a non-blocking socket in a namespace that sends such packets; raises OSError."""
    kinds = {"udp": (socket.SOCK_DGRAM, 0), "tcp": (socket.SOCK_STREAM, 0)}
    kind, number = kinds.get(packet.proto, (socket.SOCK_RAW, packet.number))
    with inside(space), _as_user(packet.uid, packet.gid):
        made = socket.socket(packet.family, kind, number)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if packet.mark:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, packet.mark)
        if packet.device:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, packet.device.encode())
        if packet.dscp:
            level, option = (socket.IPPROTO_IP, socket.IP_TOS)
            if packet.family == socket.AF_INET6:
                level, option = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
            made.setsockopt(level, option, packet.dscp << 2)
        made.setblocking(False)
        made.bind((packet.src, packet.sport if kind != socket.SOCK_RAW else 0))
    except BaseException:
        made.close()
        raise
    return made


class Tap:
    """Hears packets of one family arrive in the internet, and from which provider."""

    def __init__(self, space: str, family: int) -> None:
        self._family = family
        with inside(space):
            protocol = 0x0800 if family == socket.AF_INET else 0x86DD  # linux/if_ether.h
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(protocol))
        self._socket.setblocking(False)

    def expect(self, packet: Packet) -> None:
        """Hear only packets with this one's source port (of an echo request: its identifier) from now on."""
        at = (20 if self._family == socket.AF_INET else 40) + (4 if packet.proto == "icmp" else 0)
        code = [
            (BPF_LDH, 0, 0, at),
            (BPF_JEQ, 0, 1, packet.sport),
            (BPF_RET, 0, 0, 0xFFFF),
            (BPF_RET, 0, 0, 0),
        ]
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in code))
        header = struct.pack("HL", len(code), ctypes.addressof(program))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, header)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1)

    def heard(self, packet: Packet) -> str | None:
        """Name the interface by which the packet has come; None = not yet."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = self._socket.recvfrom(256)
                proto, dst = (
                    (data[9], data[16:20]) if self._family == socket.AF_INET else (data[6], data[24:40])
                )
                if proto == packet.number and dst == ip_address(packet.dst).packed:
                    return str(address[0])
        return None

    def fileno(self) -> int:
        """For poll(2)."""
        return int(self._socket.fileno())

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


class Flow:
    """One flow from a namespace to the internet: `exit()` sends its next packet and says where it went.

    Each flow has a source port of its own, so that each is a new connection to every NAT on its way.
    A flow of TCP has only one packet, its SYN.
    """

    def __init__(self, space: str, packet: Packet, tap: Tap, names: dict[str, str]) -> None:
        self._tap, self._names = tap, names
        self.packet = dataclasses.replace(packet, sport=packet.sport or next(_ports))
        self._socket = open_socket(space, self.packet)
        self._socket.setsockopt(*RECVERR[self._socket.family], 1)  # hear of "unreachable" at once

    def exit(self, within: float = 1.0) -> str | None:
        """Send a packet; the uplink by which it came, None = refused, or nowhere in this time (seconds)."""
        self._clear_errors()
        self._tap.expect(self.packet)
        deadline = time.monotonic() + within
        try:
            self._send()
        except BlockingIOError:
            pass  # a TCP connection in progress
        except OSError:
            return None  # no route, unreachable, prohibited: at once
        return self._wait(deadline)

    def _wait(self, deadline: float) -> str | None:
        poll = select.poll()
        poll.register(self._tap, select.POLLIN)
        poll.register(self._socket, 0)  # errors alone
        while True:
            events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            came_by = self._tap.heard(self.packet)
            refused = any(fd == self._socket.fileno() for fd, _ in events)
            if came_by or refused or not events:
                return self._names.get(came_by or "")

    def _send(self) -> None:
        packet = self.packet
        if packet.proto == "icmp":
            kind = 8 if packet.family == socket.AF_INET else 128  # echo request: RFC 792, RFC 4443
            body = struct.pack("!HH", packet.sport, 1) + b"pbrd lab"
            body = struct.pack("!BBH", kind, 0, _checksum(struct.pack("!BBH", kind, 0, 0) + body)) + body
            self._socket.sendto(body, (packet.dst, 0))
        elif packet.proto == "tcp":
            self._socket.connect((packet.dst, packet.dport))
        elif packet.proto == "udp":
            self._socket.sendto(b"pbrd lab", (packet.dst, packet.dport))
        else:
            self._socket.sendto(
                struct.pack("!HH8s", packet.sport, packet.dport, b"pbrd lab"), (packet.dst, 0)
            )

    def _clear_errors(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.recvmsg(512, 512, socket.MSG_ERRQUEUE)
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def close(self) -> None:
        """End the flow."""
        self._socket.close()


def _checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
