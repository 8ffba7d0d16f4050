"""The names of tables and protocol: written for iproute2, and only what is ours is ever replaced."""

from pathlib import Path

import pytest
from conftest import UPLINKS, StartDaemon

from pbrd.lab import Lab


def config(directory: Path) -> str:
    return f'[daemon]\nnames = "{directory}"\n[probe]\ntargets = []\n{UPLINKS}'


def test_tables_and_protocol_get_names_and_flush_takes_them_away(
    lab: Lab, daemon: StartDaemon, tmp_path: Path
) -> None:
    names = tmp_path / "iproute2"
    pbrd = daemon(lab, config(names))
    tables = (names / "rt_tables.d" / "pbrd.conf").read_text()
    assert tables.splitlines()[1:] == ["200 fiber", "201 lte", "1200 fiber-path", "1201 lte-path"]
    assert "112 pbrd" in (names / "rt_protos.d" / "pbrd.conf").read_text()
    pbrd.reload(config(names).replace("uplinks.lte", "uplinks.mobile"))
    assert "201 mobile" in (names / "rt_tables.d" / "pbrd.conf").read_text()
    pbrd.command("flush")
    assert [path for path in names.rglob("*") if path.is_file()] == []


def test_a_file_of_somebody_else_stays(lab: Lab, daemon: StartDaemon, tmp_path: Path) -> None:
    theirs = tmp_path / "iproute2" / "rt_protos.d" / "pbrd.conf"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("112 pbrd\n")
    pbrd = daemon(lab, config(tmp_path / "iproute2"))
    pbrd.command("flush")
    assert theirs.read_text() == "112 pbrd\n"


@pytest.mark.parametrize("other", ["elsewhere", ""])
def test_names_that_move_leave_nothing_behind(
    lab: Lab, daemon: StartDaemon, tmp_path: Path, other: str
) -> None:
    before = config(tmp_path / "iproute2")
    pbrd = daemon(lab, before)
    theirs = tmp_path / "iproute2" / "rt_tables.d" / "theirs.conf"
    theirs.write_text("7 seven\n")
    after = str(tmp_path / other) if other else ""
    assert pbrd.reload(before.replace(str(tmp_path / "iproute2"), after)).returncode == 0
    assert [path for path in (tmp_path / "iproute2").rglob("*") if path.is_file()] == [theirs]
    assert (tmp_path / "elsewhere" / "rt_tables.d" / "pbrd.conf").exists() is bool(other)


@pytest.mark.parametrize("start", [b"", b"# written by pbrd; changes are lost\n"])
def test_a_file_in_another_encoding_stops_nothing(
    lab: Lab, daemon: StartDaemon, tmp_path: Path, start: bytes
) -> None:
    file = tmp_path / "iproute2" / "rt_tables.d" / "pbrd.conf"
    file.parent.mkdir(parents=True)
    file.write_bytes(start + b"7 caf\xe9\n")
    pbrd = daemon(lab, config(tmp_path / "iproute2"))
    pbrd.command("flush")
    assert file.exists() is not bool(start)  # what does not begin with our header is not ours


def test_names_that_cant_be_written_stop_nothing(lab: Lab, daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pbrd = daemon(lab, config(tmp_path / "file"))
    assert pbrd.uplink("fiber")["state"] == "up"
    assert "table names are not registered" in pbrd.log
