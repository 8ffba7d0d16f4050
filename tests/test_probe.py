"""Probes against a real kernel: a namespace that probes, a veth pair, and a namespace that answers."""

import asyncio
import ctypes
import os
import secrets
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path as File

import pytest
from icmplib.sockets import ICMPv4Socket, ICMPv6Socket

from pbrd.health import Health, Reason, State
from pbrd.probe import Path, Prober, filter_replies
from pbrd.settings import Address, Family, Probe

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and raw sockets")

MARK = 0x5A000000
PEER = {Family.IPV4: ip_address("10.99.0.2"), Family.IPV6: ip_address("fd00:99::2")}
OTHER = {Family.IPV4: ip_address("10.99.0.3"), Family.IPV6: ip_address("fd00:99::3")}
SELF = {Family.IPV4: "10.99.0.1", Family.IPV6: "fd00:99::1"}
QUICK = Probe(
    interval=0.05, timeout=0.2, fall=3, rise=2, stable_for=0, confirm_interval=0.02, max_loss=0, window=2.0
)
both = pytest.mark.parametrize("family", list(Family), ids=lambda family: family.name)


class Pair:
    """Two namespaces and a veth pair: `here` probes, `there` answers."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.here, self.there = f"pbrd-p{tag}", f"pbrd-q{tag}"
        for name in (self.here, self.there):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        self.plug()

    def plug(self) -> None:
        ip("-n", self.here, "link", "add", "up0", "type", "veth", "peer", "name", "isp0", "netns", self.there)
        for family, own in SELF.items():
            bits = "24" if family is Family.IPV4 else "64"
            extra = [] if family is Family.IPV4 else ["nodad"]
            ip("-n", self.here, "address", "add", f"{own}/{bits}", "dev", "up0", *extra)
            for peer in (PEER, OTHER):
                ip("-n", self.there, "address", "add", f"{peer[family]}/{bits}", "dev", "isp0", *extra)
        ip("-n", self.here, "link", "set", "up0", "up")
        ip("-n", self.there, "link", "set", "isp0", "up")
        for peer in (PEER, OTHER):  # the first packets wait for neighbours, up to a second
            for target in peer.values():
                command = ["ip", "netns", "exec", self.here, "ping", "-c", "1", "-W", "5", str(target)]
                subprocess.run(command, check=True, capture_output=True, timeout=10)

    def unplug(self) -> None:
        ip("-n", self.here, "link", "del", "up0")

    @property
    def index(self) -> int:
        listing = ip("-n", self.here, "-o", "link", "show", "up0")
        return int(listing.partition(":")[0])

    def nft(self, where: str, text: str) -> None:
        command = ["ip", "netns", "exec", where, "nft", "-f", "-"]
        subprocess.run(command, input=text, text=True, check=True, timeout=10)

    def mute(self, on: bool = True) -> None:
        """Make the peer drop what comes in, or stop that."""
        rule = "meta l4proto icmp drop; icmpv6 type echo-request drop;"
        chain = f"chain c {{ type filter hook prerouting priority -300; {rule} }}"
        self.nft(self.there, f"table inet mute {{ {chain}; }}" if on else "delete table inet mute")

    def close(self) -> None:
        for name in (self.here, self.there):
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=10)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)
    return done.stdout


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    try:
        yield pair
    finally:
        pair.close()


def enter(namespace: str) -> None:
    """Move this thread into a namespace (os.setns is younger than Python 3.11)."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(File("/run/netns") / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, 0x40000000) != 0:  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)


def run_in(namespace: str, scene: Callable[[], object]) -> None:
    """Call `scene` in a thread of its own in that namespace; its failure is the test's."""
    failures: list[BaseException] = []

    def body() -> None:
        try:
            enter(namespace)
            scene()
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(60.0)
    assert not thread.is_alive(), "the scene hangs"
    if failures:
        raise failures[0]


def play(pair: Pair, scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30.0):
            await scene()

    run_in(pair.here, lambda: asyncio.run(bounded()))


async def until(condition: Callable[[], object], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.005)


