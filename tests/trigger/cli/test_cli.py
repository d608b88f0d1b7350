"""The command line without a server: help, exit codes, messages, the shapes of answers."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from trigger import __main__ as program
from trigger import errors
from trigger.cli import arguments, cli, json_reference
from trigger.cli.in_place import Wishes, take_back
from trigger.cli.restores import TARGETS, _became, drop_clones
from trigger.config.options import Options
from trigger.errors import ConfigError
from trigger.lock import lock
from trigger.model import RecoveryPoint
from trigger.restore.swap import Swap
from trigger.service.control import NotRunningError, _ours_alone

ROOT = Path(__file__).parents[3]

COMMANDS = (
    *(
        "init",
        "check",
        "explain",
        "run",
        "point",
        "status",
        "list",
        "show",
        "find",
        "commits",
        "restore",
        "verify",
        "expire",
    ),
    *("reconcile", "clear", "release", "clones", "aside", "catalog", "rules", "config"),
)
BELOW = (
    ("clones", "list"),
    ("clones", "drop"),
    ("clones", "start"),
    ("clones", "stop"),
    ("aside", "list"),
    ("aside", "drop"),
    ("catalog", "rebuild"),
    ("rules", "test"),
    ("config", "check"),
)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command where no configuration lies about."""
    (tmp_path / "nowhere").mkdir()
    monkeypatch.chdir(tmp_path / "nowhere")
    monkeypatch.delenv("TRIGPOINT_CONFIG", raising=False)
    monkeypatch.setattr(arguments, "SYSTEM_CONFIG", tmp_path / "etc" / "trigpoint.toml")


def trigpoint(*arguments: str | Path) -> int:
    """Run a command as a process of its own would: what it is told before its name is forgotten at the end."""
    return copy_context().run(program.main, [str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("command", [(), *((name,) for name in (*COMMANDS, "demo")), *BELOW], ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert trigpoint(*command, "--help") == 0
    assert "Usage: trigpoint" in capsys.readouterr().out


def test_every_command_of_the_program_is_known_to_this_test(capsys: pytest.CaptureFixture[str]) -> None:
    trigpoint("--help")
    listed = re.findall(r"^│ ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert set(listed) == {*COMMANDS, "demo"}


def test_a_program_without_a_command_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert trigpoint() in (0, 2)
    assert "restore" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert trigpoint("--version") == 0
    assert re.fullmatch(r"trigpoint \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_documented_exit_codes_are_those_of_the_errors(capsys: pytest.CaptureFixture[str]) -> None:
    raised = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.TrigpointError)
    }
    assert raised <= {code for code, _ in cli.EXIT_CODES}
    trigpoint("--help")
    help_text = capsys.readouterr().out
    assert all(re.search(rf"^ +• {code}: ", help_text, re.MULTILINE) for code, _ in cli.EXIT_CODES)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_there_for_every_shell(shell: str) -> None:
    asked = {"bash": "complete_bash", "zsh": "complete_zsh", "fish": "complete_fish"}[shell]
    environment = dict(os.environ) | {
        "_TRIGPOINT_COMPLETE": asked,
        "COMP_WORDS": "trigpoint re",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "trigpoint re",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "trigger"], env=environment, capture_output=True, text=True, check=False
    )
    assert "restore" in done.stdout
    assert "verify" not in done.stdout


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("cofnig",), "No such command 'cofnig'. Did you mean 'config'?"),
        (("list", "--limt", "3"), "--limt"),
        (("list", "--limit", "many"), "Invalid value for '--limit'"),
        (("list", "--limit", "0"), "greater than or equal to 1"),
        (("list", "--state", "seald"), "seald"),
        (("show",), "Missing argument"),
        (("rules", "test", "--last", "1", "--watch", "1"), "give one of --last, --watch and --file"),
        (("rules", "test", "--file", "x", "--record", "y"), "--record does not go with --file"),
        (("clones", "start", "a", "b", "--listen", "127.0.0.1:5433"), "--listen is for one clone"),
        (("restore", "--from-clone", "a"), "--from-clone goes with --in-place only"),
        (("restore", "--in-place", "--from-clone", "a"), "this will put clone a where production of"),
        (("restore", "--in-place", "--to-latest"), "--dry-run says which commits would be lost; give --yes to"),
        (("aside", "drop", "20260501T120000Z"), "this will remove for good what lies aside of 20260501T120000Z"),
        (("clones", "start", "a", "--listen", "5433"), "not an address and a port: '5433'"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_with_a_hint(
    command: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    assert trigpoint("-c", config, *command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert "\nhint: " in err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "no target is named"),
        (("--to-xid", "1", "--to-lsn", "0/1"), "2 targets are named"),
        (("--to-xid", "1", "--before-xid", "1", "--to-marker", "m"), "3 targets are named"),
        (("--to-xid", ""), "no transaction is named"),
        (("--before-xid", " "), "no transaction is named"),
        (("--to-lsn", "0-1"), "not an LSN: '0-1'"),
        (("--to-time", "yesterday"), "not a time: 'yesterday'"),
        (("--to-time", "2026-03-01T12:00:00"), "has no zone"),
        (("--to-time", "2026-03-01"), "has no zone"),
    ],
)
def test_a_restore_needs_exactly_one_readable_target(
    given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    assert trigpoint("restore", "-c", config, *given) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "hint: " in err


@pytest.mark.parametrize("text", ["7731", "0-1-57", "-7", "seven", str(1 << 64), " 7731 "])
def test_a_transaction_is_named_by_any_text(text: str) -> None:
    assert str(arguments.transaction(text)) == text.strip()


def test_the_targets_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    trigpoint("restore", "--help")
    help_text = capsys.readouterr().out
    assert all(target in help_text for target in TARGETS.split(", "))


NESTED = ExceptionGroup("g", [ExceptionGroup("h", [errors.AgentError("a")]), errors.CatalogError("b")])
DENIED = PermissionError(13, "Permission denied", "/x")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.StorageError("no room", hint="make some"), 6, "error: no room\nhint: make some\n"),
        (NESTED, 5, "error: a\nerror: b\n"),
        (DENIED, 1, "error: /x: Permission denied\nhint: run it as the user that may, or as root\n"),
        (OSError("odd"), 1, "error: odd\n"),
        (cli.Abort(), 1, "error: not done, as you wished\n"),
    ],
)
def test_an_expected_error_is_a_message_and_its_exit_code(
    error: Exception, code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "program", fail)
    assert program.main([]) == code
    assert capsys.readouterr().err == words


