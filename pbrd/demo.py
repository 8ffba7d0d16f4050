"""`pbrd demo`: failover by the real daemon in a lab of namespaces, as the clients behind it see it.

Every figure comes from packets: streams of the LAN clients, answered by the internet. The daemon is asked
only for what it says about itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pbrd.client import call
from pbrd.errors import ControlError, LabError
from pbrd.lab import LAN, LAN6, Lab
from pbrd.stream import Result
from pbrd.tables import Document, line

CONFIG = """\
[daemon]
names = ""                          # register no names with the host's iproute2

[probe]
targets = ["203.0.113.10", "2001:db8:113::10"]
interval = "1s"
timeout = "1s"
fall = 3
rise = 3
stable_for = "3s"
confirm_interval = "200ms"

[uplinks.fiber]
interface = "fiber"

[uplinks.lte]
interface = "lte"

[[policies]]
name = "backups"                    # the other way round
match = { from = ["192.168.100.11"] }
via = ["lte", "fiber"]

[[policies]]
name = "camera"                     # kill switch: fiber or nowhere
match = { from = ["192.168.100.12"] }
via = ["fiber"]
fallback = "unreachable"

[default]
via = ["fiber", "lte"]
fallback = "best-effort"
"""

PICTURE = """
                         ╭── fiber ── isp0 ──╮
   lan ────── router ────┤                   ├──── internet
   clients    pbrd       ╰── lte ──── isp1 ──╯
"""

START_WITHIN = 15.0  # seconds until the daemon answers and the packets go as they should
MOVE_WITHIN = 20.0  # seconds after a fault or a healing
SETTLE = 0.7  # seconds of traffic before and after each change


@dataclass(frozen=True, slots=True)
class Client:
    """One client of the LAN."""

    name: str
    address: str
    rule: str  # for people
    rate: int  # packets a second


CLIENTS = (
    Client("client", LAN[0], "fiber, else lte", 1000),
    Client("client", LAN6[0], "fiber, else lte", 200),
    Client("backups", LAN[1], "lte, else fiber", 200),
    Client("camera", LAN[2], "fiber or nowhere: a kill switch", 200),
)
FIBER = ("fiber", "fiber", "lte", "fiber")  # where new connections of each client go while all is well
LTE = ("lte", "lte", "lte", None)  # and without the fiber


@dataclass(frozen=True, slots=True)
class Act:
    """What is done to the lab, and where each client's new connections have to go then."""

    title: str
    change: Callable[[Lab], object]
    exits: tuple[str | None, ...]


ACTS = (
    Act("All is well", lambda _: time.sleep(1), FIBER),
    Act("The fiber's cable is pulled", lambda lab: lab.carrier(0, False), LTE),
    Act("The cable is put back", lambda lab: lab.carrier(0, True), FIBER),
    Act("The fiber dies silently upstream", lambda lab: lab.silence(0), LTE),
    Act("The fiber is well again", lambda lab: lab.silence(0, on=False), FIBER),
)