class Bench:
    """A prober with one path, as the daemon would drive it."""

    def __init__(self, pair: Pair, family: Family, probe: Probe, targets: tuple[Address, ...]) -> None:
        self.changes = 0
        self.prober = Prober(MARK, self.changed)
        self.health = Health(probe, targets, time.monotonic())
        self.path = Path("fiber", family, "up0", pair.index, self.health)
        self.key = ("fiber", family)
        self.went_down = False
        self.link(None)

    def changed(self) -> None:
        self.changes += 1
        self.went_down |= self.health.state is State.DOWN

    def link(self, reason: Reason | None) -> None:
        self.health.path(reason, time.monotonic())
        self.prober.follow([self.path])

    def is_(self, state: State) -> Callable[[], bool]:
        return lambda: self.health.state is state

    def has_answered(self, count: int) -> bool:
        return self.answered >= count

    @property
    def answered(self) -> int:
        return self.health._window.tallies[0].resolved - self.health._window.tallies[0].lost


@asynccontextmanager
async def probing(
    pair: Pair, family: Family, probe: Probe = QUICK, targets: tuple[Address, ...] = ()
) -> AsyncIterator[Bench]:
    bench = Bench(pair, family, probe, targets or (PEER[family],))
    task = asyncio.create_task(bench.prober.run())
    try:
        yield bench
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@both
def test_answering_peer_is_up_and_a_silent_one_down_until_it_answers(pair: Pair, family: Family) -> None:
    async def scene() -> None:
        async with probing(pair, family) as bench:
            await until(bench.is_(State.UP))
            await until(lambda: bench.answered >= 10)
            rtt = bench.health.measures().rtt
            assert rtt is not None
            assert 0 < rtt < 0.02
            pair.mute()
            await until(bench.is_(State.DOWN))
            assert bench.health.reason is Reason.PROBES
            assert bench.prober.lost[bench.key] >= QUICK.fall
            pair.mute(False)
            await until(bench.is_(State.UP))
            assert bench.changes == 3
            assert bench.prober.sent.total() > 10
            assert bench.prober.errors == {}

    play(pair, scene)


@both
def test_silent_death_is_seen_within_the_bound(pair: Pair, family: Family) -> None:
    probe = replace(QUICK, interval=0.3, confirm_interval=0.05)
    bound = 0.3 + 0.05 + 2 * 0.05 + 0.2

    async def scene() -> None:
        async with probing(pair, family, probe) as bench:
            await until(lambda: bench.answered >= 2)
            before = time.monotonic()
            pair.mute()
            effective = time.monotonic()  # dead from some moment between these two
            await until(bench.is_(State.DOWN))
            assert bench.health.since - effective <= bound + 0.02
            assert bench.health.since - before >= probe.timeout

    play(pair, scene)


@both
def test_probes_leave_with_the_mark(pair: Pair, family: Family) -> None:
    chain = "chain c { type filter hook output priority 0; meta mark 0x5a000000 drop; }"
    pair.nft(pair.here, f"table inet t {{ {chain}; }}")

    async def scene() -> None:
        async with probing(pair, family) as bench:
            await until(lambda: bench.health.reason is Reason.UNSENDABLE)
            assert bench.health.state is State.STARTING  # no packet was lost: none could be sent
            assert "Operation not permitted" in bench.prober.errors[bench.key]
            assert bench.prober.sent.total() == 0
            pair.nft(pair.here, "delete table inet t")
            await until(bench.is_(State.UP))
            assert bench.prober.errors == {}
            assert bench.changes >= 2

    play(pair, scene)


def test_reply_from_another_address_is_no_answer(pair: Pair) -> None:
    rule = "ip saddr 10.99.0.3 ip saddr set 10.99.0.2; ip6 saddr fd00:99::3 ip6 saddr set fd00:99::2;"
    pair.nft(pair.there, f"table inet s {{ chain c {{ type filter hook output priority -300; {rule} }}; }}")

    async def scene() -> None:
        for family in Family:
            async with probing(pair, family, targets=(OTHER[family],)) as bench:
                await until(bench.is_(State.DOWN))
                assert bench.answered == 0
            async with probing(pair, family, targets=(PEER[family],)) as bench:
                await until(bench.is_(State.UP))

    play(pair, scene)


@both
def test_recreated_device_is_probed_again(pair: Pair, family: Family) -> None:
    async def scene() -> None:
        async with probing(pair, family) as bench:
            await until(bench.is_(State.UP))
            first = pair.index
            pair.unplug()
            await until(lambda: bench.prober.errors)  # we have not been told yet
            assert bench.prober.errors[bench.key].startswith(f"cannot send to {PEER[family]} on up0: ")
            bench.link(Reason.MISSING)
            ip("-n", pair.here, "link", "add", "filler", "type", "veth")  # takes the next index
            pair.plug()
            assert pair.index != first
            bench.path = replace(bench.path, index=pair.index)
            bench.link(None)
            await until(bench.is_(State.UP))
            assert bench.prober.errors == {}

    play(pair, scene)


