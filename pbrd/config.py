"""TOML text → `Config`, with every check and its message.

All files are read and judged before anything is raised: whoever edits a config sees all of its
problems at once. The texts become one `document`; `uplinks` and `policies` read their sections;
`caveats` knows what is not done yet (a problem here) and what is legal and probably not meant.
`parse` is pure; `load` reads the files and asks the machine for users and groups.
"""

import grp
import pwd
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pbrd import values
from pbrd.caveats import (
    gaps_of_daemon,
    gaps_of_match,
    gaps_of_policy,
    gaps_of_uplink,
    unsupported,
    warnings,
)
from pbrd.classrules import lack_of_room
from pbrd.document import (
    SECTIONS,
    SHAPE,
    Parser,
    Report,
    Table,
    below,
    choice,
    integer,
    overlay,
    policy_tables,
    read,
    toml,
    unknown,
)
from pbrd.errors import ConfigError
from pbrd.policies import Lookup, ReadText, Surroundings, keys_among, read_default, read_policy
from pbrd.settings import Config, Daemon, Failback, OnStop, Policy, Uplink, the_same
from pbrd.uplinks import HIGHEST_TABLE, read_uplinks
from pbrd.values import shown

__all__ = ["load", "parse", "unsupported", "warnings"]

# pbrd owns 22,000 priorities from `rule_priority` up, and must stay above the rule of the main table (32766).
HIGHEST_RULE_PRIORITY = 32766 - 22000

# Why root is refused: the unit's CapabilityBoundingSet= and ProtectHome=.
CONFINED = "pbrd.service reads only what root owns or all may read, and nothing in homes"


def _fwmark_mask(value: object) -> int:
    """Return a mask of at least two bits, all side by side."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise values.wrong_type(value, "a mask without quotes, as 0xff000000")
    written = f"{value:#x}" if 0 < value < 2**32 else shown(value)
    if not 0 < value < 2**32:
        raise ValueError(f"{written} is out of range; choose bits of 0x1 to 0xffffffff, as 0xff000000")
    if value.bit_count() < 2:
        raise ValueError(f"{written} is a single bit; choose at least two, as 0xff000000")
    lowest = value & -value
    if (value + lowest) & value:
        raise ValueError(f"{written} has a gap; choose bits side by side, as 0xff000000")
    return value


def _names(value: object) -> str:
    text = values.string(value, 'a folder, as "/etc/iproute2"')
    if text and (not text.startswith("/") or not text.isprintable()):
        raise ValueError(
            f'{shown(value)} is no absolute path; write one, as "/etc/iproute2", or "" for nowhere'
        )
    return text


def _metrics(value: object) -> str:
    return "" if value == "" else values.listen_address(value)


DAEMON: Mapping[str, Parser] = {
    "rule_priority": integer(1, HIGHEST_RULE_PRIORITY),
    "table_base": integer(1, HIGHEST_TABLE - 10**6),  # room above it for all uplinks, whatever is taken
    "names": _names,
    "fwmark_mask": _fwmark_mask,
    "on_stop": choice(OnStop),
    "failback": choice(Failback),
    "metrics": _metrics,
}


def nobody(name: str) -> int:
    """Know no user and no group: the lookup where there is no machine to ask."""
    raise KeyError(name)


def no_file(path: str) -> str:
    """Know no file: the reader where there is no machine to ask."""
    raise FileNotFoundError(2, "no such file", path)


def load(
    path: Path,
    users: Lookup = lambda name: pwd.getpwnam(name).pw_uid,
    groups: Lookup = lambda name: grp.getgrnam(name).gr_gid,
    *,
    pipe: bool = False,
    seen: Callable[[str], object] = lambda _: None,
) -> Config:
    """Return the config of `path` and of `conf.d/*.toml` beside it; ConfigError names every problem.

    With `pipe`, `path` may be one that a shell hands over (/dev/stdin, /dev/fd/63), as it is read only once.
    `seen` is told of each file that was read.
    """
    report = Report()
    texts = [(str(path), _text(path, report, pipe))]
    texts += [(str(file), _text(file, report)) for file in _fragments(path.parent / "conf.d", report)]
    for file, _ in texts:
        seen(file)

    def read_list(file: str) -> str:
        seen(file)
        return _read_utf8(file)

    if any(problem.file == str(path) for problem in report.problems):
        raise ConfigError(report.problems)  # without the main file the rest makes no sense
    return _judged(texts, users, groups, read_list, report=report, allow_unsupported=False)


def parse(
    texts: Sequence[tuple[str, str]],
    users: Lookup = nobody,
    groups: Lookup = nobody,
    read_text: ReadText = no_file,
    allow_unsupported: bool = False,
) -> Config:
    """Return the config of (file name, text) pairs; ConfigError names every problem.

    With `allow_unsupported`, what is not done yet is no problem: ask `unsupported` for it.
    """
    return _judged(texts, users, groups, read_text, report=Report(), allow_unsupported=allow_unsupported)


def _read_utf8(path: str, pipe: bool = False) -> str:
    file = Path(path)
    try:
        handed_over = pipe and path.startswith(("/dev/", "/proc/")) and file.is_fifo()
        if file.exists() and not file.is_file() and not handed_over:
            # To read a pipe of a file system is to wait, maybe for ever, and a device may have no end.
            raise OSError(22, "not a regular file", path)
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no reason to refuse a file
    except PermissionError as error:
        reason = f"{error.strerror} (who isn't root: try sudo; {CONFINED})"
        raise PermissionError(error.errno, reason, path) from None
    except FileNotFoundError as error:
        if not path.startswith(("/tmp/", "/var/tmp/")):  # noqa: S108 - the unit has PrivateTmp=
            raise
        reason = f"{error.strerror} (pbrd.service has a /tmp of its own)"
        raise FileNotFoundError(error.errno, reason, path) from None


def _text(file: Path, report: Report, pipe: bool = False) -> str:
    try:
        return _read_utf8(str(file), pipe)
    except FileNotFoundError:
        report.add(str(file), "", "there is no such file; write one, as in share/doc/pbrd/examples/pbrd.toml")
    except OSError as error:
        report.add(str(file), "", f"cannot read it: {error.strerror}; it must be a readable file")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        report.add(str(file), f"line {line}", "this is no UTF-8 text; save the file in that encoding")
    report.whole = False
    return ""


def _fragments(folder: Path, report: Report) -> list[Path]:
    """Return the files of `conf.d` in name order; hidden ones are editors' and not meant."""
    try:
        files = [file for file in folder.iterdir() if file.suffix == ".toml" and file.name[0] != "."]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if not folder.parent.is_dir():  # a pipe of the shell has no neighbours
            return []
        report.add(str(folder), "", "is no folder; make one and move the file into it, with a name in .toml")
        report.whole = False
        return []
    except OSError as error:
        report.add(str(folder), "", f"cannot read it: {error.strerror}; it must be a readable folder")
        report.whole = False
        return []
    return sorted(files)


