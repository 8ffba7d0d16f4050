"""Write the man pages, such as pbrd(1) and pbrd.toml(5): `manpages.py DIRECTORY`.

The pages are the Markdown of packaging/man/. A line `<!-- commands -->` there stands for what the parser of
the command line says, `<!-- include FILE -->` for a page of docs/ without its title, `<!-- sections FILE -->`
without what stands before its first section. So nothing is said twice.
"""

import re
import sys
import time
from collections.abc import Iterator
from os import environ
from pathlib import Path

from commandline import ROOT, Argument, commands, global_options

from pbrd import __version__

INCLUDE = re.compile(r"<!-- (include|sections) (\S+) -->")
INLINE = re.compile(
    r"`(?P<code>[^`]+)`|\*\*(?P<bold>.+?)\*\*|\*(?P<italic>[^*]+)\*"
    r"|\[(?P<text>[^]]+)]\((?P<link>[^)]+)\)|<(?P<url>https?://[^>]+)>",
    re.DOTALL,
)
CELL = re.compile(r"(?<!\\)\|")  # what parts the cells of a table: a bar, unless it is escaped


def escape(text: str) -> str:
    """Return `text` with nothing left that roff would interpret."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("^", "\\(ha")
    return re.sub(r"^(?=[.'])", r"\\&", escaped.replace("~", "\\(ti"), flags=re.MULTILINE)


def inline(text: str) -> str:
    """Return the roff of one paragraph's Markdown: code and bold in bold, links by their text."""
    parts, at = [], 0
    for match in INLINE.finditer(text):
        parts += [escape(text[at : match.start()]), _span(match)]
        at = match.end()
    return "".join([*parts, escape(text[at:])])


def _span(match: re.Match[str]) -> str:
    found = match.groupdict()
    if found["text"]:
        where = f" ({escape(found['link'])})" if found["link"].startswith("http") else ""
        return inline(found["text"]) + where
    if found["url"]:
        return escape(found["url"])
    if found["code"]:
        return rf"\fB{escape(found['code'])}\fR"
    # Code within bold stays bold.
    return (
        rf"\fB{escape(found['bold'].replace('`', ''))}\fR"
        if found["bold"]
        else rf"\fI{escape(found['italic'])}\fR"
    )


def blocks(markdown: str) -> Iterator[str]:
    """Yield the blocks of a page: headings, what blank lines part, and code with its fences."""
    block: list[str] = []
    for line in markdown.splitlines():
        if block and block[0].startswith("```"):
            block.append(line)
            ends = line.startswith("```")
        elif line.strip() and not line.startswith(("#", "```")):
            block.append(line)
            continue
        else:
            if block:
                yield "\n".join(block)
            block = [line] if line.strip() else []
            ends = line.startswith("#")
        if ends:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def roff(markdown: str) -> str:
    """Return the roff of a page of Markdown: headings, paragraphs, lists, tables, code, remarks."""
    return "\n".join(_block(block) for block in blocks(markdown))


def _block(block: str) -> str:
    if block.startswith("#"):
        marks, _, title = block.partition(" ")
        return f'.S{"H" if len(marks) < 3 else "S"} "{inline(title)}"'.replace(r"\fB", "").replace(r"\fR", "")
    if block.startswith("```"):
        return code("\n".join(block.splitlines()[1:-1]))
    if block.startswith("|"):
        return _table(
            [row for row in block.splitlines() if not re.fullmatch(r"[|:\- ]+", row) or row == "| | |"]
        )
    if block.startswith("- "):
        return "\n".join(rf".IP \(bu 2{chr(10)}{inline(item)}" for item in _items(block))
    if block.startswith("> "):
        block = re.sub(r"^> ?", "", block, flags=re.MULTILINE)
    return f".PP\n{inline(block)}"


def code(text: str) -> str:
    """Return the roff of lines that stand as they are."""
    return f".PP\n.RS 4\n.EX\n{escape(text)}\n.EE\n.RE"


def _items(block: str) -> list[str]:
    return [re.sub(r"\n +", "\n", item) for item in re.split(r"^- ", block, flags=re.MULTILINE)[1:]]


def _table(rows: list[str]) -> str:
    """Return a table of terms as tagged paragraphs, and one of figures as a table of tbl(1)."""
    header, *cells = [[cell.strip().replace("\\|", "|") for cell in CELL.split(row)[1:-1]] for row in rows]
    if header[1:2] == ["default"]:
        return "\n".join(tagged(row[0], f"{row[2]}{_default(row[1])}") for row in cells)
    if len(header) == 2:
        return "\n".join(tagged(*row) for row in cells)
    lines = [
        "\t".join(rf"T{{{chr(10)}{inline(cell)}{chr(10)}T}}" for cell in row) for row in [header, *cells]
    ]
    return "\n".join([".PP", ".TS", "allbox;", f"{'lx ' * len(header)}.", *lines, ".TE"])


def _default(text: str) -> str:
    return (
        f" ({text if text == 'must be set' or text.startswith('must') else f'default: {text}'})"
        if text
        else ""
    )


def tagged(term: str, text: str) -> str:
    """Return a term, and what is said of it, indented below."""
    return f".TP\n{inline(term)}\n{inline(text or '-')}"


def command_list() -> str:
    """Return the roff of all commands and of the global options."""
    lines = []
    for command in commands():
        usage = " ".join(
            ["pbrd", command.name, *(one.usage for one in (*command.options, *command.positionals))]
        )
        lines += [f'.SS "{escape(usage)}"', inline(f"{command.about[:1].upper()}{command.about[1:]}.")]
        lines += [_argument(one) for one in (*command.positionals, *command.options) if one.help]
        lines += [".PP", "Example:", code(command.example)] if command.example else []
    return "\n".join([*lines, '.SH "GLOBAL OPTIONS"', *(_argument(one) for one in global_options())])


def _argument(argument: Argument) -> str:
    flags = ", ".join(rf"\fB{escape(flag)}\fR" for flag in argument.flags)
    value = rf"\fI{escape(argument.metavar)}\fR" if argument.metavar else ""
    return f".TP\n{' '.join(filter(None, (flags, value)))}\n{inline(argument.help.replace('%%', '%'))}"


def page(source: Path) -> str:
    """Return one man page; `source` is named NAME.SECTION.md."""
    name, _, section = source.stem.rpartition(".")
    epoch = environ.get("SOURCE_DATE_EPOCH")
    date = time.strftime("%Y-%m-%d", time.gmtime(int(epoch))) if epoch else ""
    body = []
    for part in re.split(r"^(<!-- .+ -->)$", source.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if part == "<!-- commands -->":
            body.append(command_list())
        elif include := INCLUDE.fullmatch(part):
            text = (ROOT / include[2]).read_text(encoding="utf-8")
            body.append(roff(text[text.index("\n## " if include[1] == "sections" else "\n") :]))
        else:
            body.append(roff(part))
    text = "\n".join(filter(None, body))
    first = "'\\\" t\n" if ".TS" in text else ""  # tells man to call tbl
    return f'{first}.TH {name} {section} "{date}" "pbrd {__version__}"\n.nh\n.ad l\n{text}\n'


def main(directory: Path) -> None:
    """Write all pages into `directory`."""
    for source in sorted((ROOT / "packaging" / "man").glob("*.md")):
        (directory / source.stem).write_text(page(source), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: manpages.py DIRECTORY")
    main(Path(sys.argv[1]))
