"""A catalog made anew from tags, and what is said of what only the old one knew."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trigger.catalog import Catalog
from trigger.errors import CatalogError
from trigger.model import Cause, CommitRecord, Gap, Outcome, RecoveryPoint, Snapshot, State, Verification, point_id
from trigger.position import History, Lsn, Position
from trigger.rebuild import Known, Rebuilt, known, rebuild
from trigger.reconcile import Reconciliation

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HISTORY = History("7391", 1)

Fill = Callable[[], Awaitable[tuple[Reconciliation, Known]]]


def at(lsn: int) -> Position:
    return Position(HISTORY, Lsn(lsn))


async def written(path: Path) -> RecoveryPoint:
    """Fill a catalog with one sealed point, one failed point, one gap and one missed commit; gives the sealed one."""
    catalog = await Catalog.open(path)
    one = CommitRecord("bank", 7, Lsn(90), Lsn(100), 5, (), Outcome.PROTECTED)
    point = await catalog.open_point(id=point_id(NOW, 1), cause=Cause.COMMIT, floor=at(100), opened_at=NOW, commit=one)
    snapshot = Snapshot("data", "memory", "/x", NOW, NOW)
    proven = dataclasses.replace(point, ceiling=at(150), sealed_at=NOW, snapshots=(snapshot,))
    sealed = await catalog.seal(proven, [one], {"bank": at(100)})
    failed = await catalog.open_point(id=point_id(NOW, 2), cause=Cause.DEMAND, floor=at(200), opened_at=NOW)
    await catalog.fail(failed, "disk full")
    await catalog.record_gap(Gap("bank", at(300), at(400), "the slot was lost", NOW))
    await catalog.miss([one._replace(xid=8, start=Lsn(310), end=Lsn(320))], "lost with the slot", HISTORY)
    await catalog.close()
    return sealed


def filling(path: Path, *points: RecoveryPoint) -> Fill:
    """Give a `fill` that adopts `points`, as a storage with their tags would have it."""

    async def fill() -> tuple[Reconciliation, Known]:
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
