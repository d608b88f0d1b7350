"""Where the owner of a clone's data has put a link, nothing behind it is read, changed, made or given away by root."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from connectors.databases.postgres import lsn
from connectors.databases.postgres.clone import archiving, isolation
from connectors.databases.postgres.clone.isolation import Isolated
from connectors.databases.postgres.clone.placement import Placement, Spot
from connectors.databases.postgres.clone.release import release, require_startable
from connectors.databases.postgres.clone.state import State
from tests.fixtures.volumes import plain_folder
from trigger import failpoint
from trigger.errors import RestoreError
from trigger.model import Bracket, Volume
from trigger.ports import Clone
from trigger.position import Position

pytestmark = [pytest.mark.root]

release_module = importlib.import_module("connectors.databases.postgres.clone.release")

NOBODY = 65534
SEGMENT = f"{1:08X}{0:08X}{5:08X}"
WRITTEN = f"{2:08X}{0:08X}{6:08X}"
HISTORY = lsn.history("111", 1)
BRACKET = Bracket(Position(HISTORY, 1), Position(HISTORY, 2), {"label": "START WAL LOCATION: 0/1 (file x)"})
PLACEMENT = Placement(Spot("main", "data"), None, ())
WITH_LOG = Placement(Spot("main", "data"), Spot("main", "log"), ())


class Site:
    """A volume of production, a clone of it, and a folder of root's beside them."""

    def __init__(self, folder: Path) -> None:
        self.roots, self.volume, self.copy = folder / "roots", folder / "volume", folder / "clones" / "one"
        self.data = self.copy / "data"
        for made in (self.roots, self.volume / "data" / "pg_wal" / "archive_status"):
            made.mkdir(parents=True)
        for name in ("pg_tblspc", "base", "pg_replslot", "pg_stat_tmp", "pg_wal/archive_status"):
            (self.data / name).mkdir(parents=True)
        (self.data / "PG_VERSION").write_text("16\n")
        for name in (SEGMENT, "backup", "00000002.history", "postgresql.conf"):
            (self.roots / name).write_text("root's")
        for one in (self.copy, *self.copy.rglob("*")):
            os.chown(one, NOBODY, NOBODY)
        self.clone = Clone("one", "point", (("main", self.copy),), datetime.now(UTC))
        self.volumes, self.placement = [Volume("main", str(self.volume))], PLACEMENT

    def isolate(self, bracket: Bracket | None = BRACKET) -> Isolated:
        return isolation.isolate(self.clone, PLACEMENT, self.volumes, bracket)

    def release(self) -> None:
        release(self.data, self.clone, self.placement, self.volumes, WRITTEN)

    def bring_up_with_links(self) -> None:
        """Give the clone a log and a tablespace beside its data, and what a server that came up leaves."""
        (self.volume / "log").mkdir()
        (self.copy / "log" / "archive_status").mkdir(parents=True)
        (self.copy / "space").mkdir()
        self.lead("pg_wal", self.volume / "log")
        self.lead("pg_tblspc/16384", self.volume / "space")
        self.isolate(None)
        for name in (SEGMENT, WRITTEN, "00000002.history"):
            (self.copy / "log" / name).touch()
        (self.data / isolation.OWN_FOLDER / State.FILE).write_text("{}")

    def lead(self, name: str, target: Path | str) -> None:
        """Put a link in the place of a folder of the clone's data."""
        if (self.data / name).exists():
            for entry in sorted((self.data / name).rglob("*"), reverse=True):
                entry.unlink() if entry.is_symlink() else entry.rmdir()
            (self.data / name).rmdir()
        (self.data / name).symlink_to(target)

    def untouched(self) -> bool:
        names = {entry.name for entry in self.roots.rglob("*")}
        owners = {entry.lstat().st_uid for entry in (self.roots, *self.roots.rglob("*"))}
        return names == {SEGMENT, "backup", "00000002.history", "postgresql.conf"} and owners == {0}


@pytest.fixture
def site() -> Iterator[Site]:
    with plain_folder() as folder:
        yield Site(folder)


def out_of(site: Site) -> list[Path | str]:
    """Give ways by which a link leads out of the clone or the volume, though it begins in it."""
    (site.copy / "way").symlink_to(site.roots.parent)
    return [site.roots, site.copy / ".." / ".." / "roots", site.copy / "way" / "roots"]


def test_no_status_of_the_archiver_is_emptied_behind_a_link(site: Site) -> None:
    site.lead("pg_wal/archive_status", site.roots)
    site.isolate()
    assert site.untouched()
    assert not (site.data / "pg_wal" / "archive_status").is_symlink()


@pytest.mark.parametrize("name", ["pg_wal", "pg_tblspc", "base", "pg_tblspc/16384"])
@pytest.mark.parametrize("way", range(3), ids=["straight", "by dots", "by another link"])
def test_a_clone_whose_folder_leads_out_of_it_is_neither_isolated_nor_released(site: Site, name: str, way: int) -> None:
    target = out_of(site)[way]
    site.lead(name, target)
    for act in (site.isolate, site.release):
        with pytest.raises(RestoreError, match="leads to"):
            act()
        assert site.untouched()
        assert (site.data / name).readlink() == Path(target)


def test_a_data_directory_that_is_a_link_is_not_isolated_nor_released(site: Site) -> None:
    theirs = site.volume / "data"
    (theirs / "PG_VERSION").write_text("16\n")
    (theirs / "postmaster.opts").write_text("production's")
    os.chown(theirs, NOBODY, NOBODY)
    site.data.rename(site.copy / "moved")
    site.data.symlink_to(theirs)
    for act in (site.isolate, site.release):
        with pytest.raises(RestoreError, match="a link inside the clone"):
            act()
    assert (theirs / "postmaster.opts").exists()


