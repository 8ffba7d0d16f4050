"""The daemon's look for conflicts, beside its work; what it finds is in test_conflicts."""

import asyncio
import sys
from types import MappingProxyType

import pytest
from conftest import HEAD, UPLINKS
from test_hooks import Log

import pbrd
from pbrd import config, lookout

CONFIG = f'{HEAD}{UPLINKS}[default]\nvia = ["lte"]\n'


def test_a_package_that_is_gone_is_borne_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an upgrade or a removal leaves a daemon that runs: it has not imported everything yet."""
    monkeypatch.setattr(lookout, "SETTLING", 0.0)
    monkeypatch.setattr(lookout, "PAUSE", 0.0)
    for name in ("conflicts", "machine"):
        monkeypatch.setitem(sys.modules, f"pbrd.{name}", None)
        monkeypatch.delattr(pbrd, name, raising=False)
    log = Log()

    async def look() -> None:
        ours = lookout.Lookout(log)
        task = asyncio.create_task(ours.keep())
        ours.notice(config.parse([("pbrd.toml", CONFIG)]), MappingProxyType({}))
        for _ in range(2):  # it looks a second time when it has told of the first
            ours.work.set()
            async with asyncio.timeout(20):
                while ours.work.is_set():  # noqa: ASYNC110 - it has no other sign
                    await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(look())
    assert log.lines == []
