"""What the documents promise: the configs they show are accepted, and they name every key that there is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pbrd import config, settings

ROOT = Path(__file__).parent.parent
SPELT = {"source": "from", "destination": "to", "source_file": "from_file", "destination_file": "to_file"}
NOT_KEYS = {"name", "index"}  # of uplinks: the name is the section's, the index its place


def configs() -> dict[str, str]:
    shown = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tunnel,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "neighbours.md").read_text(), re.DOTALL)
    return {
        "README.md": shown[0],
        "neighbours.md": tunnel,
        "pbrd.toml.example": (ROOT / "etc" / "pbrd.toml").read_text(),
    }


@pytest.mark.parametrize("source", configs())
def test_shown_configs_are_accepted(source: str, tmp_path: Path) -> None:
    file = tmp_path / "pbrd.toml"
    file.write_text(configs()[source])
    assert config.load(file).uplinks


@pytest.mark.parametrize(
    "section", [settings.Daemon, settings.Probe, settings.Uplink, settings.Policy, settings.Match]
)
def test_every_key_is_documented(section: type) -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    keys = {SPELT.get(field.name, field.name) for field in fields(section)} - NOT_KEYS
    assert {key for key in keys if f"`{key}`" not in text} == set()
