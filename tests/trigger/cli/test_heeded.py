"""No option is taken and passed over in silence: what a command does not heed beside another one, it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trigger.cli.test_cli import trigpoint

UNHEEDED_IN_PLACE = (
    *(("--to-lsn", "0/1"), ("--to-xid", "7"), ("--to-time", "now"), ("--to-latest",), ("--to-point", "1")),
    *(("--to-marker", "m"), ("--before-xid", "7"), ("--name", "b"), ("--database", "bank"), ("--timeline", "1")),
    ("--history", "7/1"),
)


@pytest.mark.parametrize("given", UNHEEDED_IN_PLACE, ids=lambda given: str(given[0]))
@pytest.mark.parametrize("option", ["--undo", "--resume", "--from-clone"])
def test_what_names_a_state_is_refused_beside_what_names_a_restore_or_a_clone(
    option: str, given: tuple[str, ...], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--in-place",) if option == "--from-clone" else ()
    assert trigpoint("restore", "-c", config, option, "last", *more, *given, "--yes") == 2
    assert capsys.readouterr().err == (f"error: {option} does not go with {given[0]}\nhint: leave out {given[0]}\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("restore", "--undo", "last", "--in-place"), "--undo does not go with --in-place"),
        (("restore", "--resume", "last", "--in-place"), "--resume does not go with --in-place"),
        (("restore", "--undo", "last", "--resume", "last"), "--undo does not go with --resume"),
        (("restore", "--undo", "last", "--replace-cluster"), "--undo does not go with --replace-cluster"),
        (("restore", "--undo", "last", "--from-clone", "a"), "--undo does not go with --from-clone"),
        (("restore", "--to-xid", "7", "--replace-cluster"), "--replace-cluster goes with --in-place only"),
        (("restore", "--to-point", "1", "--history", "7/1"), "--to-point does not go with --history"),
        (("restore", "--to-point", "1", "--timeline", "1"), "--to-point does not go with --timeline"),
        (("restore", "--to-point", "1", "--database", "bank"), "--to-point does not go with --database"),
        (("restore", "--to-xid", "1", "--timeline", "1", "--history", "7/1"), "--timeline does not go with --history"),
        (("restore", "--to-xid", "1", "--in-place", "--name", "a"), "--in-place does not go with --name"),
        (("list", "--gaps", "--state", "sealed"), "--gaps does not go with --state"),
        (("list", "--gaps", "--limit", "30"), "--gaps does not go with --limit"),
        (("list", "--gaps", "--before", "1"), "--gaps does not go with --before"),
        (("config", "reference", "--json", "--format", "man"), "--json does not go with --format"),
        (("demo", "--stop", "--keep", "--json", "--folder", "/x"), "--stop does not go with --keep, --json"),
        (("clones", "--json", "list"), "--json stands before the command"),
        (("aside", "--json", "list"), "--json stands before the command"),
    ],
)
def test_an_option_that_would_be_passed_over_is_refused(
    command: tuple[str, ...], words: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trigpoint("-c", config, *command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {words}")
    assert "\nhint: " in err


@pytest.mark.parametrize("command", [("clones", "list"), ("clones", "drop", "a", "--yes"), ("aside", "list")])
def test_a_configuration_between_two_names_of_a_command_is_the_one_that_counts(
    command: tuple[str, ...],
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIGPOINT_CONFIG", str(config))
    assert trigpoint(command[0], "-c", tmp_path / "other.toml", *command[1:]) == 2
    assert str(tmp_path / "other.toml") in capsys.readouterr().err
