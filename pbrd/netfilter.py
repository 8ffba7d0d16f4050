"""nftables and conntrack as the daemon uses them: one table kept as wanted, connections evicted after it.

Replacing the table takes nft some milliseconds (half a second for 5,000 policies), in which the daemon goes
on: `keep` runs beside the reconcile loop. Meanwhile `settled` is False, and rules are only added: until the
table speaks of the new classes, packets bear the old ones.
"""

import asyncio
import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pbrd.classes import needs_guard
from pbrd.classrules import guard_rule
from pbrd.conntrack import Conntrack, destroy_sockets
from pbrd.errors import KernelError
from pbrd.events import Event, drift_repaired
from pbrd.eviction import Eviction, evictions, gone, stranded
from pbrd.judge import Judge
from pbrd.nftables import Table, digest
from pbrd.objects import Key, Link, LinkAddress, Standing
from pbrd.plan import Plan
from pbrd.settings import Address, Config, Family, Network
from pbrd.units import CGroup, additions, set_of

RETRY = 2.0  # seconds until a refused table is tried again
SWEEPS = (0.1, 1.0, 10.0, 60.0)  # seconds between looks for connections that can't go on after a reload
REST = 0.05  # seconds between two replacements: whoever can start units must not keep us busy


class Netfilter:
    """The table of one network namespace, and its connections."""

    def __init__(
        self, wake: Callable[[], None], again: Callable[[], bool], log: Any, tell: Callable[[Event], None]
    ) -> None:
        """`again` looks at the units again and says whether they have changed; `tell` is told of events."""
        self.wake, self.again, self.log, self.tell = wake, again, log, tell
        self.table = Table()
        self.conntrack = Conntrack()
        self.text = ""
        self.applied: str | None = None  # digest of what the kernel holds
        self.guarding = True  # the guard stands, or may come at once
        self.repairs = 0
        self.lost = False  # others have changed the table, and it is not repaired yet
        self.work = asyncio.Event()
        self.judged: dict[Key, Standing] = {}  # the standings by which connections were last ended
        self.queue: list[tuple[Family, int, int]] = []  # evictions
        self.dead: list[tuple[tuple[Address, ...], tuple[Network, ...]]] = []
        self.ways: set[int] = set()  # interfaces of uplinks, by number
        self.addresses: dict[tuple[str, Family], tuple[LinkAddress, ...]] = {}  # the last ones of interfaces
        self.swept: tuple[Config, int] | None = None  # the policies since when `_sweep` has been at work
        self.sweeping: asyncio.TimerHandle | None = None
        self.recycled: list[tuple[Family, int, int]] = []  # to be evicted before the next replacement
        self.members: Mapping[str, tuple[CGroup, ...]] = {}  # of the sets of units
        self.leaving = asyncio.Event()
        self.one_replacement = asyncio.Lock()  # a reload and `keep` may want the same one

    def adopt(self) -> None:
        """Look what the kernel holds."""
        self.applied = self.table.holds()

    def close(self) -> None:
        """Close the sockets. The table stays."""
        self.table.close()
        self.conntrack.close()

    @property
    def settled(self) -> bool:
        """Whether the kernel holds the table that is wanted."""
        return self.applied == digest(self.text)

    @property
    def replacing(self) -> bool:
        """Whether a replacement is on its way."""
        return self.one_replacement.locked()

    async def quiet(self) -> None:
        """Wait until none is."""
        async with self.one_replacement:
            pass

    def want(self, text: str, recycled: Iterable[Eviction] = ()) -> None:
        """Have the kernel hold the table `text`, soon; forget `recycled` connections before."""
        self.text = text
        self.recycled += [(one.family, one.value, one.mask) for one in recycled]
        if not self.settled:
            self.work.set()

    def restrain(self, plan: Plan, judge: Judge, families: Iterable[Family]) -> Plan:
        """Return what of `plan` may be done now: while another table is on its way, only additions.

        The guard comes behind it, if there was none before. At a start nobody loses anything by it.
        """
        if self.settled:
            judge.in_force()
            self.guarding = bool(self.text) and needs_guard(judge.current)
            return plan
        return plan.additions([guard_rule(judge.current, f) for f in families], hold=not self.guarding)

    def follow_units(self, members: Mapping[str, tuple[CGroup, ...]]) -> None:
        """Put the cgroups of units into their sets at once, and take out those that are gone."""
        before, self.members = self.members, dict(members)
        self.fill()
        for unit, cgroups in before.items():
            gone = {one.id for one in cgroups} - {one.id for one in members.get(unit, ())}
            if gone:
                self._change_set(self.table.take, unit, gone)

    def fill(self) -> None:
        """See that the sets of units hold what they should. Those that aren't there yet come with a table."""
        self.table.stirred = False
        for unit, cgroups in self.members.items():
            if cgroups:
                self._change_set(self.table.put, unit, [one.id for one in cgroups])

    def _change_set(
        self, change: Callable[[str, Iterable[int]], None], unit: str, ids: Iterable[int]
    ) -> None:
        if self.applied is None:
            return
        try:
            change(set_of(unit), ids)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                self.log.warning("set of a unit is not up to date", unit=unit, reason=str(error))
                self.table.stirred = True  # try again in the next turn
                asyncio.get_running_loop().call_later(RETRY, self.wake)

    def listen(self) -> None:
        """Hear of changes from now on; a kernel without nftables is fine until it is needed."""
        with contextlib.suppress(KernelError):
            asyncio.get_running_loop().add_reader(self.table.listen(), self.hear)

    def hear(self) -> None:
        """Take in that something has happened to nftables: our own changes wake nobody."""
        try:
            if self.table.heard():
                self.wake()
        except KernelError:  # the next look will find the same, and say so
            self.wake()

    def look(self) -> None:
        """See whether somebody else was at our table, and have it repaired."""
        if self.table.disturbed():
            before, self.applied = self.applied, self.table.holds()
            if self.applied != before and not self.settled:
                self.lost = True
                self.work.set()
        if self.table.stirred:  # by systemd, say, which fills the sets of units too
            self.fill()

    async def keep(self) -> None:
        """Replace the table whenever it is not the one that is wanted."""
        while True:
            await self.work.wait()
            self.work.clear()
            try:
                await self.settle()
                await asyncio.sleep(REST)
            except KernelError as error:
                self.log.error("nftables table is not in force", reason=str(error))
                asyncio.get_running_loop().call_later(RETRY, self.work.set)

    async def settle(self) -> None:
        """Replace the table until it is the one that is wanted, or must be another. Raises KernelError."""
        async with self.one_replacement:
            await self._settle()
        self.wake()

    async def _settle(self) -> None:
        while not self.settled:
            text = self.text
            recycled, self.recycled = self.recycled, []
            await self.conntrack.evict_beside(recycled)
            there = {unit: found for unit, found in self.members.items() if f"set {set_of(unit)} {{" in text}
            try:
                await self.table.replace(text, additions(there))
            except KernelError:  # a unit may have gone between our look and nft's
                if not self.again():
                    raise
                break
            self.applied = digest(text)
            self.swept = None  # some may have begun while there was no table
            if self.lost:
                self.lost = False
                self.repairs += 1
                self.tell(drift_repaired(["nft table inet pbrd"], self.repairs))
            self.fill()  # what came meanwhile
            if self.table.foreign:  # others were at it meanwhile, and `look` has heard of that already
                self.applied = self.table.holds()
                self.repairs += 1
                await asyncio.sleep(REST)

    def follow_health(
        self, judge: Judge, standings: Mapping[Key, Standing], links: Mapping[str, Link]
    ) -> None:
        """End the connections that can't stay where they are, now that others can take them."""
        # At a start all uplinks count as up until now: nobody has ended connections of one that is down.
        before = self.judged or dict.fromkeys(standings, Standing(usable=True, preferred=True))
        self.judged = dict(standings)
        for link in links.values():  # who goes takes the addresses along before its sockets can be told
            for family in Family:
                if mine := tuple(a for a in link.addresses if a.local.version == family.version):
                    self.addresses[link.name, family] = mine
        names = {uplink.interface for uplink in judge.config.uplinks}
        self.ways |= {link.index for link in links.values() if link.name in names}
        stale, judge.stale = judge.stale, []
        self.evict(stale)
        self.evict(evictions(judge.current, judge.block, before, standings))
        if self.swept != (judge.current, judge.block) or before != self.judged:
            self.swept = (judge.current, judge.block)
            self._sweep(judge.current, iter(SWEEPS))
        if before == self.judged:
            return
        for name, family in stranded(before, standings):
            mine = self.addresses.get((judge.config.uplink(name).interface, family), ())
            self.abandon([a.local for a in mine], [a.prefix for a in mine])

    def _sweep(self, config: Config, pauses: Iterator[float]) -> None:
        """End what has moved and NAT can't follow, as it turns up."""
        if self.sweeping is not None:
            self.sweeping.cancel()
            self.sweeping = None
        if found := gone(config):
            self.evict(found)
            pause = next(pauses, SWEEPS[-1])
            self.sweeping = asyncio.get_running_loop().call_later(pause, self._sweep, config, pauses)

    def evict(self, connections: Iterable[Eviction]) -> None:
        """Forget connections, soon: their next packet begins a new one."""
        self.queue += [(one.family, one.value, one.mask) for one in connections]
        if self.queue:
            self.leaving.set()

    def abandon(self, addresses: Iterable[Address], neighbours: Iterable[Network]) -> None:
        """End this host's own connections from `addresses`, soon, but not those to `neighbours`."""
        self.dead.append((tuple(addresses), tuple(neighbours)))
        self.leaving.set()

    async def expel(self) -> None:
        """Evict and abandon what is asked for, in a thread: the kernel goes through all connections."""
        while True:
            await self.leaving.wait()
            self.leaving.clear()
            queue, self.queue = self.queue, []
            dead, self.dead = self.dead, []
            try:
                # Sockets first: the last they send belongs to a connection that is judged already.
                for addresses, neighbours in dead:
                    await asyncio.to_thread(destroy_sockets, addresses, neighbours, frozenset(self.ways))
                await self.conntrack.evict_beside(queue)
            except KernelError as error:
                self.log.warning("connections are not evicted", reason=str(error))


def table_steps(held: str | None, text: str) -> tuple[str, ...]:
    """Return in one line what happens to our table while the kernel holds that with digest `held`."""
    if held == digest(text):
        return ()
    verb = "del" if not text else "add" if held is None else "replace"
    return (f"nft   {verb} table inet pbrd" + (f" ({text.count(chr(10))} lines)" if text else ""),)
