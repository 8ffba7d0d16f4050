"""Other software that routes on the same machine: the real thing where it is installed, else what it types.

While it comes, restarts and goes: what is its own stays as it is, ours is back soon, no fight begins, a log
line tells of it, and a kill switch lets nothing out.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from box import ROOT, Box, Seed
from conftest import HEAD, PROBE, UPLINKS, Daemon, MakeLab, StartDaemon, all_up, eventually

from pbrd.config import parse
from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab
from pbrd.ruleset import text as table_of

POLICIES = f"""
[[policies]]
name = "secret"
match = {{ from = ["{LAN[1]}", "{LAN6[1]}"] }}
via = ["lte"]
fallback = "unreachable"
[default]
via = ["fiber", "lte"]
"""
CONFIG = HEAD + PROBE + UPLINKS + POLICIES
NAT = CONFIG.replace('interface = "', 'nat = true\ninterface = "')
TABLES = (200, 201, 1200, 1201)

MakeBox = Callable[..., Box]
_numbers = count()


def needs(*commands: str) -> None:
    """Skip where one of these is not installed."""
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        pytest.skip(f"needs the command `{missing[0]}`")


def needs_in_root(*programs: str) -> None:
    """Skip where the root directory of boxes lacks one of these."""
    for program in programs:
        if not (ROOT / program).exists():
            pytest.skip(f"needs {program} in {ROOT} (PBRD_SYSTEMD_ROOT names another root)")


def lines(lab: Lab, *words: str) -> list[str]:
    return lab.run(lab.router, *words).stdout.splitlines()


def rules(lab: Lab) -> dict[str, list[str]]:
    """All rules by family: ours (protocol 112), and those of others; by number, as names may be there."""
    return {family: lines(lab, "ip", "-N", family, "rule") for family in ("-4", "-6")}


def ours(lab: Lab) -> list[str]:
    """Our rules, and all that is in our tables."""
    found = [line for shown in rules(lab).values() for line in shown if "proto 112" in line]
    for family in ("-4", "-6"):
        for table in TABLES:
            shown = lab.run(
                lab.router, "ip", family, "route", "show", "table", str(table), check=False
            ).stdout
            found += [f"{table} {line.partition(' expires')[0].strip()}" for line in shown.splitlines()]
    return sorted(found)


def theirs(lab: Lab) -> list[str]:
    return [line for shown in rules(lab).values() for line in shown if "proto 112" not in line]


@contextmanager
def disturbance(lab: Lab, pbrd: Daemon, within: float = 2.0, times: int = 1) -> Iterator[None]:
    """What happens inside leaves ours as it was, `within` seconds; no secret packet leaves by another uplink.

    It is no fight: a handful of repairs, and a log line for each of the `times` that something happens.
    """
    before, repairs, told = ours(lab), pbrd.status()["drift_repairs"], len(pbrd.log)
    secret = lab.traffic(rate=500, src=LAN[1])
    time.sleep(0.2)
    yield
    eventually(lambda: ours(lab) == before, within)
    time.sleep(1.2)  # a burst of repairs is told when it is over
    assert set(secret.stop().by_uplink) <= {"lte"}
    assert ours(lab) == before
    assert pbrd.status()["drift_repairs"] - repairs <= 10 * times
    fresh = pbrd.log[told:]
    assert fresh.count("drift repaired: r") <= times
    assert "keeps undoing" not in fresh


# --- WireGuard --------------------------------------------------------------------------------


class Tunnel:
    """WireGuard between the router and the internet, on wireguard-go: in user space, over tun."""

    NEAR, FAR, PORT = "10.99.0.2", "10.99.0.1", 51820

    def __init__(self, lab: Lab, directory: Path) -> None:
        needs("wg-quick", "wg", "wireguard-go")
        if not Path("/dev/net/tun").exists():
            pytest.skip("needs /dev/net/tun")
        self.lab, self.directory = lab, directory
        number = next(_numbers)  # its control socket goes by the name, whatever the namespace
        self.near, self.far = f"wg{os.getpid()}n{number}", f"wg{os.getpid()}f{number}"
        mine, other = self._key(), self._key()
        self.peers = {
            self.near: (
                lab.router,
                f"PrivateKey={mine[0]}\nAddress={self.NEAR}/24",
                f"PublicKey={other[1]}\nEndpoint={TARGETS[0]}:{self.PORT}\nAllowedIPs=0.0.0.0/0\n"
                "PersistentKeepalive=1",
            ),
            self.far: (
                lab.net,
                f"PrivateKey={other[0]}\nAddress={self.FAR}/24\nListenPort={self.PORT}",
                f"PublicKey={mine[1]}\nAllowedIPs={self.NEAR}/32,192.168.100.0/24",
            ),
        }

    def _key(self) -> tuple[str, str]:
        private = subprocess.run(["wg", "genkey"], text=True, capture_output=True, check=True).stdout
        public = subprocess.run(["wg", "pubkey"], input=private, text=True, capture_output=True, check=True)
        return private.strip(), public.stdout.strip()

    def quick(self, verb: str, name: str, more: str = "") -> str:
        """`wg-quick up` or `down`; returns what it says that it does."""
        space, interface, peer = self.peers[name]
        file = self.directory / f"{name}.conf"
        file.touch(0o600)
        file.write_text(f"[Interface]\n{interface}\n{more}\n[Peer]\n{peer}\n")
        done = self.lab.run(
            space,
            "env",
            "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go",
            "wg-quick",
            verb,
            str(file),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def sent(self) -> int:
        """Bytes that the router has sent to the peer."""
        return int(self.lab.run(self.lab.router, "wg", "show", self.near, "transfer").stdout.split()[2])

    def close(self) -> None:
        """End both; wireguard-go ends with its interface."""
        for name, (space, _, _) in self.peers.items():
            self.lab.run(space, "ip", "link", "del", name, check=False)


@pytest.fixture
def tunnel(lab: Lab, tmp_path: Path) -> Iterator[Tunnel]:
    made = Tunnel(lab, tmp_path)
    with closing(made):
        yield made


def pings(lab: Lab, target: str, source: str = LAN[1]) -> bool:
    return lab.run(lab.lan, "ping", "-c1", "-W1", "-I", source, target, check=False).returncode == 0


@pytest.mark.parametrize("nat", [False, True], ids=["rules", "nat"])
def test_a_wireguard_tunnel_is_an_uplink_and_its_own_packets_fail_over(
    lab: Lab, daemon: StartDaemon, tunnel: Tunnel, nat: bool
) -> None:
    """The config of docs/neighbours.md: `Table = off`, and a policy for what carries the tunnel."""
    match = (
        f'iif = "lo", proto = "udp", to = ["{TARGETS[0]}"], dport = {Tunnel.PORT}'
        if nat
        else 'fwmark = "0xca6c"'
    )
    text = (
        (NAT if nat else CONFIG)
        .replace('via = ["lte"]', 'via = ["vpn"]')
        .replace(
            "[[policies]]",
            f"""[uplinks.vpn]