def test_none_of_our_files_is_written_or_removed_where_a_link_leads(site: Site) -> None:
    isolated = site.isolate()
    isolated.folder.rmdir()
    isolated.folder.symlink_to(site.roots)
    acts = (
        lambda: isolation.write_configuration(isolated, {}),
        lambda: isolation.listen(isolated, None),
        lambda: isolation.point_at_log(isolated, site.volume),
    )
    for act in acts:
        with pytest.raises(NotADirectoryError):
            act()
    with pytest.raises(RestoreError, match="leads to"):
        site.release()
    assert site.untouched()


def test_the_archiver_is_told_nothing_behind_a_link(site: Site) -> None:
    site.isolate()
    for name in (WRITTEN, "00000002.history"):
        (site.data / "pg_wal" / name).touch()
    site.lead("pg_wal/archive_status", site.roots)
    with pytest.raises(RestoreError, match="archive_status"):
        site.release()
    assert site.untouched()


def test_what_leads_into_the_clone_or_its_volume_leads_back_into_production(site: Site) -> None:
    site.bring_up_with_links()
    assert (site.data / "pg_wal").readlink() == site.copy / "log"
    for _ in range(2):
        site.release()
        assert (site.data / "pg_wal").readlink() == site.volume / "log"
        assert (site.data / "pg_tblspc" / "16384").readlink() == site.volume / "space"
    assert (site.copy / "log" / "archive_status" / f"{SEGMENT}.done").exists()


@pytest.mark.parametrize("links", [1, 2, None], ids=["after a link", "after all links", "while the archiver is told"])
def test_a_clone_that_is_released_in_part_is_not_started_and_can_be_released_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, links: int | None
) -> None:
    site.bring_up_with_links()
    require_startable(site.data, site.clone)
    left = itertools.count(1)

    def end(name: str = "after-link") -> None:
        if name == "after-link" and (links is None or next(left) == links):
            raise SystemExit

    with monkeypatch.context() as cut_off:
        if links is None:
            cut_off.setattr(archiving, "tell", lambda *_: end())
        else:
            cut_off.setattr(failpoint, "hook", end)
        with pytest.raises(SystemExit):
            site.release()
    assert (site.data / "pg_tblspc" / "16384").readlink() == site.volume / "space" or links == 1
    with pytest.raises(RestoreError, match="clone one cannot be started: it was made ready") as refused:
        require_startable(site.data, site.clone)
    assert "trigpoint restore --in-place --from-clone one" in refused.value.hint
    assert "trigpoint clones drop one" in refused.value.hint
    site.release()
    assert (site.data / "pg_wal").readlink() == site.volume / "log"
    assert (site.data / "pg_tblspc" / "16384").readlink() == site.volume / "space"
    assert not (site.data / isolation.OWN_FOLDER).exists()


def test_a_clone_that_is_not_released_at_all_can_still_be_started(site: Site) -> None:
    """As where production's pg_wal was moved, and nobody knows yet where to."""
    site.bring_up_with_links()
    site.placement = WITH_LOG
    before = {link: link.readlink() for link in site.data.rglob("*") if link.is_symlink()}
    (site.volume / "log").rename(site.volume / "moved")
    (site.volume / "log").symlink_to(site.volume / "moved")
    with pytest.raises(RestoreError, match="what production has not archived yet cannot be told"):
        site.release()
    assert {link: link.readlink() for link in before} == before
    require_startable(site.data, site.clone)


@pytest.mark.parametrize("name", ["pg_wal", "pg_tblspc", "base", "pg_tblspc/16385"])
@pytest.mark.parametrize("way", range(4), ids=["straight", "by dots", "by another link", "into production"])
def test_a_clone_whose_folder_leads_out_of_it_is_not_started(site: Site, name: str, way: int) -> None:
    site.bring_up_with_links()
    target = [*out_of(site), site.volume / "space"][way]
    if (site.data / name).is_symlink():
        (site.data / name).unlink()
    site.lead(name, target)
    with pytest.raises(RestoreError, match=f"cannot be started: its {name} leads to {target}"):
        require_startable(site.data, site.clone)
    assert site.untouched()


@pytest.mark.parametrize("module", [isolation, release_module])
def test_a_link_put_on_the_way_to_the_data_while_root_works_there_leads_it_nowhere(
    site: Site, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    (site.roots / "pg_replslot" / "theirs").mkdir(parents=True)
    (site.roots / "postmaster.opts").touch()
    before = {path: path.lstat() for path in (site.roots, *site.roots.rglob("*"))}
    if module is release_module:
        site.isolate()
    step = "_own_folder" if module is isolation else "_leading_back"
    right = getattr(module, step)

    def swapped(*arguments: object) -> object:
        done = right(*arguments)
        site.data.rename(site.copy / "moved")  # as its owner may at any moment
        site.data.symlink_to(site.roots)
        return done

    monkeypatch.setattr(module, step, swapped)
    with contextlib.suppress(RestoreError):
        site.isolate() if module is isolation else site.release()
    after = {path: path.lstat() for path in (site.roots, *site.roots.rglob("*"))}
    assert {path: (one.st_uid, one.st_mode) for path, one in after.items()} == {
        path: (one.st_uid, one.st_mode) for path, one in before.items()
    }
