"""What is put into the folder that a clone replays from, while the receiver goes on writing the journal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.staging import Needed, Staging
from connectors.databases.postgres.log.wal import SegmentName

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
