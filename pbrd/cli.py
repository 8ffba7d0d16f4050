"""The command `pbrd`: what is asked on a command line, handed on and shown.

`pbrd status` is run by scripts every few seconds, so each command imports what it needs when it runs.
Exit codes: 0 done, 1 it failed, 2 wrong usage, 3 no daemon is running, 4 there is something to look at
(`plan`: changes, `status`: an uplink down or a policy in fallback), 78 the config is invalid (EX_CONFIG).
"""
# ruff: noqa: PLC0415 - imports inside functions are what keeps `pbrd status` fast

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from pbrd import __version__, stdio
from pbrd.client import call
from pbrd.errors import ConfigError, NeedsRoot, NotRunning, PbrdError
from pbrd.varlink import ConfigInvalid, PermissionDenied

DONE, FAILED, USAGE, NOT_RUNNING, ATTENTION, CONFIG = 0, 1, 2, 3, 4, 78
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the signal, as a shell has it

CONFIG_FILE = "/etc/pbrd/pbrd.toml"
LONG = 120.0  # seconds that a reload or a flush may take
CAP_NET_ADMIN = 12  # bit, linux/capability.h

# With a width of its own: to find the terminal's, argparse imports shutil, and with it all of compression.
HELP = partial(argparse.RawDescriptionHelpFormatter, width=100)

Arguments = argparse.Namespace
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    stdio.prepare()
    argv = sys.argv[1:] if arguments is None else list(arguments)
    try:
        try:
            return _obey(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        stdio.abandon()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.errno not in stdio.UNWRITABLE:
            raise
        stdio.abandon()
        print(f"pbrd: cannot write: {error.strerror}", file=sys.stderr)
        return FAILED


def _obey(argv: list[str]) -> int:
    parsed = parser().parse_args(argv)
    command: Callable[[Arguments], int] = parsed.command
    try:
        return command(parsed)
    except PbrdError as error:
        return _complain(error, argv, parsed.name)


def _complain(error: PbrdError, argv: list[str], command: str) -> int:
    """Say on standard error what went wrong and return its exit code."""
    if isinstance(error, ConfigError | ConfigInvalid):
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return CONFIG
    text = f"cannot {command}: only root may" if isinstance(error, PermissionDenied) else str(error)
    if isinstance(error, PermissionDenied | NeedsRoot):
        from shlex import join

        text += f" (try: sudo {join(['pbrd', *argv])})"
    print(f"pbrd: {text}", file=sys.stderr)
    return NOT_RUNNING if isinstance(error, NotRunning) else FAILED


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="pbrd",
        description="Policy based routing that fails over and heals by itself.",
        epilog="example:\n  pbrd check && sudo pbrd reload && pbrd status",
        formatter_class=HELP,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"pbrd {__version__}")
    _add_runtime_dir(top, _directory("RUNTIME_DIRECTORY", "/run/pbrd"))
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="name", required=True)
    for add in (
        _add_run,
        _add_check,
        _add_plan,
        _add_status,
        _add_reload,
        _add_flush,
        _add_drain,
        _add_undrain,
        _add_use,
        _add_demo,
    ):
        add(commands)
    return top


def _directory(variable: str, default: str) -> str:
    """Return the first directory that systemd names in `variable`."""
    return os.environ.get(variable, "").partition(":")[0] or default


def _add_runtime_dir(to: argparse.ArgumentParser, default: str) -> None:
    to.add_argument(
        "--runtime-dir",
        metavar="DIR",
        default=default,
        help="where the daemon keeps its socket (default: $RUNTIME_DIRECTORY, else /run/pbrd)",
    )


def _add(
    commands: Commands, name: str, command: Callable[[Arguments], int], about: str, example: str
) -> argparse.ArgumentParser:
    """Add one command; `--runtime-dir` may follow it, too, and then counts."""
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=HELP,
        allow_abbrev=False,
    )
    _add_runtime_dir(added, argparse.SUPPRESS)
    added.set_defaults(command=command)
    return added


def _add_run(commands: Commands) -> None:
    added = _add(
        commands, "run", run, "run the daemon in the foreground", "sudo pbrd run --config ./pbrd.toml"
    )
    _add_daemon_files(added)


