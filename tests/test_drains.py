"""The drained uplinks in the state directory: kept, and never a reason not to start."""

import json
import os
from pathlib import Path

import pytest

from pbrd import drains


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "state" / "drained.json"
    assert drains.load(file) == (frozenset(), "")
    assert drains.save(file, {"lte", "dsl"}) == ""
    assert drains.load(file) == (frozenset({"dsl", "lte"}), "")
    assert [path.name for path in file.parent.iterdir()] == ["drained.json"]


@pytest.mark.parametrize(
    "text",
    ["", "\xff", "{", "[" * 100_000, "[]", "{}", '{"drained": null}', '{"drained": "lte"}', '{"drained": 1}'],
)
def test_a_broken_file_is_set_aside(text: str, tmp_path: Path) -> None:
    file = tmp_path / "drained.json"
    file.write_text(text, encoding="latin-1")
    assert drains.load(file) == (frozenset(), f"{file} is broken: it is now drained.json.broken")
    assert drains.load(file) == (frozenset(), "")
    assert (tmp_path / "drained.json.broken").read_text(encoding="latin-1") == text


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "drained.json"
    os.mkfifo(file)
    assert drains.load(file) == (frozenset(), f"cannot read {file}: not a regular file")
    file.unlink()
    file.symlink_to("/dev/zero")
    assert drains.load(file) == (frozenset(), f"cannot read {file}: not a regular file")


def test_a_file_without_end_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "drained.json"
    with file.open("wb") as large:
        large.truncate(1 << 40)
    assert drains.load(file)[1] == f"{file} is broken: it is now drained.json.broken"


def test_what_is_no_name_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "drained.json").write_text(json.dumps({"drained": ["lte", 1, None]}))
    assert drains.load(tmp_path / "drained.json")[0] == {"lte"}


def test_what_cannot_be_written_is_told() -> None:
    assert drains.save(Path("/proc/drained.json"), {"lte"}).startswith("cannot write /proc/drained.new: ")
