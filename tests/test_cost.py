"""What `pbrd check` says of a config's costs."""

import pytest
from conftest import HEAD, PROBE, UPLINKS, StartDaemon, eventually

from pbrd.config import parse
from pbrd.cost import duration, rule_counts, words
from pbrd.lab import Lab
from pbrd.settings import Config, Family

POLICIES = """
[[policies]]
name = "web"
match = { proto = "tcp", dport = [80, 443], iif = "lan*" }
via = ["lte", "fiber"]
[[policies]]
name = "six"
match = { from = ["2001:db8:77::/64"] }
via = ["lte"]
fallback = "prohibit"
[default]
via = ["fiber", "lte"]
fallback = "best-effort"
"""


def of(text: str) -> Config:
    return parse([("a.toml", text)])


@pytest.mark.parametrize("nat", ["", "nat = true\n"])
def test_the_counted_rules_are_those_that_the_kernel_gets(lab: Lab, daemon: StartDaemon, nat: str) -> None:
    config = HEAD + PROBE + UPLINKS.replace('"lte"\n', f'"lte"\n{nat}') + POLICIES
    daemon(lab, config)

    def found() -> dict[Family, int]:
        shown = {f: lab.run(lab.router, "ip", "-N", f"-{f.version}", "rule").stdout for f in Family}
        return {family: text.count(" proto 112") for family, text in shown.items()}

    counts = rule_counts(of(config))
    assert eventually(lambda: found() == counts), (found(), counts)
    assert f"{sum(counts.values())} rules" in words(of(config))
    assert f"at most {max(counts.values())} of them" in words(of(config))


def test_nftables_is_mentioned_where_it_is_in_use() -> None:
    assert "nftables" not in words(of(UPLINKS + POLICIES))
    assert words(of("[uplinks.a]\ninterface = 'a'\nnat = true")).endswith("; nftables judges connections")


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(17, "17 ns"), (345, "340 ns"), (999, "1 µs"), (1207, "1.2 µs"), (85000, "85 µs"), (1234567, "1200 µs")],
)
def test_two_digits_are_enough(nanoseconds: int, text: str) -> None:
    assert duration(nanoseconds) == text
