"""The Debian package, `make install`, man pages and completions: made, looked at, and lived with in a box."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from box import Box, python
from conftest import HEAD, PROBE, UPLINKS, Leaving, MakeLab, eventually

from pbrd.arguments import parser
from pbrd.lab import LAN, Lab

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = ROOT / "packaging"
WHEELS = ROOT / "build" / "wheels"
OLD, NEW = "0.1.0~test1-1", "0.1.0~test2-1"
CONFIG = HEAD.replace('names = ""', "") + PROBE + UPLINKS
POLICY = f'[[policies]]\nname = "client"\nmatch = {{ from = ["{LAN[0]}"] }}\nvia = ["lte", "fiber"]\n'
MakeBox = Callable[..., Box]


def done(argv: Sequence[str | Path], **more: object) -> str:
    """Run it to its end and return what it printed; fail with its errors."""
    environment = os.environ | {key: str(value) for key, value in more.items()}
    result = subprocess.run(argv, check=False, text=True, capture_output=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def once(tmp_path_factory: pytest.TempPathFactory, make: Callable[[Path], None]) -> Path:
    """Return a directory that `make` has filled, once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place = base / make.__name__
    with (base / f"{make.__name__}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            draft = base / f"{make.__name__}.new"
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            make(draft)
            draft.rename(place)
    return place


@pytest.fixture(scope="session")
def wheels() -> Path:
    """What the lock file pins; fetched if need be."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    with (WHEELS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetched = subprocess.run(
            [PACKAGING / "fetch", WHEELS, sys.executable], check=False, text=True, capture_output=True
        )
    if fetched.returncode:
        pytest.skip(f"the pinned packages cannot be fetched: {fetched.stderr.strip()[-200:]}")
    return WHEELS


@pytest.fixture(scope="session")
def debs(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A directory with the package: old.deb, the same built again, and a newer version."""
    missing = [tool for tool in ("dpkg-buildpackage", "dh", "dh_python3") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: `make deb` installs what building takes")

    def deb(to: Path) -> None:
        source = (
            to / "source"
        )  # a copy without git, as in a released archive, and which nobody changes meanwhile
        for name in ("docs", "etc", "packaging", "pbrd", "systemd", "tools"):
            shutil.copytree(ROOT / name, source / name)
        for name in ("CHANGELOG.md", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, source)
        for name in ("old", "again"):
            built = done([source / "packaging/build-deb"], VERSION=OLD, DIST=to / "dist", WHEELS=wheels)
            Path(built.strip()).rename(to / f"{name}.deb")
        unpacked = to / "new"
        done(["dpkg-deb", "--raw-extract", to / "old.deb", unpacked])
        for file in (unpacked / "DEBIAN/control", unpacked / "usr/lib/pbrd/pbrd/__init__.py"):
            file.write_text(file.read_text().replace(OLD, NEW).replace('"0.1.0"', '"0.1.1"'))
        done(["dpkg-deb", "--root-owner-group", "--build", unpacked, to / "new.deb"])

    return once(tmp_path_factory, deb)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the man pages and the completions."""

    def page(to: Path) -> None:
        done([sys.executable, PACKAGING / "manpages.py", to])
        done([sys.executable, PACKAGING / "completions.py", to])

    return once(tmp_path_factory, page)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield each command with its long options, as `--help` shows them to people."""
    overview = parser().format_help()
    for name in re.findall(r"^    (\w+)", overview.partition("commands:")[2].partition("\n\n")[0], re.M):
        shown = subprocess.run(
            [sys.executable, "-m", "pbrd", name, "--help"],
            check=True,
            text=True,
            capture_output=True,
            cwd=ROOT,
        ).stdout
        yield name, re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.M)


# The man pages


def test_the_man_page_has_every_command_and_option(pages: Path) -> None:
    text = (pages / "pbrd.1").read_text().replace("\\-", "-")
    found = list(commands())
    assert {"run", "status", "drain"} < {name for name, _ in found}
    for name, options in found:
        assert f'.SS "pbrd {name}' in text
        assert all(f"\\fB{option}\\fR" in text for option in options), (name, options)


def test_the_man_page_of_the_config_has_every_key(pages: Path) -> None:
    text = (pages / "pbrd.toml.5").read_text().replace("\\-", "-")
    keys = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "config.md").read_text(), re.M)
    assert len(keys) > 40
    assert [key for key in keys if f"\\fB{key}\\fR" not in text] == []


