"""The scalar syntaxes: tables of what people write, and what they are told."""

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbrd import values
from pbrd.settings import Mark, Range, TimeOfDay

GOOD: list[tuple[Callable[[object], Any], object, object]] = [
    (values.duration, "200ms", 0.2),
    (values.duration, "1s", 1.0),
    (values.duration, "1.5s", 1.5),
    (values.duration, "1000ms", 1.0),
    (values.duration, "5m", 300.0),
    (values.duration, "2h", 7200.0),
    (values.duration, "1d", 86400.0),
    (values.duration, "0", 0.0),
    (values.size, "50GB", 50 * 10**9),
    (values.size, "1KiB", 1024),
    (values.size, "1.5MB", 1_500_000),
    (values.size, "0", 0),
    (values.ratio, "20%", 0.2),
    (values.ratio, "12.5%", 0.125),
    (values.ratio, "100%", 1.0),
    (values.ratio, "0", 0.0),
    (values.address, "192.0.2.1", IPv4Address("192.0.2.1")),
    (values.address, "2001:DB8::1", IPv6Address("2001:db8::1")),
    (values.prefix, "192.168.1.100", ip_network("192.168.1.100/32")),
    (values.prefix, "10.0.0.0/8", ip_network("10.0.0.0/8")),
    (values.prefix, "2001:db8:0::/32", ip_network("2001:db8::/32")),
    (values.prefix, "0.0.0.0/0", ip_network("0.0.0.0/0")),
    (values.port, 443, 443),
    (values.port, "443", 443),
    (values.port_range, 443, Range(443, 443)),
    (values.port_range, "443", Range(443, 443)),
    (values.port_range, "8000-8100", Range(8000, 8100)),
    (values.port_range, "8000 - 8100", Range(8000, 8100)),
    (values.port_range, "1024-65535", Range(1024, 65535)),
    (values.id_range, 0, Range(0, 0)),
    (values.id_range, "1000-1999", Range(1000, 1999)),
    (values.proto, "tcp", 6),
    (values.proto, "ICMPv6", 58),
    (values.proto, 47, 47),
    (values.proto, "255", 255),
    (values.dscp, 46, 46),
    (values.dscp, "ef", 46),
    (values.dscp, "CS1", 8),
    (values.dscp, "af21", 18),
    (values.dscp, "af43", 38),
    (values.dscp, "va", 44),
    (values.dscp, "le", 1),
    (values.dscp, "0x2e", 46),
    (values.mark, "0x1", Mark(1, 0xFFFFFFFF)),
    (values.mark, "0x1/0xff", Mark(1, 0xFF)),
    (values.mark, 16, Mark(16, 0xFFFFFFFF)),
    (values.mark, "16/0xF0", Mark(16, 0xF0)),
    (values.mac, "AA-BB-cc-dd-ee-0F", "aa:bb:cc:dd:ee:0f"),
    (values.time_of_day, "01:00-05:00", TimeOfDay(3600, 18000)),
    (values.time_of_day, "22:30-6:00", TimeOfDay(81000, 21600)),
    (values.time_of_day, "18:00-24:00", TimeOfDay(64800, 86400)),
    (values.day, "mon", 0),
    (values.day, "Sunday", 6),
    (values.interface, "eth0.100", "eth0.100"),
    (values.interface, "enp0s31f6@", "enp0s31f6@"),
    (values.interface, "a23456789012345", "a23456789012345"),
    (values.interface_pattern, "ppp*", "ppp*"),
    (values.interface_pattern, "lo", "lo"),
    (values.name, "secondary_link", "secondary_link"),
    (values.name, "a.b-c_9", "a.b-c_9"),
    (values.listen_address, "127.0.0.1:9798", "127.0.0.1:9798"),
    (values.listen_address, "[::1]:9798", "[::1]:9798"),
    (values.unit, "restic.service", "restic.service"),
    (values.unit, "user@1000.service", "user@1000.service"),
    (values.unit, "backup.slice", "backup.slice"),
]

DURATION = 'write a duration with its unit, as "200ms", "1s" or "5m"'
PREFIX = 'write an address or a prefix, as "192.168.1.0/24" or "2001:db8::/32"'
LISTEN = 'write an address and a port, as "127.0.0.1:9798" or "[::1]:9798"'
STRETCH = 'write a stretch of the day, as "01:00-05:00"'

