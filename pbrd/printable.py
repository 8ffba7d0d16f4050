"""Text that others may have had a hand in, made fit for a terminal: it shows, and nothing obeys it.

Others are whoever writes into the journal, prints in a hook, or named a file. Escape sequences move the
cursor and hide what stands there; characters that turn the direction of writing hide it, too.
"""

import json
from typing import Any


def printable(text: str, keep: str = "") -> str:
    """Return `text` with "?" for each character that has no shape, but for those in `keep`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else "?" for one in text)


def to_json(document: Any, indent: int | None = None) -> str:
    r"""Return JSON in which all that has no shape is escaped (\u009b): json leaves it from DEL on."""
    lines = json.dumps(document, ensure_ascii=False, indent=indent).split("\n")
    return "\n".join(line if line.isprintable() else _escaped(line) for line in lines)


def _escaped(line: str) -> str:
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in line)
