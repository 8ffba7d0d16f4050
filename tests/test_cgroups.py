import itertools
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import eventually

from pbrd import netns
from pbrd.cgroups import CGroup, Hierarchy, Watch, hierarchy, paths_of, slice_of, slice_path
from pbrd.errors import LabError, PbrdError
from pbrd.netns import Namespace
from pbrd.units import file

numbers = itertools.count()


def remove_cgroups(top: Path) -> None:
    """Remove a cgroup with all below it; what still runs there has to end first."""
    for directory, _, _ in os.walk(top, topdown=False):
        with suppress(FileNotFoundError):
            eventually(lambda gone=Path(directory): removed(gone))  # type: ignore[misc]


def removed(cgroup: Path) -> bool:
    try:
        cgroup.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture
def top() -> Iterator[Path]:
    """A slice of this test's own in the real hierarchy."""
    try:
        root = hierarchy().root
        made = root / f"pbrd-test-{os.getpid()}-{next(numbers)}.slice"
        made.mkdir()
    except (PbrdError, OSError) as error:
        pytest.skip(f"needs a cgroup2 hierarchy that can be written to: {error}")
    yield made
    remove_cgroups(made)


@pytest.fixture
def space(no_lab: str) -> Iterator[Namespace]:
    if no_lab:
        pytest.skip(f"no lab here: {no_lab}")
    name = f"pbrd-{os.getpid()}-cgroup{next(numbers)}"
    netns.create([name])
    made = Namespace(name)
    made.ip("link set dev lo up")
    yield made
    made.close()
    netns.remove([name])


def fresh(kind: str = "service") -> str:
    """A unit's name that nobody else has."""
    return f"pbrd-test-{os.getpid()}-{next(numbers)}.{kind}"


def expression(cgroup: CGroup) -> str:
    """What holds for traffic of the cgroup's processes."""
    return f'socket cgroupv2 level {cgroup.level} "{file(cgroup)}"'


def count_in_output(space: Namespace, match: str) -> None:
    """Count from now on what matches in the hook output."""
    space.nft(
        f"""table inet t; flush table inet t
        table inet t {{ chain o {{ type filter hook output priority 0; {match} counter; }}; }}"""
    )


def counted(space: Namespace) -> int:
    found = re.search(r"counter packets (\d+)", space.nft("list chain inet t o"))
    assert found
    return int(found[1])


def ping_from(cgroup: Path, space: Namespace) -> None:
    """Send one packet of a process in the cgroup."""
    command = 'echo $$ > "$0/cgroup.procs" && exec ping -c 1 -W 1 127.0.0.1'
    with netns.inside(space.name):
        subprocess.run(["sh", "-c", command, str(cgroup)], check=True, capture_output=True)


def readable(watch: Watch, within: float = 1.0) -> bool:
    return bool(select.select([watch], [], [], within)[0])


def quiet(watch: Watch) -> None:
    """Nothing of our unit is left to tell; slices of other tests may still wake the watch."""
    eventually(lambda: not watch.changed() and not readable(watch, 0))


def test_a_unit_is_found_wherever_systemd_may_put_it(top: Path) -> None:
    unit = fresh()
    user = top / "user-1000.slice" / "user@1000.service"
    places = [top / unit, user / "app.slice" / unit, user / unit]
    for place in places:
        place.mkdir(parents=True)
    root = hierarchy().root
    found = paths_of([unit, "pbrd-test-absent.service"])
    assert found["pbrd-test-absent.service"] == ()
    assert [one.path for one in found[unit]] == sorted(str(place.relative_to(root)) for place in places)
    for cgroup in found[unit]:
        assert (cgroup.unit, cgroup.id) == (unit, (root / cgroup.path).stat().st_ino)
        assert cgroup.level == hierarchy().above + cgroup.path.count("/") + 1


@pytest.mark.parametrize("name", [r"foo@a:b\x2dc.service", "session-3.scope", "nested.slice"])
def test_instances_scopes_and_slices_are_units_as_well(top: Path, name: str) -> None:
    unit = f"pbrd-test-{os.getpid()}-{name}"
    (top / unit).mkdir()
    assert [one.unit for one in paths_of([unit])[unit]] == [unit]


