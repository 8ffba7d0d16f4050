"""Policies for systemd units, and `pbrd use`: by cgroup, with real packets of real processes."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import HEAD, ROOT, UPLINKS, StartDaemon, eventually

from pbrd.cgroups import hierarchy, paths_of
from pbrd.errors import PbrdError
from pbrd.lab import TARGETS, Lab
from pbrd.units import file, fills, levels_of, set_of, setting_of

BASE = HEAD + "[probe]\ntargets = []\n" + UPLINKS
DEFAULT = '[default]\nvia = ["fiber", "lte"]\n'
SEND = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', {sport})); "
    "s.sendto(b'x', ('{target}', 7001))"
)


@pytest.fixture
def unit() -> Iterator[Path]:
    """A unit's cgroup under a name of its own, in a slice of its own."""
    try:
        root = hierarchy().root
    except PbrdError as error:
        pytest.skip(f"no units here: {error}")
    path = root / f"pbrdtest{os.getpid()}.slice" / f"pbrdtest{os.getpid()}.service"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"cgroup2 is not ours to change: {error}")
    yield path
    for part in (path, path.parent):
        with contextlib.suppress(OSError):
            part.rmdir()


def sent_by(lab: Lab, cgroup: Path, sport: int = 0) -> str | None:
    """Send one packet of a process in `cgroup` from the router; say by which uplink it left."""
    seen = lab.counter("udp dport 7001")
    enter = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0'); " + SEND.format(
        target=TARGETS[0], sport=sport
    )
    with lab.inside(lab.router):
        subprocess.run([sys.executable, "-c", enter], check=True)
    return next((name for name, count in seen.read().items() if count), None)


