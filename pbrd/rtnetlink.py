"""Routes, rules, links and addresses as rtnetlink messages: bytes to values and back, no socket.

pyroute2's message classes are the codec. Only those modules are imported, behind a stub of the
package: `import pyroute2` whole costs 200 ms and 20 MiB. Its verbs are not used: they fill in
defaults of their own (a rule's priority) and drop keywords that they don't know.
"""

import importlib.util
import struct
import sys
import types
from functools import lru_cache
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from pbrd.objects import Action, DefaultRoute, ForeignRule, LinkAddress, Route, Rule, default_network
from pbrd.plan import Verb
from pbrd.settings import PROTOCOL, Address, Family, Mark, Network, Range


def _without_the_package() -> None:
    """Put an empty `pyroute2` into sys.modules, so that its `__init__` does not import everything."""
    spec = importlib.util.find_spec("pyroute2")
    if "pyroute2" not in sys.modules and spec is not None:
        package = types.ModuleType("pyroute2")
        package.__path__ = list(spec.submodule_search_locations or ())
        package.__spec__ = spec
        sys.modules["pyroute2"] = package


_without_the_package()

from pyroute2.netlink.rtnl.fibmsg import fibmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # noqa: E402
from pyroute2.netlink.rtnl.rtmsg import rtmsg  # noqa: E402

# FRA_DSCP (linux/fib_rules.h) is missing in pyroute2 0.9.7; an attribute that it doesn't know is dropped.
if not any(row[0] == 25 for row in fibmsg.nla_map if isinstance(row[0], int)):
    fibmsg.nla_map += ((25, "FRA_DSCP", "uint8"),)

# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RT_TABLE_COMPAT = 252  # stands in the header where the id needs the attribute
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
RTN_UNICAST = 1
ERROR_ROUTES = {6: "blackhole", 7: "unreachable", 8: "prohibit"}
RTNH_F_ONLINK = 4
FR_ACTIONS = {
    Action.LOOKUP: 1,
    Action.GOTO: 2,
    Action.NOP: 3,
    Action.BLACKHOLE: 6,
    Action.UNREACHABLE: 7,
    Action.PROHIBIT: 8,
}
NO_SUPPRESS = 0xFFFFFFFF
FIB_RULE_INVERT = 2
# What our rules never have. Anything newer is ignored: kernels add attributes to every rule (port masks).
FOREIGN_ATTRIBUTES = ("FRA_FLOW", "FRA_TUN_ID", "FRA_L3MDEV")

# linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
FLAGS = {Verb.ADD: NLM_F_CREATE | NLM_F_EXCL, Verb.REPLACE: NLM_F_CREATE | NLM_F_REPLACE, Verb.DELETE: 0}

RTA_DST, RTA_SRC, RTA_OIF = 1, 2, 4
IFF_UP = 1
IFLA_IFNAME, IFLA_CARRIER = 3, 33
HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
IFINFO = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
ATTRIBUTE = struct.Struct("=HH")

PROTOCOLS = {2: "kernel", 3: "boot", 4: "static", 9: "ra", 11: "zebra", 12: "bird", 16: "dhcp", 186: "bgp"}


# --- requests ---------------------------------------------------------------------------------


def _encode(message: Any, kind: int, flags: int) -> bytes:
    message["header"] = {"type": kind, "flags": NLM_F_REQUEST | flags, "sequence_number": 0, "pid": 0}
    message.encode()
    return bytes(message.data)


