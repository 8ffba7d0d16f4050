"""Policies with times: on at their hour, off after it, with the classes that live connections have."""

from datetime import datetime

from pbrd.config import parse
from pbrd.effective import effective, is_on, renumbered

TEXT = """
[uplinks.fiber]
interface = "fiber"
[uplinks.lte]
interface = "lte"
[uplinks.a-b]
interface = "ab"
[uplinks.a]
interface = "a"
[[policies]]
name = "night"
match = { from = "10.0.0.1", time = "23:00-05:00", days = ["fri"] }
via = ["lte"]
[[policies]]
name = "always"
match = { from = "10.0.0.2" }
via = ["lte"]
"""
CONFIG = parse([("pbrd.toml", TEXT)])


def names(when: str, *slices: str) -> list[str]:
    return [policy.name for policy in effective(CONFIG, datetime.fromisoformat(when), slices).policies]


def test_a_policy_holds_at_its_time_only() -> None:
    night = CONFIG.policies[0]
    assert is_on(night, datetime.fromisoformat("2026-11-20T23:30:00"))  # a Friday
    assert is_on(night, datetime.fromisoformat("2026-11-21T04:59:59"))
    assert not is_on(night, datetime.fromisoformat("2026-11-21T05:00:00"))
    assert names("2026-11-21T12:00:00") == ["always"]
    assert names("2026-11-20T23:00:00") == ["night", "always"]


def test_slices_that_exist_come_first_and_the_deeper_one_before_that_it_lies_in() -> None:
    found = names("2026-11-21T12:00:00", "uplink-a.slice", "uplink-a-b.slice")
    assert found == ["uplink-a-b.slice", "uplink-a.slice", "always"]


def test_uplinks_keep_their_numbers_and_new_ones_take_the_free() -> None:
    made = renumbered(CONFIG, {"lte": 0, "a": 7})
    assert {uplink.name: uplink.index for uplink in made.uplinks} == {"lte": 0, "a": 7, "fiber": 1, "a-b": 2}
