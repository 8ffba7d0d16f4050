"""What reaches a terminal: nothing that it would obey, whoever wrote it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HEAD, PROBE, ROOT, UPLINKS, StartDaemon, eventually
from test_hooks import write

from pbrd import log
from pbrd.history import row
from pbrd.lab import Lab
from pbrd.printable import printable, to_json

CONFIG = f"""{HEAD}{PROBE}{UPLINKS}
[default]
via = ["fiber", "lte"]
"""
CLEAR = "\x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fiber → lte ü 火", "fiber → lte ü 火"),
        (f"{CLEAR}\x07\0\x7f\r", "?[2J????"),
        ("\x9b2J \u202efed", "?2J ?fed"),  # C1, which xterm obeys; RIGHT-TO-LEFT OVERRIDE
        ("\ud800", "?"),
        ("a\n\tb", "a\n\tb"),
    ],
)
def test_what_has_no_shape_becomes_a_question_mark(text: str, shown: str) -> None:
    assert printable(text, "\n\t") == shown


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_the_same_document_and_nothing_in_it_is_obeyed(indent: int | None) -> None:
    document = {"reason": [f"{CLEAR}\x9b2J\x7f\u202e \U000e0001 ü →\n"]}
    text = to_json(document, indent)
    assert json.loads(text) == document
    assert all(line.isprintable() for line in text.split("\n"))
    assert "ü →" in text


def test_no_cell_of_an_event_is_obeyed() -> None:
    names = ("event", "uplink", "policy", "old", "new", "reason", "message")
    cells = row({"time": "2026-11-22T17:43:48.723Z"} | dict.fromkeys(names, CLEAR))
    assert all(cell.isprintable() for cell in cells)


def test_what_a_hook_prints_is_not_obeyed(lab: Lab, daemon: StartDaemon, tmp_path: Path) -> None:
    write(tmp_path / "daemon0" / "hooks.d", "10-red", r"printf '\033[2J\033[31mred\t!\n'")
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: "hook 10-red: ?[2J?[31mred\t!" in pbrd.log)
    assert "\x1b" not in pbrd.log
    entry = log.fields("info", {"event": f"hook 10-red: {CLEAR}", "hook": "10-red"}, {})
    assert entry["MESSAGE"] == "hook 10-red: ?[2J"  # which journalctl would not show


def test_what_a_config_says_is_not_obeyed(tmp_path: Path) -> None:
    config = tmp_path / "pbrd.toml"
    config.write_text(f'{UPLINKS}["\\u001b[2J\\u009b2J"]\n[default]\nvia = ["\\u001b[2J"]\n')
    argv = [sys.executable, "-m", "pbrd", "check", "--no-machine", str(config)]
    told = subprocess.run(argv, check=False, cwd=ROOT, text=True, capture_output=True, timeout=30).stderr
    assert "[2J" in told
    assert all(line.isprintable() for line in told.split("\n"))