@pytest.mark.skipif(not shutil.which("man"), reason="man is not installed")
@pytest.mark.parametrize("page", ["pbrd.1", "pbrd.toml.5", "pbrd-events.7", "pbrd.service.8"])
def test_a_man_page_is_shown_without_warnings(pages: Path, page: str) -> None:
    shown = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", pages / page],
        check=True,
        text=True,
        capture_output=True,
        env=os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MAN_KEEP_FORMATTING": "", "PAGER": "cat"},
    )
    assert shown.stderr == ""
    text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", shown.stdout)
    assert "SEE ALSO" in text
    assert not re.search(r"\*\*|\]\(|\\f|^```", text, re.M)  # no Markdown and no roff is left over


# The completions


def completed(pages: Path, line: str, directory: str = "/") -> list[str]:
    """Return what bash offers for the last word of `line`."""
    script = (
        'source "$1"; cd "$2"; shift 2; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _pbrd; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    words = [*line.split(" ")]
    return done(["bash", "-c", script, "bash", pages / "pbrd", directory, *words]).split()


def test_bash_completes_every_command_and_option(pages: Path) -> None:
    offered = completed(pages, "pbrd ")
    for name, options in commands():
        assert name in offered
        assert set(options) <= set(completed(pages, f"pbrd {name} --")), name


def test_bash_completes_files_directories_and_commands(pages: Path, tmp_path: Path) -> None:
    (tmp_path / "here.toml").touch()
    (tmp_path / "herein").mkdir()
    assert sorted(completed(pages, "pbrd check her", str(tmp_path))) == ["here.toml", "herein"]
    assert sorted(completed(pages, "pbrd run --config her", str(tmp_path))) == ["here.toml", "herein"]
    assert completed(pages, "pbrd --runtime-dir her", str(tmp_path)) == ["herein"]
    assert "bash" in completed(pages, "pbrd use lte -- bas")


def test_every_shell_completes_the_uplinks_of_the_running_daemon(
    pages: Path,
    make_lab: MakeLab,
    daemon: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = daemon(make_lab(), HEAD + PROBE + UPLINKS)
    command = tmp_path / "bin" / "pbrd"
    command.parent.mkdir()
    runtime = running.runtime  # type: ignore[attr-defined]
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m pbrd --runtime-dir {runtime} "$@"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    assert sorted(completed(pages, "pbrd drain ")) == ["fiber", "lte"]
    assert completed(pages, "pbrd use l") == ["lte"]
    if shutil.which("fish"):
        script = f"source {pages / 'pbrd.fish'}; complete -C 'pbrd drain '"
        assert sorted(done(["fish", "--no-config", "-c", script]).split()) == ["fiber", "lte"]
    if shutil.which("zsh"):
        assert done(["zsh", "-f", "-n", pages / "_pbrd"]) == ""


# make install


def test_install_writes_below_destdir_and_uninstall_takes_all_away(wheels: Path, tmp_path: Path) -> None:
    place = tmp_path / "root"
    setting = {"DESTDIR": place, "PREFIX": "/usr", "PYTHON": sys.executable, "WHEELS": wheels}
    done([PACKAGING / "install"], **setting)
    assert (place / "usr/bin/pbrd").read_text().startswith(f"#!{sys.executable} -I")
    assert "ExecStart=/usr/bin/pbrd run" in (place / "usr/lib/systemd/system/pbrd.service").read_text()
    (place / "etc/pbrd/pbrd.toml").write_text("mine")
    done([PACKAGING / "install", "--remove"], **setting)
    assert [path for path in place.rglob("*") if path.is_file()] == [place / "etc/pbrd/pbrd.toml"]


def test_what_is_installed_starts_without_the_environment(wheels: Path, tmp_path: Path) -> None:
    setting = {"DESTDIR": tmp_path, "PREFIX": "/usr", "PYTHON": sys.executable, "WHEELS": wheels}
    done([PACKAGING / "install"], **setting)
    launcher = tmp_path / "usr/bin/pbrd"
    launcher.write_text(launcher.read_text().replace('"/usr/lib', f'"{tmp_path}/usr/lib'))
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "argparse.py").write_text("raise SystemExit(99)")
    config = tmp_path / "etc/pbrd/pbrd.toml"
    shutil.copy(ROOT / "etc" / "pbrd.toml", config)
    checked = done([launcher, "check", config], PYTHONPATH=tmp_path / "trap")
    assert "3 uplinks" in checked


def test_install_builds_systemd_python_for_a_python_that_has_none(wheels: Path, tmp_path: Path) -> None:
    plain = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}"
    code = f"import sys; sys.path.insert(0, '{tmp_path}/usr/lib/pbrd'); import systemd.journal"
    check: list[str | Path] = [plain, "-IB", "-c", code]
    if not plain.exists() or not subprocess.run(check, check=False, capture_output=True).returncode:
        pytest.skip(f"{plain} has systemd-python already")
    setting = {"DESTDIR": str(tmp_path), "PREFIX": "/usr", "PYTHON": str(plain), "WHEELS": str(wheels)}
    installed = subprocess.run(
        [PACKAGING / "install"], check=True, text=True, capture_output=True, env={**os.environ, **setting}
    )
    if "no systemd-python" in installed.stderr:
        assert not (tmp_path / "usr/lib/pbrd/systemd").exists()
        pytest.skip("systemd-python cannot be built here")
    done([plain, "-ISB", "-c", code])


