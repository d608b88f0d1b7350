"""Branches that were left: what is found on them, and its end, which an archive has in the next branch's file alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.fixtures.bank import Bank, quiet, run
from trigger.errors import JournalError, RestoreError
from trigger.model import Commit, Extent
from trigger.position import History, Lineage, Position
from trigger.restore.branch import followed
from trigger.restore.clones import drop
from trigger.restore.locate import Where, locate
from trigger.restore.restore import prepare, restore
from trigger.restore.target import Named

FIRST, SECOND, THIRD = (History("memory", "7001", branch) for branch in (1, 2, 3))


def archived_only(it: Bank, *branches: int) -> None:
    """Let go of the last files of branches that were left: an archive has whole ones only."""
    for branch in branches:
        pieces = it.world.journal[branch]
        start = it.world.cluster.manner.file_start(pieces[-1][1])
        it.world.journal[branch] = [(low, min(high, start)) for low, high in pieces if low < start]


async def left(it: Bank) -> tuple[list[Commit], Commit]:
    """Take points for commits in the last file of a branch that is left then, and for one on the next."""
    it.commit(data_bytes=5000)
    await it.point()
    kept = []
    for _ in range(3):
        kept += [it.commit(), it.commit()]
        it.world.cluster.write_ahead(64)  # else the snapshot ends with the commit, and nothing is replayed
        await it.point()
    it.world.cluster.promote(it.world.cluster.flushed)
    newer = it.commit()
    await it.point()
    archived_only(it, 1)
    return kept, newer


def test_a_commit_in_the_last_file_of_a_branch_that_was_left_comes_back_out_of_the_next_ones(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        kept, newer = await left(it)
        for commit in (*kept, newer):
            (found,) = await locate(it.catalog, it.site.journal, name=commit.name)
            assert (found.history, found.aside) == (commit.history, "")
            report = await restore(await it.resolve(Named(name=commit.name)), it.site, progress=quiet, name="one")
            assert (it.held("one"), report.base) == (it.at_or_before(commit), found.base)
            await drop("one", it.site)

    run(tmp_path, story)


@pytest.mark.parametrize("way", ["before", "place", "between", "point"])
def test_so_does_every_other_state_there(tmp_path: Path, way: str) -> None:
    async def story(it: Bank) -> None:
        (_, _, wanted, after, *_), _ = await left(it)
        named = {
            "before": Named(before=after.name),
            "place": Named(place=str(wanted.start)),
            "between": Named(place=str(after.start - 4)),
            "point": Named(point=3),
        }[way]

        if named.place is not None:
            (found,) = await locate(it.catalog, it.site.journal, place=named.place)
            assert found.base == (await prepare(await it.resolve(named), it.site)).base.number
        await restore(await it.resolve(named), it.site, progress=quiet, name="one")
        assert it.held("one") == it.at_or_before(after if way == "point" else wanted)

    run(tmp_path, story)


def test_what_was_left_behind_the_switch_and_not_archived_never_comes_and_is_said_so(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit(data_bytes=5000)
        await it.point()
        fork = it.world.cluster.flushed
        lost = it.commit("lost")
        it.commit()
        await it.point()
        it.world.cluster.promote(fork)
        it.commit()
        await it.point()
        archived_only(it, 1)
        (found,) = await locate(it.catalog, it.site.journal, name=lost.name)
        assert (found.base, found.aside) == (None, "--timeline 1")
        assert "has gone on in another history" in found.reason

    run(tmp_path, story)


def held(history: History, start: int, end: int) -> Extent:
    return Extent(history, start, end)


@pytest.mark.parametrize(
    ("extents", "branch"),
    [
        ([held(FIRST, 0, 200), held(SECOND, 100, 300)], FIRST),
        ([held(FIRST, 0, 100), held(SECOND, 100, 300), held(THIRD, 100, 400)], SECOND),
        ([held(FIRST, 0, 100), held(SECOND, 200, 300), held(THIRD, 100, 400)], THIRD),
        ([held(FIRST, 0, 100)], THIRD),
        ([], THIRD),
    ],
    ids=["its own", "the next", "the one after", "the one to come", "nothing is held"],
)
def test_a_replay_follows_the_first_branch_whose_files_have_the_place(extents: list[Extent], branch: History) -> None:
    lineage = Lineage(THIRD, ((1, 160), (2, 180)))
    assert followed(Position(FIRST, 150), lineage, extents) == branch


async def left_with_more(it: Bank) -> tuple[Commit, Commit, Commit]:
    """Leave a branch behind a commit that no stream showed; gives what was before it, that, and one on the next."""
    it.commit()
    await it.point()
    kept, fork = it.commit(), it.world.cluster.flushed
    unseen = [it.world.cluster.commit("") for _ in range(9)][-1]
    it.commit()
    await it.point()
    it.world.cluster.promote(fork)
    newer = [it.commit() for _ in range(3)][1]
    await it.point()
    return kept, unseen, newer


def test_a_commit_that_only_the_log_of_a_left_branch_has_is_found_with_the_option_that_restores_it(
    tmp_path: Path,
) -> None:
    async def story(it: Bank) -> None:
        _, unseen, _ = await left_with_more(it)
        (found,) = await locate(it.catalog, it.site.journal, name=unseen.name)
        assert (found.where, found.history, found.aside) == (Where.LOG, FIRST, "--timeline 1")
        with pytest.raises(RestoreError, match=r"committed in 7001/1, which is not in the past of") as refused:
            await it.resolve(Named(name=unseen.name))
        assert "--timeline 1" in refused.value.hint
        target = await it.resolve(Named(name=unseen.name, history="1"))
        report = await restore(target, it.site, progress=quiet, name="one")
        assert (it.held("one"), report.base) == (it.at_or_before(unseen), found.base)

    run(tmp_path, story)


def test_a_commit_that_the_log_alone_has_on_the_present_branch_is_found_beside_one_of_its_name_that_was_left(
    tmp_path: Path,
) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        fork = it.world.cluster.flushed
        left_behind = it.commit()
        await it.point()
        it.world.cluster.promote(fork)
        it.world.cluster.next_xid = left_behind.name.number or 0
        unseen = it.world.cluster.commit("")
        assert unseen.name == left_behind.name
        it.commit()
        await it.point()
        found = await locate(it.catalog, it.site.journal, name=unseen.name)
        assert [(one.history, one.aside) for one in found] == [(FIRST, "--timeline 1"), (SECOND, "")]
        assert (await it.resolve(Named(name=unseen.name))).history == SECOND

    run(tmp_path, story)


def test_nothing_is_promised_of_a_branch_whose_past_nobody_keeps(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        _, unseen, newer = await left_with_more(it)
        with patch.object(it.site.journal, "lineage", partial(lacking, it.site.journal.lineage, SECOND)):
            (found,) = await locate(it.catalog, it.site.journal, name=newer.name)
            assert (found.where, found.base) == (Where.INTERVAL, None)
            assert found.reason.endswith("it cannot be restored: no history file of 7001/2")
            with pytest.raises(JournalError, match="no history file"):
                await it.resolve(Named(name=newer.name))
            (found,) = await locate(it.catalog, it.site.journal, name=unseen.name)
            assert (found.base, found.aside) == (1, "--timeline 1")
            target = await it.resolve(Named(name=unseen.name, history="1"))
            assert (await prepare(target, it.site)).base.number == found.base

    run(tmp_path, story)


async def lacking(lineage: Callable[[History], Awaitable[Lineage]], lost: History, history: History) -> Lineage:
    if history == lost:
        raise JournalError(f"no history file of {history}")
    return await lineage(history)
