"""What is kept of the cluster in the state folder, so that restores need no running cluster."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from connectors.databases.postgres import places
from connectors.memory import MemoryStorage, World
from tests.fixtures.room import room_for
from tests.fixtures.service import deployment
from tests.fixtures.volumes import plain_folder
from trigger.catalog.catalog import Catalog
from trigger.errors import CatalogError, ConfigError, DatabaseError, PreflightError
from trigger.model import EPOCH, GONE, Cause, Finding, Layout, Mark, Severity, Volume
from trigger.point_names import point_id
from trigger.position import History, Position
from trigger.service import service
from trigger.service.connect import keep_layout, known_layout, refuse_lost

DATA = Path("/srv/data")
SEEN = places.layout(150018, DATA, DATA / "pg_wal", {16400: Path("/fast")}, (), (105, 110), 16 << 20)


class Cluster:
    """A database that says where it lies, or does not answer."""

    def __init__(self, layout: Layout | None) -> None:
        self._layout = layout

    async def layout(self) -> Layout:
        if self._layout is None:
            raise DatabaseError("no answer")
        return self._layout

    def recall(self, document: dict[str, Any]) -> Layout:
        return places.recall(document)


def test_what_is_back_in_the_storage_after_it_was_gone_is_no_lost_catalog(tmp_path: Path) -> None:
    async def asked() -> CatalogError:
        catalog, storage = await Catalog.open(tmp_path / "catalog.sqlite"), MemoryStorage(World())
        here = Position(History("memory", "7001", 1), 148)
        volumes = (Volume("data", "/data"),)
        point = await catalog.open_point(
            id=point_id(EPOCH, 1), cause=Cause.START, marks=[Mark(here, here)], opened_at=EPOCH
        )
        snapshots = await storage.snapshot(volumes, point.id, "tag")
        point = await catalog.seal(replace(point, snapshots=snapshots, sealed_at=EPOCH), [], {})
        await catalog.fail(point, GONE)
        with pytest.raises(CatalogError) as refused:
            await refuse_lost(catalog, storage)
        await catalog.close()
        return refused.value

    refused = asyncio.run(asked())
    assert "was lost" not in refused.message
    assert "trigpoint reconcile" in refused.hint


def known(layout: Layout | None, folder: Path) -> Layout:
    """Give what is known of where a cluster lies, and keep it where it is the cluster's own word."""
    kept = [folder / "layout.json"]
    found, answered = asyncio.run(known_layout(cast("Any", Cluster(layout)), kept))
    assert answered is (layout is not None)
    if answered:
        keep_layout(found, kept)
    return found


def test_the_layout_is_kept_for_our_eyes_only_and_read_back_where_the_cluster_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text("{}")
    (tmp_path / "layout.json").chmod(0o644)
    assert known(SEEN, tmp_path) == SEEN
    assert (tmp_path / "layout.json").stat().st_mode & 0o777 == 0o600
    assert known(None, tmp_path) == SEEN
    assert [path.name for path in tmp_path.iterdir()] == ["layout.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\x00", b"null", b"[]", b"{}", b"1", b'{"places": 1}', b"[" * 100_000]
)
def test_a_layout_that_was_kept_and_cannot_be_read_is_said_with_what_to_do_and_told_anew_by_the_cluster(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "layout.json").write_bytes(content)
    with pytest.raises(ConfigError, match="layout") as refused:
        known(None, tmp_path)
    assert refused.value.hint == "start the cluster, which tells it anew"
    assert known(SEEN, tmp_path) == known(None, tmp_path) == SEEN


@pytest.mark.root
def test_a_layout_that_only_another_user_may_read_is_no_matter_of_the_cluster() -> None:
    with plain_folder() as folder:
        (folder / "layout.json").write_text("{}")
        (folder / "layout.json").chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match=r"layout\.json, which says .*: Permission denied;") as refused:
                known(None, folder)
        finally:
            os.seteuid(0)
    assert refused.value.hint == "run it as the user that may, or as root"


def test_the_layout_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    fsync, rename = os.fsync, os.rename

    def flushing(descriptor: int) -> None:
        told.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def renaming(name: Path, target: str, **folders: int) -> None:
        told.append(f"rename to {target}")
        rename(name, target, **folders)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "rename", renaming)
    known(SEEN, tmp_path)
    draft = f".layout.json.{os.getpid()}"
    assert told == [f"flush {draft}", "rename to layout.json", f"flush {tmp_path.name}"]


@pytest.mark.parametrize("name", ["layout.json", "layout.new", ".layout.json.{}"])
def test_no_link_is_followed_when_the_layout_is_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / name.format(os.getpid())).symlink_to("victim")
    assert known(SEEN, tmp_path) == SEEN
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.root
@pytest.mark.server
def test_a_state_folder_of_another_is_refused_before_anything_is_written_there() -> None:
    with deployment(15, "directory") as deployed:
        deployed.state.mkdir()
        os.chown(deployed.state, *deployed.cluster.owner)
        for command in ("point", "run", "verify"):
            done = deployed.trigpoint(command, check=False)
            assert done.returncode == 2
            assert f"state_folder: {deployed.state} belongs to user {deployed.cluster.owner[0]}" in done.stderr
            assert "hint:" in done.stderr
        assert list(deployed.state.iterdir()) == []
        done = deployed.trigpoint("check", check=False)
        assert done.returncode == 3
        assert f"refused  state folder: {deployed.state} belongs to user" in done.stdout


def test_a_layout_that_is_known_already_asks_for_no_room(tmp_path: Path) -> None:
    keep_layout(SEEN, [tmp_path / "layout.json"])
    with room_for(2):
        keep_layout(SEEN, [tmp_path / "layout.json"])


def test_what_to_do_about_each_refusal_is_told_once_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refusing(_: object) -> list[Finding]:
        return [
            Finding(what, Severity.REFUSED, "it is so", remedy)
            for what, remedy in (("one", "mend it"), ("two", "turn it on (and reload)"), ("three", "mend it"))
        ]

    monkeypatch.setattr(service, "check", refusing)
    with pytest.raises(PreflightError) as refused:
        asyncio.run(service.preflight(cast("Any", None), force=False))
    assert refused.value.hint == "mend it; turn it on (and reload)"
