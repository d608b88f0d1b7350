"""Names from outside never become paths: whatever they are, nothing is made, changed or deleted elsewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from connectors.storage.directory import DirectoryStorage
from connectors.storage.shelf import Shelf, require_names
from trigger.errors import StorageError
from trigger.model import EPOCH, Volume
from trigger.point_names import is_point_id, point_id

GOOD = point_id(EPOCH, 0xABCDEF)
HOSTILE = (
    st.text(max_size=300)
    | st.sampled_from(["..", ".", "", "/", "-rf", "--", "~", "a/b", "../x", "a\0b", "a\nb", "a@b", "é", "A", "#", "+"])
    | st.text(alphabet="abz019-_./\0\n ", max_size=80)
    | st.builds(str.__add__, st.just(GOOD), st.text(min_size=1, max_size=3))
    | st.text(alphabet="0123456789abcdefghjkmnpqrstvwxyzilou", min_size=25, max_size=27)
)


@given(HOSTILE)
@example(GOOD.upper())
@example(GOOD + "\n")
@settings(max_examples=1000)
def test_only_a_point_id_leads_to_a_folder_and_that_lies_directly_in_ours(text: str) -> None:
    shelf = Shelf(Path("/storage"), budget=1, wanted_free_bytes=0)
    if is_point_id(text):
        assert shelf.point_folder(text) == Path(f"/storage/trg-{text}")
    else:
        with pytest.raises(StorageError):
            shelf.point_folder(text)


@given(HOSTILE)
@settings(max_examples=1000)
def test_only_a_plain_name_leads_to_a_clone_and_that_lies_directly_among_clones(text: str) -> None:
    shelf = Shelf(Path("/storage"), budget=1, wanted_free_bytes=0)
    try:
        folder = shelf.clone_folder(text)
    except StorageError:
        return
    assert folder.parent == Path("/storage/clones")
    assert folder.name == text
    assert text.isascii()
    assert not text.startswith(("-", "."))
    assert len(text) < 64


@given(HOSTILE)
@settings(max_examples=1000)
def test_only_a_plain_name_is_taken_for_a_volume(text: str) -> None:
    try:
        require_names([Volume(text, "/data")])
    except StorageError:
        return
    assert Path(text).name == text
    assert text.isascii()
    assert text not in ("point.json", "clone.json")
    assert not text.startswith(("-", "."))


@given(HOSTILE, HOSTILE)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_calls_with_any_names_touch_nothing_outside_the_storage(tmp_path: Path, name: str, other: str) -> None:
    source, bystander = tmp_path / "data", tmp_path / "bystander"
    for folder in (source, bystander):
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("content")
    storage = DirectoryStorage(tmp_path / "storage", wanted_free_bytes=0)
    volume = Volume("data", str(source))

    async def call_all() -> None:
        await storage.snapshot([volume], GOOD, "tag")
        for call in (
            storage.snapshot([volume], name, "tag"),
            storage.snapshot([Volume(other, str(source))], point_id(EPOCH, 7), "tag"),
            storage.retag(name, "tag"),
            storage.clone(GOOD, name, lambda *_: None),
            storage.clone(name, other, lambda *_: None),
            storage.drop_clone(name),
            storage.delete(name),
            storage.delete(point_id(EPOCH, 7)),
        ):
            try:
                await call
            except StorageError:
                continue
        assert [found.point for found in await storage.tagged() if found.point == GOOD] == [GOOD]

    asyncio.run(call_all())
    assert {path.name for path in tmp_path.iterdir()} == {"data", "bystander", "storage"}
    assert [path.name for path in bystander.iterdir()] == [path.name for path in source.iterdir()] == ["file"]
