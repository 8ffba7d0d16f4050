"""`[[policies]]` and `[default]`: from TOML to `Policy`, each with its `Match`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import PurePath

from pbrd import values
from pbrd.document import Mistakes, Parser, Report, Table, below, choice, did_you_mean, integer, many, read
from pbrd.prefixes import LONG, Prefixes, versions
from pbrd.settings import (
    DEFAULT_POLICY,
    MAIN,
    Failback,
    Fallback,
    Mark,
    Match,
    Policy,
    Range,
    Sticky,
)
from pbrd.values import PORT_PROTOCOLS, PROTOCOLS, shown

Lookup = Callable[[str], int]  # the id of a user or group; KeyError if there is none of that name
ReadText = Callable[[str], str]  # the text of the file at a path; OSError, UnicodeDecodeError

EMPTY_LIST = "an empty list matches nothing; leave the key out to match anything"
FILE_PROBLEMS = 10  # of one prefix file; more of them only say that it is some other kind of file
FIELDS = {"from": "source", "to": "destination", "from_file": "source_file", "to_file": "destination_file"}
LOCAL_ONLY = ("user", "group", "unit")  # they belong to sockets, so to traffic of this host
MODIFIERS = frozenset({"override_main"})  # keys of `match` that select nothing


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What policies refer to beyond themselves."""

    uplinks: tuple[str, ...]
    fwmark_mask: int
    users: Lookup
    groups: Lookup
    read_text: ReadText


@dataclass(frozen=True, slots=True)
class Keys:
    """What reads each key: made once, for thousands of policies."""

    policy: Mapping[str, Parser]
    default: Mapping[str, Parser]
    match: Mapping[str, Parser]
    read_text: ReadText


def keys_among(around: Surroundings, report: Report) -> Keys:
    """Return the keys of policies that refer to `around`."""
    outcome = {
        "via": _via(around.uplinks, report),
        "balance": _balance(around.uplinks, report),
        "sticky": choice(Sticky),
        "fallback": choice(Fallback),
        "failback": choice(Failback),
    }
    return Keys(
        {"name": values.name, "match": _no_table, **outcome},
        {"name": _not_in_default, "match": _not_in_default, **outcome},
        _match_keys(around),
        around.read_text,
    )


def read_policy(table: Table, keys: Keys, report: Report) -> Policy:
    """Return one of `[[policies]]`, complete as far as it is good."""
    found = read(table, keys.policy, report)
    if "name" not in table.cells:
        report.at(table, "name", 'is missing; give the policy a name of its own, as in name = "backups"')
    if "match" in table.tables:
        found["match"] = _read_match(table.tables["match"], keys, report)
    elif "match" not in table.cells:
        report.at(table, "match", "is missing; say which traffic, or use [default] for everything")
    _judge_outcome(table, report)
    return Policy(**{"name": "", **found})


def read_default(table: Table, keys: Keys, report: Report) -> Policy:
    """Return `[default]`, complete as far as it is good."""
    found = read(table, keys.default, report)
    _judge_outcome(table, report)
    return Policy(**{**found, "name": DEFAULT_POLICY})


def _no_table(value: object) -> None:
    """Refuse what stands as `match` and is no table (`overlay` takes those)."""
    raise values.wrong_type(value, 'a table, as in match = { from = ["192.168.1.100"] }')


def _not_in_default(_: object) -> None:
    raise ValueError("[default] is everything that no policy decided; leave this out, or write [[policies]]")


def _judge_outcome(table: Table, report: Report) -> None:
    if "via" not in table.cells and "balance" not in table.cells:
        report.at(table, "via", 'is missing; name uplinks, best first, as in via = ["fiber", "lte"]')
    if "via" in table.cells and "balance" in table.cells:
        report.at(table, "balance", "via and balance exclude each other; keep one of them")
    if "sticky" in table.cells and "balance" not in table.cells:
        report.at(table, "sticky", "needs balance; leave it out, with via a client keeps its uplink anyway")


