"""What commands say of what they have done, by the real daemon in a lab."""

import pytest
from conftest import HEAD, PROBE, UPLINKS, Daemon, StartDaemon, all_up, eventually

from pbrd.config import parse
from pbrd.lab import LAN, Lab
from pbrd.remarks import opened

POLICIES = f"""
[[policies]]
name = "camera"
match = {{ from = ["{LAN[1]}"] }}
via = ["lte"]
fallback = "unreachable"
[[policies]]
name = "phones"
match = {{ from = ["{LAN[2]}"] }}
via = ["lte"]
[default]
via = ["fiber", "lte"]
fallback = "best-effort"
"""


def said(daemon: Daemon, *command: str) -> list[str]:
    done = daemon.command(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_drain_says_what_it_means(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + POLICIES)
    eventually(lambda: all_up(pbrd))
    assert said(pbrd, "undrain", "lte") == ["lte was not drained"]
    assert said(pbrd, "drain", "lte") == [
        "lte is drained: what took it moves at once, as nftables is not in use",
        "no uplink is left for camera: packets leave nowhere (unreachable)",
        "no uplink is left for phones: packets go on to the next policy",
    ]
    assert said(pbrd, "drain", "lte") == ["lte was drained already"]
    assert said(pbrd, "drain", "fiber")[1:] == [
        "no uplink is left for default: packets go on to the main table"
    ]
    assert pbrd.policy("default")["active"] is None
    assert said(pbrd, "undrain", "lte") == ["lte is back in service: new connections may take it"]
    refused = pbrd.command("drain", "fibre")
    assert (refused.returncode, refused.stderr) == (
        1,
        'pbrd: cannot drain "fibre": no uplink is called that (did you mean "fiber"?)\n',
    )


def test_drain_says_whether_live_connections_stay(lab: Lab, daemon: StartDaemon) -> None:
    nat = UPLINKS.replace('"lte"\n', '"lte"\nnat = true\n')
    pbrd = daemon(lab, HEAD + PROBE + nat + "[default]\nvia = ['lte', 'fiber']")
    eventually(lambda: all_up(pbrd))
    assert said(pbrd, "drain", "lte") == ["lte is drained: new connections avoid it, live ones finish there"]
    lab.carrier(1, False)
    eventually(lambda: pbrd.uplink("lte")["state"] == "down")
    assert said(pbrd, "undrain", "lte") == ["lte is no longer drained, but down (no-carrier)"]
    assert said(pbrd, "drain", "lte") == ["lte is drained; it was down (no-carrier) before"]


def test_a_drained_uplink_is_drained_since_then_and_named_at_a_start(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + POLICIES)
    eventually(lambda: all_up(pbrd))
    times = [pbrd.uplink("lte")["since"]]
    for command, state in (("drain", "drained"), ("undrain", "up"), ("drain", "drained")):
        said(pbrd, command, "lte")
        assert pbrd.uplink("lte")["state"] == state
        times.append(pbrd.uplink("lte")["since"])
    assert times == sorted(set(times))
    assert "still drained" not in pbrd.log
    pbrd.stop()
    pbrd.restart()
    eventually(lambda: "lte is still drained; `pbrd undrain lte` puts it back" in pbrd.log)


def test_an_uplink_that_answers_again_waits_for_rise(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + PROBE.replace("rise = 3", "rise = 1000") + UPLINKS + POLICIES)
    eventually(lambda: all_up(pbrd))
    lab.carrier(0, False)
    eventually(lambda: pbrd.policy("default")["reason"] == "fiber is down (no-carrier)")
    lab.carrier(0, True)
    waiting = "fiber is down (answers again, but not yet for `rise` rounds)"
    eventually(lambda: pbrd.policy("default")["reason"] == waiting)
    assert pbrd.uplink("fiber")["reason"] == "probes"


def test_flush_names_the_kill_switches_that_it_opens(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + POLICIES)
    warning = "warning: the kill switch of camera is open now: its packets go by the main table\n"
    assert pbrd.command("flush").stderr == warning + "the daemon is paused until `pbrd reload`\n"
    assert "paused: pbrd let go of the kernel at " in pbrd.command("status").stdout
    since = pbrd.status()["paused_since"]
    assert said(pbrd, "drain", "lte") == ["lte will be drained when pbrd takes over again"]
    assert pbrd.status()["paused_since"] == since
    pbrd.stop()
    config = ("--config", str(pbrd.config), "--state-dir", str(pbrd.config.parent / "state"))
    assert pbrd.command("flush", *config).stderr == ""  # there was nothing any more
    pbrd.restart()
    assert pbrd.status()["paused_since"] is None
    pbrd.stop()
    assert pbrd.command("flush", *config).stderr == warning


def test_reload_says_what_changed_in_the_config_too(lab: Lab, daemon: StartDaemon) -> None:
    text = HEAD + PROBE + UPLINKS + POLICIES
    pbrd = daemon(lab, text)
    eventually(lambda: all_up(pbrd))
    assert pbrd.reload(text).stdout == "nothing changed\n"
    assert pbrd.reload(text.replace("rise = 3", "rise = 4")).stdout == (
        "config: uplink fiber: probe.rise\nconfig: uplink lte: probe.rise\n"
    )
    changed = pbrd.reload(text.replace('fallback = "unreachable"', 'fallback = "prohibit"')).stdout
    assert "config: policy camera: fallback\n" in changed
    assert "rule  add priority 11001" in changed


@pytest.mark.parametrize(
    ("fallbacks", "line"),
    [
        ([], ()),
        (["next", "best-effort"], ()),
        (
            ["prohibit"] * 7,
            (
                "the kill switches of p0, p1, p2, p3, p4 and 2 more are open now: "
                "their packets go by the main table",
            ),
        ),
    ],
)
def test_many_kill_switches_are_one_line(fallbacks: list[str], line: tuple[str, ...]) -> None:
    policies = (
        f"[[policies]]\nname = 'p{n}'\nmatch.dscp = {n}\nvia = 'lte'\nfallback = '{fallback}'\n"
        for n, fallback in enumerate(fallbacks)
    )
    assert opened(parse([("a.toml", UPLINKS + "".join(policies))])) == line
