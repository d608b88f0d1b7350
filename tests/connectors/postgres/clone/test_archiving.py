"""What production had not archived yet waits for the archiver of the clone that takes its place, whole, and once."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from connectors.databases.postgres.clone.archiving import tell
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn

SIZE = 1 << 20
FORK = 6
"""The segment in the middle of which the clone left the first timeline."""
WRITTEN = SegmentName(2, 7).text(SIZE)
HALF = SIZE // 2


def segment(number: int, timeline: int = 1) -> str:
    return SegmentName(timeline, number).text(SIZE)


class Log:
    """A pg_wal."""

    def __init__(self, folder: Path, system: int = 111) -> None:
        self.folder, self.system = folder, system
        (folder / "archive_status").mkdir(parents=True)

    def put(self, name: str, state: str = "", content: bytes = b"") -> None:
        """Put a segment, filled up with zeros."""
        number = SegmentName.parse(name, SIZE)
        assert number is not None
        head = struct.pack("=HHIQI4xQII", 0xD110, 2, number.timeline, number.number * SIZE, 0, self.system, SIZE, 8192)
        (self.folder / name).write_bytes((head + content).ljust(SIZE, b"\0"))
        self.mark(name, state)

    def mark(self, name: str, state: str) -> None:
        if state:
            (self.folder / "archive_status" / f"{name}.{state}").touch()

    def states(self) -> dict[str, str]:
        entries = sorted((self.folder / "archive_status").iterdir())
        return {entry.stem: entry.suffix[1:] for entry in entries}

    def content(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


@pytest.fixture
def clone(tmp_path: Path) -> Log:
    """A clone on its second timeline."""
    made = Log(tmp_path / "clone")
    made.put(segment(6, 2))
    made.put(WRITTEN)
    (made.folder / "00000002.history").write_text(f"1\t{Lsn(FORK * SIZE + HALF)}\tno reason\n")
    return made


@pytest.fixture
def production(tmp_path: Path) -> Log:
    return Log(tmp_path / "production")


OWN = {"00000002.history": "ready", segment(6, 2): "ready"}
PAST, MORE = b"p" * (SIZE - 100), b"p" * (HALF - 40) + b"m" * 1000


def told(clone: Log, production: Log | None) -> dict[str, str]:
    """Tell the archiver, twice; gives the states of the files of earlier timelines."""
    seen = []
    for _ in range(2):
        log = os.open(clone.folder, os.O_RDONLY)
        theirs = os.open(production.folder, os.O_RDONLY) if production else None
        try:
            tell(log, theirs, WRITTEN, (os.getuid(), os.getgid()))
        finally:
            for one in (log, theirs):
                if one is not None:
                    os.close(one)
        seen.append(clone.states())
    assert seen[0] == seen[1]
    assert seen[0].items() >= OWN.items()
    return {name: state for name, state in seen[0].items() if name not in OWN}


def test_what_production_has_archived_is_done_whatever_the_snapshot_says(clone: Log, production: Log) -> None:
    for number, state in ((3, "ready"), (4, "ready"), (5, "")):
        clone.put(segment(number), state)
    production.put(segment(4), "done")
    assert told(clone, production) == {segment(number): "done" for number in (3, 4, 5)}


def test_what_production_has_not_archived_waits_and_is_its_own_file(clone: Log, production: Log) -> None:
    clone.put(segment(4), "done", PAST)
    clone.put(segment(6), "done", MORE[: HALF - 40])  # cut off where the clone left it
    for number, content in ((4, PAST), (5, PAST), (6, MORE), (8, b"later")):
        production.put(segment(number), "ready", content)
    backup = f"{segment(5)}.00000028.backup"
    (production.folder / backup).write_text("START WAL LOCATION")
    production.mark(backup, "ready")
    assert told(clone, production) == dict.fromkeys([backup, *(segment(number) for number in (4, 5, 6, 8))], "ready")
    for name in (backup, *(segment(number) for number in (4, 5, 6, 8))):
        assert clone.content(name) == production.content(name)
        assert (clone.folder / name).stat().st_ino != (production.folder / name).stat().st_ino


def test_a_timeline_that_is_given_up_with_production_is_archived_to_its_end(clone: Log, production: Log) -> None:
    """Production was on a timeline of its own, between whose number and the first the clone has its own."""
    clone.folder.joinpath("00000003.history").write_text("of another life\n")
    production.put(segment(6, 3), "ready")
    (production.folder / "00000003.history").write_text(f"1\t{Lsn(FORK * SIZE + 99)}\tno reason\n")
    production.mark("00000003.history", "ready")
    assert told(clone, production) == {"00000003.history": "ready", segment(6, 3): "ready"}
    assert clone.content("00000003.history") == production.content("00000003.history")


def test_another_log_of_that_name_is_not_put_in_the_place_of_the_clones_past(clone: Log, production: Log) -> None:
    clone.put(segment(4), "done", PAST)
    clone.put(segment(5), "ready", PAST)
    for number in (4, 5):
        production.put(segment(number), "ready", b"another life")
    assert told(clone, production) == {segment(4): "done", segment(5): "ready"}
    for number in (4, 5):
        assert clone.content(segment(number))[40:].startswith(b"ppp")


def test_where_production_is_gone_or_another_cluster_what_waited_in_the_snapshot_waits(
    clone: Log, tmp_path: Path
) -> None:
    clone.put(segment(4), "done")
    clone.put(segment(5), "ready")
    other = Log(tmp_path / "other", 222)
    other.put(segment(4), "ready")
    for production in (None, other):
        assert told(clone, production) == {segment(4): "done", segment(5): "ready"}


def test_no_link_of_productions_owner_is_read(clone: Log, production: Log, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * SIZE)
    (production.folder / segment(5)).symlink_to(tmp_path / "secret")
    production.mark(segment(5), "ready")
    assert told(clone, production) == {}
    assert not (clone.folder / segment(5)).exists()