interface = "{tunnel.near}"
gateway = "none"
gateway6 = "off"
probe = {{ targets = ["{Tunnel.FAR}"] }}
[[policies]]
name = "tunnel"
match = {{ {match} }}
via = ["fiber", "lte"]
failback = "immediate"
[[policies]]""",
            1,
        )
    )
    pbrd = daemon(lab, text)
    tunnel.quick("up", tunnel.far)
    tunnel.quick("up", tunnel.near, "Table = off\nFwMark = 51820")
    eventually(lambda: all_up(pbrd), within=15)
    clear = lab.counter(f"ip saddr {LAN[1]}")
    assert pings(lab, TARGETS[1])
    if nat:  # without it wireguard-go, unlike the kernel's, names the interface that it once left by
        lab.carrier(0, False)
        eventually(lambda: pings(lab, TARGETS[1]), within=15)  # by lte now
        lab.carrier(0, True)
        eventually(lambda: pings(lab, TARGETS[1]), within=15)
        eventually(lambda: pbrd.uplink("vpn")["state"] == "up", within=10)
    lab.run(lab.net, "ip", "link", "set", tunnel.far, "down")
    eventually(lambda: pbrd.uplink("vpn")["state"] == "down", within=10)
    assert not pings(lab, TARGETS[1])
    assert clear.read() == {"fiber": 0, "lte": 0}
    tunnel.quick("down", tunnel.near)
    eventually(lambda: pbrd.uplink("vpn")["reason"] == "missing")


@pytest.mark.parametrize("text", [CONFIG, NAT], ids=["rules", "nat"])
def test_wg_quick_that_takes_everything_comes_and_goes(
    lab: Lab, daemon: StartDaemon, tunnel: Tunnel, text: str
) -> None:
    """Its rules come before ours, as they name no priority; its own packets must not go into the tunnel.

    When it goes it deletes every rule like the one that it made, one of ours among them: no fight begins.
    """
    pbrd = daemon(lab, text)
    eventually(lambda: all_up(pbrd))
    tunnel.quick("up", tunnel.far)
    before, others, tables = ours(lab), theirs(lab), lab.nft(lab.router, "list ruleset")
    tunnel.quick("up", tunnel.near)
    assert "9999:\tnot from all fwmark 0xca6c lookup 51820" in rules(lab)["-4"]
    assert eventually(lambda: pings(lab, TARGETS[1], LAN[0]))
    for _ in range(3):
        assert pings(lab, TARGETS[1], LAN[0])
    assert ours(lab) == before
    assert tunnel.sent() < 10_000_000  # it has no more to carry than some pings: no loop
    checked = pbrd.command("check", str(pbrd.config))
    assert "so wg-quick sends everything into its tunnel; set Table = off" in checked.stderr
    assert pbrd.command("plan").stdout == "nothing to change\n"
    deletions = tunnel.quick("down", tunnel.near).count("rule delete table main")
    eventually(lambda: ours(lab) == before)
    assert theirs(lab) == others
    eventually(lambda: lab.nft(lab.router, "list ruleset").count("\n") == tables.count("\n"))
    assert eventually(lab.exit_of) == "fiber"
    assert deletions <= 100
    assert "keeps undoing" not in pbrd.log


def test_what_carries_a_tunnel_is_not_marked_unless_a_policy_is_for_it() -> None:
    config = parse([("pbrd.toml", NAT)])
    spared = table_of(config, 2, {}, (), [0xCA6C])
    assert spared.count("meta mark 0xca6c return") == 3
    assert table_of(config, 2, {}, (), [0xCA6C, 7]).count("meta mark { 0x7, 0xca6c } return") == 3
    assert "0xca6c" not in table_of(config, 2, {}, ())
    named = parse([("pbrd.toml", NAT.replace("match = {", 'match = { fwmark = "0xca6c",'))])
    assert "return" not in "".join(
        line for line in table_of(named, 2, {}, (), [0xCA6C]).splitlines() if "0xca6c" in line
    )


# --- Tailscale --------------------------------------------------------------------------------

TAILSCALE = """rule add priority 5210 fwmark 0x80000/0xff0000 lookup main
    rule add priority 5230 fwmark 0x80000/0xff0000 lookup default
    rule add priority 5250 fwmark 0x80000/0xff0000 unreachable
    rule add priority 5270 lookup 52
    route add 100.100.100.0/24 dev lan table 52"""


@pytest.mark.parametrize("text", [CONFIG, NAT], ids=["rules", "nat"])
def test_tailscales_rules_and_marks(lab: Lab, daemon: StartDaemon, text: str) -> None:
    """Rules and marks as it sets them, on forwarded packets too; nothing of that is changed by ours."""
    lab.ip(lab.router, TAILSCALE)
    lab.nft(
        lab.router,
        """table inet ts {
        chain pre { type filter hook prerouting priority -160;
            iifname "lan" meta mark set meta mark & 0xff00ffff | 0x40000; }
        chain post { type filter hook postrouting priority 200;
            udp dport 4242 meta mark & 0xff0000 == 0x40000 counter;
            udp dport 4242 meta mark & 0xff0000 != 0x40000 counter; }
        }""",
    )
    others = theirs(lab)
    pbrd = daemon(lab, text)
    eventually(lambda: all_up(pbrd))
    with disturbance(lab, pbrd):
        for source in LAN:
            assert lab.exit_of(src=source, dport=4242) is not None
        assert bypass(lab) == "fiber"  # by the main table, which prefers it, and not by a policy
        pbrd.stop()
        pbrd.restart()
        eventually(lambda: all_up(pbrd))
    kept, lost = re.findall(r"counter packets (\d+)", lab.nft(lab.router, "list chain inet ts post"))
    assert (int(kept) >= 3, lost) == (True, "0")
    assert theirs(lab) == others
    assert pbrd.command("check", str(pbrd.config)).stderr == ""


def bypass(lab: Lab) -> str:
    """By which uplink does a packet of this machine leave that bears Tailscale's mark?"""
    seen = lab.counter("udp dport 4243")
    with lab.inside(lab.router), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x80000)
        own.sendto(b"x", (TARGETS[1], 4243))
    eventually(lambda: any(seen.read().values()))
    return next(name for name, packets in seen.read().items() if packets)


