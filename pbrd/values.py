"""The scalar syntaxes: what a person writes for a duration, a prefix, a port, and the value it stands for.

Each function takes what TOML or a command line handed over and returns the canonical value, or
raises ValueError with a remark "what is wrong; what would be right" that contains the value as it
was written. Nothing here knows of files, keys or sections: that is `config`.
"""

import json
import re
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from pbrd.settings import MAIN, Address, Mark, Network, Range, TimeOfDay

SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

# Assigned Internet Protocol Numbers (IANA). A table of our own, because getprotobyname() gives
# different answers on different machines, and a config must mean the same everywhere.
PROTOCOLS = {
    **{"icmp": 1, "igmp": 2, "ipip": 4, "tcp": 6, "udp": 17, "dccp": 33, "ipv6": 41, "rsvp": 46, "gre": 47},
    **{"esp": 50, "ah": 51, "icmpv6": 58, "eigrp": 88, "ospf": 89, "pim": 103, "vrrp": 112, "l2tp": 115},
    **{"sctp": 132, "udplite": 136},
}
PORT_PROTOCOLS = frozenset(PROTOCOLS[name] for name in ("tcp", "udp", "sctp", "dccp"))

# RFC 2474 (cs), 2597 (af), 3246 (ef), 5865 (va), 8622 (le).
DSCP_CLASSES = {
    **{f"cs{number}": 8 * number for number in range(8)},
    **{f"af{number}{drop}": 8 * number + 2 * drop for number in range(1, 5) for drop in range(1, 4)},
    **{"ef": 46, "va": 44, "le": 1},
}

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
RESERVED_NAMES = (MAIN, "local", "default", "all")  # names of the kernel's own tables, and `all` uplinks
HIGHEST_ID = 2**32 - 2  # 2**32 - 1 is "no user" (chown(2))
KINDS = {
    bool: "a boolean",
    str: "a string",
    list: "a list",
    dict: "a table",
    int: "a number",
    float: "a number",
}
UNIT_TYPES = ("service", "slice", "scope")  # the units that hold processes


def shown(value: object) -> str:
    """Return `value` as TOML writes it, short enough for one line."""
    match value:
        case bool():
            text = str(value).lower()
        case str():
            text = json.dumps(value, ensure_ascii=not value.isprintable())
        case int():  # str() of an int refuses more than 4300 digits
            text = str(value) if value.bit_length() <= 128 else hex(value)
        case list() | dict():
            text = "this"
        case _:
            text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def wrong_type(value: object, wanted: str) -> ValueError:
    """Return the error for a value of a type that can't stand here."""
    return ValueError(f"{shown(value)} is {KINDS.get(type(value), 'a date or time')}; write {wanted}")


def string(value: object, wanted: str = "a string") -> str:
    """Return `value` if it is a string."""
    if not isinstance(value, str):
        raise wrong_type(value, wanted)
    return value


def boolean(value: object) -> bool:
    """Return `value` if it is true or false."""
    if not isinstance(value, bool):
        raise wrong_type(value, "true or false")
    return value


