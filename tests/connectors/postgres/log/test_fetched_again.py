"""A segment that is cut short or damaged in the journal's folder is fetched again where an archive has it whole."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from connectors.databases.postgres.log.archive import ArchiveReader
from connectors.databases.postgres.log.audit import Audit
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.staging import Staging
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn
from tests.connectors.postgres.log.test_archive import FIRST, NUMBER, Server, followed, put
from tests.connectors.postgres.log.test_wal import SEGMENT_BYTES, START, two_segments
from tests.fixtures.restores import silent
from tests.fixtures.volumes import plain_folder
from trigger.errors import JournalError
from trigger.position import Position
from trigger.replay import Replay, Target

NAMES = [SegmentName(1, NUMBER + step) for step in (0, 1)]
TEXTS = [name.text(SEGMENT_BYTES) for name in NAMES]
OURS, OTHER = two_segments([40], 28_000), two_segments([2_000], 28_000)


@pytest.fixture
def segments() -> Iterator[SegmentFolder]:
    with plain_folder() as folder:
        made = SegmentFolder(folder, SEGMENT_BYTES, None)
        for name, segment in zip(NAMES, OURS[:2], strict=True):
            put(folder, segment, name.timeline, name.number)
        yield made


@pytest.fixture
def archive() -> Iterator[Path]:
    with plain_folder() as folder:
        for text, segment in zip(TEXTS, OURS[:2], strict=True):
            (folder / text).write_bytes(segment)
            os.utime(folder / text, (1e9, 1e9))
        yield folder


class Counting(ArchiveReader):
    """A reader that counts how often its command is run; it keeps the times of the archive's files."""

    def __init__(self, archive: Path) -> None:
        super().__init__(f"cp -p {archive}/%f %p", Server())
        self.runs = 0

    def _run_command(self, name: str, path: Path, seconds: float) -> tuple[int, str]:
        self.runs += 1
        return super()._run_command(name, path, seconds)


def audited(segments: SegmentFolder, audit: Audit) -> dict[str, str]:
    asyncio.run(audit.run())
    return dict(segments.damaged)


def cut(file: Path) -> None:
    os.truncate(file, 1000)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def zero_the_header(file: Path) -> None:
    with file.open("r+b") as written:
        written.write(bytes(64))


@pytest.mark.parametrize("damage", [cut, empty, zero_the_header, Path.unlink])
def test_what_is_damaged_here_and_whole_in_the_archive_is_fetched_again_and_then_held(
    damage: Callable[[Path], None], segments: SegmentFolder, archive: Path
) -> None:
    audit, reader = Audit(segments, lambda: None), Counting(archive)
    assert audited(segments, audit) == {}
    damage(segments.path / TEXTS[0])
    if damage is Path.unlink:
        assert TEXTS[0] in audited(segments, audit)
    elif damage is zero_the_header:
        assert TEXTS[0] in audited(segments, audit), "only an audit sees it"
    assert reader.fetch(segments, TEXTS[0])
    assert (segments.path / TEXTS[0]).read_bytes() == OURS[0]
    assert audited(segments, audit) == {}
    assert [extent.end for extent in segments.extents()] == [Lsn(START + 2 * SEGMENT_BYTES)]
    assert reader.fetch(segments, TEXTS[0])
    assert reader.runs == 1


def test_a_running_journal_fetches_again_what_its_audit_found_damaged(segments: SegmentFolder, archive: Path) -> None:
    cut(segments.path / TEXTS[0])
    segments.damaged = {TEXTS[0]: "truncated: 1000 of 32768 bytes"}
    followed(segments, archive, lambda _: (segments.path / TEXTS[0]).read_bytes() == OURS[0])


def test_what_the_archive_has_damaged_too_is_fetched_once_and_said_to_be_damaged(
    segments: SegmentFolder, archive: Path
) -> None:
    audit, reader = Audit(segments, lambda: None), Counting(archive)
    assert audited(segments, audit) == {}
    for folder in (segments.path, archive):
        zero_the_header(folder / TEXTS[0])
    for _ in range(3):
        assert TEXTS[0] in audited(segments, audit)
        reader.fetch(segments, TEXTS[0])
    assert reader.runs == 1
    assert not reader.fetch(segments, TEXTS[0])


def test_the_log_of_another_life_takes_the_place_of_no_damaged_segment(segments: SegmentFolder, archive: Path) -> None:
    (archive / TEXTS[1]).write_bytes(OTHER[1])
    cut(segments.path / TEXTS[1])
    assert not Counting(archive).fetch(segments, TEXTS[1])
    assert (segments.path / TEXTS[1]).read_bytes() == OURS[1][:1000], "what is left of ours"


def test_a_replay_gets_a_segment_that_is_cut_short_here_from_the_archive(
    segments: SegmentFolder, archive: Path, tmp_path: Path
) -> None:
    cut(segments.path / TEXTS[0])
    Staging(segments, partial(Counting(archive).fetch, segments)).stage(replay(), tmp_path / "staged", silent)
    assert (tmp_path / "staged" / TEXTS[0]).read_bytes() == OURS[0]


def test_without_an_archive_a_replay_says_which_segment_is_cut_short(segments: SegmentFolder, tmp_path: Path) -> None:
    cut(segments.path / TEXTS[0])
    with pytest.raises(JournalError, match=f"{TEXTS[0]} is cut short .*: 1000 of its bytes are there"):
        Staging(segments).stage(replay(), tmp_path / "staged", silent)


def replay() -> Replay:
    history = FIRST.history
    end = START + 2 * SEGMENT_BYTES
    return Replay(Target(history, Lsn(end), inclusive=True, description="the end"), Position(history, Lsn(START)), end)


def test_what_is_fetched_is_on_the_disk_before_it_has_its_name_and_the_name_before_it_counts(
    segments: SegmentFolder, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushing(descriptor: int) -> None:
        told.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def renaming(path: Path, target: Path) -> Path:
        told.append(f"rename to {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "replace", renaming)
    (segments.path / TEXTS[1]).unlink()
    assert Counting(archive).fetch(segments, TEXTS[1])
    assert told == [
        f"flush fetching.{os.getpid()}.{TEXTS[1]}",
        f"rename to {TEXTS[1]}",
        f"flush {segments.path.name}",
    ]


def test_a_link_that_a_command_leaves_is_not_taken(segments: SegmentFolder, archive: Path) -> None:
    (segments.path / TEXTS[1]).unlink()
    reader = ArchiveReader(f"ln -s {archive}/%f %p", Server())
    assert not reader.fetch(segments, TEXTS[1])
    assert not (segments.path / TEXTS[1]).exists()
