"""The lab's plan: its addresses, its uplinks, and the lines of ip(8) and nft(8) that configure them.

Pure: text in, text out; `lab` builds it.
"""

import dataclasses
from dataclasses import dataclass

LAN = ("192.168.100.10", "192.168.100.11", "192.168.100.12")  # the clients' addresses
LAN6 = ("fd00:100::10", "fd00:100::11", "fd00:100::12")
TARGETS = ("203.0.113.10", "198.51.100.10", "192.0.2.10")  # the internet's
TARGETS6 = ("2001:db8:113::10", "2001:db8:51::10", "2001:db8:2::10")

# No duplicate address detection (it takes a second), no rate limit on "unreachable", no redirects.
SYSCTLS = {
    "ipv4/ip_forward": 1,
    "ipv4/icmp_ratelimit": 0,
    "ipv4/conf/all/send_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
    "ipv6/conf/all/forwarding": 1,
    "ipv6/conf/all/accept_dad": 0,
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/default/accept_ra": 0,
    "ipv6/icmp/ratelimit": 0,
}
# Chains of faults are empty while nothing is wrong. Counters stand before them, and before NAT: what is
# dropped by a fault has left by this uplink all the same.
ISP_RULES = """
table inet nat { chain post { type nat hook postrouting priority 100; oifname "wan" masquerade; }; }
table inet fault {
  chain silence { type filter hook forward priority -10; }
  chain mute { type filter hook forward priority -9; }
  chain loss { type filter hook forward priority -8; }
}
table inet count { }
"""
MUTE_RULES = 'table netdev fault { chain mute { type filter hook ingress device "gw" priority 0; }; }'


@dataclass(frozen=True, slots=True)
class Uplink:
    """One uplink of the router; what is left empty is filled in by the lab."""

    name: str
    interface: str = ""  # "" = as the uplink
    address: str = ""  # "off" = no IPv4 here
    gateway: str = ""
    prefix: int = 24  # 32 = the gateway is `onlink`
    address6: str = ""  # "off" = no IPv6 here
    gateway6: str = ""
    prefix6: int = 64
    extra: tuple[str, ...] = ()  # further local addresses on the interface, with prefix
    point_to_point: bool = False  # no gateway and no ARP, as ppp0 or wg0: `gateway = "none"`
    wan: str = ""  # what the internet sees as source
    wan6: str = ""
    isp: str = ""  # the provider's namespace

    @property
    def families(self) -> list[tuple[int, str, int, str]]:
        """(4 or 6, address, prefix, gateway) of each family that exists here."""
        both = ((4, self.address, self.prefix, self.gateway), (6, self.address6, self.prefix6, self.gateway6))
        return [family for family in both if family[1] != "off"]


def completed(uplink: Uplink, k: int, name: str) -> Uplink:
    """Fill in what was left empty for uplink number k of lab `name`."""
    n, direct = k + 1, uplink.point_to_point
    return dataclasses.replace(
        uplink,
        interface=uplink.interface or uplink.name,
        address=uplink.address or f"10.0.{n}.2",
        gateway="none" if direct else uplink.gateway or f"10.0.{n}.1",
        prefix=32 if direct else uplink.prefix,
        address6=uplink.address6 or f"fd00:{n}::2",
        gateway6="none" if direct else uplink.gateway6 or f"fd00:{n}::1",
        prefix6=128 if direct else uplink.prefix6,
        wan=f"100.64.{n}.2",
        wan6=f"fd64:{n}::2",
        isp=f"{name}-isp{k}",
    )


def lan_config() -> str:
    """The LAN client's own lines."""
    lines = ["link set dev lo up", *(f"addr add {address}/24 dev eth0" for address in LAN)]
    for address in LAN6:  # the first is the default source; the others serve who binds to them
        lines.append(
            f"addr add {address}/64 dev eth0 nodad {'' if address == LAN6[0] else 'preferred_lft 0'}"
        )
    gateways = ["route add default via 192.168.100.1", "route add ::/0 via fd00:100::1"]
    return "\n".join([*lines, "link set dev eth0 up", *gateways])


def internet_config() -> str:
    """The internet's targets."""
    targets = [f"addr add {t}/32 dev lo" for t in TARGETS] + [f"addr add {t}/128 dev lo" for t in TARGETS6]
    return "\n".join(["link set dev lo up", *targets])


def inbound_config(uplink: Uplink, k: int) -> str:
    """The internet's side of the link to provider k: its addresses, and the ways back to the router."""
    n = k + 1
    lines = [f"addr add 100.64.{n}.1/24 dev isp{k}", f"addr add fd64:{n}::1/64 dev isp{k} nodad"]
    lines.append(f"link set dev isp{k} up")
    for family, address, _, _ in uplink.families:
        host, via = (f"{address}/32", uplink.wan) if family == 4 else (f"{address}/128", uplink.wan6)
        lines.append(f"route replace {host} via {via}")
    return "\n".join(lines)


def wan_config(uplink: Uplink, k: int) -> str:
    """The provider's side of its link to the internet."""
    n = k + 1
    return f"""addr add {uplink.wan}/24 dev wan
        addr add {uplink.wan6}/64 dev wan nodad
        link set dev wan up
        route add default via 100.64.{n}.1
        route add ::/0 via fd64:{n}::1"""


def gateway_config(uplink: Uplink) -> str:
    """The provider's side of the link to the router; lost in part whenever that link is down."""
    lines = []
    for family, address, prefix, gateway in uplink.families:
        host, lan, nodad = (32, "192.168.100.0/24", "") if family == 4 else (128, "fd00:100::/64", "nodad")
        if gateway != "none":
            lines.append(f"addr replace {gateway}/{prefix} dev gw {nodad}")
        ours = [address, *(e.split("/")[0] for e in uplink.extra if (":" in e) == (family == 6))]
        lines += [f"route replace {one}/{host} dev gw" for one in ours]
        via = "" if gateway == "none" else f"via {address}"
        lines.append(f"route replace {lan} {via} dev gw")
    return "\n".join(lines)


def interface_config(uplink: Uplink, k: int, defaults: bool) -> str:
    """What DHCP, router advertisements or an administrator configure on the router's interface."""
    lines = []
    for family, address, prefix, gateway in uplink.families:
        default, proto, nodad = ("0.0.0.0/0", "dhcp", "") if family == 4 else ("::/0", "ra", "nodad")
        lines.append(f"addr replace {address}/{prefix} dev {uplink.interface} {nodad}")
        onlink = "onlink" if prefix in (32, 128) else ""
        via = "" if gateway == "none" else f"via {gateway} {onlink}"
        if defaults:
            way = f"{via} dev {uplink.interface} proto {proto} metric {100 + k}"
            lines.append(f"route replace {default} {way}")
    for extra in uplink.extra:
        lines.append(f"addr replace {extra} dev {uplink.interface} {'nodad' if ':' in extra else ''}")
    return "\n".join(lines)
