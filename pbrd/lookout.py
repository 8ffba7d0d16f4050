"""Looks for conflicts with the machine while the daemon runs: what `pbrd check` would warn of becomes a line.

After a start, after a reload, and when rules of others change; beside the loop, in a thread, and not at once:
nothing waits for it. The rulesets of firewalls are left out.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from pbrd.objects import Rule
from pbrd.settings import Config, Family

SETTLING = 2.0  # seconds until a look: who changes one thing changes more
PAUSE = 30.0  # seconds between two looks: rules may change all the time

Foreign = Mapping[Family, frozenset[Rule]]


class Lookout:
    """What was seen and told; `keep` is its task."""

    def __init__(self, log: Any) -> None:
        self.log = log
        self.config: Config | None = None
        self.rules: dict[Family, frozenset[Rule]] = {}
        self.told: frozenset[str] = frozenset()  # under this config
        self.work = asyncio.Event()

    def notice(self, config: Config, rules: Foreign) -> None:
        """Take in what is now; a change is a reason to look. Cheap: called in every turn."""
        if config is not self.config:
            self.config, self.told = config, frozenset()
            self.work.set()
        if any(rules[family] is not self.rules.get(family) for family in rules):
            if rules != self.rules:
                self.work.set()
            self.rules = dict(rules)

    async def keep(self) -> None:
        """Look whenever there is a reason, and tell what is new."""
        while True:
            await self.work.wait()
            await asyncio.sleep(SETTLING)
            self.work.clear()
            config = self.config
            try:
                found = await asyncio.to_thread(_warnings, config) if config else ()
            except ImportError:  # the package was removed or replaced, and who did that ends us, too
                found = ()
            except Exception as error:  # noqa: BLE001 - others' files may hold anything: no reason to end
                found = (f"this machine can't be looked at: {error!r}",)
            self.tell([line for line in found if line not in self.told])
            self.told |= frozenset(found)
            await asyncio.sleep(PAUSE - SETTLING)

    def tell(self, fresh: list[str]) -> None:
        """Tell the first one, and how many there are."""
        if fresh:
            more = f" (and {len(fresh) - 1} more: pbrd check)" if len(fresh) > 1 else ""
            self.log.warning(f"conflict with this machine: {fresh[0]}{more}")


def _warnings(config: Config) -> tuple[str, ...]:
    from pbrd import conflicts, machine  # noqa: PLC0415 - only now: a start waits for nothing of it

    here = machine.look(config, rulesets=False)  # big ones take nft seconds
    return tuple(str(finding) for finding in conflicts.findings(config, here) if not finding.harmless)
