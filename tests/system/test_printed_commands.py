"""What is printed does what it says: the commands of `find`, where a transaction id is on two timelines; histories."""

from __future__ import annotations

import re
import shlex

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]


def commit(here: Deployment, note: str) -> int:
    """Commit a row; gives its transaction id."""
    ((xid,),) = here.cluster.sql(f"INSERT INTO said (note) VALUES ('{note}') RETURNING xmin::text::int")
    return int(xid)


def printed(here: Deployment, xid: int) -> list[list[str]]:
    """Give the commands that `find` prints for a transaction id."""
    lines = here.trigpoint("find", "--xid", str(xid)).stdout.splitlines()
    found = [re.fullmatch(r"restore\s+trigpoint (restore .*)", line) for line in lines]
    return [shlex.split(one[1]) for one in found if one]


def said(here: Deployment, command: list[str], name: str) -> list[str]:
    """Run a command that was printed, and give what its clone holds."""
    report = here.ask(*command, "--name", name)
    try:
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as clone:
            return [row[0] for row in clone.execute("SELECT note FROM said ORDER BY n")]
    finally:
        here.trigpoint("clones", "drop", "--yes", name)


def test_each_command_that_find_prints_brings_back_the_commit_that_it_stands_by() -> None:
    with deployment(15, "directory") as here:
        here.cluster.sql("CREATE TABLE said (n int GENERATED ALWAYS AS IDENTITY, note text)")
        here.start()
        kept, undone = commit(here, "kept"), commit(here, "undone")
        left = [commit(here, f"undone {number}") for number in range(40)]
        here.settle()
        assert here.stop() == 0
        here.cluster.stop()
        here.trigpoint("restore", "--before-xid", str(undone), "--in-place", "--yes")
        here.cluster.start()

        refused = here.trigpoint("restore", "--to-latest", "--dry-run", check=False)
        assert refused.returncode != 0
        assert "which it has left" in refused.stderr
        (option,) = re.findall(r"--timeline \d+", refused.stderr)
        asked = here.trigpoint("restore", "--to-latest", "--dry-run", *option.split()).stdout
        assert "/1" in asked.splitlines()[0]
        assert said(here, ["restore", "--to-latest", *option.split()], "left")[-1] == "undone 39"

        here.start()
        while commit(here, "later") < left[-2]:
            pass
        here.settle()
        xid = left[-2]
        first, second = printed(here, xid)
        assert said(here, first, "first")[-1] == "undone 38", first
        assert said(here, second, "second")[-1] == "later", second
        assert here.cluster.sql(f"SELECT note FROM said WHERE xmin::text = '{xid}'") == [("later",)]
        ((command,),) = [printed(here, kept)]
        assert said(here, command, "kept") == ["kept"]
        assert said(here, ["restore", "--to-latest"], "latest")[-1] == "later"
        head, *rows = here.trigpoint("list").stdout.splitlines()
        at = head.index("HISTORY")
        assert {row[at : at + 7].strip() for row in rows if row.strip()} == {"1", "2"}
        assert here.stop() == 0
