"""Drivers that nothing in the service knows bring their own sections, by lines in the table of drivers alone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from connectors import DRIVERS
from tests.trigger.config.stranger import TABLE, LedgerOptions, RowsOptions, ShelvesOptions
from tests.trigger.config.test_options import SMALLEST
from trigger import __main__ as program
from trigger.config.options import Options, parse, reached
from trigger.config.reference import Option, facts, man_text, markdown_text, sections, toml_text
from trigger.config.sections import AgentOptions
from trigger.errors import ConfigError

STRANGE = """\
state_folder = "/var/lib/trigpoint"
[database]
driver = "binlog"
url = "ledger://one"
databases = ["accounts"]
[[volumes]]
name = "data"
path = "/memory/data"
[agent]
driver = "courier"
bags = 3
[storage]
driver = "shelves"
folder = "/memory/shelves"
shelves = 2
[journal]
ink = "red"
[restore]
pages_at_once = 7
"""


@pytest.fixture(autouse=True)
def _strangers_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, where in TABLE.items():
        monkeypatch.setitem(DRIVERS, name, where)


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(text, "x")
    return error.value.message


# ------------------------------------------------------------------------------------------------------ reading


def test_each_table_is_read_as_its_driver_has_it() -> None:
    read = parse(STRANGE, "x")
    assert isinstance(read, Options)
    assert isinstance(read.database, LedgerOptions)
    assert (read.database.driver, read.database.url, read.database.deadline_seconds) == ("binlog", "ledger://one", 99)
    assert isinstance(read.storage, ShelvesOptions)
    assert (read.storage.shelves, read.storage.budget) == (2, 200)
    assert read.restore.model_dump() == {"deadline_seconds": 3600, "pages_at_once": 7}
    assert isinstance(read.agent, AgentOptions)
    assert read.agent.deadline_seconds == 30


def test_the_log_of_a_database_is_kept_by_a_journal_of_its_own_where_none_is_named() -> None:
    read = parse(STRANGE, "x")
    assert isinstance(read.journal, RowsOptions)
    assert read.journal.driver == "rows"
    assert parse(SMALLEST, "x").journal.driver == "receivewal"


def test_what_was_there_is_read_as_before_beside_strangers() -> None:
    read = parse(SMALLEST, "x")
    assert [getattr(read, table).driver for table in ("database", "agent", "storage", "journal")] == [
        *("postgres", "local", "directory", "receivewal")
    ]


def test_files_that_nobody_else_may_write_are_named_by_the_sections() -> None:
    assert parse(STRANGE, "x").guarded_files == ()
    text = STRANGE.replace("[[volumes]]", 'key_file = "/etc/key"\n[[volumes]]')
    assert parse(text, "x").guarded_files == (Path("/etc/key"),)
    text = SMALLEST.replace("[[volumes]]", 'password_file = "/p"\n[[volumes]]') + '[agent]\nhooks = "/h"\n'
    assert parse(text, "x").guarded_files == (Path("/p"), Path("/h"))


# -------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('url = "ledger://one"', "url = 3", "x:4: database.url: must be text in quotes, not 3"),
        ('url = "ledger://one"\n', "", 'x:2: database.url: is needed with database.driver = "binlog", and not there'),
        ('"binlog"\n', '"binlog"\nulr = "x"\n', "x:4: database.ulr: there is no such key; did you mean url?"),
        (
            '"binlog"\n',
            '"binlog"\nconninfo = "host=/"\n',
            'x:4: database.conninfo: there is such a key with database.driver = "postgres" only',
        ),
        ('"binlog"\n', '"binlog"\npin = "12345"\n', "x:4: database.pin: must have 4 characters at most"),
        ('"binlog"\n', '"binlog"\nreplicas = [{ url = "ledger://one" }]\n', "x:2: database: is a replica of itself"),
        ('"binlog"\n', '"binlog"\nreplicas = [{ uri = "x" }]\n', "uri: there is no such key; did you mean url?"),
        ("shelves = 2", "shelves = 0", "x:15: storage.shelves: must be 1 or more, not 0"),
        (
            '"shelves"\n',
            '"zfs"\n',
            """x:13: storage.driver: must be 'directory', 'btrfs' or 'shelves', not "zfs\"""",
        ),
        (
            "[journal]\n",
            '[journal]\ndriver = "archive"\n',
            """x:17: journal.driver: must be 'rows', not "archive\"""",
        ),
        (
            "pages_at_once = 7",
            'superuser = "me"',
            'x:19: restore.superuser: there is such a key with database.driver = "postgres" only',
        ),
    ],
)
def test_a_mistake_in_a_strangers_section_is_told_with_its_place(old: str, new: str, message: str) -> None:
    said = refused(STRANGE.replace(old, new, 1))
    assert message in said
    assert "12345" not in said