# --- Docker -----------------------------------------------------------------------------------

DOCKER = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p udp -m udp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:DOCKER-USER - [0:0]
:DOCKER-FORWARD - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
"""


@pytest.fixture
def container(lab: Lab) -> str:
    """A container on a bridge of the router, as Docker makes it: address 172.17.0.2, masqueraded by "
    "iptables."""
    needs("iptables", "iptables-restore")
    name = f"{lab.name}-box"  # goes with the lab's: netns.stale removes what its maker left
    subprocess.run(["ip", "netns", "add", name], check=True)
    lab.ip(
        lab.router,
        f"""link add docker0 type bridge
        addr add 172.17.0.1/16 dev docker0
        link set docker0 up
        link add veth0 type veth peer name eth0 netns {name}
        link set veth0 master docker0 up""",
    )
    for words in ("addr add 172.17.0.2/16 dev eth0", "link set eth0 up", "route add default via 172.17.0.1"):
        subprocess.run(["ip", "-n", name, *words.split()], check=True)
    docker(lab)
    return name


def docker(lab: Lab) -> None:
    """What a restart of Docker does: its chains go and come."""
    restore = ["ip", "netns", "exec", lab.router, "iptables-restore", "--wait"]
    subprocess.run(restore, input="*nat\n-F\n-X\nCOMMIT\n*filter\n-F\n-X\nCOMMIT\n", text=True, check=True)
    subprocess.run(restore, input=DOCKER, text=True, check=True)