def _add_daemon_files(to: argparse.ArgumentParser) -> None:
    """Add where a daemon finds its config and its state."""
    to.add_argument("--config", metavar="FILE", default=CONFIG_FILE, help=f"(default: {CONFIG_FILE})")
    to.add_argument(
        "--state-dir",
        metavar="DIR",
        default=_directory("STATE_DIRECTORY", "/var/lib/pbrd"),
        help="what must survive a reboot (default: $STATE_DIRECTORY, else /var/lib/pbrd)",
    )


def _add_check(commands: Commands) -> None:
    about = "judge a config without touching anything"
    added = _add(commands, "check", check, about, "pbrd check /etc/pbrd/pbrd.toml")
    added.add_argument(
        "file", metavar="FILE", nargs="?", help=f"- is standard input (default: {CONFIG_FILE})"
    )
    added.add_argument("--config", metavar="FILE", help="the same, as the other commands have it")
    about = "judge the config alone, not what it would do on this machine: for a config of another one"
    added.add_argument("--no-machine", action="store_true", help=about)


def _add_plan(commands: Commands) -> None:
    about = "show what would change in the kernel now, in the words of ip and nft; changes nothing"
    added = _add(
        commands, "plan", plan, about, "sudo pbrd plan --config ./new.toml; test $? = 4 && echo changes"
    )
    added.add_argument(
        "--config",
        metavar="FILE",
        help=f"what a reload with it would change (default: with the config in force, else {CONFIG_FILE})",
    )


def _add_status(commands: Commands) -> None:
    about = "show uplinks, policies and where each goes now, why and since when"
    added = _add(commands, "status", status, about, "pbrd status --json | jq -r '.policies[].active'")
    added.add_argument("--json", action="store_true", help="the whole document; with --watch one a line")
    added.add_argument("--watch", action="store_true", help="again every second, with round-trip history")


def _add_reload(commands: Commands) -> None:
    about = "make the daemon read its config again, wait, and show what changed"
    _add(commands, "reload", reload, about, "pbrd check && sudo pbrd reload")


def _add_flush(commands: Commands) -> None:
    about = "remove all that pbrd put into the kernel, and nothing else"
    added = _add(commands, "flush", flush, about, "sudo systemctl stop pbrd && sudo pbrd flush")
    _add_daemon_files(added)


def _add_drain(commands: Commands) -> None:
    about = "take an uplink out of service for new connections; live ones finish there if nftables is in use"
    _add(commands, "drain", drain, about, "sudo pbrd drain lte").add_argument("uplink", metavar="UPLINK")


def _add_undrain(commands: Commands) -> None:
    about = "take a drained uplink back into service"
    _add(commands, "undrain", drain, about, "sudo pbrd undrain lte").add_argument("uplink", metavar="UPLINK")


def _add_use(commands: Commands) -> None:
    about = "run one command with all its traffic on one uplink"
    added = _add(commands, "use", use, about, "sudo pbrd use lte -- curl https://example.net")
    added.add_argument("uplink", metavar="UPLINK")
    added.add_argument("argv", metavar="CMD", nargs=argparse.REMAINDER, help="after --")


def _add_demo(commands: Commands) -> None:
    about = "break a fiber in a lab of network namespaces, and watch failover and healing"
    added = _add(commands, "demo", demo, about, "sudo pbrd demo --keep")
    added.add_argument("--keep", action="store_true", help="leave the lab up to play with")


def run(arguments: Arguments) -> int:
    """`pbrd run`."""
    _need_net_admin("run the daemon")
    from pathlib import Path

    # asyncio imports ssl if it can: 4 MiB that the daemon has no use for.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    from pbrd.daemon import main as daemon

    code: int = daemon(Path(arguments.config), Path(arguments.runtime_dir), Path(arguments.state_dir))
    return code


def check(arguments: Arguments) -> int:
    """`pbrd check`: warnings and problems go to standard error, the summary to standard output."""
    if arguments.file and arguments.config and arguments.file != arguments.config:
        print("pbrd check: FILE and --config name two files; one will do", file=sys.stderr)
        return USAGE
    from pathlib import Path

    from pbrd.config import load, warnings
    from pbrd.cost import words

    file = arguments.file or arguments.config or CONFIG_FILE
    config = load(Path("/dev/stdin" if file == "-" else file), pipe=True)
    for warning in warnings(config):
        print(f"warning: {warning}", file=sys.stderr)
    if not arguments.no_machine:
        _print_conflicts(config)
    metered = ", ".join(uplink.name for uplink in config.uplinks if uplink.metered)
    counts = [_count(len(config.uplinks), "uplink") + (f" ({metered} metered)" if metered else "")]
    counts += [_count(len(config.policies), "policy"), words(config)]
    print(f"{file}: {', '.join(counts)}")
    return DONE


