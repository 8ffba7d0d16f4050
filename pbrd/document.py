"""TOML texts as one document: merged, each value with the file it came from, read by tables of parsers.

A section is described by a mapping from key to parser, so that a new key touches one line. A parser
takes what TOML holds and returns the value, or raises ValueError with a remark (`values`). Nothing
stops at the first mistake: all are gathered in a `Report`.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pbrd.errors import Problem
from pbrd.values import shown, string, whole_number, wrong_type

Parser = Callable[[object], Any]
Shape = Mapping[str, Any]  # which keys are tables of their own ("*": all), and their shapes

# Merged key by key over all files. All else (lists, `balance`, …) is one value, and a later file replaces it.
SHAPE: Shape = {"daemon": {}, "probe": {}, "default": {}, "uplinks": {"*": {"probe": {}}}}
POLICY_SHAPE: Shape = {"match": {}}
SECTIONS = ("daemon", "probe", "uplinks", "policies", "default")

# What tomllib says of the slips that people make, and what would be right.
SYNTAX_HINTS = {
    "Invalid value": 'strings need quotes, as in interface = "eth0"',
    "Cannot overwrite a value": "the key stands there already; keep one",
    "Expected '=' after a key": "write KEY = VALUE; names with blanks need quotes",
    "Unclosed array": 'close it by "]"',
    "Expected newline or end of document": 'strings need quotes, as in gateway = "10.0.0.1"',
    "Invalid initial character for a key part": "a table in braces, { ... }, must stand on one line",
    "Illegal character '\\n'": "a quote that closes the string is missing",
}


class Mistakes(ValueError):
    """Several mistakes inside one value, each with its place below the key, as in `[1]`."""

    def __init__(self, mistakes: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(remark for _, remark in mistakes))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True, slots=True)
class Cell:
    """A value as TOML holds it, and the file in which it stands."""

    value: object
    file: str


@dataclass(slots=True)
class Table:
    """A table, merged from one or more files; `file` is the first of them."""

    place: str
    file: str
    cells: dict[str, Cell] = field(default_factory=dict)
    tables: dict[str, "Table"] = field(default_factory=dict)


class Report:
    """The problems found so far; the same one twice counts once."""

    def __init__(self) -> None:
        self._problems: dict[Problem, None] = {}
        self.whole = True  # False: a file could not be read, so what seems to be missing may stand there

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that was found, in that order."""
        return tuple(self._problems)

    def add(self, file: str, place: str, remark: str) -> None:
        """Note a problem."""
        self._problems[Problem(file, place, remark)] = None

    def at(self, table: Table, key: str, remark: str) -> None:
        """Note a problem of a key of `table`, in the file where the key stands."""
        cell = table.cells.get(key)
        self.add(cell.file if cell else table.file, below(table.place, key), remark)

    def missing(self, table: Table, key: str, remark: str) -> None:
        """Note the problem of something that stands in no file, unless not all files could be read."""
        if self.whole:
            self.at(table, key, remark)


def below(place: str, key: str) -> str:
    """Return the dotted place of `key` in the table at `place`."""
    quoted = key if re.fullmatch("[A-Za-z0-9_-]+", key) else shown(key)
    return f"{place}.{quoted}" if place else quoted


def toml(file: str, text: str, report: Report) -> dict[str, Any]:
    """Return the data of a TOML text; a syntax error is reported with line and column."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        report.add(file, "", "lists or tables are nested too deeply; four levels are enough here")
    except ValueError as error:  # tomllib raises its own, and int()'s for a number without end
        report.add(file, *_syntax_error(str(error), text))
    report.whole = False
    return {}


def _syntax_error(message: str, text: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.*) \(at (?:(line \d+, column \d+)|end of document)\)", message, re.DOTALL)
    if not found:
        return "", f"is no valid TOML: {message}"
    lines = text.split("\n")
    what, place = found[1], found[2] or f"line {len(lines)}, column {len(lines[-1]) + 1}"
    number = int(place.split(",")[0].split()[1])
    if what.startswith("Cannot overwrite a value") and lines[number - 1].lstrip().startswith("[[policies]]"):
        return place, _doubled("'policies'")
    if double := re.fullmatch(r"Cannot declare \((.*)\) twice", what, re.DOTALL):
        return place, _doubled(double[1])
    hint = next((f"; {hint}" for start, hint in SYNTAX_HINTS.items() if what.startswith(start)), "")
    return place, f"{what[:1].lower()}{what[1:]}{hint}"


def _doubled(keys: str) -> str:
    """Return the remark on a section that stands twice; `keys` is how Python shows a tuple of them."""
    place = ""
    for key in re.findall(r"""'[^']*'|"[^"]*\"""", keys):
        place = below(place, key[1:-1])
    if place == "policies":
        return "[policies] and [[policies]] exclude each other; write each policy as [[policies]]"
    return f"[{place}] stands there already; write all of its keys there"