def whole_number(value: object, low: int, high: int, wanted: str) -> int:
    """Return an int, or a string of one (decimal, 0x…), that lies in `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise wrong_type(value, wanted)
    number = value
    if isinstance(number, str):
        # Twelve digits hold all that fits into 32 bits, and int() refuses endless ones with words of its own.
        if not re.fullmatch(r"[0-9]{1,12}|0[xX][0-9a-fA-F]{1,12}", number):
            raise ValueError(f"{shown(value)} is not understood; write {wanted}")
        number = int(number, 16 if number[:2].lower() == "0x" else 10)
    if not low <= number <= high:
        raise ValueError(f"{shown(value)} is out of range; write {wanted}")
    return number


def duration(value: object) -> float:
    """Return the seconds of a duration as "200ms", "1s", "5m", "2h", "1d" or "0"."""
    wanted = 'a duration with its unit, as "200ms", "1s" or "5m"'
    text = string(value, wanted)
    if text == "0":
        return 0.0
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)", text)
    if not found:
        raise ValueError(f"{shown(value)} is no duration; write {wanted}")
    return float(Decimal(found[1]) * SECONDS[found[2]])


def size(value: object) -> int:
    """Return the bytes of a size as "50GB" (1000s), "50GiB" (1024s) or "0", cut to whole bytes."""
    wanted = 'a size with its unit, as "500MB" or "50GB"'
    text = string(value, wanted)
    if text == "0":
        return 0
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([KMGT]i?B|B)", text)
    if not found:
        raise ValueError(f"{shown(value)} is no size; write {wanted}")
    return int(Decimal(found[1]) * BYTES[found[2]])


def ratio(value: object) -> float:
    """Return 0.0 to 1.0 for "0%" to "100%", or "0"."""
    wanted = 'a percentage from "0%" to "100%"'
    text = string(value, wanted)
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", "0%" if text == "0" else text)
    if not found or Decimal(found[1]) > 100:
        raise ValueError(f"{shown(value)} is no percentage; write {wanted}")
    return float(Decimal(found[1]) / 100)


def address(value: object) -> Address:
    """Return the IPv4 or IPv6 address."""
    wanted = 'an address, as "192.0.2.1" or "2001:db8::1"'
    text = string(value, wanted)
    # A zone would make two equal addresses differ; where it matters, the interface is known already.
    if "%" in text:
        raise ValueError(f'{shown(value)} has a zone; leave "{text[text.index("%") :]}" out')
    try:
        return ip_address(text)
    except ValueError:
        raise ValueError(f"{shown(value)} is no address; write {wanted}") from None


def prefix(value: object) -> Network:
    """Return the network of a prefix; a bare address is a prefix of its own."""
    wanted = 'an address or a prefix, as "192.168.1.0/24" or "2001:db8::/32"'
    text = string(value, wanted)
    host, slash, length = text.partition("/")
    wrong = ValueError(f"{shown(value)} is no prefix; write {wanted}")
    if "%" in text or (slash and not re.fullmatch("[0-9]{1,3}", length)):  # nor a netmask
        raise wrong
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise wrong from None
    bare = ip_address(host)
    if slash and bare != network.network_address:
        raise ValueError(
            f"{shown(value)} has bits set beyond /{length}; "
            f'write "{network}" for the network, or "{host}" for the one address'
        )
    return network


def port(value: object) -> int:
    """Return a port, 1 to 65535."""
    return whole_number(value, 1, 65535, "a port from 1 to 65535")


def port_range(value: object) -> Range:
    """Return the ports of 443, "443" or "8000-8100"."""
    return _span(value, 1, 65535, 'a port from 1 to 65535, or a range as "8000-8100"')


def id_range(value: object) -> Range:
    """Return the user or group ids of 1000, "1000" or "1000-1999"."""
    return _span(value, 0, HIGHEST_ID, 'an id from 0 to 4294967294, or a range as "1000-1999"')


def _span(value: object, low: int, high: int, wanted: str) -> Range:
    if not isinstance(value, str) or "-" not in value:
        number = whole_number(value, low, high, wanted)
        return Range(number, number)
    try:
        first, last = (whole_number(part.strip(), low, high, wanted) for part in value.split("-"))
    except ValueError:
        raise ValueError(f"{shown(value)} is no range within {low}-{high}; write {wanted}") from None
    if first > last:
        raise ValueError(f'{shown(value)} runs backwards; write "{last}-{first}"')
    return Range(first, last)


def proto(value: object) -> int:
    """Return an IP protocol's number, 1 to 255 (0 means "any" in a kernel rule, so it can't be matched)."""
    if isinstance(value, str) and value.lower() in PROTOCOLS:
        return PROTOCOLS[value.lower()]
    return whole_number(value, 1, 255, 'a protocol as "tcp", "udp" or "icmp", or a number from 1 to 255')


def dscp(value: object) -> int:
    """Return a DSCP, 0 to 63, of a number or a class name."""
    if isinstance(value, str) and value.lower() in DSCP_CLASSES:
        return DSCP_CLASSES[value.lower()]
    return whole_number(value, 0, 63, 'a number from 0 to 63, or a class as "cs1", "af21" or "ef"')


def mark(value: object) -> Mark:
    """Return the mark and mask of "0x1" or "0x1/0xff"; without a mask all 32 bits count."""
    wanted = 'a mark of 32 bits, as "0x1" or "0x1/0xff"'
    text, slash, mask_text = value.partition("/") if isinstance(value, str) else (value, "", "")
    try:
        number = whole_number(text, 0, 2**32 - 1, wanted)
        mask = whole_number(mask_text, 1, 2**32 - 1, wanted) if slash else 2**32 - 1
    except ValueError:
        if not slash:
            raise
        raise ValueError(f"{shown(value)} is no mark with a mask; write {wanted}") from None
    if number & ~mask:
        right = f"{number & mask:#x}/{mask:#x}"
        raise ValueError(f'{shown(value)} can never match, the mask drops bits of the mark; write "{right}"')
    return Mark(number, mask)


def mac(value: object) -> str:
    """Return a MAC address as "aa:bb:cc:dd:ee:ff", in lower case."""
    wanted = 'a MAC address, as "aa:bb:cc:dd:ee:ff"'
    text = string(value, wanted).lower().replace("-", ":")
    if not re.fullmatch("[0-9a-f]{2}(?::[0-9a-f]{2}){5}", text):
        raise ValueError(f"{shown(value)} is no MAC address; write {wanted}")
    return text


def time_of_day(value: object) -> TimeOfDay:
    """Return the stretch of "01:00-05:00", in seconds since midnight; "24:00" may end it."""
    wanted = 'a stretch of the day, as "01:00-05:00"'
    found = re.fullmatch("([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})", string(value, wanted))
    if not found:
        raise ValueError(f"{shown(value)} is no stretch of the day; write {wanted}")
    hour, minute, end_hour, end_minute = map(int, found.groups())
    start, end = hour * 3600 + minute * 60, end_hour * 3600 + end_minute * 60
    if minute > 59 or end_minute > 59 or hour > 23 or end > 86400:
        raise ValueError(f"{shown(value)} is no time of the day; write 00:00 to 24:00")
    if start == end:
        raise ValueError(f"{shown(value)} begins where it ends; for the whole day leave the key out")
    return TimeOfDay(start, end)


def day(value: object) -> int:
    """Return 0 for "mon" or "monday" to 6 for "sun" or "sunday"."""
    wanted = 'a day, as "mon", "tue", "wed", "thu", "fri", "sat" or "sun"'
    text = string(value, wanted).lower()
    for number, full in enumerate(DAYS):
        if text in (full, full[:3]):
            return number
    raise ValueError(f"{shown(value)} is no day; write {wanted}")


def interface(value: object) -> str:
    """Return the exact name of a network interface."""
    text = string(value, 'the name of a network interface, as "eth0"')
    if "*" in text:
        raise ValueError(f'{shown(value)} is a pattern; write the exact name of one interface, as "eth0"')
    _judge_interface(text, text)
    return text


def interface_pattern(value: object) -> str:
    """Return an interface's name that may end in `*`."""
    text = string(value, 'the name of a network interface, as "eth0" or "ppp*"')
    if text == "*":
        raise ValueError('"*" is every interface; leave the key out')
    if "*" in text[:-1]:
        raise ValueError(f'{shown(value)} has a "*" that is not at the end; write a pattern as "ppp*"')
    _judge_interface(text.removesuffix("*"), text)
    return text


