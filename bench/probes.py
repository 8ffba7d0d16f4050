"""Measuring from outside: a packet sender, the sink behind the uplinks, and a monitor
of the router's routing table and probes. Each is a forked process with its sockets in
its namespace; all stamp with CLOCK_MONOTONIC, one clock for the whole machine."""

import contextlib
import ctypes
import multiprocessing
import os
import select
import socket
import struct
import time
from array import array

from lab import LAN, TARGETS, in_ns

PORT = 9999
LATE = 200_000_000  # ns; later is lost: such packets waited for ARP on the dead link until it healed
MP = multiprocessing.get_context("fork")


class Worker:
    """Runs fn(pipe, *args) in a forked process until stop(), which returns its result."""

    def __init__(self, fn, *args):
        self.pipe, child = MP.Pipe()
        self.process = MP.Process(target=fn, args=(child, *args), daemon=True)
        self.process.start()
        os.setpriority(os.PRIO_PROCESS, self.process.pid, -15)  # measure, rather than wait for a CPU
        self.pipe.recv()  # sockets are open

    def stop(self):
        self.pipe.send("stop")
        result = self.pipe.recv()
        self.process.join()
        return result


def sender(pipe, lab, rate):
    """rate packets/s from LAN[0]; every tenth also from LAN[1]. Returns send times."""
    with in_ns(lab.lan):
        socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in LAN]
    for s, source in zip(socks, LAN):
        s.bind((source, PORT))
    pipe.send("ready")
    sent, step, due = (array("q"), array("q")), 1_000_000_000 // rate, time.monotonic_ns()

    def send(i):
        now = time.monotonic_ns()
        with contextlib.suppress(OSError):  # an ICMP error for an earlier packet: counts as lost
            socks[i].sendto(struct.pack("=Bqq", i, len(sent[i]), now), (TARGETS[i], PORT))
        sent[i].append(now)

    while not pipe.poll():
        send(0)
        if len(sent[0]) % 10 == 0:
            send(1)
        due += step
        time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
    pipe.send(sent)


def sink(pipe, lab, via):
    """Records (time, source, seq, uplink); via (shared) is the uplink LAN[0] came by last."""
    with in_ns(lab.net):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    s.bind(("", PORT))
    s.settimeout(0.05)
    uplink = {u.wan: u.k for u in lab.uplinks}
    pipe.send("ready")
    log = []
    while True:
        try:
            data, peer = s.recvfrom(64)
        except TimeoutError:
            if pipe.poll():
                break
            continue
        now = time.monotonic_ns()
        source, seq, departed = struct.unpack("=Bqq", data)
        if now - departed > LATE:
            continue
        k = uplink[peer[0]]
        log.append((now, source, seq, k))
        if source == 0:
            via.value = k
            if seq % 64 == 0 and pipe.poll():
                break
    pipe.send(log)


# classic BPF: IPv4 and not UDP (so: the peers' probes, not our 1000 packets/s)
BPF = [
    (0x28, 0, 0, 12),
    (0x15, 0, 3, 0x800),
    (0x30, 0, 0, 23),
    (0x15, 1, 0, 17),
    (0x06, 0, 0, 96),
    (0x06, 0, 0, 0),
]


def monitor(pipe, lab):
    """Kernel route/rule/link notifications and outgoing probes, seen from inside pb-host."""
    names, taps = {}, {}
    with in_ns(lab.host):
        # RTNLGRP_LINK 1, IPV4_ROUTE 7, IPV4_RULE 8
        rtnl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        rtnl.bind((0, 1 | 1 << 6 | 1 << 7))
        for u in lab.uplinks:
            names[socket.if_nametoindex(u.name)] = u.name
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in BPF))
            tap.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", len(BPF), ctypes.addressof(code)))
            tap.bind((u.name, 3))
            taps[tap] = u.name
    pipe.send("ready")
    log = []  # (time, what, detail...)
    while True:
        for s in select.select([pipe, rtnl, *taps], [], [])[0]:
            if s is pipe:
                pipe.send(log)
                return
            if s in taps:
                try:
                    data, address = s.recvfrom(128)
                except OSError:  # the link was set down: says so once
                    continue
                ihl = 14 + (data[14] & 15) * 4
                probe = (data[23] == 1 and data[ihl] == 8) or (data[23] == 6 and data[ihl + 13] & 0x12 == 2)
                if address[2] == socket.PACKET_OUTGOING and probe:
                    log.append((time.monotonic_ns(), "probe", taps[s], socket.inet_ntoa(data[30:34])))
                continue
            try:
                data = rtnl.recv(1 << 16)
            except OSError as error:  # ENOBUFS
                log.append((time.monotonic_ns(), "lost", str(error)))
                continue
            now = time.monotonic_ns()
            while len(data) >= 16:
                size, kind = struct.unpack_from("=IH", data)
                log.append((now, *parse(kind, data[16:size], names)))
                data = data[(size + 3) & ~3 :]


def parse(kind, body, names):
    if kind in (16, 17):  # RTM_NEWLINK, RTM_DELLINK
        index, flags = struct.unpack_from("=iI", body, 4)
        return "link", names.get(index, index), "running" if flags & 0x40 else "down"
    if kind in (24, 25):  # RTM_NEWROUTE, RTM_DELROUTE
        table, found, at = body[4], {}, 12
        while at + 4 <= len(body):
            size, attr = struct.unpack_from("=HH", body, at)
            if size == 8:
                found[attr] = struct.unpack_from("=I", body, at + 4)[0]
            at += max(4, (size + 3) & ~3)
        return (
            "route+" if kind == 24 else "route-",
            found.get(15, table),
            body[1],
            names.get(found.get(4), found.get(4)),
            found.get(6, 0),
        )  # dst len, dev, metric
    return {32: "rule+", 33: "rule-"}.get(kind, str(kind)), None
