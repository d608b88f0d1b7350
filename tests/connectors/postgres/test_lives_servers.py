"""Which life of its log a server is in: a copy put back is found out, and the same log is not taken for another.

The copies are copies of data directories, the standbys are standbys, and the promotions are promotions.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from connectors.databases.postgres import lsn
from connectors.databases.postgres.lives import Lives
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import minimal_environment
from connectors.databases.postgres.stream.copyboth import Present, identify
from connectors.databases.postgres.stream.physical import read_log
from connectors.databases.postgres.stream.source import PostgresSource
from tests.connectors.postgres.reading import everything, opened
from tests.fixtures.postgres import Cluster, running_cluster, running_standby
from tests.fixtures.volumes import plain_folder
from trigger.errors import SourceError
from trigger.model import Commit, CommitRecord, Outcome
from trigger.ports import Seen
from trigger.position import History, Position
from trigger.protect.window import record

pytestmark = pytest.mark.server

SEGMENT_BYTES = 16 << 20
DEADLINE_SECONDS = 1.0
LIMIT_SECONDS = 30.0
GERMAN = {"LANGUAGE": "de", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True)
class Known:
    """What was known of a server before something became of it."""

    commit: Commit
    through: Position

    @property
    def seen(self) -> Seen:
        return Seen(self.through, record(self.commit, Outcome.PROTECTED))


@dataclass(frozen=True)
class Ground:
    """A server, what is known of it, its data as they are then, and an older copy of them."""

    cluster: Cluster
    known: Known
    newer: Path
    older: Path


@pytest.fixture(scope="module", params=[18])
def major(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        yield made


@pytest.fixture
def cluster(major: int, folder: Path) -> Iterator[Cluster]:
    with running_cluster(major, folder / "data", fsync="off") as made:
        made.sql("CREATE TABLE t (v int)")
        yield made


@pytest.fixture(scope="module")
def ground(major: int) -> Iterator[Ground]:
    with plain_folder() as folder, running_cluster(major, folder / "data", fsync="off") as cluster:
        cluster.sql("CREATE TABLE t (v int)")
        older = saved(cluster, "older")
        known = known_of(cluster)
        yield Ground(cluster, known, saved(cluster, "newer"), older)


@pytest.fixture
def mended() -> Iterator[threading.Event]:
    """Set at the end, so that no thread of a test is left."""
    event = threading.Event()
    yield event
    event.set()


def dsn_of(cluster: Cluster) -> str:
    return f"{cluster.conninfo} dbname=postgres"


def insert(cluster: Cluster, rows: int = 1) -> None:
    cluster.sql(f"INSERT INTO t SELECT generate_series(1, {rows})")


def known_of(cluster: Cluster) -> Known:
    """Commit something; gives what is known then, as a stream saw it."""

    async def run() -> Known:
        async with opened(cluster, "postgres") as source:
            insert(cluster)
            commit = (await everything(cluster, source))[-1]
        return Known(commit, Position(commit.history, cluster.flushed()))

    return asyncio.run(run())


def copied(data: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    subprocess.run(["cp", "-a", data, to], check=True)
    return to


def saved(cluster: Cluster, name: str = "saved") -> Path:
    """Give a copy of the data of a server, which stands still meanwhile and runs again then."""
    cluster.stop()
    copy = copied(cluster.data, cluster.data.parent / name)
    cluster.start()
    return copy


def put_back(cluster: Cluster, copy: Path) -> None:
    cluster.stop()
    copied(copy, cluster.data)
    cluster.start()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def received(cluster: Cluster, folders: LogFolders, history: History | None = None) -> None:
    """Put the log that a server has written into a life's folder, the segment it is in as a partial one."""
    folder = folders.of(history or lsn.history("", 1))
    folder.make(None)
    last = (cluster.flushed() - 1) // SEGMENT_BYTES
    for file in sorted((cluster.data / "pg_wal").iterdir()):
        name = SegmentName.parse(file.name, SEGMENT_BYTES)
        if name is not None and name.number <= last:
            shutil.copyfile(file, folder.path / (file.name + (".partial" if name.number == last else "")))


def confirmed(lives: Lives, cluster: Cluster, known: Known | None = None) -> History:
    if known is not None:
        lives.saw(known.commit)
    return present(lives, cluster, known.through if known else None).history


