"""Write the completions of bash, zsh and fish for `pbrd`: `completions.py DIRECTORY`.

They are made from the command line's own parser. What is completed follows from a value's name there: UPLINK
is asked from the running daemon, FILE, PATH and DIR from the file system, CMD from the machine's commands.
"""

import sys
from pathlib import Path

from commandline import Argument, Command, commands, everywhere, global_options

# The uplinks' names, from the lines of the JSON: no program is needed that may not be there.
UPLINKS = (
    r"""pbrd status --json 2>/dev/null | sed -n '/^  "uplinks"/,/^  \]/s/^      "name": "\(.*\)",*$/\1/p'"""
)
HEAD = "# Completion of pbrd; written by packaging/completions.py from the command line's own parser.\n"


def kind(argument: Argument) -> str:
    """Return what a value is: "uplink", "file", "directory", "command", "a b c" for choices, or ""."""
    kinds = {"UPLINK": "uplink", "FILE": "file", "PATH": "file", "DIR": "directory", "CMD": "command"}
    name = "UPLINK" if "--uplink" in argument.flags else argument.metavar
    return " ".join(argument.choices) or kinds.get(name, "")


def words(options: tuple[Argument, ...]) -> str:
    """Return all flags of `options`."""
    return " ".join(flag for option in options for flag in option.flags)


# --- bash -------------------------------------------------------------------------------------------

BASH_KINDS = {
    "uplink": f'COMPREPLY=($(compgen -W "$({UPLINKS})" -- "$current"))',
    "file": 'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$current"))',
    "directory": 'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -d -- "$current"))',
    "command": 'COMPREPLY=($(compgen -c -- "$current"))',
}
BASH = """{head}
_pbrd() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} command='' rest='' place=0 word index
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${{COMP_WORDS[index]}}
        case $command:$word in
{values}
                ((++index < COMP_CWORD)) || {{
                    _pbrd_value "$command:$word"
                    return
                }} ;;
            *:--) [[ $command != use ]] || rest=$((index + 1)) ;;
            *:-*) ;;
            :*) command=$word ;;
            *) ((++place)) ;;
        esac
        [[ -z $rest ]] || break
    done
    if [[ -n $rest ]]; then
        if ((rest < COMP_CWORD)) && declare -F _command_offset >/dev/null; then
            _command_offset "$rest"
        else
            COMPREPLY=($(compgen -c -- "$current"))
        fi
    elif [[ $current == -* || -z $command ]]; then
        _pbrd_words "$command"
    else
        _pbrd_value "$command:$place"
    fi
}}

# What stands after a command, or (without one) before it.
_pbrd_words() {{
    case $1 in
        '') COMPREPLY=($(compgen -W "{top}" -- "$current")) ;;
{words}
    esac
}}

# The value of an option ("check:--config"), or of a command's argument ("drain:0").
_pbrd_value() {{
    case $1 in
{kinds}
    esac
}}

complete -F _pbrd pbrd
"""


def bash() -> str:
    """Return the completion for bash."""
    shared = global_options()
    values, kinds = [], []
    for command in (Command("", "", shared, (), ""), *commands()):
        of = "*" if not command.name else command.name
        for option in command.options:
            if option.metavar:
                values += [f"{of}:{flag}" for flag in option.flags]
                kinds += [(f"{of}:{flag}", kind(option)) for flag in option.flags]
        kinds += [(f"{of}:{place}", kind(one)) for place, one in enumerate(command.positionals)]
    top = " ".join((words(shared), *(command.name for command in commands())))
    lines = [
        f"        {command.name}) {_bash_words(words((*everywhere(), *command.options)))} ;;"
        for command in commands()
    ]
    return BASH.format(
        head=HEAD,
        top=top,
        values="            " + " | ".join(values) + ")",
        words="\n".join(lines),
        kinds="\n".join(
            f"        {of}) {BASH_KINDS.get(what) or _bash_words(what)} ;;" for of, what in kinds if what
        ),
    )


def _bash_words(text: str) -> str:
    return f'COMPREPLY=($(compgen -W "{text}" -- "$current"))'


# --- zsh --------------------------------------------------------------------------------------------