@pytest.mark.parametrize("error", [ValueError("x"), ExceptionGroup("g", [errors.AgentError("a"), KeyError("k")])])
def test_an_error_of_the_program_keeps_its_trace(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "program", fail)
    with pytest.raises(type(error)):
        program.main([])


def test_a_reader_that_leaves_ends_the_program_without_a_word() -> None:
    command = f"{sys.executable} -m trigger config reference | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["config reference --json", "config reference", "--version"])
def test_a_stream_that_the_shell_has_closed_is_no_error(command: str, closed: str) -> None:
    shell = ["bash", "-c", f"{sys.executable} -m trigger {command} {closed}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)


# ----------------------------------------------------------------------------------------------- configuration


def test_the_configuration_is_found_in_the_documented_order(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arguments.config_path(None) == tmp_path / "etc" / "trigpoint.toml"
    Path("trigpoint.toml").touch()
    assert arguments.config_path(None) == Path("trigpoint.toml")
    monkeypatch.setenv("TRIGPOINT_CONFIG", "/from/environment.toml")
    assert arguments.config_path(None) == Path("/from/environment.toml")
    assert arguments.config_path(config) == config


def test_the_configuration_may_stand_before_or_behind_the_command(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trigpoint("-c", config, "config", "check", "--json") == 0
    before = json.loads(capsys.readouterr().out)
    assert trigpoint("config", "check", "--json", "--config", config) == 0
    assert json.loads(capsys.readouterr().out) == before == {"file": str(config), "name": "main", "right": True}


def test_no_configuration_is_exit_code_2_with_the_way_to_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert trigpoint("list") == 2
    assert "`trigpoint init` writes a configuration" in capsys.readouterr().err


def test_every_mistake_of_a_configuration_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text() + "budget = 1\nkeepfree = 3\n")
    assert trigpoint("config", "check", "-c", config) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {config}:10: storage.budget: must be 2 or more, not 1"
    assert lines[1] == f"error: {config}:11: storage.keepfree: there is no such key; did you mean keep_free?"


@pytest.mark.parametrize("form", ["markdown", "man", "toml", "json-shapes"])
def test_the_reference_is_printed_in_every_form(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trigpoint("config", "reference", "--format", form) == 0
    out = capsys.readouterr().out
    assert ("RecoveryPoint" if form == "json-shapes" else "min_interval_seconds") in out


def test_every_field_of_an_answer_is_in_its_reference() -> None:
    names = {shape.name: shape for shape in json_reference.shapes()}
    assert {"RecoveryPoint", "CommitRecord", "Flush", "Snapshot", "Gap", "Report", "Plan", "Location"} <= set(names)
    fields = {field.name for field in dataclasses.fields(RecoveryPoint)}
    assert set(names["RecoveryPoint"].fields) == fields | {"floor", "ceiling", "redo", "bracket"}
    assert {"name", "xid"} <= set(names["CommitRecord"].fields)
    assert names["RecoveryPoint"].fields["number"] == (
        "number",
        "Counts up from 1 in one catalog; what people say.",
    )
    assert names["CommitRecord"].fields["start"][0] == "place"
    assert all(shape.doc for shape in names.values())


def test_every_command_that_prints_json_says_in_the_reference_what_it_prints() -> None:
    described = {name for command, _ in json_reference.SHAPES for name in command.split(", ")}
    described = {name.partition(" --")[0] for name in described} | set(json_reference.OBJECTS)
    assert set(_printing_json(cli.program)) | {"demo"} == described


def _printing_json(command: Any, words: tuple[str, ...] = ()) -> Iterator[str]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from _printing_json(inner, (*words, name))
    if any("--json" in parameter.opts for parameter in command.params):
        yield " ".join(words)


def test_the_reference_is_data_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert trigpoint("config", "reference", "--json") == 0
    sections = json.loads(capsys.readouterr().out)
    (budget,) = [option for section in sections for option in section["options"] if option["key"] == "storage.budget"]
    assert (budget["type"], budget["default"], budget["required"]) == ("whole number", 200, False)


# --------------------------------------------------------------------------------------- without a server at all


def test_commands_that_read_the_catalog_say_that_there_is_none(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (("list",), ("show", "1"), ("list", "--gaps")):
        assert trigpoint("-c", config, *command) == errors.CatalogError.exit_code
        assert "there is no catalog at" in capsys.readouterr().err
    assert not (config.parent / "state").exists(), "looking makes nothing"


def test_status_without_a_service_is_exit_code_1(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trigpoint("-c", config, "status", "--json") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "no service answers" in err
    assert re.search(r"trigpoint (-c \S+ )?run", err)


@pytest.mark.parametrize("command", [("check",), ("explain",), ("point",), ("run",), ("init", "-o", "x.toml")])
def test_a_cluster_that_does_not_answer_is_exit_code_4(
    command: tuple[str, ...], config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = ("--conninfo", f"host={tmp_path}") if command[0] == "init" else ("-c", str(config))
    assert trigpoint(*command, *more) == errors.DatabaseError.exit_code
    err = capsys.readouterr().err
    assert "error: no connection to the database" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "host"), [("127.0.0.1:5433", "127.0.0.1"), ("[::1]:5433", "::1"), ("0.0.0.0:5433", "0.0.0.0")]
)
def test_an_address_to_listen_at_is_an_ip_address_and_a_port(text: str, host: str) -> None:
    assert arguments.address(text) == (host, 5433)


@pytest.mark.parametrize("text", ["5433", ":5433", "127.0.0.1", "127.0.0.1:0", "::1:5433", "a:5433", "1.2.3.4:70000"])
def test_what_is_no_address_to_listen_at_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(errors.ConfigError, match="not an address and a port") as caught:
        arguments.address(text)
    assert "127.0.0.1:5433" in caught.value.hint


def test_without_a_service_nobody_knows_the_last_commits(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trigpoint("rules", "test", "-c", config, "--last", "5") == NotRunningError.exit_code
    err = " ".join(capsys.readouterr().err.split())
    assert "no service answers at" in err
    assert "watch the commits to come: --watch MINUTES" in err


def test_rules_are_tried_on_a_file(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text() + '[[rules]]\nname = "big"\nleast_rows = 2\n')
    file = tmp_path / "commits.jsonl"
    file.write_text(
        '{"time": "2026-03-01T12:00:05Z", "xid": 7, "tables": {"public.a": {"updated": 2}}}\n'
        '{"time": "2026-03-01T12:00:05.5Z", "xid": 8, "tables": {"public.a": {"updated": 9}}}\n'
        '{"time": "2026-03-01T12:00:05.6Z", "xid": 9, "tables": {"public.a": {"updated": 9}}}\n'
        '{"time": "2026-03-01T12:00:06Z", "xid": 10, "tables": {"public.a": {"updated": 1}}}\n'
    )
    assert trigpoint("rules", "test", "-c", config, "--file", file, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == list(json_reference.REHEARSAL)
    assert {key: answer[key] for key in ("seen", "qualifying", "protected", "coalesced", "passed_over")} == {
        "seen": 4,
        "qualifying": 3,
        "protected": 2,
        "coalesced": 1,
        "passed_over": 1,
    }
    assert [(one["xid"], one["rule"], one["outcome"], one["point"]) for one in answer["commits"]] == [
        (7, "big", "protected", 1),
        (8, "big", "coalesced", 2),
        (9, "big", "protected", 2),
        (10, None, None, None),
    ]
    assert [point["began_at"] for point in answer["points"]] == [
        "2026-03-01T12:00:05Z",
        "2026-03-01T12:00:06Z",
    ]
    assert trigpoint("rules", "test", "-c", config, "--file", file, "--limit", "1") == 0
    out = capsys.readouterr().out
    assert "… and 3 more commits (--limit)" in out
    assert "4, of which 3 qualify (big 3)" in out


def test_a_file_of_commits_that_is_wrong_is_named_with_the_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "commits.jsonl"
    file.write_text('{"time": "2026-03-01T12:00:05Z"}\n{"tiem": 1}\n')
    assert trigpoint("rules", "test", "-c", config, "--file", file) == 2
    assert f"error: {file}:2: a commit has no tiem; did you mean time?" in capsys.readouterr().err
    file.write_bytes(b"\xff")
    assert trigpoint("rules", "test", "-c", config, "--file", file) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert trigpoint("rules", "test", "-c", config, "--file", tmp_path / "none") == 1
    assert "none: No such file or directory" in capsys.readouterr().err


def test_init_never_replaces_a_file_unasked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = config.read_text()
    assert trigpoint("init", "--output", config) == 2
    assert "is there already" in capsys.readouterr().err
    assert config.read_text() == before


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.EROFS, "is read-only")])
def test_a_disk_that_takes_no_lock_and_no_socket_is_named_with_a_remedy(
    tmp_path: Path, number: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused, on_a_socket = (OSError(number, os.strerror(number)) for _ in range(2))
    with (
        patch("trigger.trusted.os.open", side_effect=_only_new_files(refused)),
        pytest.raises(OSError, match=refused.strerror) as locked,
    ):
        lock(tmp_path / "lock")
    with (
        patch("trigger.service.control.os.fchmod"),
        patch("trigger.service.control.socket.socket", return_value=Mock(**{"bind.side_effect": on_a_socket})),
        pytest.raises(OSError, match=refused.strerror) as bound,
    ):
        _ours_alone(tmp_path / "control.sock")
    for error, name in ((locked.value, "lock"), (bound.value, "control.sock")):
        assert program._explain(error) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert f"error: {tmp_path / name}: {os.strerror(number)}" in said
        assert remedy in said


def _only_new_files(error: OSError) -> Callable[..., int]:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            raise error
        return real(path, flags, *rest, **named)

    return refuse


def test_of_two_restores_in_place_only_the_later_one_stands_there_if_nothing_else_does() -> None:
    first, second = (Swap(name, "commit 7", "clone", (), finished=True) for name in ("1", "2"))
    assert _became(first, second, "").startswith("stood in place of production before 2; once that is taken back")
    back = "trigpoint restore --undo 2 puts the old state back"
    assert _became(second, None, "") == f"stands in place of production; {back}"
    cut_off = replace(second, finished=False)
    assert _became(cut_off, None, "") == f"was cut off on the way into production's place; {back}"
    other = _became(second, None, "7391/1 lies at /data")
    assert other == "was put in place of production by 2, and stands there no more: 7391/1 lies at /data"


def test_clones_are_not_dropped_and_restores_in_place_not_taken_back_unasked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this will put back what lay in place of production of bank"):
        take_back("last", Options.model_construct(name="bank"), Wishes(False, False, False), dry_run=False)
    with pytest.raises(ConfigError, match="this will stop and remove") as refused:
        drop_clones(["one", "two"], config=tmp_path / "nothing.toml")
    assert "--yes" in refused.value.hint
