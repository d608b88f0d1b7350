"""The catalog's file: kept across runs, brought to the present version, and every trouble with it named."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from tests.fixtures.volumes import run
from tests.trigger.catalog.test_catalog import BASE_US, at, opened, proven, record, sealed, with_catalog
from trigger.catalog import migrations, schema, sqlite
from trigger.catalog.catalog import Catalog, make_engine
from trigger.errors import CatalogError
from trigger.model import State
from trigger.service.control import if_free, only_one


def test_a_catalog_in_memory_survives_its_service() -> None:
    engine = make_engine(":memory:")

    async def first(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])

    async def second(catalog: Catalog) -> None:
        assert await catalog.commits_of(1) == [record(100)]

    with_catalog(first, engine)
    with_catalog(second, engine)
    engine.dispose()


def test_a_catalog_in_a_file_is_there_the_next_time(tmp_path: Path) -> None:
    async def work() -> None:
        catalog = await Catalog.open(tmp_path / "catalog.db")
        point = await sealed(catalog, 1, [record(100)])
        await catalog.close()
        catalog = await Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
        assert await catalog.point(1) == point
        await catalog.close()

    asyncio.run(work())
    assert (tmp_path / "catalog.db").stat().st_mode & 0o777 == 0o600


def test_writers_and_readers_of_one_catalog_may_come_all_at_once(tmp_path: Path) -> None:
    async def work() -> None:
        catalog = await Catalog.open(tmp_path / "catalog.db")
        points = await asyncio.gather(
            *(opened(catalog, n) for n in range(30)), *(opened(catalog, n) for n in range(30))
        )
        assert sorted({point.number for point in points}) == list(range(1, 31))
        await catalog.close()

    asyncio.run(work())


def at_version(patch: pytest.MonkeyPatch, version: int, *steps: Callable[[Connection], None]) -> None:
    """Let the program be one of a later version, which comes from the present one by `steps`."""
    patch.setattr(schema, "VERSION", version)
    patch.setattr(migrations, "VERSION", version)
    patch.setattr(migrations, "STEPS", (*migrations.STEPS, *steps))


def test_a_catalog_of_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "catalog.db"
    with monkeypatch.context() as later:
        at_version(later, 3)
        with_catalog(no_work, where)
    with pytest.raises(CatalogError, match=r"version 3, this program knows versions up to 2"):
        with_catalog(no_work, where)


def test_an_older_catalog_is_brought_up_step_by_step_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def step(connection: Connection) -> None:
        taken.append(1)
        connection.execute(text("ALTER TABLE points ADD COLUMN colour TEXT"))

    async def seal_one(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])

    async def look(catalog: Catalog) -> None:
        assert await catalog.commits_of(1) == [record(100)]

    with_catalog(seal_one, tmp_path / "catalog.db")
    at_version(monkeypatch, 3, step)
    for _ in range(2):
        with_catalog(look, tmp_path / "catalog.db")
    assert taken == [1]


def test_a_migration_that_fails_leaves_the_catalog_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE points ADD COLUMN colour TEXT"))
        connection.execute(text("ALTER TABLE nothing ADD COLUMN colour TEXT"))

    async def seal_one(catalog: Catalog) -> None:
        await sealed(catalog, 1)

    async def look(catalog: Catalog) -> None:
        assert (await catalog.point(1)).state is State.SEALED

    where = tmp_path / "catalog.db"
    with_catalog(seal_one, where)
    with monkeypatch.context() as later:
        at_version(later, 3, step)
        with pytest.raises(CatalogError, match="nothing"):
            with_catalog(look, where)
    with_catalog(look, where)


def colour(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE points ADD COLUMN colour TEXT"))


def older(where: Path, through: int = 100) -> None:
    """Leave a catalog of the present version, which is settled up to a place."""

    async def settle(catalog: Catalog) -> None:
        await catalog.settle("bank", at(through))

    with_catalog(settle, where)


def looked_at(where: Path) -> tuple[int, int, bool]:
    """Give the version of a catalog, how far it is settled, and whether `colour` was there."""
    with contextlib.closing(sqlite3.connect(where)) as connection:
        (version,) = connection.execute("SELECT max(version) FROM schema_version").fetchone()
        (through,) = connection.execute("SELECT through FROM settled").fetchone()
        columns = {row[1] for row in connection.execute("PRAGMA table_info(points)")}
    return version, through, "colour" in columns


def test_an_older_catalog_is_not_brought_up_while_another_process_works_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "catalog.db"

    async def open_it() -> None:
        await (await Catalog.open(where, upgrade=if_free(tmp_path))).close()

    older(where)
    at_version(monkeypatch, 3, colour)
    with only_one(tmp_path):
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises(CatalogError, match="tables are of version 2, this program's of version 3") as caught:
            asyncio.run(open_it())
        assert "an older service works with it" in caught.value.hint
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    asyncio.run(open_it())
    assert looked_at(where) == (3, 100, True)
    assert looked_at(tmp_path / "catalog.db.version-2") == (2, 100, False)
    with only_one(tmp_path):
        asyncio.run(open_it())  # it is of the present version, so that nobody is asked


def test_who_waits_for_another_that_brings_it_up_keeps_the_copy_of_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "catalog.db"

    @contextlib.contextmanager
    def another_one_first() -> Iterator[bool]:
        with_catalog(no_work, where)
        yield True

    async def open_it() -> None:
        await (await Catalog.open(where, upgrade=another_one_first())).close()

    older(where)
    at_version(monkeypatch, 3, colour)
    asyncio.run(open_it())
    assert looked_at(where) == (3, 100, True)
    assert looked_at(tmp_path / "catalog.db.version-2") == (2, 100, False)


async def no_work(catalog: Catalog) -> None:
    """Open it and no more."""


def test_the_folder_is_held_until_the_catalog_is_brought_up_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, free = tmp_path / "catalog.db", list[bool]()

    def step(connection: Connection) -> None:
        colour(connection)
        with if_free(tmp_path) as is_free:
            free.append(is_free)

    async def open_it() -> None:
        catalog = await Catalog.open(where, upgrade=if_free(tmp_path))
        with only_one(tmp_path):
            await catalog.close()

    older(where)
    at_version(monkeypatch, 3, step)
    asyncio.run(open_it())
    assert free == [False]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "small"
    made.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", made)
    try:
        yield made
    finally:
        run("umount", made)


@pytest.mark.root
def test_a_disk_without_room_for_the_copy_leaves_the_catalog_at_its_version_and_no_half_of_one(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = small_disk / "catalog.db"
    older(where)
    with contextlib.closing(sqlite3.connect(where)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("CREATE TABLE ballast (bytes BLOB)")
        connection.execute("INSERT INTO ballast VALUES (zeroblob(1600000))")
        connection.commit()
    with monkeypatch.context() as later:
        at_version(later, 3, colour)
        with pytest.raises(CatalogError, match="could be kept, so it stays of version 2") as caught:
            with_catalog(nothing, where)
        assert f"make room in {small_disk}" in caught.value.hint
        assert sorted(file.name for file in small_disk.iterdir() if "version" in file.name) == []
        assert looked_at(where) == (2, 100, False)
        run("mount", "-o", "remount,size=16m", small_disk)
        with_catalog(nothing, where)
        assert looked_at(where) == (3, 100, True)
        assert looked_at(small_disk / "catalog.db.version-2") == (2, 100, False)


def test_a_copy_that_an_earlier_try_left_is_replaced_by_the_state_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, copy = tmp_path / "catalog.db", tmp_path / "catalog.db.version-2"

    def refused(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE nothing ADD COLUMN colour TEXT"))

    older(where)
    with monkeypatch.context() as later:
        at_version(later, 3, refused)
        with pytest.raises(CatalogError, match="nothing"):
            with_catalog(nothing, where)
    assert looked_at(copy)[1] == 100
    (tmp_path / "catalog.db.version-2.new").write_text("half made when the power went")
    older(where, through=5000)
    with monkeypatch.context() as later:
        at_version(later, 3, colour)
        with_catalog(nothing, where)
    assert looked_at(copy) == (2, 5000, False)
    assert not (tmp_path / "catalog.db.version-2.new").exists()


async def nothing(_catalog: Catalog) -> None:
    pass


@pytest.mark.parametrize("where", ["/nowhere/at/all/catalog.db", "/proc/catalog.db", "mysql+nothing://", "://"])
def test_a_catalog_that_cannot_be_opened_is_an_error_that_names_it(where: str) -> None:
    with pytest.raises(CatalogError) as caught:
        with_catalog(nothing, where)
    assert where in str(caught.value)
    assert caught.value.hint


def test_a_folder_is_no_catalog(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=str(tmp_path)):
        with_catalog(nothing, tmp_path)


def test_a_file_that_is_no_catalog_is_refused_and_left_alone(tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear Sirs,\n" * 500)
    with pytest.raises(CatalogError, match="not a catalog, or damaged"):
        with_catalog(nothing, letter)
    assert letter.read_text() == "Dear Sirs,\n" * 500


def test_a_flipped_bit_in_a_point_is_noticed(tmp_path: Path) -> None:
    where = tmp_path / "catalog.db"

    async def fill(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])

    async def look(catalog: Catalog) -> None:
        with pytest.raises(CatalogError, match=r"point 1 is damaged.*digest"):
            await catalog.point(1)

    with_catalog(fill, where)
    with sqlite3.connect(where) as connection:
        connection.execute("""UPDATE points SET document = replace(document, '"commits":1', '"commits":3')""")
    connection.close()
    with_catalog(look, where)


def test_a_flipped_bit_in_a_block_is_noticed(tmp_path: Path) -> None:
    where = tmp_path / "catalog.db"

    async def fill(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100), record(200)])

    async def look(catalog: Catalog) -> None:
        with pytest.raises(CatalogError, match="is damaged"):
            await catalog.commits_of(1)

    with_catalog(fill, where)
    with sqlite3.connect(where) as connection:
        (data,) = connection.execute("SELECT data FROM blocks").fetchone()
        connection.execute("UPDATE blocks SET data = ?", (data[:30] + bytes([data[30] ^ 4]) + data[31:],))
    connection.close()
    with_catalog(look, where)


def test_a_truncated_catalog_is_named_as_damaged(tmp_path: Path) -> None:
    where = tmp_path / "catalog.db"

    async def fill(catalog: Catalog) -> None:
        for number in range(1, 60):
            await sealed(catalog, number, [record(100 * number)])

    async def look(catalog: Catalog) -> None:
        await catalog.points()

    with_catalog(fill, where)
    os.truncate(where, where.stat().st_size // 2)
    with pytest.raises(CatalogError, match="damaged") as caught:
        with_catalog(look, where)
    assert "rebuild" in caught.value.hint


def test_a_catalog_that_another_process_holds_is_a_retryable_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_SECONDS", 0.1)
    where = tmp_path / "catalog.db"

    async def work(catalog: Catalog) -> None:
        other = sqlite3.connect(where, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogError, match="another process holds it") as caught:
            await catalog.settle("bank", at(100))
        assert caught.value.retryable
        assert await catalog.settled("bank") is None
        other.rollback()
        other.close()
        await catalog.settle("bank", at(100))
        assert await catalog.settled("bank") == at(100)

    with_catalog(work, where)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_catalog_file_that_was_taken_away_is_not_written_on(tmp_path: Path, replaced: bool) -> None:
    where = tmp_path / "catalog.db"

    async def work(catalog: Catalog) -> None:
        point = await opened(catalog, 1)
        where.rename(tmp_path / "elsewhere.db")
        if replaced:
            where.touch()
        with pytest.raises(CatalogError, match="removed or replaced"):
            await catalog.seal(proven(point), [record(100)], {"bank": at(108)})

    with_catalog(work, where)


def test_a_value_that_does_not_fit_is_an_error_and_nothing_is_kept() -> None:
    async def work(catalog: Catalog) -> None:
        point = await opened(catalog, 1)
        with pytest.raises(CatalogError, match="63 bits"):
            await catalog.seal(proven(point), [record(1 << 63, xid=1, time_us=BASE_US)], {})
        with pytest.raises(CatalogError, match="cannot be kept"):
            await catalog.seal(proven(point), [record(100, stream="\udc80")], {})
        assert await catalog.find() == []

    with_catalog(work)


def test_the_password_of_a_server_is_not_shown() -> None:
    with pytest.raises(CatalogError) as caught:
        make_engine("mysql+nothing://trig:geheim@db/catalog")
    assert "geheim" not in str(caught.value)
    catalog = Catalog(make_engine("postgresql+psycopg://trig:geheim@db/catalog"), None, owns_engine=True)
    assert "geheim" not in catalog.where
    assert "db/catalog" in catalog.where


def test_a_catalog_file_is_written_with_a_log_and_synced_at_every_commit(tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "catalog.db")
    with_catalog(nothing, engine)
    with engine.connect() as connection:
        asked = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
        assert asked == {"journal_mode": "wal", "synchronous": 2}
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    engine.dispose()
