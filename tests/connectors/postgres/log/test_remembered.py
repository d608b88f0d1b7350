"""What was read of a folder of segments is not read again, unless a segment looks different."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.log import files, segments
from connectors.databases.postgres.log.remembered import Remembered
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn
from tests.connectors.postgres.log.test_folders import OLD, SMALL, put
from tests.fixtures.volumes import plain_folder
from trigger.model import Extent

MANY = 200
HOUR_NS = 3_600_000_000_000


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the segments that were opened."""
    names: list[str] = []

    @contextlib.contextmanager
    def counting(path: Path) -> Iterator[io.FileIO]:
        names.append(path.name)
        with files.reading(path) as file:
            yield file

    monkeypatch.setattr(segments, "reading", counting)
    return names


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[SegmentFolder]:
    """A folder of many segments that were written an hour ago."""
    with plain_folder() as path:
        put(path, int(OLD.system), *range(1, MANY + 1))
        now = time.time_ns() + HOUR_NS
        monkeypatch.setattr("connectors.databases.postgres.log.remembered.time.time_ns", lambda: now)
        yield SegmentFolder(path, SMALL)


def name(number: int) -> str:
    return SegmentName(1, number).text(SMALL)


WHOLE = [Extent(OLD, Lsn(SMALL), Lsn((MANY + 1) * SMALL))]


def test_a_second_look_opens_nothing_and_a_third_only_what_was_changed(
    folder: SegmentFolder, opened: list[str]
) -> None:
    assert folder.extents() == WHOLE
    assert opened == [name(number) for number in range(1, MANY + 1)]
    opened.clear()
    assert folder.extents() == WHOLE
    assert opened == []
    with (folder.path / name(7)).open("r+b") as written:
        written.write(bytes(2))
    put(folder.path, int(OLD.system), MANY + 1)
    assert folder.extents() == [
        Extent(OLD, Lsn(SMALL), Lsn(7 * SMALL)),
        Extent(OLD, Lsn(8 * SMALL), Lsn((MANY + 2) * SMALL)),
    ]
    assert opened == [name(7), name(MANY + 1)]


def test_another_file_in_the_place_of_a_segment_is_read_though_it_bears_its_size_and_times(
    folder: SegmentFolder, opened: list[str]
) -> None:
    assert folder.extents() == WHOLE
    seen = (folder.path / name(5)).stat()
    other = folder.path / "other"
    shutil.copy(folder.path / name(6), other)
    os.utime(other, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    other.rename(folder.path / name(5))
    opened.clear()
    assert len(folder.extents()) == 2
    assert opened == [name(5)]


def test_what_was_let_go_of_is_not_remembered(folder: SegmentFolder, opened: list[str]) -> None:
    assert folder.extents() == WHOLE
    for number in range(1, MANY):
        (folder.path / name(number)).unlink()
    assert folder.extents() == [Extent(OLD, Lsn(MANY * SMALL), Lsn((MANY + 1) * SMALL))]
    assert list(folder._known._read) == [name(MANY)]


def test_of_what_was_written_to_just_now_nothing_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    known, seen = Remembered[str](), (tmp_path / "file").stat()
    known.put("file", seen, "read")
    assert known.get("file", seen) is None


def test_an_audit_opens_no_segment_that_it_looked_at_before_and_sees_each_once(
    folder: SegmentFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[Path] = []
    stat = Path.stat

    def counting(path: Path, **named: bool) -> os.stat_result:
        looked_at.append(path)
        return stat(path, **named)

    monkeypatch.setattr(Path, "stat", counting)
    assert len(folder.complete()) == MANY
    segments = [path for path in looked_at if path not in (folder.path, folder.aside)]
    assert sorted(segments) == [folder.path / name(number) for number in range(1, MANY + 1)]
    assert len(looked_at) <= len(segments) + 4, "the folders, before and after each was listed"
