"""What kind an interface is, and whose port: from RTM_NEWLINK messages. No socket."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pbrd.neighbours import Interface

# linux/if_link.h
IFLA_IFNAME, IFLA_MASTER, IFLA_LINKINFO = 3, 10, 18
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_VRF_TABLE = 1
NESTED = 0x3FFF  # without the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER
ATTRIBUTE = struct.Struct("=HH")
BODY = 32  # bytes of nlmsghdr and ifinfomsg


def interfaces(messages: Iterable[bytes]) -> dict[int, Interface]:
    """Return the interfaces of a dump of links, by index."""
    found: dict[int, Interface] = {}
    kinds: dict[int, str] = {}
    masters: dict[int, int] = {}
    for message in messages:
        index = struct.unpack_from("=i", message, 20)[0]
        attributes = dict(_attributes(message[BODY:]))
        info = dict(_attributes(attributes.get(IFLA_LINKINFO, b"")))
        kinds[index] = _text(info.get(IFLA_INFO_KIND, b""))
        masters[index] = _number(attributes.get(IFLA_MASTER, b""))
        data = dict(_attributes(info.get(IFLA_INFO_DATA, b""))) if kinds[index] == "vrf" else {}
        table = _number(data.get(IFLA_VRF_TABLE, b""))
        found[index] = Interface(_text(attributes.get(IFLA_IFNAME, b"")), table=table)
    for index, master in masters.items():
        if master in found:
            found[index] = replace(found[index], master=found[master].name, master_kind=kinds[master])
    return found


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            return
        yield kind & NESTED, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode(errors="replace")


def _number(data: bytes) -> int:
    return int.from_bytes(data[:4], "little") if data else 0
