"""Hooks: real executables, run on events; what a bad one does, and what it can't do."""

import asyncio
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
from box import Box
from conftest import HEAD, PROBE, ROOT, UPLINKS, StartDaemon, all_up, as_nobody, eventually
from service import start

from pbrd import hooks
from pbrd.hooks import Hooks, find
from pbrd.lab import Lab

WITHIN = 20.0  # seconds; generous, the machine is busy
# Bits of signals 32 and 33: libc keeps them to itself and lets no program change what it inherited.
LIBC_SIGNALS = 1 << 31 | 1 << 32


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, sentence: str, **facts: Any) -> None:
        self.lines.append((sentence, facts))

    warning = error = info

    def __contains__(self, text: str) -> bool:
        return any(text in sentence for sentence, _ in self.lines)


def write(directory: Path, name: str, script: str, mode: int = 0o755) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


def run(
    directory: Path, facts: Iterable[dict[str, str]] = ({"event": "uplink-down"},), limit: float = WITHIN
) -> Log:
    """Run the hooks of `directory` on each of `facts`, to the end; return what was logged."""
    log = Log()

    async def work() -> None:
        ours = Hooks(directory, log, "/run/x", limit)
        async with ours.working():
            for fact in facts:
                ours.add(fact)
            async with asyncio.timeout(60):
                await ours._idle.wait()

    asyncio.run(work())
    return log


