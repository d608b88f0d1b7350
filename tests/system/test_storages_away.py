"""One of several storages is away, new, unused or lost: nothing is given up, or removed, on its account."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fixtures.members import QUICK, commit, held, members
from tests.fixtures.service import Deployment

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.volume]

COPIED = ('driver = "btrfs"', 'driver = "directory"')
SILENT = "storage plain shows no snapshot at all"


def refuse_to_start(here: Deployment) -> None:
    """Start the service, which must end by itself, and not well."""
    here.start(wait=False)
    assert here.process is not None
    assert here.process.wait(60) != 0


def kept(folder: Path) -> list[str]:
    """Give the points of which a storage keeps a part."""
    return sorted(one.name for one in folder.iterdir() if one.name.startswith("trg-"))


@pytest.mark.parametrize("catalog", ["is there", "was lost"])
def test_a_catalog_is_not_made_anew_while_a_storage_is_away_and_nothing_is_removed(catalog: str) -> None:
    with members(QUICK) as (here, elsewhere):
        here.start()
        made = commit(here, 3)
        here.stop()
        if catalog == "was lost":
            for file in here.state.glob("catalog.sqlite*"):
                file.unlink()
        there = kept(here.root / "snapshots")
        (elsewhere / "snapshots").rename(elsewhere / "unmounted")
        refused = here.trigpoint("catalog", "rebuild", check=False)
        assert refused.returncode == 6
        assert SILENT in refused.stderr
        refuse_to_start(here)
        assert SILENT in here.log.read_text()
        assert kept(here.root / "snapshots") == there
        (elsewhere / "unmounted").rename(elsewhere / "snapshots")
        here.trigpoint("catalog", "rebuild")
        assert held(here, made[1]) == set(made[:2])


def test_a_storage_that_is_not_mounted_is_known_also_where_its_volumes_had_another_before() -> None:
    with members(QUICK) as (here, elsewhere):
        several = here.config.read_text()
        here.config.write_text(several.replace('storage = "plain"', 'storage = "fast"').replace(*COPIED))
        here.start()
        first = commit(here, 2)
        here.stop()
        here.config.write_text(several.replace(*COPIED))
        here.start()
        second = commit(here, 2)
        here.stop()
        (elsewhere / "snapshots").rename(elsewhere / "unmounted")
        assert SILENT in here.trigpoint("check", check=False).stdout
        refuse_to_start(here)
        assert not (elsewhere / "snapshots").exists(), "nothing is made beneath the mount point"
        (elsewhere / "unmounted").rename(elsewhere / "snapshots")
        here.start()
        here.settle()
        assert held(here, first[0]) == {first[0]}
        assert held(here, second[0]) == {*first, second[0]}


def test_a_storage_that_keeps_no_volume_any_more_hinders_no_point_by_its_room_its_budget_or_its_absence() -> None:
    with members(QUICK) as (here, elsewhere):
        here.config.write_text(here.config.read_text().replace(*COPIED))
        here.start()
        first = commit(here, 2)
        here.stop()
        moved = here.config.read_text().replace('storage = "plain"', 'storage = "fast"')
        here.config.write_text(moved.replace("keep_free = 0\n", 'keep_free = "900TiB"\nbudget = 2\n'))
        here.start()
        second = [*commit(here), *commit(here)]
        assert held(here, second[1]) == {*first, *second}
        assert here.ask("verify")["passed"]
        (elsewhere / "snapshots").rename(elsewhere / "unmounted")
        third = [*commit(here), *commit(here)]
        (elsewhere / "unmounted").rename(elsewhere / "snapshots")
        assert held(here, third[1]) == {*first, *second, *third}


def test_what_is_left_of_points_whose_storage_is_lost_goes_by_the_operators_word_and_all_begins_anew() -> None:
    with members(QUICK) as (here, elsewhere):
        here.config.write_text(here.config.read_text().replace("keep_free", "budget = 8\nkeep_free"))
        here.start()
        commit(here, 6)
        here.stop()
        shutil.rmtree(elsewhere / "snapshots")
        refused = here.trigpoint("reconcile", check=False)
        assert refused.returncode == 6
        assert SILENT in refused.stderr
        here.trigpoint("reconcile", "--accept-loss")
        assert kept(here.root / "snapshots") == []
        here.start()
        made = commit(here, 3)
        assert made[1] in held(here, made[1])


def test_a_storage_that_was_taken_out_of_the_configuration_is_asked_for_by_name() -> None:
    with members(QUICK) as (here, _):
        here.config.write_text(here.config.read_text().replace(*COPIED))
        here.start()
        made = commit(here, 2)
        here.stop()
        several = here.config.read_text()
        renamed = several.replace('"plain"', '"other"')
        here.config.write_text(renamed)
        said = here.trigpoint("check", check=False).stdout
        assert "the configuration has no storage plain, and points have a part there" in said
        refuse_to_start(here)
        here.config.write_text(several)
        here.start()
        assert held(here, made[0]) == {made[0]}


def test_two_storages_that_are_one_folder_by_a_link_are_refused() -> None:
    with members(QUICK) as (here, elsewhere):
        (here.root / "snapshots").mkdir()
        (elsewhere / "snapshots").symlink_to(here.root / "snapshots")
        said = here.trigpoint("check", check=False)
        assert said.returncode == 3
        assert "is the storage folder fast too" in said.stdout


def test_what_is_sealed_by_its_tag_and_not_whole_is_left_alone_where_the_catalog_is_made_anew() -> None:
    with members(QUICK) as (here, elsewhere):
        here.start()
        made = commit(here, 3)
        here.stop()
        newest = kept(elsewhere / "snapshots")[-1]
        (elsewhere / "snapshots" / newest).rename(elsewhere / "aside")
        said = here.trigpoint("catalog", "rebuild")
        assert "not whole, left alone" in said.stdout + said.stderr
        assert newest in kept(here.root / "snapshots")
        (elsewhere / "aside").rename(elsewhere / "snapshots" / newest)
        assert here.ask("reconcile")["adopted"]
        assert held(here, made[2]) == set(made)


def test_of_a_new_storage_and_one_that_is_away_the_latter_is_named() -> None:
    with members(QUICK) as (here, elsewhere):
        here.start()
        commit(here, 2)
        here.stop()
        config = here.config.read_text()
        new = f'[[storages]]\nname = "new"\ndriver = "directory"\nfolder = "{elsewhere / "new"}"\nkeep_free = 0\n'
        config = config.replace('[[storages]]\nname = "plain"', f'{new}[[storages]]\nname = "plain"')
        head, papers, rest = config.partition('name = "papers"')
        here.config.write_text(head + papers + rest.replace('storage = "plain"', 'storage = "new"', 1))
        assert here.trigpoint("check", check=False).returncode == 0
        (elsewhere / "snapshots").rename(elsewhere / "unmounted")
        said = here.trigpoint("check", check=False)
        assert said.returncode == 3
        assert SILENT in said.stdout
