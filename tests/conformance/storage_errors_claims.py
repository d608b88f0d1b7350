"""What every storage that keeps files must do where its disk does not give what stands on it."""

from __future__ import annotations

import contextlib

from tests.conformance.storage_claims import TAG, A, B
from tests.conformance.storage_rigs import FileRig, names
from trigger.errors import StorageError


async def what_cannot_be_read_is_not_taken_for_gone(rig: FileRig) -> None:
    storage = rig.driver()
    for point in (A, B):
        await storage.snapshot(rig.volumes, point, TAG)
    with rig.unreadable(A), contextlib.suppress(StorageError):
        shown = {found.point: found.snapshots for found in await rig.driver().tagged()}
        assert [kept.volume for kept in shown[A]] == names(rig.volumes), "as if a crash had left it half made"
    assert [(found.point, found.tag, found.complete) for found in await storage.tagged()] == [
        (A, TAG, True),
        (B, TAG, True),
    ]
