"""Where somebody has put a link into the journal's folder or the staged log, nothing behind it is read or changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.staging import Staging
from connectors.databases.postgres.log.wal import SegmentName
from trigger.errors import JournalError
from trigger.trusted import NotOursError

BYTES = 1 << 20
NOBODY = 65534
NAME = SegmentName(1, 7)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the size of a segment that only its owner may read."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "victim").write_bytes(b"\x07" * BYTES)
    (folder / "victim").chmod(0o600)
    return folder / "victim"


@pytest.fixture
def journal(tmp_path: Path) -> SegmentFolder:
    segments = SegmentFolder(tmp_path / "journal", BYTES, (NOBODY, NOBODY))
    segments.make(None)
    return segments


def test_a_segment_that_is_a_link_is_not_held_nor_staged_and_its_target_keeps_its_rights(
    journal: SegmentFolder, victim: Path, tmp_path: Path
) -> None:
    journal.file(NAME).symlink_to(victim)
    before = victim.stat()
    assert journal.extents() == []
    stage = os.open(tmp_path, os.O_RDONLY)
    for copy in (False, True):
        with pytest.raises(NotOursError):
            Staging(journal)._put(journal.file(NAME), stage, "staged", copy=copy)
    os.close(stage)
    assert not (tmp_path / "staged").exists()
    after = victim.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_history_file_that_is_a_pipe_keeps_nobody_waiting(journal: SegmentFolder) -> None:
    os.mkfifo(journal.path / "00000002.history")
    with pytest.raises(NotOursError, match="no ordinary file"):
        journal.histories()


def test_no_segment_is_set_aside_behind_a_link(journal: SegmentFolder, victim: Path) -> None:
    journal.file(NAME).write_bytes(b"theirs")
    journal.aside.symlink_to(victim.parent)
    with pytest.raises(OSError, match="Not a directory"):
        journal.set_aside(NAME)
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]


def test_no_empty_segment_is_made_where_a_link_leads(journal: SegmentFolder, victim: Path) -> None:
    (journal.path / journal._file_name(NAME)).symlink_to(victim.parent / "new")
    with pytest.raises(NotOursError):
        journal.mark(NAME, None)
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]


@pytest.mark.root
def test_no_journal_is_made_below_a_folder_of_another_whatever_link_leads_there(tmp_path: Path) -> None:
    (tmp_path / "theirs" / "journal").mkdir(parents=True)
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    (tmp_path / "link").symlink_to("theirs/journal")
    for place in (tmp_path / "theirs" / "journal", tmp_path / "theirs" / "new", tmp_path / "link"):
        with pytest.raises(JournalError, match="belongs to user 65534") as raised:
            SegmentFolder(place, BYTES, (NOBODY, NOBODY)).make((NOBODY, NOBODY))
        assert raised.value.hint
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["journal"]
    assert (tmp_path / "theirs" / "journal").stat().st_uid != NOBODY


def test_a_link_of_ours_leads_the_journal_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "disk" / "journal").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/journal")
    SegmentFolder(tmp_path / "link", BYTES).make(None)