@pytest.mark.parametrize(
    "place",
    [
        "docker-1.scope/system.slice",  # a container's own systemd
        "nginx.service/system.slice",
        "kubepods-burstable.slice",
        'x" accept; #.slice',  # a text that a user would like root to hand to nft
    ],
)
def test_only_what_systemd_makes_for_units_is_looked_into(top: Path, place: str) -> None:
    unit = fresh()
    (top / place / unit).mkdir(parents=True)
    assert paths_of([unit]) == {unit: ()}


def test_the_search_ends_however_many_slices_a_user_makes(tmp_path: Path) -> None:
    for number in range(1200):
        (tmp_path / f"a{number}.slice" / "late.slice").mkdir(parents=True)
    (tmp_path / "a0.slice" / "early.service").mkdir()
    found = paths_of(["early.service", "late.slice"], Hierarchy(tmp_path))
    assert len(found["late.slice"]) <= 1023


def test_a_cgroup_is_named_as_nft_finds_it() -> None:
    assert file(CGroup("b.service", "a.slice/b.service", 2, 4711)) == "a.slice/b.service"
    hybrid = CGroup("b.service", "a.slice/b.service", 2, 4711, mount="unified")
    assert file(hybrid) == "unified/a.slice/b.service"
    assert Hierarchy(Path("/sys/fs/cgroup")).below_nft == ""
    assert Hierarchy(Path("/sys/fs/cgroup/unified")).below_nft == "unified"
    assert Hierarchy(Path("/mnt/cg")).below_nft == "../../../mnt/cg"


@pytest.mark.parametrize(
    ("uplink", "name", "path"),
    [
        ("lte", "uplink-lte.slice", "uplink.slice/uplink-lte.slice"),
        ("a-b", "uplink-a-b.slice", "uplink.slice/uplink-a.slice/uplink-a-b.slice"),
        ("a.b", "uplink-a.b.slice", "uplink.slice/uplink-a.b.slice"),
        ("a--b", r"uplink-a\x2d\x2db.slice", r"uplink.slice/uplink-a\x2d\x2db.slice"),
        ("a-", r"uplink-a\x2d.slice", r"uplink.slice/uplink-a\x2d.slice"),
    ],
)
def test_a_slice_lies_where_its_name_says(uplink: str, name: str, path: str) -> None:
    assert slice_of(uplink) == name
    assert slice_path(name) == path


def test_traffic_of_a_unit_is_matched_and_no_other(top: Path, space: Namespace) -> None:
    unit, other = fresh(), top / fresh()
    (top / unit).mkdir()
    other.mkdir()
    count_in_output(space, expression(paths_of([unit])[unit][0]))
    ping_from(top / unit, space)
    ping_from(other, space)
    assert counted(space) == 1


def test_a_slice_matches_what_is_started_in_it_later(top: Path, space: Namespace) -> None:
    count_in_output(space, expression(paths_of([top.name])[top.name][0]))
    late = top / "later.slice" / "later.service"
    late.mkdir(parents=True)
    ping_from(late, space)
    assert counted(space) == 1


def test_a_set_of_units_matches_and_takes_more_of_them(top: Path, space: Namespace) -> None:
    first, second = fresh(), fresh()
    (top / first).mkdir()
    (top / second).mkdir()
    cgroups = paths_of([first, second])
    level = cgroups[first][0].level
    space.nft(
        f"""table inet t {{ set units {{ type cgroupsv2; }};
        chain o {{ type filter hook output priority 0; socket cgroupv2 level {level} @units counter; }}; }}"""
    )
    for seen, unit in enumerate((first, second), start=1):
        ping_from(top / unit, space)
        assert counted(space) == seen - 1
        space.nft(f'add element inet t units {{ "{file(cgroups[unit][0])}" }}')
        ping_from(top / unit, space)
        assert counted(space) == seen


def test_a_unit_that_was_made_again_matches_when_it_is_loaded_again(top: Path, space: Namespace) -> None:
    unit = fresh()
    (top / unit).mkdir()
    with_watch = Watch([unit])
    try:
        before = with_watch.cgroups[unit][0]
        count_in_output(space, expression(before))
        remove_cgroups(top / unit)
        (top / unit).mkdir()
        ping_from(top / unit, space)
        assert counted(space) == 0  # the kernel's rule holds the old number
        assert with_watch.changed()
        after = with_watch.cgroups[unit][0]
        assert (after.path, after.level) == (before.path, before.level)
        assert after.id != before.id
        count_in_output(space, expression(after))
        ping_from(top / unit, space)
        assert counted(space) == 1
    finally:
        with_watch.close()


