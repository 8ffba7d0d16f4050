"""Two netlink sockets: one for requests, one for events. Bytes in, bytes out.

pyroute2's own transport is not used: a request costs it 500 µs where this takes 20, an overflow of its
event socket ends the socket, and a lost answer hangs the caller. Requests here are synchronous: the
kernel executes rtnetlink inside sendmsg, and the answer lies in the buffer when it returns.
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from pbrd.errors import KernelError
from pbrd.settings import PROTOCOL

NETLINK_ROUTE = 0
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_MULTI, NLM_F_DUMP_INTR = 0x2, 0x10
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSGERR_ATTR_MSG = 1
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
SKF_AD_NLATTR = 0xFFFFF000 + 12  # linux/filter.h: SKF_AD_OFF + SKF_AD_NLATTR
RTM_NEWROUTE, RTM_DELROUTE, RTA_TABLE = 24, 25, 15  # linux/rtnetlink.h
EVENT_GROUPS = (1, 5, 7, 8, 9, 11, 19)  # RTNLGRP_: LINK, IPV4 IFADDR ROUTE RULE, IPV6 IFADDR ROUTE RULE
EVENT_BUFFER = 8 << 20  # bytes; 20,000 events fit
ANSWER_LIMIT = 1 << 18  # bytes in one datagram; the kernel makes dumps of 32 KiB
ANSWER_TIMEOUT = struct.pack(
    "=qq", 2, 0
)  # seconds, µs; an answer that does not come must not hang the daemon
BATCH = 64  # messages in one sendmsg: a failover fits, and the acks fit the receive buffer
DUMP_TRIES = 5

HEADER = struct.Struct("=IHHII")


def messages_in(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (type, flags, sequence number, whole message) of a datagram."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < 16:
            return
        yield kind, flags, sequence, data[offset : offset + length]
        offset += (length + 3) & ~3


class Requests:
    """The socket for changes and dumps. Not shared with events: those would answer for each other."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        """Open it for rtnetlink, or another netlink `protocol`. Raises KernelError."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        try:
            self.socket = socket.socket(socket.AF_NETLINK, kind, protocol)
        except OSError as error:
            raise KernelError(f"cannot open a netlink socket: {error.strerror}", error.errno or 0) from error
        self.socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        if protocol == NETLINK_ROUTE:
            for option in (NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
                self.socket.setsockopt(SOL_NETLINK, option, 1)
            with suppress(PermissionError):  # `pbrd plan` of a user: its few dumps fit the default
                self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, EVENT_BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, ANSWER_TIMEOUT)
        self.sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def dump(self, request: bytes, *, partial: bool = False) -> list[bytes]:
        """Return the messages that answer `request`, whole ones with their headers.

        A dump that changes interrupted is repeated; if it always is, `partial` takes the last one as it is.
        Raises KernelError (its errno says why).
        """
        for _ in range(DUMP_TRIES):
            found, interrupted = self._dump(request)
            if not interrupted:
                return found
        if partial:
            return found
        raise KernelError(
            "cannot read the kernel's tables: they change faster than they can be read", errno.EINTR
        )

    def _dump(self, request: bytes) -> tuple[list[bytes], bool]:
        found: list[bytes] = []
        interrupted = False
        for kind, flags, message in self.answers(request):
            interrupted |= bool(flags & NLM_F_DUMP_INTR)
            if kind != NLMSG_DONE:
                found.append(message)
        return found, interrupted

    def answers(self, request: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield (type, flags, message) as they come, NLMSG_DONE included."""
        self.sequence += 1
        wanted = self.sequence
        data = bytearray(request)
        struct.pack_into("=I", data, 8, wanted)
        self._send(data)
        while True:
            for kind, flags, sequence, message in messages_in(self._receive()):
                if sequence != wanted:
                    continue  # left over from a request that timed out
                if kind == NLMSG_ERROR:
                    _raise(message, "read")
                    return
                yield kind, flags, message
                if kind == NLMSG_DONE or not flags & NLM_F_MULTI:
                    if kind == NLMSG_DONE:
                        _raise(message, "read")
                    return

    def transact(self, requests: Sequence[bytes]) -> list[KernelError | None]:
        """Send changes, in batches of one system call each; return for each its error, or None.

        The kernel goes through all of them, also behind one that fails.
        """
        results: list[KernelError | None] = []
        for start in range(0, len(requests), BATCH):
            results += self._batch(requests[start : start + BATCH])
        return results

    def transaction(self, begin: bytes, change: bytes, end: bytes) -> None:
        """Send a change between the two messages that nfnetlink wants around it. Raises KernelError.

        Only `change` asks for an acknowledgement; all three have one sequence number, as the kernel may
        refuse the first.
        """
        self.sequence += 1
        data = bytearray()
        for message in (begin, change, end):
            at = len(data)
            data += message
            struct.pack_into("=I", data, at + 8, self.sequence)
        self._send(data)
        while True:
            for kind, _, sequence, message in messages_in(self._receive()):
                if kind == NLMSG_ERROR and sequence == self.sequence:
                    if error := _error(message, "change"):
                        raise error
                    return

    def _batch(self, requests: Sequence[bytes]) -> list[KernelError | None]:
        first = self.sequence + 1
        self.sequence += len(requests)
        data = bytearray()
        for number, request in enumerate(requests, first):
            at = len(data)
            data += request
            struct.pack_into("=I", data, at + 8, number)
            data += bytes(-len(data) % 4)
        self._send(data)
        results: dict[int, KernelError | None] = {}
        while len(results) < len(requests):
            for kind, _, sequence, message in messages_in(self._receive()):
                if kind == NLMSG_ERROR and first <= sequence < first + len(requests):
                    results[sequence] = _error(message, "change")
        return [results[number] for number in range(first, first + len(requests))]

    def _send(self, data: bytearray) -> None:
        try:
            self.socket.send(data)
        except OSError as error:
            raise KernelError(f"cannot ask the kernel: {error.strerror}", error.errno or 0) from error

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(ANSWER_LIMIT)
        except OSError as error:
            number = error.errno or 0
            raise KernelError(f"cannot hear the kernel's answer: {os.strerror(number)}", number) from error


def _error(message: bytes, act: str) -> KernelError | None:
    """Return what an NLMSG_ERROR says: None for an ack, else the kernel's own words if it has any."""
    code = -struct.unpack_from("=i", message, 16)[0]
    if code == 0:
        return None
    flags = HEADER.unpack_from(message)[2]
    return KernelError(f"cannot {act}: {_words(message, flags) or os.strerror(code)}", code)


def _words(message: bytes, flags: int) -> str:
    if not flags & NLM_F_ACK_TLVS:
        return ""
    inner = struct.unpack_from("=I", message, 20)[0]
    offset = 20 + (16 if flags & NLM_F_CAPPED else inner)
    while offset + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, offset)
        if length < 4:
            break
        if kind & 0x3FFF == NLMSGERR_ATTR_MSG:
            return message[offset + 4 : offset + length].rstrip(b"\0").decode(errors="replace")
        offset += (length + 3) & ~3
    return ""


