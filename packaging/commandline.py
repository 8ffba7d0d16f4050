"""What `pbrd --help` knows, as values: the man page and the completions are made from it."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pbrd.arguments import parser  # noqa: E402


@dataclass(frozen=True, slots=True)
class Argument:
    """One option (with flags, the long one last) or one positional argument (without)."""

    flags: tuple[str, ...]
    metavar: str  # "" for an option that takes no value
    help: str
    choices: tuple[str, ...]
    optional: bool
    rest: bool  # it takes all words that follow

    @property
    def usage(self) -> str:
        """As it stands in a synopsis: "--config FILE", "[FILE]", "CMD ..."."""
        text = " ".join(filter(None, (self.flags[-1] if self.flags else "", self.metavar)))
        if self.rest:
            return f"-- {text} ..."
        return f"[{text}]" if self.optional else text


@dataclass(frozen=True, slots=True)
class Command:
    """One command: "status", "show uplinks, ...", its options and positional arguments, an example."""

    name: str
    about: str
    options: tuple[Argument, ...]
    positionals: tuple[Argument, ...]
    example: str


def global_options() -> tuple[Argument, ...]:
    """Return the options that stand before the command."""
    return tuple(_arguments(parser(), hidden=False))


def everywhere() -> tuple[Argument, ...]:
    """Return those of them that may follow the command, too."""
    after = [set(command._option_string_actions) for command in _subparsers().choices.values()]
    return tuple(one for one in global_options() if all(one.flags[-1] in flags for flags in after))


def commands() -> tuple[Command, ...]:
    """Return all commands in the order of `pbrd --help`, without the global options."""
    shared = {option.flags for option in global_options()}
    found = []
    for choice in (subparsers := _subparsers())._choices_actions:
        command = subparsers.choices[choice.dest]
        arguments = [one for one in _arguments(command, hidden=True) if one.flags not in shared]
        found.append(
            Command(
                choice.dest,
                choice.help or "",
                tuple(one for one in arguments if one.flags),
                tuple(one for one in arguments if not one.flags),
                (command.epilog or "").removeprefix("example:\n").strip(),
            )
        )
    return tuple(found)


def _subparsers() -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    return next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))


def _arguments(of: argparse.ArgumentParser, *, hidden: bool) -> Iterator[Argument]:
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction) or (hidden and action.help == argparse.SUPPRESS):
            continue
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        choices = tuple(str(choice) for choice in action.choices or ())
        yield Argument(
            tuple(sorted(action.option_strings, key=len)),
            "" if action.nargs == 0 else "|".join(choices) if choices and not action.metavar else metavar,
            action.help or "",
            choices,
            (bool(action.option_strings) and not action.required) or action.nargs in ("?", "*"),
            action.nargs == argparse.REMAINDER,
        )
