"""What every storage must do: claims about the port, run against each driver and against broken ones.

`EVERY` holds for all storages, `FILES` for those that keep files; a claim is given a fresh rig, and raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.storage_rigs import FileRig, Rig, names
from trigger.errors import StorageError
from trigger.model import EPOCH, Severity, Volume
from trigger.point_names import point_id
from trigger.ports import Capability, Storage

EVERY: list[Callable[[Rig], Awaitable[None]]] = []
FILES: list[Callable[[FileRig], Awaitable[None]]] = []

TAG = '{"note": "before \\u00e9 \\"\\n", "é": 1}'
A, B, C = (point_id(EPOCH, 0xABCDEF + number) for number in (1, 2, 3))


def every(claim: Callable[[Rig], Awaitable[None]]) -> Callable[[Rig], Awaitable[None]]:
    EVERY.append(claim)
    return claim


def files(claim: Callable[[FileRig], Awaitable[None]]) -> Callable[[FileRig], Awaitable[None]]:
    FILES.append(claim)
    return claim


def silent(step: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


async def content(rig: Rig, storage: Storage, point: str, volume: Volume | None = None) -> dict[str, str]:
    """Give what a point holds of a volume, by way of a clone that is dropped again."""
    name = f"look-{random.randrange(1 << 30)}"
    clone = await storage.clone(point, name, silent)
    held = rig.holds(clone, volume or rig.volumes[0])
    await storage.drop_clone(name)
    return held


@every
async def a_snapshot_holds_what_was_written_before_it_and_nothing_after(rig: Rig) -> None:
    storage, volume = rig.driver(), rig.volumes[0]
    rig.write(volume, "row", "one")
    await storage.snapshot(rig.volumes, A, TAG)
    rig.write(volume, "row", "two")
    rig.write(volume, "new", "six")
    assert await content(rig, storage, A) == {"row": "one"}


@every
async def each_of_many_snapshots_keeps_its_own_state(rig: Rig) -> None:
    storage, volume = rig.driver(), rig.volumes[0]
    points = [point_id(EPOCH, number) for number in range(10, 18)]
    for number, point in enumerate(points):
        rig.write(volume, "row", f"{number:03}")
        rig.write(volume, f"folder/{number}", "kept")
        await storage.snapshot(rig.volumes, point, TAG)
    for number, point in enumerate(points):
        held = await content(rig, storage, point)
        assert held["row"] == f"{number:03}"
        assert len(held) == number + 2


@every
async def every_volume_has_a_snapshot_of_its_own(rig: Rig) -> None:
    storage = rig.driver()
    for volume in rig.volumes:
        rig.write(volume, "name", volume.name)
    made = await storage.snapshot(rig.volumes, A, TAG)
    assert [kept.volume for kept in made] == names(rig.volumes)
    assert len({kept.location for kept in made}) == len(rig.volumes)
    assert all(kept.driver in storage.name.split("+") and kept.began_at <= kept.ended_at for kept in made)
    for volume in rig.volumes:
        assert await content(rig, storage, A, volume) == {"name": volume.name}


@every
async def the_same_point_twice_is_the_same_snapshot(rig: Rig) -> None:
    storage, volume = rig.driver(), rig.volumes[0]
    rig.write(volume, "row", "one")
    first = await storage.snapshot(rig.volumes, A, TAG)
    rig.write(volume, "row", "two")
    assert await rig.driver().snapshot(rig.volumes, A, "another tag") == first
    assert await content(rig, storage, A) == {"row": "one"}
    (tagged,) = await storage.tagged()
    assert tagged.tag == TAG


@every
async def a_tag_comes_back_as_it_was_given_from_the_storage_alone(rig: Rig) -> None:
    made = await rig.driver().snapshot(rig.volumes, A, TAG)
    await rig.driver().snapshot(rig.volumes, B, "x" * 200_000)
    first, second = await rig.driver().tagged()
    assert (first.point, first.tag, first.complete) == (A, TAG, True)
    assert (second.point, second.tag, second.complete) == (B, "x" * 200_000, True)
    assert first.snapshots == made


@every
async def a_new_tag_replaces_the_old_and_nothing_else(rig: Rig) -> None:
    storage = rig.driver()
    made = await storage.snapshot(rig.volumes, A, TAG)
    await storage.retag(A, "sealed")
    (tagged,) = await rig.driver().tagged()
    assert (tagged.tag, tagged.snapshots, tagged.complete) == ("sealed", made, True)


@every
async def a_tag_without_a_snapshot_is_refused(rig: Rig) -> None:
    with pytest.raises(StorageError):
        await rig.driver().retag(A, "sealed")
    assert await rig.driver().tagged() == []


@every
async def what_a_crash_left_is_shown_as_unfinished_and_deleted(rig: Rig) -> None:
    storage = rig.driver()
    await storage.snapshot(rig.volumes, A, TAG)
    rig.leave_unfinished(B)
    whole, unfinished = await rig.driver().tagged()
    assert (whole.point, whole.complete) == (A, True)
    assert (unfinished.point, unfinished.complete) == (B, False)
    with pytest.raises(StorageError):
        await storage.clone(B, "copy", silent)
    await storage.delete(B)
    assert [tagged.point for tagged in await storage.tagged()] == [A]
    await storage.snapshot(rig.volumes, B, TAG)


@every
async def a_damaged_tag_is_none_and_harms_no_other_point(rig: Rig) -> None:
    storage = rig.driver()
    await storage.snapshot(rig.volumes, A, TAG)
    await storage.snapshot(rig.volumes, B, TAG)
    rig.damage_tag(A)
    damaged, whole = await rig.driver().tagged()
    assert (damaged.tag, damaged.complete) == (None, False)
    assert (whole.tag, whole.complete) == (TAG, True)


@every
async def a_damaged_tag_is_written_anew_where_the_snapshots_are_whole(rig: Rig) -> None:
    storage = rig.driver()
    rig.write(rig.volumes[0], "row", "one")
    made = await storage.snapshot(rig.volumes, A, TAG)
    rig.damage_tag(A)
    (damaged,) = await rig.driver().tagged()
    assert [kept.volume for kept in damaged.snapshots] == names(rig.volumes), "whole, and not shown"
    await rig.driver().retag(A, "anew")
    (mended,) = await rig.driver().tagged()
    assert (mended.tag, mended.complete) == ("anew", True)
    assert [(kept.volume, kept.driver, kept.location) for kept in mended.snapshots] == [
        (kept.volume, kept.driver, kept.location) for kept in made
    ]
    assert await content(rig, storage, A) == {"row": "one"}


@every
async def no_tag_is_written_for_what_a_crash_left(rig: Rig) -> None:
    rig.leave_unfinished(B)
    with pytest.raises(StorageError):
        await rig.driver().retag(B, "sealed")
    (unfinished,) = await rig.driver().tagged()
    assert (unfinished.tag, unfinished.complete) == (None, False)


@every
async def a_claim_is_held_by_one_until_it_lets_go(rig: Rig) -> None:
    first, second = rig.driver(), rig.driver()
    await first.snapshot(rig.volumes, A, TAG)
    await first.claim()
    await first.claim()
    with pytest.raises(StorageError) as refused:
        await second.claim()
    assert not refused.value.retryable
    assert [found.point for found in await second.tagged()] == [A]
    await first.close()
    with contextlib.suppress(StorageError):
        await second.claim()
        await second.close()
        return
    raise AssertionError("the one that let go still holds it")


@every
async def of_two_that_claim_a_storage_without_a_point_only_one_makes_points(rig: Rig) -> None:
    first, second = rig.driver(), rig.driver()
    await first.claim()

    async def claim_and_make() -> None:
        await second.claim()  # refused here, or by the snapshot
        await first.snapshot(rig.volumes, A, TAG)
        await second.snapshot(rig.volumes, B, TAG)

    with pytest.raises(StorageError) as refused:
        await claim_and_make()
    assert not refused.value.retryable
    await first.snapshot(rig.volumes, A, TAG)
    await first.snapshot(rig.volumes, C, TAG)
    assert [found.point for found in await second.tagged()] == [A, C]
    await second.close()
    await first.close()


@every
async def snapshots_side_by_side_do_not_contend_for_their_own_claim(rig: Rig) -> None:
    storage = rig.driver()
    await storage.claim()
    calls = (storage.snapshot(rig.volumes, point, TAG) for point in (A, B, C))
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert [error for error in done if isinstance(error, BaseException)] == []
    assert [(found.point, found.complete) for found in await storage.tagged()] == [(p, True) for p in (A, B, C)]
    await storage.close()


@every
async def a_deleted_point_is_gone_and_the_others_stay(rig: Rig) -> None:
    storage = rig.driver()
    rig.write(rig.volumes[0], "row", "one")
    for point in (A, B, C):
        await storage.snapshot(rig.volumes, point, TAG)
    await storage.delete(B)
    await storage.delete(B)
    assert [(found.point, found.complete) for found in await rig.driver().tagged()] == [(A, True), (C, True)]
    assert await content(rig, storage, A) == await content(rig, storage, C) == {"row": "one"}
    with pytest.raises(StorageError):
        await storage.clone(B, "copy", silent)


@every
async def a_clone_outlives_its_point(rig: Rig) -> None:
    storage = rig.driver()
    rig.write(rig.volumes[0], "row", "one")
    made = await storage.snapshot(rig.volumes, A, TAG)
    clone = await storage.clone(A, "copy-1", silent)
    await storage.delete(A)
    assert rig.holds(clone, rig.volumes[0]) == {"row": "one"}
    (listed,) = await rig.driver().clones()
    assert (listed.name, listed.point, listed.paths) == ("copy-1", A, clone.paths)
    assert [volume for volume, _ in clone.paths] == names(rig.volumes)
    places = [(dict(clone.paths)[kept.volume], storage.clone_place(kept)) for kept in made]
    assert all(said is None or path.is_relative_to(said.folder) for path, said in places)


@every
async def the_name_of_a_clone_is_taken_once(rig: Rig) -> None:
    storage = rig.driver()
    rig.write(rig.volumes[0], "row", "one")
    await storage.snapshot(rig.volumes, A, TAG)
    clone = await storage.clone(A, "copy", silent)
    rig.write(rig.volumes[0], "row", "two")
    await storage.snapshot(rig.volumes, B, TAG)
    with pytest.raises(StorageError):
        await storage.clone(B, "copy", silent)
    assert rig.holds(clone, rig.volumes[0]) == {"row": "one"}
    assert [found.name for found in await storage.clones()] == ["copy"]


@every
async def a_clone_bears_the_identity_that_it_was_made_with(rig: Rig) -> None:
    storage = rig.driver()
    await storage.snapshot(rig.volumes, A, TAG)
    made = await storage.clone(A, "copy", silent, identity="first")
    with pytest.raises(StorageError):
        await storage.clone(A, "copy", silent, identity="second")
    assert [made.identity, *(clone.identity for clone in await rig.driver().clones())] == ["first", "first"]


@every
async def a_clone_that_fails_leaves_nothing_behind(rig: Rig) -> None:
    with pytest.raises(StorageError):
        await rig.driver().clone(A, "copy", silent)
    assert await rig.driver().clones() == []


@every
async def a_dropped_clone_is_gone_and_its_point_stays(rig: Rig) -> None:
    storage = rig.driver()
    await storage.snapshot(rig.volumes, A, TAG)
    await storage.clone(A, "copy", silent)
    await storage.drop_clone("copy")
    await storage.drop_clone("copy")
    assert await rig.driver().clones() == []
    assert [found.complete for found in await storage.tagged()] == [True]


@every
async def no_snapshot_is_made_beyond_the_budget(rig: Rig) -> None:
    storage = rig.driver(budget=2)
    await storage.snapshot(rig.volumes, A, TAG)
    await storage.snapshot(rig.volumes, B, TAG)
    with pytest.raises(StorageError):
        await storage.snapshot(rig.volumes, C, TAG)
    assert [found.point for found in await storage.tagged()] == [A, B]
    space = await storage.space()
    assert (space.snapshots, space.budget) == (2, 2)
    await storage.snapshot(rig.volumes, B, TAG)


@every
async def no_snapshot_is_made_while_too_little_is_free(rig: Rig) -> None:
    storage = rig.driver(wanted_free_bytes=1 << 60)
    with pytest.raises(StorageError):
        await storage.snapshot(rig.volumes, A, TAG)
    assert await storage.tagged() == []
    space = await storage.space()
    assert space.wanted_free_bytes == 1 << 60
    assert 0 < space.free_bytes <= space.total_bytes


@every
async def good_volumes_are_not_refused(rig: Rig) -> None:
    findings = await rig.driver().check(rig.volumes)
    assert {volume.name for volume in rig.volumes} <= {finding.subject for finding in findings}
    assert [finding for finding in findings if finding.severity is Severity.REFUSED] == []


@every
async def a_cancelled_snapshot_can_be_deleted_and_taken_again(rig: Rig) -> None:
    storage = rig.driver()
    rig.write(rig.volumes[0], "row", "one")
    for delay in (0, 0, 0.0005, 0.001, 0.002, 0.005):
        task = asyncio.create_task(storage.snapshot(rig.volumes, A, TAG))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await storage.delete(A)
        assert await storage.tagged() == []
    await storage.snapshot(rig.volumes, A, TAG)
    assert await content(rig, storage, A) == {"row": "one"}


@every
async def snapshots_taken_side_by_side_are_all_whole(rig: Rig) -> None:
    storage = rig.driver()
    rig.write(rig.volumes[0], "row", "one")
    points = sorted(point_id(EPOCH, number) for number in range(20, 25))
    await asyncio.gather(*(storage.snapshot(rig.volumes, point, TAG) for point in points))
    assert [(found.point, found.complete) for found in await storage.tagged()] == [(p, True) for p in points]
    for point in points:
        assert await content(rig, storage, point) == {"row": "one"}


@files
async def what_is_written_to_a_clone_reaches_neither_snapshot_nor_volume(rig: FileRig) -> None:
    storage, volume = rig.driver(), rig.volumes[0]
    rig.write(volume, "row", "one")
    for point in (A, B):
        await storage.snapshot(rig.volumes, point, TAG)
    clone = await storage.clone(B, "copy", silent)
    with (dict(clone.paths)["data"] / "row").open("r+") as file:
        file.write("BAD")
    assert (Path(volume.path) / "row").read_text() == "one"
    for point in (A, B):
        assert await content(rig, storage, point) == {"row": "one"}


@files
async def what_is_not_ours_is_neither_listed_nor_deleted(rig: FileRig) -> None:
    storage = rig.driver()
    await storage.snapshot(rig.volumes, A, TAG)
    foreign = [rig.folder / name for name in (f"trg-{B}x", "trg-", f"trg-{B.upper()}", "nightly", f"not-trg-{B}")]
    for folder in foreign:
        (folder / "data").mkdir(parents=True)
    assert [found.point for found in await storage.tagged()] == [A]
    await storage.delete(A)
    await storage.delete(B)
    for point in (f"{B}x", "", B.upper(), "../data", f"../not-trg-{B}", "."):
        with pytest.raises(StorageError):
            await storage.delete(point)
    assert all((folder / "data").is_dir() for folder in foreign)
    assert (await storage.space()).snapshots == 0


@files
async def a_change_that_hides_its_time_is_in_the_next_snapshot(rig: FileRig) -> None:
    storage, volume = rig.driver(), rig.volumes[0]
    path = Path(volume.path) / "row"
    rig.write(volume, "row", "one")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    await storage.snapshot(rig.volumes, A, TAG)
    rig.write(volume, "row", "two")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    await storage.snapshot(rig.volumes, B, TAG)
    assert await content(rig, storage, B) == {"row": "two"}
    assert await content(rig, storage, A) == {"row": "one"}


@files
async def modes_times_links_holes_and_empty_folders_are_kept(rig: FileRig) -> None:
    storage, root = rig.driver(), Path(rig.volumes[0].path)
    (root / "empty").mkdir(mode=0o700)
    (root / "link").symlink_to("../elsewhere/nothing")
    with (root / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"middle")
    (root / "sparse").chmod(0o640)
    os.utime(root / "sparse", ns=(1_700_000_000_000_000_001, 1_700_000_000_000_000_003))
    root.chmod(0o700)
    await storage.snapshot(rig.volumes, A, TAG)
    clone = await storage.clone(A, "copy", silent)
    copy = dict(clone.paths)["data"]
    made = (copy / "sparse").stat()
    assert (copy / "empty").is_dir()
    assert (copy / "link").readlink() == Path("../elsewhere/nothing")
    assert (made.st_mode & 0o777, made.st_size, made.st_mtime_ns) == (0o640, 64 << 20, 1_700_000_000_000_000_003)
    assert made.st_blocks * 512 < 4 << 20
    assert (copy / "sparse").read_bytes() == (root / "sparse").read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o700


@files
async def an_atomic_snapshot_holds_no_write_without_those_flushed_before_it(rig: FileRig) -> None:
    """One writer counts up in eight files in turn, each write flushed before the next: at any instant they fall by one.

    Without the flushes only a storage below the filesystem would keep this: as after a power cut, of two writes that
    were not flushed the later one alone may be there. It was seen on btrfs (Linux 6.18).
    """
    storage, root = rig.driver(), Path(rig.volumes[0].path)
    if Capability.ATOMIC not in storage.capabilities:
        return
    points = [point_id(EPOCH, number) for number in range(30, 40)]
    counters = [root / f"counter-{number}" for number in range(8)]
    for path in counters:
        path.write_text(f"{0:08}")
        path.with_suffix(".filler").write_bytes(os.urandom(4 << 20))
    with _counting(counters):
        for point in points:
            await storage.snapshot(rig.volumes[:1], point, TAG)
    for point in points:
        clone = await storage.clone(point, f"clone-{point}", silent)
        values = [int((clone.paths[0][1] / path.name).read_text()) for path in counters]
        assert values == sorted(values, reverse=True)
        assert values[0] - values[-1] <= 1


@contextlib.contextmanager
def _counting(counters: list[Path]) -> Iterator[None]:
    stop = threading.Event()

    def count() -> None:
        for number in itertools.count(1):
            for path in counters:
                with path.open("r+") as file:
                    file.write(f"{number:08}")
                    file.flush()
                    os.fsync(file.fileno())
            if stop.is_set():
                return

    writer = threading.Thread(target=count)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()


@files
async def a_volume_that_is_not_there_is_refused_by_check_and_by_snapshot(rig: FileRig) -> None:
    storage = rig.driver()
    gone = Volume("gone", str(rig.root / "gone"))
    findings = await storage.check([*rig.volumes, gone])
    assert [finding.subject for finding in findings if finding.severity is Severity.REFUSED] == ["gone"]
    with pytest.raises(StorageError):
        await storage.snapshot([*rig.volumes, gone], A, TAG)
    assert [found for found in await storage.tagged() if found.complete] == []


@files
async def the_loop_goes_on_while_a_snapshot_is_made(rig: FileRig) -> None:
    storage, root = rig.driver(), Path(rig.volumes[0].path)
    for number in range(40):
        (root / f"file-{number}").write_bytes(os.urandom(1 << 18))
    gaps: list[float] = []
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(storage.snapshot(rig.volumes, A, TAG))
    while not task.done():
        before = loop.time()
        await asyncio.sleep(0.001)
        gaps.append(loop.time() - before)
    await task
    assert max(gaps) < 0.5
