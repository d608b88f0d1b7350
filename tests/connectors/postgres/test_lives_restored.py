"""Which life a timeline is of that several lives of a log can have begun: after a restore of what was left before."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from connectors.databases.postgres import lsn
from connectors.databases.postgres.lives import Lives
from connectors.databases.postgres.log.folders import LogFolders
from tests.connectors.postgres.test_lives_servers import (
    SEGMENT_BYTES,
    Known,
    confirmed,
    insert,
    known_of,
    present,
    put_back,
    received,
    saved,
    without_old_log,
)
from tests.fixtures.postgres import Cluster, running_cluster
from tests.fixtures.volumes import plain_folder
from trigger.ports import Seen
from trigger.position import History, Position

pytestmark = pytest.mark.server


@pytest.fixture
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        yield made


@pytest.fixture
def cluster(folder: Path) -> Iterator[Cluster]:
    with running_cluster(18, folder / "data", fsync="off") as made:
        made.sql("CREATE TABLE t (v int)")
        yield made


def known_in(history: History, cluster: Cluster) -> Known:
    """Commit something; gives what is known then, by the history that the server was found in."""
    known = known_of(cluster)
    return Known(replace(known.commit, history=history), Position(history, known.through.at))


@pytest.mark.parametrize("how", ["recognised", "journal"])
def test_a_restore_of_a_life_that_was_left_is_not_taken_for_the_future_of_the_one_that_was_there(
    how: str, cluster: Cluster, folder: Path
) -> None:
    """What it brings back holds the last segments only, and goes on behind all that is known of that one."""
    folders = LogFolders(folder / "journal", SEGMENT_BYTES)

    def knowing(*known: Known) -> Lives:
        lives = Lives(folders=folders)
        if how == "recognised":
            lives.recognise([one.seen for one in known])
        return lives

    def received_in(history: History) -> None:
        if how == "journal":
            received(cluster, folders, history)

    copy = saved(cluster)
    without_old_log(cluster)
    first = known_of(cluster)
    assert first.commit.history.incarnation == 0
    received_in(first.commit.history)
    left = saved(cluster, "left")
    put_back(cluster, copy)
    insert(cluster)
    lives = knowing(first)
    second = known_in(confirmed(lives, cluster), cluster)
    assert (second.commit.history.branch, second.commit.history.incarnation) == (1, 1)
    received_in(second.commit.history)
    replaced = saved(cluster, "replaced")

    put_back(cluster, left)
    cluster.switch_timeline()
    insert(cluster)
    lives = knowing(first, second)
    third = known_in(confirmed(lives, cluster), cluster)
    assert (third.commit.history.branch, third.commit.history.incarnation) == (2, 2)
    assert confirmed(Lives(folders=folders), cluster) == third.commit.history, "so does who starts before it has log"
    received_in(third.commit.history)
    assert confirmed(knowing(first, second, third), cluster) == third.commit.history, "and whoever has"

    put_back(cluster, replaced)  # the restore is undone
    insert(cluster)
    undone = knowing(first, second, third)
    again = confirmed(undone, cluster)
    assert (again.branch, again.incarnation) == (1, 3), "what was restored does not stand on it"
    seen = "may stand on .*/1[+]1, and not on .*/1[+]2, before " if how == "recognised" else "the log ends at .* before"
    assert re.search(seen, present(undone, cluster).reason), "so is said what the log of the one before contradicts"
    assert confirmed(Lives(folders=folders), cluster) == again


def test_a_timeline_that_has_not_come_to_where_a_known_one_left_it_is_of_another_life(
    cluster: Cluster, folder: Path
) -> None:
    folders = LogFolders(folder / "journal", SEGMENT_BYTES)
    copy = saved(cluster)
    insert(cluster, 1_000)
    cluster.switch_timeline()
    lives = Lives(folders=folders)
    known = known_in(confirmed(lives, cluster), cluster)
    received(cluster, folders)
    shutil.copyfile(cluster.data / "pg_wal" / "00000002.history", folders.all()[0].path / "00000002.history")
    for file in folders.all()[0].path.glob("00000001" + "?" * 16 + "*"):
        file.unlink()
    put_back(cluster, copy)
    insert(cluster)
    again = Lives(folders=folders)
    again.recognise([known.seen])
    for knowing in (lives, again):
        found = confirmed(knowing, cluster)
        assert (found.branch, found.incarnation) == (1, 1)


def test_a_timeline_of_a_later_life_goes_on_in_it_where_the_log_says_so_or_no_other_life_can_be_meant(
    cluster: Cluster,
) -> None:
    async def removed(*_: Any) -> None:
        """Give what `read_log` gives of log that the server has removed."""

    copy = saved(cluster)
    first = known_of(cluster)
    put_back(cluster, copy)
    insert(cluster, 1_000)
    lives = Lives()
    lives.recognise([first.seen])
    second = known_in(confirmed(lives, cluster), cluster)
    assert second.through.history.incarnation == 1
    cluster.switch_timeline()
    insert(cluster)
    compared, alone = Lives(), Lives(read=removed)
    for lives in (compared, alone):
        lives.recognise([first.seen, second.seen])
    alone.recognise([Seen(Position(second.through.history, cluster.flushed()), None)])
    for lives in (compared, alone):
        assert confirmed(lives, cluster) == lsn.history(second.through.history.system, 2, 1)
