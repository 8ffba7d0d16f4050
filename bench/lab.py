"""The lab: a multi-homed router in network namespaces, and the faults done to it.

  pb-lan --- pb-host ===(fiber|lte|up2..)=== pb-ispK --- pb-net (the targets)

Everything is made with iproute2 and libnftables; nothing leaves the namespaces.
Faults are injected in-process (netlink socket / libnftables handle opened in the
namespace beforehand), so that the injection costs microseconds, not a fork.
"""

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import time

LIBC = ctypes.CDLL(None, use_errno=True)
NFT = ctypes.CDLL("libnftables.so.1")
NFT.nft_ctx_new.restype = ctypes.c_void_p
TARGETS = ("203.0.113.10", "198.51.100.10")
LAN = ("192.168.100.10", "192.168.100.11")  # two sources, one ip rule each
TABLE = 100  # the table under test
IFF_UP = 1


def setns(name):
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if LIBC.setns(fd, 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {name}")
    finally:
        os.close(fd)


@contextlib.contextmanager
def in_ns(name):
    """Sockets and libnftables handles opened inside stay in that namespace."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    setns(name)
    try:
        yield
    finally:
        LIBC.setns(home, 0x40000000)
        os.close(home)


class Uplink:
    def __init__(self, lab, k):
        self.k, self.name = k, ("fiber", "lte")[k] if k < 2 else f"up{k}"
        self.isp = f"{lab.prefix}isp{k}"
        self.addr, self.gw = f"10.0.{k + 1}.2", f"10.0.{k + 1}.1"
        self.wan = f"100.64.{k + 1}.2"  # what pb-net sees after masquerading


class Lab:
    def __init__(self, tag="", uplinks=2):
        self.prefix = f"pb-{tag}{'-' if tag else ''}"
        self.host, self.lan, self.net = (self.prefix + n for n in ("host", "lan", "net"))
        self.uplinks = [Uplink(self, k) for k in range(uplinks)]
        self.all = [self.host, self.lan, self.net] + [u.isp for u in self.uplinks]
        self.handles = {}

    def ip(self, ns, text, check=True):
        lines = "\n".join(line.strip() for line in text.strip().splitlines())
        return subprocess.run(
            ["ip", "-n", ns, "-force", "-batch", "-"],
            input=lines,
            text=True,
            check=check,
            stderr=None if check else subprocess.DEVNULL,
        )

    def nft(self, ns, text):
        if ns not in self.handles:
            with in_ns(ns):
                self.handles[ns] = ctypes.c_void_p(NFT.nft_ctx_new(0))
        if NFT.nft_run_cmd_from_buffer(self.handles[ns], text.encode()):
            raise RuntimeError(f"nft {ns}: {text}")

    def sysctl(self, ns, **values):
        with in_ns(ns):
            for key, value in values.items():
                with open("/proc/sys/net/ipv4/" + key.replace("__", "/"), "w") as f:
                    f.write(str(value))

    def up(self):
        self.down()
        for ns in self.all:
            subprocess.run(["ip", "netns", "add", ns], check=True)
            self.ip(ns, "link set lo up")
            self.sysctl(ns, ip_forward=1, conf__all__rp_filter=0, conf__all__send_redirects=0)
        self.ip(
            self.host,
            f"""link add lan type veth peer name eth0 netns {self.lan}
            addr add 192.168.100.1/24 dev lan
            link set lan up""",
        )
        self.ip(
            self.lan,
            f"""addr add {LAN[0]}/24 dev eth0
            addr add {LAN[1]}/24 dev eth0
            link set eth0 up
            route add default via 192.168.100.1""",
        )
        for target in TARGETS:
            self.ip(self.net, f"addr add {target}/32 dev lo")
        for u in self.uplinks:
            self.ip(
                self.host,
                f"""link add {u.name} type veth peer name gw netns {u.isp}
                addr add {u.addr}/24 dev {u.name}
                link set {u.name} up""",
            )
            self.ip(
                u.isp,
                f"""link add wan type veth peer name {u.name} netns {self.net}
                addr add {u.gw}/24 dev gw
                addr add {u.wan}/24 dev wan
                link set gw up
                link set wan up
                route add default via 100.64.{u.k + 1}.1
                route add 192.168.100.0/24 via {u.addr}""",
            )
            self.ip(
                self.net,
                f"""addr add 100.64.{u.k + 1}.1/24 dev {u.name}
                link set {u.name} up""",
            )
            self.nft(
                u.isp,
                """
                table ip nat { chain post { type nat hook postrouting priority 100;
                                            oifname "wan" masquerade; }; }
                table inet fault { chain path { type filter hook forward priority -10; }; }
                table netdev fault { chain in { type filter hook ingress device "gw" priority 0; }; }
                """,
            )
            # linkwatch handles a veth's carrier loss at once only if the ifindexes differ
            with in_ns(self.host):
                mine = socket.if_nametoindex(u.name)
            with in_ns(u.isp):
                assert mine != socket.if_nametoindex("gw")
            self.ip(self.host, f"rule add from {u.addr} lookup {TABLE + 1 + u.k} priority {200 + u.k}")
        for i, source in enumerate(LAN):
            self.ip(self.host, f"rule add from {source} lookup {TABLE} priority {100 + i}")
        self.base_routes()

    def base_routes(self):
        """What the system's network configuration would (re)install: probes need it."""
        for u in self.uplinks:
            self.ip(
                self.host,
                f"""route replace default via {u.gw} dev {u.name} table {TABLE + 1 + u.k}
                route replace default via {u.gw} dev {u.name} metric {100 + u.k}""",
            )
        # without a usable uplink, table 100 must not fall through to main
        self.ip(self.host, f"route replace unreachable default metric 4278198272 table {TABLE}")

    def down(self):
        have = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, check=True, text=True
        ).stdout.split()
        for ns in self.all:
            if ns in have:
                subprocess.run(["ip", "netns", "del", ns], check=True)
        self.handles.clear()

    def set_link(self, ns, dev, up):
        key = (ns, "rtnl")
        if key not in self.handles:
            with in_ns(ns):
                self.handles[key] = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        with in_ns(ns):
            index = socket.if_nametoindex(dev)
        msg = struct.pack("=IHHII BxHiII", 32, 16, 5, 1, 0, 0, 0, index, IFF_UP if up else 0, IFF_UP)
        start = time.monotonic_ns()
        self.handles[key].send(msg)  # RTM_NEWLINK, acked when done
        error = struct.unpack_from("=i", self.handles[key].recv(4096), 16)[0]
        if error:
            raise OSError(-error, f"set {dev} {up}")
        return start

    def fault(self, kind, k=0):
        """carrier | admin | blackhole | gateway | loss on uplink k; returns the time it began."""
        u, start = self.uplinks[k], time.monotonic_ns()
        if kind == "carrier":
            return self.set_link(u.isp, "gw", False)
        if kind == "admin":
            return self.set_link(self.host, u.name, False)
        self.nft(
            u.isp,
            {
                "blackhole": "add rule inet fault path drop",  # gateway still answers
                "gateway": "add rule netdev fault in drop",  # not even ARP, carrier stays
                "loss": 'add rule inet fault path iifname "gw" numgen random mod 100 < 30 drop',
            }[kind],
        )
        return start

    def heal(self, kind, k=0):
        u, start = self.uplinks[k], time.monotonic_ns()
        if kind == "carrier":
            start = self.set_link(u.isp, "gw", True)
            # the ISP router's own configuration: its routes over gw went with the link
            self.ip(u.isp, f"route replace 192.168.100.0/24 via {u.addr}")
        elif kind == "admin":
            start = self.set_link(self.host, u.name, True)
            self.base_routes()
        else:
            self.nft(u.isp, "flush chain inet fault path\nflush chain netdev fault in")
        return start