def alive(marker: str) -> list[int]:
    """The processes that have `marker` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def test_hooks_run_in_name_order_with_the_facts_as_variables(tmp_path: Path) -> None:
    for name in ("20-second", "10-first"):
        write(tmp_path / "d", name, f'echo "{name} $PBRD_EVENT $PBRD_UPLINK" >> {tmp_path}/out')
    run(tmp_path / "d", [{"event": "uplink-down", "uplink": "lte"}, {"event": "uplink-up", "uplink": "lte"}])
    assert (tmp_path / "out").read_text().splitlines() == [
        "10-first uplink-down lte",
        "20-second uplink-down lte",
        "10-first uplink-up lte",
        "20-second uplink-up lte",
    ]


def test_a_hook_gets_a_clean_environment_and_no_file_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("NOTIFY_SOCKET", "/x")
    script = f"env > {tmp_path}/env; ls /proc/self/fd > {tmp_path}/fds; pwd > {tmp_path}/pwd"
    script += (
        f"; cat > {tmp_path}/stdin; sed -n 's/^Sig\\(Ign\\|Blk\\)://p' /proc/self/status > {tmp_path}/signals"
    )
    script += f"; sleep 0.2; cat /proc/$$/oom_score_adj > {tmp_path}/oom"
    write(tmp_path / "d", "look", script)
    with open("/dev/null") as file:
        os.set_inheritable(file.fileno(), True)
        run(tmp_path / "d", [{"event": "uplink-down", "reason": "nul \0 and\nline", "long": "x" * 300_000}])
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    assert environment.keys() - {"PWD", "_", "OLDPWD", "SHLVL"} == {
        *("PATH", "LANG", "HOME", "RUNTIME_DIRECTORY"),
        *("PBRD_EVENT", "PBRD_REASON", "PBRD_LONG", "PBRD_RUNTIME_DIR"),
    }
    assert set((tmp_path / "fds").read_text().split()) == {"0", "1", "2", "3"}  # 3 is what ls itself opens
    assert (tmp_path / "pwd").read_text() == "/\n"
    assert (tmp_path / "stdin").read_text() == ""
    ignored_or_blocked = [int(mask, 16) for mask in (tmp_path / "signals").read_text().split()]
    assert [mask & ~LIBC_SIGNALS for mask in ignored_or_blocked] == [0, 0]
    assert (tmp_path / "oom").read_text() == "1000\n"


def test_output_is_told_line_by_line_and_bounded(tmp_path: Path) -> None:
    write(tmp_path / "d", "talk", "echo one; echo two >&2; printf 'no end'")
    write(tmp_path / "d", "wide", "head -c 2500 /dev/zero | tr '\\0' x")
    log = run(tmp_path / "d")
    told = [sentence for sentence, facts in log.lines if facts.get("hook") == "talk"]
    assert told == ["hook talk: one", "hook talk: two", "hook talk: no end"]
    wide = [sentence for sentence, facts in log.lines if facts.get("hook") == "wide"]
    assert "".join(line.removeprefix("hook wide: ") for line in wide) == "x" * 2500


@pytest.mark.parametrize(
    "script", ["yes | head -c 5000000", "head -c 5000000 /dev/zero", "seq 500000; exit 3"]
)
def test_megabytes_of_output_are_read_and_not_told(tmp_path: Path, script: str) -> None:
    write(tmp_path / "d", "flood", script)
    log = run(tmp_path / "d", limit=60)
    assert len(log.lines) <= hooks.OUTPUT_LINES + 2
    assert "more lines" in log
    assert "took longer" not in log


def test_a_failure_is_told_and_the_next_hook_runs(tmp_path: Path) -> None:
    write(tmp_path / "d", "10-fails", "exit 3")
    write(tmp_path / "d", "20-dies", "kill -9 $$")
    write(tmp_path / "d", "30-no-interpreter", "#!/no/such/thing\n")
    write(tmp_path / "d", "40-works", f"touch {tmp_path}/done")
    log = run(tmp_path / "d")
    failed = [(facts["hook"], facts["reason"]) for line, facts in log.lines if line.endswith(" failed")]
    assert failed[:2] == [("10-fails", "exit code 3"), ("20-dies", "SIGKILL")]
    assert failed[2][0] == "30-no-interpreter"
    assert (tmp_path / "done").exists()


def test_a_hook_that_hangs_and_ignores_sigterm_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "GRACE", 0.3)
    marker = f"9{os.getpid()}{time.monotonic_ns() % 10**6}"
    write(tmp_path / "d", "10-hangs", f"trap '' TERM; sleep {marker} & sleep {marker}; sleep {marker}")
    write(tmp_path / "d", "20-works", f"touch {tmp_path}/done")
    log = run(tmp_path / "d", limit=0.5)
    assert "was ended: it took longer than 0.5 s" in log
    assert (tmp_path / "done").exists()
    eventually(lambda: not alive(marker))


def test_a_hook_that_obeys_sigterm_may_clean_up(tmp_path: Path) -> None:
    write(tmp_path / "d", "tidy", f"trap 'touch {tmp_path}/tidy; exit' TERM; while :; do sleep 0.05; done")
    run(tmp_path / "d", limit=0.5)
    assert (tmp_path / "tidy").exists()


def test_what_a_hook_leaves_in_the_background_ends_with_it(tmp_path: Path) -> None:
    marker = f"8{os.getpid()}{time.monotonic_ns() % 10**6}"
    write(tmp_path / "d", "forks", f"sleep {marker} & sleep {marker} & exit 0")
    begun = time.monotonic()
    log = run(tmp_path / "d")  # the children hold the pipe: nobody waits for them
    assert time.monotonic() - begun < WITHIN
    assert log.lines == []
    eventually(lambda: not alive(marker))


def test_who_escapes_into_a_session_of_its_own_holds_nothing_up(tmp_path: Path) -> None:
    marker = f"7{os.getpid()}{time.monotonic_ns() % 10**6}"
    write(tmp_path / "d", "escapes", f"setsid sleep {marker} & sleep 0.3")
    try:
        begun = time.monotonic()
        run(tmp_path / "d")
        assert time.monotonic() - begun < WITHIN
    finally:
        for pid in alive(marker):
            os.kill(pid, SIGTERM)


def test_a_thousand_quick_events_each_run_the_hook_in_order(tmp_path: Path) -> None:
    write(tmp_path / "d", "count", f'echo "$PBRD_N" >> {tmp_path}/out')
    log = run(tmp_path / "d", [{"event": "x", "n": str(number)} for number in range(1000)])
    assert (tmp_path / "out").read_text().split() == [str(number) for number in range(1000)]
    assert log.lines == []


def test_the_oldest_events_are_dropped_when_hooks_are_slow_and_that_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "QUEUE", 10)
    write(tmp_path / "d", "slow", f'echo "$PBRD_N" >> {tmp_path}/out')
    log = run(tmp_path / "d", [{"event": "x", "n": str(number)} for number in range(500)])
    assert (tmp_path / "out").read_text().split() == [str(number) for number in range(490, 500)]
    assert [line for line, _ in log.lines] == [
        "hooks are too slow: the oldest events are dropped",
        "hooks have caught up",
    ]
    assert log.lines[1][1] == {"dropped": 490}


def test_no_descriptor_and_no_process_is_left(tmp_path: Path) -> None:
    write(tmp_path / "d", "quick", "true")
    run(tmp_path / "d")
    before = set(os.listdir("/proc/self/fd"))
    run(tmp_path / "d", [{"event": "x"}] * 20)
    assert set(os.listdir("/proc/self/fd")) == before
    children = [entry for entry in Path("/proc/self/task").glob("*/children") if entry.read_text()]
    assert children == []


# --- which are run ----------------------------------------------------------------------------


def test_only_executables_that_no_editor_left_are_run(tmp_path: Path) -> None:
    for name in ("run", "run.sh", "README", ".hidden", "run~", "run.dpkg-old", "run.rpmsave", "run.bak"):
        write(tmp_path / "d", name, "true", 0o644 if name == "README" else 0o755)
    (tmp_path / "d" / "directory").mkdir()
    assert find(tmp_path / "d") == ([tmp_path / "d" / "run", tmp_path / "d" / "run.sh"], {})
    assert find(tmp_path / "nowhere") == ([], {})


def spoil_file(path: Path) -> None:
    path.chmod(0o775)


def spoil_owner(path: Path) -> None:
    os.chown(path, 65534, -1)


def spoil_directory(path: Path) -> None:
    path.parent.chmod(0o777)


def spoil_target(path: Path) -> None:
    """A symlink out of a directory that others can write."""
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir()
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    elsewhere.chmod(0o777)


def spoil_way(path: Path) -> None:
    """A symlink by another symlink, which others can replace; where it ends is safe."""
    spoil_target(path)
    elsewhere = path.parent.parent / "elsewhere"
    (elsewhere / path.name).rename(path.parent.parent / "safe")
    (elsewhere / path.name).symlink_to(path.parent.parent / "safe")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
@pytest.mark.parametrize("spoil", [spoil_file, spoil_owner, spoil_directory, spoil_target, spoil_way])
def test_what_others_could_have_written_is_refused_and_told_once(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = write(tmp_path / "d", "hook", f"touch {tmp_path}/ran")
    spoil(path)
    log = run(tmp_path / "d", [{"event": "x"}] * 3)
    assert [line for line, _ in log.lines] == ["hook hook is not run: only root may be able to write it"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_symlink_to_a_file_of_roots_is_fine_and_a_directory_that_nobody_can_read_is_empty(
    tmp_path: Path,
) -> None:
    real = write(tmp_path / "real", "hook", "true")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to(real)
    assert find(tmp_path / "d") == ([tmp_path / "d" / "link"], {})
    (tmp_path / "d").chmod(stat.S_IRWXU)
    assert as_nobody(lambda: int(find(tmp_path / "d") != ([], {}))) == 0


# --- in the daemon ----------------------------------------------------------------------------

CONFIG = f"""{HEAD}{PROBE}{UPLINKS}
[default]
via = ["fiber", "lte"]
"""


def test_the_daemon_runs_the_hooks_beside_its_config_from_start_to_stop(
    lab: Lab, daemon: StartDaemon, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    note = f'echo "$PBRD_EVENT $PBRD_UPLINK$PBRD_POLICY $PBRD_INTERFACE $PBRD_OLD $PBRD_NEW" >> {out}'
    write(tmp_path / "daemon0" / "hooks.d", "10-note", note)
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.carrier(0, up=False)
    eventually(lambda: pbrd.policy("default").get("active") == "lte")
    assert pbrd.stop() == 0
    lines = out.read_text().splitlines()
    assert lines[0].split() == ["started"]
    assert lines[-1].split() == ["stopped"]
    assert "uplink-down fiber fiber up down" in lines
    assert "failover default lte fiber lte" in lines


def test_a_hanging_hook_holds_up_neither_failover_nor_stop(
    lab: Lab, daemon: StartDaemon, tmp_path: Path
) -> None:
    write(tmp_path / "daemon0" / "hooks.d", "10-hangs", "trap '' TERM; yes; sleep 1000")
    pbrd = daemon(lab, CONFIG)
    eventually(lambda: all_up(pbrd))
    lab.carrier(0, up=False)
    eventually(lambda: lab.exit_of() == "lte")
    eventually(lambda: pbrd.policy("default").get("active") == "lte")
    assert pbrd.stop() == 0


RELOADS = """
case $PBRD_EVENT in
    reload*) echo "$PBRD_EVENT" >>{out}; cd {root} && {python} -m pbrd reload; echo asked >>{out} ;;
    uplink-drained) echo "$PBRD_UPLINK" >>{out} ;;
