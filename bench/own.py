#!/usr/bin/env python3
"""own.py WHAT: figures that only pbrd has; a line of JSON, and a summary for people.

link     link event -> route change, by carrier faults; --routes N --churn: beside a churning full feed
startup  from fork to READY=1 (the kernel holds the plan), with nothing in the kernel and with all in place
reload   an answered reload: the same config, one policy more, one less
churn    CPU time while N foreign routes in the main table are replaced all the time
bound    outage by a silent death upstream, beside the longest that the settings allow

--policies N adds N policies, none of which matches any traffic."""

import argparse
import contextlib
import json
import os
import random
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from lab import LAN, Lab, in_ns
from peers import ROOT, Pbrd
from probes import Worker, parse
from run import PROFILES, one

sys.path.insert(0, ROOT)
from pbrd.client import call
from pbrd.netlink import Events

LIMIT = 10  # seconds


class Quick(Pbrd):
    """Comes back at once, so that there are many failures in a minute; extra policies."""

    policies = 0

    def start(self):
        super().start()
        time.sleep(self.settle)
        if not self.pids():
            raise SystemExit(f"pbrd has ended: see {self.run}/log")

    def config(self, more=""):
        text = super().config(more).replace(f"rise = {self.misses}", "rise = 1")
        text = text.replace(f'stable_for = "{self.misses * self.ms["i"]}ms"', 'stable_for = "0"')
        return text + "".join(
            f'[[policies]]\nname = "extra{n}"\nmatch.from = ["172.16.{n // 250}.{n % 250}"]\n'
            f'via = ["{("fiber", "lte")[n % 2]}", "{("lte", "fiber")[n % 2]}"]\n'
            for n in range(self.policies)
        )


def summary(values, digits=2):
    """Median, 99th percentile and maximum (the nearest values that were measured)."""
    values = sorted(values)
    at99 = values[min(len(values) - 1, int(0.99 * len(values)))]
    mid = statistics.median(values)
    return {name: round(v, digits) for name, v in (("median", mid), ("p99", at99), ("max", values[-1]))}


def listener(pipe, lab):
    """Links and default routes of the router and when they were told; deaf to the churn, as pbrd is."""
    with in_ns(lab.host):
        events = Events()
        names = {socket.if_nametoindex(u.name): u.name for u in lab.uplinks}
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # or it hears the link when the route has gone
    pipe.send("ready")
    log = []

    def hear(kind, message):
        log.append((time.monotonic_ns(), *parse(kind, message[16:], names)))

    while pipe not in select.select([pipe, events.socket], [], [])[0]:
        events.drain(hear)
    pipe.send(log)


@contextlib.contextmanager
def foreign_routes(lab, peer, count, churn):
    """Count host routes in the main table, replaced over and over by a process of its own if `churn`."""
    if not count:
        yield None
        return
    files = [
        peer.file(f"routes{k}", "".join(
            f"route replace 20.{n >> 16}.{n >> 8 & 255}.{n & 255} via {gateway} dev lan proto bgp\n"
            for n in range(count)
        ))
        for k, gateway in enumerate(LAN)
    ]  # fmt: skip
    subprocess.run(["ip", "-n", lab.host, "-batch", files[0]], check=True)
    loop = "while :; do " + "".join(f"ip -n {lab.host} -batch {f}; echo; " for f in reversed(files)) + "done"
    rounds = peer.run + "/rounds"
    child = None
    if churn:
        with open(rounds, "w") as out:
            child = subprocess.Popen(["sh", "-c", f"exec 2>&1; {loop}"], stdout=out, start_new_session=True)
    try:
        yield lambda: os.path.getsize(rounds) * count
    finally:
        if child:
            os.killpg(child.pid, 9)
            child.wait()


def link(lab, peer, args):
    peer.start()
    took = []
    with foreign_routes(lab, peer, args.routes, args.churn):
        for _ in range(args.runs):
            worker = Worker(listener, lab)
            time.sleep(0.1 + random.random() * 0.2)
            lab.set_link(lab.uplinks[0].isp, "gw", False)
            time.sleep(0.3)
            lab.heal("carrier")
            time.sleep((1 + 3 * peer.misses) * peer.interval)  # damping asks for up to three rounds
            events = worker.stop()
            down = next(e[0] for e in events if e[1:] == ("link", "fiber", "down"))
            took.append((next(e[0] for e in events if e[1:4] == ("route-", peer.tables[0], 0)) - down) / 1e6)
            assert any(e[1:4] == ("route+", peer.tables[0], 0) for e in events), "has not come back"
    return {"ms": summary(took)}