def _uplink_name(uplinks: tuple[str, ...], report: Report, value: object) -> str:
    name = values.string(value, "the name of an uplink")
    if name != MAIN and name not in uplinks and report.whole:
        hint = did_you_mean(name, (*uplinks, MAIN))
        if not hint:
            names = ", ".join(shown(uplink) for uplink in uplinks)
            hint = f"; there are {names}" if uplinks else "; describe it in a section [uplinks.NAME]"
        raise ValueError(f"no uplink is called {shown(name)}{hint}")
    return name


def _via(uplinks: tuple[str, ...], report: Report) -> Parser:
    parse_all = many(
        lambda item: _uplink_name(uplinks, report, item), empty="is empty; name at least one uplink"
    )

    def parse(value: object) -> tuple[str, ...]:
        mistakes = []
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, str) and item in value[:index]:
                    mistakes.append((f"[{index}]", f"{shown(item)} stands here twice; keep the first"))
        try:
            result: tuple[str, ...] = parse_all(value)
        except Mistakes as error:
            mistakes += error.mistakes
        if mistakes:
            raise Mistakes(mistakes)
        return result

    return parse


def _balance(uplinks: tuple[str, ...], report: Report) -> Parser:
    weight = integer(1, 65535)

    def parse(value: object) -> tuple[tuple[str, int], ...]:
        if not isinstance(value, dict):
            raise values.wrong_type(value, "weights, as in balance = { fiber = 3, lte = 1 }")
        if not value:
            raise ValueError("is empty; write weights, as in balance = { fiber = 3, lte = 1 }")
        result, mistakes = [], []
        for name, share in value.items():
            try:
                if name == MAIN:
                    raise ValueError('"main" is no uplink and can take no share; name uplinks only')
                result.append((_uplink_name(uplinks, report, name), weight(share)))
            except ValueError as error:
                mistakes.append((f".{below('', name)}", str(error)))
        if mistakes:
            raise Mistakes(mistakes)
        return tuple(result)

    return parse


def _match_keys(around: Surroundings) -> Mapping[str, Parser]:
    scalars: Mapping[str, Parser] = {
        "from": values.prefix,
        "to": values.prefix,
        "iif": values.interface_pattern,
        "proto": values.proto,
        "sport": values.port_range,
        "dport": values.port_range,
        "user": lambda value: _identity(value, "user", around.users),
        "group": lambda value: _identity(value, "group", around.groups),
        "fwmark": lambda value: _foreign_mark(value, around.fwmark_mask),
        "dscp": values.dscp,
        "mac": values.mac,
        "unit": values.unit,
        "time": values.time_of_day,
        "days": values.day,
    }
    return {
        **{key: many(parse, EMPTY_LIST) for key, parse in scalars.items()},
        "from_file": _path,
        "to_file": _path,
        "override_main": values.boolean,
    }


def _path(value: object) -> str:
    text = values.string(value, 'the path of a file, as "networks.txt"')
    if not text or not text.isprintable():
        raise ValueError(f'{shown(value)} is no path; write one, as "networks.txt"')
    return text


def _identity(value: object, noun: str, lookup: Lookup) -> Range:
    """Return the range of an id, a range of ids, or a name."""
    if not isinstance(value, str) or re.fullmatch(r"[0-9][0-9\s-]*", value):
        return values.id_range(value)
    try:
        if not value.isprintable():
            raise KeyError(value)
        number = lookup(value)
    except KeyError:
        database = {"user": "passwd", "group": "group"}[noun]
        raise ValueError(
            f"no {noun} is called {shown(value)}; write one that `getent {database}` shows, or an id"
        ) from None
    return Range(number, number)