def _judged(
    texts: Sequence[tuple[str, str]],
    users: Lookup,
    groups: Lookup,
    read_text: ReadText,
    *,
    report: Report,
    allow_unsupported: bool,
) -> Config:
    root, policies = _document(texts, report)
    daemon = Daemon(**read(root.tables["daemon"], DAEMON, report)) if "daemon" in root.tables else Daemon()
    uplinks = read_uplinks(root, daemon, report)
    _judge_presence(root.file, uplinks, report)
    names = tuple(uplink.name for uplink in uplinks)
    keys = keys_among(Surroundings(names, daemon.fwmark_mask, users, groups, read_text), report)
    found = [(table, read_policy(table, keys, report)) for table in policies]
    _judge_names(found, report)
    default = root.tables.get("default")
    last = read_default(default, keys, report) if default else None
    config = the_same(Config(daemon, uplinks, tuple(policy for _, policy in found), last))
    if not allow_unsupported:
        _report_gaps(root, config, [*found, *([(default, last)] if default and last else [])], report)
    _judge_room(config, found, report)
    if report.problems:
        order = {file: index for index, (file, _) in enumerate(texts)}
        raise ConfigError(
            tuple(sorted(report.problems, key=lambda problem: order.get(problem.file, len(order))))
        )
    return config


def _document(texts: Sequence[tuple[str, str]], report: Report) -> tuple[Table, list[Table]]:
    """Return the merged tables of all texts, and one for each policy in order."""
    root = Table("", texts[0][0] if texts else "")
    policies: list[Table] = []
    for file, text in texts:
        data = toml(file, text, report)
        for key in data.keys() - set(SECTIONS):
            report.add(file, below("", key), unknown("section", key, SECTIONS))
        policies += policy_tables(data, file, report)
        sections = {key: value for key, value in data.items() if key in SHAPE}
        overlay(root, sections, file, SHAPE, report)
    return root, policies


def _judge_presence(file: str, uplinks: Sequence[Uplink], report: Report) -> None:
    """Report it if there is no uplink: a file cut short must not take every rule away, kill switches too."""
    told = any(problem.place.startswith("uplink") for problem in report.problems)
    if not uplinks and report.whole and not told:
        report.add(file, "", "no uplink is configured; write at least one [uplinks.NAME]")


def _judge_names(policies: Sequence[tuple[Table, Policy]], report: Report) -> None:
    first: dict[str, Table] = {}
    for table, policy in policies:
        other = first.setdefault(policy.name, table)
        if policy.name and other is not table:
            remark = (
                f"{shown(policy.name)} is the name of {other.place} in {other.file} already; choose another"
            )
            report.at(table, "name", remark)


def _judge_room(config: Config, policies: Sequence[tuple[Table, Policy]], report: Report) -> None:
    """Report it if the policies need more marks or priorities than there are."""
    remark = "" if report.problems else lack_of_room(config)
    if remark and policies:
        table = policies[-1][0]
        report.add(table.file, table.place, remark)


def _report_gaps(
    root: Table, config: Config, policies: Sequence[tuple[Table, Policy]], report: Report
) -> None:
    """Report what is not done yet, where it stands."""
    for key, remark in gaps_of_daemon(config.daemon):
        report.at(root.tables["daemon"], key, remark)
    for uplink in config.uplinks:
        for key, remark in gaps_of_uplink(uplink):
            report.at(root.tables["uplinks"].tables[uplink.name], key, remark)
    for table, policy in policies:
        for key, remark in gaps_of_policy(policy):
            report.at(table, key, remark)
        for key, remark in gaps_of_match(policy.match):
            report.at(table.tables["match"], key, remark)
