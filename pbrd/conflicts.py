"""What a config and the machine it runs on would do to each other: judged from values, told as findings.

Here: marks, the main table, interfaces, files and switches of the kernel. `precedence` has the order of
rules, `occupied` the tables.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from pbrd import occupied, precedence
from pbrd.classes import uses_nft
from pbrd.neighbours import Finding, ForeignRoute, Interface, Machine
from pbrd.objects import MAIN_TABLE, ForeignRule
from pbrd.plan import route_text
from pbrd.precedence import HALVES, OWNED, kill_switch, several
from pbrd.rules import policy_families, tunnel_mark
from pbrd.settings import Config, Family, GatewayMode, Policy, Uplink
from pbrd.units import setting_of

ALL = 0xFFFFFFFF


def concerns(config: Config, machine: Machine) -> bool:
    """Say whether `config` is for this machine: one of its enabled uplinks has its interface here."""
    return any(uplink.interface in machine.interfaces for uplink in config.uplinks if uplink.enabled)


def findings(config: Config, machine: Machine) -> tuple[Finding, ...]:
    """Return all there is to say, what hurts before what is harmless."""
    found = (
        *_programs(config, machine),
        *_interfaces(config, machine),
        *precedence.findings(config, machine),
        *_marks(config, machine),
        *_main_table(config, machine),
        *occupied.findings(config, machine),
        *_files(config, machine),
        *_networkd(config, machine),
        *_switches(config, machine),
        *_offloads(config, machine),
        *_units(config, machine),
    )
    return tuple(sorted(dict.fromkeys(found), key=lambda finding: finding.harmless))


def _programs(config: Config, machine: Machine) -> Iterator[Finding]:
    if uses_nft(config) and not machine.nft:
        remark = (
            "nft is not installed, and this config needs it, so pbrd will not start; apt-get install nftables"
        )
        yield Finding("nftables", remark)


# --- interfaces -------------------------------------------------------------------------------


def _interfaces(config: Config, machine: Machine) -> Iterator[Finding]:
    taken = {uplink.interface for uplink in config.uplinks} | {"lo"}
    for uplink in config.uplinks:
        place, here = f"uplinks.{uplink.name}.interface", machine.interfaces.get(uplink.interface)
        if uplink.enabled and here is None:
            near = get_close_matches(uplink.interface, sorted(machine.interfaces.keys() - taken), 1, 0.7)
            meant = f' (did you mean "{near[0]}"?)' if near else ""
            yield Finding(
                place, f'there is no "{uplink.interface}" here now{meant}; it may come later', harmless=True
            )
        elif uplink.enabled and here is not None and here.master:
            yield Finding(place, _as_port(here))


def _as_port(port: Interface) -> str:
    if port.master_kind == "vrf":
        return (
            f'"{port.name}" is in the VRF "{port.master}", whose table the rules of pbrd never ask, so '
            "nothing "
            f"leaves there; take it out: ip link set {port.name} nomaster"
        )
    return (
        f'"{port.name}" is a port of the {port.master_kind or "master"} "{port.master}", which has the '
        "addresses "
        f'and routes, so nothing leaves there; set interface = "{port.master}"'
    )


# --- marks ------------------------------------------------------------------------------------


def _marks(config: Config, machine: Machine) -> Iterator[Finding]:
    mask = config.daemon.fwmark_mask
    found: dict[str, list[ForeignRule]] = {}
    for rule in machine.rules:
        mark = rule.rule.fwmark
        if mark is None or not mark.mask & mask:
            continue
        if mark.value & mask:
            remark = (
                f"asks for bits that are pbrd's (daemon.fwmark_mask is {mask:#010x}); {_other_mask(config)}"
            )
        elif uses_nft(config) and not tunnel_mark(rule.rule):  # these are spared: `ruleset`
            does = "matches every packet" if rule.rule.inverted else "matches no packet"
            remedy = f"give it a mask: fwmark {mark.value:#x}/{mark.mask & ~mask & ALL:#x}"
            remark = f"{does} that pbrd has marked in other bits (nftables is in use); {remedy}"
        else:
            continue
        found.setdefault(remark, []).append(rule)
    for remark, rules in found.items():
        yield from several(rules, remark)
    yield from _mark_setters(config, machine)


def _other_mask(config: Config) -> str:
    bits = config.daemon.fwmark_mask.bit_count()
    return f"let it use others, or set daemon.fwmark_mask to {bits} bits that nobody uses"


def _mark_setters(config: Config, machine: Machine) -> Iterator[Finding]:
    mask = config.daemon.fwmark_mask
    for setter in machine.setters:
        if setter.sets & mask:
            yield Finding(
                setter.place,
                f"sets bits of the mark that are pbrd's (daemon.fwmark_mask is {mask:#010x}), so packets "
                "take "
                f"the uplink of another policy or none; {_other_mask(config)}",
            )
        elif setter.changed & mask and uses_nft(config):
            word = f"--set-xmark {setter.sets:#x}/{setter.sets | ALL & ~mask:#x}"
            if setter.place.startswith("nft"):
                word = f"meta mark set meta mark & {mask:#x} | {setter.sets:#x}"
            yield Finding(
                setter.place,
                "overwrites the bits of the mark in which pbrd keeps its verdict, so packets may leave by "
                f"another uplink; keep them, as in {word}",
            )


# --- the main table ---------------------------------------------------------------------------


def _main_table(config: Config, machine: Machine) -> Iterator[Finding]:
    for family in machine.families:
        ip = "ip -6" if family is Family.IPV6 else "ip"
        routes = machine.routes.get((family, MAIN_TABLE), ())
        for route in routes:
            if route.kind and route.route.is_default:
                yield Finding(
                    f"{ip} route",
                    f'"{route.kind} default" in the main table ends the walk of rules before any policy, '
                    "unless "
                    f"a better default stands beside it; {ip} route del {route.kind} default",
                )
        if not all(policy.match.override_main for policy in config.all_policies):
            yield from _halves(ip, [r for r in routes if _is_half(r)])


def _is_half(route: ForeignRoute) -> bool:
    return not route.kind and 0 < route.route.destination.prefixlen <= HALVES[route.route.family]


def _halves(ip: str, halves: Sequence[ForeignRoute]) -> Iterator[Finding]:
    if halves:
        device = halves[0].route.interface
        yield Finding(
            f"{ip} route",
            f'"{route_text(halves[0].route, {}).removesuffix(" table 254")}" in the main table is no default '
            "route but a specific one, so it comes before all policies but those with override_main; let "
            "the VPN "
            f'leave the default alone (OpenVPN: pull-filter ignore "redirect-gateway"), and make {device} an '
            "uplink",
        )


# --- files, daemons, switches -----------------------------------------------------------------


def _files(config: Config, machine: Machine) -> Iterator[Finding]:
    ours, first = occupied.tables_of(config), config.daemon.rule_priority
    for entry in machine.entries:
        if entry.kind == "rule" and entry.priority is None and entry.table not in ours:
            yield Finding(
                entry.place,
                f"the rule ({entry.text or 'everything'}, table {entry.table}) names no priority, so while "
                "pbrd "
                f"runs the kernel puts it before all policies (at {first - 1}); give it one above "
                f"{first + OWNED - 1} (32000, say) if that is not meant",
            )


FOREIGN_RULES, FOREIGN_ROUTES = "ManageForeignRoutingPolicyRules", "ManageForeignRoutes"


def _networkd(config: Config, machine: Machine) -> Iterator[Finding]:
    if machine.networkd is None:
        return
    bad = [key for key in (FOREIGN_ROUTES, FOREIGN_RULES) if machine.networkd.get(key, (True, ""))[0]]
    if bad:
        said = next((machine.networkd[key][1] for key in bad if key in machine.networkd), "systemd-networkd")
        yield Finding(
            said,
            f"removes pbrd's {'rules' if FOREIGN_RULES in bad else 'routes'} whenever it restarts; they are "
            "back within "
            f"milliseconds, but until then no policy holds{kill_switch(config)}; put "
            f"{' and '.join(f'{key}=no' for key in bad)} below [Network] in a file "
            "/etc/systemd/networkd.conf.d/10-pbrd.conf",
        )


def _switches(config: Config, machine: Machine) -> Iterator[Finding]:
    if machine.forwarding.get(Family.IPV4) is False:
        arriving = _from_outside(config, Family.IPV4)
        if arriving:
            yield Finding(
                "sysctl net.ipv4.ip_forward",
                f"is 0, so nothing that arrives for {_shown(arriving)} is forwarded; set it to 1",
            )
    if machine.forwarding.get(Family.IPV6):
        for uplink in config.uplinks:
            if uplink.enabled and _deaf(uplink, machine):
                yield Finding(
                    f"sysctl net.ipv6.conf.{uplink.interface}.accept_ra",
                    "is 1, which means that a machine that forwards IPv6 hears no router advertisements, so "
                    f'uplinks.{uplink.name} finds no IPv6 gateway; set it to 2, or gateway6 = "off"',
                )


def _from_outside(config: Config, family: Family) -> list[Policy]:
    """Return the policies for what arrives on an interface."""
    return [
        policy
        for policy in config.policies
        if any(name != "lo" for name in policy.match.iif) and family in policy_families(policy.match)
    ]


def _shown(policies: Sequence[Policy]) -> str:
    return f"policies.{policies[0].name}" + (f" and {len(policies) - 1} more" if len(policies) > 1 else "")


def _deaf(uplink: Uplink, machine: Machine) -> bool:
    here = machine.interfaces.get(uplink.interface)
    defaults = machine.defaults_in(Family.IPV6, MAIN_TABLE)
    static = any(r.route.interface == uplink.interface and r.origin != "ra" for r in defaults)
    return uplink.gateway6 is GatewayMode.AUTO and here is not None and here.accept_ra == 1 and not static


def _offloads(config: Config, machine: Machine) -> Iterator[Finding]:
    interfaces = {uplink.interface for uplink in config.uplinks if uplink.enabled}
    for flowtable in machine.flowtables:
        devices = sorted(interfaces.intersection(flowtable.devices))
        if devices:
            yield Finding(
                flowtable.place,
                f"takes established connections over {devices[0]} past all rules, so when that uplink fails "
                "they "
                f"may stay on it until they end; leave {' and '.join(devices)} out of its devices",
            )


def _units(config: Config, machine: Machine) -> Iterator[Finding]:
    for unit in machine.unfilled:
        names = [policy.name for policy in config.policies if unit in policy.match.unit]
        yield Finding(
            f"policies.{names[0]}.match.unit",
            f'what "{unit}" sends in its first milliseconds may leave elsewhere, and all that it sends when '
            "it was started while pbrd is stopped; to close its kill switch from its first packet on: "
            f"systemctl edit {_quoted(unit)}, and {setting_of(unit)} below "
            f"[{'Slice' if unit.endswith('.slice') else 'Service'}]",
            harmless=True,
        )


def _quoted(unit: str) -> str:
    """Return a unit's name for a shell: of what names may hold, only the backslash means something there."""
    return f"'{unit}'" if "\\" in unit else unit
