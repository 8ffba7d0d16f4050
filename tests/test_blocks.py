"""Class numbers over reloads and restarts: no judgement is ever taken for that of other policies."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import permutations
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
from conftest import HEAD, UPLINKS, StartDaemon, eventually

from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab, Packet

# Uplinks whose interfaces aren't there: enough for many ways. No NAT, which would end what goes astray.
EXTRA = "".join(f'[uplinks.{name}]\ninterface = "{name}"\n' for name in "abc")
NOBODY = """[[policies]]
name = "nobody"
match = { mac = "52:54:00:00:00:01" }
via = ["fiber"]
fallback = "blackhole"
"""
SECRET = f"""[[policies]]
name = "secret"
match = {{ from = ["{LAN[2]}", "{LAN6[2]}"] }}
via = ["lte"]
fallback = "unreachable"
"""


def config(net: str, ways: list[list[str]], *, secret_first: bool) -> str:
    """As many classes as ways, and three more."""
    rows = "".join(
        f'[[policies]]\nname = "p{n}"\nmatch = {{ from = ["{net}.{n}.0/24"] }}\nvia = {json.dumps(way)}\n'
        'fallback = "unreachable"\n'
        for n, way in enumerate(ways)
    )
    policies = SECRET + rows if secret_first else rows + SECRET
    base = HEAD + "[probe]\ntargets = []\n" + UPLINKS + EXTRA
    return base + NOBODY + policies + '[default]\nvia = ["fiber"]\n'


FEW = [["a", name] for name in ("b", "c", "lte", "fiber")]
MANY = [["fiber", *pair] for pair in permutations("abc", 2)] + [["fiber", name] for name in "abc"]
FIRST = config("172.16", FEW, secret_first=True)
SECOND = config("172.17", FEW, secret_first=True)
LAST = config("172.18", FEW, secret_first=False)  # as many classes, in another order
MORE = config("172.19", MANY, secret_first=False)


@contextmanager
def flood(lab: Lab, source: str, target: str) -> Iterator[None]:
    """Keep connections busy that were judged before."""
    stop = threading.Event()
    with ExitStack() as stack:
        packets = (Packet(dst=target, src=source, sport=sport) for sport in range(10000, 10030))
        flows = [stack.enter_context(closing(lab.flow(packet))) for packet in packets]
        assert all(flow.exit() == "lte" for flow in flows)

        def send() -> None:
            while not stop.is_set():
                for flow in flows:
                    flow.exit(0.001)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize(
    ("source", "target"), [(LAN[2], TARGETS[0]), (LAN6[2], TARGETS6[0])], ids=["ipv4", "ipv6"]
)
@pytest.mark.parametrize("after", [LAST, MORE], ids=["as many", "more"])
@pytest.mark.parametrize("how", ["reload", "stop", "kill", "rules gone"])
def test_a_kill_switch_holds_for_live_connections(
    lab: Lab, daemon: StartDaemon, how: str, after: str, source: str, target: str
) -> None:
    pbrd = daemon(lab, FIRST)
    eventually(lambda: lab.exit_of(src=source, dst=target) == "lte")
    assert pbrd.reload(SECOND).returncode == 0
    leaks = lab.counter("udp sport 10000-10029")
    with flood(lab, source, target):
        if how == "reload":
            assert pbrd.reload(after).returncode == 0
        else:
            pbrd.stop(SIGTERM if how == "stop" else SIGKILL)
            if (
                how == "rules gone"
            ):  # networkd was restarted meanwhile; this opens the kill switch until the start
                for version in ("-4", "-6"):
                    lab.run(lab.router, "ip", version, "rule", "flush", "protocol", "112")
            pbrd.config.write_text(after)
            pbrd.restart()
        before = leaks.read()["fiber"] if how == "rules gone" else 0
        time.sleep(0.5)
    assert leaks.read()["fiber"] == before


def test_a_kill_in_the_midst_of_reloads_leaks_nothing(lab: Lab, daemon: StartDaemon) -> None:
    pbrd = daemon(lab, FIRST)
    eventually(lambda: lab.exit_of(src=LAN[2]) == "lte")
    leaks = lab.counter("udp sport 10000-10029")
    with flood(lab, LAN[2], TARGETS[0]):
        for n, text in enumerate([SECOND, LAST, MORE, FIRST, LAST]):
            pbrd.config.write_text(text)
            pbrd.signal(1)  # SIGHUP
            time.sleep(0.01 * (n + 1))
            pbrd.stop(SIGKILL)
            pbrd.restart()
    assert leaks.read()["fiber"] == 0


@pytest.mark.parametrize("reloads", [1, 2, 3])
def test_a_restart_after_reloads_writes_nothing(
    lab: Lab, daemon: StartDaemon, tmp_path: Path, reloads: int
) -> None:
    pbrd = daemon(lab, FIRST)
    for n in range(reloads):
        assert pbrd.reload(FIRST.replace("172.16", f"172.{20 + n}")).returncode == 0
    pbrd.stop(SIGKILL)
    with (tmp_path / "monitor").open("w") as log:
        lab.spawn(lab.router, ["ip", "monitor", "rule", "route"], stdout=log)
    time.sleep(0.3)
    pbrd.restart()
    assert (tmp_path / "monitor").read_text() == ""