def present(lives: Lives, cluster: Cluster, through: Position | None = None) -> Present:
    async def run() -> Present:
        async with asyncio.timeout(LIMIT_SECONDS):
            return await lives.confirm(dsn_of(cluster), through)

    return asyncio.run(run())


def lives_that_know(how: str, known: Known, cluster: Cluster, folder: Path) -> Lives:
    """Give what knows of a server by what a catalog says of it, or by the log that a journal received from it."""
    if how == "recognised":
        lives = Lives()
        lives.recognise([known.seen])
        return lives
    folders = LogFolders(folder / "journal", SEGMENT_BYTES)
    received(cluster, folders)
    return Lives(folders=folders)


# ---- standbys


def test_a_standby_that_answers_is_refused_and_begins_no_new_life(cluster: Cluster, folder: Path) -> None:
    folders = LogFolders(folder / "journal", SEGMENT_BYTES)
    lives = Lives(folders=folders)
    with running_standby(cluster, streams=False) as standby:
        known = known_of(cluster)
        lives.recognise([known.seen])
        first = confirmed(lives, cluster)
        assert standby.sql("SELECT pg_is_in_recovery()") == [(True,)]
        with pytest.raises(SourceError, match="standby"):
            confirmed(lives, standby, known)
        assert confirmed(lives, cluster, known) == first == known.commit.history
        assert (first.incarnation, folders.newest(first.system)) == (0, 0)


# ---- commits that look different


def test_a_prepared_commit_of_an_origin_is_found_again_where_it_was(cluster: Cluster) -> None:
    """Such a record bears no transaction id in its header."""

    async def run() -> None:
        lives = Lives()
        source = PostgresSource(cluster.conninfo, "postgres", recognise=lives.confirm)
        try:
            assert await source.open(None) is None
            with cluster.connect() as connection:
                for statement in (
                    b"SELECT pg_replication_origin_create('elsewhere')",
                    b"SELECT pg_replication_origin_session_setup('elsewhere')",
                    b"BEGIN",
                    b"INSERT INTO t VALUES (1)",
                    b"PREPARE TRANSACTION 'two'",
                    b"COMMIT PREPARED 'two'",
                ):
                    connection.execute(statement)
            commit = (await everything(cluster, source))[-1]
            assert commit.origin == "elsewhere"
            for _ in range(2):
                assert await source.open(commit.position) is None
            again = Lives()  # a service that starts anew knows what its catalog says
            again.recognise([Seen(commit.position, record(commit, Outcome.PROTECTED))])
            assert (await again.confirm(dsn_of(cluster))).history == commit.history
        finally:
            await source.remove()

    asyncio.run(run())


# ---- log that is not at hand


def without_old_log(cluster: Cluster) -> Lsn:
    """Have the server remove a segment; gives a place in it."""
    place = cluster.flushed()
    name = cluster.sql("SELECT pg_walfile_name(pg_current_wal_flush_lsn())")[0][0]
    for _ in range(3):
        insert(cluster)
        cluster.sql("SELECT pg_switch_wal()")
        cluster.sql("CHECKPOINT")
    wait_until(lambda: not (cluster.data / "pg_wal" / name).exists())
    return Lsn(place - 1000)


