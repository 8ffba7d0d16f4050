"""What must always hold: kill switches, restarts, reloads, flush, and other people's rules and routes."""

import json
import re
import time
from pathlib import Path
from signal import SIGHUP, SIGKILL, SIGTERM, SIGUSR1
from subprocess import DEVNULL

import pytest
from conftest import HEAD, PROBE, UPLINKS, Leaving, StartDaemon, Writes, all_up, eventually

from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab

CONFIG = f"""{PROBE}{UPLINKS}
[[policies]]
name = "secret"
match = {{ from = ["{LAN[1]}", "{LAN6[1]}"] }}
via = ["lte"]
fallback = "unreachable"
[default]
via = ["fiber", "lte"]
"""


def shown(lab: Lab) -> str:
    """All rules, routes and the uplinks' sysctls of the router; by number, as names may be there."""
    words = (
        ("rule",),
        ("-6", "rule"),
        ("route", "show", "table", "all"),
        ("-6", "route", "show", "table", "all"),
    )
    lines = [lab.run(lab.router, "ip", "-N", *arguments).stdout for arguments in words]
    sysctls = lab.run(lab.router, "sh", "-c", "sysctl net.ipv4.conf net.ipv6.conf 2>/dev/null").stdout
    kept = [line for line in sysctls.splitlines() if re.search("rp_filter|linkdown|src_valid", line)]
    return "".join(lines) + "\n".join(kept)


# --- kill switch ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [LAN[1], LAN6[1]], ids=["ipv4", "ipv6"])
def test_a_kill_switch_lets_nothing_out_whatever_happens(lab: Lab, daemon: StartDaemon, source: str) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    eventually(lambda: all_up(pbrd))
    family = "ip6" if ":" in source else "ip"
    leaks = lab.counter(f"{family} saddr {source}")
    stream = lab.traffic(rate=2000, src=source)
    time.sleep(0.2)
    lab.carrier(1, False)
    time.sleep(0.3)
    lab.carrier(1, True)
    eventually(lambda: pbrd.uplink("lte")["state"] == "up", within=10)
    lab.silence(1)
    eventually(lambda: pbrd.uplink("lte")["state"] == "down")
    pbrd.reload(HEAD + CONFIG.replace('name = "secret"', 'name = "renamed"'))
    extra = '[[policies]]\nname = "first"\nmatch = { to = "10.77.0.0/16" }\nvia = ["fiber"]\n'
    extra += '[[policies]]\nname = "secret"'
    pbrd.reload(HEAD + CONFIG.replace('[[policies]]\nname = "secret"', extra))
    pbrd.stop(SIGKILL)
    time.sleep(0.1)
    pbrd.restart()
    lab.silence(1, False)
    eventually(lambda: pbrd.uplink("lte")["state"] == "up", within=10)
    pbrd.stop(SIGTERM)
    lab.admin(1, False)
    time.sleep(0.2)
    result = stream.stop()
    counted = leaks.read()
    assert counted["fiber"] == 0
    assert counted["lte"] > 0
    assert "fiber" not in result.by_uplink


def test_a_kill_switch_holds_before_its_interface_exists(lab: Lab, daemon: StartDaemon) -> None:
    text = HEAD + CONFIG.replace('interface = "lte"', 'interface = "wwan9"')
    daemon(lab, text)
    assert lab.exit_of(src=LAN[1], within=0.3) is None
    assert lab.exit_of(src=LAN[0]) == "fiber"


# --- restart, reload --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [SIGKILL, SIGTERM])
def test_a_restart_under_load_loses_nothing_and_writes_nothing(
    lab: Lab, daemon: StartDaemon, tmp_path: Path, number: int
) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    eventually(lambda: all_up(pbrd))
    stream = Leaving(lab)
    writes = Writes(lab, tmp_path)
    for _ in range(3):
        pbrd.stop(number)
        pbrd.restart()
        eventually(lambda: all_up(pbrd))
    assert writes.seen() == ""
    assert stream.stop() == (["fiber"], 0)


