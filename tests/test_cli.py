"""The command line: what it accepts, prints and returns. A server with made-up answers plays the daemon."""

import asyncio
import fcntl
import json
import os
import pty
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import as_nobody, let_others_in

from pbrd import cli, tables
from pbrd.arguments import parser
from pbrd.control import Handler, Server
from pbrd.errors import ConfigError, KernelError, Problem
from pbrd.monitor import Monitor
from pbrd.watch import Histories

COMMANDS = ("run", "check", "plan", "status", "reload", "flush", "demo")
UPLINK = {
    "name": "fiber",
    "interface": "eth0",
    "state": "up",
    "reason": "ok",
    "since": "2026-11-22T17:43:48.723Z",
}
PROBE = {
    "rtt_ms": 11.2,
    "jitter_ms": 0.4,
    "loss": 0.0,
    "targets": [{"address": "1.1.1.1", "answering": True}],
}
DOCUMENT = {"version": "0.1.0", "pid": 1, "uplinks": [{**UPLINK, "probe": PROBE}], "policies": []}
CONFIG = """
[uplinks.fiber]
interface = "eth0"
[[policies]]
name = "web"
match = { to = ["192.0.2.0/24"] }
via = ["fiber"]
"""
PROBLEMS = (Problem("a.toml", "uplinks.x", "wrong"), Problem("b.toml", "", "worse"))