@pytest.mark.parametrize("text", [CONFIG, NAT], ids=["rules", "nat"])
def test_containers_have_policies_and_docker_restarts(
    lab: Lab, daemon: StartDaemon, container: str, text: str
) -> None:
    policy = (
        '[[policies]]\nname = "containers"\nmatch = { iif = "docker0" }\nvia = ["lte", "fiber"]\n[[policies]]'
    )
    pbrd = daemon(lab, text.replace("[[policies]]", policy, 1))
    eventually(lambda: all_up(pbrd))
    seen = lab.counter("icmp type echo-request")

    def pinged() -> bool:
        ping = ["ip", "netns", "exec", container, "ping", "-c1", "-W1", TARGETS[1]]
        return subprocess.run(ping, check=False, capture_output=True).returncode == 0

    try:
        with disturbance(lab, pbrd):
            assert pinged()
            for _ in range(5):
                docker(lab)
                assert pinged()
        assert "MASQUERADE" in lab.run(lab.router, "iptables-save").stdout
        if text is NAT:  # what comes in by an uplink is answered by it: published ports, too
            for k, uplink in enumerate(lab.uplinks):
                assert published(lab, container, k) == uplink.address
        lab.carrier(1, False)
        eventually(lambda: pbrd.uplink("lte")["state"] == "down")
        eventually(pinged)
        assert seen.read()["fiber"] > 0
    finally:
        subprocess.run(["ip", "netns", "del", container], check=False)


