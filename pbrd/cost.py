"""What a config costs: how many rules it makes, and how many of them one packet may have to walk."""

from ipaddress import IPv4Address, IPv6Address, ip_network

from pbrd.classes import uses_nft
from pbrd.marks import FIRST
from pbrd.objects import Link, LinkAddress
from pbrd.routing import wanted_rules
from pbrd.settings import Config, Family

NANOSECONDS = 17  # a rule that does not match, for each packet (forwarded UDP, Linux 6.18)
ADDRESSES = IPv4Address("192.0.2.0"), IPv6Address("2001:db8::")  # stand in for those that uplinks will have


def rule_counts(config: Config) -> dict[Family, int]:
    """Return how many rules `config` makes in each family.

    Counted with one address for each uplink and family, and one interface for each pattern (`iif = "br-*"`).
    """
    addresses = tuple(LinkAddress(address, ip_network(address)) for address in ADDRESSES)
    links = {
        u.interface: Link(u.interface, 0, up=True, carrier=True, addresses=addresses) for u in config.uplinks
    }
    for policy in config.policies:
        for pattern in policy.match.iif:
            if pattern.endswith("*") and not any(name.startswith(pattern[:-1]) for name in links):
                links[pattern[:-1]] = Link(pattern[:-1], 0, up=True, carrier=True)
    return {family: len(set(wanted_rules(config, family, links, {}, FIRST))) for family in Family}


def words(config: Config) -> str:
    """Return the costs in a line. A packet walks the rules of its family, up to the first that decides."""
    counts = rule_counts(config)
    most = max(counts.values())
    text = (
        f"{sum(counts.values())} rules over both families: a forwarded packet walks at most {most} of them, "
    )
    text += f"about {duration(most * NANOSECONDS)}"
    return text + ("; nftables judges connections" if uses_nft(config) else "")


def duration(nanoseconds: int) -> str:
    """Return some nanoseconds in two digits: "340 ns", "1.2 µs", "85 µs"."""
    rounded = float(f"{nanoseconds:.2g}")
    return f"{rounded:g} ns" if rounded < 1000 else f"{rounded / 1000:g} µs"
