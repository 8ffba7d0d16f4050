"""What rulesets of other firewalls do to marks, and what they offload: from the words of nft and iptables.

Text in, values out. Copying a mark between packet and connection is passed over: both hold the same of pbrd.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

ALL = 0xFFFFFFFF
OURS = ("inet", "pbrd")  # the table that is pbrd's own
TARGET = re.compile(r"-A (\S+) .*-j (CONN)?MARK --set-xmark (0x[0-9a-f]+)/(0x[0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class MarkSetter:
    """A firewall's chain that writes marks: bits in `changed` are no longer what they were."""

    place: str
    changed: int
    sets: int  # bits that it may set; as far as it can be seen


@dataclass(frozen=True, slots=True)
class Flowtable:
    """An nft flowtable: established connections between its devices pass rules and routes by."""

    place: str
    devices: tuple[str, ...]


def of_nft(text: str) -> tuple[tuple[MarkSetter, ...], tuple[Flowtable, ...]]:
    """Read what `nft -j list ruleset` prints (libnftables-json(5)); nothing from what isn't that."""
    try:
        items = json.loads(text)["nftables"]
    except (ValueError, LookupError, TypeError):
        return (), ()
    setters: dict[MarkSetter, None] = {}
    flowtables = []
    for item in items:
        with suppress(LookupError, TypeError, AttributeError):  # words of a newer nft
            if rule := item.get("rule"):
                setters.update(dict.fromkeys(_setters(rule)))
            elif table := item.get("flowtable"):
                devices = table.get("dev", ())
                names = (devices,) if isinstance(devices, str) else tuple(devices)
                flowtables.append(Flowtable(f"nft flowtable {table['family']} {table['name']}", names))
    return tuple(setters), tuple(flowtables)


def _setters(rule: Any) -> Iterator[MarkSetter]:
    if (rule["family"], rule["table"]) == OURS:
        return
    place = f"nft table {rule['family']} {rule['table']}, chain {rule['chain']}"
    for expression in rule.get("expr", ()):
        mangle = expression.get("mangle") if isinstance(expression, dict) else None
        if mangle and _is_mark(mangle["key"]):
            keeps, sets = _effect(mangle["value"])
            yield MarkSetter(place, ALL & ~keeps | sets, sets)


def _is_mark(key: Any) -> bool:
    return isinstance(key, dict) and any(
        isinstance(key.get(of), dict) and key[of].get("key") == "mark" for of in ("meta", "ct")
    )


def _effect(value: Any) -> tuple[int, int]:
    """Return the bits of the mark that an expression keeps, and those that it sets for sure."""
    if isinstance(value, int):
        return 0, value & ALL
    if _is_mark(value):
        return ALL, 0
    if isinstance(value, dict) and len(value) == 1:
        operator, operands = next(iter(value.items()))
        if operator in ("|", "&", "^") and isinstance(operands, list) and operands:
            keeps, sets = _effect(operands[0])
            for operand in operands[1:]:
                keeps, sets = _combined(operator, (keeps, sets), _effect(operand))
            return keeps, sets
    return 0, 0  # a map, a hash: who knows


def _combined(operator: str, left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    keeps, sets = left[0] | right[0], left[1] | right[1]
    if operator == "&":
        return (left[0] | left[1]) & (right[0] | right[1]) & keeps, left[1] & right[1]
    if operator == "^":
        return keeps & ~sets, sets
    return keeps, sets


def of_iptables(command: str, text: str) -> tuple[MarkSetter, ...]:
    """Read what iptables-save(8) prints; `command` is the one that a place names: "iptables", "ip6tables"."""
    table = ""
    found: dict[MarkSetter, None] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif target := TARGET.match(line):
            sets, mask = int(target[3], 16), int(target[4], 16)
            setter = MarkSetter(f"{command} -t {table}, chain {target[1]}", mask | sets, sets)
            found[setter] = None
    return tuple(found)
