"""The command line: which commands there are, what each takes, and how `--help` tells of it."""

import argparse
import os
from functools import partial
from typing import TypeAlias

from pbrd import __version__

CONFIG_FILE = "/etc/pbrd/pbrd.toml"

# With a width of its own: to find the terminal's, argparse imports shutil, and with it all of compression.
HELP = partial(argparse.RawDescriptionHelpFormatter, width=100)

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
        _add_events,
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


def _add(commands: Commands, name: str, about: str, example: str) -> argparse.ArgumentParser:
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
    return added


def _add_run(commands: Commands) -> None:
    added = _add(commands, "run", "run the daemon in the foreground", "sudo pbrd run --config ./pbrd.toml")
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
    added = _add(commands, "check", about, "pbrd check /etc/pbrd/pbrd.toml")
    added.add_argument(
        "file", metavar="FILE", nargs="?", help=f"- is standard input (default: {CONFIG_FILE})"
    )
    added.add_argument("--config", metavar="FILE", help="the same, as the other commands have it")
    about = "judge the config alone, not what it would do on this machine: for a config of another one"
    added.add_argument("--no-machine", action="store_true", help=about)


def _add_plan(commands: Commands) -> None:
    about = "show what would change in the kernel now, in the words of ip and nft; changes nothing"
    added = _add(commands, "plan", about, "sudo pbrd plan --config ./new.toml; test $? = 4 && echo changes")
    added.add_argument(
        "--config",
        metavar="FILE",
        help=f"what a reload with it would change (default: with the config in force, else {CONFIG_FILE})",
    )
    about = "and the text of the nftables table, if it is added or replaced"
    added.add_argument("-v", "--verbose", action="store_true", help=about)


def _add_status(commands: Commands) -> None:
    about = "show uplinks, policies and where each goes now, why and since when"
    added = _add(commands, "status", about, "pbrd status --json | jq -r '.policies[].active'")
    added.add_argument("--json", action="store_true", help="the whole document; with --watch one a line")
    added.add_argument("--watch", action="store_true", help="as it changes, with round-trip history")


def _add_events(commands: Commands) -> None:
    about = "show what happened: transitions of uplinks and policies, reloads, repairs"
    added = _add(commands, "events", about, "pbrd events --since '1h ago' --uplink lte")
    added.add_argument("-f", "--follow", action="store_true", help="and what happens from now on")
    added.add_argument("-n", "--lines", metavar="N", type=_number, help="only the last N")
    added.add_argument("--since", metavar="WHEN", help='"2026-11-22 17:00", "17:00", "yesterday", "1h ago"')
    added.add_argument("--uplink", metavar="NAME", default="", help="only those of this uplink")
    added.add_argument("--policy", metavar="NAME", default="", help="only those of this policy")
    added.add_argument("--json", action="store_true", help="one JSON object a line")


def _number(text: str) -> int:
    """Return a whole number that is not negative, or raise what argparse tells."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of events; write 0 or more")
    return int(text)


def _add_reload(commands: Commands) -> None:
    about = "make the daemon read its config again, wait, and show what changed"
    _add(commands, "reload", about, "pbrd check && sudo pbrd reload")


def _add_flush(commands: Commands) -> None:
    about = "remove all that pbrd put into the kernel, and nothing else"
    added = _add(commands, "flush", about, "sudo systemctl stop pbrd && sudo pbrd flush")
    _add_daemon_files(added)


def _add_drain(commands: Commands) -> None:
    about = "take an uplink out of service for new connections; live ones finish there if nftables is in use"
    _add(commands, "drain", about, "sudo pbrd drain lte").add_argument("uplink", metavar="UPLINK")


def _add_undrain(commands: Commands) -> None:
    about = "take a drained uplink back into service"
    _add(commands, "undrain", about, "sudo pbrd undrain lte").add_argument("uplink", metavar="UPLINK")


def _add_use(commands: Commands) -> None:
    about = "run one command with all its traffic on one uplink"
    added = _add(commands, "use", about, "sudo pbrd use lte -- curl https://example.net")
    added.add_argument("uplink", metavar="UPLINK")
    added.add_argument("argv", metavar="CMD", nargs=argparse.REMAINDER, help="after --")


def _add_demo(commands: Commands) -> None:
    about = "break a fiber in a lab of network namespaces, and watch failover and healing"
    added = _add(commands, "demo", about, "sudo pbrd demo --keep")
    added.add_argument("--keep", action="store_true", help="leave the lab up to play with")
