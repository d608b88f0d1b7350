"""A search of the log misses no commit, whatever becomes of the segments' names while they are read."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log import search
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.said import CHILDREN, Said
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.lsn import Lsn
from tests.connectors.postgres.reading import commit_records
from tests.connectors.postgres.test_lives_servers import SEGMENT_BYTES, insert, received
from tests.fixtures.postgres import Cluster, running_cluster
from tests.fixtures.volumes import plain_folder
from trigger.errors import JournalError
from trigger.model import Logged
from trigger.position import Name

pytestmark = pytest.mark.server

_CHILDREN = 20_000
_MANY = f"""DO $$ BEGIN FOR i IN 1..{_CHILDREN} LOOP
    BEGIN INSERT INTO t VALUES (i + 10); EXCEPTION WHEN unique_violation THEN NULL; END; END LOOP; END $$"""
Meanwhile = Callable[[SegmentFolder], None]


@pytest.fixture(scope="module", params=[15, 18])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with (
        plain_folder() as folder,
        running_cluster(request.param, folder / "data", fsync="off", wal_keep_size="1GB") as made,
    ):
        made.sql("CREATE TABLE t (v int)")
        for size in (900_000, 700_000):  # in several segments, whose last records go on in the next
            for _ in range(30):
                made.sql(f"INSERT INTO t VALUES (1); SELECT pg_logical_emit_message(true, 'bulk', repeat('x', {size}))")
            made.sql("SELECT pg_switch_wal()")
        insert(made, 10)
        made.sql(_MANY)
        made.sql("DROP TABLE IF EXISTS none; CREATE TABLE other (v int)")
        yield made


@pytest.fixture
def held(cluster: Cluster, tmp_path: Path) -> SegmentFolder:
    """What a journal has received of its log, the last segment unfinished."""
    folders = LogFolders(tmp_path / "journal", SEGMENT_BYTES)
    received(cluster, folders)
    return folders.all()[0]


def searched(
    cluster: Cluster, held: SegmentFolder, meanwhile: Meanwhile = lambda _: None, like: int = 700
) -> list[Logged]:
    """Give all commits of the log; something happens to the folder once the first one is read."""

    async def run() -> list[Logged]:
        found: list[Logged] = []
        begin, end = held.extents()[0].start, held.extents()[-1].end
        history, dump = lsn.history(held.system(), 1), WalDump(cluster.programs)
        async for one in search.commits(held, dump, history, begin, end, Name("", like)):
            found.append(one)
            if len(found) == 1:
                meanwhile(held)
        return found

    return asyncio.run(run())


def finish_the_last(held: SegmentFolder) -> None:
    name = held.names()[-1]
    assert name.partial
    file = held.file(name)
    file.rename(file.with_suffix(""))


def release_all(held: SegmentFolder) -> None:
    for name in held.names():
        held.file(name).unlink()


@pytest.mark.parametrize("meanwhile", [finish_the_last, release_all])
def test_what_is_read_is_read_to_its_end_whatever_becomes_of_its_name(
    cluster: Cluster, held: SegmentFolder, meanwhile: Meanwhile
) -> None:
    all_of_it = searched(cluster, held)
    assert len(all_of_it) > 60
    assert searched(cluster, held, meanwhile) == all_of_it


def test_a_long_stretch_is_read_in_parts_that_leave_nothing_out(
    cluster: Cluster, held: SegmentFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_of_it = searched(cluster, held)
    begin, end = held.extents()[0].start, held.extents()[-1].end
    assert [one.start for one in all_of_it] == [one.start for one in commit_records(cluster, Lsn(begin), Lsn(end))]
    for shown in (1, 2, 3):
        monkeypatch.setattr(search, "SHOWN", shown)
        assert searched(cluster, held, finish_the_last if shown == 2 else lambda _: None) == all_of_it
    assert len(held.names()) >= 4


def test_a_part_that_was_let_go_of_before_it_was_read_is_said_and_not_left_out(
    cluster: Cluster, held: SegmentFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SHOWN", 1)
    with pytest.raises(JournalError, match=r"is not in the journal .* any more") as caught:
        searched(cluster, held, release_all)
    assert caught.value.retryable


def test_a_segment_that_gets_its_name_while_the_folder_is_listed_is_held_all_the_same(held: SegmentFolder) -> None:
    extents = held.extents()

    class Finishing(SegmentFolder):
        """A folder whose last segment is finished right after it was listed."""

        def _listing(self) -> dict[str, Path]:
            listing = super()._listing()
            for file in self.path.glob("*.partial"):
                file.rename(file.with_suffix(""))
            return listing

    folder = Finishing(held.path, SEGMENT_BYTES)
    ends = [(extent.start, extent.end) for extent in folder.extents()]
    assert ends[0][0] == extents[0].start
    assert ends[0][1] >= extents[-1].end


def test_a_savepoint_is_found_however_many_there_are_before_it(cluster: Cluster, held: SegmentFolder) -> None:
    rows = cluster.sql(f"SELECT DISTINCT xmin::text::int FROM t WHERE v IN (11, {_CHILDREN // 2}, {_CHILDREN + 10})")
    for child in (row[0] for row in rows):
        (one,) = [one for one in searched(cluster, held, like=child) if Name("", child) in one.children]
        assert len(one.children) + one.more_children == _CHILDREN
        assert len(one.children) <= CHILDREN + 1
        assert len(set(one.children)) == len(one.children)
        assert one.children[0].number == (one.name.number or 0) + 1


@pytest.mark.parametrize(
    ("said", "did", "children"),
    [
        ("", "", []),
        ("; subxacts: 731 732 733", "", [731, 732, 733]),
        (
            "; rels: base/5/16384 base/5/16385; subxacts: 731 732; inval msgs: catcache 7; sync",
            "changes the catalog (DDL), drops 2 files",
            [731, 732],
        ),
        (
            "; inval msgs: catcache 7 relcache 1; origin: node 3, lsn 0/2, at 2026-11-26 10:18:40 UTC",
            "changes the catalog (DDL), was replicated from elsewhere",
            [],
        ),
    ],
)
def test_what_a_commit_says_is_read_from_parts_as_from_the_whole(said: str, did: str, children: list[int]) -> None:
    head = (
        "rmgr: Transaction len (rec/tot):     46/    46, tx:        725, lsn: 0/01759A78, prev 0/01759A38, "
        "desc: COMMIT 2026-11-21 23:12:53.690434 UTC"
    )
    blanks = [at for at, letter in enumerate(said) if letter == " "]
    for cut in (*blanks, len(said)):
        one = Said.of(head + said[:cut])
        assert one is not None
        one.add(said[cut:])
        assert (one.xid, one.did, one.children) == (725, did, children)
    every = Said.of(head)
    assert every is not None
    for begin, end in itertools.pairwise([0, *blanks, len(said)]):
        every.add(said[begin:end])
    assert (every.did, every.children) == (did, children)
