#!/usr/bin/env python3
"""forward.py WHAT: what policies cost packets and connections; a line of JSON.

forward  packets/s through the router, in turns: the kernel alone, pbrd with no policy, with N mixed ones
begin    likewise the connections/s that can begin
load     N mixed policies: from fork to READY=1, and a reload with one more or less
evict    N tracked connections, half of them on each uplink: from the death of one until its half is evicted,
         and how long the loop stood still meanwhile

--policies N, --entries N, --runs N (rounds of one second for each candidate, or evictions)."""

import argparse
import json
import os
import random
import socket
import statistics
import struct
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from pbrd.client import call
from pbrd.errors import ControlError
from pbrd.lab import LAN, TARGETS, Lab

HEAD = '[daemon]\nnames = ""\n[probe]\ntargets = []\n'
UPLINKS = '[uplinks.fiber]\ninterface = "fiber"\nnat = true\n[uplinks.lte]\ninterface = "lte"\nnat = true\n'
DEFAULT = '[default]\nvia = ["fiber", "lte"]\n'
SINK = "type filter hook input priority filter; udp dport { 33434, 10000-11000 } drop;"
BURST = 0.02  # seconds that a candidate sends before the next one has its turn


def mixed(count):
    """Policies of every kind, none of which matches the traffic measured."""
    dice = random.Random(1)
    kinds = (
        lambda n: f"from = ['10.{n >> 8 & 255}.{n & 255}.0/24']",
        lambda n: f"to = ['172.{16 + (n >> 12)}.{n >> 4 & 255}.{(n & 15) << 4}/28']",
        lambda n: f"proto = 'tcp', dport = [{1024 + n}]",
        lambda n: f"mac = ['52:54:00:{n >> 16:02x}:{n >> 8 & 255:02x}:{n & 255:02x}']",
        lambda n: f"from = ['10.{n >> 8 & 255}.{n & 255}.7'], proto = 'udp', dport = '{2000 + n}-{2010 + n}'",
        lambda n: f"user = '{10000 + n}'",
        lambda n: f"iif = 'br{n % 13}', dscp = {n % 64}",
    )
    ways = ("['lte']", "['fiber', 'lte']", "['lte', 'fiber']")
    return "".join(
        f"[[policies]]\nname = 'p{n}'\nmatch = {{ {kinds[n % len(kinds)](n)} }}\nvia = {dice.choice(ways)}\n"
        f"fallback = '{dice.choice(('next', 'next', 'unreachable'))}'\n"
        for n in range(count)
    )


class Router:
    """A lab, with the daemon in its router if there is a config."""

    def __init__(self, stack, config, *, wait=True):
        self.lab = stack.enter_context(Lab())
        self.lab.nft(self.lab.net, f"table ip sink {{ chain in {{ {SINK} }}; }}")
        self.run = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if config:
            (self.run / "pbrd.toml").write_text(config)
            argv = [sys.executable, "-m", "pbrd", "run", "--config", f"{self.run}/pbrd.toml"]
            argv += ["--runtime-dir", str(self.run), "--state-dir", str(self.run)]
            log = stack.enter_context((self.run / "log").open("w"))
            cwd = Path(__file__).parent.parent
            self.process = self.lab.spawn(self.lab.router, argv, stdout=log, stderr=log, cwd=cwd)
            stack.callback(self.process.wait)
            stack.callback(self.process.terminate)
            begun = time.monotonic()
            while wait and not self.up():
                if time.monotonic() - begun > 60:
                    raise SystemExit((self.run / "log").read_text())
                time.sleep(0.02)
            self.started = time.monotonic() - begun
        else:  # the kernel alone masquerades too
            chain = "type nat hook postrouting priority srcnat; oifname fiber masquerade;"
            self.lab.nft(self.lab.router, f"table ip alone {{ chain post {{ {chain} }}; }}")

    def up(self):
        try:
            return all(uplink["state"] == "up" for uplink in call(self.run, "Status")["uplinks"])
        except ControlError:
            return False


def sender(lab):
    """A socket of the LAN client on one connection that is already judged."""
    with lab.inside(lab.lan):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((LAN[0], 0))
    made.connect((TARGETS[0], 33434))
    made.send(b"x")
    return made


def forward(args):
    with ExitStack() as stack:
        configs = {
            "kernel": "",
            "none": HEAD + UPLINKS + DEFAULT,
            str(args.policies): HEAD + UPLINKS + mixed(args.policies) + DEFAULT,
        }
        routers = {name: Router(stack, config) for name, config in configs.items()}
        sockets = {name: sender(router.lab) for name, router in routers.items()}
        counters = {name: router.lab.counter(f"ip daddr {TARGETS[0]}") for name, router in routers.items()}
        rates = {name: [] for name in routers}
        for _ in range(args.runs):
            sent, took = dict.fromkeys(rates, 0), dict.fromkeys(rates, 0.0)
            for _ in range(round(1 / BURST)):
                for name, made in sockets.items():
                    begun = time.perf_counter()
                    until = begun + BURST
                    while (now := time.perf_counter()) < until:
                        for _ in range(50):
                            made.send(b"x" * 64)
                        sent[name] += 50
                    took[name] += now - begun
            for name, values in rates.items():
                values.append(sent[name] / took[name])
        for name, counter in counters.items():
            assert sum(counter.read().values()) > args.runs * 1000, f"{name}: what was sent did not arrive"
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ratios = [many / none for many, none in zip(rates[str(args.policies)], rates["none"], strict=True)]
        rules = (
            routers[str(args.policies)].lab.run(routers[str(args.policies)].lab.router, "ip", "rule").stdout
        )
        return {
            "packets_per_s": {name: round(value) for name, value in medians.items()},
            "ratio": [round(f(ratios), 3) for f in (statistics.median, min, max)],
            "ipv4_rules": len(rules.splitlines()),
            "start_s": round(routers[str(args.policies)].started, 2),
        }


