"""The values that sysctls had before pbrd: kept over restarts, and never a reason not to start."""

import json
from pathlib import Path

import pytest
from conftest import HEAD, UPLINKS, StartDaemon

from pbrd import sysctl
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
        json.dumps({"boot": BOOT}),
        json.dumps({"boot": BOOT, "values": [1]}),
        json.dumps({"boot": BOOT, "values": {KEY: None}}),
        json.dumps({"boot": BOOT, "values": {KEY: 1e999}}),
        json.dumps({"boot": BOOT, "values": {"fiber": 1}}),
    ],
)
def test_a_broken_state_file_is_set_aside(text: str, tmp_path: Path) -> None:
    file = tmp_path / "sysctls.json"
    file.write_text(text, encoding="latin-1")
    originals = Originals(file)
    assert originals.values == {}
    assert originals.trouble == f"{file} is broken: it is now sysctls.json.broken"
    assert [path.name for path in tmp_path.iterdir()] == ["sysctls.json.broken"]


def test_the_values_of_another_boot_are_forgotten_and_no_mistake(tmp_path: Path) -> None:
    file = tmp_path / "sysctls.json"
    file.write_text(json.dumps({"boot": "another", "values": {KEY: 1}}))
    assert Originals(file).values == {}
    assert file.exists()


def test_a_state_file_is_no_must(tmp_path: Path) -> None:
    assert Originals(tmp_path / "absent" / "sysctls.json").values == {}
    (tmp_path / "sysctls.json").mkdir()
    assert Originals(tmp_path / "sysctls.json").values == {}
    assert (tmp_path / "sysctls.json").is_dir()


def test_a_kernel_that_names_no_boot_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysctl, "BOOT_ID", tmp_path / "absent")
    (tmp_path / "sysctls.json").write_text(json.dumps({"boot": "", "values": {KEY: 1}}))
    assert Originals(tmp_path / "sysctls.json").values == {KEY: 1}


def test_the_daemon_starts_with_a_broken_state_file_and_begins_a_fresh_one(
    lab: Lab, daemon: StartDaemon, tmp_path: Path
) -> None:
    state = tmp_path / "daemon0" / "state"
    state.mkdir(parents=True)
    (state / "sysctls.json").write_text(json.dumps({"boot": BOOT}))
    daemon(lab, f"{HEAD}[probe]\ntargets = []\n{UPLINKS}")
    assert (state / "sysctls.json.broken").exists()
    assert json.loads((state / "sysctls.json").read_text())["values"]
