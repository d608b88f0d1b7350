"""A writer that truncates and drops tables keeps no point of storage `directory` from being made.

PostgreSQL gives back the empty end of a table (VACUUM), and removes files and folders (DROP), under a backup bracket
too: what a copy has of them is as much as there was, and the replay mends it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server]

ROWS = 40_000
"""Of some 30 MB, which a VACUUM gives back."""
POINTS = 6
DEADLINE_SECONDS = 120.0


class Writer:
    """Fills, empties and truncates a table, makes and drops others, and a database; and counts its rounds."""

    def __init__(self, deployed: Deployment) -> None:
        self._deployed = deployed
        self.truncated_at: list[datetime] = []
        self.failures: list[BaseException] = []

    def work(self, ended: threading.Event) -> None:
        """Write until it is ended."""
        try:
            with self._deployed.cluster.connect() as connection:
                number = 0
                while not ended.is_set():
                    number += 1
                    self._round(connection, number)
        except psycopg.Error as error:
            self.failures.append(error)

    def _round(self, connection: psycopg.Connection[tuple[object, ...]], number: int) -> None:
        connection.execute("INSERT INTO steady VALUES (%s)", [number])
        connection.execute(f"INSERT INTO filled SELECT n, repeat('x', 700) FROM generate_series(1, {ROWS}) n")
        connection.execute("CREATE TABLE passing AS SELECT n, repeat('y', 700) FROM generate_series(1, 4000) n")
        connection.execute("DELETE FROM filled WHERE n > 100")
        connection.execute("VACUUM (TRUNCATE, PARALLEL 0) filled")
        self.truncated_at.append(datetime.now(UTC))
        connection.execute("DROP TABLE passing")
        if number % 4 == 0:
            connection.execute("CREATE DATABASE passing")
            connection.execute("DROP DATABASE passing")


@contextlib.contextmanager
def writing(deployed: Deployment) -> Iterator[Writer]:
    writer, ended = Writer(deployed), threading.Event()
    thread = threading.Thread(target=writer.work, args=[ended])
    thread.start()
    try:
        yield writer
    finally:
        ended.set()
        thread.join()
    assert not writer.failures, writer.failures


@pytest.mark.parametrize("major", [15, 18])
@pytest.mark.timeout(400)
def test_points_are_made_beside_a_writer_that_truncates_and_what_they_hold_is_proven(major: int) -> None:
    with deployment(major, "directory", initdb=("--data-checksums",), autovacuum="off") as deployed:
        deployed.cluster.sql("CREATE TABLE filled (n int, filler text)")
        deployed.cluster.sql("ALTER TABLE filled ALTER filler SET STORAGE PLAIN")
        deployed.cluster.sql("CREATE TABLE steady (n int PRIMARY KEY)")
        deployed.configure("[points]\nmin_interval_seconds = 0.1\nper_minute = 6000\ncatch_all_seconds = 1\n")
        deployed.start()
        with writing(deployed) as writer:
            deadline, made, within = time.monotonic() + DEADLINE_SECONDS, 0, 0
            while made < POINTS or within == 0:
                assert time.monotonic() < deadline, f"{within} of {made} copies were made while a table was truncated"
                point = deployed.ask("point")
                (copy,) = point["snapshots"]
                began, ended = (datetime.fromisoformat(copy[key]) for key in ("began_at", "ended_at"))
                within += any(began <= at <= ended for at in writer.truncated_at)
                made += 1
        assert "point 1" not in deployed.trigpoint("list", "--state", "failed").stdout
        report = deployed.ask("restore", f"--to-point={point['number']}", "--name", "one")
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as clone:
            row = clone.execute("SELECT count(*), max(n) FROM steady").fetchone()
            assert row is not None
            assert row[0] == row[1] > 0
            assert clone.execute("SELECT count(*) FROM filled WHERE filler <> repeat('x', 700)").fetchone() == (0,)
        deployed.trigpoint("verify", str(point["number"]))
