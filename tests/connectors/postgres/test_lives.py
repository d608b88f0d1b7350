"""An older copy of the cluster is put back: what the server says of its log is said of the new life, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from connectors.databases.postgres.database import Postgres
from connectors.databases.postgres.lives import Lives
from tests.fixtures.postgres import MAJORS, Cluster
from tests.fixtures.volumes import plain_folder, run
from trigger.errors import TrigpointError
from trigger.model import Commit, CommitRecord, Mark, Outcome
from trigger.ports import Seen
from trigger.position import Position
from trigger.protect.logs import Logs

pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Copied:
    """A cluster and an older copy of it."""

    cluster: Cluster
    copy: Path

    def put_back(self) -> None:
        """Put the copy in the place of the cluster, and let it come past the place where that was."""
        self.cluster.stop()
        self.cluster.data.rename(self.copy.with_name("left"))
        self.copy.rename(self.cluster.data)
        self.cluster.start()
        self.cluster.sql("INSERT INTO t SELECT generate_series(2, 500)")


@pytest.fixture(params=MAJORS)
def copied(request: pytest.FixtureRequest) -> Iterator[Copied]:
    with plain_folder() as folder:
        cluster = Cluster(int(request.param), folder / "data")
        try:
            cluster.create()
            cluster.configure({"wal_keep_size": "256MB"})  # a bracket makes a checkpoint, which lets go of log
            cluster.start()
            cluster.sql("CREATE TABLE t (v int); CHECKPOINT")
            cluster.stop()
            run("cp", "-a", cluster.data, folder / "copy")
            cluster.start()
            yield Copied(cluster, folder / "copy")
        finally:
            cluster.destroy()


async def commit_of(database: Postgres, cluster: Cluster) -> Commit:
    """Give one commit, as the stream gives it."""
    (stream,) = database.sources()
    await stream.open(None)
    try:
        await stream.read()
        cluster.sql("INSERT INTO t VALUES (1)")
        async with asyncio.timeout(20):
            while not (commits := (await stream.read()).commits):
                pass
        return commits[0]
    finally:
        await stream.close()


def as_seen(commit: Commit) -> Seen:
    """Give what a catalog says of a commit at the next start."""
    kept = CommitRecord(commit.stream, commit.name, commit.start, commit.end, commit.time_us, (), Outcome.PROTECTED)
    return Seen(commit.position, kept)


Question = Callable[[Postgres], Awaitable[Position]]


async def of_a_bracket(database: Postgres) -> Position:
    async with database.bracket("base") as finish:
        return (await finish()).start


QUESTIONS: list[Question] = [Postgres.durable, Postgres.ceiling, Postgres.record_end, Postgres.redo, of_a_bracket]
ASKED = [(question, kept) for question in QUESTIONS for kept in (False, True)]


def test_the_first_question_of_a_copy_that_was_put_back_is_answered_in_a_new_life(copied: Copied) -> None:
    """Whether the one who asks starts anew, or was connected to the server that was replaced."""

    async def known() -> Seen:
        before = Postgres(copied.cluster.conninfo, ["postgres"])
        try:
            commit = await commit_of(before, copied.cluster)
        finally:
            await before.close()
        return as_seen(commit)

    async def work() -> None:
        seen = await known()
        old, new = seen.position.history, replace(seen.position.history, incarnation=1)
        asking = [(question, kept, Postgres(copied.cluster.conninfo, ["postgres"])) for question, kept in ASKED]
        try:
            for question, kept, database in asking:
                database.recognise([seen])
                if kept:
                    assert (await question(database)).history == old, "nothing was put back yet"
            await asyncio.to_thread(copied.put_back)
            for question, kept, database in asking:
                assert (await question(database)).history == new, (question, kept)
        finally:
            for _, _, database in asking:
                await database.close()

    asyncio.run(work())


def test_a_commit_that_a_copy_does_not_hold_is_not_covered_though_no_stream_has_opened_again(copied: Copied) -> None:
    async def work() -> None:
        database = Postgres(copied.cluster.conninfo, ["postgres"])
        try:
            commit = await commit_of(database, copied.cluster)
            logs, marks = Logs({"postgres": database}), [Mark(commit.position)]
            (covered,) = await logs.cover(marks)
            assert covered.durable.covers(commit.position)
            await asyncio.to_thread(copied.put_back)
            with pytest.raises(TrigpointError):
                await logs.cover(marks)
            found = await database.durable()
            assert found.history.incarnation == commit.history.incarnation + 1
            assert found.at > commit.position.at, "by the place alone it would be covered"
            assert copied.cluster.sql("SELECT count(*) FROM t WHERE v = 1") == [(0,)]
        finally:
            await database.close()

    asyncio.run(work())


def test_a_log_that_goes_on_while_it_is_looked_at_is_not_taken_for_another(
    copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        database = Postgres(copied.cluster.conninfo, ["postgres"])
        (stream,) = database.sources()
        look = Lives._look  # between what the server says and what is compared with it

        async def look_late(lives: Lives, system: str) -> None:
            await look(lives, system)
            await asyncio.to_thread(copied.cluster.sql, "INSERT INTO t VALUES (1)")
            async with asyncio.timeout(20):
                while not (await stream.read()).commits:
                    pass

        await stream.open(None)
        try:
            await stream.read()
            before = (await database.durable()).history
            monkeypatch.setattr(Lives, "_look", look_late)
            for _ in range(3):
                assert (await database.recognised()) == before
        finally:
            await stream.close()
            await database.close()

    asyncio.run(work())
