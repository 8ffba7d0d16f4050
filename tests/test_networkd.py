"""Beside systemd-networkd: what it takes away of ours, because it is not its own, comes back at once."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL

import pytest
from box import ROOT, Box, Seed
from conftest import PROBE, Leaving, Writes, eventually
from service import HERE, UNIT, Service, networkd, seed, switch_off

from pbrd.lab import LAN, LAN6, Lab

MakeBox = Callable[..., Box]
NETWORKD = "systemd-networkd.service"
DROP_IN = HERE / "packaging/networkd.conf.d/10-pbrd.conf"


ADDRESSES = ("from 10.0.1.2", "from 10.0.2.2", "from fd00:1::2", "from fd00:2::2")
DHCP = """DHCP=ipv4
[DHCPv4]
RouteMetric=100
UseDNS=no
[Address]
Address=fd00:1::2/64
[Route]
Gateway=fd00:1::1
Metric=100
"""


def held(lab: Lab) -> list[str]:
    """All of our rules and routes in the router's kernel; by number, as names may be there."""
    routes = ("route", "show", "table", "all", "proto", "112")
    asked = [(family, *words) for family in ("-4", "-6") for words in (("rule",), routes)]
    lines = [
        line.strip()
        for words in asked
        for line in lab.run(lab.router, "ip", "-N", *words).stdout.splitlines()
    ]
    return sorted(line for line in lines if not re.search(r"^\d+:(?!.*proto 112)", line))


def start(make_box: MakeBox, lab: Lab, files: Seed | None = None, **extra: str) -> Service:
    """Boot a box whose network is networkd's, and wait until all is up and nothing more is told."""
    switch_off(lab)
    box = make_box(seed() | networkd(lab, **extra) | (files or {}), network=lab.router, udev=True)
    service = Service(box)
    service.wait_up()
    settle(service)
    return service


def settle(service: Service) -> None:
    """Wait until nothing has been told for longer than a burst of repairs lasts."""
    said = ""
    while said != (said := service.log):
        time.sleep(1.2)


def told(service: Service, act: Callable[[], object]) -> list[str]:
    """Return the kinds of events that `act` causes, in their order."""
    before = len(service.box.journal("-u", UNIT))
    act()
    settle(service)
    return [str(entry.get("PBRD_EVENT")) for entry in service.box.journal("-u", UNIT)[before:]]


# --- what networkd takes away -------------------------------------------------------------------


