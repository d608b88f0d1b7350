"""A look at a clone finds what its snapshot has lost, whatever lost it, and finds nothing in one that is whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from connectors.databases.postgres.clone.files import Relation, look
from tests.fixtures.restores import Cut, Ground, ground, silent
from tests.fixtures.volumes import loop_volume
from trigger.errors import RestoreError
from trigger.replay import Target

PAGE = 8192
WHOLE = "all files are there and whole, and hold what the catalogs and indexes speak of"
CONTENT = (
    "CREATE TABLE keyed (id int PRIMARY KEY, word text)",
    "INSERT INTO keyed SELECT n, repeat('x', 60) FROM generate_series(1, 20000) n",
    "CREATE TABLE hashed AS SELECT n, repeat('y', 60) AS word FROM generate_series(1, 5000) n",
    "CREATE INDEX hashed_n ON hashed USING hash (n)",
    "CREATE TABLE placed AS SELECT point(n, n) AS at FROM generate_series(1, 5000) n",
    "CREATE INDEX placed_at ON placed USING gist (at)",
    "CREATE INDEX placed_quad ON placed USING spgist (at)",
    "CREATE TABLE tagged AS SELECT n, ARRAY[n, n + 1] AS tags FROM generate_series(1, 5000) n",
    "CREATE INDEX tagged_tags ON tagged USING gin (tags)",
    "CREATE INDEX tagged_n ON tagged USING brin (n)",
    "CREATE TABLE vacuumed AS SELECT n, repeat('z', 60) AS word FROM generate_series(1, 20000) n",
    "CREATE TABLE analysed AS SELECT n, repeat('z', 60) AS word FROM generate_series(1, 20000) n",
    "CREATE TABLE same AS SELECT n % 7 AS n, repeat('s', 60) AS word FROM generate_series(1, 20000) n",
    "CREATE INDEX same_n ON same (n)",
    "CREATE TABLE big (id int PRIMARY KEY, word text)",
    "ALTER TABLE big ALTER word SET STORAGE EXTERNAL",
    "INSERT INTO big SELECT n, repeat('b', 9000) FROM generate_series(1, 50) n",
    "CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY)",
    "CREATE MATERIALIZED VIEW seen AS SELECT * FROM keyed",
    "CREATE SEQUENCE numbers",
    "VACUUM vacuumed",
    "ANALYZE analysed",
)


def gone(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut_to_10_pages(file: Path) -> None:
    assert file.stat().st_size > 10 * PAGE
    with file.open("r+b") as opened:
        opened.truncate(10 * PAGE)


def a_page_of_zeros(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(3 * PAGE)
        opened.write(bytes(PAGE))


class Production:
    """A cluster with something of every kind, and one snapshot of it."""

    def __init__(self, here: Ground) -> None:
        self.here = here
        for statement in CONTENT:
            here.cluster.sql(statement)
        here.cluster.sql("CHECKPOINT")
        self.cut = here.cut()

    def looked_at(self, damage: Callable[[Path], None] | None = None, file: str = "") -> dict[str, tuple[bool, str]]:
        return asyncio.run(looked_at(self.here, self.cut, damage, file))

    def file_of(self, relation: str) -> str:
        if relation == "toast":
            relation = str(
                self.here.cluster.sql("SELECT reltoastrelid::regclass FROM pg_class WHERE relname = 'big'")[0][0]
            )
        return str(self.here.cluster.sql(f"SELECT pg_relation_filepath('{relation}')")[0][0])


async def looked_at(
    here: Ground, cut: Cut, damage: Callable[[Path], None] | None = None, file: str = ""
) -> dict[str, tuple[bool, str]]:
    """Bring a snapshot up, with a file of it damaged before, and give what a close look saw by check."""
    staged = here.folder / "empty"
    staged.mkdir(exist_ok=True)
    clone = here.clone(cut)
    if damage is not None:
        damage(clone.paths[0][1] / "data" / file)
    target = Target(cut.floor.history, None, True, "the snapshot", reach=cut.ceiling.at, point="cut")
    try:
        running = await here.recovery.start(clone, here.volumes, cut.replay(target), staged, silent, throwaway=True)
        looks = here.recovery.inspect(running, target, staged, deep=True)
        return {what: (held, seen) async for what, held, seen in looks}
    finally:
        await here.drop(clone)


@pytest.fixture(scope="module", params=[15, 18])
def production(request: pytest.FixtureRequest) -> Iterator[Production]:
    with loop_volume("btrfs", 4096) as folder, ground(request.param, folder, btrfs=True) as here:
        yield Production(here)


def of_files(seen: dict[str, tuple[bool, str]]) -> tuple[bool, str]:
    return next(result for what, result in seen.items() if what.startswith(WHOLE))


@pytest.mark.server
@pytest.mark.volume
def test_what_is_whole_is_found_whole_and_what_is_not_looked_into_is_named(production: Production) -> None:
    seen = production.looked_at()
    assert all(held for held, _ in seen.values()), seen
    what = next(what for what in seen if what.startswith(WHOLE))
    assert "brin, gin, gist, hash, spgist" in what
    assert int(of_files(seen)[1].split()[-4]) > 20000 + 5000 + 5000 + 20000


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.parametrize(
    ("relation", "damage"),
    [
        ("keyed", cut_to_10_pages),
        ("keyed", a_page_of_zeros),
        ("keyed", gone),
        ("keyed", emptied),
        ("keyed_pkey", gone),
        ("keyed_pkey", cut_to_10_pages),
        ("hashed", cut_to_10_pages),
        ("hashed_n", gone),
        ("placed", cut_to_10_pages),
        ("placed_at", gone),
        ("placed_quad", emptied),
        ("tagged_tags", gone),
        ("tagged_tags", emptied),
        ("tagged_n", gone),
        ("vacuumed", cut_to_10_pages),
        ("vacuumed", a_page_of_zeros),
        ("analysed", cut_to_10_pages),
        ("same", a_page_of_zeros),
        ("toast", cut_to_10_pages),
        ("seen", gone),
        ("numbers", gone),
        ("numbers", emptied),
        ("pg_description", gone),
    ],
)
def test_what_a_snapshot_lost_is_found_and_the_file_is_named(
    production: Production, relation: str, damage: Callable[[Path], None]
) -> None:
    file = production.file_of(relation)
    held, words = of_files(production.looked_at(damage, file))
    assert not held
    assert file in words


@pytest.mark.server
@pytest.mark.volume
def test_what_was_lost_of_a_database_that_is_closed_is_found_too(production: Production) -> None:
    oid = production.here.cluster.sql("SELECT oid FROM pg_database WHERE datname = 'template0'")[0][0]
    file = f"base/{oid}/{production.file_of('pg_description').rpartition('/')[2]}"
    held, words = of_files(production.looked_at(gone, file))
    assert not held
    assert file in words
    assert "template0" in words


@pytest.mark.server
@pytest.mark.volume
def test_the_lock_of_an_in_doubt_transaction_is_named_and_not_waited_for(production: Production) -> None:
    cluster = production.here.cluster
    cluster.sql("BEGIN; TRUNCATE vacuumed; LOCK keyed; PREPARE TRANSACTION 'it''s \"in\" doubt'")
    try:
        cut = production.here.cut()
    finally:
        cluster.sql("ROLLBACK PREPARED 'it''s \"in\" doubt'")
    seen = asyncio.run(asyncio.wait_for(looked_at(production.here, cut), 60))
    assert all(held for held, _ in seen.values()), seen
    words = next(words for what, (_, words) in seen.items() if what.startswith("in-doubt transactions"))
    assert words == 'it\'s "in" doubt on public.keyed, public.vacuumed in postgres'


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.parametrize("major", [15, 18])
def test_no_way_to_a_sound_table_is_taken_for_a_loss(major: int) -> None:
    """Tables that shrank, moved, were filled in vain, or whose index was not finished; after a crash."""
    with loop_volume("btrfs", 4096) as folder, ground(major, folder, btrfs=True) as here:
        sql = here.cluster.sql
        for name in ("shrunk", "emptied", "moved", "failed", "updated", "aborted"):
            sql(f"CREATE TABLE {name} (id int, word text)")
            sql(f"CREATE INDEX {name}_id ON {name} (id); CREATE INDEX {name}_hash ON {name} USING hash (id)")
            sql(f"INSERT INTO {name} SELECT n % 3000, repeat('x', 90) FROM generate_series(1, 9000) n")
            sql(f"VACUUM ANALYZE {name}")
        sql("DELETE FROM shrunk WHERE ctid > '(20,0)'")
        sql("VACUUM shrunk")
        sql("TRUNCATE emptied")
        sql("CLUSTER moved USING moved_id")
        sql("DELETE FROM moved WHERE id % 2 = 0")
        sql("VACUUM FULL moved")
        for _ in range(3):
            sql("UPDATE updated SET word = 'y' || word WHERE id % 3 = 0")
        sql("VACUUM (INDEX_CLEANUP off) updated")
        sql("BEGIN; INSERT INTO aborted SELECT n, repeat('x', 90) FROM generate_series(1, 9000) n; ROLLBACK")
        sql("DELETE FROM aborted")
        sql("VACUUM aborted")
        with pytest.raises(psycopg.Error):
            sql("CREATE UNIQUE INDEX CONCURRENTLY failed_once ON failed (id)")
        sql("DELETE FROM failed WHERE ctid > '(20,0)'")
        sql("VACUUM failed")
        writer = psycopg.connect(f"{here.cluster.conninfo} dbname=postgres")
        writer.execute("INSERT INTO aborted SELECT n, 'z' FROM generate_series(1, 90000) n")
        here.cluster.kill()
        writer.close()
        here.cluster.start()
        seen = asyncio.run(looked_at(here, here.cut()))
        assert not [result for result in seen.items() if not result[1][0]]


def relation(path: str, kind: str = "r", method: str = "heap", pages: int = 0) -> Relation:
    return Relation("bank", path, kind, method, False, pages, path, "")


def looked(folder: Path, *relations: Relation) -> list[str]:
    return look(folder, relations, PAGE, 4, threading.Event()).faults


def test_a_table_of_several_files_has_to_have_each_of_them_in_full(tmp_path: Path) -> None:
    sizes = {"whole": (4, 4, 1), "shrunk": (4, 2, 0), "hole": (4, None, 1), "short": (4, 3, 1), "torn": (4, 1.5)}
    for name, files in sizes.items():
        for number, pages in enumerate(files):
            if pages is not None:
                (tmp_path / (f"{name}.{number}" if number else name)).write_bytes(bytes(int(pages * PAGE)))
    assert looked(tmp_path, relation("whole", pages=9), relation("shrunk", pages=6)) == []
    assert looked(tmp_path, relation("hole")) == ["hole in bank: a file before hole.2 is gone"]
    assert looked(tmp_path, relation("short")) == ["short in bank: short.2 comes behind a file that is not full"]
    assert looked(tmp_path, relation("torn")) == ["torn in bank: torn.1 ends inside a page"]
    (words,) = looked(tmp_path, relation("whole", pages=10))
    assert "has 9 pages, and had 10 by the catalog" in words


def test_a_page_with_no_header_that_a_server_would_take_is_found(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(PAGE) + b"\x01" * PAGE + bytes(PAGE - 1) + b"\x01")
    (words,) = looked(tmp_path, relation("odd"))
    assert words == "odd in bank: odd has 2 pages with a broken header, the first 1"


def test_a_file_that_cannot_be_read_is_a_fault_of_its_relation(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (words,) = looked(tmp_path, relation("folder"))
    assert words.startswith("folder in bank: ")
    assert "cannot be read" in words or "ends inside a page" in words


def test_a_look_ends_when_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(bytes(PAGE))
    over = threading.Event()
    over.set()
    with pytest.raises(RestoreError, match="ended before its end"):
        look(tmp_path, [relation("table")], PAGE, 4, over)
