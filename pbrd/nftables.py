"""The one nftables table, `inet pbrd`: replaced as a whole, recognised after a restart, watched.

A child `nft -f -` makes the changes. libnftables inside the daemon would be quicker (1 ms instead of 20
for ten rules), but 5,000 rules would stop the loop for 200 ms and leave 20 MiB behind.

A replacement keeps the base chains. Were the table deleted and made again in one transaction, the kernel
would for some milliseconds ask both tables' chains, the old ones last and with their maps already empty;
base chains that stay get their new rules all at once.

What lies in the kernel proves itself. The first and the last thing a replacement makes are the empty chains
`begun` and `applied_DIGEST`, and the kernel numbers the parts of a table (handles) as they are made: as long
as those between these two have no gap, and none is higher, nobody has added or removed a part since. This
needs neither a state file nor a comparison of texts, which nft prints differently with every version. It
does not see what others do to elements of sets, to the policy of a chain, or to a rule by `nft replace`,
which keeps its handle: these are known from events, so not if they happened while no daemon ran.

The sets of units (`units.set_of`) stay too, with their elements: systemd puts cgroups into them as units
start (NFTSet=), and one that it adds during a replacement must not get lost. So their elements are no part of
the text, and others may change them: `stirred` says so, and `put` adds ours again. Their type is one for all
time; another one needs another name.
"""

import asyncio
import errno
import hashlib
import os
import re
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Final

from pbrd import elements
from pbrd.errors import KernelError
from pbrd.netlink import (
    ANSWER_LIMIT,
    EVENT_BUFFER,
    HEADER,
    NETLINK_ADD_MEMBERSHIP,
    SO_RCVBUFFORCE,
    SOL_NETLINK,
    Requests,
    messages_in,
)
from pbrd.units import SET

CHANGED: Final = "changed"  # what `holds` says of a table that is no longer as we made it
DEADLINE = 60.0  # seconds; 5,000 rules take 0.5, and a router may be thirty times slower
NO_TABLE = "table inet pbrd {}; delete table inet pbrd\n"  # the first half: the second must find something
BEGUN, SEAL = "begun", "applied_"
EXCERPT = 160  # characters of an offending line

NETLINK_NETFILTER = 12
NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
NFPROTO_INET = 1  # linux/netfilter.h
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
# linux/netfilter/nf_tables.h; types stand above the subsystem NFNL_SUBSYS_NFTABLES
SUBSYSTEM = 10 << 8
NFT_MSG_GETTABLE, NFT_MSG_GETCHAIN, NFT_MSG_GETSET, NFT_MSG_NEWGEN, NFT_MSG_GETGEN = 1, 4, 10, 15, 16
NFTA_TABLE_FLAGS, NFT_TABLE_F_DORMANT = 2, 1
NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_GEN_PROC_PID = 3, 4, 2
NFTA_SET_NAME, NFTA_SET_FLAGS, NFT_SET_ANONYMOUS, NFT_SET_MAP = 2, 3, 1, 8
# What has a handle: requests for chains, rules, sets, objects, flowtables, and NFTA_…_HANDLE in the answers.
HANDLES = ((NFT_MSG_GETCHAIN, 2), (7, 3), (NFT_MSG_GETSET, 16), (19, 6), (23, 5))
ATTRIBUTE = struct.Struct("=HH")
NAMED = struct.pack("=HH5s3x", 9, 1, b"pbrd\0")  # attribute 1 is the table's name, the first in every message