@dataclass(slots=True)
class Show:
    """The running lab, what was seen in it, and how it is told."""

    lab: Lab
    directory: Path
    colour: bool
    daemon: subprocess.Popen[str] | None = None
    rows: list[tuple[str, ...]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def say(self, text: str = "", style: str = "") -> None:
        """Print a line at once, in a terminal with a style (an SGR number)."""
        print(f"\x1b[{style}m{text}\x1b[0m" if self.colour and style else text, flush=True)

    def start(self) -> None:
        """Start the real daemon in the router; raises LabError if it does not come up."""
        config = self.directory / "pbrd.toml"
        config.write_text(CONFIG)
        dirs = ["--runtime-dir", str(self.directory), "--state-dir", str(self.directory / "state")]
        (self.directory / "state").mkdir()
        with (self.directory / "log").open("w") as log:
            self.daemon = self.lab.spawn(
                self.lab.router,
                [sys.executable, "-m", "pbrd", "run", "--config", str(config), *dirs],
                cgroups=False,  # the machine may have an uplink-fiber.slice of its own
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
                start_new_session=True,  # Ctrl-C is for the demo, which ends the daemon
            )
        deadline = time.monotonic() + START_WITHIN
        while not self.status():
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"the daemon did not start:\n{(self.directory / 'log').read_text()}")
            time.sleep(0.05)

    def status(self) -> Document:
        """What the daemon says; {} if it does not answer."""
        with contextlib.suppress(ControlError):
            return call(self.directory, "Status", timeout=5.0)
        return {}

    def exits(self, exits: tuple[str | None, ...], within: float) -> float | None:
        """Wait until new connections go where they should; the seconds that it took, None = never."""
        begun = time.monotonic()
        while time.monotonic() < begun + within:
            if all(
                self.lab.exit_of(src=client.address, within=0.05) == expected
                for client, expected in zip(CLIENTS, exits, strict=True)
            ):
                return time.monotonic() - begun
            time.sleep(0.02)
        return None

    def play(self, number: int, act: Act) -> None:
        """Change something while all clients send; say what they saw, and keep it for the summary."""
        self.say(f"\n{number}  {act.title}", "1")
        streams = [self.lab.traffic(client.rate, src=client.address) for client in CLIENTS]
        time.sleep(SETTLE)
        act.change(self.lab)
        took = self.exits(act.exits, MOVE_WITHIN)
        time.sleep(SETTLE)
        results = [stream.stop() for stream in streams]
        for client, result in zip(CLIENTS, results, strict=True):
            self.say(_seen(client, result))
        self.tell_status()
        if took is None:
            self.fail(f"new connections did not go to {_names(act.exits)} within {MOVE_WITHIN:g} s")
        backups = results[2]
        if backups.lost > backups.sent / 100:  # a busy machine may be late once
            self.fail("the backups lost packets, and the fiber is none of their business")
        self.rows.append(_row(number, act, results, took))

    def tell_status(self) -> None:
        """Print what `pbrd status` says, in two lines."""
        document = self.status()
        if not document:
            self.fail("the daemon no longer answers")
            return
        self.say(f"   pbrd says   {line(document)}", "2")
        moves = (f"{p['name']} → {p['active'] or p['fallback']} ({p['state']})" for p in document["policies"])
        self.say(f"               {', '.join(moves)}", "2")

    def fail(self, text: str) -> None:
        """Note that something expected did not happen."""
        self.failures.append(text)
        self.say(f"   ✗ {text}", "31")

    def summary(self, leaked: int) -> None:
        """Print the table of all acts, and the verdict."""
        head = ("", "act", "lost", "longest gap", "all moved", "backups lost")
        widths = [max(map(len, column)) for column in zip(head, *self.rows, strict=True)]
        self.say("\nAs the LAN client saw it, 1,000 packets a second\n", "1")
        for row in (head, *self.rows):
            cells = (
                c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            self.say("   " + "   ".join(cells), "2" if row is head else "")
        self.say(f"\n   packets of the camera that left by lte: {leaked}")
        if leaked:
            self.fail("the kill switch leaked")
        self.say()
        if self.failures:
            self.say(f"Not as promised: {'; '.join(self.failures)}", "31")
            self.say(f"The daemon's log:\n{(self.directory / 'log').read_text()[-4000:]}")


def _seen(client: Client, result: Result) -> str:
    stations = ["nowhere"] if result.trips[0].uplink is None else []
    stations += result.path
    stations += ["nowhere"] if result.path and result.trips[-1].uplink is None else []
    path = " → ".join(stations)
    lost = f"{result.lost:,} of {result.sent:,} lost"
    return (
        f"   {client.name:<8} {client.address:<15} {path:<16} {lost:>20}   longest gap {_ms(result.outage())}"
    )


def _row(number: int, act: Act, results: list[Result], took: float | None) -> tuple[str, ...]:
    first, backups = results[0], results[2]
    moved = "-" if act.change is ACTS[0].change else "never" if took is None else f"after {_ms(took)}"
    return str(number), act.title, f"{first.lost:,}", _ms(first.outage()), moved, f"{backups.lost:,}"


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1000
    return f"{milliseconds:,.{1 if milliseconds < 100 else 0}f} ms"


def _names(exits: tuple[str | None, ...]) -> str:
    return ", ".join(exit or "nowhere" for exit in exits)


PLAY = """\
The lab stays up. In another terminal:

   pbrd status --watch --runtime-dir {directory}
   ip netns exec {lab.lan} ping -I {LAN[0]} 203.0.113.10
   ip netns exec {lab.router} ip rule
   ip netns exec {lab.net} tcpdump -ni any udp or icmp or icmp6

Here: cut, silence, heal (the fiber); Enter or Ctrl-C ends it and removes everything."""


def _keep(show: Show) -> None:
    """Leave the lab to the user until Enter, Ctrl-C or a SIGTERM."""
    show.say(PLAY.format(directory=show.directory, lab=show.lab, LAN=LAN))
    cut = silent = False
    while True:
        try:
            word = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            signal.pause()
            return
        if not word:
            return
        if word not in ("cut", "silence", "heal"):
            show.say("cut, silence, heal, or Enter to end")
            continue
        if cut != (word == "cut"):
            cut = not cut
            show.lab.carrier(0, not cut)
        if silent != (word == "silence"):
            silent = not silent
            show.lab.silence(0, silent)


def main(keep: bool = False) -> int:
    """Show it; returns 0 if all went as promised, 1 if not or if there can be no lab here."""
    with _sigterm_ends():
        try:
            return _show(keep)
        except LabError as error:
            print(f"pbrd demo: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nremoved", file=sys.stderr)
            return 0 if keep else 130


def _show(keep: bool) -> int:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    with tempfile.TemporaryDirectory(prefix="pbrd-demo-") as directory, Lab() as lab:
        show = Show(lab, Path(directory), colour)
        show.say("pbrd demo, in network namespaces: the network of this machine is not touched", "1")
        show.say(PICTURE)
        for client in CLIENTS:
            show.say(f"   {client.name:<8} {client.address:<15} {client.rule}")
        show.start()
        if show.exits(FIBER, START_WITHIN) is None:
            show.fail(f"packets do not go to {_names(FIBER)}")
        camera = lab.counter(f"ip saddr {LAN[2]}")
        for number, act in enumerate(ACTS, 1):
            show.play(number, act)
        show.summary(camera.read()["lte"])
        if keep:
            _keep(show)
        return 1 if show.failures else 0


@contextlib.contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Let SIGTERM end it as Ctrl-C does, so that nothing stays behind."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