def test_traffic_of_a_unit_also_when_it_is_a_new_one(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    policy = f'[[policies]]\nname = "u"\nmatch = {{ unit = "{unit.name}" }}\nvia = ["lte"]\n'
    daemon(lab, BASE + policy + DEFAULT)
    assert sent_by(lab, unit) == "lte"
    assert lab.exit_of(local=True) == "fiber"
    unit.rmdir()
    unit.mkdir()
    eventually(lambda: sent_by(lab, unit) == "lte", within=3)


def policy_of(unit: Path, fallback: str = "next") -> str:
    match = f'match = {{ unit = "{unit.name}" }}'
    return f'[[policies]]\nname = "u"\n{match}\nvia = ["lte"]\nfallback = "{fallback}"\n'


def members(lab: Lab, unit: Path) -> str:
    """What stands in the set of the unit, as nft shows it."""
    shown = lab.nft(lab.router, f"list set inet pbrd {set_of(unit.name)}")
    found = re.search(r"elements = \{ (.*) \}", shown)
    return found[1] if found else ""


def seal(lab: Lab) -> str:
    """The line of the chain that is made last, with its handle: another one in every table."""
    shown = lab.run(lab.router, "nft", "-a", "list", "table", "inet", "pbrd", check=False).stdout
    return next(iter(re.findall(r"chain applied_\w+ .*", shown)), "")


def as_systemd(lab: Lab, verb: str, unit: Path) -> None:
    """Change the set of a unit that runs as `NFTSet=` has systemd do it."""
    [cgroup] = paths_of([unit.name])[unit.name]
    with lab.inside(lab.router):
        command = f'{verb} element inet pbrd {set_of(unit.name)} {{ "{file(cgroup)}" }}'
        subprocess.run(["nft", command], check=True)


def test_a_start_of_a_unit_changes_its_set_and_not_the_table(
    lab: Lab, daemon: StartDaemon, unit: Path
) -> None:
    unit.rmdir()
    pbrd = daemon(lab, BASE + policy_of(unit) + DEFAULT)
    before, rules = seal(lab), lab.run(lab.router, "ip", "rule").stdout
    for _ in range(3):
        unit.mkdir()
        eventually(lambda: members(lab, unit))
        assert sent_by(lab, unit) == "lte"
        unit.rmdir()
        eventually(lambda: not members(lab, unit))
    assert (seal(lab), lab.run(lab.router, "ip", "rule").stdout) == (before, rules)
    unit.mkdir()
    eventually(lambda: members(lab, unit))
    pbrd.stop()
    pbrd.restart()
    assert seal(lab) == before
    assert sent_by(lab, unit) == "lte"


def test_while_no_daemon_runs_systemd_fills_the_set_alone(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    unit.rmdir()
    pbrd = daemon(lab, BASE + policy_of(unit, "unreachable") + DEFAULT)
    before = seal(lab)
    pbrd.stop()
    unit.mkdir()
    as_systemd(lab, "add", unit)
    assert sent_by(lab, unit) == "lte"
    held = members(lab, unit)
    pbrd.restart()
    assert (seal(lab), members(lab, unit)) == (before, held)
    assert sent_by(lab, unit) == "lte"


def test_what_starts_while_no_daemon_runs_is_known_when_one_does(
    lab: Lab, daemon: StartDaemon, unit: Path
) -> None:
    pbrd = daemon(lab, BASE + policy_of(unit) + DEFAULT)
    before = seal(lab)
    pbrd.stop()
    unit.rmdir()
    unit.mkdir()
    pbrd.restart()
    assert sent_by(lab, unit) == "lte"
    assert seal(lab) == before


def test_what_systemd_does_to_a_set_is_no_drift_and_what_runs_stays_in_it(
    lab: Lab, daemon: StartDaemon, unit: Path
) -> None:
    pbrd = daemon(lab, BASE + policy_of(unit) + DEFAULT)
    before = seal(lab)
    as_systemd(lab, "add", unit)  # which is in it already
    as_systemd(lab, "delete", unit)
    eventually(lambda: members(lab, unit))
    assert sent_by(lab, unit) == "lte"
    assert seal(lab) == before
    assert pbrd.status()["drift_repairs"] == 0


def test_a_set_keeps_what_is_in_it_when_the_table_is_replaced(
    lab: Lab, daemon: StartDaemon, unit: Path
) -> None:
    pbrd = daemon(lab, BASE + policy_of(unit) + DEFAULT)
    other = unit.with_name("other.service")  # of no policy: what systemd puts in before we know it
    other.mkdir()
    try:
        path = file(paths_of([other.name])[other.name][0])
        lab.nft(lab.router, f'add element inet pbrd {set_of(unit.name)} {{ "{path}" }}')
        before = seal(lab)
        more = '[[policies]]\nname = "more"\nmatch = { proto = "sctp" }\nvia = ["fiber"]\n'
        assert pbrd.reload(BASE + policy_of(unit) + more + DEFAULT).returncode == 0
        assert seal(lab) != before
        assert sent_by(lab, unit) == sent_by(lab, other) == "lte"
    finally:
        other.rmdir()


def test_a_table_that_is_made_anew_knows_who_runs(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    daemon(lab, BASE + policy_of(unit) + DEFAULT)
    lab.nft(lab.router, "flush ruleset")
    eventually(lambda: seal(lab))
    assert sent_by(lab, unit) == "lte"


def test_connections_are_judged_anew_when_a_policy_turns_to_another_unit(
    lab: Lab, daemon: StartDaemon, unit: Path
) -> None:
    """Also one that doesn't run."""
    only = '[default]\nvia = ["fiber"]\n'
    pbrd = daemon(lab, BASE + policy_of(unit) + only)
    assert sent_by(lab, unit, sport=5000) == "lte"
    absent = unit.with_name("pbrd-absent.service")
    assert pbrd.reload(BASE + policy_of(absent) + only).returncode == 0
    assert sent_by(lab, unit, sport=5000) == "fiber"


def test_a_unit_that_lies_deeper_than_most_is_found_too(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    top = unit.parent.name.removesuffix(".slice")
    deep = unit.parent
    for depth in range(7):
        deep /= f"{top}{'-x' * (depth + 1)}.slice"
    pbrd = daemon(lab, BASE + policy_of(unit) + DEFAULT)
    late = deep / unit.name
    unit.rmdir()
    late.mkdir(parents=True)
    try:
        eventually(lambda: sent_by(lab, late) == "lte")
        assert pbrd.status()["drift_repairs"] == 0
    finally:
        for part in (late, *late.parents):
            if part == unit.parent:
                break
            part.rmdir()


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        ("restic.service", "unit_restic.service"),
        ("foo@bar.service", "unit_foo/40bar.service"),
        (r"a-b\x2dc:d.slice", "unit_a/2db/5cx2dc/3ad.slice"),
        ("systemd-networkd-wait-online.service", "unit_systemd/2dnetwor//8cd29218"),
    ],
)
def test_names_of_sets_are_such_as_systemd_and_nft_take(lab: Lab, unit: str, name: str) -> None:
    assert set_of(unit) == name
    assert setting_of(unit) == f"NFTSet=cgroup:inet:pbrd:{name}"
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9/._]{0,30}", name)  # nft_identifier_valid of systemd
    lab.nft(lab.router, f"add table inet pbrd\nadd set inet pbrd {name} {{ type cgroupsv2; }}")
    assert f"set {name} {{" in lab.nft(lab.router, "list table inet pbrd")


@pytest.mark.parametrize(
    ("unit", "levels"),
    [
        ("restic.service", (2, 3, 4, 5, 6)),
        ("session-3.scope", (2, 3, 4, 5, 6)),
        ("system.slice", (1, 4)),
        ("a-b.slice", (2, 5)),
    ],
)
def test_a_unit_is_looked_for_where_systemd_may_put_it(unit: str, levels: tuple[int, ...]) -> None:
    assert levels_of(unit) == levels
    assert levels_of(unit, 1) == tuple(level + 1 for level in levels)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[Service]\nNFTSet=cgroup:inet:pbrd:unit_a.service\n", True),
        ("NFTSet = user:inet:x:y  cgroup:inet:pbrd:unit_a.service", True),
        ("NFTSet=cgroup:inet:pbrd:unit_a.service\nNFTSet=user:inet:x:y", True),
        ("NFTSet=cgroup:inet:pbrd:unit_a.service\nNFTSet=\n", False),
        ("NFTSet=cgroup:inet:pbrd:unit_ab.service", False),
        ("# NFTSet=cgroup:inet:pbrd:unit_a.service", False),
        ("[Service]\nExecStart=/bin/true", False),
    ],
)
def test_the_files_of_a_unit_say_whether_systemd_fills_its_set(text: str, told: bool) -> None:
    assert fills(text, "a.service") is told


def test_a_slice_covers_all_that_runs_in_it(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    policy = f'[[policies]]\nname = "s"\nmatch = {{ unit = "{unit.parent.name}" }}\nvia = ["lte"]\n'
    daemon(lab, BASE + policy + DEFAULT)
    assert sent_by(lab, unit) == "lte"


def test_use_runs_a_command_on_an_uplink(lab: Lab, daemon: StartDaemon, unit: Path) -> None:
    name = f"lte{os.getpid()}"  # cgroups are the machine's: daemons in other labs would see uplink-lte.slice
    pbrd = daemon(lab, (BASE + DEFAULT).replace("uplinks.lte", f"uplinks.{name}").replace(', "lte"', ""))
    assert "inet pbrd" not in lab.nft(lab.router, "list ruleset")
    seen = lab.counter("udp dport 7001")
    command = [sys.executable, "-m", "pbrd", "--runtime-dir", str(pbrd.runtime), "use", name, "--"]
    command += [sys.executable, "-c", SEND.format(target=TARGETS[0], sport=0) + "; raise SystemExit(7)"]
    with lab.inside(lab.router):
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 7, done.stderr
    assert seen.read() == {"fiber": 0, "lte": 1}
    assert lab.exit_of(local=True) == "fiber"