def _judge_interface(bare: str, written: str) -> None:
    """Refuse what the kernel refuses as a name: dev_valid_name() in net/core/dev.c."""
    if not 1 <= len(bare.encode()) <= 15:
        raise ValueError(f"{shown(written)} can't be an interface's name; write 1 to 15 characters")
    if bare in (".", "..") or re.search(r"[/:\s]", bare) or not bare.isprintable():
        raise ValueError(f'{shown(written)} can\'t be an interface\'s name; leave blanks, "/" and ":" out')


def name(value: object) -> str:
    """Return the name of an uplink or a policy."""
    text = string(value, "a name as a string")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,31}", text):
        raise ValueError(
            f"{shown(value)} can't be a name; write 1 to 32 letters, digits, _ - . after a letter"
        )
    if text in RESERVED_NAMES:
        raise ValueError(f"{shown(value)} is reserved; choose a name other than {', '.join(RESERVED_NAMES)}")
    return text


def listen_address(value: object) -> str:
    """Return "ADDRESS:PORT" in canonical form, IPv6 in brackets."""
    wanted = 'an address and a port, as "127.0.0.1:9798" or "[::1]:9798"'
    host, _, port_text = string(value, wanted).rpartition(":")
    try:
        bare = address(host.removeprefix("[").removesuffix("]"))
        number = port(port_text)
    except ValueError:
        raise ValueError(f"{shown(value)} can't be listened on; write {wanted}") from None
    if host != (f"[{host[1:-1]}]" if isinstance(bare, IPv6Address) else host.strip("[]")):
        raise ValueError(f"{shown(value)} can't be listened on; write {wanted}")
    return f"{bare}:{number}" if isinstance(bare, IPv4Address) else f"[{bare}]:{number}"


def unit(value: object) -> str:
    """Return the name of a systemd unit that holds processes (systemd.unit(5))."""
    wanted = 'a service, slice or scope, as "restic.service" or "backup.slice"'
    text = string(value, wanted)
    stem, _, kind = text.rpartition(".")
    if kind not in UNIT_TYPES or not re.fullmatch(r"[A-Za-z0-9:_.\\@-]{1,255}", text) or not stem:
        raise ValueError(f"{shown(value)} is no unit with processes; write {wanted}")
    if stem.endswith("@"):
        raise ValueError(f'{shown(value)} is a template; write an instance, as "{stem}NAME.{kind}"')
    return text
