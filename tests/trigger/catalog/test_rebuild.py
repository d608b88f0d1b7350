"""A catalog made anew from tags, and what is said of what only the old one knew."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

from connectors.databases.postgres.lsn import Lsn
from trigger import failpoint
from trigger.catalog import schema, sqlite
from trigger.catalog.catalog import Catalog
from trigger.catalog.point_index import Missed
from trigger.catalog.rebuild import Known, Rebuilt, known, rebuild, take_over
from trigger.catalog.reconcile import Reconciliation
from trigger.errors import CatalogError, DamagedError, StorageError
from trigger.model import Cause, CommitRecord, Gap, Mark, Outcome, RecoveryPoint, Snapshot, State, Verification
from trigger.point_names import point_id
from trigger.position import History, Name, Position

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HISTORY = History("postgres", "7391", 1)
ROOT = Path(__file__).parents[3]

Fill = Callable[[Path, Known], Awaitable[tuple[Reconciliation, Known]]]


def at(lsn: int) -> Position:
    return Position(HISTORY, Lsn(lsn))


async def written(path: Path) -> RecoveryPoint:
    """Fill a catalog with one sealed point, one failed point, one gap and one missed commit; gives the sealed one."""
    catalog = await Catalog.open(path)
    one = CommitRecord("bank", Name("", 7), Lsn(90), Lsn(100), 5, (), Outcome.PROTECTED)
    point = await catalog.open_point(
        id=point_id(NOW, 1), cause=Cause.COMMIT, marks=[Mark(at(100))], opened_at=NOW, commit=one
    )
    snapshot = Snapshot("data", "memory", "/x", NOW, NOW)
    proven = dataclasses.replace(point, marks=(Mark(at(100), at(150)),), sealed_at=NOW, snapshots=(snapshot,))
    sealed = await catalog.seal(proven, [one], {"bank": at(100)})
    failed = await catalog.open_point(id=point_id(NOW, 2), cause=Cause.DEMAND, marks=[Mark(at(200))], opened_at=NOW)
    await catalog.fail(failed, "disk full")
    await catalog.record_gaps(Gap("bank", at(300), at(400), "the slot was lost", NOW))
    await catalog.record_gaps(
        missed=[Missed([one._replace(name=Name("", 8), start=Lsn(310), end=Lsn(320))], "lost with the slot", HISTORY)]
    )
    await catalog.close()
    return sealed


def filling(*points: RecoveryPoint, takes_over: bool = False) -> Fill:
    """Give a `fill` that adopts `points`, as a storage with their tags would have it."""

    async def fill(path: Path, old: Known) -> tuple[Reconciliation, Known]:
        assert not path.exists(), "nothing may lie there of another one"
        catalog = await Catalog.open(path, place=path.with_suffix(""))
        done = Reconciliation()
        for point in points:
            assert point.commit is not None
            await catalog.adopt(point, [point.commit])
            done.adopted.append(point.id)
        if takes_over:
            await take_over(catalog, old)
        try:
            return done, await known(catalog)
        finally:
            await catalog.close()

    return fill


def known_at(path: Path) -> Known:
    """Give what the catalog in a file knows."""

    async def look() -> Known:
        catalog = await Catalog.open(path)
        try:
            return await known(catalog)
        finally:
            await catalog.close()

    return asyncio.run(look())


def rebuilt(path: Path, *change: str) -> Rebuilt:
    async def run() -> Rebuilt:
        sealed = await written(path)
        if "verified" in change:
            catalog = await Catalog.open(path)
            await catalog.verified(sealed, Verification(NOW, True, "commit 7", (("x", True, "y"),)))
            await catalog.close()
        return await rebuild(path, NOW, filling(sealed))

    return asyncio.run(run())


def test_what_tags_hold_comes_back_and_the_rest_is_listed(tmp_path: Path) -> None:
    done = rebuilt(tmp_path / "catalog.sqlite")
    assert (done.sealed, done.unreadable, done.changed_points) == (1, "", {})
    assert [(point.number, point.state, point.failure) for point in done.lost_points] == [
        (2, State.FAILED, "disk full")
    ]
    assert [gap.reason for gap in done.lost_gaps] == ["the slot was lost"]
    assert done.lost_missed == 1


def test_the_old_file_lies_aside_whole(tmp_path: Path) -> None:
    done = rebuilt(tmp_path / "catalog.sqlite")
    assert done.set_aside == tmp_path / "catalog.sqlite.20260301T120000"
    assert len(known_at(done.set_aside).points) == 2


def test_a_verification_that_only_the_old_catalog_knew_is_named(tmp_path: Path) -> None:
    assert rebuilt(tmp_path / "catalog.sqlite", "verified").changed_points == {1: ("verification",)}


def test_a_catalog_that_cannot_be_read_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"rubbish" * 1000)
    done = asyncio.run(rebuild(path, NOW, filling()))
    assert "not a catalog" in done.unreadable
    assert done.set_aside is not None
    assert done.set_aside.read_bytes() == b"rubbish" * 1000


def test_no_catalog_at_all_is_made_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    done = asyncio.run(rebuild(path, NOW, filling()))
    assert (done.set_aside, done.sealed, done.unreadable) == (None, 0, "")


def test_nothing_is_overwritten_by_setting_aside(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    (tmp_path / "catalog.sqlite.20260301T120000").touch()
    with pytest.raises(CatalogError, match="is there already"):
        rebuilt(path)
    assert path.exists()


def failing(error: BaseException) -> Fill:
    """Give a `fill` that makes a catalog and fails before it is closed, as with a storage that cannot be read."""

    async def fill(path: Path, old: Known) -> tuple[Reconciliation, Known]:
        catalog = await Catalog.open(path, place=path.with_suffix(""))
        await catalog.open_point(id=point_id(NOW, 9), cause=Cause.DEMAND, marks=[Mark(at(900))], opened_at=NOW)
        assert path.with_name(path.name + "-wal").exists()
        if isinstance(error, asyncio.CancelledError):
            await asyncio.sleep(60)
        raise error

    return fill


def contents(folder: Path) -> dict[str, bytes]:
    """Give the files of a catalog's folder; the reserve belongs to the place, not to one catalog."""
    return {path.name: path.read_bytes() for path in folder.glob("catalog.*") if path.suffix != ".reserve"}