@pytest.mark.parametrize("state", ["down", "recovering"])
def test_a_restart_goes_on_with_an_uplink_that_was_not_up(
    lab: Lab, daemon: StartDaemon, tmp_path: Path, state: str
) -> None:
    pbrd = daemon(lab, HEAD + CONFIG.replace('stable_for = "1s"', 'stable_for = "30s"'))
    eventually(lambda: all_up(pbrd))
    lab.silence(0)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
    if state == "recovering":
        lab.silence(0, False)
        eventually(lambda: pbrd.uplink("fiber")["state"] == "recovering")
    writes = Writes(lab, tmp_path)
    pbrd.stop(SIGKILL)
    pbrd.restart()
    assert pbrd.uplink("fiber")["state"] == state
    assert lab.exit_of() == "lte"
    assert writes.seen() == ""


def test_a_reload_with_an_equal_config_writes_nothing(lab: Lab, daemon: StartDaemon, tmp_path: Path) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    eventually(lambda: all_up(pbrd))
    writes = Writes(lab, tmp_path)
    reloaded = pbrd.reload("# the same\n" + HEAD + CONFIG)
    assert (reloaded.returncode, reloaded.stdout) == (0, "nothing changed\n")
    assert writes.seen() == ""
    assert all_up(pbrd)


def test_a_bad_config_is_refused_and_the_old_one_stays(lab: Lab, daemon: StartDaemon, tmp_path: Path) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    before, writes = shown(lab), Writes(lab, tmp_path)
    refused = pbrd.reload(HEAD + CONFIG.replace('via = ["lte"]', 'via = ["lt"]'))
    assert refused.returncode == 78
    assert 'policies[0].via[0]: no uplink is called "lt" (did you mean "lte"?)' in refused.stderr
    assert (shown(lab), writes.seen()) == (before, "")
    last = pbrd.status()["last_reload"]
    assert (last["ok"], "did you mean" in last["error"]) == (False, True)
    assert pbrd.status()["generation"] == 1


