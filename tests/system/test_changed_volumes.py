"""The volumes of the configuration are others than those that points and clones are of."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]

RARELY = "[points]\nmin_interval_seconds = 600\nmax_delay_seconds = 600\n"


def with_space(here: Deployment, space: Path) -> str:
    """Give the configuration with one more volume."""
    return here.config.read_text().replace("[storage]", f'[[volumes]]\nname = "space"\npath = "{space}"\n[storage]')


def make_space(here: Deployment) -> Path:
    """Make a tablespace outside of the data directory, and a table in it."""
    space = here.root / "space"
    space.mkdir()
    os.chown(space, *here.cluster.owner)
    here.cluster.sql(f"CREATE TABLESPACE space LOCATION '{space}'")
    here.cluster.sql("CREATE TABLE far (i int) TABLESPACE space")
    return space


def insert(here: Deployment, table: str, count: int) -> list[int]:
    """Commit some rows; give the transactions."""
    return [
        int(here.cluster.sql(f"INSERT INTO {table} VALUES ({i}) RETURNING txid_current()")[0][0]) for i in range(count)
    ]


def rows_of(here: Deployment, table: str, xid: int) -> int:
    """Give how many rows a table has as of a transaction."""
    report = here.ask("restore", "--to-xid", str(xid), "--name", "one")
    try:
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            found = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    finally:
        here.trigpoint("clones", "drop", "--yes", "one")
    assert found is not None
    return int(found[0])


def check_of_volumes(here: Deployment) -> list[str]:
    return [one["severity"] for one in here.ask("check") if one["subject"] == "volumes"]


def test_what_was_cut_with_a_volume_that_is_taken_out_since_comes_back_and_is_verified() -> None:
    with deployment(15, "directory") as here:
        space = make_space(here)
        here.cluster.sql("CREATE TABLE near (i int)")
        without = here.config.read_text()
        here.config.write_text(with_space(here, space))
        here.start()
        here.trigpoint("point")
        far = insert(here, "far", 3)
        here.settle()
        here.cluster.sql("DROP TABLE far")
        here.cluster.sql("DROP TABLESPACE space")
        near = insert(here, "near", 3)
        here.settle()
        assert check_of_volumes(here) == []
        here.stop()
        here.config.write_text(without)
        assert check_of_volumes(here) == ["warning"]
        here.start()
        assert rows_of(here, "far", far[1]) == 2
        assert rows_of(here, "near", near[1]) == 2
        result = here.ask("verify", "2")
        assert result["passed"], result["checks"]
        refused = here.trigpoint("restore", "--in-place", "--to-xid", str(far[1]), "--dry-run", check=False)
        assert f"is of the volumes data ({here.cluster.data}), space ({space})" in refused.stdout + refused.stderr


def test_a_clone_whose_volume_is_called_otherwise_now_is_seen_stopped_started_and_dropped_with_its_server() -> None:
    with deployment(15, "directory") as here:
        here.cluster.sql("CREATE TABLE near (i int)")
        here.start()
        first = insert(here, "near", 2)
        here.settle()
        data = here.ask("restore", "--to-xid", str(first[0]), "--name", "mine")["data_directory"]
        here.stop()
        called_data = here.config.read_text()
        here.config.write_text(called_data.replace('name = "data"', 'name = "pgdata"'))
        assert check_of_volumes(here) == ["warning"]
        here.start()
        assert [one["cause"] for one in here.ask("list", "--limit", "1")] == ["start"]
        second = insert(here, "near", 2)
        here.settle()
        assert rows_of(here, "near", first[0]) == 1
        assert [one["state"] for one in here.ask("clones")] == ["running"]
        here.trigpoint("clones", "stop", "mine")
        assert not Path(data, "postmaster.pid").exists()
        here.trigpoint("clones", "start", "mine")
        server = int(Path(data, "postmaster.pid").read_text().split()[0])
        here.trigpoint("clones", "drop", "--yes", "mine")
        assert not Path(f"/proc/{server}/exe").exists()  # of a process that ended and is not reaped it is gone
        here.stop()
        here.config.write_text(called_data)
        here.start()
        assert rows_of(here, "near", second[0]) == 3


def test_behind_a_volume_that_is_added_there_is_a_base_before_the_service_says_ready() -> None:
    with deployment(15, "directory", extra=RARELY) as here:
        here.start()
        space = make_space(here)
        here.trigpoint("point")
        here.stop()
        here.config.write_text(with_space(here, space))
        here.start()
        far = insert(here, "far", 3)
        assert rows_of(here, "far", far[1]) == 2
