"""Which uplinks are drained: kept in the state directory, as after a reboot the kernel can't say."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pbrd import statefile


def load(path: Path) -> tuple[frozenset[str], str]:
    """Return the names of the drained uplinks, and what was wrong with the file, or ""."""
    names, trouble = statefile.load(path, _names)
    return names or frozenset(), trouble


def save(path: Path, names: Iterable[str]) -> str:
    """Write them down; return why that failed, or ""."""
    return statefile.save(path, {"drained": sorted(names)})


def _names(document: Any) -> frozenset[str]:
    names = document["drained"]
    if not isinstance(names, list):
        raise TypeError(names)
    return frozenset(name for name in names if isinstance(name, str))
