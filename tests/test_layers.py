"""The walls between the rooms, checked by reading the code: imports go down only, pure code does no I/O.

A new module gets a place in `LAYERS`; a new library in a pure module gets a place in `PURE_IMPORTS`, if it
does no I/O. An exception to either goes into `EXCEPTIONS` with its reason.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pbrd"

# From the bottom up. A module imports from lower layers; modules of one layer import each other only where
# that layer is in PEERS, and never in a circle. Modules that aren't written yet may be absent.
PURE = frozenset({
    "errors", "prefixes", "settings", "values", "document", "uplinks", "policies", "caveats", "config",
    "marks", "classes", "classrules", "judging", "expressions", "eviction", "schedule",
    "effective", "units",
    "health", "measures", "objects", "rules", "routing", "ruleset", "plan", "paths", "cost", "changes",
    "remarks",
    "explain", "status", "snapshot", "events", "timestamp", "tables", "topology", "printable",
    "netfiles", "firewalls", "neighbours", "conflicts", "precedence", "occupied",
})  # fmt: skip
LAYERS: tuple[tuple[str, frozenset[str]], ...] = (
    ("pure", PURE),
    ("file", frozenset({"statefile", "sources"})),
    # bytes to values and back; no I/O
    ("codec", frozenset({"rtnetlink", "linkinfo", "varlink", "elements"})),
    # bytes in and out; the shells know what they mean
    ("line", frozenset({"netlink", "sysctl", "netns", "journal", "journalreader", "locks", "confinement"})),
    ("shell", frozenset({
        "kernel", "nftables", "conntrack", "probe", "control", "client", "systemd", "names", "metrics",
        "hooks", "log", "monitor", "drains", "cgroups", "drift", "stdio",
    })),
    ("lab", frozenset({"lab", "packet", "stream", "traffic"})),
    ("netfilter", frozenset({"judge"})),  # the policies in force, over time
    ("netfilter", frozenset({"netfilter", "refusals", "watchdog"})),  # the daemon's helpmates, over time
    ("report", frozenset({"report"})),  # what people are told of all that
    ("machine", frozenset({"machine"})),  # what others have put into it
    ("offline", frozenset({"offline", "lookout"})),  # what the daemon does at its start and end, or the CLI
    ("daemon", frozenset({"daemon"})),
    ("demo", frozenset({"demo", "watch", "history", "use"})),  # commands that live on for a while
    ("arguments", frozenset({"arguments"})),  # the words of the command line
    ("cli", frozenset({"cli"})),
    ("main", frozenset({"__main__"})),
)  # fmt: skip
PEERS = frozenset({"pure", "lab"})  # shells don't know each other: `daemon` connects them

MAY_LOG = frozenset({"log", "daemon", "cli", "demo", "lab"})
LOGGING = frozenset({"logging", "structlog", "syslog", "warnings"})

# What pure modules may import from outside: nothing with a clock, a socket, a file, a process or randomness.
PURE_IMPORTS = frozenset({
    "__future__", "abc", "bisect", "collections", "contextlib", "copy", "dataclasses", "datetime", "decimal",
    "difflib", "enum", "fractions", "functools", "graphlib", "hashlib", "heapq", "ipaddress", "itertools",
    "json", "math", "msgspec", "operator", "re", "statistics", "string", "struct", "textwrap", "tomllib",
    "types", "typing", "unicodedata", "zlib",
})  # fmt: skip
EXCEPTIONS = {
    ("settings", "socket"): "the numbers AF_INET and AF_INET6, nothing else",
    ("config", "pathlib"): "`load` reads the files; everything below it takes text",
    ("policies", "pathlib"): "PurePath, which names files and opens none",
    ("config", "pwd"): "names of users become ids when the config is loaded",
    ("config", "grp"): "names of groups likewise",
}
IMPURE_CALLS = frozenset({"open", "print", "input", "exec", "eval", "__import__", "breakpoint"})
CLOCK_CALLS = frozenset({"now", "utcnow", "today"})  # of datetime, which is fine for writing times down

UNNAMED = frozenset({"utils", "util", "helpers", "helper", "manager", "core", "common", "misc"})
FILE_LINES = 400
FUNCTION_LINES = 60


def layer_of(module: str) -> int:
    for height, (_, modules) in enumerate(LAYERS):
        if module in modules:
            return height
    raise LookupError(f"{module}.py: say in which layer it lives (LAYERS in tests/test_layers.py)")


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield what is imported anywhere in `tree`: "pbrd.plan" for modules of ours, else the top name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from named(name.name)
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(part for part in ("pbrd" if node.level else "", node.module or "") if part)
            if source == "pbrd":
                yield from (f"pbrd.{name.name}" for name in node.names if not name.name.startswith("__"))
            else:
                yield from named(source)


def named(dotted: str) -> Iterator[str]:
    parts = dotted.split(".")
    yield ".".join(parts[:2]) if parts[0] == "pbrd" else parts[0]


def ours(tree: ast.AST) -> set[str]:
    return {name.partition(".")[2] for name in imports(tree) if name.startswith("pbrd.")}


def upward(module: str, tree: ast.AST) -> list[str]:
    """Return the complaints about imports of our own modules."""
    height = layer_of(module)
    layer, _ = LAYERS[height]
    complaints = []
    for imported in sorted(ours(tree)):
        lies = layer_of(imported)
        if lies > height or (lies == height and layer not in PEERS):
            complaints.append(
                f"{module} ({layer}) imports {imported} ({LAYERS[lies][0]}): imports go down only"
            )
    return complaints


def impurities(module: str, tree: ast.AST) -> list[str]:
    """Return the complaints about a pure module: foreign imports, awaits, globals, files, clocks."""
    foreign = {name for name in imports(tree) if not name.startswith("pbrd.")} - PURE_IMPORTS - LOGGING
    complaints = [
        f"{module} imports {name}, which pure code may not"
        for name in sorted(foreign)
        if (module, name) not in EXCEPTIONS
    ]
    for node in ast.walk(tree):
        where = f"{module}:{getattr(node, 'lineno', 0)}"
        match node:
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                complaints.append(f"{where}: pure code does not wait")
            case ast.Global():
                complaints.append(f"{where}: pure code has no globals")
            case ast.Call(func=ast.Name(id=name)) if name in IMPURE_CALLS:
                complaints.append(f"{where}: pure code does not call {name}()")
            case ast.Call(func=ast.Attribute(attr=name)) if name in CLOCK_CALLS:
                complaints.append(f"{where}: pure code has no clock; let the caller pass the time")
    return complaints


def logs(module: str, tree: ast.AST) -> list[str]:
    if module in MAY_LOG:
        return []
    found = sorted(name for name in set(imports(tree)) & LOGGING if (module, name) not in EXCEPTIONS)
    return [f"{module} imports {name}: only {', '.join(sorted(MAY_LOG))} may log" for name in found]


def long_functions(module: str, tree: ast.AST) -> list[str]:
    return [
        f"{module}.{node.name} has {lines} lines; {FUNCTION_LINES} are the limit"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    ]


MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}
TREES = {module: ast.parse(path.read_text(), str(path)) for module, path in MODULES.items()}
every_module = pytest.mark.parametrize("module", sorted(MODULES))


@every_module
def test_every_module_lives_in_a_layer(module: str) -> None:
    assert module not in UNNAMED, f"{module} says nothing: name the module after what it knows"
    assert layer_of(module) >= 0


@every_module
def test_imports_go_down_only(module: str) -> None:
    assert upward(module, TREES[module]) == []


@pytest.mark.parametrize("module", sorted(PURE & MODULES.keys()))
def test_pure_modules_do_no_io(module: str) -> None:
    assert impurities(module, TREES[module]) == []


@every_module
def test_only_the_top_logs(module: str) -> None:
    assert logs(module, TREES[module]) == []


@every_module
def test_files_and_functions_stay_short(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= FILE_LINES
    assert long_functions(module, TREES[module]) == []


def test_no_imports_in_a_circle() -> None:
    try:
        TopologicalSorter({module: ours(tree) for module, tree in TREES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_the_package_is_flat_and_imports_nothing_by_itself() -> None:
    assert [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []
    assert list(imports(ast.parse((PACKAGE / "__init__.py").read_text()))) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("plan", "from pbrd.kernel import read", "plan (pure) imports kernel (shell)"),
        ("plan", "from . import daemon", "plan (pure) imports daemon (daemon)"),
        ("plan", "def f():\n    import pbrd.cli", "plan (pure) imports cli (cli)"),
        ("probe", "from .kernel import read", "probe (shell) imports kernel (shell)"),
        ("plan", "import time", "plan imports time"),
        ("plan", "from os import path", "plan imports os"),
        ("plan", "import asyncio.queues", "plan imports asyncio"),
        ("plan", "import socket", "plan imports socket"),
        ("plan", "import pathlib", "plan imports pathlib"),
        ("plan", "async def f(): ...", "does not wait"),
        ("plan", "open('x')", "does not call open"),
        ("plan", "datetime.now()", "has no clock"),
        ("plan", "import logging", "may log"),
        ("kernel", "import structlog", "may log"),
        ("plan", "def f():\n" + "    x = 1\n" * FUNCTION_LINES, "61 lines"),
    ],
)
def test_the_walls_hold(module: str, source: str, complaint: str) -> None:
    tree = ast.parse(source)
    complaints = upward(module, tree) + logs(module, tree) + long_functions(module, tree)
    if module in PURE:
        complaints += impurities(module, tree)
    assert len(complaints) == 1
    assert complaint in complaints[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from pbrd.routing import Rule"),
        ("plan", "from pbrd import __version__"),
        ("settings", "import socket"),
        ("kernel", "import socket, asyncio\nfrom .routing import Rule"),
        ("daemon", "import logging\nfrom . import kernel, plan"),
    ],
)
def test_the_doors_are_open(module: str, source: str) -> None:
    tree = ast.parse(source)
    assert upward(module, tree) + logs(module, tree) == []
    assert module not in PURE or impurities(module, tree) == []


def test_a_module_without_a_layer_is_named() -> None:
    with pytest.raises(LookupError, match="say in which layer it lives"):
        layer_of("surprise")
