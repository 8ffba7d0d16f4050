"""Network namespaces: made, entered, changed and removed again. Under the lab, not used by the daemon.

Namespaces are iproute2's (`ip netns add`), so that `ip netns exec` works on them while one looks on.
What has to happen quickly (a link goes down, a rule drops everything) is sent from this process
over a socket that was opened inside beforehand: microseconds, where a fork costs milliseconds.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from pbrd.errors import LabError

RUN = Path("/run/netns")
CLONE_NEWNET = 0x40000000  # linux/sched.h
RTM_NEWLINK, RTM_GETLINK = 16, 18  # linux/rtnetlink.h
IFLA_IFNAME = 3  # linux/if_link.h
IFF_UP = 1  # linux/if.h
IFA_F_TENTATIVE = 0x40  # linux/if_addr.h
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4  # linux/netlink.h
LIBC = ctypes.CDLL(None, use_errno=True)


def missing() -> str:
    """Say why no namespaces can be made on this machine; "" if they can."""
    if os.geteuid() != 0:
        return "needs root (network namespaces): try it with sudo"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"needs the command `{tool}`: install {package}"
    if not Path("/proc/self/ns/net").exists():
        return "needs a kernel with network namespaces (CONFIG_NET_NS)"
    return ""


def create(names: list[str]) -> None:
    """Make all of them with one fork; raises LabError."""
    _ip_batch([], "\n".join(f"netns add {name}" for name in names))


def remove(names: list[str]) -> None:
    """Remove those that exist, and end what still runs in them."""
    names = [name for name in names if (RUN / name).exists()]
    if not names:
        return
    for pid in _pids(names):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    text = "\n".join(f"netns del {name}" for name in names)
    subprocess.run(["ip", "-force", "-batch", "-"], input=text, text=True, capture_output=True, check=False)


def stale(prefix: str) -> list[str]:
    """Name the namespaces `PREFIX-PID-…` whose maker is dead (killed before it could clean up)."""
    with contextlib.suppress(FileNotFoundError):
        found = ((re.match(rf"{prefix}-(\d+)-", name), name) for name in os.listdir(RUN))
        return [name for match, name in found if match and not Path(f"/proc/{match[1]}").exists()]
    return []


def _pids(names: list[str]) -> list[int]:
    """Processes in these namespaces (`ip netns pids`), without this one."""
    inodes = set()
    for name in names:
        with contextlib.suppress(OSError):
            inodes.add(os.stat(RUN / name).st_ino)
    pids = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}/ns/net").st_ino in inodes and pid != os.getpid():
                pids.append(pid)
    return pids


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Put the calling thread into a namespace; sockets opened inside stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(RUN / name, os.O_RDONLY)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def _setns(fd: int) -> None:
    if LIBC.setns(fd, CLONE_NEWNET):
        raise LabError(f"cannot change the network namespace: {os.strerror(ctypes.get_errno())}")


def _ip_batch(options: list[str], text: str) -> None:
    lines = "\n".join(line.strip() for line in text.strip().splitlines())
    done = subprocess.run(
        ["ip", *options, "-batch", "-"], input=lines, text=True, capture_output=True, check=False
    )
    if done.returncode:
        at = re.search(r"-:(\d+)", done.stderr)
        line = lines.splitlines()[int(at[1]) - 1] if at else lines
        raise LabError(f"cannot do `ip {' '.join([*options, line])}`: {done.stderr.strip()}")


class Namespace:
    """One namespace, and the sockets held open in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nft: Nft | None = None
        self._rtnl: socket.socket | None = None

    def ip(self, text: str) -> None:
        """Run lines of `ip` (without that word) in one fork; raises LabError at the first that fails."""
        _ip_batch(["-n", self.name], text)

    def nft(self, text: str) -> str:
        """Run commands of `nft` as one transaction, in this process; returns what they print."""
        if self._nft is None:
            with inside(self.name):
                self._nft = Nft()
        return self._nft.run(text)

    def sysctl(self, values: dict[str, int]) -> None:
        """Write keys below net, spelt as paths: `ipv4/ip_forward`."""
        with inside(self.name):
            for key, value in values.items():
                Path("/proc/sys/net", key).write_text(str(value))

    def index(self, interface: str) -> int:
        """The interface's index here."""
        with inside(self.name):
            return socket.if_nametoindex(interface)

    def set_link(self, interface: str, up: bool) -> None:
        """`ip link set INTERFACE up|down`; done when it returns."""
        reply = self._ask(RTM_NEWLINK, NLM_F_ACK, interface, IFF_UP if up else 0, IFF_UP)
        error = struct.unpack_from("=i", reply, 16)[0]
        if error:
            raise LabError(f"cannot set {interface} {'up' if up else 'down'}: {os.strerror(-error)}")

    def settle(self, within: float = 2.0) -> None:
        """Wait until the kernel's own work is done: carriers known, IPv6 addresses usable.

        Until then it drops the first packets, and their neighbours stay unresolved for a second.
        """
        deadline = time.monotonic() + within
        with inside(self.name):
            for _, interface in socket.if_nameindex():
                self._ask(RTM_GETLINK, 0, interface)  # asking makes linkwatch report at once
            addresses = Path("/proc/thread-self/net/if_inet6")
            while any(int(line.split()[4], 16) & IFA_F_TENTATIVE for line in addresses.open()):
                if time.monotonic() > deadline:
                    raise LabError(f"cannot bring up IPv6 in {self.name}")
                time.sleep(0.001)

    def _ask(self, kind: int, flags: int, interface: str, state: int = 0, mask: int = 0) -> bytes:
        """Send one rtnetlink request about an interface; returns the first reply."""
        if self._rtnl is None:
            with inside(self.name):
                self._rtnl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        name = interface.encode().ljust(16, b"\0")
        body = struct.pack("=BxHiII", 0, 0, 0, state, mask)
        body += struct.pack("=HH", 4 + len(name), IFLA_IFNAME) + name
        header = struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | flags, 1, 0)
        self._rtnl.send(header + body)
        return self._rtnl.recv(1 << 16)

    def close(self) -> None:
        """Let go of the sockets: a namespace lives as long as one is open in it."""
        if self._nft is not None:
            self._nft.close()
        if self._rtnl is not None:
            self._rtnl.close()
        self._nft = self._rtnl = None


class Nft:
    """libnftables, bound to the namespace that it was opened in."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libnftables.so.1")
        except OSError as error:
            raise LabError(f"cannot load libnftables: {error}") from error
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        for function in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(self._library, function).restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._library.nft_ctx_new(0))
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)

    def run(self, text: str) -> str:
        """Run commands; returns their output, raises LabError with nft's own words."""
        failed = self._library.nft_run_cmd_from_buffer(self._context, text.encode())
        output: bytes = self._library.nft_ctx_get_output_buffer(self._context)
        error: bytes = self._library.nft_ctx_get_error_buffer(self._context)
        if failed:
            raise LabError(f"cannot run nft: {error.decode().strip()}")
        return output.decode()

    def close(self) -> None:
        """Free the context; it can't be used any more."""
        self._library.nft_ctx_free(self._context)
