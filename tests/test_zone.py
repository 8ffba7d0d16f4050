from datetime import UTC, datetime

import pytest

from pbrd.zone import local_zone

SUMMER, WINTER = datetime(2026, 7, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("name", ["Europe/Berlin", ":Europe/Berlin", "/usr/share/zoneinfo/Europe/Berlin"])
def test_the_zone_knows_its_clock_changes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TZ", name)
    hours = [moment.astimezone(local_zone()).hour for moment in (SUMMER, WINTER)]
    assert hours == [2, 1]


@pytest.mark.parametrize(
    "name", ["", "CET-1CEST", "No/Where", "/etc/passwd", "/no/such/file", "../../etc/passwd"]
)
def test_there_is_always_a_zone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TZ", name)
    assert SUMMER.astimezone(local_zone()).utcoffset() is not None