def test_absent_interface_is_an_error_and_not_an_unbound_socket(pair: Pair) -> None:
    async def scene() -> None:
        async with probing(pair, Family.IPV4) as bench:
            bench.path = replace(bench.path, index=0)
            bench.prober.follow([bench.path])
            await until(lambda: bench.health.reason is Reason.UNSENDABLE)
            assert "No such device" in bench.prober.errors[bench.key]

    play(pair, scene)


def test_following_is_idempotent_and_letting_go_closes(pair: Pair) -> None:
    async def scene() -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        async with probing(pair, Family.IPV4) as bench:
            await until(bench.is_(State.UP))
            pinger = bench.prober._pingers[bench.key]
            opened = pinger._icmp
            bench.prober.follow([bench.path])
            bench.prober.follow([replace(bench.path)])
            assert bench.prober._pingers[bench.key]._icmp is opened
            newer = Health(QUICK, bench.health.targets, time.monotonic(), State.UP)
            newer.path(None, time.monotonic())
            bench.prober.follow([replace(bench.path, health=newer)])  # a reload: other settings, same socket
            await until(lambda: newer.measures().rtt is not None)
            assert pinger._icmp is opened
            bench.prober.follow([])
            assert bench.prober.sent.total() == 0
            assert opened is not None
            assert opened.sock is None
        assert len(os.listdir("/proc/self/fd")) <= descriptors

    play(pair, scene)


@both
def test_busy_loop_does_not_lengthen_round_trips(pair: Pair, family: Family) -> None:
    async def scene() -> None:
        async with probing(pair, family) as bench:
            while bench.answered < 30:
                time.sleep(0.02)  # noqa: ASYNC251 - the stall is the point
                await asyncio.sleep(0.01)
            rtt = bench.health.measures().rtt
            assert rtt is not None
            assert rtt < 0.005

    play(pair, scene)


@pytest.mark.parametrize("stall", [0.25, 0.45, 1.5])
def test_process_that_stood_still_takes_no_path_for_dead(pair: Pair, stall: float) -> None:
    async def scene() -> None:
        async with probing(pair, Family.IPV4, replace(QUICK, fall=1)) as bench:
            await until(bench.is_(State.UP))
            for _ in range(4):
                target = bench.answered + 3
                time.sleep(stall)  # noqa: ASYNC251 - the stall is the point
                await until(partial(bench.has_answered, min(target, 10)))
            assert not bench.went_down
            assert bench.health.transitions == 1
            assert bench.prober.lost.total() == 0

    play(pair, scene)


@both
def test_the_kernel_drops_foreign_replies(pair: Pair, family: Family) -> None:
    cookie = secrets.token_bytes(56)
    kind = ICMPv4Socket if family is Family.IPV4 else ICMPv6Socket

    def scene() -> None:
        ours, sender = kind(), kind()
        filter_replies(ours.sock, family, 4711, cookie)
        ours.sock.settimeout(5.0)
        for identifier, payload in ((4712, cookie), (4711, secrets.token_bytes(56)), (4711, cookie)):
            packet = sender._create_packet(identifier, 7, payload)
            sender.sock.sendto(packet, (str(PEER[family]), 0))
        data = ours.sock.recv(2048)
        assert data.endswith(cookie)
        reply = ours._parse_reply(data, str(PEER[family]), 0.0)
        assert (reply.id, reply.sequence) == (4711, 7)
        ours.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            ours.sock.recv(2048)

    run_in(pair.here, scene)


def test_many_paths_share_their_wake_ups(pair: Pair) -> None:
    async def scene() -> None:
        prober = Prober(MARK, lambda: None)
        turns = 0
        turn = prober._turn

        def counted() -> None:
            nonlocal turns
            turns += 1
            turn()

        prober._turn = counted  # type: ignore[method-assign]
        probe = replace(QUICK, interval=0.2, timeout=0.5)
        healths = [Health(probe, (PEER[Family.IPV4],), time.monotonic()) for _ in range(32)]
        task = asyncio.create_task(prober.run())
        for health in healths:
            health.path(None, time.monotonic())
        prober.follow(Path(f"u{n}", Family.IPV4, "up0", pair.index, h) for n, h in enumerate(healths))
        await until(lambda: prober.sent.total() >= 32 * 6)
        assert all(health.state is State.UP for health in healths)
        assert turns < 3 * 32  # one for the slot and one for lateness, not one for each path
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    play(pair, scene)