def published(lab: Lab, container: str, k: int) -> str:
    """Ask the container's published port from outside, by uplink k; return who answers."""
    serve = "import socket; s=socket.socket(2,2); s.bind(('',80)); s.sendto(b'y',s.recvfrom(9)[1])"
    server = subprocess.Popen(["ip", "netns", "exec", container, "python3", "-c", serve])
    try:
        with lab.inside(lab.net), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.settimeout(0.2)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                asker.sendto(b"x", (lab.uplinks[k].address, 8080))
                try:
                    return str(asker.recvfrom(9)[1][0])
                except TimeoutError:
                    continue
    finally:
        server.kill()
        server.wait()
    return ""


# --- firewalls --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [CONFIG, NAT], ids=["rules", "nat"])
def test_nft_flush_ruleset_opens_no_kill_switch_and_is_told_once(
    lab: Lab, daemon: StartDaemon, text: str
) -> None:
    pbrd = daemon(lab, text)
    eventually(lambda: all_up(pbrd))
    lab.nft(lab.router, "table inet fw { chain in { type filter hook input priority 0; }; }")
    kept = set(lab.nft(lab.router, "list tables").splitlines()) - {"table inet fw"}
    with disturbance(lab, pbrd):
        for _ in range(5):
            lab.nft(lab.router, "flush ruleset")
            eventually(lambda: set(lab.nft(lab.router, "list tables").splitlines()) == kept, within=2)


@pytest.mark.parametrize("text", [CONFIG, NAT], ids=["rules", "nat"])
def test_firewalld_reloads_and_restarts(lab: Lab, daemon: StartDaemon, make_box: MakeBox, text: str) -> None:
    needs_in_root("usr/sbin/firewalld", "usr/bin/firewall-cmd")
    unit = Path("/lib/systemd/system/firewalld.service")
    seed: Seed = {
        "/etc/systemd/system/multi-user.target.wants/firewalld.service": unit,
        "/etc/systemd/system/dbus-org.fedoraproject.FirewallD1.service": unit,
    }
    pbrd = daemon(lab, text)
    box = make_box(seed, network=lab.router, source=False)
    for permanent in ((), ("--permanent",)):
        for interface in ("lan", "fiber", "lte"):
            box.enter(["firewall-cmd", *permanent, "--zone=trusted", f"--add-interface={interface}"])
    eventually(lambda: all_up(pbrd))
    with disturbance(lab, pbrd):
        for words in (
            "firewall-cmd --reload",
            "firewall-cmd --complete-reload",
            "systemctl restart firewalld",
        ):
            box.enter(words.split())
            assert lab.exit_of() == "fiber"
    assert "table inet firewalld" in lab.nft(lab.router, "list tables")
    # Its reverse path filter for IPv6 is strict, and finds the way back by our rules for interfaces.
    assert pings(lab, TARGETS6[1], LAN6[1])
    assert pings(lab, TARGETS6[1], LAN6[0])
    assert all_up(pbrd)


# --- those who configure interfaces -----------------------------------------------------------


def keyfile(k: int, name: str) -> str:
    n = k + 1
    return f"""[connection]
id=uplink-{name}
uuid=0000000{n}-1111-2222-3333-444444444444
type=ethernet
interface-name={name}
[ipv4]
method=manual
address1=10.0.{n}.2/24,10.0.{n}.1
route-metric={100 + k}
[ipv6]
method=manual
address1=fd00:{n}::2/64,fd00:{n}::1
route-metric={100 + k}
"""


