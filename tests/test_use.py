import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import ROOT, eventually, let_others_in

from pbrd import netns
from pbrd.cgroups import hierarchy, paths_of
from pbrd.errors import PbrdError
from pbrd.netns import Namespace
from pbrd.units import CGroup, file, slice_of, slice_path
from pbrd.use import SYSTEMD, doubts, main, scope_command

numbers = itertools.count()
Process = subprocess.Popen[str]
Run = Callable[..., Process]


class Answerer:
    """Answers `Status` on a control socket: uplinks, and the slices that a ruleset would hold now."""

    def __init__(self, directory: Path, uplink: str) -> None:
        self.uplink, self.state = uplink, "up"
        self.delay = 2  # asked so often before it knows a slice
        self.routes_slices = True
        self.cgroups: tuple[CGroup, ...] = ()
        self.new = threading.Event()  # set when it has taken in a slice
        self._seen: dict[int, int] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(directory / "pbrd.sock"))
        self._socket.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                while not client.recv(1 << 16).endswith(b"\0"):
                    pass
                client.sendall(json.dumps({"parameters": self._status()}).encode() + b"\0")

    def _status(self) -> dict[str, object]:
        one: dict[str, object] = {"name": self.uplink, "state": self.state}
        if self.routes_slices:
            name = slice_of(self.uplink)
            self.cgroups = paths_of([name])[name]
            for cgroup in self.cgroups:
                self._seen[cgroup.id] = self._seen.get(cgroup.id, 0) + 1
            one["cgroups"] = [number for number, times in self._seen.items() if times > self.delay]
        return {"uplinks": [one, {"name": "fiber", "state": "up", "cgroups": []}]}

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def daemon_answers(tmp_path: Path) -> Iterator[Answerer]:
    try:
        root = hierarchy().root
    except PbrdError as error:
        pytest.skip(str(error))
    if not os.access(root, os.W_OK) or os.path.isdir(SYSTEMD):
        pytest.skip("needs a cgroup2 hierarchy that can be written to, and no systemd that owns it")
    # with a dash, so that its slice is nested
    answerer = Answerer(tmp_path, f"pbrd-test-{os.getpid()}-{next(numbers)}")
    yield answerer
    answerer.close()


@pytest.fixture
def use(daemon_answers: Answerer, tmp_path: Path) -> Iterator[Run]:
    """Start `pbrd use` with a command; what still runs is ended with the test."""
    started: list[Process] = []

    def run(*argv: str, uplink: str = "", **popen: object) -> Process:
        code = "import sys; from pbrd.use import main; sys.exit(main(sys.argv[1], sys.argv[3:], sys.argv[2]))"
        command = [sys.executable, "-c", code, uplink or daemon_answers.uplink, str(tmp_path), *argv]
        child: Process = subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            **popen,  # type: ignore[call-overload]
        )
        started.append(child)
        return child

    yield run
    for child in started:
        child.kill()
        child.communicate()


def slice_directory(uplink: str) -> Path:
    return hierarchy().root / slice_path(slice_of(uplink))


def finished(child: Process) -> tuple[int, str, str]:
    output, errors = child.communicate(timeout=20)
    return child.returncode, output, errors


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 4"], 4),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "exit 78"], 78),
    ],
)
def test_the_exit_code_is_that_of_the_command(use: Run, argv: Sequence[str], code: int) -> None:
    assert finished(use(*argv)) == (code, "", "")


def test_the_command_runs_in_the_slice_of_the_uplink_and_nothing_is_left(
    use: Run, daemon_answers: Answerer
) -> None:
    path = slice_path(slice_of(daemon_answers.uplink))
    code, output, _ = finished(use("cat", "/proc/self/cgroup"))
    assert code == 0
    scope = next(line for line in output.splitlines() if line.startswith("0::"))
    assert scope.startswith(f"0::/{path}/pbrd-use-")
    assert scope.endswith(".scope")
    assert path.startswith("uplink.slice/uplink-pbrd.slice/uplink-pbrd-test.slice/")
    assert not slice_directory(daemon_answers.uplink).exists()


def test_a_doubtful_uplink_is_used_with_a_word_on_standard_error(use: Run, daemon_answers: Answerer) -> None:
    name, daemon_answers.state = daemon_answers.uplink, "drained"
    assert finished(use("echo", "done")) == (
        0,
        "done\n",
        f"pbrd: {name} is drained: nothing can leave there until `pbrd undrain {name}`\n",
    )


@pytest.mark.parametrize(
    ("uplink", "active", "words"),
    [
        ({"state": "up", "nat": True, "ipv4": {}}, "fiber", []),
        ({"state": "degraded"}, "fiber", []),  # an older daemon says nothing of nat
        ({"state": "down", "reason": "probes"}, "fiber",
         ["lte is down (probes): nothing can leave there until it is up"]),
        ({"state": "up", "nat": False, "ipv4": {"gateway": "10.0.0.1"}}, "fiber",
         ["lte has no nat: programs that bind no address may send with that of another uplink; "
          "set nat = true in [uplinks.lte]"]),
        ({"state": "up", "nat": False, "ipv4": {"gateway": "10.0.0.1"}}, "lte", []),
        ({"state": "up", "nat": False, "ipv4": None}, "fiber", []),
    ],
)  # fmt: skip
def test_doubts_are_about_what_keeps_traffic_from_getting_out(
    uplink: dict[str, object], active: str, words: list[str]
) -> None:
    status = {"uplinks": [{"name": "lte", **uplink}], "policies": [{"name": "default", "active": active}]}
    assert list(doubts("lte", status)) == words


