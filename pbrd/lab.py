"""The lab: a router with several uplinks in network namespaces of its own, and the faults done to it.

    lan ─── router ═══(fiber│lte│…)═══ isp0│isp1│… ─── net

pbrd runs in `router`; `lan` is a client behind it, `net` is the internet. IPv4 and IPv6 alike. Each
provider masquerades on its way to the internet, so the far side tells the uplink by the source
address. Used by `pbrd demo`, by the tests and by the benchmarks; nothing leaves the namespaces.

Links are veth pairs: loss can be made, latency can't (that would take the netem module).
"""

import contextlib
import itertools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from pbrd import netns, topology
from pbrd.errors import LabError
from pbrd.netns import Namespace
from pbrd.packet import Flow, Packet, Tap, open_socket
from pbrd.stream import Stream
from pbrd.topology import LAN, LAN6, TARGETS, TARGETS6, Uplink, completed

__all__ = ["LAN", "LAN6", "TARGETS", "TARGETS6", "Counter", "Lab", "Packet", "Uplink"]

PREFIX = "pbrd"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Counter:
    """Counts in the kernel, exactly, what leaves by each uplink; see `Lab.counter`."""

    chain: str
    providers: dict[str, Namespace]  # by the name of the uplink

    def read(self) -> dict[str, int]:
        """Packets since it was made, by the name of the uplink."""
        counts = {}
        for name, space in self.providers.items():
            found = re.search(r"counter packets (\d+)", space.nft(f"list chain {self.chain}"))
            counts[name] = int(found[1]) if found else 0
        return counts


