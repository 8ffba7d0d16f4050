"""Names for our tables and our protocol number, so that `ip rule` and `ip route` speak plainly.

The files are drop-ins of iproute2 (`rt_tables.d`, `rt_protos.d`); only a file that begins with our
header is ever replaced or removed.
"""

from contextlib import suppress
from pathlib import Path

from pbrd.routing import table_names
from pbrd.settings import PROTOCOL, Config

HEADER = "# written by pbrd; changes are lost\n"


def files(config: Config) -> dict[Path, str]:
    """Return path → text of the files that name what `config` makes; none if it wants no names."""
    if not config.daemon.names:
        return {}
    directory = Path(config.daemon.names)
    tables = "".join(f"{table} {name}\n" for table, name in table_names(config))
    return {
        directory / "rt_tables.d" / "pbrd.conf": HEADER + tables,
        directory / "rt_protos.d" / "pbrd.conf": f"{HEADER}{PROTOCOL} pbrd\n",
    }


def register(config: Config) -> str | None:
    """Write the files; return why that failed, or None. Names are a comfort: no reason to stop."""
    try:
        for path, text in files(config).items():
            if not path.exists() or (_is_ours(path) and path.read_bytes() != text.encode()):
                if not path.parent.exists():
                    path.parent.mkdir(parents=True)
                    path.parent.chmod(0o755)  # for every user's `ip`, whatever our umask is
                path.write_text(text)
                path.chmod(0o644)
    except OSError as error:
        return f"cannot write {error.filename}: {error.strerror}"
    return None


def move(former: Config, fresh: Config) -> None:
    """Remove the files of `former`, unless `register` is about to write `fresh` in the same place."""
    if files(former).keys() != files(fresh).keys():
        unregister(former)


def unregister(config: Config) -> None:
    """Remove the files that `register` wrote."""
    for path in files(config):
        with suppress(OSError):
            if _is_ours(path):
                path.unlink()


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.read_bytes().startswith(HEADER.encode())