class Daemon:
    """What stands in for it: answers that a test can change, in a loop on a thread."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.answers: dict[str, Mapping[str, Any] | Exception] = {
            "Status": DOCUMENT,
            "Plan": {"steps": []},
            "Reload": {"changed": [], "generation": 2},
            "Flush": {"removed": []},
            "Drain": {},
            "Undrain": {},
        }
        self.asked: list[tuple[str, dict[str, Any]]] = []
        changing = ("Reload", "Flush", "Drain", "Undrain")
        handlers = {name: Handler(self.answering(name), changes=name in changing) for name in self.answers}
        self.monitor = Monitor(lambda: dict(DOCUMENT), in_journal=False)
        handlers["Monitor"] = Handler(self.monitor.look, stream=self.monitor.follow)
        self.server = Server(runtime / "pbrd.sock", handlers)
        self.server.open()
        self.loop = asyncio.new_event_loop()
        self.running = self.loop.create_task(self.server.run())
        self.thread = threading.Thread(target=self.turn)
        self.thread.start()

    def answering(self, name: str) -> Any:
        def answer(parameters: dict[str, Any]) -> dict[str, Any]:
            self.asked.append((name, parameters))
            told = self.answers[name]
            if isinstance(told, Exception):
                raise told
            return dict(told)

        return answer

    def turn(self) -> None:
        try:
            self.loop.run_until_complete(self.running)
        except asyncio.CancelledError:
            self.loop.close()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.running.cancel)
            self.thread.join()
        self.server.close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.stop()


def pbrd(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pbrd", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env=os.environ | environment
    )


# Wrong and right usage


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nope",),
        ("explain",),
        ("status", "--nope"),
        ("status", "--js"),
        ("check", "a", "b"),
        ("check", "--what-if"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_a_time_that_means_nothing_is_wrong_usage_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["events", "--since", "foo"]) == 2
    assert capsys.readouterr().err.startswith("pbrd: ")


def test_the_version() -> None:
    told = pbrd("--version")
    assert (told.returncode, told.stdout) == (0, "pbrd 0.1.0\n")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example:\n  " in text
    assert f"pbrd {command}" in text.partition("example:")[2]
    assert "--runtime-dir" in text


def test_the_runtime_dir_may_stand_before_or_after_the_command(fake: Daemon) -> None:
    for arguments in (
        ("--runtime-dir", fake.runtime, "status"),
        ("status", "--runtime-dir", fake.runtime),
        ("--runtime-dir", "/nowhere", "status", "--runtime-dir", fake.runtime),
    ):
        assert cli.main([str(argument) for argument in arguments]) == 0
    assert cli.main(["--runtime-dir", "/nowhere", "status"]) == 3


def test_the_runtime_dir_comes_from_systemd_too(fake: Daemon) -> None:
    assert pbrd("status", RUNTIME_DIRECTORY=f"{fake.runtime}:/run/other").returncode == 0


@pytest.mark.parametrize("command", ["status", "reload"])
def test_no_daemon_is_3(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--runtime-dir", str(tmp_path)]) == 3
    assert "no daemon is running" in capsys.readouterr().err


# status


def test_status_shows_a_table(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--runtime-dir", str(fake.runtime)]) == 0
    shown = capsys.readouterr().out
    assert "fiber   eth0       up" in shown
    assert "\x1b" not in shown


def test_status_json_is_the_document_of_the_daemon(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--json", "--runtime-dir", str(fake.runtime)]) == 0
    assert capsys.readouterr().out == json.dumps(DOCUMENT, indent=2) + "\n"


def test_status_is_4_when_somebody_should_look(fake: Daemon) -> None:
    fake.answers["Status"] = {"uplinks": [{**UPLINK, "state": "down"}]}
    assert cli.main(["status", "--runtime-dir", str(fake.runtime)]) == 4
    assert cli.main(["status", "--json", "--runtime-dir", str(fake.runtime)]) == 4


def test_a_broken_pipe_is_quiet(fake: Daemon) -> None:
    command = f"{sys.executable} -m pbrd status --runtime-dir {fake.runtime} | true; echo ${{PIPESTATUS[0]}}"
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=30)
    assert told.stderr == ""
    assert told.stdout in ("141\n", "0\n")  # 0: it had written all before `true` ended


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("pbrd check --no-machine $GOOD >&-", 0),
        ("pbrd check --no-machine $GOOD 2>&-", 0),
        ("pbrd check --no-machine $GOOD <&- >&- 2>&-", 0),
        ("pbrd check --no-machine $BAD 2>&-", 78),
        ("pbrd status --json --runtime-dir $RUNTIME >&-", 0),
        ("pbrd status --runtime-dir /nowhere 2>&-", 3),
    ],
)
def test_closed_streams_are_no_error(fake: Daemon, command: str, code: int) -> None:
    told = in_shell(fake, f"{command}; echo code $?")
    assert (told.stdout.splitlines()[-1], told.stderr) == (f"code {code}", "")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("pbrd status --json --runtime-dir $RUNTIME", 141),
        ("pbrd status --watch --json --runtime-dir $RUNTIME", 141),
        ("pbrd check --no-machine $GOOD", 141),
        ("pbrd check --no-machine $BAD 2>&1", 141),
        ("pbrd status --help", 0),  # argparse lets nobody know
        ("pbrd nope 2>&1", 2),
    ],
)
def test_a_reader_that_went_away_is_quiet(fake: Daemon, command: str, code: int) -> None:
    # the reader is gone when the writer begins: `wait` ends with the process substitution
    told = in_shell(fake, f"exec 3>&1 > >(exec true); wait $!; {command}; echo $? >&3")
    assert (told.stdout, told.stderr) == (f"{code}\n", "")


def test_a_full_disk_is_said_in_a_line(fake: Daemon) -> None:
    for command in ("pbrd check --no-machine $GOOD", "pbrd status --runtime-dir $RUNTIME"):
        told = in_shell(fake, f"{command} > /dev/full; echo $?")
        assert (told.stdout, told.stderr) == ("1\n", "pbrd: cannot write: No space left on device\n")


def in_shell(fake: Daemon, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in bash. It may speak of $GOOD and $BAD, two configs, and of $RUNTIME."""
    good, bad = fake.runtime / "good.toml", fake.runtime / "bad.toml"
    good.write_text(CONFIG.replace('"eth0"', '"eth0"\ngateway6 = "off"'))
    bad.write_text("x")
    function = f'pbrd() {{ {sys.executable} -m pbrd "$@"; }}\n'
    names = {"GOOD": str(good), "BAD": str(bad), "RUNTIME": str(fake.runtime)}
    return subprocess.run(
        ["bash", "-c", function + command],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=os.environ | names,
    )


def test_status_works_where_the_terminal_is_not_utf8(fake: Daemon) -> None:
    told = pbrd("status", "--runtime-dir", fake.runtime, PYTHONIOENCODING="ascii")
    assert (told.returncode, told.stderr) == (0, "")


