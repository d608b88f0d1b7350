"""What is left of a clone that is given up while it is made is known for that by whoever looks meanwhile."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from connectors.storage.copying import Copier
from connectors.storage.directory import DirectoryStorage
from trigger.errors import StorageError
from trigger.model import EPOCH, Volume
from trigger.point_names import point_id
from trigger.ports import Clone

POINT = point_id(EPOCH, 1)


def test_a_clone_that_is_given_up_is_never_seen_without_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    storage = DirectoryStorage(tmp_path / "storage", wanted_free_bytes=0)
    asyncio.run(storage.snapshot([Volume("data", str(tmp_path / "data"))], POINT, "tag"))
    remove, seen = shutil.rmtree, list[Clone]()

    def slowly(folder: Path) -> None:
        if "clones" in folder.parts:  # what says whose it is may go first
            (folder / "clone.json").unlink(missing_ok=True)
            seen.extend(asyncio.run(storage.clones()))
        remove(folder)

    given_up = patch.object(Copier, "copy", side_effect=StorageError("given up"))
    with given_up, patch("shutil.rmtree", slowly), pytest.raises(StorageError, match="given up"):
        asyncio.run(storage.clone(POINT, "copy", lambda *_: None, identity="ours"))
    assert seen, "it was removed at once"
    assert all(clone.dropped for clone in seen)
    assert asyncio.run(storage.clones()) == []