def test_a_database_without_a_journal_is_refused_and_nothing_else_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("journal/rows", "options/journal/rows"):
        monkeypatch.delitem(DRIVERS, name)
    assert refused(STRANGE) == 'x: journal: no driver goes with database.driver = "binlog"'


def test_a_driver_that_brings_no_section_has_what_the_service_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DRIVERS, "options/agent/courier")
    assert parse(STRANGE.replace("bags = 3", "deadline_seconds = 5"), "x").agent.deadline_seconds == 5
    assert "agent.bags: there is no such key" in refused(STRANGE)


# ------------------------------------------------------------------------------------------------ the reference


def option(key: str, driver: str) -> Option:
    found = [option for section in sections() for option in section.options if option.key == key]
    (one,) = [option for option in found if not option.drivers or driver in option.drivers]
    return one


def test_the_reference_shows_whose_option_each_is() -> None:
    assert facts(option("database.url", "binlog")) == 'text; needed; only with database.driver = "binlog"'
    assert facts(option("database.conninfo", "postgres")) == 'text; needed; only with database.driver = "postgres"'
    assert option("database.deadline_seconds", "postgres").default == 10
    assert option("database.deadline_seconds", "binlog").default == 99
    assert option("storage.budget", "").drivers == ()
    assert 'only with database.driver = "binlog"' in facts(option("restore.pages_at_once", "binlog"))
    chosen = option("journal.driver", "")
    assert facts(chosen) == '"receivewal" or "archive" or "rows"; default "receivewal"'
    assert '`rows` (with database.driver = "binlog"): Kept row by row.' in chosen.doc


def test_every_form_of_the_reference_has_the_options_of_strangers() -> None:
    for text in (markdown_text(), man_text(), toml_text()):
        for words in ("What it is written with", "How many pages are turned", "Another server of the ledger"):
            assert words in text


def test_what_only_another_driver_needs_is_shown_behind_a_mark() -> None:
    text = toml_text()
    assert '\n#url = "ledger://one"\n' in text
    assert '\nconninfo = "host' in text
    assert tomllib.loads(text)["database"].keys() == {"conninfo", "databases"}
    assert isinstance(parse(text, "x"), Options)


# ----------------------------------------------------------------------------------------------- what is built


def strange_file(tmp_path: Path) -> Path:
    path = tmp_path / "trigpoint.toml"
    path.write_text(STRANGE.replace("/var/lib/trigpoint", str(tmp_path / "state")))
    return path


def test_explain_asks_a_database_that_nothing_in_the_service_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["explain", "-c", str(strange_file(tmp_path))]) == 0
    assert "ledger://one does not show what was written in pencil" in capsys.readouterr().out
    assert not [*tmp_path.rglob("catalog*")], "who only looks makes no catalog"


def test_check_asks_every_part_that_was_built_from_its_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main(["check", "-c", str(strange_file(tmp_path))])
    told = capsys.readouterr().out
    assert "with 3 bags: every volume can be flushed" in told
    assert "kept in memory" in told


def test_init_writes_a_configuration_for_a_database_that_nothing_in_the_service_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--driver", "binlog", "--conninfo", "ledger://one", "--state-folder", str(tmp_path / "state"))
    assert program.main(["init", *given, "-o", "-"]) == 0
    written = capsys.readouterr().out
    assert "# Where it is.\nurl = " in written
    read = parse(written, "written")
    assert isinstance(read.database, LedgerOptions)
    assert (read.database.url, read.database.databases) == ("ledger://one", ["accounts"])


def test_a_cluster_is_reached_by_its_drivers_own_words() -> None:
    assert reached("binlog", None, {"LEDGER": "ledger://three"}).address == "ledger://three"
    assert reached(None, None, {"PGPORT": "7"}).address == "host=/var/run/postgresql port=7 user=postgres"
    with pytest.raises(ConfigError, match="no database driver mysql") as unknown:
        reached("mysql", None, {})
    assert unknown.value.hint == "there are: postgres, binlog"
    with pytest.raises(ConfigError, match="conninfo: must not hold a password") as secret:
        reached(None, "host=db password=canary", {})
    assert "canary" not in str(secret.value)


# ------------------------------------------------------------------------------------------------------- weight


def test_reading_a_configuration_and_its_reference_loads_no_library_of_a_driver() -> None:
    program = (
        "import sys\n"
        "from trigger.config.options import parse\n"
        "from trigger.config.reference import markdown_text\n"
        f"parse({SMALLEST!r}, 'x'), markdown_text()\n"
        "print(*{'psycopg', 'sqlalchemy', 'cel', 'rich', 'typer'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