@pytest.mark.parametrize("language", ["English", "German"])
@pytest.mark.parametrize("major", [15])
def test_log_that_the_server_has_not_got_is_no_log_in_whatever_language_it_says_so(
    major: int, language: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words come from Debian's package of the server; where they are left out, it says both in English."""
    if language == "German":
        environment = minimal_environment() | GERMAN
        monkeypatch.setattr("tests.fixtures.postgres.minimal_environment", lambda: environment)
    messages = "C.UTF-8" if language == "German" else "C"

    with running_cluster(major, folder / "data", fsync="off", lc_messages=messages) as cluster:
        cluster.sql("CREATE TABLE t (v int)")
        known = known_of(cluster)
        removed = without_old_log(cluster)
        dsn = dsn_of(cluster)
        assert asyncio.run(read_log(dsn, 1, removed, 16, 10)) is None
        assert asyncio.run(read_log(dsn, 7, cluster.flushed(), 16, 10)) is None, "no such timeline"
        lives = Lives()
        lives.recognise([known.seen])
        assert confirmed(lives, cluster, known) == known.commit.history, "nothing contradicts"

        cluster.switch_timeline()
        insert(cluster)
        assert asyncio.run(read_log(dsn, 1, cluster.flushed(), 16, 10)) is None, "the first timeline had ended"


def test_log_up_to_where_a_timeline_ended_can_be_read(cluster: Cluster) -> None:
    cluster.switch_timeline()
    *_, fork = (cluster.data / "pg_wal" / "00000002.history").read_text().strip().splitlines()
    end = Lsn.parse(fork.split()[1])
    for _ in range(5):
        found = asyncio.run(read_log(dsn_of(cluster), 1, Lsn(end - 64), 64, 10))
        assert found is not None
        assert len(found) == 64


# ---- promotions


@pytest.mark.parametrize("how", ["recognised", "journal"])
def test_a_copy_that_was_put_back_and_promoted_behind_what_is_known_begins_a_new_life(
    how: str, cluster: Cluster, folder: Path
) -> None:
    copy = saved(cluster)
    known = known_of(cluster)
    lives = lives_that_know(how, known, cluster, folder)
    put_back(cluster, copy)
    insert(cluster, 20_000)
    assert cluster.flushed() > known.through.at
    cluster.switch_timeline()
    insert(cluster)
    again = confirmed(lives, cluster)
    assert (again.branch, again.incarnation) == (2, 1)
    assert confirmed(lives, cluster) == again, "and goes on in it"
    if lives.folders is not None:
        assert confirmed(Lives(folders=lives.folders), cluster) == again, "and so does who starts anew"


def test_a_copy_that_was_promoted_before_what_is_known_is_found_out_by_the_log_that_was_received(
    cluster: Cluster, folder: Path
) -> None:
    """Its timeline begins at a place that the journal has other log before."""
    copy = saved(cluster)
    insert(cluster, 50_000)
    known = known_of(cluster)
    lives = lives_that_know("journal", known, cluster, folder)
    put_back(cluster, copy)
    insert(cluster, 100)
    cluster.switch_timeline()
    insert(cluster)
    assert cluster.flushed() < known.through.at
    again = confirmed(lives, cluster)
    assert (again.branch, again.incarnation) == (2, 1)


@pytest.mark.parametrize("how", ["recognised", "journal"])
@pytest.mark.parametrize("part", ["all", "some"])
def test_a_standby_that_was_promoted_goes_on_in_the_same_life(
    how: str, part: str, cluster: Cluster, folder: Path
) -> None:
    with running_standby(cluster, streams=True) as standby:
        insert(cluster, 100)
        known = known_of(cluster)
        wait_until(lambda: bool(standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{cluster.flushed()}'")[0][0]))
        if part == "some":
            standby.stop()
            standby.configure({"primary_conninfo": ""})
            insert(cluster, 5000)
            known = known_of(cluster)
            standby.start()
        lives = lives_that_know(how, known, cluster, folder)
        confirmed(lives, cluster, known)
        cluster.stop()
        standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
        insert(standby)
        for _ in range(2):
            there = confirmed(lives, standby)
            assert (there.system, there.branch, there.incarnation) == (known.commit.history.system, 2, 0)


def test_a_server_that_goes_back_to_a_timeline_of_which_it_has_all_that_is_known_goes_on_there(
    cluster: Cluster,
) -> None:
    """The primary of before is started again after a failover, or a restore in place is undone."""
    with running_standby(cluster, streams=True) as standby:
        known = known_of(cluster)
        wait_until(lambda: bool(standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{cluster.flushed()}'")[0][0]))
        lives = Lives()
        before = confirmed(lives, cluster, known)
        cluster.stop()
        standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
        insert(standby)
        promoted = confirmed(lives, standby)
        assert (promoted.branch, promoted.incarnation) == (2, 0)
        lives.recognise([Seen(Position(promoted, standby.flushed()), None)])
        standby.stop()
        cluster.start()
        assert confirmed(lives, cluster) == before


# ---- a journal that does not answer


class Unanswered(LogFolders):
    """The folders of a journal whose disk gives an error, or nothing at all."""

    def __init__(self, path: Path, answer: Callable[[], None]) -> None:
        super().__init__(path, SEGMENT_BYTES)
        self._answer = answer

    def of(self, history: History) -> SegmentFolder:
        self._answer()
        return super().of(history)

    def newest(self, system: str) -> int:
        self._answer()
        return super().newest(system)

    def begin(self, *_: Any) -> SegmentFolder:
        self._answer()
        raise AssertionError("the disk did not answer")


@pytest.fixture(params=["error", "silence"])
def unanswered(request: pytest.FixtureRequest, tmp_path: Path, mended: threading.Event) -> LogFolders:
    def refuse() -> None:
        raise OSError(errno.EIO, "Input/output error")

    def hang() -> None:
        mended.wait(20)

    return Unanswered(tmp_path / "journal", refuse if request.param == "error" else hang)


def test_a_journal_whose_disk_does_not_answer_leaves_the_answer_to_what_was_recognised(
    cluster: Cluster, unanswered: LogFolders
) -> None:
    known = known_of(cluster)
    system = asyncio.run(identify(dsn_of(cluster), 10)).identifier
    third = lsn.history(system, 1, 2)
    lives = Lives(DEADLINE_SECONDS, folders=unanswered)
    lives.recognise([known.seen, Seen(Position(third, known.through.at), None)])
    began = time.monotonic()
    assert confirmed(lives, cluster) == third
    assert time.monotonic() - began < 2 * DEADLINE_SECONDS + 3, "one deadline for each look into the folders"


def test_a_new_life_that_cannot_be_written_down_does_not_begin(cluster: Cluster, unanswered: LogFolders) -> None:
    copy = saved(cluster)
    known = known_of(cluster)
    lives = Lives(DEADLINE_SECONDS, folders=unanswered)
    lives.recognise([known.seen])
    put_back(cluster, copy)
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(SourceError, match="cannot be given a folder"):
            confirmed(lives, cluster)
    assert time.monotonic() - began < 2 * (3 * DEADLINE_SECONDS + 3)
    assert lives.history(known.commit.history.system, 1).incarnation == 0


# ---- what is known without asking


def seen(history: History, at: int, time_us: int) -> Seen:
    commit = CommitRecord("bank", lsn.transaction(7), at - 64, at, time_us, (), Outcome.PROTECTED)
    return Seen(Position(history, at), commit)


def test_the_newest_history_is_the_one_that_was_confirmed_or_else_that_of_the_latest_commit(cluster: Cluster) -> None:
    """Those of two clusters do not order by timelines: the one before an upgrade may have had many."""
    before, after = lsn.history("8", 5, 3), lsn.history("9", 1)
    lives = Lives()
    assert lives.newest_known() is None
    lives.recognise([Seen(Position(lsn.history("7", 9, 9), 900), None)])
    assert lives.newest_known() == lsn.history("7", 9, 9), "for want of any commit"
    lives.recognise([seen(before, 800, time_us=1_000), seen(after, 100, time_us=2_000)])
    assert lives.newest_known() == after
    here = confirmed(lives, cluster)
    assert lives.newest_known() == here
    assert here not in (before, after)


def test_a_known_timeline_that_begins_elsewhere_by_now_is_another_though_its_log_cannot_be_compared(
    cluster: Cluster, folder: Path
) -> None:
    async def removed(*_: Any) -> None:
        """Give what `read_log` gives of log that the server has removed."""

    copy = saved(cluster)
    insert(cluster, 1_000)
    cluster.switch_timeline()
    known = known_of(cluster)
    assert known.through.history.branch == 2
    kept = LogFolders(folder / "journal", SEGMENT_BYTES)
    received(cluster, kept)
    shutil.copyfile(cluster.data / "pg_wal" / "00000002.history", kept.all()[0].path / "00000002.history")
    remembered = Lives(read=removed)
    for lives in (remembered, Lives(folders=kept, read=removed)):
        assert confirmed(lives, cluster, known) == known.through.history, "the same past"
    put_back(cluster, copy)
    insert(cluster, 60_000)
    cluster.switch_timeline()
    insert(cluster, 10)
    assert cluster.flushed() > known.through.at
    for lives in (remembered, Lives(folders=kept, read=removed)):
        again = confirmed(lives, cluster, known)
        assert (again.branch, again.incarnation) == (2, 1)
        assert confirmed(lives, cluster) == again, "and goes on in it"
