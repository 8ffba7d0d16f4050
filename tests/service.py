"""pbrd as a service: under a real systemd in a box that is a lab's router, with the unit that is shipped."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from box import Box, Seed
from conftest import PROBE, UPLINKS, eventually

from pbrd.client import call
from pbrd.errors import ControlError
from pbrd.lab import LAN, LAN6, Lab

HERE = Path(__file__).resolve().parent.parent
UNIT = "pbrd.service"
# A kill switch on fiber, the rest as it comes. The table names go where a user's would.
CONFIG = f"""{PROBE}{UPLINKS}
[[policies]]
name = "camera"
match = {{ from = ["{LAN[2]}", "{LAN6[2]}"] }}
via = ["fiber"]
fallback = "unreachable"
[default]
via = ["fiber", "lte"]
"""


def seed(config: str = CONFIG, drop_in: str = "", *, enabled: bool = True) -> Seed:
    """What `make install` puts into a machine, beside the command itself, and the administrator's part."""
    files: Seed = {
        f"/usr/lib/systemd/system/{UNIT}": (HERE / "systemd/pbrd.service").read_text(),
        "/usr/lib/sysusers.d/pbrd.conf": (HERE / "packaging/sysusers.d/pbrd.conf").read_text(),
        "/etc/iproute2/rt_protos.d/pbrd.conf": (HERE / "etc/iproute2/rt_protos.d/pbrd.conf").read_text(),
        "/etc/pbrd/pbrd.toml": config,
    }
    if enabled:
        files[f"/etc/systemd/system/multi-user.target.wants/{UNIT}"] = Path(f"/usr/lib/systemd/system/{UNIT}")
    if drop_in:
        files[f"/etc/systemd/system/{UNIT}.d/test.conf"] = f"[Service]\n{drop_in}\n"
    return files


class Service:
    """The service in a running box."""

    def __init__(self, box: Box) -> None:
        self.box = box

    def systemctl(self, *arguments: str, check: bool = True) -> int:
        """Run `systemctl` on it; returns the exit code."""
        done = self.box.enter(["systemctl", arguments[0], UNIT, *arguments[1:]], check=False)
        if check and done.returncode:
            pytest.fail(f"systemctl {' '.join(arguments)}: {done.stderr}\n{self.log}")
        return done.returncode

    def show(self, *properties: str) -> Any:
        """One property of the unit as text, or several as a tuple."""
        shown = self.box.show(UNIT, *properties)
        values = tuple(shown[name] for name in properties)
        return values[0] if len(values) == 1 else values

    @property
    def pid(self) -> int:
        """Its main process, as the box counts; 0 if there is none."""
        return int(self.show("MainPID"))

    def kill(self, name: str) -> None:
        """Send its main process a signal ("KILL")."""
        self.box.enter(["kill", f"-{name}", str(self.pid)])

    @property
    def log(self) -> str:
        """What the journal has of it, and of systemd about it, in this boot."""
        return "\n".join(str(entry.get("MESSAGE")) for entry in self.box.journal("-u", UNIT))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Its journal entries of one kind of event."""
        return self.box.journal(f"PBRD_EVENT={kind}")

    def status(self) -> dict[str, Any]:
        """What `pbrd status --json` says; {} while nobody answers."""
        try:
            return call(self.box.root / "run/pbrd", "Status", timeout=5.0)
        except ControlError:
            return {}

    def wait_up(self, within: float = 15.0) -> None:
        """Wait until it is active and all uplinks are up."""

        def all_up() -> bool:
            uplinks = self.status().get("uplinks", [])
            return bool(uplinks) and all(uplink["state"] == "up" for uplink in uplinks)

        deadline = time.monotonic() + within
        while not all_up():
            if time.monotonic() > deadline:
                pytest.fail(f"not up within {within} s: {self.show('ActiveState', 'SubState')}\n{self.log}")
            time.sleep(0.02)

    def restarted(self, former: int, within: float = 10.0) -> int:
        """Wait until another main process than `former` is ready; returns its pid."""

        def ready() -> int:
            state, pid = self.show("ActiveState", "MainPID")
            return int(pid) if state == "active" and int(pid) not in (0, former) else 0

        return eventually(ready, within)


def start(
    make_box: Callable[..., Box], lab: Lab, config: str = CONFIG, drop_in: str = "", **options: Any
) -> Service:
    """Boot a box with the service enabled as the lab's router, and wait until its uplinks are up."""
    service = Service(
        make_box(seed(config, drop_in) | options.pop("seed", {}), network=lab.router, **options)
    )
    service.wait_up()
    return service


def networkd(lab: Lab, **extra: str) -> Seed:
    """systemd-networkd, enabled, with what it needs to configure the lab's router as the lab does.

    `extra`: further lines of an interface's .network file, in place of its static addresses and gateways.
    """
    wants = "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
    files: Seed = {wants: Path("/lib/systemd/system/systemd-networkd.service")}
    files["/etc/systemd/network/lan.network"] = _network("lan", ["192.168.100.1/24", "fd00:100::1/64"])
    for k, uplink in enumerate(lab.uplinks):
        addresses = [f"{address}/{prefix}" for _, address, prefix, _ in uplink.families]
        text = _network(uplink.interface, [] if uplink.name in extra else addresses)
        if uplink.name in extra:
            text += extra[uplink.name]
        else:
            text += "".join(f"[Route]\nGateway={one[3]}\nMetric={100 + k}\n" for one in uplink.families)
        files[f"/etc/systemd/network/{uplink.interface}.network"] = text
    return files


def _network(interface: str, addresses: list[str]) -> str:
    lines = ["LinkLocalAddressing=ipv6", "IPv6AcceptRA=no", *(f"Address={one}" for one in addresses)]
    return f"[Match]\nName={interface}\n[Network]\n" + "".join(f"{line}\n" for line in lines)


def switch_off(lab: Lab) -> None:
    """Make the router's kernel like that of a machine just switched on: links down, nothing configured."""
    links = ["lan", *(uplink.interface for uplink in lab.uplinks)]
    lab.ip(lab.router, "".join(f"link set dev {link} down\naddr flush dev {link}\n" for link in links))
    for family in ("-4", "-6"):
        lab.run(lab.router, "ip", family, "route", "flush", "table", "all", "proto", "112", check=False)
        for line in lab.run(lab.router, "ip", family, "rule").stdout.splitlines():
            priority = line.partition(":")[0]
            if priority not in ("0", "32766", "32767"):
                lab.run(lab.router, "ip", family, "rule", "del", "priority", priority)
    lab.nft(lab.router, "flush ruleset")
