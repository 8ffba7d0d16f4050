"""The command `pbrd`: what is asked on a command line, handed on and shown.

`pbrd status` is run by scripts every few seconds, so each command imports what it needs when it runs.
Exit codes: 0 done, 1 it failed, 2 wrong usage, 3 no daemon is running, 4 there is something to look at
(`plan`: changes, `status`: an uplink down or a policy in fallback), 78 the config is invalid (EX_CONFIG).
"""
# ruff: noqa: PLC0415 - imports inside functions are what keeps `pbrd status` fast

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pbrd import stdio
from pbrd.arguments import CONFIG_FILE, parser
from pbrd.client import call
from pbrd.errors import ConfigError, NeedsRoot, NotRunning, PbrdError
from pbrd.printable import printable, to_json
from pbrd.varlink import ConfigInvalid, PermissionDenied

DONE, FAILED, USAGE, NOT_RUNNING, ATTENTION, CONFIG = 0, 1, 2, 3, 4, 78
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the signal, as a shell has it

LONG = 120.0  # seconds that a reload or a flush may take
CAP_NET_ADMIN = 12  # bit, linux/capability.h

Arguments = argparse.Namespace


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
    try:
        return COMMANDS[parsed.name](parsed)
    except PbrdError as error:
        return _complain(error, argv, parsed.name)


def _complain(error: PbrdError, argv: list[str], command: str) -> int:
    """Say on standard error what went wrong and return its exit code."""
    if isinstance(error, ConfigError | ConfigInvalid):
        for problem in error.problems:
            _say(str(problem), sys.stderr)
        return CONFIG
    text = f"cannot {command}: only root may" if isinstance(error, PermissionDenied) else str(error)
    if isinstance(error, PermissionDenied | NeedsRoot):
        from shlex import join

        text += f" (try: sudo {join(['pbrd', *argv])})"
    _say(f"pbrd: {text}", sys.stderr)
    return NOT_RUNNING if isinstance(error, NotRunning) else FAILED


def run(arguments: Arguments) -> int:
    """`pbrd run`."""
    import signal

    # Until the daemon has handlers, as they end a process that has none: a reload comes after the start.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    _need_net_admin("run the daemon")
    from pathlib import Path

    from pbrd.locks import alone

    # asyncio imports ssl if it can: 4 MiB that the daemon has no use for.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    from pbrd.daemon import main as daemon

    with alone("run") as odd:
        if odd:
            print(f"warning: {odd}", file=sys.stderr)
        code: int = daemon(Path(arguments.config), Path(arguments.runtime_dir), Path(arguments.state_dir))
    return code


def check(arguments: Arguments) -> int:
    """`pbrd check`: warnings and problems go to standard error, the summary to standard output."""
    if arguments.file and arguments.config and arguments.file != arguments.config:
        print("pbrd check: FILE and --config name two files; one will do", file=sys.stderr)
        return USAGE
    from pathlib import Path

    from pbrd import confinement
    from pbrd.config import load, warnings
    from pbrd.cost import words

    file = arguments.file or arguments.config or CONFIG_FILE
    path, read = Path("/dev/stdin" if file == "-" else file), list[str]()
    config = load(path, pipe=True, seen=read.append)
    for warning in warnings(config):
        _say(f"warning: {warning}", sys.stderr)
    if not arguments.no_machine:
        for remark in confinement.remarks(str(path), read):
            _say(f"warning: {remark}", sys.stderr)
        _print_conflicts(config)
    metered = ", ".join(uplink.name for uplink in config.uplinks if uplink.metered)
    counts = [_count(len(config.uplinks), "uplink") + (f" ({metered} metered)" if metered else "")]
    counts += [_count(len(config.policies), "policy"), words(config)]
    print(f"{file} is valid: {', '.join(counts)}")
    return DONE


def _print_conflicts(config: Any) -> None:
    """Say what the machine and a config would do to each other, if the config is for this machine."""
    from pbrd import conflicts, machine
    from pbrd.errors import KernelError

    try:
        here = machine.look(config)
    except (KernelError, LookupError, TypeError, ValueError) as error:  # others' files may hold anything
        print(f"warning: this machine can't be looked at: {error!r}", file=sys.stderr)
        return
    if conflicts.concerns(config, here):
        for finding in conflicts.findings(config, here):
            _say(f"{'note' if finding.harmless else 'warning'}: {finding}", sys.stderr)


