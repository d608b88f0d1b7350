"""What was lost of our own state is named for what it is, and made anew, without the server and without the folder."""

from __future__ import annotations

import shutil

import psycopg
import pytest

from tests.fixtures.service import deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_a_lost_state_folder_is_made_anew_from_the_storage_while_the_server_is_down() -> None:
    with deployment(15, "directory") as here:
        journal = here.root / "journal"
        here.configure(f'[journal]\nfolder = "{journal}"\n')
        here.cluster.sql("CREATE TABLE t (n int)")
        here.start()
        here.cluster.sql("INSERT INTO t VALUES (1)")
        here.settle()
        number = here.ask("point")["number"]
        here.cluster.sql("INSERT INTO t VALUES (2)")
        here.settle()
        assert here.stop() == 0
        known = [one["number"] for one in here.ask("list")]
        here.cluster.stop()
        shutil.rmtree(here.state)

        for command in (("list",), ("restore", "--to-point", str(number), "--dry-run"), ("find", "--xid", "1")):
            lost = here.trigpoint(*command, check=False)
            assert lost.returncode == 7, lost.stderr
            assert "catalog rebuild" in lost.stderr
        here.trigpoint("catalog", "rebuild")
        assert [one["number"] for one in here.ask("list")] == known
        report = here.ask("restore", "--to-point", str(number), "--name", "back")
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as clone:
            assert clone.execute("SELECT n FROM t").fetchall() == [(1,)]
        here.trigpoint("clones", "drop", "--yes", "back")
        here.cluster.start()