HELD = StorageError("another trigpoint makes points in /snapshots", hint="give each its own", retryable=False)


@pytest.mark.parametrize("error", [HELD, CatalogError("no room left"), OSError("I/O error"), KeyboardInterrupt()])
def test_where_the_new_one_cannot_be_filled_the_old_one_is_back(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "catalog.sqlite"
    asyncio.run(written(path))
    before = contents(tmp_path)
    with pytest.raises(type(error)) as raised:
        asyncio.run(rebuild(path, NOW, failing(error)))
    assert raised.value is error
    assert error.__notes__[-1] == "the old catalog is in its place"
    assert contents(tmp_path) == before
    assert [point.number for point in known_at(path).points.values()] == [1, 2]


def test_a_cancelled_rebuild_leaves_the_old_one_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    asyncio.run(written(path))
    before = contents(tmp_path)

    async def cancel() -> None:
        task = asyncio.create_task(rebuild(path, NOW, failing(asyncio.CancelledError())))
        async with asyncio.timeout(10):
            while not path.with_name(f"{path.name}.new-wal").exists():  # noqa: ASYNC110 - a file that a task makes
                await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert contents(tmp_path) == before


def test_what_belongs_to_an_old_catalog_that_cannot_be_read_stays_with_it(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    rubbish = {companion: companion.encode() + b"rubbish" * 1000 for companion in ("", "-wal", "-shm")}
    for companion, what in rubbish.items():
        path.with_name(path.name + companion).write_bytes(what)
    before = contents(tmp_path)
    unread = patch("trigger.catalog.rebuild._known_of_old", return_value=(Known({}, (), 0), "it is damaged"))
    with unread, pytest.raises(StorageError, match="another trigpoint"):
        asyncio.run(rebuild(path, NOW, failing(HELD)))
    assert contents(tmp_path) == before
    with unread:
        aside = asyncio.run(rebuild(path, NOW, filling())).set_aside
    assert aside is not None
    assert {companion: Path(f"{aside}{companion}").read_bytes() for companion in rubbish} == rubbish
    assert known_at(path).points == {}, "the log of the old one is not the new one's"


def test_where_there_was_no_catalog_a_rebuild_that_fails_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    with pytest.raises(StorageError, match="another trigpoint"):
        asyncio.run(rebuild(path, NOW, failing(HELD)))
    assert list(tmp_path.iterdir()) == []


def test_what_a_rebuild_that_fails_cannot_remove_the_next_one_does_and_the_first_error_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "catalog.sqlite"
    asyncio.run(written(path))
    before = contents(tmp_path)

    async def held(new: Path, old: Known) -> tuple[Reconciliation, Known]:
        monkeypatch.setattr(Path, "unlink", Mock(side_effect=OSError("EIO")))
        return await failing(HELD)(new, old)

    with pytest.raises(StorageError, match="another trigpoint"):
        asyncio.run(rebuild(path, NOW, held))
    monkeypatch.undo()
    left = contents(tmp_path)
    assert left.keys() > before.keys()
    assert {name: left[name] for name in before} == before
    aside = asyncio.run(rebuild(path, NOW, filling())).set_aside
    assert aside is not None
    assert contents(tmp_path).keys() == {path.name, aside.name}


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("stuck", [False, True])
def test_an_old_catalog_whose_place_the_new_one_cannot_take_is_put_back_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damaged: bool, stuck: bool
) -> None:
    path, aside = tmp_path / "catalog.sqlite", tmp_path / "catalog.sqlite.20260301T120000"
    if damaged:
        path.write_bytes(b"rubbish" * 1000)
        Path(f"{path}-wal").write_bytes(b"more of it" * 1000)
    else:
        asyncio.run(written(path))
    before = contents(tmp_path)

    def failed(place: str) -> None:
        if place == "catalog-set-aside":
            if stuck:
                monkeypatch.setattr(Path, "rename", Mock(side_effect=OSError("EROFS")))
            raise OSError("EIO")

    monkeypatch.setattr(failpoint, "hook", failed)
    unread = patch("trigger.catalog.rebuild._known_of_old", return_value=(Known({}, (), 0), "it is damaged"))
    with unread if damaged else contextlib.nullcontext(), pytest.raises(OSError, match="EIO"):
        asyncio.run(rebuild(path, NOW, filling()))
    if stuck:
        assert aside.read_bytes() == before[path.name]
        assert f"the old catalog lies at {aside}, and could not be put back: EROFS" in caplog.text
    else:
        assert contents(tmp_path) == before


def lacking_a_table(path: Path) -> None:
    """Take from a catalog the table that its gaps lie in."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE gaps")


def with_a_damaged_point(path: Path) -> None:
    """Change what a catalog says of its points, which bears a digest."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE points SET document = replace(document, 'disk full', 'disk fill')")