def test_networkmanager_reapplies_reconnects_and_restarts(
    lab: Lab, daemon: StartDaemon, make_box: MakeBox
) -> None:
    needs_in_root("usr/sbin/NetworkManager", "usr/bin/nmcli")
    seed: Seed = {
        "/etc/systemd/system/multi-user.target.wants/NetworkManager.service": Path(
            "/lib/systemd/system/NetworkManager.service"
        ),
        "/etc/NetworkManager/conf.d/box.conf": "[main]\ndns=none\nno-auto-default=*\n[keyfile]\n"
        "unmanaged-devices=interface-name:lan\n[device]\nmanaged=1\n",
    }
    pbrd = daemon(lab, CONFIG)
    box = make_box(seed, network=lab.router, source=False, udev=True)
    for k, uplink in enumerate(lab.uplinks):
        file = box.root / f"etc/NetworkManager/system-connections/{uplink.name}.nmconnection"
        file.touch(0o600)  # it reads no others
        file.write_text(keyfile(k, uplink.interface))
    box.enter(["nmcli", "connection", "reload"])
    ups = [["nmcli", "connection", "up", f"uplink-{uplink.name}"] for uplink in lab.uplinks]
    for up in ups:
        box.enter(up)
    eventually(lambda: all_up(pbrd), within=15)
    reapplies = [["nmcli", "device", "reapply", uplink.interface] for uplink in lab.uplinks]
    with disturbance(lab, pbrd, within=10, times=5):
        for words in (*reapplies, *ups, ["systemctl", "restart", "NetworkManager"]):
            box.enter(words)
            time.sleep(0.3)  # it goes on for a while when the command has ended
    assert lab.exit_of() == "fiber"
    assert lab.exit_of(src=LAN6[1]) == "lte"


def test_ifupdown_takes_an_uplink_down_and_up(lab: Lab, daemon: StartDaemon, make_box: MakeBox) -> None:
    needs_in_root("usr/sbin/ifup")
    stanzas = "".join(
        f"""iface {uplink.interface} inet static
    address {uplink.address}/24
    gateway {uplink.gateway}
    metric {100 + k}
iface {uplink.interface} inet6 static
    address {uplink.address6}/64
    gateway {uplink.gateway6}
    metric {100 + k}
    dad-attempts 0
"""
        for k, uplink in enumerate(lab.uplinks)
    )
    pbrd = daemon(lab, CONFIG)
    box = make_box({"/etc/network/interfaces": stanzas}, network=lab.router, source=False)
    lab.ip(lab.router, "link set fiber down\nlink set lte down\naddr flush dev fiber\naddr flush dev lte")
    box.enter(["sh", "-c", "mkdir -p /run/network; ifup --force fiber lte"])
    eventually(lambda: all_up(pbrd), within=15)
    with disturbance(lab, pbrd, within=10, times=2):
        for uplink in ("lte", "fiber"):
            box.enter(["sh", "-c", f"ifdown {uplink}; sleep 0.3; ifup {uplink}"])
    eventually(lambda: all_up(pbrd), within=15)
    assert lab.exit_of() == "fiber"


DHCP = """#!/bin/sh
case $1 in
bound | renew)
    ip addr replace "$ip/24" dev "$interface"
    ip route replace default via "$router" dev "$interface" proto dhcp metric 100
    ;;
esac
"""


def test_a_dhcp_server_names_another_gateway(lab: Lab, daemon: StartDaemon, tmp_path: Path) -> None:
    needs("dnsmasq", "udhcpc")
    isp, gateway = lab.uplinks[0].isp, lab.uplinks[0].gateway
    script = tmp_path / "script"
    script.write_text(DHCP)
    script.chmod(0o755)
    lab.ip(isp, "addr add 10.0.1.254/24 dev gw")

    def serve(router: str) -> "subprocess.Popen[str]":
        options = [
            "--no-daemon",
            "--port=0",
            "--interface=gw",
            "--bind-interfaces",
            "--leasefile-ro",
            "--no-ping",
        ]
        options += [
            "--dhcp-range=10.0.1.2,10.0.1.2,255.255.255.0,120",
            f"--dhcp-option=3,{router}",
            "--conf-file=/dev/null",
        ]
        return quietly(lab, isp, "dnsmasq", *options)

    server = serve(gateway)
    client = quietly(lab, lab.router, "udhcpc", "-f", "-i", "fiber", "-s", str(script), "-t", "20", "-T", "1")
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd), within=15)
    transitions = pbrd.uplink("fiber")["transitions"]
    for router in ("10.0.1.254", "10.0.1.254", gateway):
        server.kill()
        server.wait()
        server = serve(router)
        time.sleep(0.3)
        client.send_signal(10)  # SIGUSR1: renew now
        eventually(partial(has_gateway, pbrd, router), within=15)
        eventually(partial(has_default, lab, router), within=2)
        assert lab.exit_of() == "fiber"
    assert pbrd.uplink("fiber")["transitions"] == transitions
    assert pbrd.log.count("gateway changed") == 2


