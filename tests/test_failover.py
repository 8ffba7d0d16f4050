"""The main job with real packets: traffic moves when an uplink dies, and comes home when it heals."""

import time
from signal import SIGCONT, SIGSTOP

import pytest
from conftest import HEAD, PROBE, UPLINKS, Leaving, StartDaemon, all_up, eventually, goes_by

from pbrd.lab import LAN, LAN6, Lab

CONFIG = f"""{HEAD}{PROBE}{UPLINKS}
[[policies]]
name = "backups"
match = {{ from = ["{LAN[1]}", "{LAN6[1]}"] }}
via = ["lte", "fiber"]
[default]
via = ["fiber", "lte"]
"""
SLOW = CONFIG.replace('interval = "200ms"', 'interval = "1s"', 1).replace(
    'timeout = "200ms"', 'timeout = "1s"'
)
SLOW = SLOW.replace('confirm_interval = "50ms"', 'confirm_interval = "200ms"')
# Design 4: interval + late + (fall - 1) × confirm_interval + timeout
BOUND = 1.0 + 0.05 + 2 * 0.2 + 1.0

families = pytest.mark.parametrize("source", [LAN[0], LAN6[0]], ids=["ipv4", "ipv6"])


def contents(lab: Lab) -> str:
    """All rules and routes in the router, as iproute2 prints them."""
    shown = (lab.run(lab.router, "ip", *words).stdout for words in (
        ("rule",), ("-6", "rule"), ("route", "show", "table", "all"), ("-6", "route", "show", "table", "all"),
    ))  # fmt: skip
    return "".join(shown)


@families
def test_carrier_loss_costs_a_few_packets_at_most(lab: Lab, daemon: StartDaemon, source: str) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    stream = Leaving(lab, source)
    time.sleep(0.5)
    lab.carrier(0, False)
    time.sleep(0.5)
    path, lost = stream.stop()
    assert path == ["fiber", "lte"]
    assert lost <= 10


@families
def test_carrier_loss_needs_no_daemon(lab: Lab, daemon: StartDaemon, source: str) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    pbrd.signal(SIGSTOP)
    stream = Leaving(lab, source)
    time.sleep(0.5)
    lab.carrier(0, False)
    time.sleep(0.5)
    path, lost = stream.stop()
    pbrd.signal(SIGCONT)
    assert path == ["fiber", "lte"]
    assert lost <= 10
    eventually(lambda: pbrd.uplink("fiber")["reason"] == "no-carrier")


@families
def test_silent_death_is_over_within_the_bound(lab: Lab, daemon: StartDaemon, source: str) -> None:
    pbrd = daemon(lab, SLOW)
    eventually(lambda: all_up(pbrd))
    stream = lab.traffic(rate=500, src=source)
    time.sleep(0.7)
    lab.silence(0)
    eventually(lambda: goes_by(pbrd, "lte"))
    time.sleep(0.3)
    result = stream.stop()
    assert result.path == ["fiber", "lte"]
    assert result.outage() <= BOUND + 0.1


def test_one_uplinks_trouble_never_touches_a_flow_on_another(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    stream = Leaving(lab, LAN[1], rate=500)
    lab.silence(0)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
    lab.silence(0, False)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "up")
    lab.carrier(0, False)
    eventually(lambda: pbrd.uplink("fiber")["reason"] == "no-carrier")
    lab.carrier(0, True)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
    assert stream.stop() == (["lte"], 0)


def test_a_healed_uplink_first_stands_behind_and_then_takes_its_traffic_back(
    lab: Lab, daemon: StartDaemon
) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.silence(0)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
    stream = lab.traffic(rate=500)
    lab.silence(0, False)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "recovering")
    assert pbrd.policy("default")["active"] == "lte"
    assert lab.exit_of() == "lte"
    eventually(lambda: pbrd.uplink("fiber")["state"] == "up")
    eventually(lambda: lab.exit_of() == "fiber")
    result = stream.stop()
    assert result.path == ["lte", "fiber"]
    assert result.lost == 0


def test_a_recovering_uplink_is_used_where_nothing_else_is(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG.replace('stable_for = "1s"', 'stable_for = "60s"'))
    eventually(lambda: all_up(pbrd))
    lab.silence(0)
    lab.silence(1)
    eventually(lambda: [u["state"] for u in pbrd.status()["uplinks"]] == ["down", "down"])
    lab.silence(0, False)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "recovering")
    assert lab.exit_of() == "fiber"
    assert pbrd.policy("default")["state"] == "preferred"


def test_five_flaps_end_in_the_identical_state(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    before = contents(lab)
    for _ in range(5):
        lab.carrier(0, False)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
        lab.carrier(0, True)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=15)
    assert contents(lab) == before


def test_a_lossy_uplink_is_degraded_and_new_traffic_avoids_it(lab: Lab, daemon: StartDaemon) -> None:
    text = CONFIG.replace('interval = "200ms"', 'interval = "50ms"').replace('"1s"', '"1s"\nwindow = "2s"')
    pbrd = daemon(lab, text.replace("fall = 3", "fall = 20").replace("rise = 3", "rise = 3\nfall = 20"))
    eventually(lambda: all_up(pbrd))
    lab.loss(0, 50)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "degraded", within=10)
    assert pbrd.uplink("fiber")["reason"] == "loss"
    eventually(lambda: goes_by(pbrd, "lte"))
    assert lab.exit_of() == "lte"
    lab.loss(0, 0)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "up", within=10)
    assert lab.exit_of() == "fiber"


def test_ipv6_dies_alone_and_only_ipv6_moves(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.nft(lab.uplinks[0].isp, "add rule inet fault silence meta nfproto ipv6 drop")
    eventually(lambda: (pbrd.uplink("fiber")["ipv6"] or {}).get("state") == "down")
    assert pbrd.uplink("fiber")["state"] == "degraded"
    assert lab.exit_of(src=LAN[0]) == "fiber"
    assert lab.exit_of(src=LAN6[0]) == "lte"


def test_a_gateway_that_answers_nothing_is_noticed(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.mute_gateway(0)
    eventually(lambda: lab.exit_of() == "lte")


def test_a_second_failure_during_the_first_is_seen_in_time(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.silence(0)
    eventually(lambda: goes_by(pbrd, "lte"))
    lab.carrier(1, False)
    eventually(lambda: pbrd.policy("default")["state"] == "fallback", within=1)
    lab.carrier(1, True)
    eventually(lambda: goes_by(pbrd, "lte"))