def begin(args):
    with ExitStack() as stack:
        configs = {
            "none": HEAD + UPLINKS + DEFAULT,
            str(args.policies): HEAD + UPLINKS + mixed(args.policies) + DEFAULT,
        }
        routers = {name: Router(stack, config) for name, config in configs.items()}
        rates = {name: [] for name in routers}
        for router in routers.values():
            router.lab.ip(router.lab.lan, "addr add 10.98.0.1/16 dev eth0")
            router.lab.ip(router.lab.router, "route add 10.98.0.0/16 dev lan")
        for run in range(args.runs):
            for name, router in routers.items():
                with raw(router.lab, "10.98.0.1") as made:
                    begun = time.perf_counter()
                    for n in range(5000):
                        made.sendto(datagram(1024 + n, 10000 + run), (TARGETS[0], 0))
                    rates[name].append(5000 / (time.perf_counter() - begun))
        return {
            "connections_per_s": {name: round(statistics.median(found)) for name, found in rates.items()},
            "range": {name: [round(f(found)) for f in (min, max)] for name, found in rates.items()},
        }


def load(args):
    config = HEAD + UPLINKS + mixed(args.policies) + DEFAULT
    more = "[[policies]]\nname = 'more'\nmatch = { from = ['10.77.0.0/24'] }\nvia = ['lte']\n"
    started, reloaded = [], []
    for _ in range(args.runs):
        with ExitStack() as stack:
            notified = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            path = stack.enter_context(tempfile.TemporaryDirectory()) + "/notify"
            notified.bind(path)
            notified.settimeout(20)
            os.environ["NOTIFY_SOCKET"] = path
            begun = time.monotonic()
            router = Router(stack, config, wait=False)
            while b"READY=1" not in notified.recv(4096):
                pass
            started.append(time.monotonic() - begun)
            for text in (config + more, config):
                (router.run / "pbrd.toml").write_text(text)
                begun = time.monotonic()
                call(router.run, "Reload")
                reloaded.append(time.monotonic() - begun)
    seconds = {"start": started, "reload": reloaded}
    return {
        name: [round(f(found), 2) for f in (statistics.median, min, max)] for name, found in seconds.items()
    }


def evict(args):
    policies = "[[policies]]\nname = 'half'\nmatch = { from = ['10.99.0.0/16'] }\nvia = ['lte', 'fiber']\n"
    times, stalls, gone = [], [], []
    with ExitStack() as stack:
        router = Router(stack, HEAD + UPLINKS + policies + DEFAULT)
        lab = router.lab
        for address in ("10.99.0.1/16", "10.98.0.1/16"):
            lab.ip(lab.lan, f"addr add {address} dev eth0")
        lab.ip(lab.router, "route add 10.98.0.0/15 dev lan")
        for _ in range(args.runs):
            fill(lab, args.entries)
            before = count(lab)
            lab.carrier(1, False)
            begun = time.monotonic()
            stall = 0.0
            while count(lab) > before * 0.6 and time.monotonic() - begun < 20:
                asked = time.monotonic()
                call(router.run, "Status")
                stall = max(stall, time.monotonic() - asked)
            times.append(1000 * (time.monotonic() - begun))
            stalls.append(1000 * stall)
            gone.append(before - count(lab))
            lab.carrier(1, True)
            while not router.up():
                time.sleep(0.05)
            lab.run(lab.router, "conntrack", "-F", check=False)
    return {
        "ms": [round(f(times), 1) for f in (statistics.median, max)],
        "status_answer_ms": [round(f(stalls), 1) for f in (statistics.median, max)],
        "evicted": round(statistics.median(gone)),
    }


def fill(lab, entries):
    """Make so many UDP connections, half of them from each net."""
    for source in ("10.98.0.1", "10.99.0.1"):
        with raw(lab, source) as made:
            for n in range(entries // 2):
                made.sendto(datagram(1024 + n % 60000, 10000 + n // 60000), (TARGETS[0], 0))


def raw(lab, source):
    """A socket of the LAN client for UDP from any port."""
    with lab.inside(lab.lan):
        made = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    made.bind((source, 0))
    return made


def datagram(sport, dport):
    return struct.pack("!HHHH", sport, dport, 12, 0) + b"fill"


def count(lab):
    with lab.inside(lab.router):
        return int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["forward", "begin", "load", "evict"])
    parser.add_argument("--policies", type=int, default=5000)
    parser.add_argument("--entries", type=int, default=100000)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    print(json.dumps({**vars(args), **globals()[args.what](args)}))


if __name__ == "__main__":
    if os.geteuid():
        raise SystemExit("forward.py: only root may: it builds network namespaces")
    main()
