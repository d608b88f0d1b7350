"""What every storage that keeps files must do while its filesystem is not mounted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial

import pytest

from tests.conformance.storage_claims import TAG, A, B, C, silent
from tests.conformance.storage_errors_claims import sealed
from tests.conformance.storage_rigs import FileRig
from trigger.errors import StorageError
from trigger.model import RecoveryPoint
from trigger.ports import Storage


async def what_is_away_is_not_taken_for_empty(rig: FileRig) -> None:
    storage = rig.driver()
    await storage.claim()
    points = [sealed(point, await storage.snapshot(rig.volumes, point, TAG)) for point in (A, B)]
    await storage.clone(A, "copy", silent)
    for beneath in ((), ("",), ("lock",)):
        with rig.unmounted(*beneath):
            for call in (*_of_a_point(storage), *_of_all_there_is(storage, rig, points)):
                with pytest.raises(StorageError) as raised:
                    await call()
                assert raised.value.hint.startswith("mount "), raised.value
            for call in _of_a_point(rig.driver()):  # which never saw it
                with pytest.raises(StorageError, match="no (whole )?snapshot" if "lock" in beneath else "; mount "):
                    await call()
    assert [(found.point, found.tag) for found in await storage.tagged()] == [(A, TAG), (B, TAG)]
    assert [found.name for found in await storage.clones()] == ["copy"]
    await storage.delete(A)
    await storage.drop_clone("copy")
    assert [found.point for found in await rig.driver().tagged()] == [B]
    await storage.close()


def _of_a_point(storage: Storage) -> Iterator[Callable[[], Awaitable[object]]]:
    yield partial(storage.clone, A, "another", silent)
    yield partial(storage.retag, A, "sealed")


def _of_all_there_is(
    storage: Storage, rig: FileRig, points: Sequence[RecoveryPoint]
) -> Iterator[Callable[[], Awaitable[object]]]:
    yield partial(storage.delete, A)
    yield partial(storage.lack, A)
    yield partial(storage.absent, points)
    yield partial(storage.drop_clone, "copy")
    yield partial(storage.snapshot, rig.volumes, C, TAG)
    yield from (storage.tagged, storage.clones, storage.space)
