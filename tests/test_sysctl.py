"""The values that sysctls had before pbrd: kept over restarts, and never a reason not to start."""

import json
from pathlib import Path
from signal import SIGKILL

import pytest
from conftest import HEAD, UPLINKS, MakeLab, StartDaemon, eventually

from pbrd.lab import Lab
from pbrd.sysctl import Originals

KEY = "/proc/sys/net/ipv4/conf/fiber/rp_filter"
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\xff",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        json.dumps({"values": [1]}),
        json.dumps({"values": {KEY: None}}),
        json.dumps({"values": {KEY: 1e999}}),
        json.dumps({"values": {"fiber": 1}}),
    ],
)
def test_a_broken_state_file_is_set_aside(text: str, tmp_path: Path) -> None:
    file = tmp_path / "sysctls.json"
    file.write_text(text, encoding="latin-1")
    originals = Originals(file)
    assert originals.values == {}
    assert originals.trouble == f"{file} is broken: it is now sysctls.json.broken"
    assert [path.name for path in tmp_path.iterdir()] == ["sysctls.json.broken"]


def test_what_an_earlier_version_kept_of_this_boot_is_taken_over(tmp_path: Path) -> None:
    file, former = tmp_path / "run" / "sysctls.json", tmp_path / "state.json"
    former.write_text(json.dumps({"boot": "another", "values": {KEY: 1}}))
    assert Originals(file, former).values == {}
    assert former.exists()
    former.write_text(json.dumps({"boot": BOOT, "values": {KEY: 1}}))
    assert Originals(file, former).values == {KEY: 1}
    assert not former.exists()
    assert Originals(file, former).values == {KEY: 1}


def test_a_state_file_is_no_must(tmp_path: Path) -> None:
    assert Originals(tmp_path / "absent" / "sysctls.json").values == {}
    (tmp_path / "sysctls.json").mkdir()
    assert Originals(tmp_path / "sysctls.json").values == {}
    assert (tmp_path / "sysctls.json").is_dir()


def test_the_daemon_starts_with_a_broken_state_file_and_begins_a_fresh_one(
    lab: Lab, daemon: StartDaemon, tmp_path: Path
) -> None:
    state = tmp_path / "daemon0" / "run"
    state.mkdir(parents=True)
    (state / "sysctls.json").write_text("{}")
    daemon(lab, f"{HEAD}[probe]\ntargets = []\n{UPLINKS}")
    assert (state / "sysctls.json.broken").exists()
    assert json.loads((state / "sysctls.json").read_text())["values"]


def test_offline_flush_puts_back_what_a_killed_daemon_had_set_and_not_what_a_living_one_holds(
    make_lab: MakeLab, daemon: StartDaemon
) -> None:
    lab = make_lab(rp_filter=1)
    pbrd = daemon(lab, f"{HEAD}[probe]\ntargets = []\n{UPLINKS}")
    files = ("--config", str(pbrd.config), "--state-dir", str(pbrd.config.parent / "state"))
    assert value(lab) == "2"
    (pbrd.runtime / "pbrd.sock").unlink()
    refused = pbrd.command("flush", *files)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert (
        f"another pbrd already runs in this network namespace (pid {pbrd.pid}); stop it first"
        in refused.stderr
    )
    assert value(lab) == "2"
    eventually(pbrd.status, within=20)  # it makes its socket anew
    pbrd.stop(SIGKILL)
    flushed = pbrd.command("flush", *files)
    assert (flushed.returncode, value(lab)) == (0, "1")
    assert "sysctl net.ipv4.conf.fiber.rp_filter=1" in flushed.stdout


def value(lab: Lab) -> str:
    return lab.run(lab.router, "cat", KEY).stdout.strip()
