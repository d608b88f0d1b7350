"""One point over several storages: the volumes of one cluster lie on filesystems of their own, on real PostgreSQL."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fixtures.members import QUICK, commit, held, members, transactions
from trigger.point_names import tag_name

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.volume]


def test_a_commit_over_volumes_in_several_storages_comes_back_in_all_of_them_and_is_verified() -> None:
    with members(QUICK) as (here, elsewhere):
        assert [one["severity"] for one in here.ask("check") if one["severity"] == "refused"] == []
        here.start()
        (elsewhere / "papers" / "a").write_text("before")
        made = commit(here, 4)
        (elsewhere / "papers" / "a").write_text("after")
        commit(here)
        report = here.ask("restore", "--to-xid", str(made[2]), "--name", "one")
        assert transactions(report["conninfo"]) == set(made[:3])
        clone = elsewhere / "snapshots" / "clones" / "one"
        assert sorted(one.name for one in clone.iterdir()) == ["clone.json", "papers", "space"]
        here.trigpoint("clones", "drop", "--yes", "one")
        assert not clone.exists()
        result = here.ask("verify", "4")
        assert result["passed"], result["checks"]
        assert here.stop() == 0


def test_a_catalog_that_was_lost_is_made_anew_from_the_tags_of_several_storages() -> None:
    with members(QUICK) as (here, _):
        here.start()
        made = commit(here, 3)
        here.stop()
        for file in here.state.glob("catalog.sqlite*"):
            file.unlink()
        here.trigpoint("catalog", "rebuild")
        assert held(here, made[1]) == set(made[:2])


def test_a_point_of_which_a_member_is_gone_serves_no_restore_and_is_told() -> None:
    with members(QUICK) as (here, elsewhere):
        here.start()
        made = commit(here, 3)
        points = here.ask("list")
        newest = points[0]
        shutil.move(elsewhere / "snapshots" / tag_name(newest["id"]), elsewhere / "aside")
        (told,) = [one["message"] for one in here.ask("check") if one["subject"] == "storage"]
        assert f"of point {newest['number']} a snapshot is gone" in told
        assert held(here, made[2]) == set(made)
        shutil.move(elsewhere / "aside", elsewhere / "snapshots" / tag_name(newest["id"]))
        assert [one for one in here.ask("check") if one["subject"] == "storage"] == []


def test_a_storage_that_is_away_fails_points_and_restores_with_its_name_and_all_goes_on_when_it_is_back() -> None:
    with members(QUICK) as (here, elsewhere):
        here.start()
        made = commit(here, 2)
        (elsewhere / "snapshots").rename(elsewhere / "unmounted")
        lost = here.cluster.sql("INSERT INTO truth (what) VALUES ('away') RETURNING xid::text")[0][0]
        here.wait_for(lambda: any("storage plain" in one for one in here.status()["troubles"]), "the trouble")
        refused = here.trigpoint("restore", "--to-xid", str(made[0]), check=False)
        assert refused.returncode != 0
        assert "storage plain shows no snapshot at all" in refused.stderr
        (elsewhere / "unmounted").rename(elsewhere / "snapshots")
        here.settle()
        assert held(here, int(lost)) == {*made, int(lost)}


def test_the_cluster_with_all_of_its_volumes_goes_back_in_place_and_forth_again() -> None:
    with members(QUICK) as (here, _):
        here.start()
        made = commit(here, 4)
        here.stop()
        here.cluster.stop()
        here.trigpoint("restore", "--in-place", "--to-xid", str(made[1]), "--yes")
        here.cluster.start()
        assert transactions(f"{here.cluster.conninfo}") == set(made[:2])
        here.cluster.stop()
        here.trigpoint("restore", "--undo", "last", "--yes")
        here.cluster.start()
        assert transactions(f"{here.cluster.conninfo}") == set(made)


def test_points_from_before_a_second_storage_serve_beside_those_that_have_members_in_both() -> None:
    with members(QUICK) as (here, _):
        several = here.config.read_text()
        here.config.write_text(several.replace('storage = "fast"', 'storage = "plain"'))
        here.start()
        first = commit(here, 2)
        here.stop()
        here.config.write_text(several)
        here.start()
        second = commit(here, 2)
        assert held(here, first[1]) == set(first)
        assert held(here, second[0]) == {*first, second[0]}
        assert here.stop() == 0


def test_a_rehearsal_over_several_storages_proves_a_point_and_leaves_nothing(tmp_path: Path) -> None:
    with members(QUICK) as (here, elsewhere):
        report = here.ask("check", "--rehearse")
        assert report["rehearsal"]["verification"]["passed"], report
        assert not (elsewhere / "snapshots").exists()
        assert not list(here.root.glob("snapshots/*"))


def test_a_restore_and_a_removal_that_are_killed_between_two_storages_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with members(QUICK) as (here, elsewhere):
        here.start()
        made = commit(here, 3)
        here.stop()
        here.forks = False
        with monkeypatch.context() as armed:
            armed.setenv("TRIGPOINT_FAILPOINT", "after-member-cloned:kill")
            assert here.trigpoint("restore", "--to-xid", str(made[1]), "--name", "one", check=False).returncode < 0
        assert [(one["name"], one["state"]) for one in here.ask("clones")] == [("one", "unfinished")]
        here.trigpoint("clones", "drop", "--yes", "one")
        here.trigpoint("restore", "--to-xid", str(made[1]), "--name", "two")
        with monkeypatch.context() as armed:
            armed.setenv("TRIGPOINT_FAILPOINT", "after-member-removed:kill")
            assert here.trigpoint("clones", "drop", "--yes", "two", check=False).returncode < 0
        assert [(one["name"], one["state"]) for one in here.ask("clones")] == [("two", "being dropped")]
        here.trigpoint("clones", "drop", "--yes", "two")
        assert here.ask("clones") == []
        for folder in (here.root / "snapshots", elsewhere / "snapshots"):
            assert list((folder / "clones").iterdir()) == []


def test_what_can_be_renamed_into_place_is_told_by_where_the_parts_of_the_point_lie_and_not_the_next_ones() -> None:
    with members(QUICK) as (here, _):
        config = here.config.read_text().replace('driver = "btrfs"', 'driver = "directory"')
        here.config.write_text(config)
        here.start()
        first = [*commit(here), *commit(here)]
        here.stop()
        here.config.write_text(config.replace('storage = "plain"', 'storage = "fast"'))
        here.start()
        second = [*commit(here), *commit(here)]
        here.stop()
        here.cluster.stop()
        refused = here.trigpoint("restore", "--in-place", "--to-xid", str(second[1]), "--dry-run", check=False)
        assert refused.returncode == 9
        assert "lies on another filesystem" in refused.stdout + refused.stderr
        at_once = here.trigpoint("restore", "--in-place", "--to-xid", str(second[1]), "--yes", check=False)
        assert "lies on another filesystem" in at_once.stderr
        assert "clone" not in at_once.stderr.splitlines(), "it is told before anything is copied"
        here.trigpoint("restore", "--in-place", "--to-xid", str(first[1]), "--yes")
        here.cluster.start()
        assert transactions(here.cluster.conninfo) == set(first)