def plan(arguments: Arguments) -> int:
    """`pbrd plan`: asks the daemon, or without one works out what its start would do."""
    asked = {"table": True} if arguments.verbose else {}
    try:
        answer = call(arguments.runtime_dir, "Plan", asked, timeout=LONG)
    except NotRunning:
        _need_net_admin("plan without a running daemon")
        answer = _plan_file(arguments, {})
    else:
        if arguments.config:
            _need_net_admin("plan with another config")
            answer = _plan_file(arguments, answer)
    changes = _print_lines(answer["steps"], "nothing to change")
    if arguments.verbose and any(step.startswith("nft ") for step in answer["steps"]):
        _say(answer.get("table", "").rstrip())
    for remark in answer.get("remarks", ()):
        sys.stdout.flush()
        _say(f"warning: {remark}", sys.stderr)
    return ATTENTION if changes else DONE


def _plan_file(arguments: Arguments, known: dict[str, Any]) -> dict[str, Any]:
    """Work out what a config file would change; the confined daemon of a service may be unable to read it.

    `known` is the daemon's answer, {} without one. One in another network namespace must do it itself.
    """
    from pathlib import Path

    from pbrd import offline
    from pbrd.paths import standings_of

    file = arguments.config or CONFIG_FILE
    if known and _is_elsewhere(call(arguments.runtime_dir, "Status")["pid"]):
        asked = {"config": os.path.abspath(file)} | ({"table": True} if arguments.verbose else {})
        return dict(call(arguments.runtime_dir, "Plan", asked, timeout=LONG))
    steps, table = offline.plan(Path(file), standings_of(known.get("standings", ())))
    return {"steps": steps, "table": table}


def _is_elsewhere(pid: int) -> bool:
    """Say whether a process is in another network namespace than we are."""
    try:
        return not os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net")
    except OSError:
        return False


def status(arguments: Arguments) -> int:
    """`pbrd status`."""
    if arguments.watch:
        from pbrd.watch import watch

        return watch(arguments.runtime_dir, as_json=arguments.json, colour=in_colour())
    document = call(arguments.runtime_dir, "Status")
    from pbrd.tables import exit_code, table

    if arguments.json:
        print(to_json(document, indent=2))
    else:
        from datetime import datetime

        print(table(document, datetime.now().astimezone(), colour=in_colour()))
    return exit_code(document)


def events(arguments: Arguments) -> int:
    """`pbrd events`."""
    from pbrd import history

    try:
        since = history.since(arguments.since) if arguments.since else None
    except PbrdError as error:
        _say(f"pbrd: {error}", sys.stderr)
        return USAGE
    wanted = history.Wanted(
        since,
        arguments.uplink,
        arguments.policy,
        arguments.lines,
        arguments.follow,
    )
    return history.show(arguments.runtime_dir, wanted, as_json=arguments.json, colour=in_colour())


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
        from pbrd.locks import undisturbed

        runtime = Path(arguments.runtime_dir)
        with undisturbed(runtime, "flush"):
            removed, remarks = offline.flush(runtime, Path(arguments.state_dir), Path(arguments.config))
        paused = False
    else:
        paused = True
    _print_lines(removed, "nothing to remove")
    sys.stdout.flush()  # what matters comes last, whatever standard output is
    for remark in remarks:
        _say(f"warning: {remark}", sys.stderr)
    if paused:
        print("the daemon is paused until `pbrd reload`", file=sys.stderr)
    return DONE


def drain(arguments: Arguments) -> int:
    """`pbrd drain` and `pbrd undrain`."""
    asked = {"uplink": arguments.uplink}
    answer = call(arguments.runtime_dir, arguments.name.capitalize(), asked, timeout=LONG)
    for remark in answer.get("remarks", ()):
        _say(remark)
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


COMMANDS: dict[str, Callable[[Arguments], int]] = {
    "run": run,
    "check": check,
    "plan": plan,
    "status": status,
    "events": events,
    "reload": reload,
    "flush": flush,
    "drain": drain,
    "undrain": drain,
    "use": use,
    "demo": demo,
}


def in_colour() -> bool:
    """Say whether standard output is a terminal that wants colours (https://no-color.org)."""
    environment = os.environ
    return sys.stdout.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def _say(text: str, to: Any = None) -> None:
    """Print text that names what others have named: interfaces, files, tables."""
    print(printable(text, "\n\t"), file=to)


def _print_lines(lines: Sequence[str], otherwise: str) -> bool:
    """Print `lines`, or `otherwise` if there are none; say whether there were any."""
    for line in lines or (otherwise,):
        _say(line)
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