class Lab:
    """A lab, from `with Lab() as lab:` to the end of the block; raises LabError if none can be built.

    `uplinks`: names, or `Uplink` values where addresses matter. `defaults`: the router's main table has
    default routes over all uplinks with metrics 100, 101 …, as DHCP and router advertisements install
    them. `tag` is put into the names of the namespaces.
    """

    def __init__(
        self,
        uplinks: Sequence[str | Uplink] = ("fiber", "lte"),
        *,
        defaults: bool = True,
        rp_filter: int = 0,
        tag: str = "",
    ) -> None:
        if reason := netns.missing():
            raise LabError(reason)
        self.name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}" + (f"-{tag}" if tag else "")
        self.router, self.lan, self.net = (f"{self.name}-{room}" for room in ("router", "lan", "net"))
        given = [Uplink(u) if isinstance(u, str) else u for u in uplinks]
        self.uplinks = tuple(completed(uplink, k, self.name) for k, uplink in enumerate(given))
        names = [self.router, self.lan, self.net, *(uplink.isp for uplink in self.uplinks)]
        self._spaces = {name: Namespace(name) for name in names}
        self._defaults, self._rp_filter = defaults, rp_filter
        self._indexes, self._counters = itertools.count(100), itertools.count()
        self._children: list[subprocess.Popen[str]] = []
        self._taps: dict[int, Tap] = {}

    def __enter__(self) -> Self:
        netns.remove(netns.stale(PREFIX))
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all that runs in the lab and remove it; may be called twice."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.communicate()
        self._children.clear()
        for tap in self._taps.values():
            tap.close()
        for space in self._spaces.values():
            space.close()
        self._taps.clear()
        netns.remove(list(self._spaces))

    # Building

    def _build(self) -> None:
        netns.create(list(self._spaces))
        for name, space in self._spaces.items():
            rp_filter = self._rp_filter if name == self.router else 0
            strict = {f"ipv4/conf/{which}/rp_filter": rp_filter for which in ("all", "default")}
            space.sysctl(topology.SYSCTLS | strict)
        self.ip(
            self.router,
            f"""link set dev lo up
            link add index {next(self._indexes)} name lan type veth peer name eth0 netns {self.lan}
            addr add 192.168.100.1/24 dev lan
            addr add fd00:100::1/64 dev lan nodad
            link set dev lan up""",
        )
        self.ip(self.lan, topology.lan_config())
        self.ip(self.net, topology.internet_config())
        for k in range(len(self.uplinks)):
            self._build_isp(k)
            self.plug(k)
        for space in self._spaces.values():
            space.settle()

    def _build_isp(self, k: int) -> None:
        uplink = self.uplinks[k]
        self.ip(
            uplink.isp,
            f"""link set dev lo up
            link add name wan type veth peer name isp{k} index {100 + k} netns {self.net}
            {topology.wan_config(uplink, k)}""",
        )
        self.ip(self.net, topology.inbound_config(uplink, k))
        self.nft(uplink.isp, topology.ISP_RULES)

    def plug(self, k: int) -> None:
        """Make the link of uplink k (again), with a new interface index, and configure both ends."""
        uplink = self.uplinks[k]
        index = next(self._indexes)
        self.ip(
            self.router,
            f"link add index {index} name {uplink.interface} type veth peer name gw netns {uplink.isp}",
        )
        # linkwatch reports a carrier loss at once only where the two indexes differ; else up to 1 s late
        if self._spaces[uplink.isp].index("gw") == index:
            raise LabError(f"cannot build {uplink.name}: both ends of the link have index {index}")
        if uplink.point_to_point:
            # Without ARP the kernel addresses frames to the sender's own MAC: so both ends have the same.
            for space, interface in ((uplink.isp, "gw"), (self.router, uplink.interface)):
                self.ip(
                    space, f"link set dev {interface} arp off addrgenmode none address 02:00:00:00:00:{k:02x}"
                )
        self.ip(uplink.isp, "link set dev gw up\n" + topology.gateway_config(uplink))
        self.ip(self.router, f"link set dev {uplink.interface} up\n" + self._interface_config(k))
        self.nft(uplink.isp, topology.MUTE_RULES)
        for name in (uplink.isp, self.router):
            self._spaces[name].settle()

    def _interface_config(self, k: int) -> str:
        return topology.interface_config(self.uplinks[k], k, self._defaults)

    def unplug(self, k: int) -> None:
        """Make the interface of uplink k vanish, as a USB modem does."""
        self.ip(self.router, f"link del dev {self.uplinks[k].interface}")

    # Acting inside

    def ip(self, space: str, text: str) -> None:
        """Run lines of `ip` (without that word) in a namespace; raises LabError at the first that fails."""
        self._spaces[space].ip(text)

    def nft(self, space: str, text: str) -> str:
        """Run commands of `nft` as one transaction in a namespace; returns what they print."""
        return self._spaces[space].nft(text)

    def inside(self, space: str) -> contextlib.AbstractContextManager[None]:
        """Put the calling thread into a namespace; sockets opened inside stay there."""
        return netns.inside(space)

    def run(self, space: str, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a namespace to its end, its output caught as text."""
        command = ["ip", "netns", "exec", space, *argv]
        return subprocess.run(command, text=True, capture_output=True, check=check)

    def spawn(
        self, space: str, argv: Sequence[str], *, cgroups: bool = True, **popen: Any
    ) -> subprocess.Popen[str]:
        """Start a command in a namespace; its pid is the command's own, and it is killed with the lab.

        With `cgroups` it sees those of the machine: a namespace has none of its own.
        """
        # `ip netns exec` mounts a /sys of the namespace, without cgroups: policies with `unit` need them
        mount = "mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null; " if cgroups else ""
        command = ["ip", "netns", "exec", space, "sh", "-c", f'{mount}exec "$@"', "sh", *argv]
        child = subprocess.Popen(command, text=True, **popen)
        self._children.append(child)
        return child

    # Faults of uplink k

    def carrier(self, k: int, up: bool) -> None:
        """Pull the cable at the provider's end, or put it back."""
        uplink = self.uplinks[k]
        self._spaces[uplink.isp].set_link("gw", up)
        if up:  # routes and IPv6 addresses went with the link
            self.ip(uplink.isp, topology.gateway_config(uplink))
            self._spaces[uplink.isp].settle()

    def admin(self, k: int, up: bool) -> None:
        """`ip link set … down` on the router, or up again with the addresses and routes that it took away."""
        self._spaces[self.router].set_link(self.uplinks[k].interface, up)
        if up:
            self.ip(self.router, self._interface_config(k))
            self._spaces[self.router].settle()

    def silence(self, k: int, on: bool = True) -> None:
        """Let the uplink die upstream: the gateway still answers, nothing is forwarded."""
        self._fault(k, "inet fault silence", "drop" if on else "")

    def mute_gateway(self, k: int, on: bool = True) -> None:
        """Let the gateway answer nothing, not even ARP, while the carrier stays."""
        for chain in ("netdev fault mute", "inet fault mute"):
            self._fault(k, chain, "drop" if on else "")

    def loss(self, k: int, percent: float) -> None:
        """Lose this share of the packets that leave by uplink k, at random; 0 ends it."""
        rule = f'iifname "gw" numgen random mod 10000 < {round(percent * 100)} drop'
        self._fault(k, "inet fault loss", rule if percent else "")

    def _fault(self, k: int, chain: str, rule: str) -> None:
        add = f"\nadd rule {chain} {rule}" if rule else ""
        self._spaces[self.uplinks[k].isp].nft(f"flush chain {chain}{add}")

    # Packets

    def counter(self, match: str) -> Counter:
        """Count the packets that leave by each uplink from now on, and match an nft(8) expression.

        They are counted where they reach the provider: as the router sent them, before any NAT or fault.
        """
        chain = f"inet count c{next(self._counters)}"
        for uplink in self.uplinks:
            self.nft(
                uplink.isp,
                f"""add chain {chain} {{ type filter hook prerouting priority -310; }}
                add rule {chain} iifname "gw" {match} counter""",
            )
        return Counter(chain, {uplink.name: self._spaces[uplink.isp] for uplink in self.uplinks})

    def flow(self, packet: Packet, *, local: bool = False) -> Flow:
        """Open a flow from the LAN client (`local`: from the router itself); the caller closes it.

        Raises OSError if the packet's source or device does not exist there.
        """
        tap = self._taps.get(packet.family)
        if tap is None:
            tap = self._taps[packet.family] = Tap(self.net, packet.family)
        names = {f"isp{k}": uplink.name for k, uplink in enumerate(self.uplinks)}
        return Flow(self.router if local else self.lan, packet, tap, names)

    def exit_of(self, *, local: bool = False, within: float = 1.0, **packet: Any) -> str | None:
        """Send one packet of a new flow to the internet: by which uplink does it arrive? None = nowhere.

        The keywords are the fields of `Packet`; `dst` is the first target unless it is given.
        """
        src = str(packet.get("src", ""))
        packet.setdefault("dst", TARGETS6[0] if ":" in src else TARGETS[0])
        with contextlib.closing(self.flow(Packet(**packet), local=local)) as flow:
            return flow.exit(within)

    def traffic(self, rate: int = 1000, *, local: bool = False, port: int = 0, **packet: Any) -> Stream:
        """Start a stream of UDP packets, `rate` a second, to an echo server in the internet.

        From the LAN client's first address, or from the router itself (`local`). The keywords are the
        fields of `Packet`; `port` is the server's (0: any).
        """
        packet.setdefault("src", "" if local else LAN6[0] if ":" in str(packet.get("dst", "")) else LAN[0])
        packet.setdefault("dst", TARGETS6[0] if ":" in str(packet["src"]) else TARGETS[0])
        server = open_socket(self.net, Packet(dst=packet["dst"], src=packet["dst"], sport=port))
        client = open_socket(self.router if local else self.lan, Packet(**packet))
        names = {address: uplink.name for uplink in self.uplinks for address in (uplink.wan, uplink.wan6)}
        stream = Stream(client, server, rate, names)
        self._children += stream.workers
        return stream
