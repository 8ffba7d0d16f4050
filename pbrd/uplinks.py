"""`[probe]` and `[uplinks.NAME]`: from TOML to `Uplink`, with a table id for each.

Table ids: what the config names is reserved first; uplinks that name none get the next free ids
from `table_base` up, in order. Each id also takes id + 1000, for the path table.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

from pbrd import values
from pbrd.document import SHAPE, Parser, Report, Table, below, between, integer, many, read
from pbrd.settings import PATH_TABLE_OFFSET, Address, Daemon, Family, GatewayMode, Probe, Uplink
from pbrd.values import shown

MOST_UPLINKS = 99  # rule priorities B + 0 to B + 99 are the probes', B + 100 + k the pins'
HIGHEST_TABLE = 2**32 - 1 - PATH_TABLE_OFFSET
KERNEL_TABLES = {
    0: "the unspecified table",
    253: "the default table",
    254: "the main table",
    255: "the local table",
}


def table_id(value: object) -> int:
    """Return a table id that an uplink may have (rt_class_t in linux/rtnetlink.h)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise values.wrong_type(value, "the number of a table, 1-252 or 256 and above")
    if value in KERNEL_TABLES:
        raise ValueError(f"{value} is {KERNEL_TABLES[value]}; choose 1-252 or 256 and above")
    if value < 0:
        raise ValueError(f"{shown(value)} is below zero; choose 1-252 or 256 and above")
    if value > HIGHEST_TABLE:
        why = f"its path table is the id + {PATH_TABLE_OFFSET}"
        raise ValueError(f"{shown(value)} is too high; choose at most {HIGHEST_TABLE}, as {why}")
    return value


def _target(value: object) -> Address:
    address = values.address(value)
    if address.is_unspecified or address.is_multicast or address.is_loopback:
        raise ValueError(
            f"{shown(value)} does not lie behind an uplink; name a host that answers pings from there"
        )
    return address


def _gateway(family: Family) -> Parser:
    wanted = f'an IPv{family.version} address, "auto", "none" or "off"'

    def parse(value: object) -> Address | GatewayMode:
        text = values.string(value, wanted)
        if text in list(GatewayMode):
            return GatewayMode(text)
        try:
            address = values.address(text)
        except ValueError as error:
            zone = "%" in text  # the usual slip with link-local gateways, and it has words of its own
            raise error if zone else ValueError(f"{shown(value)} is no gateway; write {wanted}") from None
        if address.version != family.version:
            raise ValueError(f"{shown(value)} is an IPv{address.version} address; write {wanted}")
        if address.is_unspecified or address.is_multicast or address.is_loopback:
            raise ValueError(f"{shown(value)} can't be a gateway; write the address of a router, or {wanted}")
        if address == IPv4Address("255.255.255.255"):
            raise ValueError(f"{shown(value)} is the broadcast address; write the address of a router")
        return address

    return parse


def _interface(value: object) -> str:
    if value == "lo":
        raise ValueError('"lo" leads nowhere; name the interface to the provider, as "eth0"')
    return values.interface(value)


PROBE: Mapping[str, Parser] = {
    "targets": many(_target),
    "interval": between(values.duration, "10ms", "1d"),
    "timeout": between(values.duration, "1ms", "1d"),
    "fall": integer(1, 10000),
    "rise": integer(1, 10000),
    "stable_for": between(values.duration, "0", "1d"),
    "quorum": integer(1, 10000),
    "confirm_interval": between(values.duration, "10ms", "1d", zero=True),
    "max_loss": values.ratio,
    "max_latency": between(values.duration, "0", "1d"),
    "max_jitter": between(values.duration, "0", "1d"),
    "window": between(values.duration, "20ms", "1d"),
}
UPLINK: Mapping[str, Parser] = {
    "interface": _interface,
    "gateway": _gateway(Family.IPV4),
    "gateway6": _gateway(Family.IPV6),
    "table": table_id,
    "nat": values.boolean,
    "nat6": values.boolean,
    "metered": values.boolean,
    "enabled": values.boolean,
}


def read_uplinks(root: Table, daemon: Daemon, report: Report) -> tuple[Uplink, ...]:
    """Return the uplinks of the document in order of appearance, complete as far as they are good."""
    shared = root.tables.get("probe", Table("probe", root.file))
    shared_values = read(shared, PROBE, report)
    if "uplinks" not in root.tables or not root.tables["uplinks"].tables:
        _complete_probe(Table("", root.file), {}, shared, shared_values, report)  # judged all the same
        return ()
    tables = root.tables["uplinks"].tables
    _judge_number(root, daemon, len(tables), report)
    found = [read(table, UPLINK, report, tables=SHAPE["uplinks"]["*"]) for table in tables.values()]
    for (name, table), written in zip(tables.items(), found, strict=True):
        _judge_uplink(name, table, written, tables, report)
        own = table.tables.get("probe", Table(below(table.place, "probe"), table.file))
        own_values = read(own, PROBE, report)
        written["probe"] = _complete_probe(own, own_values, shared, shared_values, report)
    _judge_doubles(tables, found, report)
    ids = assign_tables([written.get("table") for written in found], daemon.table_base)
    return tuple(
        Uplink(**{"interface": "", **written, "name": name, "index": index, "table": ids[index]})
        for index, (name, written) in enumerate(zip(tables, found, strict=True))
    )