BAD: list[tuple[Callable[[object], Any], object, str]] = [
    (values.duration, 5, f"5 is a number; {DURATION}"),
    (values.duration, "5", f'"5" is no duration; {DURATION}'),
    (values.duration, "1 week", f'"1 week" is no duration; {DURATION}'),
    (values.duration, "-1s", f'"-1s" is no duration; {DURATION}'),
    (values.duration, "١s", f'"١s" is no duration; {DURATION}'),
    (values.duration, [], f"this is a list; {DURATION}"),
    (values.size, "50", '"50" is no size; write a size with its unit, as "500MB" or "50GB"'),
    (values.ratio, "101%", '"101%" is no percentage; write a percentage from "0%" to "100%"'),
    (values.ratio, 0.2, '0.2 is a number; write a percentage from "0%" to "100%"'),
    (values.ratio, float("nan"), 'nan is a number; write a percentage from "0%" to "100%"'),
    (
        values.address,
        "1.1.1",
        '"1.1.1" is no address; write an address, as "192.0.2.1" or "2001:db8::1"',
    ),
    (values.address, "fe80::1%eth0", '"fe80::1%eth0" has a zone; leave "%eth0" out'),
    (
        values.prefix,
        "192.168.1.100/24",
        '"192.168.1.100/24" has bits set beyond /24; '
        'write "192.168.1.0/24" for the network, or "192.168.1.100" for the one address',
    ),
    (
        values.prefix,
        "2001:db8::1/32",
        '"2001:db8::1/32" has bits set beyond /32; '
        'write "2001:db8::/32" for the network, or "2001:db8::1" for the one address',
    ),
    (values.prefix, "10.0.0.0/33", f'"10.0.0.0/33" is no prefix; {PREFIX}'),
    (values.prefix, "10.0.0.0/255.0.0.0", f'"10.0.0.0/255.0.0.0" is no prefix; {PREFIX}'),
    (values.prefix, "10.0.0.0/", f'"10.0.0.0/" is no prefix; {PREFIX}'),
    (values.prefix, "any", f'"any" is no prefix; {PREFIX}'),
    (values.port, 0, "0 is out of range; write a port from 1 to 65535"),
    (values.port, True, "true is a boolean; write a port from 1 to 65535"),
    (values.port_range, "8100-8000", '"8100-8000" runs backwards; write "8000-8100"'),
    (
        values.port_range,
        "1-2-3",
        '"1-2-3" is no range within 1-65535; write a port from 1 to 65535, or a range as "8000-8100"',
    ),
    (
        values.port_range,
        "https",
        '"https" is not understood; write a port from 1 to 65535, or a range as "8000-8100"',
    ),
    (
        values.proto,
        "tpc",
        '"tpc" is not understood; write a protocol as "tcp", "udp" or "icmp", or a number from 1 to 255',
    ),
    (
        values.proto,
        0,
        '0 is out of range; write a protocol as "tcp", "udp" or "icmp", or a number from 1 to 255',
    ),
    (
        values.dscp,
        64,
        '64 is out of range; write a number from 0 to 63, or a class as "cs1", "af21" or "ef"',
    ),
    (
        values.mark,
        "0x1ffffffff",
        '"0x1ffffffff" is out of range; write a mark of 32 bits, as "0x1" or "0x1/0xff"',
    ),
    (
        values.mark,
        "0x1/zz",
        '"0x1/zz" is no mark with a mask; write a mark of 32 bits, as "0x1" or "0x1/0xff"',
    ),
    (
        values.mark,
        "0x101/0xff",
        '"0x101/0xff" can never match, the mask drops bits of the mark; write "0x1/0xff"',
    ),
    (
        values.mac,
        "aa:bb:cc",
        '"aa:bb:cc" is no MAC address; write a MAC address, as "aa:bb:cc:dd:ee:ff"',
    ),
    (values.time_of_day, "1-5", f'"1-5" is no stretch of the day; {STRETCH}'),
    (values.time_of_day, "01:00-25:00", '"01:00-25:00" is no time of the day; write 00:00 to 24:00'),
    (values.time_of_day, "24:00-05:00", '"24:00-05:00" is no time of the day; write 00:00 to 24:00'),
    (
        values.time_of_day,
        "05:00-05:00",
        '"05:00-05:00" begins where it ends; for the whole day leave the key out',
    ),
    (
        values.day,
        "mo",
        '"mo" is no day; write a day, as "mon", "tue", "wed", "thu", "fri", "sat" or "sun"',
    ),
    (values.interface, "eth*", '"eth*" is a pattern; write the exact name of one interface, as "eth0"'),
    (
        values.interface,
        "a234567890123456",
        "\"a234567890123456\" can't be an interface's name; write 1 to 15 characters",
    ),
    (values.interface, "", "\"\" can't be an interface's name; write 1 to 15 characters"),
    (
        values.interface,
        "eth 0",
        '"eth 0" can\'t be an interface\'s name; leave blanks, "/" and ":" out',
    ),
    (
        values.interface,
        "a\0b",
        '"a\\u0000b" can\'t be an interface\'s name; leave blanks, "/" and ":" out',
    ),
    (values.interface_pattern, "*", '"*" is every interface; leave the key out'),
    (values.interface_pattern, "p*p", '"p*p" has a "*" that is not at the end; write a pattern as "ppp*"'),
    (values.name, "9lives", '"9lives" can\'t be a name; write 1 to 32 letters, digits, _ - . after a letter'),
    (values.name, "é", '"é" can\'t be a name; write 1 to 32 letters, digits, _ - . after a letter'),
    (values.name, "main", '"main" is reserved; choose a name other than main, local, default, all'),
    (values.listen_address, "localhost:9798", f'"localhost:9798" can\'t be listened on; {LISTEN}'),
    (values.listen_address, ":9798", f'":9798" can\'t be listened on; {LISTEN}'),
    (values.listen_address, "::1:9798", f'"::1:9798" can\'t be listened on; {LISTEN}'),
    (values.listen_address, "[127.0.0.1]:9798", f'"[127.0.0.1]:9798" can\'t be listened on; {LISTEN}'),
    (
        values.unit,
        "restic",
        '"restic" is no unit with processes; '
        'write a service, slice or scope, as "restic.service" or "backup.slice"',
    ),
    (
        values.unit,
        "getty@.service",
        '"getty@.service" is a template; write an instance, as "getty@NAME.service"',
    ),
    (values.boolean, "yes", '"yes" is a string; write true or false'),
]


