"""The files of a config, and whether they are still as they were when it was read."""

import os
from collections.abc import Mapping
from pathlib import Path

from pbrd import config
from pbrd.settings import Config

Stamp = tuple[int, int, int]  # modified at (ns), bytes, inode; of a file that isn't there: zeros
Sources = Mapping[str, Stamp]


def load(path: Path) -> tuple[Config, Sources]:
    """Return the config of `path`, and the files that it was read from. Raises ConfigError."""
    found: dict[str, Stamp] = {}

    def note(file: str) -> None:
        found[file] = _stamp(file)

    return config.load(path, seen=note), found


def changed(path: Path, sources: Sources) -> list[str]:
    """Return the files of the config at `path` that were written, made or removed since `load`."""
    folder = path.parent / "conf.d"
    now = {str(file) for file in folder.glob("*.toml") if not file.name.startswith(".")}
    return [file for file in sorted({*sources, *now}) if _stamp(file) != sources.get(file)]


def _stamp(file: str) -> Stamp:
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
