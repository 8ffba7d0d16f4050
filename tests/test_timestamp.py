"""Points in time: what `--since` takes is what systemd takes."""

import shutil
import subprocess
from datetime import datetime, timedelta

import pytest

from pbrd.errors import PbrdError
from pbrd.timestamp import parse

SHARED = [
    "now",
    "today",
    "yesterday",
    "17:00",
    "17:00:30",
    "2026-11-22",
    "2026-07-22 17:00",
    "2026-11-22 17:00:30",
    "2026-11-22 17:00:00 UTC",
    "@1700000000",
    "@1700000000.5",
    "1h ago",
    "1h 30min ago",
    "1h30m ago",
    "-90s",
    "5 ago",
    "2 days ago",
    "1 month ago",
    "500ms ago",
]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
@pytest.mark.parametrize("text", SHARED)
def test_systemd_takes_it_for_the_same_moment(text: str) -> None:
    told = subprocess.run(
        ["systemd-analyze", "timestamp", "--", text],
        capture_output=True,
        text=True,
        check=True,
        env={"LC_ALL": "C"},
    ).stdout
    seconds = float(next(line.split("@")[1] for line in told.splitlines() if "UNIX seconds" in line))
    assert parse(text, datetime.now().astimezone()).timestamp() == pytest.approx(seconds, abs=5)


def test_iso_8601_with_a_zone_is_taken_as_it_stands() -> None:
    now = datetime.now().astimezone()
    for text in ("2026-11-22T17:43:48.723Z", "2026-11-22T18:43:48.723+01:00"):
        assert parse(text, now).timestamp() == 1795369428.723
    assert parse(now.isoformat(), now) == now
    assert now - parse("-1d", now) == timedelta(days=1)


@pytest.mark.parametrize(
    "text",
    ["", "soon", "1h", "1 fortnight ago", "25:00", "2026-13-01", "ago", "-", "@x", "1e9 ago", "@1e300"],
)
def test_anything_else_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(PbrdError, match=r'is no point in time; write one as "2026-11-22 17:00"'):
        parse(text, datetime.now().astimezone())