def _print_conflicts(config: Any) -> None:
    """Say what the machine and a config would do to each other, if the config is for this machine."""
    from pbrd import conflicts, machine
    from pbrd.errors import KernelError

    try:
        here = machine.look(config)
    except KernelError as error:
        print(f"warning: this machine is not looked at: {error}", file=sys.stderr)
        return
    if conflicts.concerns(config, here):
        for finding in conflicts.findings(config, here):
            print(f"{'note' if finding.harmless else 'warning'}: {finding}", file=sys.stderr)


def plan(arguments: Arguments) -> int:
    """`pbrd plan`: asks the daemon, or without one works out what its start would do."""
    parameters = {"config": os.path.abspath(arguments.config)} if arguments.config else {}
    try:
        steps = call(arguments.runtime_dir, "Plan", parameters, timeout=LONG)["steps"]
    except NotRunning:
        _need_net_admin("plan without a running daemon")
        from pathlib import Path

        from pbrd import offline

        steps = offline.plan(Path(arguments.config or CONFIG_FILE))
    return ATTENTION if _print_lines(steps, "nothing to change") else DONE


def status(arguments: Arguments) -> int:
    """`pbrd status`."""
    if arguments.watch:
        from pbrd.watch import watch

        return watch(arguments.runtime_dir, as_json=arguments.json, colour=in_colour())
    document = call(arguments.runtime_dir, "Status")
    from pbrd.tables import exit_code, table

    if arguments.json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        from datetime import datetime

        print(table(document, datetime.now().astimezone(), colour=in_colour()))
    return exit_code(document)


def reload(arguments: Arguments) -> int:
    """`pbrd reload`: a refused config is told by its problems and 78; the running one stays."""
    answer = call(arguments.runtime_dir, "Reload", timeout=LONG)
    _print_lines([*answer.get("config", ()), *answer["changed"]], "nothing changed")
    return DONE


def flush(arguments: Arguments) -> int:
    """`pbrd flush`: a running daemon does it itself, and stays away."""
    try:
        answer = call(arguments.runtime_dir, "Flush", timeout=LONG)
        removed, remarks = answer["removed"], answer.get("remarks", ())
    except NotRunning:
        _need_net_admin("flush")
        from pathlib import Path

        from pbrd import offline

        removed, remarks = offline.flush(Path(arguments.state_dir), Path(arguments.config))
    else:
        print("the daemon is paused until `pbrd reload`", file=sys.stderr)
    _print_lines(removed, "nothing to remove")
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    return DONE


def drain(arguments: Arguments) -> int:
    """`pbrd drain` and `pbrd undrain`."""
    asked = {"uplink": arguments.uplink}
    answer = call(arguments.runtime_dir, arguments.name.capitalize(), asked, timeout=LONG)
    for remark in answer.get("remarks", ()):
        print(remark)
    return DONE


def use(arguments: Arguments) -> int:
    """`pbrd use`: the exit code is the command's."""
    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        print("pbrd use: no command; write pbrd use UPLINK -- CMD", file=sys.stderr)
        return USAGE
    from pbrd.use import main as run_on

    code: int = run_on(arguments.uplink, argv, arguments.runtime_dir)
    return code


def demo(arguments: Arguments) -> int:
    """`pbrd demo`."""
    from pbrd.demo import main as show

    code: int = show(keep=arguments.keep)
    return code


def in_colour() -> bool:
    """Say whether standard output is a terminal that wants colours (https://no-color.org)."""
    environment = os.environ
    return sys.stdout.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def _print_lines(lines: Sequence[str], otherwise: str) -> bool:
    """Print `lines`, or `otherwise` if there are none; say whether there were any."""
    for line in lines or (otherwise,):
        print(line)
    return bool(lines)


def _count(number: int, noun: str) -> str:
    """Return "1 policy", "2 policies", "3 uplinks"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _need_net_admin(what: str) -> None:
    """Raise NeedsRoot unless this process may change the network: root, or CAP_NET_ADMIN in hand."""
    if os.geteuid() == 0:
        return
    with open("/proc/self/status", "rb") as file:
        effective = next((line.split()[1] for line in file if line.startswith(b"CapEff:")), b"0")
    if not int(effective, 16) >> CAP_NET_ADMIN & 1:
        raise NeedsRoot(f"cannot {what}: only root may")
