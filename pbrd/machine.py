"""Looks at the machine for `pbrd check`: others' rules, routes, files and firewalls. Changes nothing.

Anybody may: what only root can see is left out for others. Of a foreign table at most LIMIT routes are read,
as it may hold a million: IPv4 has its defaults at the beginning, but IPv6 at the end.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from pbrd import firewalls, linkinfo, netfiles, rtnetlink, sysctl
from pbrd.errors import KernelError
from pbrd.names import files as files_of_ours
from pbrd.neighbours import ForeignRoute, Interface, Machine
from pbrd.netlink import Requests
from pbrd.objects import MAIN_TABLE, ForeignRule, Sysctl
from pbrd.settings import KILL_SWITCHES, PROTOCOL, Config, Family
from pbrd.units import fills

LIMIT = 2000  # routes of one table
FILE = 1 << 20  # bytes of a file; what stands behind them is not looked at
TABLES = 64  # foreign tables that are looked into because a rule or a file names them
DEADLINE = 10.0  # seconds for a foreign program
KERNELS = ((0, 255), (32766, 254), (32767, 253))  # priority and table of the rules that every machine has

NETWORKD = ("/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd")  # the first wins
NETPLAN = ("/etc/netplan", "/run/netplan", "/usr/lib/netplan")
KEYFILES = ("/etc/NetworkManager/system-connections", "/run/NetworkManager/system-connections")
IPROUTE2 = ("/etc/iproute2", "/usr/share/iproute2", "/usr/lib/iproute2")
ROOT = Path("/")
PROGRAMS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # where services find them
NFTSET_SINCE = 255  # version of systemd, systemd.resource-control(5)


def look(config: Config, root: Path = ROOT, *, rulesets: bool = True) -> Machine:
    """Return what concerns `config`. Raises KernelError.

    `root` is where files are looked for. Without `rulesets` those of nft and iptables are not listed, and
    systemd is not asked for units.
    """
    families = (Family.IPV4, Family.IPV6) if sysctl.has_ipv6() else (Family.IPV4,)
    with closing(Requests()) as requests:
        links = linkinfo.interfaces(requests.dump(rtnetlink.link_dump(), partial=True))
        rules = tuple(rule for family in families for rule in _rules(requests, family))
    ours = {table for uplink in config.uplinks for table in (uplink.table, uplink.path_table)}
    names = {index: interface.name for index, interface in links.items()}
    entries = tuple(_entries(root))
    routes = {
        (family, table): _routes(family, table, names, table in ours)
        for family in families
        for table in _tables(ours, [r.rule.table for r in rules] + [entry.table for entry in entries])
    }
    setters, flowtables = _firewalls() if rulesets else ((), ())
    return Machine(
        families,
        {interface.name: _with_switches(interface) for interface in links.values()},
        tuple(sorted(rules, key=lambda rule: rule.rule.priority)),
        routes,
        tuple(_table_names(config, root)),
        entries,
        _networkd(root),
        {family: _switch(family, "all", "forwarding") == 1 for family in families},
        setters,
        flowtables,
        shutil.which("nft", path=PROGRAMS) is not None,
        tuple(_unfilled(config, root)) if rulesets else (),
    )


# --- the kernel -------------------------------------------------------------------------------


def _rules(requests: Requests, family: Family) -> Iterator[ForeignRule]:
    for message in requests.dump(rtnetlink.rule_dump(family), partial=True):
        rule = rtnetlink.foreign_rule_of(message)
        if rule.protocol != PROTOCOL and (rule.rule.priority, rule.rule.table) not in KERNELS:
            yield rule


def _tables(ours: Iterable[int], others: Iterable[int]) -> list[int]:
    asked = [table for table in dict.fromkeys(others) if table]
    return list(dict.fromkeys([*ours, MAIN_TABLE, *asked[:TABLES]]))


def _routes(family: Family, table: int, names: dict[int, str], ours: bool) -> tuple[ForeignRoute, ...]:
    """Return the first routes of others in a table, on a socket that is thrown away with the rest.

    Only of our tables is more of interest than defaults and their halves, with which IPv4 begins.
    """
    found: list[ForeignRoute] = []
    with closing(Requests()) as once, suppress(KernelError):  # no such table
        for kind, _, message in once.answers(rtnetlink.route_dump(family, table)):
            if kind != rtnetlink.RTM_NEWROUTE or len(found) == LIMIT:
                break
            protocol, route = rtnetlink.route_of(message, names)
            if family is Family.IPV4 and not ours and int(route.destination.network_address):
                break
            if protocol != PROTOCOL:
                origin = rtnetlink.PROTOCOLS.get(protocol, f"protocol {protocol}")
                found.append(ForeignRoute(route, origin, rtnetlink.ERROR_ROUTES.get(message[23], "")))
    return tuple(found)


def _switch(family: Family, interface: str, key: str) -> int:
    found = sysctl.read(Sysctl(family, interface, key, 0))
    return found.value if found else 0


def _with_switches(interface: Interface) -> Interface:
    return Interface(
        interface.name,
        interface.master,
        interface.master_kind,
        interface.table,
        _switch(Family.IPV6, interface.name, "accept_ra"),
    )


# --- files ------------------------------------------------------------------------------------


def _texts(root: Path, directories: Iterable[str], pattern: str) -> list[tuple[str, str]]:
    """Return (path, text) of what can be read, by name; of two with one name that of the first directory."""
    chosen: dict[str, Path] = {}
    for directory in directories:
        with suppress(OSError):
            for path in sorted((root / directory.lstrip("/")).glob(pattern)):
                chosen.setdefault(path.name, path)
    found = []
    for _, path in sorted(chosen.items()):
        with suppress(OSError):
            if path.is_file():
                with path.open("rb") as file:
                    found.append((_shown(root, path), file.read(FILE).decode(errors="replace")))
    return found


def _shown(root: Path, path: Path) -> str:
    return f"/{path.relative_to(root)}"


def _table_names(config: Config, root: Path) -> Iterator[netfiles.TableName]:
    ours = {str(path) for path in files_of_ours(config)}
    places = [(directory, "rt_tables") for directory in IPROUTE2]
    places += [(f"{directory}/rt_tables.d", "*.conf") for directory in IPROUTE2]
    for directory, pattern in places:
        for path, text in _texts(root, (directory,), pattern):
            if path not in ours:
                yield from netfiles.table_names(path, text)


def _entries(root: Path) -> Iterator[netfiles.Entry]:
    """Yield what netplan, networkd and NetworkManager are told, but not what netplan tells the other two."""
    plans = _texts(root, NETPLAN, "*.yaml")
    for path, text in plans:
        yield from netfiles.netplan_entries(path, text)
    units = _texts(root, [f"{directory}/network" for directory in NETWORKD], "*.network")
    for directory in NETWORKD:
        units += _texts(root, (f"{directory}/network",), "*.network.d/*.conf")
    for path, text in units:
        if not plans or "-netplan-" not in path:
            yield from netfiles.networkd_entries(path, text, {})
    for path, text in _texts(root, KEYFILES, "*"):
        if not plans or "netplan-" not in path:
            yield from netfiles.keyfile_entries(path, text)


def _networkd(root: Path) -> dict[str, tuple[bool, str]] | None:
    """Return systemd-networkd's settings about what others made; None where it hasn't run since the boot."""
    if not (root / "run/systemd/netif/state").exists():
        return None
    files = [found for directory in NETWORKD for found in _texts(root, (directory,), "networkd.conf")][:1]
    files += _texts(root, [f"{directory}/networkd.conf.d" for directory in NETWORKD], "*.conf")
    keys = ("ManageForeignRoutes", "ManageForeignRoutingPolicyRules")
    return {key: said for key in keys if (said := netfiles.setting(files, key)) is not None}


# --- systemd ----------------------------------------------------------------------------------


def _unfilled(config: Config, root: Path) -> Iterator[str]:
    """Yield the units of kill switches that have no NFTSet= for their sets, where systemd knows it.

    The files are read: `systemctl show` of systemd 257 calls the value unprintable.
    """
    switches = [policy for policy in config.policies if policy.fallback in KILL_SWITCHES]
    units = sorted({unit for policy in switches for unit in policy.match.unit})
    if not units or not (root / "run/systemd/system").exists():
        return
    version = re.match(r"systemd (\d+)", _output("systemctl", "--version"))
    if version and int(version[1]) >= NFTSET_SINCE:
        for unit in units:
            text = "" if unit.endswith(".scope") else _output("systemctl", "cat", "--", unit)
            if text and not fills(text, unit):
                yield unit


# --- firewalls --------------------------------------------------------------------------------


def _firewalls() -> tuple[tuple[firewalls.MarkSetter, ...], tuple[firewalls.Flowtable, ...]]:
    if os.geteuid() != 0:
        return (), ()
    setters, flowtables = firewalls.of_nft(_output("nft", "-j", "-t", "list", "ruleset"))
    for command in ("iptables", "ip6tables"):
        setters += firewalls.of_iptables(command, _output(f"{command}-save"))
    return setters, flowtables


def _output(*argv: str) -> str:
    """Return what a command prints; "" where it is missing or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=DEADLINE
        )
        return done.stdout.decode(errors="replace")
    return ""