def overlay(table: Table, data: Mapping[str, Any], file: str, shape: Shape, report: Report) -> None:
    """Merge `data` of a file over `table`, key by key in the tables that `shape` names."""
    for key, value in data.items():
        inner = shape.get(key, shape.get("*"))
        if inner is None:
            table.cells[key] = Cell(value, file)
            continue
        place = below(table.place, key)
        if isinstance(value, dict):
            overlay(table.tables.setdefault(key, Table(place, file)), value, file, inner, report)
        else:
            report.add(file, place, str(wrong_type(value, f"a table [{place}]")))


def policy_tables(data: Mapping[str, Any], file: str, report: Report) -> list[Table]:
    """Return a table for each of the `[[policies]]` of a file; they are counted in each file from 0."""
    items = data.get("policies", [])
    if not isinstance(items, list):
        report.add(file, "policies", str(wrong_type(items, "each policy as [[policies]]")))
        return []
    tables = []
    for index, item in enumerate(items):
        table = Table(f"policies[{index}]", file)
        if isinstance(item, dict):
            shape = POLICY_SHAPE if isinstance(item.get("match"), dict) else {}
            overlay(table, item, file, shape, report)
            tables.append(table)
        else:
            report.add(file, table.place, str(wrong_type(item, "each policy as [[policies]]")))
    return tables


def read(
    table: Table, keys: Mapping[str, Parser], report: Report, tables: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the values of all good keys of `table`; report unknown keys and bad values.

    `tables` are the keys that are tables of their own, and read by themselves.
    """
    values: dict[str, Any] = {}
    for key, cell in table.cells.items():
        parse = keys.get(key)
        if parse is None:
            report.at(table, key, unknown("key", key, (*keys, *tables)))
            continue
        try:
            values[key] = parse(cell.value)
        except Mistakes as error:
            for suffix, remark in error.mistakes:
                report.add(cell.file, below(table.place, key) + suffix, remark)
        except ValueError as error:
            report.at(table, key, str(error))
    return values


def unknown(noun: str, key: str, known: Iterable[str]) -> str:
    """Return the remark on a key or section that does not exist, with the nearest that does."""
    known = sorted(set(known))
    return f"there is no such {noun}" + (did_you_mean(key, known) or f"; there are {', '.join(known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean "X"?)`, or nothing if no known name is near."""
    known = list(known)
    near = ["dport"] if name == "port" and "dport" in known else difflib.get_close_matches(name, known, n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def many(parse: Parser, empty: str = "") -> Parser:
    """Return a parser of one item or a list of them into a tuple without doubles.

    `empty` is the remark on an empty list; without it an empty list is allowed.
    """

    def parse_all(value: object) -> tuple[Any, ...]:
        items = value if isinstance(value, list) else [value]
        if empty and not items:
            raise ValueError(empty)
        results, mistakes = [], []
        for index, item in enumerate(items):
            try:
                results.append(parse(item))
            except ValueError as error:
                mistakes.append((f"[{index}]" if isinstance(value, list) else "", str(error)))
        if mistakes:
            raise Mistakes(mistakes)
        return tuple(dict.fromkeys(results))

    return parse_all


def choice(kind: type[StrEnum]) -> Parser:
    """Return a parser of the members of an enum."""
    members = {member.value: member for member in kind}
    names = list(members)
    wanted = ", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"'

    def parse(value: object) -> StrEnum:
        text = string(value, wanted)
        if text not in members:
            raise ValueError(f"{shown(value)} is no choice{did_you_mean(text, names)}; write {wanted}")
        return members[text]

    return parse


def integer(low: int, high: int) -> Parser:
    """Return a parser of numbers (strings won't do) from `low` to `high`."""
    wanted = f"a number from {low} to {high}"

    def parse(value: object) -> int:
        if isinstance(value, str):
            raise wrong_type(value, wanted)
        return whole_number(value, low, high, wanted)

    return parse


def between(parse: Parser, low: str, high: str, zero: bool = False) -> Parser:
    """Return a parser with limits, given as people write them; `zero` allows 0 beside them."""
    lowest, highest = parse(low), parse(high)

    def parse_limited(value: object) -> Any:
        result = parse(value)
        if not (lowest <= result <= highest or (zero and not result)):
            off = ', or "0"' if zero else ""
            raise ValueError(f'{shown(value)} is out of range; write "{low}" to "{high}"{off}')
        return result

    return parse_limited