def label(item: object) -> str:
    return getattr(item, "__name__", repr(item))


@pytest.mark.parametrize(("parse", "written", "value"), GOOD, ids=label)
def test_what_people_write_becomes_a_value(
    parse: Callable[[object], Any], written: object, value: object
) -> None:
    assert parse(written) == value


@pytest.mark.parametrize(("parse", "written", "remark"), BAD, ids=label)
def test_what_is_wrong_is_shown_with_its_remedy(
    parse: Callable[[object], Any], written: object, remark: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(remark) + "$"):
        parse(written)


PARSERS = sorted({parse for parse, _, _ in [*GOOD, *BAD]}, key=lambda parse: parse.__name__)
SCALARS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="0123456789abcdefx:.-/%*", max_size=40),
    st.integers(),
    st.just(1 << 20000),
    st.floats(),
    st.booleans(),
    st.dates(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(st.sampled_from(PARSERS), SCALARS)
def test_no_value_causes_anything_but_a_remark(parse: Callable[[object], Any], value: object) -> None:
    remark = ""
    try:
        parse(value)
    except ValueError as error:
        remark = str(error)
    assert not remark or ("; " in remark and "\n" not in remark)


@given(st.integers(0, 10**6), st.sampled_from(sorted(values.SECONDS)))
def test_durations_are_exact_in_every_unit(number: int, unit: str) -> None:
    seconds = values.duration(f"{number}{unit}")
    assert seconds == pytest.approx(number * float(values.SECONDS[unit]))
    assert seconds == values.duration(f"{number}.000{unit}")


@given(st.integers(0, 10**6))
def test_a_thousand_milliseconds_are_a_second(number: int) -> None:
    assert values.duration(f"{number * 1000}ms") == values.duration(f"{number}s")


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_a_range_of_ports_holds_what_was_written(first: int, last: int) -> None:
    if first <= last:
        assert values.port_range(f"{first}-{last}") == Range(first, last)
    else:
        with pytest.raises(ValueError, match=f'write "{last}-{first}"'):
            values.port_range(f"{first}-{last}")


@given(st.ip_addresses(), st.integers(0, 128))
def test_the_prefix_that_is_proposed_is_right(address: IPv4Address | IPv6Address, length: int) -> None:
    length = min(length, address.max_prefixlen)
    right = ip_network(f"{address}/{length}", strict=False)
    assert values.prefix(str(right)) == right
    if right.network_address != address:
        with pytest.raises(ValueError, match="has bits set beyond") as caught:
            values.prefix(f"{address}/{length}")
        assert f'write "{right}" for the network' in str(caught.value)
