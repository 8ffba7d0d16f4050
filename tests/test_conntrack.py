"""Eviction and the end of sockets, by what connections and programs see of it."""

import asyncio
import errno
import itertools
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from ipaddress import ip_address

import pytest

from pbrd.conntrack import Conntrack, destroy_sockets
from pbrd.lab import Lab
from pbrd.settings import Family

MASK = 0xFF000000
FIBER, LTE = 0x01000000, 0x02000000
LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}


class Connection:
    """A UDP connection inside the router whose entry has a mark; it counts how often it was new."""

    def __init__(self, lab: Lab, family: Family, mark: int) -> None:
        self.lab = lab
        self.server, self.client = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
        self.server.bind((LOOPBACK[family], 0))
        self.client.connect(self.server.getsockname()[:2])
        for one in (self.server, self.client):
            one.settimeout(2)
        port = self.client.getsockname()[1]
        self.chain = f"inet judge c{port}"
        lab.nft(
            lab.router,
            f"""add table inet judge
            add chain {self.chain} {{ type filter hook output priority 0; }}
            add rule {self.chain} udp sport {port} ct state new counter ct mark set {mark}
            """,
        )
        assert self.is_new()
        assert not self.is_new()

    def is_new(self) -> bool:
        """Exchange a packet; say whether connection tracking had not heard of this connection."""
        before = self.counted()
        self.client.send(b"ping")
        _, sender = self.server.recvfrom(16)
        self.server.sendto(b"pong", sender)
        self.client.recv(16)
        return self.counted() > before

    def counted(self) -> int:
        found = re.search(r"counter packets (\d+)", self.lab.nft(self.lab.router, f"list chain {self.chain}"))
        assert found
        return int(found[1])

    def close(self) -> None:
        self.server.close()
        self.client.close()


@pytest.fixture
def router(lab: Lab) -> Iterator[Lab]:
    """The lab, with the test inside its router."""
    with lab.inside(lab.router):
        yield lab


@pytest.fixture
def conntrack(router: Lab) -> Iterator[Conntrack]:
    with closing(Conntrack()) as made:
        yield made


def survivors(lab: Lab, marks: list[int], evict: tuple[Family, int, int], conntrack: Conntrack) -> list[int]:
    """Make IPv4 connections with these marks, evict, and return the marks of those that are left."""
    with ExitStack() as stack:
        made = [(mark, stack.enter_context(closing(Connection(lab, Family.IPV4, mark)))) for mark in marks]
        conntrack.evict(*evict)
        return [mark for mark, connection in made if not connection.is_new()]


@pytest.mark.parametrize(
    ("marks", "value", "mask", "left"),
    [
        ([FIBER, LTE, 0], FIBER, MASK, [LTE, 0]),
        ([FIBER | 0xAA, LTE | 0xAA, 0xAA], FIBER, MASK, [LTE | 0xAA, 0xAA]),  # others' bits don't matter
        ([FIBER, 0xAA, 0], 0, MASK, [FIBER]),  # 0 is a value, not "any"
        ([FIBER, FIBER | 1], FIBER, 0xFFFFFFFF, [FIBER | 1]),
        ([FIBER, 0xFFFFFFFF], MASK, MASK, [FIBER]),
        ([FIBER, LTE], 0x03000000, MASK, [FIBER, LTE]),
    ],
)
def test_entries_go_by_value_under_the_mask(
    router: Lab, conntrack: Conntrack, marks: list[int], value: int, mask: int, left: list[int]
) -> None:
    assert survivors(router, marks, (Family.IPV4, value, mask), conntrack) == left


@pytest.mark.parametrize("family", list(Family))
def test_the_other_family_keeps_its_entries(router: Lab, conntrack: Conntrack, family: Family) -> None:
    other = Family.IPV6 if family is Family.IPV4 else Family.IPV4
    with (
        closing(Connection(router, family, FIBER)) as mine,
        closing(Connection(router, other, FIBER)) as theirs,
    ):
        conntrack.evict(family, FIBER, MASK)
        assert mine.is_new()
        assert not theirs.is_new()


def test_where_nothing_is_tracked_eviction_does_nothing(conntrack: Conntrack) -> None:
    for family in Family:
        conntrack.evict(family, FIBER, MASK)


@pytest.mark.parametrize(
    "chosen",
    [
        [(Family.IPV4, FIBER), (Family.IPV6, LTE)],
        [(Family.IPV4, LTE), (Family.IPV6, LTE)],  # one message
    ],
)
def test_several_evictions_beside_the_loop(
    router: Lab, conntrack: Conntrack, chosen: list[tuple[Family, int]]
) -> None:
    with ExitStack() as stack:
        made = {
            (family, mark): stack.enter_context(closing(Connection(router, family, mark)))
            for family in Family
            for mark in (FIBER, LTE)
        }
        asyncio.run(conntrack.evict_beside((family, mark, MASK) for family, mark in chosen))
        assert [key for key, connection in made.items() if connection.is_new()] == chosen