# The package


def test_the_package_says_what_it_needs_and_holds_all_of_it(debs: Path) -> None:
    control = done(["dpkg-deb", "--field", debs / "old.deb"])
    assert f"Version: {OLD}\nArchitecture: all\n" in control
    assert re.search(r"^Depends: .*python3 \(>= 3.11\)", control, re.M)
    assert re.search(r"^Recommends: .*python3-systemd", control, re.M)
    held = {
        line.split(maxsplit=5)[5] for line in done(["dpkg-deb", "--contents", debs / "old.deb"]).splitlines()
    }
    assert {f"./usr/lib/pbrd/pbrd/{path.name}" for path in (ROOT / "pbrd").glob("*.py")} <= held
    assert {
        "./usr/bin/pbrd",
        "./usr/lib/pbrd/pyroute2/__init__.py",
        "./usr/lib/pbrd/pbrd/io.pbrd.Daemon.varlink",
        "./usr/lib/systemd/system/pbrd.service",
        "./usr/lib/systemd/networkd.conf.d/10-pbrd.conf",
        "./usr/lib/systemd/catalog/pbrd.catalog",
        "./usr/lib/sysusers.d/pbrd.conf",
        "./usr/share/bash-completion/completions/pbrd",
        "./usr/share/zsh/vendor-completions/_pbrd",
        "./usr/share/fish/vendor_completions.d/pbrd.fish",
        "./usr/share/man/man1/pbrd.1.gz",
        "./usr/share/man/man5/pbrd.toml.5.gz",
        "./usr/share/man/man7/pbrd-events.7.gz",
        "./usr/share/man/man8/pbrd.service.8.gz",
        "./usr/share/doc/pbrd/copyright",
        "./usr/share/doc/pbrd/examples/pbrd.toml",
        "./etc/pbrd/conf.d/",
    } <= held
    assert [path for path in held if re.search(r"\.pyc$|^\./etc/.*[^/]$", path)] == []


def test_the_same_sources_make_the_same_package(debs: Path) -> None:
    assert (debs / "old.deb").read_bytes() == (debs / "again.deb").read_bytes()


@pytest.mark.skipif(not shutil.which("lintian"), reason="lintian is not installed")
def test_lintian_has_nothing_to_say(debs: Path) -> None:
    options = ["--display-info", "--pedantic", "--fail-on", "error,warning,info,pedantic", "--allow-root"]
    judged = subprocess.run(
        ["lintian", *options, debs / "old.deb"], check=False, text=True, capture_output=True
    )
    # One that lintian has had until Debian 12 only; to override it, where it is unknown, is an error.
    aside = "I: pbrd: package-supports-alternative-init-but-no-init.d-script"
    found = [line for line in judged.stdout.splitlines() if not line.startswith(aside)]
    assert found == [], judged.stderr


# A machine's life with it


