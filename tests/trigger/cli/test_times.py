"""How people write times."""

from __future__ import annotations

import time as clock
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from trigger import errors
from trigger.cli import arguments


def test_a_naive_time_is_refused_with_the_remedy() -> None:
    with pytest.raises(errors.ConfigError) as refused:
        arguments.time("2026-03-01T12:00:00")
    assert "2026-03-01T12:00:00Z" in refused.value.hint
    assert arguments.time("2026-03-01T12:00:00+02:00").utcoffset() is not None


def test_now_is_a_time() -> None:
    before = datetime.now(UTC)
    assert before <= arguments.time(" now ") <= datetime.now(UTC)


@pytest.fixture
def host_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Let this host be in another zone; nobody's by default."""
    monkeypatch.setenv("TZ", getattr(request, "param", "UTC"))
    clock.tzset()
    yield
    monkeypatch.undo()
    clock.tzset()


@pytest.mark.usefixtures("host_in")
@pytest.mark.parametrize("day", ["2026-01-05", "2026-07-05"])
@pytest.mark.parametrize(
    ("zone", "hours"),
    [
        *(("UTC", 0), ("GMT", 0), ("CET", 1), ("CEST", 2), ("BST", 1), ("MSK", 3), ("JST", 9), ("AEDT", 11)),
        *(("EST", -5), ("EDT", -4), ("PDT", -7), ("-03", -3), ("+01", 1), ("+0530", 5.5), ("+05:45", 5.75)),
    ],
)
def test_a_time_as_the_log_prints_it_is_understood(zone: str, hours: float, day: str) -> None:
    expected = datetime.fromisoformat(f"{day} 12:00:05.250Z") - timedelta(hours=hours)
    assert arguments.time(f"{day} 12:00:05.250 {zone}") == expected


@pytest.mark.usefixtures("host_in")
@pytest.mark.parametrize(
    ("written", "words", "hint"),
    [
        (
            "2026-07-05 12:00 CST",
            "the zone CST at 2026-07-05 12:00:00 may be -06:00 or -05:00 or +08:00",
            "12:00:00-06:00",
        ),
        (
            "2026-07-05 12:00 IST",
            "the zone IST at 2026-07-05 12:00:00 may be +01:00 or +02:00 or +05:30",
            "12:00:00+01:00",
        ),
        ("2026-07-05 12:00 PST", "the zone PST at 2026-07-05 12:00:00 may be -08:00 or +08:00", "12:00:00-08:00"),
        ("2026-10-25 02:30 Europe/Berlin", "may be +01:00 or +02:00", "02:30:00+01:00"),
        ("2026-07-05 12:00 AEDTX", "the zone 'AEDTX' is not known", "12:00:00+00:00"),
        ("2026-07-05 12:00+02 CET", "not a time: '2026-07-05 12:00+02 CET'", "ISO-8601"),
        ("tuesday noon", "not a time: 'tuesday noon'", "ISO-8601"),
    ],
)
def test_a_zone_that_does_not_say_which_moment_is_meant_is_refused_by_its_name(
    written: str, words: str, hint: str
) -> None:
    with pytest.raises(errors.ConfigError) as refused:
        arguments.time(written)
    assert words in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.usefixtures("host_in")
@pytest.mark.parametrize(
    ("host_in", "zone", "hours"),
    [("Asia/Shanghai", "CST", 8), ("America/Chicago", "CST", -6), ("Asia/Kolkata", "IST", 5.5)],
    indirect=["host_in"],
)
def test_an_abbreviation_of_this_hosts_own_zone_means_that_one(zone: str, hours: float) -> None:
    expected = datetime(2026, 1, 5, 12, tzinfo=UTC) - timedelta(hours=hours)
    assert arguments.time(f"2026-01-05 12:00 {zone}") == expected
