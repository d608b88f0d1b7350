"""Where the locale, or the output, knows no more than ASCII, every command says the same, in escapes."""

from __future__ import annotations

import json
import tomllib

import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]

MARKER = "Äbc 表 😀"
NARROW = (
    ("env", "PYTHONIOENCODING=ascii"),
    ("env", "LC_ALL=POSIX", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0"),
)


def in_ascii(here: Deployment, *arguments: str) -> str:
    """Give what a command prints, which is in ASCII, and no trace."""
    done = here.trigpoint(*arguments)
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.stdout + done.stderr).isascii()
    return done.stdout


def test_every_command_says_the_same_where_the_output_knows_no_more_than_ascii() -> None:
    with deployment(15, "directory", databases=("straße",)) as here:
        here.configure(f'[[rules]]\nname = "marked"\nmarkers = ["{MARKER}"]\n')
        here.start()
        with here.cluster.connect("straße") as connection:
            connection.execute(f"SELECT pg_logical_emit_message(true, 'trigpoint', '{MARKER}')")
        here.settle()
        here.trigpoint("point", "--note", "Ä")
        asked = [["find", "--marker", MARKER], ["list"], ["clones"], ["restore", "--to-marker", MARKER, "--dry-run"]]
        for narrow in NARROW:
            here.before = ()
            seen = [here.ask(*one) for one in asked]
            assert "straße" in json.dumps(seen, ensure_ascii=False)
            here.before = narrow
            assert [json.loads(in_ascii(here, *one, "--json")) for one in asked] == seen
            assert "\\u00c4bc \\u8868 \\U0001f600" in in_ascii(here, *asked[0])
            for one in (*asked, ["status"], ["check"]):
                in_ascii(here, *one)
            unknown = here.trigpoint("find", "--database", "ö", "--marker", "ä", check=False).stderr
            assert "\\u00f6" in unknown
            assert "stra\\u00dfe" in unknown
            made = in_ascii(here, "init", "--conninfo", here.cluster.conninfo, "--output", "-")
            assert tomllib.loads(made)["database"]["databases"] == ["straße"]
            here.trigpoint("point", "--note", MARKER)
            assert MARKER in json.dumps(json.loads(in_ascii(here, "list", "--json")), ensure_ascii=False)
        here.before = ()
        assert here.stop() == 0