@lru_cache(maxsize=4096)
def route_request(verb: Verb, route: Route, index: int) -> bytes:
    """Return the message that adds, replaces or deletes `route` on the interface number `index`.

    Deletion names the protocol, so that the kernel spares a foreign route with the same destination.
    """
    if route.raw:
        return HEADER.pack(16 + len(route.raw), RTM_DELROUTE, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + route.raw
    scope = RT_SCOPE_LINK if route.gateway is None else RT_SCOPE_UNIVERSE
    message = rtmsg()
    message["family"] = int(route.family)
    message["dst_len"] = route.destination.prefixlen
    message["table"] = route.table if route.table < 256 else RT_TABLE_COMPAT
    message["proto"] = PROTOCOL
    message["scope"] = RT_SCOPE_NOWHERE if verb is Verb.DELETE else scope
    message["type"] = RTN_UNICAST
    message["flags"] = RTNH_F_ONLINK if route.onlink else 0
    attributes: list[tuple[str, object]] = [("RTA_TABLE", route.table), ("RTA_OIF", index)]
    if not route.is_default:
        attributes.append(("RTA_DST", str(route.destination.network_address)))
    if route.gateway is not None:
        attributes.append(("RTA_GATEWAY", str(route.gateway)))
    if route.source is not None:
        attributes.append(("RTA_PREFSRC", str(route.source)))
    if route.metric:
        attributes.append(("RTA_PRIORITY", route.metric))
    message["attrs"] = attributes
    kind = RTM_DELROUTE if verb is Verb.DELETE else RTM_NEWROUTE
    return _encode(message, kind, NLM_F_ACK | FLAGS[verb])


@lru_cache(maxsize=4096)
def rule_request(verb: Verb, rule: Rule) -> bytes:
    """Return the message that adds or deletes `rule`; a deletion names every selector, and the protocol."""
    if rule.raw:
        return HEADER.pack(16 + len(rule.raw), RTM_DELRULE, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + rule.raw
    message = fibmsg()
    message["family"] = int(rule.family)
    message["table"] = rule.table if rule.table < 256 else RT_TABLE_COMPAT
    message["action"] = FR_ACTIONS[rule.action]
    message["flags"] = FIB_RULE_INVERT if rule.inverted else 0
    message["src_len"] = rule.source.prefixlen if rule.source else 0
    message["dst_len"] = rule.destination.prefixlen if rule.destination else 0
    message["attrs"] = [(name, value) for name, value in _rule_attributes(rule) if value not in (None, "")]
    kind = RTM_DELRULE if verb is Verb.DELETE else RTM_NEWRULE
    return _encode(message, kind, NLM_F_ACK | FLAGS[verb])


def _rule_attributes(rule: Rule) -> tuple[tuple[str, object], ...]:
    def pair(values: Range | None) -> str | None:
        return f"{values.first}:{values.last}" if values else None

    mark = rule.fwmark
    return (
        ("FRA_PROTOCOL", PROTOCOL),
        ("FRA_PRIORITY", rule.priority),
        ("FRA_TABLE", rule.table or None),
        ("FRA_SRC", str(rule.source.network_address) if rule.source else None),
        ("FRA_DST", str(rule.destination.network_address) if rule.destination else None),
        ("FRA_IIFNAME", rule.iif),
        ("FRA_OIFNAME", rule.oif),
        ("FRA_FWMARK", mark.value if mark else None),
        ("FRA_FWMASK", mark.mask if mark else None),
        ("FRA_UID_RANGE", pair(rule.user)),
        ("FRA_IP_PROTO", rule.proto or None),
        ("FRA_SPORT_RANGE", pair(rule.sport)),
        ("FRA_DPORT_RANGE", pair(rule.dport)),
        ("FRA_DSCP", rule.dscp),
        ("FRA_SUPPRESS_PREFIXLEN", rule.suppress_prefixlength),
        ("FRA_GOTO", rule.goto or None),
    )


def route_lookup(family: Family, destination: Address, source: Address) -> bytes:
    """Return the request for the route that a packet of this host takes."""
    bits = destination.max_prefixlen
    body = struct.pack("=BBBBBBBBI", family, bits, bits, 0, 0, 0, 0, 0, 0)
    for kind, address in ((RTA_DST, destination), (RTA_SRC, source)):
        body += ATTRIBUTE.pack(4 + len(address.packed), kind) + address.packed
    return HEADER.pack(16 + len(body), RTM_GETROUTE, NLM_F_REQUEST, 0, 0) + body


def interface_of(message: bytes) -> int:
    """Return the number of the interface that an RTM_NEWROUTE leads out by; 0 if it names none."""
    offset = 28
    while offset + 8 <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, offset)
        if kind == RTA_OIF:
            return int.from_bytes(message[offset + 4 : offset + 8], sys.byteorder)
        offset += max(4, length + 3 & ~3)
    return 0


def link_dump(index: int = 0) -> bytes:
    """Return the request for one link (`index`), or the dump of all."""
    flags = NLM_F_REQUEST | (0 if index else NLM_F_DUMP)
    body = IFINFO.pack(0, 0, index, 0, 0) + struct.pack(
        "=HHI", 8, 29, 8
    )  # IFLA_EXT_MASK: RTEXT_FILTER_SKIP_STATS
    return HEADER.pack(16 + len(body), RTM_GETLINK, flags, 0, 0) + body


def address_dump(index: int = 0) -> bytes:
    """Return the dump request for the addresses of one interface, or of all; strict checking filters."""
    body = struct.pack("=BBBBi", 0, 0, 0, 0, index)
    return HEADER.pack(16 + len(body), RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body


def rule_dump(family: Family) -> bytes:
    """Return the dump request for the rules of `family`: the kernel can't filter these, but they are few."""
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)
    return HEADER.pack(16 + len(body), RTM_GETRULE, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body


def route_dump(family: Family, table: int = 0, protocol: int = 0, interface: int = 0) -> bytes:
    """Return the dump request for routes; the kernel filters by what is not 0 (strict checking)."""
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, min(table, RT_TABLE_COMPAT), protocol, 0, 0, 0)
    if table:
        body += struct.pack("=HHI", 8, 15, table)  # RTA_TABLE
    if interface:
        body += struct.pack("=HHI", 8, 4, interface)  # RTA_OIF
    return HEADER.pack(16 + len(body), RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body


# --- answers and events -----------------------------------------------------------------------


def link_of(message: bytes) -> tuple[int, str, bool, bool]:
    """Return (index, name, up, carrier) of an RTM_NEWLINK or RTM_DELLINK.

    Read by hand: this is the hot path of a carrier loss, and a link has dozens of attributes.
    """
    _, _, index, flags, _ = IFINFO.unpack_from(message, 16)
    name, carrier = "", True
    offset = 16 + IFINFO.size
    while offset + 4 <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, offset)
        if length < 4:
            break
        if kind == IFLA_IFNAME:
            name = message[offset + 4 : offset + length].split(b"\0", 1)[0].decode(errors="replace")
        elif kind == IFLA_CARRIER:
            carrier = bool(message[offset + 4])
        offset += (length + 3) & ~3
    return index, name, bool(flags & IFF_UP), carrier


def address_of(message: bytes) -> tuple[int, LinkAddress]:
    """Return (interface index, address) of an RTM_NEWADDR."""
    decoded = ifaddrmsg(message)
    decoded.decode()
    remote = decoded.get_attr("IFA_ADDRESS")
    local = decoded.get_attr("IFA_LOCAL") or remote
    prefix = ip_interface(f"{remote}/{decoded['prefixlen']}").network
    return decoded["index"], LinkAddress(ip_address(local), prefix)


def route_of(message: bytes, names: dict[int, str]) -> tuple[int, Route]:
    """Return (protocol, route) of an RTM_NEWROUTE; of a multipath route the first hop."""
    decoded = rtmsg(message)
    decoded.decode()
    family = Family(decoded["family"])
    destination = _network(decoded.get_attr("RTA_DST"), decoded["dst_len"])
    source = decoded.get_attr("RTA_PREFSRC")
    route = Route(
        family,
        decoded.get_attr("RTA_TABLE") or decoded["table"],
        destination or default_network(family),
        names.get(decoded.get_attr("RTA_OIF") or 0, ""),
        gateway=_gateway(decoded.get_attr("RTA_GATEWAY")),
        source=ip_address(source) if source else None,
        onlink=bool(decoded["flags"] & RTNH_F_ONLINK),
        metric=decoded.get_attr("RTA_PRIORITY") or 0,
        raw=b"" if _is_plain(decoded) else message[16:],
    )
    return decoded["proto"], route


def _is_plain(decoded: Any) -> bool:
    """Say whether a route is of the kind that pbrd makes."""
    unusual = ("RTA_MULTIPATH", "RTA_VIA", "RTA_ENCAP", "RTA_NH_ID")
    return decoded["type"] == RTN_UNICAST and not decoded["tos"] and not any(map(decoded.get_attr, unusual))


def defaults_of(message: bytes, names: dict[int, str]) -> tuple[DefaultRoute, ...]:
    """Return the unicast default routes that an RTM_NEWROUTE speaks of: one for each next hop."""
    decoded = rtmsg(message)
    decoded.decode()
    if decoded["dst_len"] or decoded["type"] != RTN_UNICAST:
        return ()
    family, metric = Family(decoded["family"]), decoded.get_attr("RTA_PRIORITY") or 0
    origin = PROTOCOLS.get(decoded["proto"], str(decoded["proto"]))
    if decoded.get_attr("RTA_VIA") or decoded.get_attr("RTA_ENCAP"):
        return ()  # by a gateway of the other family, or into a tunnel: not what a copy of it would do
    source = _gateway(decoded.get_attr("RTA_PREFSRC"))
    hops = decoded.get_attr("RTA_MULTIPATH") or [decoded | {"oif": decoded.get_attr("RTA_OIF")}]
    return tuple(
        DefaultRoute(
            family,
            names.get(hop["oif"] or 0, ""),
            _gateway(hop.get_attr("RTA_GATEWAY") if hasattr(hop, "get_attr") else _hop_gateway(hop)),
            metric,
            origin,
            bool(hop["flags"] & RTNH_F_ONLINK),
            source,
        )
        for hop in hops
    )


def error_default_of(message: bytes) -> str:
    """Return "unreachable", "blackhole" or "prohibit" for a default route of that kind, else ""."""
    return ERROR_ROUTES.get(message[23], "") if message[17] == 0 else ""


def rule_of(message: bytes) -> tuple[int, Rule]:
    """Return (protocol, rule) of an RTM_NEWRULE. One that pbrd never makes (tos, tunnel ids …) has `raw`."""
    return _rule_of(message[16:])


@lru_cache(maxsize=8192)
def _rule_of(body: bytes) -> tuple[int, Rule]:
    """Decode a rule once: all rules are read back whenever one changes, and nearly all are as before."""
    decoded = _fib_rule(body)
    action = _action(decoded)
    protocol = decoded.get_attr("FRA_PROTOCOL") or 0
    if action is None or decoded["tos"] or any(map(decoded.get_attr, FOREIGN_ATTRIBUTES)):
        priority = decoded.get_attr("FRA_PRIORITY") or 0
        return protocol, Rule(Family(decoded["family"]), priority, raw=body)
    return protocol, _selected(decoded, action)


def foreign_rule_of(message: bytes) -> ForeignRule:
    """Return an RTM_NEWRULE as others may have made it, whatever its kind."""
    return _foreign_rule_of(message[16:])


@lru_cache(maxsize=1024)
def _foreign_rule_of(body: bytes) -> ForeignRule:
    decoded = _fib_rule(body)
    protocol, attribute = decoded.get_attr("FRA_PROTOCOL") or 0, decoded.get_attr
    odd = decoded["tos"] or any(map(attribute, FOREIGN_ATTRIBUTES))
    return ForeignRule(
        _selected(decoded, _action(decoded) or Action.LOOKUP),
        protocol,
        odd=bool(odd) or _action(decoded) is Action.NOP,
    )


def _fib_rule(body: bytes) -> Any:
    decoded = fibmsg(HEADER.pack(16 + len(body), RTM_NEWRULE, 0, 0, 0) + body)
    decoded.decode()
    return decoded


def _action(decoded: Any) -> Action | None:
    return next((action for action, number in FR_ACTIONS.items() if number == decoded["action"]), None)


def _selected(decoded: Any, action: Action) -> Rule:
    """Return a rule by the attributes that `Rule` knows."""
    attribute = decoded.get_attr
    fwmark, suppress = attribute("FRA_FWMASK"), attribute("FRA_SUPPRESS_PREFIXLEN")
    return Rule(
        Family(decoded["family"]),
        attribute("FRA_PRIORITY") or 0,
        action,
        (attribute("FRA_TABLE") or decoded["table"]) if action is Action.LOOKUP else 0,
        source=_network(attribute("FRA_SRC"), decoded["src_len"]),
        destination=_network(attribute("FRA_DST"), decoded["dst_len"]),
        iif=attribute("FRA_IIFNAME") or "",
        oif=attribute("FRA_OIFNAME") or "",
        fwmark=Mark(attribute("FRA_FWMARK") or 0, fwmark) if fwmark else None,
        user=_range(attribute("FRA_UID_RANGE")),
        proto=attribute("FRA_IP_PROTO") or 0,
        sport=_range(attribute("FRA_SPORT_RANGE")),
        dport=_range(attribute("FRA_DPORT_RANGE")),
        dscp=attribute("FRA_DSCP"),
        suppress_prefixlength=None if suppress in (None, NO_SUPPRESS) else suppress,
        inverted=bool(decoded["flags"] & FIB_RULE_INVERT),
        goto=attribute("FRA_GOTO") or 0,
    )


def _network(address: str | None, length: int) -> Network | None:
    return ip_network(f"{address}/{length}") if address is not None and length else None


def _gateway(address: str | None) -> Address | None:
    return ip_address(address) if address else None


def _hop_gateway(hop: Any) -> str | None:
    return next((value for name, value in hop["attrs"] if name == "RTA_GATEWAY"), None)


def _range(text: str | None) -> Range | None:
    if text is None:
        return None
    first, last = text.split(":")
    return Range(int(first), int(last))