def test_after_each_restart_of_networkd_all_is_back_and_told_in_one_line(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    before = held(lab)
    for _ in range(3):

        def restart() -> None:
            service.box.enter(["systemctl", "restart", NETWORKD])
            eventually(lambda: held(lab) == before)

        kinds = told(service, restart)
        assert set(kinds) == {"drift-repaired"}
        assert len(kinds) <= 2  # one, unless a busy machine draws it out
    assert held(lab) == before
    assert lab.exit_of(src=LAN[0]) == "fiber"
    assert lab.exit_of(src=LAN6[0]) == "fiber"


DISTURBANCES = (
    "touch /etc/systemd/network/fiber.network; networkctl reload",
    "networkctl reconfigure fiber",
    "networkctl reconfigure lte lan",
    f"systemctl stop {NETWORKD}; sleep 1; systemctl start {NETWORKD}",
    "ip link set dev fiber down; sleep 0.5; ip link set dev fiber up",
)


def test_all_is_back_whatever_is_done_with_networkd(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    before = held(lab)

    def recovered() -> bool:
        return held(lab) == before and lab.exit_of(src=LAN[0], within=0.2) == "fiber"

    for commands in DISTURBANCES:
        service.box.enter(["sh", "-ec", commands])
        eventually(recovered, within=15)
        service.wait_up()
    settle(service)
    assert recovered()
    assert len(service.events("drift-repaired")) <= 3 * len(DISTURBANCES)


def test_with_the_drop_in_networkd_leaves_rules_alone(make_box: MakeBox, lab: Lab, tmp_path: Path) -> None:
    """Only those rules go that name an uplink's address, as pbrd takes them away with the address."""
    service = start(make_box, lab, {"/etc/systemd/networkd.conf.d/10-pbrd.conf": DROP_IN.read_text()})
    before = held(lab)
    lab.carrier(0, False)  # the camera's only uplink
    eventually(lambda: lab.exit_of(src=LAN[0], within=0.2) == "lte")
    camera, writes = lab.counter(f"ip saddr {LAN[2]}"), Writes(lab, tmp_path)
    stream = lab.traffic(rate=1000, src=LAN[2])
    for _ in range(3):
        service.box.enter(["systemctl", "restart", NETWORKD])
        time.sleep(0.5)
    removed = re.findall(r"^Deleted \d+:\t(from .*?) lookup", writes.seen(), re.MULTILINE)
    assert {rule for rule in removed if rule not in ADDRESSES} == set()
    stream.stop()
    assert camera.read() == {"fiber": 0, "lte": 0}
    lab.carrier(0, True)
    eventually(lambda: held(lab) == before, within=15)


# --- leases and carriers --------------------------------------------------------------------------


@contextmanager
def dhcp(lab: Lab, directory: Path, gateway: str) -> Iterator[None]:
    """Serve fiber's address by DHCP, with this gateway, at the provider's end."""
    if shutil.which("dnsmasq") is None:
        pytest.skip("needs a DHCP server: install dnsmasq-base")
    isp = lab.uplinks[0].isp
    lab.ip(isp, f"addr replace {gateway}/24 dev gw")
    options = [
        "--conf-file=/dev/null",
        "--keep-in-foreground",
        "--port=0",
        "--interface=gw",
        "--bind-interfaces",
    ]
    options += ["--dhcp-range=10.0.1.2,10.0.1.2,255.255.255.0,120", f"--dhcp-option=option:router,{gateway}"]
    options += ["--dhcp-authoritative", "--no-ping", f"--dhcp-leasefile={directory}/leases", "--user=root"]
    options += [f"--pid-file={directory}/dnsmasq.pid"]
    server = lab.spawn(isp, ["dnsmasq", *options], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def test_a_renewed_lease_changes_nothing_and_another_gateway_is_followed(
    make_box: MakeBox, lab: Lab, tmp_path: Path
) -> None:
    with dhcp(lab, tmp_path, "10.0.1.1"):
        service = start(make_box, lab, fiber=DHCP)
        assert service.status()["uplinks"][0]["ipv4"] | {"state": ""} == {
            "gateway": "10.0.1.1", "source": "dhcp", "installed": True, "state": "",
        }  # fmt: skip
        writes = Writes(lab, tmp_path)
        assert told(service, lambda: service.box.enter(["networkctl", "renew", "fiber"])) == []
        assert writes.seen() == ""
    with dhcp(lab, tmp_path, "10.0.1.254"):
        stream = Leaving(lab)

        def renew() -> None:
            service.box.enter(["networkctl", "renew", "fiber"])
            eventually(lambda: any("via 10.0.1.254 dev fiber table 200" in line for line in held(lab)))

        assert "gateway-changed" in told(service, renew)
        path, _ = stream.stop()
        assert path[-1] == "fiber"


def test_a_carrier_that_flaps_brings_all_back(make_box: MakeBox, lab: Lab) -> None:
    service = start(make_box, lab)
    before = held(lab)
    for pause in (0.05, 0.2, 2.5):
        lab.carrier(0, False)
        time.sleep(pause)
        lab.carrier(0, True)
        eventually(lambda: held(lab) == before and lab.exit_of(src=LAN[0], within=0.2) == "fiber", within=15)
        service.wait_up()
    assert service.show("NRestarts") == "0"


# --- netplan ----------------------------------------------------------------------------------------

# The example of the netplan documentation for source routing, as many machines have it.
NETPLAN = """
network:
  version: 2
  renderer: networkd
  ethernets:
    lan:
      addresses: [192.168.100.1/24, "fd00:100::1/64"]
    fiber:
      addresses: [10.0.1.2/24, "fd00:1::2/64"]
      routes:
        - {to: default, via: 10.0.1.1, metric: 100}
        - {to: default, via: "fd00:1::1", metric: 100}
    lte:
      addresses: [10.0.2.2/24, "fd00:2::2/64"]
      routes:
        - {to: default, via: 10.0.2.1, metric: 101}
        - {to: default, via: "fd00:2::1", metric: 101}
        - {to: default, via: 10.0.2.1, table: 200}
      routing-policy:
        - {from: 192.168.100.11, table: 200}
"""


def test_netplan_with_a_table_of_the_same_number_lives_beside_pbrd(make_box: MakeBox, lab: Lab) -> None:
    """Its rule, and its route in the uplink's table, are not pbrd's: they stay, and nobody fights."""
    if not (ROOT / "usr/sbin/netplan").exists():
        pytest.skip("needs netplan: install netplan.io")
    config = f"""{PROBE}
    [uplinks.fiber]
    interface = "fiber"
    [uplinks.secondary_link]
    interface = "lte"
    table = 200
    [[policies]]
    name = "camera"
    match = {{ from = ["{LAN[2]}"] }}
    via = ["secondary_link", "fiber"]
    """
    switch_off(lab)
    files = seed(config) | {"/etc/netplan/50-lab.yaml": NETPLAN}
    service = Service(make_box(files, network=lab.router, udev=True))
    service.wait_up()
    settle(service)

    def exits() -> list[str | None]:
        return [lab.exit_of(src=source, within=0.3) for source in LAN]

    assert eventually(lambda: exits() == ["fiber", "lte", "lte"])
    events = told(service, lambda: service.box.enter(["netplan", "apply"]))
    assert eventually(lambda: exits() == ["fiber", "lte", "lte"])
    assert events.count("drift-repaired") <= 2
    assert len(events) < 10
    assert "keeps undoing" not in service.log
    assert "a foreign route stands where ours belongs" in service.log
    assert (
        "default via 10.0.2.1 dev lte proto static"
        in lab.run(lab.router, "ip", "route", "show", "table", "200").stdout
    )
    rules = lab.run(lab.router, "ip", "rule").stdout
    assert re.search(r"from 192\.168\.100\.11 lookup \S+ proto static", rules)
    names = service.box.run(["cat", "/etc/iproute2/rt_tables.d/pbrd.conf"]).stdout
    assert "200 secondary_link" in names.splitlines()