esac
true
"""


def test_a_hook_that_reloads_on_a_reload_is_no_loop(lab: Lab, daemon: StartDaemon, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = RELOADS.format(out=out, root=ROOT, python=sys.executable)
    write(tmp_path / "daemon0" / "hooks.d", "10-again", script)
    pbrd = daemon(lab, CONFIG)

    def told() -> list[str]:
        return out.read_text().splitlines() if out.exists() else []

    pbrd.command("reload")
    eventually(lambda: "asked" in told(), within=WITHIN)
    pbrd.command("drain", "lte")  # comes behind whatever the hook has caused
    eventually(lambda: "lte" in told(), within=WITHIN)
    assert told() == ["reload", "asked", "lte"]
    assert pbrd.status()["generation"] == 3
    pbrd.reload("[broken")
    eventually(lambda: told().count("asked") == 2, within=WITHIN)
    pbrd.command("drain", "fiber")
    eventually(lambda: "fiber" in told(), within=WITHIN)
    assert told()[3:] == ["reload-refused", "asked", "fiber"]


# --- as a service -----------------------------------------------------------------------------

TRIES = """#!/bin/sh
[ "$PBRD_EVENT" = started ] || exit 0
try() { "$@" >/dev/null 2>&1 && echo "can: $*" || echo "can't: $*"; }
sed -n 's/^CapEff:[[:space:]]*0*/capabilities /p' /proc/self/status
try pbrd status
try pbrd drain lte
try pbrd undrain lte
try systemctl start other.service
try ip route add unreachable 203.0.113.7
try nft list ruleset
try touch /var/lib/pbrd/note
try touch /run/pbrd/note
try touch /tmp/note
try logger -t hook said
try touch /etc/note
try touch /root/note
try chown nobody /var/lib/pbrd/note
try mount -t tmpfs none /mnt
"""


def test_what_hooks_may_do_inside_the_hardened_unit(make_box: Callable[..., Box], lab: Lab) -> None:
    """What docs/events.md says of it."""
    other = "[Service]\nType=oneshot\nExecStart=/bin/touch /run/other\n"
    more = {"/etc/pbrd/hooks.d/10-try": TRIES, "/etc/systemd/system/other.service": other}
    service = start(make_box, lab, seed=more)

    def told() -> list[str]:
        entries = service.box.journal("-t", "pbrd", "PBRD_HOOK=10-try")
        return [entry["MESSAGE"].removeprefix("hook 10-try: ") for entry in entries]

    eventually(lambda: any("mount" in line for line in told()), within=15)
    assert told() == [
        "capabilities 3000",  # net_admin and net_raw
        "can: pbrd status",
        "can: pbrd drain lte",
        "can: pbrd undrain lte",
        "can: systemctl start other.service",
        "can: ip route add unreachable 203.0.113.7",
        "can: nft list ruleset",
        "can: touch /var/lib/pbrd/note",
        "can: touch /run/pbrd/note",
        "can: touch /tmp/note",
        "can: logger -t hook said",
        "can't: touch /etc/note",
        "can't: touch /root/note",
        "can't: chown nobody /var/lib/pbrd/note",
        "can't: mount -t tmpfs none /mnt",
    ]
    assert (service.box.root / "run/other").exists()
