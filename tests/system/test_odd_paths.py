"""Folders may be called anything: a state comes back, and is verified, whatever a shell would make of their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.service import deployment
from tests.fixtures.volumes import plain_folder

pytestmark = [pytest.mark.server, pytest.mark.slow]

ODD = "o'd $(touch hurt) & folder"


@pytest.mark.parametrize("journal", ["", 'driver = "archive"\nrestore_command = "cp {archive}/%f %p"'])
def test_a_state_comes_back_out_of_folders_with_odd_names(journal: str) -> None:
    with (
        plain_folder() as archive,
        deployment(15, "directory", archive_mode="on", archive_command=f"cp %p {archive}/%f") as made,
    ):
        archive.chmod(0o777)  # the server writes there
        made.state = made.state.parent / ODD / "state"
        made.root = made.root / ODD
        made.configure(f"[journal]\n{journal.format(archive=archive)}\n" if journal else "")
        made.cluster.sql("CREATE TABLE account AS SELECT n FROM generate_series(1, 1000) n")
        made.start()
        number = made.ask("point")["number"]
        made.cluster.sql("INSERT INTO account VALUES (0)")
        made.settle()
        made.cluster.sql("SELECT pg_switch_wal()")
        xid = made.cluster.sql("SELECT xmin FROM account WHERE n = 0")[0][0]

        def archived() -> bool:
            return made.trigpoint("restore", "--to-xid", str(xid), "--dry-run", check=False).returncode == 0

        made.wait_for(archived, "the log of the commit is archived")
        made.trigpoint("restore", "--to-xid", str(xid), "--name", "odd")
        assert [clone["state"] for clone in made.ask("clones", "list")] == ["running"]
        assert made.ask("verify", str(number))["passed"]
        places = (made.cluster.data, made.state, made.root, Path.cwd(), Path("/"))
        assert not [file for place in places for file in place.glob("hurt*")]
