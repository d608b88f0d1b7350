"""A check that had nothing to look at is not among those that held, and what a proof needs is staged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

import pytest

from connectors.databases.postgres.log.journal import PostgresJournal
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.lsn import Lsn
from tests.fixtures.restores import Cut, Ground, at_commit, ground
from tests.fixtures.volumes import loop_volume
from trigger.catalog.catalog import Catalog
from trigger.errors import RestoreError
from trigger.replay import Target
from trigger.restore.log_search import following

pytestmark = [pytest.mark.server, pytest.mark.volume]

ENDED = "the replay ended at the target"


@pytest.fixture(params=[15, 18])
def here(request: pytest.FixtureRequest) -> Iterator[Ground]:
    with loop_volume("btrfs", 4096) as folder, ground(request.param, folder, btrfs=True) as made:
        yield made


async def seen_in(here: Ground, cut: Cut, target: Target, *, deep: bool = False) -> dict[str, tuple[bool, str]]:
    clone, running, staged = await here.restore(cut, target)
    catalog = await Catalog.open(":memory:")
    journal = PostgresJournal(here.folders, here.receiver, here.present, lambda _: WalDump(here.programs))  # as we are
    follows = partial(following, history=target.history, catalog=catalog, journal=journal)
    looks = here.recovery.inspect(running, target, staged, deep=deep, follows=follows)
    found = {what: (held, seen) async for what, held, seen in looks}
    await catalog.close()
    await here.drop(clone)
    assert all(held for held, _ in found.values()), found
    return found


def test_the_next_commit_is_looked_for_however_far_it_is_and_none_is_no_proof_of_one(here: Ground) -> None:
    async def run() -> None:
        async with here.journaling():
            cut = here.cut()
            here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
            for _ in range(6):
                here.cluster.sql("SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 100000)); ")
                here.cluster.sql("SELECT pg_switch_wal()")
            here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
            end = here.durable()
            await here.journal_reaches(end)
        first, second, last = (await here.commits(cut.ceiling))[-3:]
        seen = await seen_in(here, cut, at_commit(end.history, first))
        assert f"transaction {second.xid}, " in seen["the next commit is not there"][1]
        assert second.start - first.start > 5 * (16 << 20)
        seen = await seen_in(here, cut, at_commit(end.history, last))
        assert "the next commit is not there" not in seen
        assert seen["no commit follows in the log that is kept"][1].startswith("it was read from ")

    asyncio.run(run())


def test_of_a_snapshot_without_any_log_nothing_is_said_that_was_not_looked_at(here: Ground) -> None:
    async def run() -> None:
        here.cluster.sql("CHECKPOINT")
        cut = here.cut()
        staged = here.folder / "empty"
        staged.mkdir()
        target = Target(cut.floor.history, None, True, "the snapshot", reach=cut.ceiling.at, point="cut")
        clone = here.clone(cut)
        running = await here.recovery.start(clone, here.volumes, cut.replay(target), staged, lambda *_: None)
        found = [check async for check in here.recovery.inspect(running, target, staged, deep=False)]
        assert found == [(ENDED, True, f"at {running.replayed}")]
        await here.drop(clone)

    asyncio.run(run())


def test_a_state_between_a_truncation_and_its_entry_in_the_catalog_has_lost_nothing(here: Ground) -> None:
    """VACUUM gives pages back before it says so: a state that ends in between has fewer than its catalog says."""

    async def run() -> None:
        sql = here.cluster.sql
        sql("CREATE TABLE shrinking AS SELECT n, repeat('x', 90) FROM generate_series(1, 20000) n")
        sql("VACUUM shrinking")
        sql("CHECKPOINT")
        path = sql("SELECT pg_relation_filepath('shrinking')")[0][0]
        async with here.journaling():
            cut = here.cut()
            sql("DELETE FROM shrinking WHERE n > 100")
            begin = here.inserted()
            sql("VACUUM shrinking")
            end = here.durable()
            await here.journal_reaches(end)
        dump = here.cluster.run(
            "pg_waldump", "-p", here.cluster.data / "pg_wal", "-s", str(begin.at), check=False
        ).stdout
        lines = dump.splitlines()
        place = next(number for number, line in enumerate(lines) if f"TRUNCATE {path} to " in line)
        after = lines[place + 1].partition("lsn: ")[2].partition(",")[0]
        target = Target(end.history, Lsn.parse(after), False, "the state right behind it")
        await seen_in(here, cut, target, deep=True)

    asyncio.run(run())


def test_a_sandbox_is_asked_by_nobody_who_could_do_anything(here: Ground) -> None:
    spoils = here.cluster.sockets / "spoils"
    with here.cluster.connect() as connection:
        connection.execute("CREATE ROLE app LOGIN; GRANT CREATE ON SCHEMA public TO app; SET ROLE app")
        connection.execute(f"""
            CREATE FUNCTION strike() RETURNS int LANGUAGE plpgsql AS $$
            BEGIN RESET ROLE; COPY (SELECT 1) TO PROGRAM 'touch {spoils}'; RETURN 1; END $$;
            CREATE TABLE account AS SELECT n FROM generate_series(1, 10) n;
            ALTER TABLE account ENABLE ROW LEVEL SECURITY;
            CREATE VIEW trap AS SELECT strike();
        """)

    async def run() -> None:
        cut = here.cut()
        staged = here.folder / "empty"
        staged.mkdir()
        target = Target(cut.floor.history, None, True, "the snapshot", reach=cut.ceiling.at, point="cut")
        clone = here.clone(cut)
        running = await here.recovery.start(
            clone, here.volumes, cut.replay(target), staged, lambda *_: None, throwaway=True
        )
        assert [held async for _, held, _ in here.recovery.inspect(running, target, staged, deep=True)]
        again = await here.recovery.running(clone)
        assert again is not None
        assert await here.recovery.query(again, "postgres", "SELECT sum(n) FROM account") == "55"
        with pytest.raises(RestoreError, match="refused"):
            await here.recovery.query(again, "postgres", "SELECT * FROM trap")
        with pytest.raises(RestoreError, match="permission denied"):
            await here.recovery.query(again, "postgres", "DELETE FROM account")
        await here.drop(clone)
        assert not spoils.exists()

    asyncio.run(run())
