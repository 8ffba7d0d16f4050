"""The one ctnetlink: connections of an uplink that is dead are forgotten, sockets on it are told.

An entry that NAT bound to a dead uplink keeps its connection there for as long as packets come; once it
is gone, the next packet is judged anew. Which entries go is decided in the kernel, in one message.
"""

import asyncio
import errno
import socket
import struct
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from ipaddress import ip_address

from pbrd import rtnetlink
from pbrd.errors import KernelError
from pbrd.netlink import HEADER, Requests
from pbrd.settings import Address, Family, Network

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NETLINK_SOCK_DIAG, NETLINK_NETFILTER = 4, 12
# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
IPCTNL_MSG_CT_DELETE = 1 << 8 | 2
CTA_MARK, CTA_MARK_MASK = 8, 21
NOWHERE = -1
HONOUR_FAMILY = 1  # nfgenmsg.version: with 0 a deletion by filter takes both families along (Linux 5.3)
# linux/sock_diag.h, inet_diag.h
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
INET_DIAG_REQ_BYTECODE, INET_DIAG_BC_S_COND = 1, 7
# net/tcp_states.h: ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING. A program may
# wait for an answer after it has closed its side, and what it has left behind still sends.
CONNECTED = frozenset({1, 2, 4, 5, 8, 9, 11})
# What a kernel says that has no conntrack, no inet_diag or no INET_DIAG_DESTROY.
ABSENT = {errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}
# inet_diag_req_v2: family, protocol, extensions, states, socket (ports, addresses, interface, cookie)
DIAG = struct.Struct("=BBBxI48s")
DIAG_PEER = slice(40, 56)
DIAG_ID = slice(20, 68)  # in an inet_diag_msg, behind the header and family, state, timer, retransmissions


class Conntrack:
    """The connection tracking of the network namespace in which this was made."""

    def __init__(self) -> None:
        self.requests: Requests | None = None
        self.turn = threading.Lock()
        try:
            self.requests = Requests(NETLINK_NETFILTER)
        except KernelError as error:
            if error.errno not in ABSENT:
                raise

    def close(self) -> None:
        """Close the socket."""
        if self.requests is not None:
            self.requests.close()

    def evict(self, family: Family | None, value: int, mask: int) -> None:
        """Delete the entries of `family` (None: both) with mark & mask == value; that none has it is fine.

        The caller waits meanwhile: the kernel goes through all entries, in 4 ms if there are 10,000, in 75 ms
        if there are 100,000. Without connection tracking there is nothing to do. Raises KernelError.
        """
        if self.requests is None:
            return
        body = struct.pack("=BBH", family or socket.AF_UNSPEC, HONOUR_FAMILY, 0)
        for kind, number in ((CTA_MARK, value), (CTA_MARK_MASK, mask)):
            body += struct.pack("=HH", 8, kind) + struct.pack("!I", number)
        request = HEADER.pack(16 + len(body), IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + body
        with self.turn:
            refusal = self.requests.transact([request])[0]
        if refusal is not None and refusal.errno not in ABSENT:
            raise refusal

    async def evict_beside(self, evictions: Iterable[tuple[Family, int, int]]) -> None:
        """Do `evict` for each (family, value, mask) in a thread: the loop goes on. Raises KernelError.

        What both families ask for is one walk through all entries.
        """
        await asyncio.to_thread(self._evict_all, tuple(evictions))

    def _evict_all(self, evictions: tuple[tuple[Family, int, int], ...]) -> None:
        families: dict[tuple[int, int], set[Family]] = {}
        for family, value, mask in evictions:
            families.setdefault((value, mask), set()).add(family)
        for (value, mask), wanted in families.items():
            self.evict(None if len(wanted) == len(Family) else min(wanted), value, mask)


def destroy_sockets(
    addresses: Iterable[Address], neighbours: Iterable[Network] = (), uplinks: Collection[int] = ()
) -> int:
    """End this host's TCP connections from any of `addresses`, but not to `neighbours`; return how many.

    With the interfaces (numbers) of all `uplinks`, only those that leave by one of them, or nowhere: who
    connects to the address from the LAN is not concerned.

    Their programs get ECONNABORTED at once, instead of waiting a quarter of an hour for a dead uplink.
    Sockets that are connected, connecting or closing, IPv4 ones of either socket family; never listening
    ones. Link-local addresses are skipped: other links may have the same. Returns 0 where the kernel
    can't (CONFIG_INET_DIAG_DESTROY) or we may not. Raises KernelError for all else.
    """
    try:
        with closing(Requests(NETLINK_SOCK_DIAG)) as requests:
            found = [
                request
                for address in addresses
                if not address.is_link_local
                for peer, request in _destructions(requests, address, tuple(neighbours))
                if not uplinks or _way(peer, address) in {*uplinks, NOWHERE}
            ]
            refusals = requests.transact(found)
    except KernelError as error:
        if error.errno in ABSENT | {errno.EPERM}:
            return 0
        raise
    return refusals.count(None)  # the others have ended by themselves, or we may not


def _destructions(
    requests: Requests, address: Address, neighbours: tuple[Network, ...]
) -> Iterator[tuple[Address, bytes]]:
    """Yield peers, and requests that end what has `address`; dual-stack sockets are IPv6 with an IPv4 one."""
    families = (Family.IPV4, Family.IPV6) if address.version == 4 else (Family.IPV6,)
    for family in families:
        for message in requests.dump(_socket_dump(family, address)):
            peer = ip_address(message[DIAG_PEER][: 4 if family is Family.IPV4 else 16])
            peer = getattr(peer, "ipv4_mapped", None) or peer
            near = any(peer in network for network in neighbours if network.version == peer.version)
            if message[17] in CONNECTED and not near:
                yield peer, _diag(SOCK_DESTROY, NLM_F_ACK, family, 0, message[DIAG_ID])


def _way(peer: Address, address: Address) -> int:
    """Return the number of the interface by which a packet from `address` leaves to `peer`, or NOWHERE."""
    family = Family.IPV4 if peer.version == 4 else Family.IPV6
    try:
        with closing(Requests()) as routes:
            for kind, _, message in routes.answers(rtnetlink.route_lookup(family, peer, address)):
                if kind == rtnetlink.RTM_NEWROUTE:
                    return rtnetlink.interface_of(message)
    except KernelError:  # unreachable, or the address is gone
        pass
    return NOWHERE


def _socket_dump(family: Family, address: Address) -> bytes:
    """Return the dump request for connected sockets of `family` with this local address: the kernel filters.

    Its filter is a program of one test: behind it the end, which accepts, or 4 bytes more, which refuses.
    """
    own = Family.IPV4 if address.version == 4 else Family.IPV6
    test = struct.pack("=BBxxi", own, address.max_prefixlen, -1) + address.packed
    length = 4 + len(test)
    program = struct.pack("=BBH", INET_DIAG_BC_S_COND, length, length + 4) + test
    attribute = struct.pack("=HH", 4 + len(program), INET_DIAG_REQ_BYTECODE) + program
    states = sum(1 << state for state in CONNECTED)
    return _diag(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, states, bytes(48), attribute)


def _diag(
    kind: int, flags: int, family: Family, states: int, identity: bytes, attribute: bytes = b""
) -> bytes:
    body = DIAG.pack(family, socket.IPPROTO_TCP, 0, states, identity) + attribute
    return HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body