def _raise(message: bytes, act: str) -> None:
    """Raise what an NLMSG_ERROR or NLMSG_DONE reports; both begin with the error number."""
    code = -struct.unpack_from("=i", message, 16)[0] if len(message) >= 20 else 0
    if code:
        raise KernelError(f"cannot {act}: {os.strerror(code)}", code)


class Events:
    """The socket for events. What pbrd has no use for is dropped in the kernel.

    Of routes only our own, default routes and what lies in our tables come through: the churn of a full
    BGP feed costs nothing.
    """

    def __init__(self, tables: Iterable[int] = ()) -> None:
        """Subscribe; `tables` are the ids of ours. Raises KernelError."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            self.socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_ROUTE)
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, EVENT_BUFFER)
            _attach(self.socket, tables)
            self.socket.bind((0, 0))
            for group in EVENT_GROUPS:
                self.socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except OSError as error:
            raise KernelError(
                f"cannot hear the kernel's events: {error.strerror}", error.errno or 0
            ) from error

    def heed(self, tables: Iterable[int]) -> None:
        """Let routes of these tables through, and no longer those of others. Raises KernelError."""
        try:
            _attach(self.socket, tables)
        except OSError as error:
            raise KernelError(f"cannot filter events: {error.strerror}", error.errno or 0) from error

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def drain(self, take: Callable[[int, bytes], None]) -> bool:
        """Hand (type, message) of every waiting event to `take`; return False if some were lost.

        The socket goes on after an overflow; the caller must look at everything again.
        """
        complete = True
        while True:
            try:
                data = self.socket.recv(ANSWER_LIMIT)
            except BlockingIOError:
                return complete
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(
                        f"cannot hear the kernel's events: {error.strerror}", error.errno or 0
                    ) from error
                complete = False
                continue
            for kind, _, _, message in messages_in(data):
                take(kind, message)


def _attach(events: socket.socket, tables: Iterable[int]) -> None:
    """Attach the filter: all but RTM_NEWROUTE and RTM_DELROUTE; of these what `Events` says.

    Offsets: nlmsg_type is at 4, rtm_dst_len at 17, rtm_protocol at 21, attributes begin at 28. Loads are
    big-endian, what they load is in host order. The kernel finds an attribute by its type in X, and leaves
    its offset in A (SKF_AD_NLATTR). Classic BPF of linux/filter.h: (code, jump if true, if false, operand).
    Jumps reach 255 instructions; 99 uplinks have 198 tables.
    """
    load_half, load_byte, load_word, equal, accept = 0x28, 0x30, 0x20, 0x15, 0x06
    load_number, load_x_number, x_is_a, load_word_behind_x = 0x00, 0x01, 0x07, 0x40
    ours = [socket.htonl(table) for table in sorted(tables)]
    left = len(ours)
    program = (
        (load_half, 0, 0, 4),
        (equal, 2, 0, socket.htons(RTM_NEWROUTE)),
        (equal, 1, 0, socket.htons(RTM_DELROUTE)),
        (accept, 0, 0, 0xFFFFFFFF),
        (load_byte, 0, 0, 17),
        (equal, left + 8, 0, 0),
        (load_byte, 0, 0, 21),
        (equal, left + 6, 0, PROTOCOL),
        (load_number, 0, 0, 28),
        (load_x_number, 0, 0, RTA_TABLE),
        (load_word, 0, 0, SKF_AD_NLATTR),
        (x_is_a, 0, 0, 0),
        (load_word_behind_x, 0, 0, 4),
        *((equal, left - place, 0, table) for place, table in enumerate(ours)),
        (accept, 0, 0, 0),
        (accept, 0, 0, 0xFFFFFFFF),
    )
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    events.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(buffer))
    )
