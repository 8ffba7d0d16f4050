"""Small JSON files in the state directory: read, set aside when broken, and replaced as a whole."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
LIMIT = 1 << 20  # bytes; a hundred uplinks take some kilobytes


def load(path: Path, take: Callable[[Any], T]) -> tuple[T | None, str]:
    """Return what `take` makes of the file at `path`, or None; and what was wrong with it, or "".

    A file that is not there is fine. A broken one, whatever `take` finds wrong with it, is set aside, so that
    the next `save` doesn't overwrite what somebody may want to look at.
    """
    try:
        if path.exists() and not path.is_file():  # to read a pipe is to wait, and a device may have no end
            return None, f"cannot read {path}: not a regular file"
        with path.open("rb") as file:
            text = file.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ValueError("too long")
        return take(json.loads(text)), ""
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"cannot read {path}: {error.strerror}"
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        aside = path.with_suffix(f"{path.suffix}.broken")
        with suppress(OSError):
            path.replace(aside)
            return None, f"{path} is broken: it is now {aside.name}"
        return None, f"{path} is broken"


def save(path: Path, document: Any) -> str:
    """Write `document`, as a whole or not at all; return why that failed, or ""."""
    draft = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(document))
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)  # on a full disk it is empty or half
        return f"cannot write {error.filename or path}: {error.strerror}"
    return ""
