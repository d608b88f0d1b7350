"""The upkeep: no act waits for another, and what is not done is shown until it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from connectors.memory import SEGMENT_BYTES, MemoryJournal
from tests.simulation.virtual import VirtualLoop
from tests.trigger.keep.test_expire import POINTS, Shelves, play
from trigger.config.options import CatalogOptions, PointOptions
from trigger.errors import JournalError
from trigger.model import Finding, Severity, State
from trigger.position import Position
from trigger.protect.agenda import Agenda
from trigger.protect.qualify import Rules
from trigger.protect.window import Window
from trigger.service.upkeep import GIVE_BACK_PAGES, HINDERED_SECONDS, LONG_SECONDS, PRUNE_POINTS, PRUNE_ROUNDS, Upkeep

OLD_LOG = "old log is not let go of"


class Journal(MemoryJournal):
    """A journal whose release takes as long, and fails as often, as it is told."""

    takes_seconds = 0.0
    fails = 0
    released = 0

    async def release(self, starts: Collection[Position]) -> int:
        await asyncio.sleep(self.takes_seconds)
        if self.fails:
            self.fails -= 1
            raise JournalError("the disk is read-only")
        self.released += 1
        return await super().release(starts)


def keep_up(act: Callable[[Shelves, Upkeep, Journal], Coroutine[Any, Any, None]], *, slow: float = 0.0) -> None:
    """Run thinning and the release of old log beside `act`, in virtual time; a first point is sealed."""

    async def beside(shelves: Shelves) -> None:
        journal = Journal(shelves.world)
        journal.takes_seconds = slow
        parts: Any = SimpleNamespace(catalog=shelves.catalog, journal=journal)
        upkeep = Upkeep(parts, Window((), {}, Rules(()).judge), Agenda(PointOptions(), None), shelves.room)
        acts = dict(upkeep.acts())
        await shelves.sealed_at(1, 3 * SEGMENT_BYTES)
        running = [asyncio.create_task(acts.pop(name)) for name in ("room", "old log")]
        for left_out in acts.values():
            left_out.close()
        try:
            await act(shelves, upkeep, journal)
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    play(beside)


def test_snapshots_are_thinned_while_the_journal_does_not_answer_and_the_status_says_so() -> None:
    async def act(shelves: Shelves, upkeep: Upkeep, _: Journal) -> None:
        await asyncio.sleep(LONG_SECONDS - 1)
        assert upkeep.troubles == {}
        for number in range(2, POINTS + 1):
            await shelves.sealed_at(number, (number + 2) * SEGMENT_BYTES)
        await asyncio.sleep(3)
        assert len(await shelves.numbers()) < POINTS
        assert upkeep.troubles == {OLD_LOG: f"still at it after {LONG_SECONDS:g} s"}
        await asyncio.sleep(3600)
        assert upkeep.troubles == {}

    keep_up(act, slow=3600)


def test_log_that_could_not_be_let_go_of_is_shown_and_tried_again_until_it_goes() -> None:
    async def act(shelves: Shelves, upkeep: Upkeep, journal: Journal) -> None:
        journal.fails = 2
        await asyncio.sleep(1)
        assert upkeep.troubles == {OLD_LOG: "the disk is read-only"}
        await asyncio.sleep(15)
        assert upkeep.troubles == {}
        assert shelves.world.journal[1][0][0] == 3 * SEGMENT_BYTES

    keep_up(act)


def test_log_is_let_go_of_once_at_start_and_again_when_points_went() -> None:
    async def act(shelves: Shelves, upkeep: Upkeep, journal: Journal) -> None:
        await asyncio.sleep(60)
        assert journal.released == 1
        await shelves.sealed_at(2, 5 * SEGMENT_BYTES)
        await shelves.catalog.change((await shelves.catalog.bases())[0], State.EXPIRING)
        await asyncio.sleep(10)
        assert journal.released == 2
        assert shelves.world.journal[1][0][0] == 5 * SEGMENT_BYTES
        assert upkeep.troubles == {}

    keep_up(act)


@pytest.mark.parametrize("seconds", [HINDERED_SECONDS - 1, 60])
def test_what_keeps_log_from_the_journal_is_an_error_and_a_trouble_once_it_lasts(
    seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    finding = Finding("pg_receivewal", Severity.WARNING, "the log is not received: no space left", "make room")

    async def main() -> None:
        found: list[Finding] = []

        async def audit() -> list[Finding]:
            return [*found]

        parts: Any = SimpleNamespace(journal=SimpleNamespace(audit=audit))
        upkeep = Upkeep(parts, cast("Any", None), cast("Any", None), cast("Any", None), log_is_noted=True)
        acts = dict(upkeep.acts())
        auditing = asyncio.create_task(acts.pop("audit"))
        for left_out in acts.values():
            left_out.close()
        await asyncio.sleep(1)
        found.append(finding)
        await asyncio.sleep(seconds)
        lasts = seconds > HINDERED_SECONDS
        assert [finding.message in why for why in upkeep.troubles.values()] == [True] * lasts
        found.clear()
        await asyncio.sleep(10)
        assert not upkeep.troubles
        auditing.cancel()
        held_up = [(each.levelname, each.getMessage().endswith(": over")) for each in caplog.records]
        assert held_up == [("ERROR", False), ("WARNING", True)] * lasts

    VirtualLoop().run(main())


class Pruned:
    """A catalog that has so many points to prune, and some room to give back."""

    def __init__(self, old: int) -> None:
        self.old = old
        self.asked: list[tuple[datetime, int]] = []
        self.given_back: list[int] = []

    async def prune(self, taken_before: datetime, most: int) -> int:
        self.asked.append((taken_before, most))
        now, self.old = min(self.old, most), max(self.old - most, 0)
        return now

    async def give_back(self, pages: int) -> int:
        self.given_back.append(pages)
        return 0


@pytest.mark.parametrize(("old", "calls"), [(0, 1), (PRUNE_POINTS - 1, 1), (PRUNE_POINTS, 2), (1 << 20, PRUNE_ROUNDS)])
def test_points_that_expired_long_ago_go_from_the_catalog_a_bounded_number_at_a_time(old: int, calls: int) -> None:
    now, catalog = datetime(2026, 3, 1, tzinfo=UTC), Pruned(old)
    options = SimpleNamespace(catalog=CatalogOptions(keep_expired_seconds=86_400))
    site = SimpleNamespace(clock=SimpleNamespace(now=lambda: now))
    parts: Any = SimpleNamespace(catalog=catalog, options=options, site=site)
    upkeep = Upkeep(parts, cast("Any", None), cast("Any", None), cast("Any", None))
    asyncio.run(upkeep.prune())
    assert catalog.asked == [(now - timedelta(days=1), PRUNE_POINTS)] * calls
    assert catalog.given_back == [GIVE_BACK_PAGES]
    assert CatalogOptions().keep_expired_seconds == 30 * 86_400


def test_points_whose_snapshots_are_gone_are_shown_and_the_newest_is_replaced_once() -> None:
    async def act(shelves: Shelves) -> None:
        async def checkpoint() -> None:
            """Do as if."""

        database = SimpleNamespace(checkpoint=checkpoint)
        parts: Any = SimpleNamespace(catalog=shelves.catalog, storage=shelves.storage, database=database)
        points = [await shelves.sealed_at(number, number * 1000) for number in (1, 2, 3)]
        agenda = Agenda(PointOptions(), points[-1])
        upkeep = Upkeep(parts, Window((), {}, Rules(()).judge), agenda, shelves.room)
        await upkeep.watch_snapshots()
        assert upkeep.troubles == {}
        older = shelves.world.kept.pop(points[0].id)
        await upkeep.watch_snapshots()
        (why,) = upkeep.troubles.values()
        assert why.startswith("of point 1 a snapshot is gone from the storage; put back what was moved")
        assert not agenda.demands, "the newest base stands"
        newest = shelves.world.kept.pop(points[2].id)
        for _ in range(2):
            await upkeep.watch_snapshots()
        assert [demand.note for demand in agenda.demands] == ["the snapshot of point 3 is gone"]
        assert agenda.wants_base, "until one is sealed"
        shelves.world.kept |= {points[0].id: older, points[2].id: newest}
        await upkeep.watch_snapshots()
        assert upkeep.troubles == {}

    play(act)
