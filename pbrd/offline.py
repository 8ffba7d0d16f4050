"""`pbrd plan` and `pbrd flush` where no daemon runs."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from pbrd import config, names, remarks
from pbrd.errors import ConfigError
from pbrd.judge import Judge
from pbrd.kernel import Kernel
from pbrd.netfilter import table_steps
from pbrd.nftables import Table, digest
from pbrd.objects import KernelState, Key, Standing
from pbrd.plan import diff
from pbrd.routing import adopted_standings, desired, next_hop
from pbrd.rules import keys_of
from pbrd.settings import Config, Daemon
from pbrd.sysctl import Originals

SYSCTLS = "sysctls.json"  # in the runtime directory: the values before pbrd


def plan(path: Path, running: Mapping[Key, Standing] | None = None) -> tuple[list[str], str]:
    """Return what a start with the config at `path` would change in the kernel, and its nftables table.

    `running` are the standings in a running daemon, for the uplinks that it knows.
    """
    fresh = config.load(path)
    kernel = Kernel(fresh)
    try:
        kernel.read()
        current, links, defaults = kernel.state(), kernel.links, kernel.all_defaults()
        standings = adopted_standings(fresh, current) | dict(running or {})
        hops = {}
        for name, family in keys_of(fresh, kernel.families):
            uplink = fresh.uplink(name)
            hops[name, family] = next_hop(uplink, family, links.get(uplink.interface), defaults)
            standings.setdefault((name, family), Standing(usable=True, preferred=True))
        judge = Judge(lambda: None, lambda *_, **__: None)
        table = Table()
        judge.tunnels = kernel.tunnel_marks
        judge.follow(fresh, current, table.chains())
        held = table.holds()
        if held not in (None, digest(judge.text(standings))):
            judge.judge_anew()
        target = desired(judge.current, kernel.families, links, hops, standings, judge.block)
        steps = diff(current, target).lines()
        return [*steps, *table_steps(held, judge.text(standings))], judge.text(standings)
    finally:
        kernel.close()


def originals(runtime_dir: Path, state_dir: Path) -> Originals:
    """Return the sysctls as they were before pbrd, wherever they were written down."""
    return Originals(runtime_dir / SYSCTLS, former=state_dir / SYSCTLS)


def flush(runtime_dir: Path, state_dir: Path, path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Remove what a daemon left behind; return a line for each thing removed, and what else to say of it.

    Names are removed, and kill switches known, where the config at `path` can still be read.
    """
    try:
        current = config.load(path)
    except ConfigError:
        current = Config(Daemon(names=""))
    kernel = Kernel(current, originals(runtime_dir, state_dir))
    try:
        removed = asyncio.run(flush_all(kernel, Table(), current))
        return removed, remarks.opened(current) if removed else ()
    finally:
        kernel.close()


async def flush_all(kernel: Kernel, table: Table, current: Config) -> list[str]:
    """Remove all that pbrd put into the kernel, nftables included; return one line for each thing removed."""
    lines = flush_kernel(kernel, current)
    held = table.holds()
    if held is not None:
        await table.replace("")
    return [*lines, *table_steps(held, "")]


def flush_kernel(kernel: Kernel, current: Config) -> list[str]:
    """Remove all that pbrd put into the kernel, and its names; return one line for each thing removed."""
    kernel.changes.everything = True
    kernel.read()
    removal = diff(kernel.state(), KernelState())
    failed = {id(failure.step) for failure in kernel.apply(removal)}
    lines = [removal.text(step) for step in removal.steps if id(step) not in failed]
    if kernel.originals is not None:
        lines += kernel.originals.restore()
    names.unregister(current)
    kernel.read()
    return lines