def _foreign_mark(value: object, own: int) -> Mark:
    """Return a mark restricted to the bits that are not pbrd's `own`."""
    mark = values.mark(value)
    free = ~own & (2**32 - 1)
    if mark.value & own or not mark.mask & free:
        remedy = f"use the free bits {free:#010x}" if free else "narrow it to leave bits free, as 0xff000000"
        raise ValueError(f"{shown(value)} lies in pbrd's own bits, daemon.fwmark_mask {own:#010x}; {remedy}")
    return Mark(mark.value, mark.mask & free)


def _read_match(table: Table, keys: Keys, report: Report) -> Match:
    found = read(table, keys.match, report)
    if not table.cells.keys() - MODIFIERS:
        report.add(
            table.file, table.place, "matches everything; say which traffic, or use [default] for everything"
        )
    for key, file_key in (("from", "from_file"), ("to", "to_file")):
        if file_key in found:
            listed = _read_prefixes(table, file_key, found[file_key], keys.read_text, report)
            found[key] = tuple(dict.fromkeys((*map(str, found.get(key, ())), *listed)))
        if len(found.get(key, ())) > LONG:
            found[key] = Prefixes.of(map(str, found[key]))
        elif file_key in found:
            found[key] = tuple(map(ip_network, found[key]))
    match = Match(**{FIELDS.get(key, key): value for key, value in found.items()})
    _judge_ports(table, match, report)
    _judge_local(table, match, report)
    sides = [versions(side) for side in (match.source, match.destination)]
    if all(sides) and not sides[0] & sides[1]:
        key = "to" if "to" in table.cells else "to_file"
        report.at(table, key, "can never match: from and to are of different IP versions; write both in one")
    return match


def _read_prefixes(table: Table, key: str, path: str, read_text: ReadText, report: Report) -> tuple[str, ...]:
    """Return the prefixes of a file, one a line, in canonical text; its problems are those of that file."""
    config = table.cells[key].file
    handed_over = config.startswith(("/dev/", "/proc/"))  # a pipe: it lies nowhere
    file = path if handed_over else str(PurePath(config).parent / path)
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        report.at(table, key, f"cannot read {shown(file)}: {cause}; name a file with one prefix a line")
        return ()
    prefixes: dict[str, None] = {}
    problems = 0
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        try:
            if text:
                prefixes[str(values.prefix(text))] = None
        except ValueError as error:
            problems += 1
            if problems <= FILE_PROBLEMS:
                report.add(file, f"line {number}", str(error))
    if problems > FILE_PROBLEMS:
        report.add(file, "", f"{problems - FILE_PROBLEMS} more lines are wrong; write one prefix a line")
    if not prefixes and not problems:
        # An empty tuple would mean "any address": the very opposite.
        report.at(
            table, key, f"{shown(file)} holds no prefix, so nothing matches; add one or leave the key out"
        )
    return tuple(prefixes)


def _judge_ports(table: Table, match: Match, report: Report) -> None:
    if "proto" in table.cells and not match.proto:
        return  # a bad protocol has its own problem
    portless = [number for number in match.proto if number not in PORT_PROTOCOLS]
    for key in ("sport", "dport"):
        if key not in table.cells or (match.proto and not portless):
            continue
        remark = 'needs a protocol with ports; add proto = "tcp" (or udp, sctp, dccp)'
        if portless:
            name = next((name for name, number in PROTOCOLS.items() if number == portless[0]), portless[0])
            remark = f"protocol {name} has no ports; leave the ports out, or use tcp, udp, sctp or dccp"
        report.at(table, key, remark)


def _judge_local(table: Table, match: Match, report: Report) -> None:
    """Report what belongs to sockets of this host beside an interface by which traffic comes in."""
    foreign = [interface for interface in match.iif if interface != "lo"]
    for key in LOCAL_ONLY:
        if foreign and key in table.cells:
            remark = (
                f'can never match traffic that comes in by {shown(foreign[0])}; leave iif out, or write "lo"'
            )
            report.at(table, key, remark)
