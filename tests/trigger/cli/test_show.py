"""Tables for people, lines for pipes, JSON for programs."""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import copy_context
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from trigger.cli import arguments, cli, service, show
from trigger.model import Bracket, Cause, Commit, CommitRecord, Finding, Mark, Outcome, RecoveryPoint, Severity, State
from trigger.position import History, Name, Position
from trigger.shape import data, json_text, plain, size


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
    assert lines[3] == "-         7  two\\nlines\\there"


def test_a_name_shows_its_ends_of_lines_and_its_blanks_wherever_it_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "two\nlines  and blanks "
    show.table(("name", "x"), [(name, 1)])
    show.facts([("marker", name)])
    show.say(name)
    show.note(name)
    out, err = capsys.readouterr()
    assert [line.count("two\\nlines  and blanks ") for line in (out + err).splitlines()] == [0, 1, 1, 1, 1]


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
    assert size(count) == text
    assert size(None) is None


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


HOSTILE = "a\x1b[2Jb\x9b31mc\x07\x00d\r\ne\x7ff\u202eg\u2028h\ufeffi\ud800j\U000e0001k"
"""What a table may be called: commands to terminals in both forms, ends of lines, turned writing, what is not seen."""


def printed_by(what: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Print `HOSTILE` in one way; gives what came out."""
    match what:
        case "say":
            show.say(HOSTILE)
        case "note":
            show.note(HOSTILE)
        case "facts":
            show.facts([("name", HOSTILE)])
        case "table":
            show.table(("name",), [(HOSTILE,)])
        case "empty table":
            show.table(("name",), [], empty=HOSTILE)
        case "finding":
            show.finding(Finding(HOSTILE, Severity.WARNING, HOSTILE, HOSTILE))
        case "error":
            show.error(HOSTILE, HOSTILE)
        case "json":
            show.print_json({HOSTILE: [HOSTILE]})
        case "log":
            print(show.LogLines().format(logging.makeLogRecord({"msg": HOSTILE})))
        case "steps":
            with show.steps() as progress:
                progress(HOSTILE, 1, 2)
    out, err = capsys.readouterr()
    return out + err


WAYS = ("say", "note", "facts", "table", "empty table", "finding", "error", "json", "log", "steps")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("what", WAYS)
def test_what_others_wrote_commands_no_terminal_however_it_is_printed(
    what: str, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if terminal:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    printed = printed_by(what, capsys)
    assert printed
    for line in printed.splitlines():
        assert re.sub(r"\x1b\[[0-9;]*m", "", line).isprintable(), line  # our own colours apart


def test_a_name_with_an_end_of_line_makes_no_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    name = 'public.t" is seen\nok       every table: nothing stands in the way'
    show.finding(Finding("bank", Severity.REFUSED, f"{name} has no replica identity", f"ALTER TABLE {name}"))
    show.say(f"{name}: NOT VERIFIED")
    show.note(name)
    out, err = capsys.readouterr()
    lines = out.splitlines() + err.splitlines()
    assert len(lines) == 4
    assert not any(line.startswith("ok ") for line in lines)
    assert lines[0].startswith(r'refused  bank: public.t" is seen\nok       every')


@given(st.text())
def test_json_that_commands_no_terminal_means_what_it_meant(text: str) -> None:
    written = json_text({"name": text})
    assert json.loads(written) == {"name": text}
    assert all(each.isprintable() or each.isspace() for each in written)


@given(st.text())
def test_text_for_people_is_one_line_and_what_can_be_printed_is_left_as_it_is(text: str) -> None:
    shown = plain(text)
    assert len(shown.splitlines()) <= 1
    assert plain(shown) == shown
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize("name", ["größe", "表\u3000名", "a b", "naïve 🐘", "\\x1b"])
def test_names_of_every_script_are_shown_as_they_are(name: str) -> None:
    assert plain(name) == name


@pytest.mark.parametrize("how", ["people", "journald", "json"])
def test_a_line_of_the_log_is_not_forged_by_what_is_logged(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    if how == "journald":
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        service.configure_logging(verbose=False, as_json=how == "json")
        logging.getLogger("trigger").error(
            "point 3 failed: %s", f"{HOSTILE}\n2026-01-01 00:00:00,000 INFO    all is well"
        )
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert "point 3 failed" in line
    assert "all is well" in line
    if how == "journald":
        assert line.startswith("<3>")


def test_commands_are_printed_as_they_are_typed_for_the_configuration_that_was_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shown(given: Path | None) -> str:
        arguments.before_command.set(None)
        arguments.config_path(given)
        show.facts([("restore", "trigpoint restore --to-xid 7")])
        show.finding(Finding("x", Severity.WARNING, "see `trigpoint list`", "trigpoint clones drop trigpoint"))
        show.error("no", "trigpoint restore --undo last, or trigpoint demo")
        return "".join(capsys.readouterr())

    as_found = copy_context().run(shown, None)
    assert "-c" not in as_found
    named = copy_context().run(shown, Path("/etc/a b.toml"))
    assert named.replace("trigpoint -c '/etc/a b.toml' ", "trigpoint ") == as_found
    assert named.count("-c '/etc/a b.toml'") == 4
    assert "drop trigpoint\n" in named
    assert "trigpoint demo" in named


def test_every_command_that_reads_a_configuration_is_known_by_its_name_where_it_is_printed() -> None:
    def reads(command: object) -> bool:
        below = getattr(command, "commands", {})
        options = {option for one in getattr(command, "params", ()) for option in one.opts}
        return "--config" in options or any(reads(one) for one in below.values())

    commands = cli.program.commands  # type: ignore[attr-defined]
    known = {name for name in commands if show._READS_IT.match(f"trigpoint {name} x")}
    assert known == {name for name, one in commands.items() if reads(one)} - {"config"}
