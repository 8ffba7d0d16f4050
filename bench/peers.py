"""Adapters: how each peer is configured and started, so that all do the same work:
probe TARGETS[0] over every uplink, keep the default route of table 100 on the first
uplink that is up. Third party sources live outside the repository, under $PB_SRC."""
# ruff: noqa: E501, PLW1509 - configurations of others; the lab is single-threaded where it forks

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from lab import LAN, TABLE, TARGETS, setns

SRC = os.environ.get(
    "PB_SRC", os.path.join(tempfile.gettempdir(), "pb-bench/src")
)  # dpinger/, vyos/, mwan3/ checkouts, built
BIN = os.environ.get(
    "PB_BIN", os.path.join(tempfile.gettempdir(), "pb-bench/bin")
)  # floor, dpinger, libwrap.so (mwan3's)
# cgroup2 counts CPU time exactly, dead children included
CGROUP = next(d for d in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup") if os.path.exists(d + "/cgroup.procs"))
T = TARGETS[0]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATHS = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


class Peer:
    min_interval = 0.0  # seconds; the shortest probe interval it can be given
    settle = 3.0  # seconds from start until it is in steady state
    tables = (TABLE,)  # where it keeps the default routes that count

    def __init__(self, lab, profile, run):
        self.lab, self.run = lab, run
        self.interval, self.timeout, self.misses = profile
        if self.interval < self.min_interval:
            raise SystemExit(f"{type(self).__name__}: no interval below {self.min_interval} s")
        self.ms = {"i": int(self.interval * 1000), "t": int(self.timeout * 1000)}
        self.cgroup = f"{CGROUP}/{lab.prefix}peer"
        self.children = []

    # -- what an adapter defines
    def routes(self):
        u = self.lab.uplinks[0]
        self.lab.ip(self.lab.host, f"route replace default via {u.gw} dev {u.name} table {TABLE}")

    def commands(self):
        return []

    def minimum(self):
        """Seconds from the first lost probe to a verdict that the settings ask for."""
        return (self.misses - 1) * self.interval + self.timeout

    # -- common machinery
    def file(self, name, text, mode=0o644):
        path = os.path.join(self.run, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write(text)
        os.chmod(path, mode)
        return path

    def react(self):
        """The script the alerting peers call: NAME up|down -> best default route."""
        choices = "\n".join(
            f'[ "$(cat {u.name} 2>/dev/null)" = down ] || exec ip route replace default via {u.gw} '
            f"dev {u.name} table {TABLE}"
            for u in self.lab.uplinks
        )
        return self.file("react", f"#!/bin/sh\ncd {self.run}\necho $2 >$1\n{choices}\n", 0o755)

    def enter(self):
        with open(self.cgroup + "/cgroup.procs", "w") as f:
            f.write("0")
        setns(self.lab.host)

    def start(self):
        shutil.rmtree(self.run, ignore_errors=True)
        os.makedirs(self.run)
        os.makedirs(self.cgroup, exist_ok=True)
        self.routes()
        log = open(self.run + "/log", "w")  # noqa: SIM115 - the children write to it
        for argv in self.commands():
            self.children.append(
                subprocess.Popen(
                    argv,
                    cwd=self.run,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=self.enter,
                    start_new_session=True,
                )
            )
            time.sleep(0.2)

    def pids(self):
        try:
            with open(self.cgroup + "/cgroup.procs") as f:
                return [int(line) for line in f]
        except FileNotFoundError:
            return []

    def stop(self):
        for sig in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)
            deadline = time.monotonic() + 2
            while self.pids() and time.monotonic() < deadline:
                for child in self.children:
                    child.poll()
                time.sleep(0.05)
        for child in self.children:
            child.wait()
        self.children.clear()
        if os.path.isdir(self.cgroup):
            os.rmdir(self.cgroup)

    def cpu_us(self):
        with open(self.cgroup + "/cpu.stat") as f:
            return int(f.readline().split()[1])

    def memory_kb(self):
        """(RSS, PSS) of all its processes."""
        rss = pss = 0
        for pid in self.pids():
            try:
                with open(f"/proc/{pid}/smaps_rollup") as f:
                    text = f.read()
                rss += int(re.search(r"^Rss: +(\d+)", text, re.M)[1])
                pss += int(re.search(r"^Pss: +(\d+)", text, re.M)[1])
            except (OSError, TypeError):
                pass  # gone, or a zombie
        return rss, pss


class Kernel(Peer):
    """No daemon: two metrics, and next hops over a link without carrier are ignored."""

    def routes(self):
        self.lab.sysctl(self.lab.host, conf__all__ignore_routes_with_linkdown=1)
        for u in self.lab.uplinks:
            self.lab.ip(
                self.lab.host,
                f"route replace default via {u.gw} dev {u.name} table {TABLE} metric {10 + u.k}",
            )


class Floor(Peer):
    """The C program floor.c: netlink in, netlink out; carrier and admin only, like Kernel and Frr."""

    def commands(self):
        yield [BIN + "/floor", str(TABLE)] + [a for u in self.lab.uplinks for a in (u.name, u.gw)]


class Bash(Peer):
    """The loop everybody writes first."""

    def commands(self):
        loop = self.file(
            "loop",
            f"""miss=0 good=0 state=up
            while :; do
              if ping -I $1 -c1 -W{self.timeout} {T} >/dev/null 2>&1; then
                miss=0; good=$((good+1))
                if [ $state = down ] && [ $good -ge {self.misses} ]; then state=up; {self.react()} $1 up; fi
              else
                good=0; miss=$((miss+1))
                if [ $state = up ] && [ $miss -ge {self.misses} ]; then state=down; {self.react()} $1 down; fi
              fi
              sleep {self.interval}
            done""",
        )
        return [["bash", loop, u.name] for u in self.lab.uplinks]


class Lsm(Peer):
    """Debian's lsm: one select() loop, raw ICMP, a script per event."""

    def commands(self):
        event = self.file("event", f"#!/bin/sh\nexec {self.react()} $2 $1\n", 0o755)
        text = f"""debug=8
            defaults {{ name=defaults
              checkip=127.0.0.1
              eventscript={event}
              max_packet_loss=100
              min_packet_loss=99
              max_successive_pkts_lost={self.misses}
              min_successive_pkts_rcvd={self.misses - 1}
              interval_ms={self.ms["i"]}
              timeout_ms={self.ms["t"]}
              warn_email=
              check_arp=0
              sourceip=
              ttl=0
              status=1
            }}
            """ + "".join(
            f"connection {{\n name={u.name}\n checkip={T}\n device={u.name}\n}}\n" for u in self.lab.uplinks
        )
        text = "\n".join(line.strip() for line in text.replace("{ ", "{\n").splitlines())
        yield ["lsm", "-f", "-c", self.file("lsm.conf", text + "\n"), "-p", self.run + "/pid"]


class Dpinger(Peer):
    """dpinger: one process per uplink; a window of `misses` probes, all lost -> alert."""

    def commands(self):
        i, t = self.ms["i"], self.ms["t"]
        for u in self.lab.uplinks:
            alert = self.file(
                "alert-" + u.name,
                f"#!/bin/sh\n[ $2 = 1 ] && exec {self.react()} {u.name} down\n"
                f"exec {self.react()} {u.name} up\n",
                0o755,
            )
            yield [
                BIN + "/dpinger",
                "-f",
                "-r",
                "0",
                "-B",
                u.addr,
                "-s",
                f"{i}m",
                "-l",
                f"{t}m",
                "-t",
                f"{self.misses * i + t}m",
                "-A",
                f"{i // 4}m",
                "-L",
                "99",
                "-H",
                f"{self.misses * i}m",
                "-C",
                alert,
                T,
            ]


class Keepalived(Peer):
    """A VRRP instance without a partner per uplink, holding its default as a virtual route."""

    min_interval, settle = 1.0, 8.0

    def routes(self):
        pass

    def commands(self):
        text = "global_defs {\n script_user root\n vrrp_version 3\n}\n"
        for u in self.lab.uplinks:
            text += f"""vrrp_script probe_{u.name} {{
                script "/usr/bin/ping -q -I {u.name} -c1 -W{self.timeout:g} {T}"
                interval {self.interval:g}
                timeout {self.timeout:g}
                fall {self.misses}
                rise {self.misses}
            }}
            vrrp_instance {u.name} {{
                state MASTER
                interface lan
                virtual_router_id {10 + u.k}
                priority 100
                advert_int 0.1
                track_interface {{\n {u.name}\n }}
                track_script {{\n probe_{u.name}\n }}
                virtual_ipaddress {{\n 192.168.100.{200 + u.k}/32 dev lan\n }}
                virtual_routes {{\n 0.0.0.0/0 via {u.gw} dev {u.name} table {TABLE} metric {10 + u.k}\n }}
            }}\n"""
        yield [
            "keepalived",
            "--dont-fork",
            "--vrrp",
            "--log-console",
            "--use-file",
            self.file("keepalived.conf", text),
            "--pid",
            self.run + "/pid",
            "--vrrp_pid",
            self.run + "/vrrp.pid",
        ]


class Frr(Peer):
    """FRR zebra + staticd: floating static routes (distance 10, 20) in table 100."""

    settle = 4.0

    def routes(self):
        pass

    def commands(self):
        config = self.file(
            "frr.conf",
            "".join(
                f"ip route 0.0.0.0/0 {u.gw} {u.name} {10 * (u.k + 1)} table {TABLE}\n"
                for u in self.lab.uplinks
            ),
        )
        shutil.chown(self.run, "frr", "frr")
        for daemon in ("zebra", "staticd"):
            yield [
                "/usr/lib/frr/" + daemon,
                "-f",
                config,
                "-i",
                f"{self.run}/{daemon}.pid",
                "-z",
                self.run + "/zserv",
                "--vty_socket",
                self.run,
                "-P",
                "0",
                "--log",
                "stdout",
            ]


class Vyos(Peer):
    """VyOS src/helpers/vyos-failover.py; its `vyos` and `systemd` modules replaced by shims."""

    min_interval, settle = 1.0, 8.0

    def routes(self):
        pass

    def commands(self):
        for package in ("vyos", "vyos/utils", "systemd"):
            self.file(package + "/__init__.py", "")
        self.file(
            "vyos/utils/process.py",
            "import subprocess\ndef rc_cmd(command):\n    p = subprocess.run("
            "command.replace('failover', '111').split(), text=True, stdout=subprocess.PIPE, "
            "stderr=subprocess.STDOUT)\n    return p.returncode, p.stdout.strip()\n",
        )
        self.file("systemd/journal.py", "def send(message, **fields):\n    print(message, flush=True)\n")
        hops = ",".join(
            f'"{u.gw}": {{"interface": "{u.name}", "metric": {10 + u.k}, "check": {{"type": "icmp", '
            f'"target": ["{T}"], "timeout": "{int(self.interval)}", "policy": "any-available"}}}}'
            for u in self.lab.uplinks
        )
        config = self.file(
            "failover.json", f'{{"route": {{"default table {TABLE}": {{"next_hop": {{{hops}}}}}}}}}'
        )
        yield [
            "env",
            "PYTHONPATH=" + self.run,
            "/usr/bin/python3",
            SRC + "/vyos/src/helpers/vyos-failover.py",
            "-c",
            config,
        ]


class Mwan3track(Peer):
    """OpenWrt's mwan3track loop under busybox ash with its sockopt wrapper; UCI, netifd and the
    hotplug script (iptables rules in reality) are shims: only its detection is measured."""

    min_interval = 1.0

    def commands(self):
        src = SRC + "/mwan3/net/mwan3/files/"
        shim = self.file(
            "functions.sh",
            f"""LOG() {{ :; }}; mwan3_init() {{ MMX_DEFAULT=0x3F00; }}
            config_get() {{ case $3 in timeout|interval) eval "$1={self.interval:g}";; down|up) eval "$1={self.misses}";;
                *) eval "$1=\\${{4:-}}";; esac; }}
            config_get_bool() {{ eval "$1=\\${{4:-0}}"; }}; config_list_foreach() {{ $3 {T}; }}
            network_flush_cache() {{ :; }}; network_get_device() {{ eval "$1=$2"; }}; network_is_up() {{ :; }}
            mwan3_get_true_iface() {{ eval "$1=$2"; }}
            mwan3_get_src_ip() {{ eval "$1=$(ip -4 -o addr show dev $2 | sed 's/.*inet \\([0-9.]*\\).*/\\1/')"; }}\n""",
        )
        hotplug = self.file(
            "hotplug",
            f"#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\ncase $ACTION in disconnected) "
            f"{self.react()} $INTERFACE down;; connected) {self.react()} $INTERFACE up;; esac\n",
            0o755,
        )
        with open(src + "usr/sbin/mwan3track") as f, open(src + "lib/mwan3/common.sh") as g:
            track, common = f.read(), g.read()
        self.file("common.sh", common.replace("/var/run", self.run))
        for name, to in (
            ("/lib/functions.sh", self.run + "/common.sh"),
            ("/lib/functions/network.sh", shim),
            (". /lib/mwan3/common.sh\n", ""),
            ("/sbin/hotplug-call", hotplug),
            ("/usr/bin/ping", BIN + "/ping"),
            ("/lib/mwan3/libwrap_mwan3_sockopt.so.1.0", BIN + "/libwrap.so"),
        ):
            track = track.replace(name, to)
        track = self.file("track", track)
        return [["busybox", "ash", track, u.name] for u in self.lab.uplinks]


class Nm(Peer):
    """NetworkManager with a private D-Bus, per-device HTTP connectivity checks; a device without
    connectivity gets +20000 on its route metrics. Runs in a mount namespace of its own."""

    min_interval, settle = 1.0, 12.0

    def routes(self):
        pass

    def commands(self):
        server = self.file(
            "server",
            "import socket\ns = socket.create_server(('', 80), backlog=50)\nwhile True:\n"
            "    c, _ = s.accept()\n    c.settimeout(2)\n    try:\n        c.recv(4096)\n"
            "        c.sendall(b'HTTP/1.0 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok')\n"
            "    except OSError:\n        pass\n    c.close()\n",
        )
        self.children.append(
            subprocess.Popen(["/usr/bin/python3", server], preexec_fn=lambda: setns(self.lab.net))
        )
        self.helpers = self.children[-1:]
        self.file(
            "etc/NetworkManager.conf",
            f"""[main]\nplugins=keyfile\nno-auto-default=*\ndns=none\n
            [keyfile]\nunmanaged-devices=interface-name:lan\n
            [connectivity]\nuri=http://{T}/check\nresponse=ok\ninterval={self.interval:g}\n""".replace(
                "            ", ""
            ),
        )
        for u in self.lab.uplinks:
            self.file(
                f"etc/system-connections/{u.name}.nmconnection",
                f"""[connection]\nid={u.name}\ntype=ethernet
                interface-name={u.name}\nautoconnect=true\n[ethernet]\n
                [ipv4]\nmethod=manual\naddress1={u.addr}/24,{u.gw}\nroute-metric={10 + u.k}\nroute-table={TABLE}
                route1=0.0.0.0/0,{u.gw},{100 + u.k}\nroute1_options=table=254
                [ipv6]\nmethod=disabled\n""".replace(" " * 16, ""),
                0o600,
            )
        start = self.file(
            "start",
            f"""mount --make-rprivate / && mount -t tmpfs none /run && mkdir -p /run/dbus &&
            mount --bind {self.run}/etc /etc/NetworkManager && mount -t tmpfs none /var/lib/NetworkManager &&
            mount -t sysfs -o ro none /sys && dbus-daemon --system --fork || exit
            (sleep 2; nmcli con up fiber; nmcli con up lte) & exec NetworkManager --no-daemon\n""",
        )
        yield ["unshare", "-m", "sh", start]

    def stop(self):
        for child in getattr(self, "helpers", []):
            child.kill()
        super().stop()


class Pbrd(Peer):
    """pbrd from this working tree, on the Python that runs the harness. Its rules take the place of the lab's."""

    settle = 4.0
    tables = (200, 201)
    confirm = 0.2
    late = 0.05  # what pbrd takes for late with the lab's round trip of 0.1 ms

    def routes(self):
        self.lab.ip(self.lab.host, "".join(f"rule del priority {n}\n" for n in (100, 101, 200, 201)))

    def config(self, more=""):
        confirm = int(1000 * min(self.confirm, self.interval))
        text = f"""[daemon]
            names = ""
            [probe]
            targets = ["{T}"]
            interval = "{self.ms["i"]}ms"
            timeout = "{self.ms["t"]}ms"
            fall = {self.misses}
            rise = {self.misses}
            stable_for = "{self.misses * self.ms["i"]}ms"
            confirm_interval = "{confirm}ms"
            """
        for u in self.lab.uplinks:
            text += f'[uplinks.{u.name}]\ninterface = "{u.name}"\n'
        for k, source in enumerate(LAN):
            text += f'[[policies]]\nname = "lan{k}"\nmatch.from = ["{source}"]\nvia = ["fiber", "lte"]\n'
        return "\n".join(line.strip() for line in text.splitlines()) + "\n" + more

    def commands(self):
        yield [
            "env",
            "PYTHONPATH=" + os.pathsep.join([ROOT, *PATHS]),
            sys.executable,
            "-m",
            "pbrd",
            "--runtime-dir",
            self.run,
            "run",
            "--config",
            self.file("pbrd.toml", self.config()),
            "--state-dir",
            self.run + "/state",
        ]

    def minimum(self):
        step = min(self.confirm, self.interval)
        extra = [self.late + n * step for n in range(1, self.misses)] if step else []
        grid = [n * self.interval for n in range(self.misses)]
        return sorted(grid + extra)[self.misses - 1] + self.timeout


class PbrdPlain(Pbrd):
    """Without confirm rounds: probing like the others."""

    confirm = 0.0


PEERS = {c.__name__.lower(): c for c in (*Peer.__subclasses__(), PbrdPlain)}
