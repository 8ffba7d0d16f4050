"""Elements of nftables sets of cgroups as netlink messages: the one change that must not wait for nft(8).

A fork of nft takes some 20 ms, in which a unit that has just been started sends its first packets, and nft
takes no numbers of cgroups. Sources: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.
"""

import struct
from collections.abc import Iterable

HEADER = struct.Struct("=IHHII")  # linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 0x1, 0x4, 0x400
NFPROTO_INET = 1
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 16, 17
NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM = 12, 14
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE = 1, 1, 1
NESTED = 0x8000
CHANGES = frozenset({NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM})


def _message(kind: int, flags: int, header: bytes, body: bytes = b"") -> bytes:
    return HEADER.pack(20 + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + header + body


BEGIN = _message(NFNL_MSG_BATCH_BEGIN, 0, struct.pack(">BBH", 0, 0, NFNL_SUBSYS_NFTABLES))
END = _message(NFNL_MSG_BATCH_END, 0, struct.pack(">BBH", 0, 0, NFNL_SUBSYS_NFTABLES))


def addition(table: str, name: str, cgroups: Iterable[int]) -> bytes:
    """Return the message that adds cgroups by their ids to the set `name`; those in it already may be named.

    It needs `BEGIN` before it and `END` behind it, as `removal` does. ENOENT: there is no such set.
    """
    return _change(NFT_MSG_NEWSETELEM, NLM_F_CREATE, table, name, cgroups)


def removal(table: str, name: str, cgroups: Iterable[int]) -> bytes:
    """Return the message that takes cgroups out. ENOENT: there is no such set, or one is not in it."""
    return _change(NFT_MSG_DELSETELEM, 0, table, name, cgroups)


def _change(kind: int, flags: int, table: str, name: str, cgroups: Iterable[int]) -> bytes:
    keys = (_nested(NFTA_SET_ELEM_KEY, _attribute(NFTA_DATA_VALUE, struct.pack("=Q", i))) for i in cgroups)
    body = _attribute(NFTA_SET_ELEM_LIST_TABLE, table.encode() + b"\0")
    body += _attribute(NFTA_SET_ELEM_LIST_SET, name.encode() + b"\0")
    body += _nested(NFTA_SET_ELEM_LIST_ELEMENTS, b"".join(_nested(NFTA_LIST_ELEM, key) for key in keys))
    kind |= NFNL_SUBSYS_NFTABLES << 8
    return _message(kind, NLM_F_ACK | flags, struct.pack(">BBH", NFPROTO_INET, 0, 0), body)


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _nested(kind: int, data: bytes) -> bytes:
    return _attribute(kind | NESTED, data)