def test_status_imports_next_to_nothing(fake: Daemon) -> None:
    code = (
        "import sys; from pbrd.cli import main; main(sys.argv[1:]); "
        "print(*(m for m in sys.modules if '.' not in m or m.startswith('pbrd')), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "status", "--runtime-dir", str(fake.runtime)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    imported = set(told.stderr.split())
    assert {name for name in imported if name.startswith("pbrd.")} == {
        "pbrd.arguments",
        "pbrd.cli",
        "pbrd.client",
        "pbrd.errors",
        "pbrd.printable",
        "pbrd.stdio",
        "pbrd.tables",
        "pbrd.varlink",
    }
    assert not imported & {
        "asyncio",
        "pyroute2",
        "structlog",
        "rich",
        "logging",
        "pathlib",
        "subprocess",
        "shutil",
    }


# status --watch


def test_watch_prints_one_status_after_the_other_into_a_pipe(fake: Daemon) -> None:
    process = watching(fake)
    lines = [process.stdout.readline() for _ in range(14)]  # type: ignore[union-attr]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")
    text = "".join(lines) + rest
    assert text.count("UPLINK") >= 2
    assert "HISTORY" in text
    assert "██" in text
    assert "\x1b" not in text


def test_watch_notes_one_round_trip_a_second_however_often_the_status_changes() -> None:
    histories = Histories()
    for now in (100.0, 100.01, 100.6, 101.0, 101.3, 102.1):
        histories.add(DOCUMENT, now)
    assert list(histories.values["fiber"]) == [11.2] * 3


def test_watch_json_is_one_document_a_line(fake: Daemon) -> None:
    process = watching(fake, "--json")
    assert process.stdout is not None
    assert [json.loads(process.stdout.readline()) for _ in range(2)] == [DOCUMENT] * 2
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def test_watch_waits_for_a_daemon_that_went_away_but_not_for_one_that_never_was(fake: Daemon) -> None:
    assert pbrd("status", "--watch", "--runtime-dir", "/nowhere").returncode == 3
    process = watching(fake, "--json")
    assert process.stdout is not None
    process.stdout.readline()
    fake.stop()
    while not (told := json.loads(process.stdout.readline())).get("error"):
        pass
    assert "waiting" in told["error"]
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_watch_draws_in_place_and_leaves_the_terminal_as_it_was(
    fake: Daemon, number: signal.Signals, code: int
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 4, 80, 0, 0))
    command = [sys.executable, "-m", "pbrd", "status", "--watch", "--runtime-dir", str(fake.runtime)]
    process = subprocess.Popen(command, stdout=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while shown.count(b"\x1b[H") < 2:
        shown += os.read(ours, 4096)
    process.send_signal(number)
    assert process.wait(10) == code
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # EIO: the other end is closed
        os.close(ours)
    assert shown.startswith(b"\x1b[?1049h")
    assert shown.endswith(b"\x1b[?1049l")
    first = shown.split(b"\x1b[H")[1]
    assert first.count(b"\r\n") == 3  # four lines, and no more, on a terminal of four


def watching(fake: Daemon, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "pbrd",
        "status",
        "--watch",
        *arguments,
        "--runtime-dir",
        str(fake.runtime),
    ]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    )


# plan, reload, flush