def launch(peer, path):
    """Start the daemon; return the seconds until it said READY=1."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(path)
        notified.settimeout(LIMIT)
        config, argv = peer.file("pbrd.toml", peer.config()), next(iter(peer.commands()))
        os.makedirs(peer.cgroup, exist_ok=True)
        begun = time.monotonic()
        peer.children.append(
            subprocess.Popen(
                argv, env={**os.environ, "NOTIFY_SOCKET": path}, cwd=os.path.dirname(config),
                stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=peer.enter,  # noqa: PLW1509
            )
        )  # fmt: skip
        while b"READY=1" not in notified.recv(4096):
            pass
        return time.monotonic() - begun


def startup(lab, peer, args):
    path, cold, warm = peer.run + ".notify", [], []
    for n in range(args.runs):
        if n:
            lab.up()
        peer.routes()
        for times in (cold, warm):  # what the first leaves in the kernel, the second finds there
            times.append(1000 * launch(peer, path))
            peer.stop()
    return {"cold_ms": summary(cold, 0), "warm_ms": summary(warm, 0)}


def reload(lab, peer, args):
    peer.start()
    base = peer.policies
    same, more, less = [], [], []
    for _ in range(args.runs):
        for times, number in ((same, base), (more, base + 1), (less, base)):
            peer.policies = number
            peer.file("pbrd.toml", peer.config())
            begun = time.monotonic()
            changed = call(peer.run, "Reload")["changed"]
            times.append(1000 * (time.monotonic() - begun))
            assert bool(changed) == (times is not same), changed
    return {"same_ms": summary(same, 1), "more_ms": summary(more, 1), "less_ms": summary(less, 1)}


def churn(lab, peer, args):
    peer.start()
    figures = []
    for busy in (False, True):
        with foreign_routes(lab, peer, args.routes if busy else 0, True) as replaced:
            time.sleep(2)
            begun, cpu = time.monotonic(), peer.cpu_us()
            done = replaced() if replaced else 0
            time.sleep(args.seconds)
            spent, took = (peer.cpu_us() - cpu) / 1e6, time.monotonic() - begun
            done = replaced() - done if replaced else 0
        figures.append({"routes_per_s": round(done / took), "cpu_s_per_hour": round(spent / took * 3600, 2),
                        "pss_kb": peer.memory_kb()[1]})  # fmt: skip
    return {"quiet": figures[0], "churning": figures[1]}


def bound(lab, peer, args):
    peer.start()
    most = 1000 * (peer.interval + peer.minimum())
    outages = []
    for n in range(args.runs):
        outages.append(one(lab, peer, "blackhole", LIMIT, 0)["outage"])
        print(n, outages[-1], flush=True)
    return {"outage_ms": summary(outages, 1), "bound_ms": round(most, 1)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["link", "startup", "reload", "churn", "bound"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--profile", choices=PROFILES, default="normal")
    parser.add_argument("--policies", type=int, default=0)
    parser.add_argument("--routes", type=int, default=0)
    parser.add_argument("--churn", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=65, help="window of churn; a full look comes every 60 s"
    )
    parser.add_argument("--json", help="append the result here")
    parser.add_argument("--lab", default="own")
    args = parser.parse_args()
    lab = Lab(args.lab)
    peer = Quick(
        lab,
        PROFILES[args.profile],
        os.path.join(tempfile.gettempdir(), f"pb-bench/run/{lab.prefix}{args.what}"),
    )
    peer.policies = args.policies
    try:
        lab.up()
        os.makedirs(peer.run, exist_ok=True)
        result = {
            "what": args.what,
            **{
                k: v for k, v in vars(args).items() if k in ("runs", "profile", "policies", "routes", "churn")
            },
            **globals()[args.what](lab, peer, args),
        }
        print(json.dumps(result))
        if args.json:
            with open(args.json, "a") as f:
                f.write(json.dumps(result) + "\n")
    finally:
        peer.stop()
        lab.down()


if __name__ == "__main__":
    main()