def quietly(lab: Lab, space: str, *argv: str) -> "subprocess.Popen[str]":
    quiet = subprocess.DEVNULL
    return lab.spawn(space, argv, stdin=quiet, stdout=quiet, stderr=quiet)


def has_gateway(pbrd: Daemon, gateway: str) -> bool:
    return bool(pbrd.uplink("fiber")["ipv4"]["gateway"] == gateway)


def has_default(lab: Lab, gateway: str) -> bool:
    return f"default via {gateway}" in default_of(lab, 200)


def default_of(lab: Lab, table: int) -> str:
    return lab.run(lab.router, "ip", "route", "show", "table", str(table), "default", check=False).stdout


# --- the netplan file that is there already ---------------------------------------------------


def test_a_rule_of_netplan_into_our_table_falls_through_when_the_uplink_is_down(
    lab: Lab, daemon: StartDaemon
) -> None:
    """`routing-policy` without a priority: the kernel puts it before ours, and it goes on working beside "
    "pbrd."""
    pbrd = daemon(lab, CONFIG.replace('interface = "lte"', 'interface = "lte"\ntable = 300'))
    eventually(lambda: all_up(pbrd))
    lab.run(lab.router, "ip", "rule", "add", "from", LAN[2], "lookup", "300", "protocol", "static")
    assert f"9999:\tfrom {LAN[2]} lookup 300 proto 4" in rules(lab)["-4"]
    assert lab.exit_of(src=LAN[2]) == "lte"
    lab.silence(1)
    eventually(lambda: lab.exit_of(src=LAN[2]) == "fiber", within=10)
    lab.silence(1, False)
    eventually(lambda: lab.exit_of(src=LAN[2]) == "lte", within=20)
    assert f"9999:\tfrom {LAN[2]} lookup 300 proto 4" in rules(lab)["-4"]
    checked = pbrd.command("check", str(pbrd.config)).stderr
    assert f"table 300 is asked by a rule of others (from {LAN[2]})" in checked


def test_a_default_of_netplan_in_our_table_stays_and_check_says_what_that_does(
    lab: Lab, daemon: StartDaemon
) -> None:
    lab.run(
        lab.router,
        "ip",
        "route",
        "add",
        "default",
        "via",
        "10.0.2.1",
        "dev",
        "lte",
        "table",
        "201",
        "proto",
        "static",
    )
    pbrd = daemon(lab, CONFIG)
    assert "a foreign route stands where ours belongs" in pbrd.log
    assert (
        "policies would stay on this uplink when its probes fail"
        in pbrd.command("check", str(pbrd.config)).stderr
    )
    pbrd.stop()
    assert default_of(lab, 201).strip() == "default via 10.0.2.1 dev lte proto static"


# --- reverse path filters ---------------------------------------------------------------------


@pytest.mark.parametrize("text", [CONFIG, NAT], ids=["rules", "nat"])
def test_a_strict_reverse_path_filter_for_all_interfaces(
    make_lab: MakeLab, daemon: StartDaemon, text: str
) -> None:
    """The larger of `all` and the interface's own counts: 2, which pbrd sets on its uplinks."""
    lab = make_lab(rp_filter=1)
    pbrd = daemon(lab, text)
    eventually(lambda: all_up(pbrd))
    lab.run(lab.router, "sysctl", "-w", "net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.all.src_valid_mark=1")
    for source in LAN[:2]:
        assert pings(lab, TARGETS[1], source)
    for uplink in lab.uplinks:
        assert lab.run(lab.net, "ping", "-c1", "-W1", uplink.address, check=False).returncode == 0
