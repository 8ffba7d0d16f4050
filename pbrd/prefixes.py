"""Long lists of prefixes, as text: what a list from a file of hundreds of thousands becomes when it is read.

As objects of `ipaddress` they would take 300 bytes each and seconds to compare, hash and write again, while
the daemon's loop waits. So who reads the config, in a thread, writes each of them once, and the table takes
it as it stands.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network

Network = IPv4Network | IPv6Network

LONG = 16  # prefixes in a list; more of them are a set of nftables, not rules


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Prefixes in the order of their list, those of IPv4 first. Made by `of`; cheap to compare and to hash.

    `ipv4` and `ipv6` have them as "192.0.2.0/24, 198.51.100.0/24"; "" is none. `counts` says how many there
    are, `every` whether one of them is of length 0, so that all addresses of the family are in the list.
    """

    ipv4: str
    ipv6: str
    counts: tuple[int, int]
    every: tuple[bool, bool]

    @staticmethod
    def of(prefixes: Iterable[str]) -> "Prefixes":
        """Return the list of prefixes, each as `ipaddress` writes it, none twice."""
        sides: tuple[list[str], list[str]] = ([], [])
        for prefix in prefixes:
            sides[":" in prefix].append(prefix)
        every = ("0.0.0.0/0" in sides[0], "::/0" in sides[1])
        return Prefixes(", ".join(sides[0]), ", ".join(sides[1]), (len(sides[0]), len(sides[1])), every)

    def __len__(self) -> int:
        """Return how many there are."""
        return sum(self.counts)

    def __iter__(self) -> Iterator[Network]:
        """Yield them as objects: for who looks at each, so not for the loop."""
        for text in (self.ipv4, self.ipv6):
            yield from map(ip_network, text.split(", ") if text else ())

    @property
    def versions(self) -> frozenset[int]:
        """The IP versions that occur."""
        return frozenset(version for version, text in ((4, self.ipv4), (6, self.ipv6)) if text)


Networks = tuple[Network, ...] | Prefixes


def versions(networks: Networks) -> frozenset[int]:
    """Return the IP versions that occur in a list."""
    return networks.versions if isinstance(networks, Prefixes) else frozenset(n.version for n in networks)


def listing(networks: Networks, version: int) -> tuple[str, int, bool]:
    """Return what a list has of an IP version: text, how many, and whether any address is in it."""
    if isinstance(networks, Prefixes):
        place = version == 6
        return (networks.ipv6 if place else networks.ipv4), networks.counts[place], networks.every[place]
    return _listed(networks, version)


@lru_cache(maxsize=1 << 14)  # the table asks several times for each of thousands of lists
def _listed(networks: tuple[Network, ...], version: int) -> tuple[str, int, bool]:
    mine = [network for network in networks if network.version == version]
    return ", ".join(map(str, mine)), len(mine), any(network.prefixlen == 0 for network in mine)