def test_sighup_reloads(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    pbrd.config.write_text(
        HEAD + CONFIG.replace('[default]\nvia = ["fiber", "lte"]', "[default]\nvia = ['lte']")
    )
    pbrd.signal(SIGHUP)
    eventually(lambda: pbrd.status()["generation"] == 2)
    assert lab.exit_of() == "lte"


def test_reloads_under_load_cost_nobody_a_packet(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    eventually(lambda: all_up(pbrd))
    default, secret = Leaving(lab), Leaving(lab, LAN[1])
    more = "".join(
        f'[[policies]]\nname = "p{n}"\nmatch = {{ to = "10.{n}.0.0/16" }}\nvia = ["fiber", "lte"]\n'
        for n in range(20)
    )
    for text in (CONFIG.replace("[[policies]]", more + "[[policies]]", 1), CONFIG) * 3:
        assert pbrd.reload(HEAD + text).returncode == 0
    assert (default.stop(), secret.stop()) == ((["fiber"], 0), (["lte"], 0))


def test_an_uplink_that_leaves_the_config_leaves_the_kernel(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    only = HEAD + CONFIG.replace('[uplinks.lte]\ninterface = "lte"\n', "").replace('"lte"', '"fiber"')
    assert pbrd.reload(only.replace('["fiber", "fiber"]', '["fiber"]')).returncode == 0
    assert "table 201" not in shown(lab)
    assert "lookup 201" not in shown(lab)


# --- flush, and others ------------------------------------------------------------------------

FOREIGN = """rule add from 172.16.0.0/12 lookup 77 priority 12345
    rule add fwmark 0x5 lookup 200 priority 10900
    route add 172.20.0.0/16 dev lan table 77
    route add 172.21.0.0/16 dev lan table 200
    -6 rule add from fd77::/16 lookup 77 priority 12345"""


def test_flush_leaves_the_machine_as_it_was(lab: Lab, daemon: StartDaemon) -> None:
    for line in FOREIGN.splitlines():
        lab.run(lab.router, "ip", *line.split())
    lab.run(lab.router, "sysctl", "-w", "net.ipv4.conf.fiber.rp_filter=1")
    before = shown(lab)
    pbrd = daemon(lab, HEAD + CONFIG)
    assert "net.ipv4.conf.fiber.rp_filter = 2" in shown(lab)
    flushed = pbrd.command("flush")
    assert flushed.returncode == 0
    assert shown(lab) == before
    assert pbrd.status()["paused"]
    time.sleep(0.5)
    assert shown(lab) == before
    assert pbrd.command("reload").returncode == 0
    assert not pbrd.status()["paused"]
    pbrd.stop(SIGKILL)
    state = pbrd.config.parent / "state"
    assert pbrd.command("flush", "--state-dir", str(state), "--config", str(pbrd.config)).returncode == 0
    assert shown(lab) == before


def test_on_stop_flush_flushes_and_keep_keeps(lab: Lab, daemon: StartDaemon) -> None:
    before = shown(lab)
    pbrd = daemon(lab, HEAD + CONFIG)
    pbrd.stop()
    assert "lookup 200" in shown(lab)
    pbrd.config.write_text(HEAD + 'on_stop = "flush"\n' + CONFIG)
    pbrd.restart()
    assert pbrd.stop() == 0
    assert shown(lab) == before


def test_a_foreign_default_in_our_table_is_left_alone(lab: Lab, daemon: StartDaemon) -> None:
    gateway = lab.uplinks[0].gateway
    lab.ip(lab.router, f"route add default via {gateway} dev fiber table 200 proto static")
    pbrd = daemon(lab, HEAD + CONFIG)
    assert lab.exit_of() == "fiber"
    pbrd.command("flush")
    assert f"default via {gateway} dev fiber proto static" in lab.run(
        lab.router, "ip", "route", "show", "table", "200"
    ).stdout  # fmt: skip
    eventually(lambda: "a foreign route stands where ours belongs" in pbrd.log)


# --- drift ------------------------------------------------------------------------------------


def test_what_others_delete_is_back_within_milliseconds(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    eventually(lambda: all_up(pbrd))
    before = shown(lab)
    for words in (
        ("rule", "del", "priority", "11000"),
        ("-6", "rule", "del", "priority", "31000"),
        ("route", "flush", "table", "200"),
        ("-6", "route", "flush", "table", "1201"),
        ("rule", "flush"),
    ):
        lab.run(lab.router, "ip", *words)
        if words == ("rule", "flush"):
            lab.ip(lab.router, "rule add priority 32766 lookup main\nrule add priority 32767 lookup default")
        eventually(lambda: shown(lab) == before, within=1)
    assert pbrd.status()["drift_repairs"] >= 5
    eventually(lambda: "drift repaired" in pbrd.log)


def test_an_endless_fight_is_limited_and_named(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    lab.spawn(
        lab.router, ["sh", "-c", "while :; do ip rule del priority 11000 2>/dev/null; done"], stdin=DEVNULL
    )
    eventually(lambda: "keeps undoing" in pbrd.log, within=20)
    repairs = pbrd.status()["drift_repairs"]
    time.sleep(2)
    assert pbrd.status()["drift_repairs"] - repairs <= 6


# --- what people see --------------------------------------------------------------------------


def test_status_follows_the_contract(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    eventually(lambda: all_up(pbrd))
    shown = pbrd.command("status", "--json")
    document = json.loads(shown.stdout)
    assert shown.returncode == 0
    assert document["version"]
    assert document["pid"] == pbrd.pid
    fiber = document["uplinks"][0]
    assert (fiber["name"], fiber["interface"], fiber["table"]) == ("fiber", "fiber", 200)
    assert (fiber["state"], fiber["reason"]) == ("up", "ok")
    assert fiber["ipv4"] == {
        "gateway": lab.uplinks[0].gateway,
        "source": "dhcp",
        "installed": True,
        "state": "up",
    }
    assert fiber["ipv6"] == {
        "gateway": lab.uplinks[0].gateway6,
        "source": "ra",
        "installed": True,
        "state": "up",
    }
    assert {target["address"] for target in fiber["probe"]["targets"]} == {TARGETS[2], TARGETS6[2]}
    assert all(target["answering"] and target["loss"] == 0.0 for target in fiber["probe"]["targets"])
    secret, default = document["policies"]
    assert (secret["name"], secret["via"], secret["active"]) == ("secret", ["lte"], "lte")
    assert (default["name"], default["fallback"], default["state"]) == ("default", "next", "preferred")
    lab.carrier(1, False)
    eventually(lambda: pbrd.uplink("lte")["state"] == "down")
    assert pbrd.policy("secret")["active"] is None
    assert pbrd.policy("secret")["state"] == "fallback"
    assert pbrd.command("status").returncode == 4


def test_plan_says_what_a_start_would_do_and_nothing_once_it_runs(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    assert pbrd.command("plan").returncode == 0
    pbrd.stop()
    lab.run(lab.router, "ip", "rule", "del", "priority", "11000")
    plan = pbrd.command("plan", "--config", str(pbrd.config))
    assert (plan.returncode, plan.stdout) == (4, f"rule  add priority 11000 from {LAN[1]} lookup lte\n")
    assert "11000" not in lab.run(lab.router, "ip", "rule").stdout


def test_plan_says_that_the_config_was_changed_and_plans_the_file(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    assert pbrd.command("drain", "fiber").returncode == 0
    assert pbrd.command("plan").stderr == ""
    assert pbrd.command("plan", "--config", str(pbrd.config)).stdout == "nothing to change\n"
    pbrd.config.write_text((HEAD + CONFIG).replace('via = ["lte"]', 'via = ["fiber", "lte"]', 1))
    plan = pbrd.command("plan")
    assert plan.stdout == "nothing to change\n"
    assert plan.stderr.endswith(f"for what a reload would do: pbrd plan --config {pbrd.config}\n")
    for change in (pbrd.config.parent / "conf.d" / "more.toml", pbrd.config):
        change.parent.mkdir(exist_ok=True)
        change.write_text(HEAD + CONFIG if change == pbrd.config else "[default]\nvia = ['lte']\n")
    assert "more.toml" in pbrd.command("plan").stderr
    assert pbrd.command("reload").returncode == 0
    assert pbrd.command("plan").stderr == ""


def test_exit_codes_without_a_daemon_and_with_a_second_one(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    state = str(pbrd.config.parent / "state2")
    second = pbrd.command("run", "--config", str(pbrd.config), "--state-dir", state)
    assert second.returncode == 1
    assert "another pbrd already runs" in second.stderr
    pbrd.signal(SIGUSR1)
    eventually(lambda: pbrd.log.count("uplink ") >= 2)
    pbrd.stop()
    assert pbrd.command("status").returncode == 3
    assert pbrd.command("reload").returncode == 3


def test_another_mask_and_other_priorities_by_reload(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, HEAD + CONFIG)
    eventually(lambda: all_up(pbrd))
    stream = Leaving(lab)
    assert pbrd.reload(HEAD + "fwmark_mask = 0x00f00000\nrule_priority = 2000\n" + CONFIG).returncode == 0
    rules = lab.run(lab.router, "ip", "-N", "rule").stdout
    assert "fwmark 0xf00000/0xf00000" in rules
    assert not [line for line in rules.splitlines() if line.startswith("1") and "proto 112" in line]
    time.sleep(1)
    assert all_up(pbrd)
    assert stream.stop() == (["fiber"], 0)
