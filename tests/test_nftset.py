"""Units whose sets systemd itself fills (NFTSet=, systemd 255 and later), under a real systemd."""

import re
from collections.abc import Callable

import pytest
from box import Box, python
from conftest import PROBE, UPLINKS, eventually
from service import Service, start

from pbrd.lab import TARGETS, Lab
from pbrd.units import set_of, setting_of

MakeBox = Callable[..., Box]
UNIT = (
    "pbrd-sender@1.service"  # an instance, so its cgroup lies a level deeper, and its set's name is escaped
)
CONFIG = f"""{PROBE}{UPLINKS}
[[policies]]
name = "sender"
match = {{ unit = "{UNIT}" }}
via = ["lte"]
fallback = "unreachable"
[default]
via = ["fiber"]
"""
SEND = f"""#!{{python}}
import socket, time
for _ in range({{packets}}):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("{TARGETS[0]}", 7001))
time.sleep({{linger}})
"""
# systemd applies a unit's settings only where it has a controller to apply them by, which a box may lack. IP
# accounting is done without one.
DROP_IN = f"[Service]\n{setting_of(UNIT)}\nIPAccounting=yes\n"
SENDER = "[Service]\nType=exec\nExecStart=/usr/bin/pbrd-sender\n"


def boot(make_box: MakeBox, lab: Lab, *, packets: int = 3, linger: float = 0) -> Service:
    """A box with pbrd and a unit that sends as soon as it can; skips where systemd is too old."""
    service = start(
        make_box,
        lab,
        CONFIG,
        seed={
            "/usr/bin/pbrd-sender": SEND.format(python=python(), packets=packets, linger=linger),
            "/etc/systemd/system/pbrd-sender@.service": SENDER,
            f"/etc/systemd/system/{UNIT}.d/pbrd.conf": DROP_IN,
        },
    )
    found = re.match(r"systemd (\d+)", service.box.enter(["systemctl", "--version"]).stdout)
    assert found
    if int(found[1]) < 255:
        pytest.skip(f"needs systemd 255 or later for NFTSet=; here is {found[1]} (see PBRD_SYSTEMD_ROOT)")
    return service


def members(service: Service) -> str:
    """What stands in the set of the unit; "" if it is empty or not there. The box's own nft made it."""
    shown = service.box.enter(["nft", "list", "set", "inet", "pbrd", set_of(UNIT)], check=False).stdout
    found = re.search(r"elements = \{ (.*) \}", shown)
    return found[1] if found else ""


def run(service: Service) -> None:
    service.box.enter(["systemctl", "start", UNIT])
    eventually(lambda: service.box.show(UNIT, "ActiveState")["ActiveState"] in ("inactive", "failed"))
    assert service.box.show(UNIT, "Result")["Result"] == "success", service.box.journal("-u", UNIT)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_first_packets_take_the_uplink_at_every_start(make_box: MakeBox, lab: Lab, running: bool) -> None:
    """Also while no daemon runs that could hear of the start."""
    service = boot(make_box, lab)
    if not running:
        service.systemctl("stop")
    seen = lab.counter("udp dport 7001")
    for _ in range(5):
        run(service)
    assert seen.read() == {"fiber": 0, "lte": 15}
    eventually(lambda: members(service) == "")
    complaints = [str(entry.get("MESSAGE")) for entry in service.box.journal("_PID=1")]
    assert [line for line in complaints if "NFT" in line] == []
    if running:
        assert service.status()["drift_repairs"] == 0


def test_a_replaced_table_keeps_what_systemd_has_put_in(make_box: MakeBox, lab: Lab) -> None:
    service = boot(make_box, lab, linger=3600)
    service.systemctl("stop")
    service.box.enter(["systemctl", "start", UNIT])
    before = eventually(lambda: members(service))
    service.systemctl("start")
    service.wait_up()
    assert members(service) == before
    service.box.write({"/etc/pbrd/pbrd.toml": CONFIG.replace('via = ["fiber"]', 'via = ["fiber", "lte"]')})
    service.systemctl("reload")
    assert members(service) == before
    service.box.enter(["nft", "flush", "ruleset"])
    assert eventually(lambda: members(service)) == before


def test_check_shows_the_line_for_a_kill_switch_that_lacks_it(make_box: MakeBox, lab: Lab) -> None:
    service = boot(make_box, lab)
    command = ["pbrd", "check"]
    assert "NFTSet" not in service.box.enter(command).stderr
    service.box.write({f"/etc/systemd/system/{UNIT}.d/pbrd.conf": "[Service]\nIPAccounting=yes\n"})
    told = service.box.enter(command).stderr
    assert f'note: policies.sender.match.unit: what "{UNIT}" sends' in told
    assert f"systemctl edit {UNIT}, and {setting_of(UNIT)} below [Service]\n" in told
