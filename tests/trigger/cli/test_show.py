"""Tables for people, lines for pipes, JSON for programs."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from trigger.cli import show
from trigger.model import Bracket, Cause, Commit, CommitRecord, Finding, Mark, Outcome, RecoveryPoint, Severity, State
from trigger.position import History, Name, Position
from trigger.shape import data


def test_positions_are_text_times_utc_and_bytes_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    at = datetime(2026, 3, 1, 14, 0, 5, 250_000, timezone(timedelta(hours=2)))
    position = Position(History("postgres", "7391", 2), Lsn(0x16B374D848))
    commit = CommitRecord("bank", Name("", 7731), Lsn(16), Lsn(32), 5, ("m",), Outcome.PROTECTED)
    point = RecoveryPoint("id", 3, State.SEALED, Cause.COMMIT, (Mark(position),), at, commit)
    show.print_json({"point": point, "path": Path("/x"), "bytes": 1 << 40, "took": timedelta(seconds=1.5)})
    shown = json.loads(capsys.readouterr().out)
    assert shown["point"]["floor"] == "7391/2@16/B374D848"
    assert shown["point"]["opened_at"] == "2026-03-01T12:00:05.250000Z"
    assert shown["point"]["state"] == "sealed"
    assert shown["point"]["commit"]["start"] == "0/10"
    assert (shown["point"]["commit"]["name"], shown["point"]["commit"]["xid"]) == ("7731", 7731)
    assert shown["point"]["commit"]["outcome"] == "protected"
    assert (shown["path"], shown["bytes"], shown["took"]) == ("/x", 1 << 40, 1.5)


def test_what_readers_of_version_0_1_know_is_shown_beside_what_is_new() -> None:
    position = Position(History("postgres", "7391", 2, 1), Lsn(0x16B374D848))
    bracket = Bracket(position, position, {"label": "START\n", "tablespace_map": ""})
    marks = (Mark(position, position, position, bracket), Mark(Position(History("memory", "1"), 7)))
    at = datetime(2026, 3, 1, tzinfo=UTC)
    point = data(RecoveryPoint("id", 3, State.SEALED, Cause.COMMIT, marks, at))
    assert [point[key] for key in ("floor", "ceiling", "redo")] == ["7391/2+1@16/B374D848"] * 3
    assert (point["bracket"]["start"], point["bracket"]["label"], point["bracket"]["tablespace_map"]) == (
        "7391/2+1@16/B374D848",
        "START\n",
        "",
    )
    assert [mark["floor"] for mark in point["marks"]] == ["7391/2+1@16/B374D848", "1/0@7"]
    assert data(RecoveryPoint("id", 3, State.OPEN, Cause.DEMAND, marks[1:], at))["bracket"] is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [("7731", {"name": "7731", "xid": 7731}), ("0-1-57", {"name": "0-1-57"}), ("job", {"name": "job"})],
)
def test_a_name_that_is_nothing_but_a_number_is_shown_as_a_transaction_id_too(
    name: str, shown: dict[str, object]
) -> None:
    history = History("postgres", "7391", 1)
    commit = Commit("bank", history, Lsn(1), Lsn(2), Name.parse(name), 0)
    record = CommitRecord("bank", Name.parse(name), Lsn(1), Lsn(2), 0, (), Outcome.PROTECTED)
    for value in (commit, record):
        assert {key: value for key, value in data(value).items() if key in ("name", "xid")} == shown


def test_what_has_no_shape_is_an_error_of_the_program() -> None:
    with pytest.raises(TypeError, match="no JSON shape for object"):
        data(object())


def test_lines_for_pipes_are_aligned_and_never_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    show.table(("name", ">count", "text"), [("a", 5, "x" * 300), ("bbb", 1234, None), ("", 7, "two\nlines\there")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NAME  COUNT  TEXT"
    assert lines[1] == "a         5  " + "x" * 300
    assert lines[2] == "bbb    1234  -"
    assert lines[3] == "-         7  two lines here"


def test_a_table_without_rows_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show.table(("name",), [], empty="nothing here")
    assert capsys.readouterr().out == "nothing here\n"


def test_text_that_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show.say("[bold]x[/bold] [/]")
    show.facts([("a", "[red]"), ("none", None), ("empty", "")])
    show.error("[/nonsense]", "[hint]")
    show.finding(Finding("[s]", Severity.WARNING, "[m]", "[r]"))
    out, err = capsys.readouterr()
    assert out.splitlines() == ["[bold]x[/bold] [/]", "a  [red]", "warning  [s]: [m]", "         -> [r]"]
    assert err.splitlines() == ["error: [/nonsense]", "hint: [hint]"]


def test_each_line_of_an_error_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    show.error("one\ntwo")
    assert capsys.readouterr().err.splitlines() == ["error: one", "error: two"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (1 << 60, "1024.0 PiB")],
)
def test_sizes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert show.size(count) == text
    assert show.size(None) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.35, "350 ms"),
        (1, "1.0 s"),
        (59.94, "59.9 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7830, "2 h 10 min"),
        (86400 * 4 + 3 * 3600, "4 d 3 h"),
    ],
)
def test_durations_are_shown_in_two_units_at_most(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


@given(st.floats(0, 1e9))
def test_no_duration_shows_sixty_seconds_or_minutes(seconds: float) -> None:
    assert "60" not in (show.duration(seconds) or "").split()[1:]


def test_moments_are_shown_in_utc() -> None:
    at = datetime(2026, 3, 1, 12, 0, 5, 250_000, timezone(timedelta(hours=1)))
    assert show.moment(at) == "2026-03-01 11:00:05Z"
    assert show.moment(at.astimezone(UTC), digits=3) == "2026-03-01 11:00:05.250Z"
    assert show.moment(None) is None


def test_steps_are_lines_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with show.steps() as progress:
        for done in range(0, 100, 10):
            progress("clone", done, 100)
        progress("replay", 5, 0)
    assert capsys.readouterr().err.split() == ["clone", "replay"]


def test_what_is_not_shown_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    show.more(0, "points")
    show.more(-3, "points")
    show.more(2, "points")
    assert capsys.readouterr().out == "… and 2 more points (--limit)\n"


def test_a_terminal_gets_a_table_with_the_same_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show.table(("name", "state"), [("a[b]", State.SEALED)])
    out = capsys.readouterr().out
    assert "a[b]" in out
    assert "sealed" in out