def test_nft_refuses_a_unit_that_has_gone(top: Path, space: Namespace) -> None:
    unit = fresh()
    (top / unit).mkdir()
    gone = paths_of([unit])[unit][0]
    (top / unit).rmdir()
    with pytest.raises(LabError, match="cgroupv2 path fails"):
        count_in_output(space, expression(gone))


def test_a_watch_tells_when_units_come_and_go(top: Path) -> None:
    unit = fresh()
    watch = Watch([unit])
    try:
        assert watch.cgroups == {unit: ()}
        assert not watch.changed()
        (top / unit).mkdir()
        assert readable(watch)
        assert watch.changed()
        assert [one.path for one in watch.cgroups[unit]] == [f"{top.name}/{unit}"]
        quiet(watch)
        (top / unit).rmdir()
        assert readable(watch)
        assert watch.changed()
        assert watch.cgroups == {unit: ()}
    finally:
        watch.close()
        watch.close()


def test_a_watch_sees_slices_that_are_made_later(top: Path) -> None:
    unit = fresh()
    watch = Watch([unit])
    try:
        user = top / "user-7.slice" / "user@7.service" / "app.slice"
        user.mkdir(parents=True)
        assert not watch.changed()
        (user / unit).mkdir()
        assert readable(watch)
        assert watch.changed()
        remove_cgroups(top / "user-7.slice")
        assert watch.changed()
        assert watch.cgroups == {unit: ()}
    finally:
        watch.close()


def test_containers_that_come_and_go_change_nothing(top: Path) -> None:
    watch = Watch([fresh()])
    try:
        for number in range(20):
            (top / f"docker-{number}.scope").mkdir()
            (top / f"docker-{number}.scope").rmdir()
        quiet(watch)
    finally:
        watch.close()


def test_a_flood_of_events_loses_no_unit(top: Path) -> None:
    unit = fresh()
    watch = Watch([unit])
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    try:
        for number in range(limit // 2 + 1):
            (top / f"docker-{number % 2}.scope").mkdir()
            (top / f"docker-{number % 2}.scope").rmdir()
        (top / unit).mkdir()
        assert watch.changed()
        assert len(watch.cgroups[unit]) == 1
    finally:
        watch.close()


def test_the_hierarchy_is_a_real_one() -> None:
    try:
        found = hierarchy()
    except PbrdError as error:
        pytest.skip(str(error))
    assert (found.root / "cgroup.procs").exists()
    kind = subprocess.run(["stat", "-fc", "%T", found.root], capture_output=True, text=True, check=True)
    assert kind.stdout.strip() == "cgroup2fs"


def test_without_cgroup2_it_says_so(no_lab: str) -> None:
    if no_lab:
        pytest.skip(f"no lab here: {no_lab}")
    code = (
        "from pbrd.cgroups import Watch\ntry: Watch(['a.service'])\nexcept Exception as error: print(error)"
    )
    hide = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
    python = [sys.executable, "-c", code]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", hide, "sh", *python], capture_output=True, text=True, check=False
    )
    assert done.stdout == (
        "cannot look for units: no cgroup2 hierarchy is mounted (usually on /sys/fs/cgroup)\n"
    ), done.stderr


def test_a_hierarchy_mounted_elsewhere_or_in_part_is_found(top: Path, tmp_path: Path, no_lab: str) -> None:
    if no_lab:
        pytest.skip(f"no lab here: {no_lab}")
    (top / "x.service").mkdir()
    code = """
from pbrd.cgroups import *
from pbrd.units import file
import os
tree = hierarchy()
for cgroup in paths_of(['x.service'])['x.service']:
    print(tree.root, cgroup.path, cgroup.level, os.stat('/sys/fs/cgroup/' + file(cgroup)).st_ino == cgroup.id)
"""
    other = tmp_path / "with blank"
    other.mkdir()
    # as in a container that sees its own part only
    script = 'mount --bind "$1" "$2" && mount -t tmpfs none /sys/fs/cgroup && shift 2 && exec "$@"'
    python = [sys.executable, "-c", code]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(top), str(other), *python],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{other} x.service 2 True\n", done.stderr
