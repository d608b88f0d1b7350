"""The audit finds each fault in the chain of segments, once and for good, and takes nothing else for one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from connectors.databases.postgres.log import audit
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.journal import PostgresJournal
from connectors.databases.postgres.log.receiver import Receiver
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.log.waldump import Stretch, WalDump
from connectors.databases.postgres.lsn import history
from connectors.databases.postgres.programs import Programs
from tests.fixtures.restores import SEGMENT_BYTES, Ground, damage, fill, ground, replay_from, silent
from tests.fixtures.volumes import flip_bit, plain_folder
from trigger.errors import JournalError
from trigger.position import History, Position
from trigger.replay import Target

pytestmark = [pytest.mark.server]


@pytest.fixture
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        yield made


class OneByOne(WalDump):
    """`pg_waldump` that looks at a segment only when it is told to."""

    def __init__(self, dump: WalDump) -> None:
        vars(self).update(vars(dump))
        self.looked_at: list[Stretch] = []
        self.go = asyncio.Semaphore(0)

    async def fault(self, stretch: Stretch) -> str:
        await self.go.acquire()
        self.looked_at.append(stretch)
        return await super().fault(stretch)


async def unasked() -> History:
    raise AssertionError("nothing is received")


@dataclass(frozen=True)
class Kept:
    """A journal of a handful of complete segments, audited and found sound, that a test may damage."""

    journal: PostgresJournal
    segments: SegmentFolder
    dump: WalDump
    folder: Path

    def again(self, dump: WalDump | None = None) -> PostgresJournal:
        """Give another service's journal over the same folder."""
        folders = LogFolders(self.segments.path, SEGMENT_BYTES, self.segments.owner)
        feed = Receiver("", Programs(self.folder, 18), "none")
        return PostgresJournal(folders, feed, unasked, lambda _: dump or self.dump)

    def at(self, place: int) -> Position:
        """Give a place of the log that is kept."""
        return Position(history(self.segments.system(), 1), place)

    def unaudited(self, dump: WalDump | None = None) -> PostgresJournal:
        (self.segments.path / "audit.json").unlink()
        return self.again(dump)

    def noted(self) -> int:
        """Give how many segments an audit has noted as looked at."""
        state = self.segments.path / "audit.json"
        looked_at = json.loads(state.read_text())["timelines"]["1"] if state.exists() else (0, 0)
        return int(looked_at[1]) - int(looked_at[0])

    def complete(self) -> list[Path]:
        return [self.segments.file(name) for name in self.segments.names() if not name.partial]


@pytest.fixture(scope="module")
def sound() -> Iterator[Ground]:
    async def run(here: Ground) -> None:
        async with here.journaling():
            fill(here.cluster, 5)
            await here.journal_reaches(here.durable())
        assert await damage(here.journal) == []

    with plain_folder() as folder, ground(18, folder, btrfs=False) as here:
        asyncio.run(run(here))
        here.cluster.stop()
        yield here


@pytest.fixture
def kept(sound: Ground, folder: Path) -> Kept:
    subprocess.run(["cp", "-a", sound.segments.path, folder / "journal"], check=True)
    folders = LogFolders(folder / "journal", SEGMENT_BYTES, sound.cluster.owner)
    journal = PostgresJournal(folders, sound.receiver, unasked, lambda _: sound.dump)
    return Kept(journal, folders.all()[0], sound.dump, folder)


_flip = partial(flip_bit, place=60_000)
"""Damage the data of a record."""


