"""An end of log is only what PostgreSQL's reader says is one: one that dies, or stops at damage, proves nothing.

Server, log and reader are real; a reader that dies, or cannot read, is a program in its place that does just that.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from connectors.databases.postgres import lsn
from connectors.databases.postgres.clone import inspection, replayed, tablespaces
from connectors.databases.postgres.clone.isolation import Isolated
from connectors.databases.postgres.log import search
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.log.waldump import Stretch, WalDump
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import Programs
from tests.fixtures.postgres import Cluster, running_cluster
from tests.fixtures.volumes import plain_folder
from trigger.errors import JournalError, RestoreError
from trigger.position import History, Name, Position
from trigger.replay import Replay, Target

pytestmark = pytest.mark.server

SEGMENT_BYTES = 16 << 20
DYING = {
    "killed": ("kill -9 $$", "ended by signal 9"),
    "killed amid its words": ("echo 'pg_waldump: error: error in WAL record at 0/1: x'; kill -9 $$", "by signal 9"),
    "out of files": ("echo 'pg_waldump: error: could not open file \"0\": Too many open files'; exit 1", "open files"),
    "silent": ("exit 1", "exit code 1"),
    "not linked": ("echo 'pg_waldump: error while loading shared libraries: libpq.so' >&2; exit 127", "libraries"),
}


@dataclass(frozen=True)
class Ground:
    """The log of a server: commits, a new tablespace behind the first of them, and commits again."""

    cluster: Cluster
    staged: Path
    redo: Lsn
    first: Lsn
    """Behind the first commit."""
    end: Lsn

    @property
    def history(self) -> History:
        return lsn.history("1", 1)

    @property
    def stretch(self) -> Stretch:
        end = SegmentFolder(self.staged, SEGMENT_BYTES).end_of_run(1, self.redo)
        assert end is not None
        return Stretch(self.staged, 1, SEGMENT_BYTES, self.redo, end)

    @property
    def sound(self) -> WalDump:
        return WalDump(self.cluster.programs)

    def subject(self, at: Lsn, folder: Path | None = None) -> Any:
        """Give a state that ends at a place, with the log that led there; no clone is asked."""
        target = Target(self.history, at, False, "a place")
        return SimpleNamespace(
            target=target,
            log_folder=folder or self.staged,
            boundary=at,
            next_xid=10**6,
            access=None,
            running=None,
            follows=None,
        )


@pytest.fixture(scope="module", params=[15, 18])
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    with plain_folder() as folder, running_cluster(request.param, folder / "data", fsync="off") as cluster:
        cluster.sql("CREATE TABLE t (v int)")
        cluster.sql("CHECKPOINT")
        redo = Lsn.parse(cluster.sql("SELECT redo_lsn::text FROM pg_control_checkpoint()")[0][0])
        room = folder / "room"
        room.mkdir()
        os.chown(room, *cluster.owner)
        cluster.sql("INSERT INTO t VALUES (1)")
        first = cluster.flushed()
        cluster.sql(f"CREATE TABLESPACE room LOCATION '{room}'")
        cluster.sql("INSERT INTO t VALUES (2)")
        cluster.sql("INSERT INTO t VALUES (3)")
        end = cluster.flushed()
        staged = folder / "staged"
        staged.mkdir()
        for file in (cluster.data / "pg_wal").iterdir():
            name = SegmentName.parse(file.name, SEGMENT_BYTES)
            if name is not None and name.number <= end // SEGMENT_BYTES:
                shutil.copyfile(file, staged / file.name)
        yield Ground(cluster, staged, redo, first, end)


@pytest.fixture(params=sorted(DYING))
def dying(request: pytest.FixtureRequest, tmp_path: Path, ground: Ground) -> tuple[WalDump, str]:
    """A reader that fails, and what is to be said of it."""
    text, said = DYING[request.param]
    program = tmp_path / "pg_waldump"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return WalDump(Programs(tmp_path, ground.cluster.major)), said


async def refuse(dump: WalDump, ground: Ground) -> object:
    isolated = Isolated(ground.cluster.data, ground.cluster.owner, ground.cluster.major, ())
    replay = Replay(Target(ground.history, ground.end, False, "the end"), Position(ground.history, ground.redo), 0)
    read = await replayed.stretches(isolated.data / "pg_wal", ground.staged, ground.redo, replay)
    return await tablespaces.refuse_new_ones(dump, read, replay)


async def every(dump: WalDump, ground: Ground) -> object:
    async with aclosing(dump.transactions(ground.stretch)) as lines:
        return [line async for line in lines]


async def found_in(dump: WalDump, ground: Ground, folder: Path | None = None) -> list[str]:
    held = SegmentFolder(folder or ground.staged, SEGMENT_BYTES)
    found = search.commits(held, dump, ground.history, ground.redo, ground.end, Name("", 700))
    return [str(one.name) async for one in found]


async def lacks_next(dump: WalDump, ground: Ground) -> object:
    return await inspection.lacks_next(ground.subject(ground.first), dump)


async def ends_at_target(dump: WalDump, ground: Ground) -> object:
    subject = ground.subject(ground.first)
    subject.running = SimpleNamespace(replayed=ground.end, last_commit_at=None)
    return await inspection.ends_at_target(subject, dump)


async def holds_those_before(dump: WalDump, ground: Ground) -> object:
    return await inspection.holds_those_before(ground.subject(ground.end), dump)


@pytest.mark.parametrize("reads", [refuse, every, found_in, lacks_next, ends_at_target, holds_those_before])
def test_a_reader_that_fails_has_not_come_to_the_end_of_the_log(
    ground: Ground, dying: tuple[WalDump, str], reads: Callable[[WalDump, Ground], Coroutine[Any, Any, object]]
) -> None:
    dump, said = dying
    with pytest.raises(JournalError, match=f"was not read from .*{said}"):
        asyncio.run(reads(dump, ground))


def test_a_segment_that_the_server_has_yet_to_write_hides_none_that_it_wrote(ground: Ground) -> None:
    log = ground.cluster.data / "pg_wal"
    number = max(name.number for name in SegmentFolder(log, SEGMENT_BYTES).names())
    ahead = [log / SegmentName(1, number + more).text(SEGMENT_BYTES) for more in range(1, 9)]
    for file in ahead:  # as the server makes them: so far at least one of them comes first in the folder
        file.write_bytes(bytes(SEGMENT_BYTES))
    try:
        with pytest.raises(RestoreError, match="makes tablespace"):
            asyncio.run(refuse(ground.sound, ground))
        empty = Stretch(log, 1, SEGMENT_BYTES, Lsn((number + 1) * SEGMENT_BYTES), Lsn((number + 2) * SEGMENT_BYTES))
        assert asyncio.run(ground.sound.next_record(empty)) is None
    finally:
        for file in ahead:
            file.unlink()


def test_log_that_ends_where_a_record_could_be_read_by_nobody_ends_there(ground: Ground) -> None:
    commits = asyncio.run(found_in(ground.sound, ground))
    assert len(commits) == 4
    subject = ground.subject(ground.end)
    assert asyncio.run(inspection.lacks_next(subject, ground.sound)) is None, "what was not staged was not looked at"
    subject.target = Target(ground.history, None, False, "the latest state, for which all of it is staged")
    what, held, _ = asyncio.run(inspection.lacks_next(subject, ground.sound)) or ("", False, "")
    assert (what, held) == ("no commit follows in the log that is kept", True)


def test_damage_before_the_next_commit_does_not_prove_that_there_is_none(ground: Ground, tmp_path: Path) -> None:
    damaged = _copy(ground, tmp_path / "damaged")
    begin = asyncio.run(ground.sound.next_record(Stretch(ground.staged, 1, SEGMENT_BYTES, ground.first, ground.end)))
    assert begin is not None
    with (damaged / ground.stretch.files[0]).open("r+b") as file:
        file.seek(begin % SEGMENT_BYTES + 20)  # its checksum
        file.write(b"\xff\xff\xff\xff")
    assert asyncio.run(inspection.lacks_next(ground.subject(ground.first, damaged), ground.sound)) is None
    with pytest.raises(JournalError, match=r"cannot be read from .*incorrect resource manager data checksum"):
        asyncio.run(found_in(ground.sound, ground, damaged))
    assert asyncio.run(inspection.holds_those_before(ground.subject(ground.end, damaged), ground.sound)) is None


def _copy(ground: Ground, folder: Path) -> Path:
    shutil.copytree(ground.staged, folder)
    return folder