def _judge_number(root: Table, daemon: Daemon, number: int, report: Report) -> None:
    if number > MOST_UPLINKS:
        report.add(root.tables["uplinks"].file, "uplinks", f"there are {number}; {MOST_UPLINKS} are possible")
    # Mark 0 is "no mark" and the highest value the probes'.
    room = daemon.fwmark_mask // (daemon.fwmark_mask & -daemon.fwmark_mask) - 1
    if room < number <= MOST_UPLINKS:
        report.at(
            root.tables.get("daemon", Table("daemon", root.file)),
            "fwmark_mask",
            f"{daemon.fwmark_mask:#x} has room for {room} uplinks and there are {number}; "
            "give it more bits, as in 0xff000000",
        )


def _judge_uplink(
    name: str, table: Table, written: Mapping[str, Any], tables: Mapping[str, Table], report: Report
) -> None:
    try:
        values.name(name)
    except ValueError as error:
        report.add(table.file, table.place, str(error))
    owner = name.removesuffix("-path")
    if owner != name and owner in tables:
        report.add(
            table.file,
            table.place,
            f'{shown(name)} is the name of the path table of uplink "{owner}"; choose another name',
        )
    if "interface" not in table.cells:
        report.missing(table, "interface", 'is missing; name the network interface, as in interface = "eth0"')
    if written.get("gateway") is written.get("gateway6") is GatewayMode.OFF:
        report.at(
            table,
            "gateway6",
            '"off" for both families leaves nothing; an uplink is switched off by enabled = false',
        )


def _complete_probe(
    own: Table, own_values: dict[str, Any], shared: Table, shared_values: dict[str, Any], report: Report
) -> Probe:
    probe = Probe(**{**shared_values, **own_values})
    # Who asks for nothing but fast rounds means no slower confirmation: only a written value can be wrong.
    if "confirm_interval" not in {**shared.cells, **own.cells} and probe.confirm_interval > probe.interval:
        probe = replace(probe, confirm_interval=probe.interval)
    if {*PROBE} & ({*own.cells} - {*own_values} | {*shared.cells} - {*shared_values}):
        return probe  # a default stands in for a bad value: what contradicts it is not the user's doing
    for keys, remark in _probe_conflicts(probe):
        # The nearest section that names one of the keys is to blame; the defaults agree with each other.
        for table in (own, shared):
            key = next((key for key in keys if key in table.cells), None)
            if key is not None:
                report.at(table, key, remark)
                break
    return probe


def _probe_conflicts(probe: Probe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the keys that contradict each other, and what to do."""
    number = len(probe.targets)
    if number and probe.quorum > number:
        yield (
            ("quorum", "targets"),
            f"quorum = {probe.quorum} needs more targets than the {number} there are; lower it or name more",
        )
    if probe.window < 2 * probe.interval:
        yield (
            ("window", "interval"),
            f"a window of {probe.window:g}s holds less than two rounds, one every {probe.interval:g}s; "
            f'set window = "{2 * probe.interval:g}s" or more',
        )
    if probe.confirm_interval > probe.interval:
        yield (
            ("confirm_interval", "interval"),
            f"confirm rounds every {probe.confirm_interval:g}s are slower than an interval of "
            f'{probe.interval:g}s; shorten confirm_interval, or set it to "0" to have none',
        )


def _judge_doubles(tables: Mapping[str, Table], found: Sequence[Mapping[str, Any]], report: Report) -> None:
    """Report interfaces and table ids that two uplinks claim, at the later of them."""
    interfaces: dict[str, str] = {}
    ids: dict[int, str] = {}
    for (name, table), written in zip(tables.items(), found, strict=True):
        interface, number = written.get("interface"), written.get("table")
        if interface is not None and interfaces.setdefault(interface, name) != name:
            other = interfaces[interface]
            remark = f'{shown(interface)} is the interface of uplink "{other}" already; choose another'
            report.at(table, "interface", remark)
        if number is None:
            continue
        if remark := _table_collision(number, ids):
            report.at(table, "table", remark)
        ids.setdefault(number, name)


def _table_collision(number: int, ids: Mapping[int, str]) -> str:
    lower, upper = number - PATH_TABLE_OFFSET, number + PATH_TABLE_OFFSET
    if number in ids:
        return f'{number} is the table of uplink "{ids[number]}" already; choose another'
    if lower in ids:
        return f'{number} is the path table of uplink "{ids[lower]}" ({lower} + 1000); choose another'
    if upper in ids:
        return f'{number} takes {upper} for its path table, but that is uplink "{ids[upper]}"; choose another'
    return ""


def assign_tables(wanted: Sequence[int | None], base: int) -> list[int]:
    """Return an id for each uplink: the one it names, or the next free one from `base` up."""
    offset = PATH_TABLE_OFFSET
    taken = set(KERNEL_TABLES)
    for number in wanted:
        if number is not None:
            taken |= {number, number + offset}
    result = []
    candidate = base
    for number in wanted:
        if number is not None:
            result.append(number)
            continue
        while candidate in taken or candidate + offset in taken:
            candidate += 1
        taken |= {candidate, candidate + offset}
        result.append(candidate)
    return result