@pytest.mark.parametrize(
    ("damage", "words"), [(lacking_a_table, "no such table: gaps"), (with_a_damaged_point, "point 2 is damaged")]
)
def test_a_catalog_that_is_not_whole_any_more_is_set_aside_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "catalog.sqlite"
    sealed = asyncio.run(written(path))
    damage(path)
    done = asyncio.run(rebuild(path, NOW, filling(sealed)))
    assert words in done.unreadable
    assert done.set_aside is not None
    assert list(known_at(path).points) == [sealed.id]


@contextlib.contextmanager
def of_a_newer_version(path: Path) -> Iterator[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE schema_version SET version = 3")
    yield "run the newer Trigpoint that made it"


@contextlib.contextmanager
def with_a_tag_of_a_newer_version(path: Path) -> Iterator[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            """UPDATE points SET document = replace(document, '"trigpoint_tag":2', '"trigpoint_tag":3')"""
        )
    yield "run the newer Trigpoint that wrote it"


@contextlib.contextmanager
def held_by_another(path: Path) -> Iterator[str]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        yield "see which Trigpoint is writing to it"


@contextlib.contextmanager
def in_a_place_where_none_can_be(path: Path) -> Iterator[str]:
    path.unlink()
    path.mkdir()
    yield "its folder must exist and be writable"


@pytest.mark.parametrize(
    "made", [of_a_newer_version, with_a_tag_of_a_newer_version, held_by_another, in_a_place_where_none_can_be]
)
def test_a_catalog_that_may_be_whole_and_cannot_be_read_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path], AbstractContextManager[str]]
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_SECONDS", 0.1)
    path = tmp_path / "catalog.sqlite"
    sealed = asyncio.run(written(path))
    with made(path) as remedy, pytest.raises(CatalogError) as refused:
        asyncio.run(rebuild(path, NOW, filling(sealed)))
    assert remedy in refused.value.hint
    assert f"move {path} away" in refused.value.hint
    assert not list(tmp_path.glob("catalog.sqlite.[2n]*"))


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        *((name, True) for name in ("SQLITE_CORRUPT", "SQLITE_CORRUPT_INDEX", "SQLITE_NOTADB", "SQLITE_ERROR")),
        *((name, False) for name in ("SQLITE_FULL", "SQLITE_IOERR_READ", "SQLITE_BUSY", "SQLITE_READONLY")),
        *((name, False) for name in ("SQLITE_PERM", "SQLITE_CANTOPEN", "SQLITE_LOCKED", "SQLITE_NOMEM")),
    ],
)
def test_damage_is_what_the_file_itself_is_the_cause_of(name: str, damaged: bool) -> None:
    error = sqlite3.OperationalError("why")
    error.sqlite_errorname = name
    with pytest.raises(CatalogError) as raised, schema.translated("catalog.sqlite"):
        raise error
    assert isinstance(raised.value, DamagedError) is damaged


