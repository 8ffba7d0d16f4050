"""The service under a real systemd, with real packets: what machines and administrators do to it."""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from box import Box, python
from conftest import Leaving, Writes, eventually
from service import CONFIG, HERE, UNIT, Service, networkd, seed, start, switch_off

from pbrd.lab import LAN, LAN6, TARGETS, Lab

MakeBox = Callable[..., Box]
RESTARTS = 10
SLICES = (
    "uplink-lte.slice",
    "backup.slice",
)  # one that is there for each uplink, and that of the policy below
NFTABLES = """
[[policies]]
name = "units"
match = { unit = "backup.slice" }
via = ["lte"]
"""


def test_it_is_ready_when_the_kernel_holds_the_plan_and_says_how_it_is(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    assert service.show("ActiveState", "Result", "NRestarts") == ("active", "success", "0")
    status = r"fiber up( [\d.]+ ms)?, lte up( [\d.]+ ms)?"
    assert re.fullmatch(status, service.show("StatusText")), service.show("StatusText")
    lab.carrier(0, False)
    down = (
        r"fiber down \(no-carrier\) since \d\d:\d\d, lte up.* · 1 policy failed over · 1 policy in fallback"
    )
    eventually(lambda: re.fullmatch(down, service.show("StatusText")))
    service.systemctl("stop")
    assert service.show("ActiveState", "Result") == ("inactive", "success")
    assert service.show("StatusText") == "stopped; routes and rules are kept"


# --- ends and starts ----------------------------------------------------------------------------


def test_a_crash_costs_no_packet_and_writes_nothing(make_box: MakeBox, lab: Lab, tmp_path: Path) -> None:
    service = start(make_box, lab)
    stream, writes, former = Leaving(lab), Writes(lab, tmp_path), service.pid
    service.kill("KILL")
    service.restarted(former)
    service.wait_up()
    assert writes.seen() == ""
    assert stream.stop() == (["fiber"], 0)
    assert service.show("NRestarts") == "1"


STUBBORN = "#!/bin/sh\ntrap '' TERM\n[ \"$PBRD_EVENT\" = started ] || exit 0\nsleep 300\n"


def test_a_hook_that_heeds_no_signal_keeps_no_daemon_waiting(make_box: MakeBox, lab: Lab) -> None:
    """Until the next one is there, nobody watches the uplinks; systemd waited for all of its processes."""
    service = start(make_box, lab, seed={"/etc/pbrd/hooks.d/10-stubborn": STUBBORN})
    for act in (functools.partial(service.kill, "KILL"), functools.partial(service.systemctl, "restart")):
        eventually(lambda: service.box.enter(["pgrep", "-x", "sleep"], check=False).stdout)
        former, begun = service.pid, time.monotonic()
        act()
        service.restarted(former)
        assert time.monotonic() - begun < 10  # TimeoutStopSec= is 15 s
        service.wait_up()


def test_a_hook_may_finish_within_two_seconds_of_the_end(make_box: MakeBox, lab: Lab) -> None:
    hook = '#!/bin/sh\n[ "$PBRD_EVENT" = stopped ] || exit 0\necho begun; sleep 0.5; echo finished\n'
    service = start(make_box, lab, seed={"/etc/pbrd/hooks.d/10-slow": hook})
    service.systemctl("stop")
    assert "hook 10-slow: finished" in service.log


def test_restarts_under_load_cost_no_packet(make_box: MakeBox, lab: Lab, tmp_path: Path) -> None:
    service = start(make_box, lab)
    stream, writes = Leaving(lab), Writes(lab, tmp_path)
    for _ in range(RESTARTS):
        service.systemctl("restart")
    assert service.show("ActiveState", "Result") == ("active", "success")
    assert writes.seen() == ""
    assert stream.stop() == (["fiber"], 0)


def test_stopped_forwarding_and_kill_switches_go_on(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    service.systemctl("stop")
    lab.carrier(0, False)
    assert eventually(lambda: lab.exit_of(src=LAN[0], within=0.2)) == "lte"
    assert lab.exit_of(src=LAN[2], within=0.3) is None
    assert lab.exit_of(src=LAN6[2], within=0.3) is None


def test_what_hangs_is_started_again_by_the_watchdog_and_leaves_a_traceback(
    make_box: MakeBox, lab: Lab, tmp_path: Path
) -> None:
    service = start(make_box, lab, drop_in="WatchdogSec=1s")
    stream, writes, former = Leaving(lab), Writes(lab, tmp_path), service.pid
    service.kill("STOP")
    service.restarted(former, within=20)
    service.wait_up()
    assert writes.seen() == ""
    assert stream.stop() == (["fiber"], 0)
    assert "Watchdog timeout" in service.log
    assert "Fatal Python error: Aborted" in service.log
    assert "daemon.py" in service.log


def test_the_watchdog_is_fed_while_the_loop_turns(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab, drop_in="WatchdogSec=1s")
    former = service.pid
    lab.silence(0)
    eventually(lambda: service.show("StatusText").startswith("fiber down (probes)"))
    time.sleep(3)  # three times the limit
    assert (service.pid, service.show("NRestarts")) == (former, "0")


# --- configs --------------------------------------------------------------------------------------


def test_a_bad_config_is_no_reason_to_start_again_and_again(
    make_box: MakeBox, lab: Lab, tmp_path: Path
) -> None:
    service = start(make_box, lab)
    stream, writes = Leaving(lab), Writes(lab, tmp_path)
    service.box.write({"/etc/pbrd/pbrd.toml": CONFIG.replace('via = ["fiber"]', 'via = ["fibre"]')})
    assert service.systemctl("restart", check=False) == 1
    assert service.show("ActiveState", "ExecMainStatus", "NRestarts") == ("failed", "78", "0")
    assert 'no uplink is called "fibre" (did you mean "fiber"?)' in service.log
    assert writes.seen() == ""
    assert stream.stop() == (["fiber"], 0)
    service.box.write({"/etc/pbrd/pbrd.toml": CONFIG})
    service.systemctl("start")
    assert writes.seen() == ""


def test_reload_waits_for_the_verdict_and_a_bad_config_changes_nothing(
    make_box: MakeBox, lab: Lab, tmp_path: Path
) -> None:
    service = start(make_box, lab)
    former, generation = service.pid, service.status()["generation"]
    service.box.write({"/etc/pbrd/pbrd.toml": CONFIG.replace('via = ["fiber"]', 'via = ["lte"]')})
    service.systemctl("reload")
    assert service.status()["generation"] == generation + 1
    assert lab.exit_of(src=LAN[2]) == "lte"
    writes = Writes(lab, tmp_path)
    service.box.write({"/etc/pbrd/pbrd.toml": "nonsense"})
    assert service.systemctl("reload", check=False) == 1
    assert service.show("ActiveState", "SubState") == ("active", "running")
    assert service.status()["generation"] == generation + 1
    assert not service.status()["last_reload"]["ok"]
    assert writes.seen() == ""
    assert lab.exit_of(src=LAN[2]) == "lte"
    assert service.pid == former
    service.box.write({"/etc/pbrd/pbrd.toml": CONFIG})
    service.systemctl("reload")
    assert lab.exit_of(src=LAN[2]) == "fiber"


@pytest.mark.parametrize("text", ["nonsense", CONFIG], ids=["bad", "good"])
def test_a_reload_by_signal_ends_too(make_box: MakeBox, lab: Lab, text: str) -> None:
    service = start(make_box, lab)
    service.box.write({"/etc/pbrd/pbrd.toml": text})
    service.kill("HUP")
    reloaded = eventually(lambda: service.status()["last_reload"])
    assert reloaded["ok"] == (text == CONFIG)
    assert service.show("ActiveState", "SubState") == ("active", "running")


# --- its directories ------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["read-only", "full"])
def test_a_state_directory_that_takes_nothing_stops_nothing(make_box: MakeBox, lab: Lab, state: str) -> None:
    service = start(make_box, lab)
    service.systemctl("stop")
    fill = """
    mount -t tmpfs -o size=4k,mode=0750,gid=pbrd tmpfs /var/lib/pbrd
    head -c 9000 /dev/zero >/var/lib/pbrd/filler || true # as much as there is room for
    """
    seal = "mount -o remount,ro /var/lib/pbrd" if state == "read-only" else ""
    service.box.enter(["sh", "-ec", fill + seal])
    service.systemctl("start")
    service.wait_up()
    lab.carrier(0, False)
    assert eventually(lambda: lab.exit_of(src=LAN[0], within=0.2)) == "lte"
    assert lab.exit_of(src=LAN[2], within=0.3) is None
    lab.carrier(0, True)
    service.wait_up()
    service.box.run(["pbrd", "drain", "fiber"])
    assert lab.exit_of(src=LAN[0]) == "lte"
    assert "drained uplinks are not written down" in service.log
    assert service.show("NRestarts") == "0"
    service.systemctl("restart")


@pytest.mark.parametrize("disk", ["dead", "read-only"])
def test_it_starts_though_its_state_directory_cannot_be_there(make_box: MakeBox, lab: Lab, disk: str) -> None:
    service = start(make_box, lab)
    service.systemctl("stop")
    service.box.enter(["rm", "-r", "/var/lib/pbrd"])
    if disk == "dead":
        mount = "[Unit]\nDefaultDependencies=no\n[Mount]\nWhat=/nowhere.img\nWhere=/var/lib\nType=ext4\n"
        service.box.write({"/etc/systemd/system/var-lib.mount": mount})
        service.box.enter(["systemctl", "daemon-reload"])
    else:
        service.box.enter(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/var/lib"])
    service.systemctl("start")
    service.wait_up()
    assert service.show("NRestarts") == "0"
    service.box.enter(["pbrd", "drain", "fiber"])
    assert lab.exit_of(src=LAN[0]) == "lte"
    assert ("drained uplinks are not written down" in service.log) == (disk == "read-only")


@pytest.mark.parametrize("folder", ["/tmp", "/root"])
def test_plan_reads_a_config_where_the_service_sees_none(make_box: MakeBox, lab: Lab, folder: str) -> None:
    service = start(make_box, lab)
    service.wait_up()
    file = f"{folder}/new.toml"
    service.box.enter(["cp", "/etc/pbrd/pbrd.toml", file])
    same = service.box.enter(["pbrd", "plan", "--config", file])
    assert (same.stdout, same.stderr) == ("nothing to change\n", "")
    service.box.enter(["sed", "-i", 's/via = ."fiber".$/via = ["lte"]/', file])
    other = service.box.enter(["pbrd", "plan", "--config", file], check=False)
    assert (other.returncode, other.stderr) == (4, "")


def test_what_the_service_cannot_read_is_said_by_check_and_by_itself(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    box = service.box

    def said(*prepare: str, config: str = CONFIG) -> str:
        """What `check` warns of, after the daemon has refused to reload for the same reason."""
        box.write({"/etc/pbrd/pbrd.toml": config})
        for command in prepare:
            box.enter(["sh", "-ec", command])
        checked = box.enter(["pbrd", "check"])
        assert service.systemctl("reload", check=False) == 1
        return checked.stderr

    listed = CONFIG.replace("from = [", 'to_file = "PLACE/list", from = [', 1)
    file = "/etc/pbrd/pbrd.toml"
    assert f"{file} belongs to nobody and has mode 0600; chmod o+r {file}, or chown root {file}" in said(
        f"chown nobody {file}; chmod 0600 {file}"
    )
    assert "only what root owns or all may read" in service.log
    assert "/etc/pbrd belongs to nobody and has mode 0700; chmod o+x /etc/pbrd" in said(
        f"chown root {file}; chmod 0644 {file}; chown nobody /etc/pbrd; chmod 0700 /etc/pbrd"
    )
    box.enter(["sh", "-c", "chown root /etc/pbrd; chmod 0755 /etc/pbrd"])
    for place, why in {"/root": "it sees no home directories", "/tmp": "it has a /tmp of its own"}.items():
        write = f"echo 198.51.100.0/24 >{place}/list; chmod 0644 {place}/list"
        assert f"{place}/list: pbrd.service cannot read it: {why}" in said(
            write, config=listed.replace("PLACE", place)
        )
    assert "and nothing in homes" in service.log
    assert "(pbrd.service has a /tmp of its own)" in service.log
    box.enter(["sh", "-ec", "echo 198.51.100.0/24 >/etc/pbrd/list; chown root:pbrd /etc/pbrd/list"])
    box.write({file: listed.replace("PLACE", "/etc/pbrd")})
    assert "cannot read" not in box.enter(["pbrd", "check"]).stderr
    service.systemctl("reload")
    assert service.show("ActiveState", "NRestarts") == ("active", "0")


def test_broken_state_files_are_set_aside_and_told(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    service.systemctl("stop")
    files = ("/var/lib/pbrd/drained.json", "/run/pbrd/sysctls.json")
    for file in files:
        service.box.write({file: "\0half a fi"})
    service.systemctl("start")
    for file in files:
        assert f"{file} is broken: it is now {Path(file).name}.broken" in service.log
        assert (service.box.root / f"{file[1:]}.broken").read_text() == "\0half a fi"
    assert service.show("ActiveState", "NRestarts") == ("active", "0")


def test_members_of_its_group_may_read_and_only_root_may_change(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    member = ("User=nobody", "Group=nogroup", "SupplementaryGroups=pbrd")
    assert service.box.run(["pbrd", "status"], *member).returncode == 0
    assert service.box.run(["pbrd", "drain", "lte"], *member, check=False).returncode == 1
    assert service.box.run(["pbrd", "status"], "User=nobody", check=False).returncode == 1
    assert service.box.run(["cat", "/etc/iproute2/rt_tables.d/pbrd.conf"], "User=nobody").returncode == 0


# --- boot -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["enable", "disable"])
def test_a_kill_switch_holds_from_boot_on(make_box: MakeBox, lab: Lab, command: str) -> None:
    """The camera's only uplink has no carrier. Without pbrd its packets leave once there is a network."""
    box = make_box(seed(enabled=False) | networkd(lab), network=lab.router, udev=True)
    service = Service(box)
    service.systemctl(command)
    box.halt()
    switch_off(lab)
    lab.carrier(0, False)
    cameras = [
        lab.counter(f"{family} saddr {source}") for family, source in (("ip", LAN[2]), ("ip6", LAN6[2]))
    ]
    streams = [lab.traffic(rate=1000, src=source) for source in (LAN[2], LAN6[2])]
    box.boot()
    assert eventually(lambda: lab.exit_of(src=LAN[0], within=0.2)) == "lte"
    assert eventually(lambda: lab.exit_of(src=LAN6[0], within=0.2)) == "lte"
    time.sleep(1)
    assert service.show("ActiveState") == ("active" if command == "enable" else "inactive")
    for stream in streams:
        stream.stop()
    for camera in cameras:
        assert (camera.read()["lte"] == 0) == (command == "enable")


def test_it_stands_before_the_network_is_configured(make_box: MakeBox, lab: Lab) -> None:
    switch_off(lab)
    box = make_box(seed() | networkd(lab), network=lab.router, udev=True)
    ready = box.show(UNIT, "ActiveEnterTimestampMonotonic").popitem()[1]
    configured = box.show("systemd-networkd.service", "ExecMainStartTimestampMonotonic").popitem()[1]
    assert 0 < int(ready) < int(configured)


# --- how it is confined ---------------------------------------------------------------------------


def test_the_unit_is_understood_and_confined_as_documented(make_box: MakeBox) -> None:
    box = make_box(seed(enabled=False))
    assert box.enter(["systemd-analyze", "verify", "--man=no", UNIT]).stderr == ""
    exposure = re.search(
        r"exposure level for \S+: (\S+)", box.enter(["systemd-analyze", "security", UNIT]).stdout
    )
    assert exposure is not None
    assert f"`systemd-analyze security pbrd` says {exposure[1]}" in (HERE / "docs/service.md").read_text()


def test_it_has_two_capabilities_and_no_home(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    status = (service.box.root / f"proc/{service.pid}/status").read_text()
    assert "CapEff:\t0000000000003000" in status  # CAP_NET_ADMIN, CAP_NET_RAW: capabilities(7)
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert not list((service.box.root / f"proc/{service.pid}/root/root").iterdir())


def test_an_own_user_will_do_as_documented(make_box: MakeBox, lab: Lab, tmp_path: Path) -> None:
    service = start(make_box, lab)
    drop_in = "[Service]\nUser=pbrd\nAmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW\nStateDirectory=pbrd\n"
    service.box.write(
        {"/etc/sysusers.d/pbrd.conf": "u pbrd -\n", f"/etc/systemd/system/{UNIT}.d/user.conf": drop_in}
    )
    service.box.enter(["systemd-sysusers"])
    service.box.enter(["systemctl", "daemon-reload"])
    writes = Writes(lab, tmp_path)
    service.systemctl("restart")
    service.wait_up()
    assert writes.seen() == ""
    uid = service.box.enter(["id", "-u", "pbrd"]).stdout.strip()
    assert f"Uid:\t{uid}\t" in (service.box.root / f"proc/{service.pid}/status").read_text()
    lab.silence(0)
    eventually(lambda: lab.exit_of(src=LAN[0], within=0.2) == "lte")
    service.systemctl("reload")
    service.box.enter(["pbrd", "drain", "fiber"])
    assert (service.box.root / "var/lib/pbrd/drained.json").exists()


def test_a_lock_file_of_a_run_by_hand_is_nobodys_to_lock(make_box: MakeBox, lab: Lab) -> None:
    box = make_box(seed(enabled=False), network=lab.router)
    box.enter(["sh", "-c", "umask 022; timeout -s INT 2 pbrd run"], check=False)
    lock = "import fcntl,os; fcntl.flock(os.open('/run/pbrd/pbrd.pid', 0), fcntl.LOCK_EX)"
    refused = box.run([python(), "-c", lock], "User=nobody", check=False)
    assert "PermissionError" in refused.stderr


def test_nothing_that_pbrd_does_is_denied_to_it(make_box: MakeBox, lab: Lab) -> None:
    """nft, conntrack, cgroups and sysctls: under the unit's filters, not only under root."""
    config = CONFIG.replace("[[policies]]", NFTABLES + "[[policies]]", 1)
    for name in ("fiber", "lte"):
        config = config.replace(f'interface = "{name}"', f'interface = "{name}"\nnat = true')
    service = start(make_box, lab, config)
    service.box.enter(["systemctl", "start", *SLICES])
    pings = lab.counter(f"ip daddr {TARGETS[0]} icmp type echo-request")

    def leaves_by_lte(unit: str) -> bool:
        before = pings.read()["lte"]
        service.box.run(["ping", "-c", "1", "-W", "1", TARGETS[0]], f"Slice={unit}", check=False)
        return pings.read()["lte"] == before + 1

    # pbrd hears of a new one a moment later
    assert eventually(lambda: leaves_by_lte(SLICES[0]))
    assert eventually(lambda: leaves_by_lte(SLICES[1]))
    stream = Leaving(lab)
    lab.silence(0)
    eventually(lambda: lab.exit_of(src=LAN[0], within=0.2) == "lte")
    time.sleep(0.5)
    assert stream.stop()[0] == ["fiber", "lte"]  # evicted from NAT's table, or it would have stayed
    denied = [line for line in service.log.splitlines() if re.search("permitted|denied|Traceback", line)]
    assert denied == []


def test_stopping_takes_everything_away_if_the_config_says_so(make_box: MakeBox, lab: Lab) -> None:
    before = lab.run(lab.router, "ip", "rule").stdout
    service = start(make_box, lab, '[daemon]\non_stop = "flush"\n' + CONFIG)
    service.systemctl("stop")
    assert service.show("ActiveState", "Result") == ("inactive", "success")
    assert lab.run(lab.router, "ip", "rule").stdout == before
    assert (
        lab.run(lab.router, "ip", "route", "show", "table", "all", "proto", "112", check=False).stdout == ""
    )
    assert (
        lab.run(lab.router, "cat", "/proc/sys/net/ipv4/conf/fiber/ignore_routes_with_linkdown").stdout
        == "0\n"
    )