@pytest.fixture
def machine(make_lab: MakeLab, make_box: MakeBox, debs: Path) -> tuple[Lab, Box]:
    """A box in a lab's router that can install the packages."""
    lab = make_lab()
    allowed = {"/usr/sbin/policy-rc.d": "#!/bin/sh\nexit 0\n"}  # this machine's may forbid starting services
    box = make_box(allowed, network=lab.router, source=False, binds={"/debs": debs})
    registered = [f"/etc/iproute2/rt_{kind}.d/pbrd.conf" for kind in ("tables", "protos")]  # on this machine
    # Indexing all man pages takes longer than all else.
    box.enter(["rm", "-f", "/var/lib/man-db/auto-update", *registered])
    return lab, box


def dpkg(box: Box, *arguments: str) -> str:
    """Run dpkg and return all that was printed."""
    ran = box.enter(["env", "LC_ALL=C.UTF-8", "dpkg", *arguments], check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def kernel(lab: Lab) -> str:
    """Rules, routes, nftables and the sysctls that pbrd may touch, as the tools show them."""
    show = (
        "ip -N rule; ip -N -6 rule; ip -N route show table all; ip -N -6 route show table all; "
        "nft list ruleset; sysctl -a 2>/dev/null -r 'rp_filter|linkdown|src_valid_mark'"
    )
    return re.sub(r"expires \d+sec", "", lab.run(lab.router, "sh", "-c", show).stdout)


def files(box: Box) -> set[str]:
    """What lies below /etc and /usr, and what elsewhere is called pbrd, but for the users' databases."""
    found = box.enter(["find", "/etc", "/usr", "/var", "/run", "/opt", "-xdev"]).stdout.splitlines()
    ours = {path for path in found if re.match("/(etc|usr)/", path) or "pbrd" in path}
    return {
        path for path in ours if not re.match(r"/etc/\.?(g?shadow|group|passwd|pwd)|.*/(apt|dpkg)/", path)
    }


def up(box: Box) -> bool:
    status = box.enter(["pbrd", "status", "--json"], check=False).stdout
    return status.count('"state": "up"') >= 2


def test_installing_starts_nothing(machine: tuple[Lab, Box]) -> None:
    lab, box = machine
    before = kernel(lab)
    box.enter(["apt-get", "-y", "-q", "-o", "Dpkg::Use-Pty=0", "install", "/debs/old.deb"], timeout=300)
    assert box.show("pbrd.service", "LoadState", "ActiveState", "UnitFileState") == {
        "LoadState": "loaded",
        "ActiveState": "inactive",
        "UnitFileState": "disabled",
    }
    assert kernel(lab) == before
    assert box.enter(["getent", "group", "pbrd"]).stdout.startswith("pbrd:")
    assert box.enter(["pbrd", "status"], check=False).returncode == 3
    assert box.enter(["man", "-w", "pbrd", "pbrd.toml", "pbrd.service"]).stdout.count("\n") == 3
    assert "pbrd" in box.enter(["journalctl", "--dump-catalog"]).stdout
    merged = box.enter(["systemd-analyze", "cat-config", "systemd/networkd.conf"]).stdout
    assert "\nManageForeignRoutingPolicyRules=no\n" in merged


def test_an_upgrade_replaces_the_daemon_without_a_lost_packet(machine: tuple[Lab, Box]) -> None:
    lab, box = machine
    dpkg(box, "--install", "/debs/old.deb")
    box.write({"/etc/pbrd/pbrd.toml": CONFIG + POLICY})
    box.enter(["systemctl", "enable", "--now", "pbrd"])
    eventually(lambda: up(box), within=15)
    rules, first = lab.run(lab.router, "ip", "rule").stdout, box.show("pbrd.service", "MainPID")
    leaving = Leaving(lab)
    assert "not restarted" not in dpkg(box, "--install", "/debs/new.deb")
    eventually(lambda: up(box), within=15)
    path, lost = leaving.stop()
    assert (set(path), lost) == ({"lte"}, 0)
    assert box.show("pbrd.service", "MainPID") != first
    assert '"version": "0.1.1"' in box.enter(["pbrd", "status", "--json"]).stdout
    assert lab.run(lab.router, "ip", "rule").stdout == rules
    assert box.show("pbrd.service", "UnitFileState") == {"UnitFileState": "enabled"}


def test_events_are_read_by_the_distributions_library_and_nothing_else_of_it(
    machine: tuple[Lab, Box],
) -> None:
    _, box = machine
    if box.enter(["dpkg", "--status", "python3-systemd"], check=False).returncode:
        pytest.skip("python3-systemd is not installed: `make setup` installs it")
    dpkg(box, "--install", "/debs/old.deb")
    box.write({"/etc/pbrd/pbrd.toml": CONFIG})
    box.enter(["systemctl", "start", "pbrd"])
    box.enter(["journalctl", "--sync"])
    told = box.run(["pbrd", "events", "--json"])
    assert (json.loads(told.stdout.splitlines()[0])["event"], told.stderr) == ("started", "")
    code = (
        "import sys; sys.path.insert(0, '/usr/lib/pbrd')\n"
        "import importlib.util, structlog, systemd.journal\n"
        "print(structlog.__file__, systemd.journal.__file__, importlib.util.find_spec('apt_pkg'), sys.path)"
    )
    ours, theirs, other, path = box.enter(["/usr/bin/python3", "-IBS", "-c", code]).stdout.split(maxsplit=3)
    assert ours == "/usr/lib/pbrd/structlog/__init__.py"
    assert theirs == "/usr/lib/pbrd/systemd/journal.py"
    assert (other, "dist-packages" in path) == ("None", False)
    dpkg(box, "--remove", "python3-systemd")
    told = box.run(["pbrd", "events", "--json"])
    assert json.loads(told.stdout.splitlines()[0])["event"] == "started"
    assert "install python3-systemd" in told.stderr


def test_an_upgrade_keeps_the_daemon_whose_config_the_new_version_refuses(machine: tuple[Lab, Box]) -> None:
    _, box = machine
    dpkg(box, "--install", "/debs/old.deb")
    box.write({"/etc/pbrd/pbrd.toml": CONFIG})
    box.enter(["systemctl", "start", "pbrd"])
    first = box.show("pbrd.service", "MainPID")
    box.write({"/etc/pbrd/pbrd.toml": CONFIG + "[nonsense]\n"})
    said = dpkg(box, "--install", "/debs/new.deb")
    assert "not restarted" in said
    assert "nonsense" in said
    assert box.show("pbrd.service", "MainPID") == first
    box.enter(["systemctl", "stop", "pbrd"])
    dpkg(box, "--install", "/debs/new.deb")
    assert box.show("pbrd.service", "ActiveState") == {"ActiveState": "inactive"}


def test_an_upgrade_judges_the_config_that_the_daemon_has(machine: tuple[Lab, Box]) -> None:
    _, box = machine
    own = "[Service]\nExecStart=\nExecStart=/usr/bin/pbrd run --config /etc/pbrd/own.toml\n"
    box.write({"/etc/systemd/system/pbrd.service.d/own.conf": own, "/etc/pbrd/own.toml": CONFIG})
    dpkg(box, "--install", "/debs/old.deb")
    box.enter(["systemctl", "start", "pbrd"])
    first = box.show("pbrd.service", "MainPID")
    for break_it, why in (
        ("echo nonsense >>/etc/pbrd/own.toml", "/etc/pbrd/own.toml: line"),
        ("rm /etc/pbrd/own.toml", "/etc/pbrd/own.toml: there is no such file"),
    ):
        box.enter(["sh", "-ec", break_it])
        said = dpkg(box, "--install", "/debs/new.deb")
        assert "pbrd: not restarted" in said
        assert why in said
        assert box.show("pbrd.service", "MainPID") == first
    # What root may read and the service may not, and what the daemon doesn't use.
    box.write({"/etc/pbrd/own.toml": CONFIG, "/etc/pbrd/pbrd.toml": "[nonsense"})
    box.enter(["sh", "-ec", "chown nobody /etc/pbrd/own.toml; chmod 0600 /etc/pbrd/own.toml"])
    assert "only what root owns or all may read" in dpkg(box, "--install", "/debs/new.deb")
    assert box.show("pbrd.service", "MainPID") == first
    box.enter(["chown", "root", "/etc/pbrd/own.toml"])
    assert "not restarted" not in dpkg(box, "--install", "/debs/new.deb")
    assert box.show("pbrd.service", "ActiveState") == {"ActiveState": "active"}
    assert box.show("pbrd.service", "MainPID") != first


def test_an_upgrade_leaves_a_paused_daemon_paused(machine: tuple[Lab, Box]) -> None:
    lab, box = machine
    before = kernel(lab)
    dpkg(box, "--install", "/debs/old.deb")
    box.write({"/etc/pbrd/pbrd.toml": CONFIG})
    box.enter(["systemctl", "start", "pbrd"])
    box.enter(["pbrd", "flush"])
    assert "not restarted, as it is paused" in dpkg(box, "--install", "/debs/new.deb")
    assert kernel(lab) == before
    box.enter(["systemctl", "restart", "pbrd"])
    assert kernel(lab) != before


@pytest.mark.parametrize(
    "harm",
    [
        "rm /run/pbrd/pbrd.sock",
        "rm -r /run/pbrd",
        "kill -KILL $(systemctl show --property=MainPID --value pbrd); sleep 0.6",
    ],
)
def test_removing_leaves_the_kernel_as_it_was_though_the_daemon_cannot_be_asked(
    machine: tuple[Lab, Box], harm: str
) -> None:
    lab, box = machine
    before = kernel(lab)
    dpkg(box, "--install", "/debs/old.deb")
    box.write({"/etc/pbrd/pbrd.toml": CONFIG + POLICY})
    box.enter(["systemctl", "start", "pbrd"])
    eventually(lambda: up(box), within=15)
    box.enter(["sh", "-c", harm])
    dpkg(box, "--remove", "pbrd")
    assert not box.enter(["pgrep", "-f", "bin/pbrd"], check=False).stdout
    if harm == "rm -r /run/pbrd":  # with it goes what the sysctls were
        assert not re.search(r"proto (112|pbrd)", kernel(lab))
    else:
        assert kernel(lab) == before


def test_removing_leaves_the_kernel_as_it_was_and_purging_no_files(machine: tuple[Lab, Box]) -> None:
    lab, box = machine
    clean, before = files(box), kernel(lab)
    for broken in (False, True):
        dpkg(box, "--install", "/debs/old.deb")
        assert box.show("pbrd.service", "ActiveState") == {"ActiveState": "inactive"}
        box.write({"/etc/pbrd/pbrd.toml": CONFIG + POLICY})
        box.enter(["systemctl", "enable", "--now", "pbrd"])
        eventually(lambda: up(box), within=15)
        assert "proto 112" in kernel(lab)
        assert (box.root / "etc/iproute2/rt_tables.d/pbrd.conf").exists()
        if broken:
            box.write({"/etc/pbrd/pbrd.toml": "[nonsense"})
        dpkg(box, "--remove", "pbrd")
        assert kernel(lab) == before
        assert not box.enter(["pgrep", "-f", "bin/pbrd"], check=False).stdout
        assert not (box.root / "run/pbrd").exists()
        assert (box.root / "etc/pbrd/pbrd.toml").exists()
        assert (box.root / "var/lib/pbrd").exists()
    dpkg(box, "--purge", "pbrd")
    assert files(box) - clean == {"/etc/pbrd/pbrd.toml"}
    assert clean - files(box) == {"/var/lib/pbrd"}  # which the box brought


def test_what_make_install_installs_serves_and_goes_again(
    make_lab: MakeLab, make_box: MakeBox, wheels: Path
) -> None:
    lab = make_lab()
    box = make_box(network=lab.router, source=False, binds={"/source": ROOT, "/wheels": wheels})
    clean, before = files(box), kernel(lab)
    install = ["env", f"PYTHON={python()}", "WHEELS=/wheels", "/source/packaging/install"]
    box.enter(install)
    box.write({"/etc/pbrd/pbrd.toml": CONFIG + POLICY})
    box.enter(["systemctl", "enable", "--now", "pbrd"])
    eventually(lambda: up(box), within=15)
    leaving = Leaving(lab)
    box.enter(install)
    box.enter(["systemctl", "restart", "pbrd"])
    path, lost = leaving.stop()
    assert (set(path), lost) == ({"lte"}, 0)
    assert "pbrd" in box.enter(["journalctl", "--dump-catalog"]).stdout
    merged = box.enter(["systemd-analyze", "cat-config", "systemd/networkd.conf"]).stdout
    assert "\nManageForeignRoutingPolicyRules=no\n" in merged
    box.enter([*install, "--remove"])
    assert kernel(lab) == before
    left = {path for path in files(box) - clean if not (box.root / path.lstrip("/")).is_dir()}
    assert left == {"/etc/pbrd/pbrd.toml"}
