import time
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbrd.config import parse
from pbrd.prefixes import collapse
from pbrd.settings import Network

# few addresses, so that networks meet, and some from all over
V4 = st.builds(
    lambda base, length: IPv4Network((base & -1 << 32 - length, length)),
    st.integers(0, 255) | st.integers(0, 2**32 - 1) | st.integers(2**32 - 256, 2**32 - 1),
    st.integers(24, 32) | st.integers(0, 32),
)
V6 = st.builds(
    lambda base, length: IPv6Network((base & -1 << 128 - length, length)),
    st.integers(0, 255) | st.integers(0, 2**128 - 1),
    st.integers(120, 128) | st.integers(0, 128),
)


def networks(text: str) -> list[Network]:
    return [ip_network(prefix) for prefix in text.split()]


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("", ""),
        ("10.0.0.0/24 10.0.1.0/24", "10.0.0.0/23"),
        ("10.0.1.0/24 10.0.2.0/24", "10.0.1.0/24 10.0.2.0/24"),  # side by side, but of two wholes
        ("10.0.0.0/8 10.1.0.0/16 10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.3 10.0.0.2 10.0.0.1 10.0.0.0", "10.0.0.0/30"),
        ("0.0.0.0/1 128.0.0.0/1 ::/1 8000::/1", "0.0.0.0/0 ::/0"),
        ("2001:db8::/33 10.0.0.0/8 2001:db8:8000::/33", "10.0.0.0/8 2001:db8::/32"),
        ("::/128 0.0.0.0/32", "0.0.0.0/32 ::/128"),
    ],
)
def test_a_list_becomes_its_shortest_equivalent(given: str, left: str) -> None:
    assert collapse(networks(given)) == tuple(networks(left))


@given(st.lists(V4 | V6, max_size=40))
def test_the_standard_library_says_the_same(listed: list[Network]) -> None:
    expected = [
        *collapse_addresses(network for network in listed if isinstance(network, IPv4Network)),
        *collapse_addresses(network for network in listed if isinstance(network, IPv6Network)),
    ]
    assert collapse(listed) == tuple(expected)
    assert collapse(collapse(listed)) == collapse(reversed(listed)) == collapse(listed)


def many_prefixes(count: int) -> list[str]:
    """Disjoint networks of changing length, no two of which join."""
    return [str(IPv4Network(((1 << 24) + (number << 12), 20 + number % 9 + 1))) for number in range(count)]


def test_a_file_of_ten_thousand_prefixes_is_read_in_a_moment() -> None:
    text = '[uplinks.a]\ninterface="a"\n[[policies]]\nname="p"\nvia=["a"]\nmatch={from_file="nets"}\n'
    lines = many_prefixes(10_000)
    start = time.process_time()
    config = parse([("pbrd.toml", text)], read_text=lambda _: "\n".join(lines), allow_unsupported=True)
    left = collapse(config.policies[0].match.source)
    assert len(left) == len(lines)
    assert time.process_time() - start < 1.5  # 0.15 s where nothing else runs