def test_plan_prints_the_steps_and_is_4(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["Plan"] = {"steps": ["rule  add priority 10900", "route del default"]}
    assert cli.main(["plan", "--runtime-dir", str(fake.runtime)]) == 4
    assert capsys.readouterr().out == "rule  add priority 10900\nroute del default\n"
    assert fake.asked == [("Plan", {})]


def test_plan_without_changes_is_0(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--runtime-dir", str(fake.runtime)]) == 0
    assert capsys.readouterr().out == "nothing to change\n"


def test_plan_reads_another_config_itself(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    file = fake.runtime / "new.toml"
    file.write_text("[uplinks.a]\n")
    assert cli.main(["plan", "--config", str(file), "--runtime-dir", str(fake.runtime)]) == 78
    assert f"{file}: uplinks.a" in capsys.readouterr().err
    assert ("Plan", {"config": str(file)}) not in fake.asked


def test_plan_shows_the_table_and_what_to_mind(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["nft   add table inet pbrd (2 lines)"]
    fake.answers["Plan"] = {"steps": steps, "table": "table\n{}\n", "remarks": ["mind"]}
    assert cli.main(["plan", "-v", "--runtime-dir", str(fake.runtime)]) == 4
    assert fake.asked == [("Plan", {"table": True})]
    assert capsys.readouterr() == (steps[0] + "\ntable\n{}\n", "warning: mind\n")


def test_reload_prints_what_changed(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reload", "--runtime-dir", str(fake.runtime)]) == 0
    assert capsys.readouterr().out == "nothing changed\n"
    fake.answers["Reload"] = {"changed": ["rule  add priority 11000"], "generation": 3}
    assert cli.main(["reload", "--runtime-dir", str(fake.runtime)]) == 0
    assert capsys.readouterr().out == "rule  add priority 11000\n"
    fake.answers["Reload"] = {"changed": ["rule"], "config": ["config: policy web: via"], "generation": 4}
    assert cli.main(["reload", "--runtime-dir", str(fake.runtime)]) == 0
    assert capsys.readouterr().out == "config: policy web: via\nrule\n"


@pytest.mark.parametrize("command", ["reload", "plan"])
def test_an_invalid_config_is_78_and_every_problem_a_line(
    fake: Daemon, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers[command.capitalize()] = ConfigError(PROBLEMS)
    assert cli.main([command, "--runtime-dir", str(fake.runtime)]) == 78
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "a.toml: uplinks.x: wrong\nb.toml: worse\n")


def test_what_fails_in_the_daemon_is_1(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["Flush"] = KernelError("cannot delete the rule: no")
    assert cli.main(["flush", "--runtime-dir", str(fake.runtime)]) == 1
    assert capsys.readouterr().err == "pbrd: cannot delete the rule: no\n"


def test_flush_says_last_that_the_daemon_is_paused(fake: Daemon) -> None:
    fake.answers["Flush"] = {"removed": ["rule 1", "rule 2"], "remarks": ["open"]}
    command = f"{sys.executable} -m pbrd flush --runtime-dir {fake.runtime} 2>&1"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30, check=True)
    assert shown.stdout.splitlines()[-2:] == ["warning: open", "the daemon is paused until `pbrd reload`"]


def test_flush_prints_what_was_removed(fake: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flush", "--runtime-dir", str(fake.runtime)]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("nothing to remove\n", "the daemon is paused until `pbrd reload`\n")


# check


def test_check_sums_up_a_good_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pbrd.toml"
    file.write_text(CONFIG)
    for arguments in ([str(file)], ["--config", str(file)], [str(file), "--config", str(file)]):
        assert cli.main(["check", *arguments]) == 0
        assert capsys.readouterr().out.startswith(f"{file} is valid: 1 uplink, 1 policy")
    assert cli.main(["check", str(file), "--config", "other"]) == 2


def test_check_names_metered_uplinks_and_says_what_the_rules_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pbrd.toml"
    file.write_text(CONFIG.replace('"eth0"', '"eth0"\nmetered = true'))
    assert cli.main(["check", str(file)]) == 0
    assert capsys.readouterr().out == (
        f"{file} is valid: 1 uplink (fiber metered), 1 policy, 13 rules over both families: "
        "a forwarded packet walks at most 7 of them, about 120 ns\n"
    )


@pytest.mark.parametrize("command", ["drain", "undrain"])
def test_drain_prints_what_it_means(fake: Daemon, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers[command.capitalize()] = {"remarks": ["one", "two"]}
    assert cli.main([command, "lte", "--runtime-dir", str(fake.runtime)]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert fake.asked == [(command.capitalize(), {"uplink": "lte"})]


def test_check_names_every_problem_and_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pbrd.toml"
    file.write_text(CONFIG.replace('"eth0"', '"eth0"\ntable = 254').replace('["fiber"]', '["fibre"]'))
    assert cli.main(["check", str(file)]) == 78
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.startswith(f"{file}: ") for line in shown.err.splitlines()] == [True, True]
    assert cli.main(["check", str(tmp_path / "absent.toml")]) == 78


# Who may


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run --config 'my config'", "cannot run the daemon"),
        ("plan", "cannot plan without a running daemon"),
        ("flush", "cannot flush"),
    ],
)
def test_who_is_not_root_is_told_so(command: str, told: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = f"{command} --runtime-dir /nowhere"
    assert told_nobody(shlex.split(arguments)) == 1
    assert capfd.readouterr().err == f"pbrd: {told}: only root may (try: sudo pbrd {arguments})\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_reader_may_not_reload(fake: Daemon, capfd: pytest.CaptureFixture[str]) -> None:
    let_others_in(fake.runtime)
    os.chown(fake.runtime / "pbrd.sock", -1, 65534)  # as if nobody were in group pbrd
    (fake.runtime / "pbrd.sock").chmod(0o660)
    assert told_nobody(["status", "--runtime-dir", str(fake.runtime)]) == 0
    assert told_nobody(["--runtime-dir", str(fake.runtime), "reload"]) == 1
    again = f"sudo pbrd --runtime-dir {fake.runtime} reload"
    assert capfd.readouterr().err == f"pbrd: cannot reload: only root may (try: {again})\n"


def told_nobody(arguments: list[str]) -> int:
    """Run a command as nobody."""
    assert tables
    parser().format_help()
    return as_nobody(lambda: cli.main(arguments))


def test_ctrl_c_is_quiet_and_130(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "pbrd.sock"))
        silent.listen()
        command = [sys.executable, "-m", "pbrd", "status", "--runtime-dir", str(tmp_path)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        silent.settimeout(10)
        connection, _ = silent.accept()
        connection.recv(1)  # the client has asked, and waits
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[1] == ""
        assert process.returncode == 130
