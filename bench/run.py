#!/usr/bin/env python3
"""run.py PEER FAULT [--runs N] [--profile normal|fast|...] [--json FILE] [--lab TAG]

FAULT: carrier admin blackhole gateway (each followed by its heal), loss (held), or `idle`.
Appends one JSON object per run to FILE. Several labs (--lab) may run at once."""

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time

from lab import Lab
from peers import PEERS
from probes import MP, Worker, monitor, sender, sink

# interval s, timeout s, misses until down (and answers until up)
PROFILES = {"normal": (1.0, 1.0, 3), "fast": (0.2, 0.2, 3), "10hz": (0.1, 0.1, 3)}
RATE = 1000


def wait(test, limit):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if test():
            return True
        time.sleep(0.01)
    return False


def ms(later, earlier):
    return round((later - earlier) / 1e6, 3) if later is not None and earlier is not None else None


def analyse(arrivals, sent, begun, end, old, new, source=0):
    """One transition old -> new begun at `begun`, looked at until `end`; times in ms."""
    mine = [(t, seq, k) for t, s, seq, k in arrivals if s == source]
    first_new = next((t for t, seq, k in mine if k == new and t >= begun), None)
    before = [t for t, seq, k in mine if k == old and t < (first_new or end)]
    last_old = max(before, default=None)
    arrived = {seq for t, seq, k in mine}
    lost = sum(
        1
        for seq, t in enumerate(sent[source])
        if begun - 20_000_000 <= t <= end - 200_000_000 and seq not in arrived
    )
    return {
        "switch": ms(first_new, begun),
        "gap": ms(first_new, last_old),
        "lost": lost,
        "last_old": last_old,
        "first_new": first_new,
    }


def one(lab, peer, fault, limit, seconds):
    via = MP.Value("i", -1)
    mon, snk = Worker(monitor, lab), Worker(sink, lab, via)
    snd = Worker(sender, lab, RATE)
    healthy = wait(lambda: via.value == 0, 15)
    time.sleep(0.5 + random.random() * peer.interval)  # random phase
    begun = lab.fault(fault)
    if fault == "loss":  # hold it, count the flapping
        time.sleep(seconds)
        end, sent = time.monotonic_ns(), snd.stop()
        path = [k for t, source, seq, k in snk.stop() if source == 0 and begun <= t <= end]
        offered = sum(begun <= t <= end for t in sent[0])
        mon.stop()
        return {
            "healthy": healthy,
            "seconds": seconds,
            "back": False,
            "switches": sum(a != b for a, b in itertools.pairwise(path)),
            "lost_percent": round(100 * (1 - len(path) / offered), 2),
        }
    moved = healthy and wait(lambda: via.value == 1, limit)
    time.sleep(0.5 + random.random() * peer.interval)
    healed = lab.heal(fault)
    back = moved and wait(lambda: via.value == 0, limit + 10)
    time.sleep(0.5)
    sent, stop = snd.stop(), time.monotonic_ns()
    time.sleep(0.1)
    arrivals, events = snk.stop(), mon.stop()
    a = analyse(arrivals, sent, begun, healed, 0, 1)
    b = analyse(arrivals, sent, begun, healed, 0, 1, source=1)
    h = analyse(arrivals, sent, healed, stop, 1, 0)
    name = lab.uplinks[0].name
    seen = [e for e in events if begun <= e[0] < healed]
    link = next((e[0] for e in seen if e[1:] == ("link", name, "down")), None)
    change = next(
        (
            e[0]
            for e in seen
            if e[1] in ("rule+", "rule-")
            or (e[1] in ("route+", "route-") and e[2] in peer.tables and e[3] == 0)
        ),
        None,
    )
    probes = [e[0] for e in seen if e[1] == "probe" and e[2] == name and e[0] > (a["last_old"] or begun)]
    first_probe = probes[0] if probes and fault != "admin" else None
    floor = peer.minimum() * 1000
    detect = ms(change, first_probe)  # first lost probe sent -> route changed
    return {
        "healthy": healthy,
        "moved": moved,
        "back": back,
        "outage": a["gap"] if moved else None,
        "outage_second_source": b["gap"] if moved else None,
        "lost": a["lost"],
        "reaction": ms(change, link if link else begun),
        "fault_to_link": ms(link, begun),
        "fault_to_route": ms(change, begun),
        "detect": detect,
        "floor": round(floor, 3),
        "beyond": round(detect - floor, 3)
        if detect is not None and fault in ("blackhole", "gateway")
        else None,
        "failback": h["switch"] if back else None,
        "failback_gap": h["gap"] if back else None,
        "failback_lost": h["lost"] if back else None,
        "probes": len(probes),
        "events": [(ms(e[0], begun), *e[1:]) for e in events if e[1] != "probe"][:60],
    }


def idle(lab, peer, seconds):
    mon = Worker(monitor, lab)
    start, cpu, memory = time.monotonic(), peer.cpu_us(), []
    while time.monotonic() - start < seconds:
        time.sleep(seconds / 12)
        memory.append(peer.memory_kb())
    cpu, took = peer.cpu_us() - cpu, time.monotonic() - start
    probes = sum(1 for e in mon.stop() if e[1] == "probe")
    return {
        "cpu_s_per_hour": round(cpu / 1e6 / took * 3600, 3),
        "probes_per_s": round(probes / took, 3),
        "cpu_us_per_probe": round(cpu / probes, 1) if probes else None,
        "seconds": round(took, 2),
        "rss_kb": statistics.median(m[0] for m in memory),
        "pss_kb": statistics.median(m[1] for m in memory),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("fault", choices=["carrier", "admin", "blackhole", "gateway", "loss", "idle"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", choices=PROFILES, default="normal")
    parser.add_argument("--uplinks", type=int, default=2)
    parser.add_argument("--limit", type=float, default=15, help="longest wait for a switch, s")
    parser.add_argument("--seconds", type=float, default=60, help="length of idle and loss, s")
    parser.add_argument("--json", help="append the results here")
    parser.add_argument("--lab", default="", help="tag for a second lab beside the first")
    args = parser.parse_args()
    lab = Lab(args.lab, args.uplinks)
    peer = PEERS[args.peer](
        lab,
        PROFILES[args.profile],
        os.path.join(tempfile.gettempdir(), f"pb-bench/run/{lab.prefix}{args.peer}"),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave through the finally below
    try:
        lab.up()
        peer.start()
        time.sleep(peer.settle)
        for n in range(1 if args.fault == "idle" else args.runs):
            if args.fault == "idle":
                result = idle(lab, peer, args.seconds)
            else:
                result = one(lab, peer, args.fault, args.limit, args.seconds)
            result = {
                "peer": args.peer,
                "fault": args.fault,
                "profile": args.profile,
                "run": n,
                "settings": [peer.interval, peer.timeout, peer.misses],
                **result,
            }
            print({k: v for k, v in result.items() if k not in ("events", "settings")}, flush=True)
            if args.json:
                with open(args.json, "a") as f:
                    f.write(json.dumps(result) + "\n")
            if args.fault != "idle" and not (result["back"] and n + 1 < args.runs):
                peer.stop()  # not back where it began: start afresh
                lab.up()
                if n + 1 < args.runs:
                    peer.start()
                    time.sleep(peer.settle)
    finally:
        peer.stop()
        lab.down()


if __name__ == "__main__":
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    main()
