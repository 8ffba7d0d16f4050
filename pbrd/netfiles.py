"""What files of netplan, systemd-networkd, NetworkManager and iproute2 say of routing tables and rules.

Text in, values out. They are read line by line, so that a finding can name file and line; none is judged, and
what isn't understood is passed over. The daemon looks at them too, and a regular expression holds the whole
process while it matches: so lines are cut at `LINE`, and expressions go through them once.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

DEFAULTS = ("default", "0.0.0.0/0", "::/0")
TRUE = frozenset({"yes", "true", "1", "on", "y", "t"})  # systemd.syntax(7)

LINE = 4096  # characters of a line; a route or a rule has some hundred
NUMBERS = range(2**32)  # of tables and priorities, in the kernel

# netplan(5) and nmcli's keyfiles: KEY: VALUE in YAML, in block or flow style. A key is tried from its
# beginning only, and not with fewer letters either: else a long word takes the square of its length.
PAIR = re.compile(r"""(?<![\w-])([\w-]++)\s*+:\s++("[^"]*"|'[^']*'|[^,}\s\]]+)""")


@dataclass(frozen=True, slots=True)
class Entry:
    """A route or a rule that a file asks for."""

    place: str  # FILE:LINE
    kind: str  # "route" or "rule"
    table: int
    default: bool = False  # a default route
    priority: int | None = None  # of a rule that names one
    text: str = ""  # the rule's selectors, as ip-rule(8) has them


@dataclass(frozen=True, slots=True)
class TableName:
    """A line of rt_tables(5)."""

    place: str
    table: int
    name: str


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, none longer than LINE."""
    return ((number, line[:LINE]) for number, line in enumerate(text.splitlines(), 1))


# --- iproute2 ---------------------------------------------------------------------------------


def table_names(path: str, text: str) -> Iterator[TableName]:
    """Yield what an rt_tables file names."""
    for number, line in _lines(text):
        words = line.partition("#")[0].split()
        if len(words) == 2 and (table := _number(words[0])) is not None:
            yield TableName(f"{path}:{number}", table, words[1])


# --- systemd ----------------------------------------------------------------------------------


def _sections(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield (line, section with its ordinal, key, value) of a file of systemd's or a keyfile."""
    section, ordinal = "", 0
    for number, raw in _lines(text):
        line = raw.strip()
        if line.startswith("["):
            section, ordinal = line.strip("[]"), ordinal + 1
        elif "=" in line and line[0] not in "#;":
            key, _, value = line.partition("=")
            yield number, f"{ordinal} {section}", key.strip(), value.strip()


def setting(files: Iterable[tuple[str, str]], key: str) -> tuple[bool, str] | None:
    """Return a boolean of `[Network]` in networkd.conf, and the file that says so; None if none does.

    `files` are (path, text) in the order in which systemd reads them: the last one counts (networkd.conf(5)).
    """
    found = None
    for path, text in files:
        for _, section, name, value in _sections(text):
            if section.endswith(" Network") and name == key:
                found = (value.lower() in TRUE, path) if value else None
    return found


def networkd_entries(path: str, text: str, names: Mapping[str, int]) -> Iterator[Entry]:
    """Yield the routes and rules of a .network file (systemd.network(5)) that name a table."""
    sections: dict[str, dict[str, tuple[int, str]]] = {}
    for number, section, key, value in _sections(text):
        sections.setdefault(section, {})[key] = (number, value)
    for title, keys in sections.items():
        section = title.partition(" ")[2]
        line, word = keys.get("RouteTable" if section in LEASES else "Table", (0, ""))
        table = names.get(word, _number(word))
        if table is None:
            continue
        said = {key: value for key, (_, value) in keys.items()}
        place = f"{path}:{line}"
        if section == "RoutingPolicyRule":
            ways = (("from", "From"), ("to", "To"), ("iif", "IncomingInterface"), ("fwmark", "FirewallMark"))
            text_ = " ".join(f"{word} {said[key]}" for word, key in ways if key in said)
            yield Entry(place, "rule", table, priority=_number(said.get("Priority", "")), text=text_)
        elif section == "Route" or section in LEASES:
            default = section in LEASES or said.get("Destination", "default") in DEFAULTS
            yield Entry(place, "route", table, default=default)


LEASES = ("DHCPv4", "DHCP", "IPv6AcceptRA")  # sections whose RouteTable= says where a lease's default goes


# --- netplan ----------------------------------------------------------------------------------


def netplan_entries(path: str, text: str) -> Iterator[Entry]:
    """Yield the routes and rules of a netplan file (netplan(5)) that name a table."""
    kind, indent, item = "", -1, _Item(0)
    for number, raw in _lines(text):
        line = re.sub(r"(^|\s)#.*", "", raw).rstrip()
        depth = len(line) - len(line.lstrip())
        head = re.match(r"\s*(routes|routing-policy)\s*:(.*)", line)
        if head:
            yield from item.entries(path, kind)
            kind, indent, item = head[1], depth, _Item(number)
            line = " " * (depth + 1) + head[2]
        elif line.strip() and kind and (depth < indent or (depth == indent and line[depth] != "-")):
            yield from item.entries(path, kind)
            kind, item = "", _Item(number)
        if not kind:
            continue
        for part in re.split(r"(?=\{)", line):
            if part.lstrip().startswith(("-", "{")):
                yield from item.entries(path, kind)
                item = _Item(number)
            item.take(number, part)
    yield from item.entries(path, kind)


class _Item:
    """One item of a YAML list, while its lines are read."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.said: dict[str, str] = {}

    def take(self, line: int, text: str) -> None:
        for key, value in PAIR.findall(text):
            self.said[key] = value.strip("\"'")
            if key == "table":
                self.line = line

    def entries(self, path: str, kind: str) -> Iterator[Entry]:
        table = _number(self.said.get("table", ""))
        if table is None:
            return
        place = f"{path}:{self.line}"
        if kind == "routes":
            yield Entry(place, "route", table, default=self.said.get("to", "") in DEFAULTS)
        else:
            text = " ".join(f"{key} {self.said[key]}" for key in ("from", "to", "mark") if key in self.said)
            yield Entry(place, "rule", table, priority=_number(self.said.get("priority", "")), text=text)


# --- NetworkManager ---------------------------------------------------------------------------


def keyfile_entries(path: str, text: str) -> Iterator[Entry]:
    """Yield the routes and rules of a NetworkManager profile (nm-settings-keyfile(5)) that name a table."""
    for number, section, key, value in _sections(text):
        if section.partition(" ")[2] not in ("ipv4", "ipv6"):
            continue
        place, found = f"{path}:{number}", re.search(r"\btable[= ](\d+)", value)
        table = _number(found[1]) if found else None
        if key == "route-table" and (chosen := _number(value)):  # 0 is the usual one
            yield Entry(place, "route", chosen, default=True)
        elif key.startswith("routing-rule") and table is not None:
            priority = re.search(r"\bpriority (\d+)", value)
            words = re.sub(r"\b(priority|table) \d+", "", value).split()
            yield Entry(
                place,
                "rule",
                table,
                priority=_number(priority[1]) if priority else None,
                text=" ".join(words),
            )
        elif re.fullmatch(r"route\d+_options", key) and table is not None:
            yield Entry(place, "route", table)


def _number(word: str) -> int | None:
    try:
        number = int(word, 0)
    except ValueError:
        return None
    return number if number in NUMBERS else None
