"""What a reload says of a config that has changed."""

import pytest

from pbrd.changes import between
from pbrd.config import parse
from pbrd.effective import renumbered
from pbrd.settings import Config

TEXT = """
[uplinks.fiber]
interface = "eth0"
[uplinks.lte]
interface = "eth1"
probe = { interval = "2s" }
[[policies]]
name = "backups"
match = { from = ["192.168.1.100"] }
via = ["lte", "fiber"]
[[policies]]
name = "web"
match = { proto = "tcp", dport = 443 }
via = ["fiber"]
"""


def of(text: str) -> Config:
    return parse([("a.toml", text)], read_text=lambda _: "10.0.0.0/8")


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("", "", []),
        ('interval = "2s"', 'interval = "3s", fall = 5', ["uplink lte: probe.interval, probe.fall"]),
        ("[uplinks.lte]", "[probe]\ntargets = ['9.9.9.9']\n[uplinks.lte]",
         ["uplink fiber: probe.targets", "uplink lte: probe.targets"]),
        ('"eth1"', '"eth1"\nmetered = true', ["uplink lte: metered"]),
        ("[uplinks.lte]", "[daemon]\nfailback = 'immediate'\non_stop = 'flush'\n[uplinks.lte]",
         ["[daemon]: on_stop, failback"]),
        ('via = ["fiber"]', 'via = ["lte"]\nfailback = "immediate"', ["policy web: via, failback"]),
        ("from = [", "to = [", ["policy backups: match.from, match.to"]),
        ('from = ["192.168.1.100"]', 'from_file = "nets"', ["policy backups: match.from, match.from_file"]),
        ('name = "web"', 'name = "www"', ["policy web is gone", "policy www is new"]),
        ("[[policies]]", "[default]\nvia = 'lte'\n[[policies]]", ["[default] is new"]),
        ("[uplinks.lte]", "[uplinks.wg]\ninterface = 'wg0'\n[uplinks.lte]",
         ["uplink wg is new", "uplink lte: table"]),
    ],
)  # fmt: skip
def test_each_difference_is_a_line(old: str, new: str, lines: list[str]) -> None:
    before, after = of(TEXT), of(TEXT.replace(old, new, 1))
    assert list(between(before, after)) == [f"config: {line}" for line in lines]


def test_default_and_the_order_of_policies_count_too() -> None:
    blocks = TEXT.split("[[policies]]")
    turned = of("[[policies]]".join([blocks[0], blocks[2], blocks[1]]))
    assert between(of(TEXT), turned) == ("config: the order of the policies",)
    with_default = TEXT + "[default]\nvia = 'lte'\n"
    assert between(of(with_default), of(with_default + "fallback = 'best-effort'")) == (
        "config: [default]: fallback",
    )
    assert between(of(with_default), of(TEXT)) == ("config: [default] is gone",)


def test_what_uplinks_are_numbered_by_is_nobodys_business() -> None:
    config = of(TEXT)
    assert between(renumbered(config, {"fiber": 1, "lte": 0}), config) == ()


def test_of_thousands_few_are_named() -> None:
    policies = (f"[[policies]]\nname = 'p{n}'\nmatch.dscp = {n % 64}\nvia = 'lte'\n" for n in range(3000))
    lines = between(of(TEXT), of(TEXT + "".join(policies)))
    assert len(lines) == 11
    assert lines[-1] == "config: 2,990 more policies are new"