@lru_cache(maxsize=2)  # asked several times a turn, and a text may have megabytes
def digest(text: str) -> str | None:
    """Return what `Table.holds` says while the kernel has this text; None for the empty one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None


class Table:
    """Our table in the network namespace in which this was made; `nft` runs in that of the calling thread."""

    def __init__(self) -> None:
        self.requests: Requests | None = None
        self.events: socket.socket | None = None
        with suppress(KernelError):  # without netfilter: it holds nothing, and `replace` will complain
            self.requests = Requests(NETLINK_NETFILTER)
        self.own: set[int] = set()  # processes of ours that are changing the table
        self.pids_tell = True
        self.named = False  # events of a transaction that is not complete yet name our table
        self.foreign = False  # somebody else changed our table since we last replaced it
        self.again = False  # the next `disturbed` is true
        self.touched = False  # such events change elements of units' sets
        self.stirred = False  # somebody else changed those since this was last set to False
        self.held: str | None = None  # what `holds` said last, or what was made since

    def close(self) -> None:
        """Close the sockets. The table stays."""
        if self.requests is not None:
            self.requests.close()
        if self.events is not None:
            self.events.close()

    # --- writing ------------------------------------------------------------------------------

    async def replace(self, text: str, members: str = "") -> None:
        """Make the kernel hold exactly the table that `text` describes, in one transaction; "" is none.

        Packets see the old table or the new one. Contents that rules and `update` put into sets are lost,
        but for the sets of units; the commands `members` add to these in the same transaction.
        Raises KernelError with nft's own words and the line they are about; then nothing has changed.
        """
        seal = f"add chain inet pbrd {SEAL}{digest(text)}\n"
        script = f"table inet pbrd {{ chain {BEGUN} {{}}; }}\n{text}\n{members}{seal}" if text else ""
        self._drain()
        before, self.foreign = self.foreign, False
        ours = self.held not in (None, CHANGED) and not before
        try:
            if ours and text:
                await self._run(self._emptied(text) + script)
            else:
                if ours:  # the kernel asks its chains until it is gone: they must have nothing to say before
                    await self._run("flush table inet pbrd\n")
                await self._run(NO_TABLE + script)
        except BaseException:
            self.foreign |= before
            raise
        self.held = digest(text)

    def _emptied(self, text: str) -> str:
        """Return what empties our table but for the base chains and units' sets that `text` has too.

        So a base chain of another hook or priority needs another name.
        """
        stay = set(re.findall(r"chain (\S+) \{\n\s*type ", text))
        filled = set(re.findall(rf"set ({SET}\S+) \{{", text))
        script = ["flush table inet pbrd"]
        for message in self._parts(NFT_MSG_GETSET):
            flags = _number(message, NFTA_SET_FLAGS)
            if not flags & NFT_SET_ANONYMOUS and _name(message, NFTA_SET_NAME) not in filled:
                kind = "map" if flags & NFT_SET_MAP else "set"
                script.append(f"delete {kind} inet pbrd {_name(message, NFTA_SET_NAME)}")
        for message in self._parts(NFT_MSG_GETCHAIN):
            name = _name(message, NFTA_CHAIN_NAME)
            if name not in stay or not _attribute(message, NFTA_CHAIN_HOOK):
                script.append(f"delete chain inet pbrd {name}")
        return "\n".join(script) + "\n"

    async def update(self, text: str) -> None:
        """Run commands that change elements (`add element`, `flush set`) as one transaction.

        Rules and chains are for `replace`: `holds` would take them for a change by others. Raises
        KernelError; then nothing has changed.
        """
        await self._run(text)

    def put(self, name: str, cgroups: Iterable[int]) -> None:
        """Add cgroups to a unit's set at once, without nft(8); raises KernelError, ENOENT without the set."""
        self._change(elements.addition("pbrd", name, cgroups))

    def take(self, name: str, cgroups: Iterable[int]) -> None:
        """Take cgroups out of a unit's set, of those that are still in it. Raises KernelError."""
        for cgroup in cgroups:  # one that is missing would fail them all
            try:
                self._change(elements.removal("pbrd", name, [cgroup]))
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise

    def _change(self, message: bytes) -> None:
        if self.requests is None:
            raise KernelError("cannot change nftables: the kernel has none", errno.ENOENT)
        self._drain()
        we = threading.get_native_id()
        self.own.add(we)
        try:
            self.requests.transaction(elements.BEGIN, message, elements.END)
        finally:
            self._drain()
            self.own.discard(we)

    async def _run(self, script: str) -> None:
        self._drain()
        try:
            nft = await asyncio.create_subprocess_exec(
                "nft",
                "-f",
                "-",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except FileNotFoundError as error:
            raise KernelError(
                "cannot change nftables: nft is not installed (apt-get install nftables)", errno.ENOENT
            ) from error
        except OSError as error:
            raise KernelError(
                f"cannot change nftables: nft does not start: {error.strerror}", error.errno or 0
            ) from error
        self.own.add(nft.pid)
        try:
            async with asyncio.timeout(DEADLINE):
                _, complaint = await nft.communicate(script.encode())
        except TimeoutError as error:
            raise KernelError(
                f"cannot change nftables: nft takes longer than {DEADLINE:g} s", errno.ETIMEDOUT
            ) from error
        finally:
            if nft.returncode is None:
                nft.kill()
                await nft.wait()
            self._drain()  # its events lie in the buffer since before it ended; the pid may be used again
            self.own.discard(nft.pid)
        if nft.returncode:
            raise KernelError(f"cannot change nftables: {_words(complaint.decode(errors='replace'), script)}")

    # --- reading ------------------------------------------------------------------------------

    def holds(self) -> str | None:
        """Say which text the kernel has: its `digest`, None without a table, CHANGED if others were at it.

        Takes 0.3 ms, with 5,000 rules 40 ms, most of them in the kernel. Raises KernelError.
        """
        self.held = self._holds()
        return self.held

    def chains(self) -> tuple[str, ...]:
        """Return the names of our table's chains; () without a table. Raises KernelError."""
        if self.requests is None:
            return ()
        try:
            return tuple(_name(message, NFTA_CHAIN_NAME) for message in self._parts(NFT_MSG_GETCHAIN))
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL):
                return ()
            raise

    def _holds(self) -> str | None:
        if self.requests is None:
            return None
        try:
            table = self.requests.dump(_request(NFT_MSG_GETTABLE, NAMED, dump=False))[0]
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL):  # EINVAL: a kernel without nf_tables
                return None
            raise
        if self.foreign or _number(table, NFTA_TABLE_FLAGS) & NFT_TABLE_F_DORMANT:
            return CHANGED
        try:
            return self._sealed() or CHANGED
        except KernelError as error:
            if error.errno == errno.EINTR:  # others write without a pause; rather once too often
                return CHANGED
            raise

    def _sealed(self) -> str | None:
        """Return the digest, if the handles prove that it is still true."""
        handles: list[int] = []
        kept: set[int] = set()  # base chains and units' sets, which may be older than the rest
        begun, seals = 0, dict[int, str]()
        for kind, attribute in HANDLES:
            for message in self._parts(kind):
                handle = _number(message, attribute)
                handles.append(handle)
                if kind == NFT_MSG_GETCHAIN:
                    name = _name(message, NFTA_CHAIN_NAME)
                    begun = handle if name == BEGUN else begun
                    if name.startswith(SEAL):
                        seals[handle] = name[len(SEAL) :]
                    if _attribute(message, NFTA_CHAIN_HOOK):
                        kept.add(handle)
                elif kind == NFT_MSG_GETSET and _name(message, NFTA_SET_NAME).startswith(SET):
                    kept.add(handle)
        made = sorted(handle for handle in handles if handle >= begun)
        older = [handle for handle in handles if handle < begun and handle not in kept]
        if begun and not older and len(seals) == 1 and made == list(range(begun, begun + len(made))):
            return seals.get(made[-1])
        return None

    def _parts(self, kind: int) -> Iterator[bytes]:
        """Yield the parts of our table: chains are not filtered by the kernel."""
        assert self.requests is not None  # noqa: S101 - `holds` has looked
        return (m for m in self.requests.dump(_request(kind, NAMED)) if m[20:32] == NAMED)

    # --- events -------------------------------------------------------------------------------

    def listen(self) -> int:
        """Subscribe to changes, before the first `holds`; return the file descriptor to wait for.

        Raises KernelError. No socket filter: the kernel packs some sixty changes into a datagram, and a
        foreign transaction with 20,000 elements costs 2 ms to skip.
        """
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            self.events = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
            self.events.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, EVENT_BUFFER)
            self.events.bind((0, 0))
            self.events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
        except OSError as error:
            raise KernelError(f"cannot hear nftables' events: {error.strerror}", error.errno or 0) from error
        self.pids_tell = self._sees_own_pid()
        return self.events.fileno()

    def _sees_own_pid(self) -> bool:
        """Say whether the pids in events are those that we know: in a PID namespace they are not.

        There, whatever is committed while a process of ours runs counts as ours.
        """
        if self.requests is None:
            return False
        answer = self.requests.dump(_request(NFT_MSG_GETGEN, b"", dump=False))[0]
        return _number(answer, NFTA_GEN_PROC_PID) == threading.get_native_id()

    def heard(self) -> bool:
        """Take the waiting events in; say whether they are a reason to look, as our own are not."""
        self._drain()
        return self.again or self.stirred

    def disturbed(self) -> bool:
        """Take the waiting events in; say whether to look again (`holds`): others may have been at our table.

        Our own transactions don't count. After an overflow it is true. Raises KernelError.
        """
        self._drain()
        again, self.again = self.again, False
        return again

    def _drain(self) -> None:
        if self.events is None:
            return
        while True:
            try:
                data = self.events.recv(ANSWER_LIMIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(
                        f"cannot hear nftables' events: {os.strerror(error.errno or 0)}", error.errno or 0
                    ) from error
                self.named, self.again, self.stirred = False, True, True
                continue
            self._take(data)

    def _take(self, data: bytes) -> None:
        """Take in a datagram: changes, or NFT_MSG_NEWGEN, which ends a transaction and says whose it was."""
        if HEADER.unpack_from(data)[1] == SUBSYSTEM | NFT_MSG_NEWGEN:
            ours = _number(data, NFTA_GEN_PROC_PID) in self.own if self.pids_tell else bool(self.own)
            if self.named and not ours:
                self.foreign = self.again = True
            self.stirred |= self.touched and not ours
            self.named = self.touched = False
        elif not self.named and NAMED in data:
            for kind, _, _, message in messages_in(data):
                if message[16] == NFPROTO_INET and message[20:32] == NAMED:
                    members = kind & 0xFF in elements.CHANGES and _name(message, NFTA_SET_NAME).startswith(
                        SET
                    )
                    self.touched |= members
                    self.named |= not members


def _request(kind: int, body: bytes, *, dump: bool = True) -> bytes:
    body = struct.pack("=BBH", NFPROTO_INET, 0, 0) + body
    flags = NLM_F_REQUEST | (NLM_F_DUMP if dump else 0)
    return HEADER.pack(16 + len(body), SUBSYSTEM | kind, flags, 0, 0) + body


def _attribute(message: bytes, wanted: int) -> bytes:
    """Return what an attribute holds, b"" if it is missing. The short ones stand before the long ones."""
    offset = 20
    while offset + 4 <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, offset)
        if kind & 0x3FFF == wanted:
            return message[offset + 4 : offset + length]
        if length < 4:
            break
        offset += (length + 3) & ~3
    return b""


def _name(message: bytes, wanted: int) -> str:
    return _attribute(message, wanted).rstrip(b"\0").decode(errors="replace")


def _number(message: bytes, wanted: int) -> int:
    return int.from_bytes(_attribute(message, wanted), "big")


def _words(complaint: str, script: str) -> str:
    """Return what nft says first, with the line of `script` that it is about."""
    found = re.search(r":(\d+):(\d+)-[\d:]+: Error: (.+)", complaint)
    if found is None:
        return complaint.strip() or "nft says nothing"
    lines, number, column = script.splitlines(), int(found[1]), int(found[2])
    if not 0 < number <= len(lines):  # what comes from the kernel as a whole has no line
        return found[3]
    line = lines[number - 1]
    start = max(0, column - EXCERPT // 2) if len(line) > EXCERPT else 0
    return f"{found[3]}, in: {line[start : start + EXCERPT].strip()}"