ZSH_KINDS = {"uplink": "_pbrd_uplinks", "file": "_files", "directory": "_directories", "": " "}
ZSH = """#compdef pbrd
{head}
_pbrd_uplinks() {{
    local -a names
    names=(${{(f)"$({uplinks})"}})
    compadd -a names
}}

# Behind "--" stands another command, with its own completion.
_pbrd_rest() {{
    local dashes=${{all[(i)--]}}
    ((dashes < place)) || return
    words=("${{(@)all[dashes+1,-1]}}")
    ((CURRENT = place - dashes))
    _normal
}}

_pbrd() {{
    local curcontext=$curcontext state line place=$CURRENT
    local -A opt_args
    local -a pbrd_commands all
    all=("${{(@)words}}")
    pbrd_commands=(
{commands}
    )
    _arguments -C -A '-*' \\
{shared}
        '1:command:->command' \\
        '*::argument:->argument'
    case $state in
        command) _describe -t commands command pbrd_commands ;;
        argument)
            case $words[1] in
{cases}
            esac ;;
    esac
}}

_pbrd "$@"
"""


def zsh() -> str:
    """Return the completion for zsh."""
    shared = [_zsh_argument(one) for one in global_options()]
    cases = []
    for command in commands():
        arguments = (*everywhere(), *command.options, *command.positionals)
        listed = " ".join(_zsh_argument(one) for one in arguments if not one.rest)
        rest = "_pbrd_rest || " if any(one.rest for one in arguments) else ""
        cases.append(f"                {command.name}) {rest}_arguments {listed} ;;")
    return ZSH.format(
        head=HEAD,
        uplinks=UPLINKS,
        commands="\n".join(f"        {_zsh_quoted(f'{one.name}:{one.about}')}" for one in commands()),
        shared="\n".join(f"        {line} \\" for line in shared),
        cases="\n".join(cases),
    )


def _zsh_argument(argument: Argument) -> str:
    what = kind(argument)
    action = ZSH_KINDS.get(what) or f"({what})"
    if not argument.flags:
        return _zsh_quoted(f"{':' if argument.optional else ''}:{argument.metavar}:{action}")
    explained = argument.help.replace("[", "(").replace("]", ")").replace(":", r"\:")
    value = f":{argument.metavar}:{action}" if argument.metavar else ""
    return _zsh_quoted(f"{argument.flags[-1]}[{explained}]{value}")


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- fish -------------------------------------------------------------------------------------------

FISH_KINDS = {
    "uplink": "-x -a '(__pbrd_uplinks)'",
    "file": "-r -F",
    "directory": "-x -a '(__fish_complete_directories)'",
    "command": "-x -a '(__fish_complete_subcommand --fcs-skip=3)'",
    "": "-x",
}
FISH = """{head}
function __pbrd_uplinks
    {uplinks}
end

complete -c pbrd -f
{lines}
"""


def fish() -> str:
    """Return the completion for fish."""
    first = f"-n 'not __fish_seen_subcommand_from {' '.join(command.name for command in commands())}'"
    lines = [_fish_option(one, "") for one in global_options()]
    for command in commands():
        lines.append(f"complete -c pbrd {first} -a {command.name} -d {_fish(command.about)}")
        when = f"-n '__fish_seen_subcommand_from {command.name}' "
        lines += [_fish_option(one, when) for one in command.options if "--help" not in one.flags]
        rest = any(one.rest for one in command.positionals)
        for one in command.positionals:
            dashes = f"; {'and' if one.rest else 'and not'} contains -- -- (commandline -opc)" if rest else ""
            lines.append(
                f"complete -c pbrd -n '__fish_seen_subcommand_from {command.name}{dashes}' {_fish_kind(one)}"
            )
    return FISH.format(head=HEAD, uplinks=UPLINKS, lines="\n".join(lines))


def _fish_kind(argument: Argument) -> str:
    what = kind(argument)
    return FISH_KINDS.get(what) or f"-x -a {_fish(what)}"


def _fish_option(option: Argument, when: str) -> str:
    flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
    value = f" {_fish_kind(option)}" if option.metavar else ""
    return f"complete -c pbrd {when}{flags}{value} -d {_fish(option.help)}"


def _fish(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def main(directory: Path) -> None:
    """Write the three files into `directory`, under the names that the shells look for."""
    for name, text in {"pbrd": bash(), "_pbrd": zsh(), "pbrd.fish": fish()}.items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: completions.py DIRECTORY")
    main(Path(sys.argv[1]))