KILLED = """
import asyncio, sys
from pathlib import Path
from tests.trigger.catalog.test_rebuild import NOW, filling, rebuild, written

sealed = asyncio.run(written(Path(sys.argv[2])))
asyncio.run(rebuild(Path(sys.argv[1]), NOW, filling(sealed, takes_over=True)))
"""


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("place", ["catalog-adopted-written", "catalog-made-anew", "catalog-set-aside"])
def test_a_rebuild_that_is_killed_loses_nothing_and_the_next_one_removes_what_it_left(
    tmp_path: Path, place: str, damaged: bool
) -> None:
    path, later = tmp_path / "catalog.sqlite", NOW + timedelta(seconds=1)
    sealed = asyncio.run(written(path))
    if damaged:
        lacking_a_table(path)
    before = None if damaged else known_at(path)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, path, tmp_path / "other"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRIGPOINT_FAILPOINT": f"{place}:kill"},
        check=False,
    )
    assert killed.returncode == -9
    assert {name for name in contents(tmp_path) if name.startswith(f"{path.name}.new")}
    if before is not None:
        assert known_at(path) == before
    else:
        assert not path.exists() or place != "catalog-set-aside"
    done = asyncio.run(rebuild(path, later, filling(sealed, takes_over=True)))
    assert done.lost_gaps == ()
    if before is not None:
        assert (known_at(path).gaps, known_at(path).settled) == (before.gaps, before.settled)
    kept = {name for name in contents(tmp_path) if name != path.name}
    assert len(kept) == 1, "the old one alone"
    assert bool(done.unreadable) is (damaged and place != "catalog-set-aside")
