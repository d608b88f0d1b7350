"""A clone reads data and log as production did at the target, whatever was set when its base was cut."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from connectors.databases.postgres.clone.isolation import carried
from tests.fixtures.restores import Ground, at_commit, ground
from tests.fixtures.volumes import loop_volume

CONTROL = {
    "Database system identifier": "42",
    "wal_level setting": "logical",
    "max_wal_senders setting": "10",
    "max_connections setting": "100",
    "max_prepared_xacts setting": "0",
    "max_locks_per_xact setting": "64",
    "track_commit_timestamp setting": "on",
    "some_future_switch setting": "off",
}


def test_all_that_the_control_file_holds_is_carried_but_what_makes_a_primary() -> None:
    assert carried(CONTROL, []) == {
        "max_connections": "100",
        "max_prepared_transactions": "0",
        "max_locks_per_transaction": "64",
        "track_commit_timestamp": "on",
        "some_future_switch": "off",
    }


def test_a_size_is_the_largest_that_the_log_speaks_of_and_a_switch_the_last() -> None:
    changes = [
        {"max_prepared_xacts": "30", "max_connections": "9", "track_commit_timestamp": "off", "wal_level": "minimal"},
        {"max_prepared_xacts": "20", "max_connections": "20", "track_commit_timestamp": "on", "unknown": "1"},
        {"some_future_switch": "on"},
    ]
    found = carried(CONTROL, changes)
    assert (found["max_prepared_transactions"], found["max_connections"]) == ("30", "100")
    assert (found["track_commit_timestamp"], found["some_future_switch"]) == ("on", "on")
    assert carried(CONTROL, changes[:1])["track_commit_timestamp"] == "off"
    assert "unknown" not in found


@pytest.fixture(params=[15, 18])
def here(request: pytest.FixtureRequest) -> Iterator[Ground]:
    with (
        loop_volume("btrfs", 4096) as folder,
        ground(
            request.param,
            folder,
            btrfs=True,
            max_prepared_transactions="0",
            max_connections="40",
            track_commit_timestamp="on",
        ) as made,
    ):
        yield made


@pytest.mark.server
@pytest.mark.volume
def test_what_was_set_higher_after_the_base_was_cut_is_as_high_in_the_clone(here: Ground) -> None:
    async def run() -> None:
        async with here.journaling():
            cut = here.cut()
            raised = {"max_prepared_transactions": "30", "max_connections": "60", "max_locks_per_transaction": "128"}
            here.cluster.configure(raised)
            await asyncio.to_thread(here.cluster.restart)
            for number in range(25):
                here.cluster.sql(f"BEGIN; CREATE TABLE t{number} (i int); PREPARE TRANSACTION 'doubt{number}'")
            here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
            end = here.durable()
            await here.journal_reaches(end)
        commit = (await here.commits(cut.ceiling))[-2]
        clone, running, _ = await here.restore(cut, at_commit(end.history, commit))
        for name, wanted in raised.items():
            assert await here.recovery.query(running, "postgres", f"SHOW {name}") == wanted
        assert await here.recovery.query(running, "postgres", "SELECT count(*) FROM pg_prepared_xacts") == "25"
        await here.drop(clone)

    asyncio.run(run())


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.parametrize("since", ["the base", "later"])
def test_the_times_of_commits_are_those_of_production_in_a_clone(here: Ground, since: str) -> None:
    times = "SELECT string_agg(format('%s %s', xid, pg_xact_commit_timestamp(xid::xid)), ',' ORDER BY xid) FROM ledger"

    async def run() -> None:
        if since == "later":
            here.cluster.configure({"track_commit_timestamp": "off"})
            await asyncio.to_thread(here.cluster.restart)
        async with here.journaling():
            cut = here.cut()
            if since == "later":
                here.cluster.configure({"track_commit_timestamp": "on"})
                await asyncio.to_thread(here.cluster.restart)
            for _ in range(3):
                here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
            end = here.durable()
            await here.journal_reaches(end)
        commit = (await here.commits(cut.ceiling))[-2]
        clone, running, _ = await here.restore(cut, at_commit(end.history, commit), throwaway=False)
        wanted = here.cluster.sql(f"SET timezone = 'GMT'; {times}")[0][0]
        assert len(wanted.split(",")) == 3
        assert await here.recovery.query(running, "postgres", times) == wanted
        await here.recovery.stop(clone)
        again = await here.recovery.resume(clone)
        assert await here.recovery.query(again, "postgres", times) == wanted
        await here.drop(clone)

    asyncio.run(run())
