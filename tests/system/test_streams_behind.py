"""A stream that gives nothing is never shown as one that is in order; slots are kept on standbys only where asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from connectors.databases.postgres.stream.source import PostgresSource
from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]

HOLDING = {"synchronized_standby_slots": "standby_that_is_down"}


@pytest.fixture
def here() -> Iterator[Deployment]:
    """Give a cluster of version 18 whose only standby is down, and which lets no failover slot run ahead of it."""
    with deployment(18, "directory") as made:
        made.cluster.sql("SELECT pg_create_physical_replication_slot('standby_that_is_down', true)")
        made.cluster.sql("CREATE TABLE t (v int)")
        made.cluster.configure(HOLDING)
        made.cluster.restart()
        yield made


def with_failover(here: Deployment, *, asked: bool) -> None:
    """Write the configuration with `database.failover`."""
    here.configure()
    text = here.config.read_text()
    here.config.write_text(text.replace("[database]\n", f"[database]\nfailover = {str(asked).lower()}\n"))


def failover_of_slots(here: Deployment) -> list[tuple[Any, ...]]:
    return here.cluster.sql("SELECT failover FROM pg_replication_slots WHERE plugin = 'pgoutput'")


def test_commits_that_the_server_holds_back_for_a_standby_are_a_trouble_that_names_it(here: Deployment) -> None:
    with_failover(here, asked=True)
    assert "standby_that_is_down" in here.trigpoint("check").stdout
    here.start(wait=False)
    here.wait_for(lambda: here.status().get("last_point"), "a first point")
    assert failover_of_slots(here) == [(True,)]
    for number in range(10):
        here.cluster.sql(f"INSERT INTO t VALUES ({number})")
    here.wait_for(lambda: here.status()["behind_bytes"]["postgres"] > 0, "a stream that is behind")
    here.wait_for(
        lambda: any("synchronized_standby_slots: standby_that_is_down" in one for one in here.status()["troubles"]),
        "a trouble that names the standby",
    )
    here.wait_for(lambda: not here.status()["ready"], "a stream that stands still is not ready")
    assert any("stands still" in one for one in here.status()["troubles"])
    here.cluster.sql("ALTER SYSTEM SET synchronized_standby_slots = ''")
    here.cluster.sql("SELECT pg_reload_conf()")
    here.settle()
    here.wait_for(lambda: here.status()["ready"] and not here.status()["troubles"], "all in order again")
    assert here.status()["totals"]["commits"]["protected"] >= 1


def test_a_slot_is_not_kept_on_standbys_unless_that_is_asked_for(here: Deployment) -> None:
    here.start()
    here.cluster.sql("INSERT INTO t VALUES (1)")
    here.settle()
    assert here.status()["behind_bytes"]["postgres"] < 10_000
    assert failover_of_slots(here) == [(False,)]


def test_a_slot_that_was_kept_on_standbys_is_so_no_more_once_that_is_not_asked_for(here: Deployment) -> None:
    async def left(*, failover: bool) -> None:
        source = PostgresSource(here.cluster.conninfo, "postgres", failover=failover)
        await source.open(None)
        await source.close()

    asyncio.run(left(failover=True))
    assert failover_of_slots(here) == [(True,)]
    here.start()
    assert failover_of_slots(here) == [(False,)]
    here.cluster.sql("INSERT INTO t VALUES (1)")
    here.settle()
    assert here.stop() == 0
    asyncio.run(left(failover=True))
    assert failover_of_slots(here) == [(True,)]


def test_a_stream_that_does_not_open_is_a_trouble_before_its_first_attempt_has_ended() -> None:
    """A prepared transaction keeps the slot from being made for a minute; nobody has to wait for that to be told."""
    with deployment(15, "directory") as here:
        here.cluster.sql("CREATE TABLE t (v int)")
        holder = here.cluster.connect()
        with holder as connection:
            connection.execute("BEGIN; INSERT INTO t VALUES (1)")
            here.start(wait=False)
            here.wait_for(
                lambda: any("not open" in one for one in here.status().get("troubles", ())), "a trouble", seconds=45
            )
            assert not here.status()["ready"]
            connection.execute("ROLLBACK")
        here.wait_for(lambda: here.status().get("ready"), "a stream that opens")


def test_a_bulk_load_elsewhere_makes_no_stream_stand_still() -> None:
    """Only what the server answers when it is asked shows that it goes on through log in which nothing is ours."""
    with deployment(18, "directory", wal_sender_timeout="0", max_wal_size="256MB") as here:
        here.cluster.sql("CREATE DATABASE elsewhere")
        here.cluster.sql("CREATE TABLE big (v text)", "elsewhere")
        here.start()
        ended = threading.Event()

        def load() -> None:
            with here.cluster.connect("elsewhere") as connection:
                while not ended.is_set():
                    connection.execute("INSERT INTO big SELECT repeat('x', 500) FROM generate_series(1, 20000)")
                    connection.execute("TRUNCATE big")

        loading = threading.Thread(target=load)
        loading.start()
        try:
            for _ in range(40):
                ended.wait(1.0)
                status = here.status()
                assert not [one for one in status["troubles"] if "stands still" in one]
        finally:
            ended.set()
            loading.join()
