"""A catalog made anew from tags, and what is said of what only the old one knew."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import pytest

from connectors.databases.postgres.lsn import Lsn
from trigger.catalog.catalog import Catalog
from trigger.catalog.point_index import Missed
from trigger.catalog.rebuild import Known, Rebuilt, known, rebuild
from trigger.catalog.reconcile import Reconciliation
from trigger.errors import CatalogError, StorageError
from trigger.model import (
    Cause,
    CommitRecord,
    Gap,
    Mark,
    Outcome,
    RecoveryPoint,
    Snapshot,
    State,
    Verification,
    point_id,
)
from trigger.position import History, Name, Position

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HISTORY = History("postgres", "7391", 1)

Fill = Callable[[Known], Awaitable[tuple[Reconciliation, Known]]]


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


def filling(path: Path, *points: RecoveryPoint) -> Fill:
    """Give a `fill` that adopts `points`, as a storage with their tags would have it."""

    async def fill(old: Known) -> tuple[Reconciliation, Known]:
        assert not path.exists(), "the old file must be out of the way"
        catalog = await Catalog.open(path)
        done = Reconciliation()
        for point in points:
            assert point.commit is not None
            await catalog.adopt(point, [point.commit])
            done.adopted.append(point.id)
        try:
            return done, await known(catalog)
        finally:
            await catalog.close()

    return fill


def rebuilt(path: Path, *change: str) -> Rebuilt:
    async def run() -> Rebuilt:
        sealed = await written(path)
        if "verified" in change:
            catalog = await Catalog.open(path)
            await catalog.verified(sealed, Verification(NOW, True, "commit 7", (("x", True, "y"),)))
            await catalog.close()
        return await rebuild(path, NOW, filling(path, sealed))

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

    async def look() -> Known:
        catalog = await Catalog.open(tmp_path / "catalog.sqlite.20260301T120000")
        try:
            return await known(catalog)
        finally:
            await catalog.close()

    assert len(asyncio.run(look()).points) == 2


def test_a_verification_that_only_the_old_catalog_knew_is_named(tmp_path: Path) -> None:
    assert rebuilt(tmp_path / "catalog.sqlite", "verified").changed_points == {1: ("verification",)}


def test_a_catalog_that_cannot_be_read_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"rubbish" * 1000)
    done = asyncio.run(rebuild(path, NOW, filling(path)))
    assert "not a catalog" in done.unreadable
    assert done.set_aside is not None
    assert done.set_aside.read_bytes() == b"rubbish" * 1000


def test_no_catalog_at_all_is_made_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    done = asyncio.run(rebuild(path, NOW, filling(path)))
    assert (done.set_aside, done.sealed, done.unreadable) == (None, 0, "")


def test_nothing_is_overwritten_by_setting_aside(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    (tmp_path / "catalog.sqlite.20260301T120000").touch()
    with pytest.raises(CatalogError, match="is there already"):
        rebuilt(path)
    assert path.exists()


def failing(path: Path, error: BaseException) -> Fill:
    """Give a `fill` that makes a catalog and fails before it is closed, as with a storage that cannot be read."""

    async def fill(old: Known) -> tuple[Reconciliation, Known]:
        catalog = await Catalog.open(path)
        await catalog.open_point(id=point_id(NOW, 9), cause=Cause.DEMAND, marks=[Mark(at(900))], opened_at=NOW)
        assert path.with_name(path.name + "-wal").exists()
        if isinstance(error, asyncio.CancelledError):
            await asyncio.sleep(60)
        raise error

    return fill


def contents(folder: Path) -> dict[str, bytes]:
    """Give the files of a folder; the reserve belongs to the place, not to one catalog."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".reserve"}


HELD = StorageError("another trigpoint makes points in /snapshots", hint="give each its own", retryable=False)


@pytest.mark.parametrize("error", [HELD, CatalogError("no room left"), OSError("I/O error"), KeyboardInterrupt()])
def test_where_the_new_one_cannot_be_filled_the_old_one_is_back(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "catalog.sqlite"
    asyncio.run(written(path))
    before = contents(tmp_path)
    with pytest.raises(type(error)) as raised:
        asyncio.run(rebuild(path, NOW, failing(path, error)))
    assert raised.value is error
    assert contents(tmp_path) == before

    async def look() -> Known:
        catalog = await Catalog.open(path)
        try:
            return await known(catalog)
        finally:
            await catalog.close()

    assert [point.number for point in asyncio.run(look()).points.values()] == [1, 2]


def test_a_cancelled_rebuild_leaves_the_old_one_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    asyncio.run(written(path))
    before = contents(tmp_path)

    async def cancel() -> None:
        task = asyncio.create_task(rebuild(path, NOW, failing(path, asyncio.CancelledError())))
        async with asyncio.timeout(10):
            while not path.with_name(f"{path.name}-wal").exists() or len(contents(tmp_path)) < 4:  # noqa: ASYNC110 - files that a task makes
                await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert contents(tmp_path) == before


def test_what_belongs_to_an_old_catalog_that_cannot_be_read_comes_back_with_it(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    for companion in ("", "-wal", "-shm"):
        path.with_name(path.name + companion).write_bytes(companion.encode() + b"rubbish" * 1000)
    before = contents(tmp_path)
    unread = patch("trigger.catalog.rebuild._known_of_old", return_value=(Known({}, (), 0), "it is damaged"))
    with unread, pytest.raises(StorageError, match="another trigpoint"):
        asyncio.run(rebuild(path, NOW, failing(path, HELD)))
    assert contents(tmp_path) == before


def test_where_there_was_no_catalog_a_rebuild_that_fails_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    with pytest.raises(StorageError, match="another trigpoint"):
        asyncio.run(rebuild(path, NOW, failing(path, HELD)))
    assert list(tmp_path.iterdir()) == []


def test_an_old_catalog_that_cannot_be_put_back_is_named_and_the_first_error_is_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "catalog.sqlite"
    asyncio.run(written(path))
    before = path.read_bytes()
    with (
        pytest.raises(StorageError, match="another trigpoint"),
        patch.object(Path, "unlink", side_effect=OSError("EIO")),
    ):
        asyncio.run(rebuild(path, NOW, failing(path, HELD)))
    aside = tmp_path / "catalog.sqlite.20260301T120000"
    assert aside.read_bytes() == before
    assert f"the old catalog lies at {aside}, and could not be put back: EIO" in caplog.text
