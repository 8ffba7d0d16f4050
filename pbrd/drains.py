"""Which uplinks are drained: kept in the state directory, as after a reboot the kernel can't say."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def load(path: Path) -> frozenset[str]:
    """Return the names of the drained uplinks; a broken file is set aside."""
    try:
        names = json.loads(path.read_text())["drained"]
        return frozenset(name for name in names if isinstance(name, str))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, TypeError, LookupError):
        with suppress(OSError):
            path.replace(path.with_suffix(".broken"))
        return frozenset()


def save(path: Path, names: Iterable[str]) -> str | None:
    """Write them down; return why that failed, or None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps({"drained": sorted(names)}))
        draft.replace(path)
    except OSError as error:
        return f"cannot write {error.filename or path}: {error.strerror}"
    return None
