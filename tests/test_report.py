"""Where events go: in order, however many there are at once, with turns of the loop between them."""

import asyncio
from pathlib import Path
from typing import Any

from pbrd.events import Event, started, stopped
from pbrd.report import Sinks

MANY = 5000


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, sentence: str, **_: Any) -> None:
        self.said.append(sentence)

    warning = error = info


def failovers() -> list[Event]:
    return [Event("failover", f"policy {number}", policy=str(number)) for number in range(MANY)]


def told(tmp_path: Path, *, stops: bool = False) -> tuple[list[str], list[int]]:
    """Tell of many failovers, and then of a start (or an end): what was said, and how much at each turn."""
    log, turns = Log(), []

    async def work() -> None:
        sinks = Sinks(tmp_path / "pbrd.toml", tmp_path, dict, log)
        sinks.tell(*failovers())
        sinks.tell(stopped("keep") if stops else started("0", "x"))
        while sinks.waiting:
            turns.append(len(log.said))
            await asyncio.sleep(0)

    asyncio.run(work())
    return [sentence for sentence in log.said if "hook" not in sentence], turns  # nobody works on those here


def test_thousands_of_events_are_told_in_order_and_the_loop_turns_meanwhile(tmp_path: Path) -> None:
    said, turns = told(tmp_path)
    assert said == [*(f"policy {number}" for number in range(MANY)), "pbrd 0 started with x"]
    assert len(set(turns)) > 2
    assert turns == sorted(turns)


def test_the_last_event_waits_for_no_turn(tmp_path: Path) -> None:
    said, turns = told(tmp_path, stops=True)
    assert len(said) == MANY + 1
    assert said[-1].startswith("pbrd stopped")
    assert turns == []