# --- sockets ----------------------------------------------------------------------------------

OURS = {Family.IPV4: "10.77.0.1", Family.IPV6: "fd77::1"}
OTHERS = {Family.IPV4: "10.77.0.2", Family.IPV6: "fd77::2"}


def listener(address: str) -> socket.socket:
    return socket.create_server((address, 0), family=family_of(address))


def family_of(address: str) -> Family:
    return Family.IPV6 if ":" in address else Family.IPV4


def connected(
    source: str, server: socket.socket, *, dual: bool = False
) -> tuple[socket.socket, socket.socket]:
    """Connect from `source`; `dual`: with an IPv6 socket, as programs do that speak both."""
    host, port = server.getsockname()[:2]
    prefix = "::ffff:" if dual else ""
    client = socket.socket(Family.IPV6 if dual else family_of(source), socket.SOCK_STREAM)
    client.settimeout(2)
    client.bind((prefix + source, 0))
    client.connect((prefix + host, port))
    accepted, _ = server.accept()
    return client, accepted


def fate(client: socket.socket, accepted: socket.socket) -> str:
    """Say what has become of a connection, as its program sees it."""
    try:
        accepted.send(b"x")
        client.recv(1)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "alive"


@pytest.fixture
def hosts(router: Lab) -> Lab:
    """A router with addresses of its own, on a kernel that can end sockets (`ss -K` is the judge)."""
    for address in (*OURS.values(), *OTHERS.values()):
        router.ip(router.router, f"addr add {address}/{128 if ':' in address else 32} dev lo")
    with listener(OTHERS[Family.IPV4]) as server:
        client, accepted = connected(OURS[Family.IPV4], server)
        with client, accepted:
            router.run(router.router, "ss", "-K", "src", OURS[Family.IPV4], check=False)
            if fate(client, accepted) == "alive":
                pytest.skip("this kernel can't end sockets (CONFIG_INET_DIAG_DESTROY)")
    return router


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize(
    ("family", "dual"), [(Family.IPV4, False), (Family.IPV4, True), (Family.IPV6, False)]
)
def test_programs_on_the_address_learn_at_once(family: Family, dual: bool) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(listener(OTHERS[family]))
        ours = [connected(OURS[family], server, dual=dual) for _ in range(3)]
        others = connected(OTHERS[family], server, dual=dual)
        for one in itertools.chain(*ours, others):
            stack.callback(one.close)
        assert destroy_sockets([ip_address(OURS[family])]) == 3
        for client, _ in ours:
            with pytest.raises(ConnectionAbortedError):
                client.recv(1)
        assert fate(*others) == "alive"
        assert destroy_sockets([ip_address(OURS[family])]) == 0


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("family", list(Family))
def test_who_waits_for_an_answer_after_closing_its_side_learns_too(family: Family) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(listener(OTHERS[family]))
        client, accepted = connected(OURS[family], server)
        stack.callback(client.close)
        stack.callback(accepted.close)
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        assert destroy_sockets([ip_address(OURS[family])]) == 1
        with pytest.raises(ConnectionAbortedError):
            client.recv(1)


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("family", list(Family))
def test_listening_sockets_go_on(family: Family) -> None:
    with listener(OURS[family]) as server:
        client, accepted = connected(OTHERS[family], server)
        with client, accepted:
            assert destroy_sockets([ip_address(OURS[family])]) == 1  # the accepted one
            with pytest.raises(ConnectionAbortedError):
                accepted.recv(1)
        client, accepted = connected(OTHERS[family], server)
        with client, accepted:
            assert fate(client, accepted) == "alive"


@pytest.mark.parametrize("family", list(Family))
def test_a_program_that_still_connects_learns_too(hosts: Lab, family: Family) -> None:
    ip = "ip6" if family is Family.IPV6 else "ip"
    hosts.nft(
        hosts.router,
        f"""add table inet wall
        add chain inet wall out {{ type filter hook input priority 0; }}
        add rule inet wall out {ip} daddr {OTHERS[family]} drop""",
    )
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.bind((OURS[family], 0))
        client.setblocking(False)
        assert client.connect_ex((OTHERS[family], 9)) == errno.EINPROGRESS
        assert destroy_sockets([ip_address(OURS[family])]) == 1
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED


@pytest.mark.usefixtures("hosts")
def test_addresses_that_other_links_may_have_too_are_left_alone() -> None:
    with listener("127.0.0.1") as server:
        client, accepted = connected("127.0.0.1", server)
        with client, accepted:
            assert destroy_sockets([ip_address("fe80::1"), ip_address("169.254.0.1")]) == 0
            assert destroy_sockets([]) == 0
            assert fate(client, accepted) == "alive"