def test_its_first_packet_is_matched_already(use: Run, daemon_answers: Answerer, no_lab: str) -> None:
    if no_lab:
        pytest.skip(f"no lab here: {no_lab}")
    name = f"pbrd-{os.getpid()}-use{next(numbers)}"
    netns.create([name])
    space = Namespace(name)
    try:
        space.ip("link set dev lo up")
        space.nft("table inet t { chain o { type filter hook output priority 0; }; }")
        daemon_answers.delay = 10**9  # it knows the slice when this test has loaded the rule
        with netns.inside(name):
            child = use("ping", "-c", "1", "-W", "1", "127.0.0.1")
        [cgroup] = eventually(lambda: daemon_answers.cgroups)
        space.nft(f'add rule inet t o socket cgroupv2 level {cgroup.level} "{file(cgroup)}" counter')
        daemon_answers.delay = 0
        assert finished(child)[0] == 0
        assert "counter packets 1 " in space.nft("list chain inet t o")
    finally:
        space.close()
        netns.remove([name])


def test_the_command_has_the_terminal_streams_and_the_environment(use: Run) -> None:
    child = use("sh", "-c", "cat; echo $HOME >&2", stdin=subprocess.PIPE)
    output, errors = child.communicate("typed\n", timeout=20)
    assert (output, errors) == ("typed\n", f"{os.environ.get('HOME', '')}\n")


def test_a_broken_pipe_ends_the_command_as_usual(use: Run) -> None:
    assert finished(use("sh", "-c", "yes | head -n 1")) == (0, "y\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(use: Run, number: int) -> None:
    name = signal.Signals(number).name.removeprefix("SIG")
    child = use(
        "sh", "-c", f"trap 'echo got {name}; exit 5' {name}; echo ready; while :; do sleep 0.05; done"
    )
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert finished(child)[:2] == (5, f"got {name}\n")


def test_what_the_command_leaves_running_stays_on_the_uplink(use: Run, daemon_answers: Answerer) -> None:
    code, output, _ = finished(use("sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"))
    assert code == 0
    pid = int(output)
    try:
        scopes = list(slice_directory(daemon_answers.uplink).glob("pbrd-use-*.scope"))
        assert [(one / "cgroup.procs").read_text() for one in scopes] == [f"{pid}\n"]
    finally:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: (scopes[0] / "cgroup.procs").read_text() == "")
    assert finished(use("true"))[0] == 0
    assert not slice_directory(daemon_answers.uplink).exists()  # the next one has cleared up


def test_several_at_once_do_not_disturb_each_other(use: Run, daemon_answers: Answerer) -> None:
    children = [use("sh", "-c", f"sleep 0.0{number}; exit {number}") for number in range(6)]
    assert [finished(child)[0] for child in children] == list(range(6))
    assert not slice_directory(daemon_answers.uplink).exists()


def test_a_command_that_is_not_there(use: Run, tmp_path: Path) -> None:
    assert finished(use("no-such-command")) == (127, "", "pbrd: cannot run no-such-command: not found\n")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert finished(use(str(plain))) == (126, "", f"pbrd: cannot run {plain}: not executable\n")


def refusal(tmp_path: Path, uplink: str) -> str:
    with pytest.raises(PbrdError) as caught:
        main(uplink, ["true"], str(tmp_path))
    return str(caught.value)


def test_an_uplink_that_is_not_there_or_disabled(tmp_path: Path, daemon_answers: Answerer) -> None:
    wanted = 'cannot use "fibre": no uplink is called that (did you mean "fiber"?)'
    assert refusal(tmp_path, "fibre") == wanted
    daemon_answers.state = "disabled"
    uplink = daemon_answers.uplink
    assert refusal(tmp_path, uplink) == f"cannot use {uplink}: it is disabled in the config"


def test_nothing_runs_before_the_daemon_knows_the_slice(
    use: Run, daemon_answers: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbrd.use.KNOWN_WITHIN", 0.1)
    daemon_answers.delay = 10**9
    uplink = daemon_answers.uplink
    touched = tmp_path / "touched"
    with pytest.raises(PbrdError) as caught:
        main(uplink, ["touch", str(touched)], str(tmp_path))
    assert str(caught.value) == (
        f"cannot use {uplink}: the daemon has not taken in {slice_of(uplink)} within 0.1 s"
    )
    daemon_answers.routes_slices = False
    assert refusal(tmp_path, uplink) == f"cannot use {uplink}: the running daemon doesn't route slices"
    assert not touched.exists()
    assert not slice_directory(uplink).exists()


def test_without_systemd_it_takes_root(daemon_answers: Answerer, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    (let_others_in(tmp_path) / "pbrd.sock").chmod(0o666)
    code = (
        "import os, sys; from pbrd.use import main\n"
        "os.setgroups([]); os.setresuid(65534, 65534, 65534)\n"
        "try: main(sys.argv[1], ['true'], sys.argv[2])\n"
        "except Exception as error: print(error)"
    )
    command = [sys.executable, "-c", code, daemon_answers.uplink, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.startswith(f"cannot use {daemon_answers.uplink}: cannot make "), done.stderr
    assert done.stdout.endswith(": Permission denied; without systemd only root may\n")


def test_under_systemd_it_becomes_a_scope_of_the_system_or_the_user() -> None:
    assert scope_command("lte", ["curl", "-4", "x"], ["--user"]) == [
        *("systemd-run", "--user", "--scope", "--quiet", "--collect", "--slice=uplink-lte.slice"),
        *("--", "curl", "-4", "x"),
    ]  # fmt: skip