def _make_foreign(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(24)
        handle.write((42).to_bytes(8, "little"))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "missing"),
    "truncated": (lambda file: os.truncate(file, 4_000_000), "truncated: 4000000 of 16777216"),
    "foreign": (_make_foreign, "another cluster"),
    "flipped": (_flip, "checksum"),
    "swapped": (lambda file: shutil.copy(file.with_name("000000010000000000000002"), file), "says that it is"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_chain_is_found_and_names_its_file(kept: Kept, fault: str) -> None:
    do, words = FAULTS[fault]
    victim = kept.complete()[3]
    do(victim)

    async def run() -> None:
        journal = kept.unaudited()
        findings = await journal.audit()
        assert [finding.subject for finding in findings] == [victim.name]
        assert words in findings[0].message
        assert await journal.audit() == findings  # until it is mended, or released
        held = await journal.extents()
        number = int(victim.name[-2:], 16)
        assert held[0].end == number * SEGMENT_BYTES
        assert held[1].start == (number + 1) * SEGMENT_BYTES
        start = Position(held[0].history, held[0].start)
        target = Target(held[0].history, held[1].start + 100, True, "behind")
        with pytest.raises(JournalError, match=victim.name):
            await journal.stage(replay_from(start, target), kept.folder / "staged", silent)

    asyncio.run(run())


def test_a_segment_that_vanishes_after_its_audit_is_reported(kept: Kept) -> None:
    victim = kept.complete()[2]
    victim.unlink()
    (finding,) = asyncio.run(kept.journal.audit())
    assert finding.subject == victim.name


def test_a_segment_that_is_written_to_after_its_audit_is_looked_at_again(kept: Kept) -> None:
    victim = kept.complete()[2]
    _flip(victim)
    (finding,) = asyncio.run(kept.journal.audit())
    assert finding.subject == victim.name
    assert "checksum" in finding.message
    _flip(victim)  # back to what it was
    assert asyncio.run(kept.again().audit()) == []


def test_what_the_audit_found_survives_a_restart(kept: Kept) -> None:
    victim = kept.complete()[2]
    _flip(victim)
    asyncio.run(kept.unaudited().audit())
    reopened = kept.again()
    assert len(asyncio.run(reopened.extents())) == 2
    assert [finding.subject for finding in asyncio.run(reopened.audit())] == [victim.name]


@pytest.mark.parametrize("damage", [_flip, Path.unlink])
def test_damage_right_behind_the_target_is_no_hindrance(kept: Kept, damage: Callable[[Path], object]) -> None:
    victim = kept.complete()[2]
    damage(victim)
    assert [finding.subject for finding in asyncio.run(kept.unaudited().audit())] in ([victim.name], [])
    journal = kept.again()
    held, *_ = asyncio.run(journal.extents())
    last = Target(held.history, held.end - 100, True, "the last before it")
    start = Position(held.history, held.start)
    assert asyncio.run(journal.stage(replay_from(start, last), kept.folder / "staged", silent)) >= 2 * SEGMENT_BYTES
    assert not (kept.folder / "staged" / victim.name).exists()


def test_release_lets_go_of_whole_segments_before_a_position_and_is_no_fault(kept: Kept) -> None:
    names = kept.complete()
    number = int(names[2].name[-2:], 16)
    assert asyncio.run(kept.journal.release([kept.at(number * SEGMENT_BYTES + 5)])) == 2
    assert kept.complete() == names[2:]
    assert asyncio.run(kept.journal.audit()) == []


def test_release_before_the_audit_came_there_is_no_fault(kept: Kept) -> None:
    names = kept.complete()
    for name in names[2:]:
        name.rename(kept.folder / name.name)
    journal = kept.unaudited()
    assert asyncio.run(journal.audit()) == []  # of the first two alone
    for name in names[2:]:
        (kept.folder / name.name).rename(name)
    number = int(names[4].name[-2:], 16)
    assert asyncio.run(journal.release([kept.at(number * SEGMENT_BYTES)])) == 4
    assert asyncio.run(journal.audit()) == []
    assert asyncio.run(kept.again().audit()) == []


def test_a_service_that_dies_in_a_release_leaves_nothing_that_looks_like_damage(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = kept.complete()
    before = [kept.at(int(names[3].name[-2:], 16) * SEGMENT_BYTES)]

    def die_after_one(folder: SegmentFolder, going: Sequence[SegmentName]) -> None:
        folder.file(going[0]).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SegmentFolder, "delete", die_after_one)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(kept.journal.release(before))
    assert kept.complete() == names[1:]
    successor = kept.again()
    assert asyncio.run(successor.audit()) == []
    assert asyncio.run(successor.release(before)) == 2
    assert kept.complete() == names[3:]


@pytest.mark.parametrize("looked_at", [0, 1, 2])
def test_a_release_waits_for_one_segment_of_an_audit_not_for_all(kept: Kept, looked_at: int) -> None:
    names = kept.complete()

    async def run() -> None:
        dump = OneByOne(kept.dump)
        journal = kept.unaudited(dump)
        looking = asyncio.create_task(journal.audit())
        for _ in range(looked_at):
            dump.go.release()
        while len(dump.looked_at) < looked_at:  # noqa: ASYNC110 - another program
            await asyncio.sleep(0.01)
        release = asyncio.create_task(journal.release([kept.at(int(names[3].name[-2:], 16) * SEGMENT_BYTES)]))
        await asyncio.sleep(0)
        dump.go.release()
        assert await release == 3
        assert not looking.done()
        for _ in names:
            dump.go.release()
        assert await looking == []
        assert await journal.audit() == []

    asyncio.run(asyncio.wait_for(run(), 20))


def test_what_an_audit_looked_at_is_not_looked_at_again_where_it_was_cut_short(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_KEEP_SECONDS", 0.0)
    names = kept.complete()

    async def cut_short() -> None:
        dump = OneByOne(kept.dump)
        looking = asyncio.create_task(kept.unaudited(dump).audit())
        for _ in range(3):
            dump.go.release()
        while len(dump.looked_at) < 3 or not dump.go.locked() or kept.noted() < 3:  # noqa: ASYNC110 - another program
            await asyncio.sleep(0.01)
        looking.cancel()

    async def go_on() -> int:
        dump = OneByOne(kept.dump)
        for _ in names:
            dump.go.release()
        assert await kept.again(dump).audit() == []
        return len(dump.looked_at)

    asyncio.run(asyncio.wait_for(cut_short(), 20))
    assert asyncio.run(go_on()) == len(names) - 3


def test_a_missing_first_segment_is_named(kept: Kept) -> None:
    (extent,) = asyncio.run(kept.journal.extents())
    target = Target(extent.history, extent.end + 3 * SEGMENT_BYTES, True, "the future")
    with pytest.raises(JournalError, match=SegmentName(1, extent.end // SEGMENT_BYTES).text(SEGMENT_BYTES)):
        asyncio.run(
            kept.journal.stage(replay_from(Position(extent.history, extent.start), target), kept.folder / "s", silent)
        )


def _received_anew(kept: Kept) -> None:
    """Lose the newest whole segment; its log comes again, and is not whole yet."""
    newest = kept.complete()[-1]
    for file in newest.parent.glob("*.partial"):
        file.unlink()
    newest.rename(newest.with_name(f"{newest.name}.partial"))


def _hole_before_the_unfinished(kept: Kept) -> None:
    kept.complete()[-1].unlink()


def _hole_and_what_is_behind_it_comes_anew(kept: Kept) -> None:
    _received_anew(kept)
    kept.complete()[-1].unlink()


HOLES = {
    "the newest comes again": _received_anew,
    "before an unfinished one": _hole_before_the_unfinished,
    "both": _hole_and_what_is_behind_it_comes_anew,
}


@pytest.mark.parametrize("hole", HOLES)
def test_every_stretch_that_is_held_behind_or_before_a_hole_can_be_staged_also_after_an_audit(
    kept: Kept, hole: str
) -> None:
    HOLES[hole](kept)
    assert asyncio.run(kept.again().audit()), "the loss is told"
    journal = kept.again()
    extents = asyncio.run(journal.extents())
    assert extents
    for number, extent in enumerate(extents):
        target = Target(extent.history, extent.end - 8, False, "all that is held")
        replay = replay_from(Position(extent.history, extent.start), target)
        assert asyncio.run(journal.stage(replay, kept.folder / f"s{number}", silent))
