"""What is put into the folder that a clone replays from, while the receiver goes on writing the journal."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.staging import Needed, Staging
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn, history
from tests.fixtures.restores import silent
from tests.fixtures.volumes import loop_volume
from trigger.errors import JournalError
from trigger.position import Position
from trigger.replay import Replay, Target

BYTES = 1 << 20
PARTIAL, WHOLE = SegmentName(1, 7, partial=True), SegmentName(1, 7)


class FinishedMeanwhile(SegmentFolder):
    """Its receiver finishes the segment at the n-th time that somebody asks where its unfinished file lies."""

    finish_at = 0

    def file(self, name: SegmentName) -> Path:
        found = super().file(name)
        if name == PARTIAL:
            self.finish_at -= 1
            if self.finish_at == 0:
                found.rename(self.path / WHOLE.text(BYTES))
        return found


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_segment_that_is_finished_while_it_is_staged_is_staged(tmp_path: Path, moment: int) -> None:
    journal = FinishedMeanwhile(tmp_path / "journal", BYTES, (os.getuid(), os.getgid()))
    journal.make(None)
    journal.file(PARTIAL).write_bytes(b"\x07" * BYTES)
    journal.finish_at = moment
    (tmp_path / "stage").mkdir()
    stage = os.open(tmp_path / "stage", os.O_RDONLY)
    try:
        assert Staging(journal)._stage_one(Needed(7, (1,), None), stage)
    finally:
        os.close(stage)
    assert (tmp_path / "stage" / WHOLE.text(BYTES)).stat().st_size == BYTES


def _held(folder: Path, count: int) -> SegmentFolder:
    journal = SegmentFolder(folder, BYTES)
    journal.make(None)
    for number in range(1, count + 1):
        journal.file(SegmentName(1, number)).write_bytes(b"\x07" * BYTES)
    return journal


def _replay(reach: int | None = None) -> Replay:
    target = Target(history("1", 1), None, True, "noon", datetime(2026, 3, 1, 12, tzinfo=UTC), reach=reach)
    return Replay(target, Position(target.history, Lsn(BYTES)), 2 * BYTES)


def test_of_a_time_behind_which_a_commit_is_known_no_more_is_staged_than_that(tmp_path: Path) -> None:
    journal = _held(tmp_path / "journal", 9)
    Staging(journal).stage(_replay(reach=3 * BYTES + 8), tmp_path / "some", silent)
    assert {name.number for name in SegmentFolder(tmp_path / "some", BYTES).names()} == {1, 2, 3, 4}
    Staging(journal).stage(_replay(), tmp_path / "all", silent)
    assert {name.number for name in SegmentFolder(tmp_path / "all", BYTES).names()} == set(range(1, 10))
    cut = _replay(reach=2 * BYTES)
    cut = replace(cut, target=replace(cut.target, time=None, point="as it was cut"), as_cut=True)
    Staging(journal).stage(cut, tmp_path / "cut", silent)
    assert {name.number for name in SegmentFolder(tmp_path / "cut", BYTES).names()} == {1, 2}


@pytest.mark.volume
def test_log_that_has_to_be_copied_is_not_begun_to_be_where_all_of_it_has_no_room(tmp_path: Path) -> None:
    journal = _held(tmp_path / "journal", 40)
    with loop_volume("ext4", 150) as small:
        free = shutil.disk_usage(small).free
        (small / "ballast").write_bytes(bytes(free - (64 << 20) - 20 * BYTES))
        before = shutil.disk_usage(small).free
        asked = 40 * BYTES + (64 << 20)
        with pytest.raises(JournalError, match=rf"{small}/staged has \d+ bytes free, and {asked} are asked for"):
            Staging(journal).stage(_replay(reach=40 * BYTES), small / "staged", silent)
        assert before - shutil.disk_usage(small).free < BYTES
        assert Staging(journal).stage(_replay(reach=9 * BYTES), small / "staged", silent) == 9 * BYTES
    assert Staging(journal).stage(_replay(reach=40 * BYTES), tmp_path / "linked", silent) == 40 * BYTES
