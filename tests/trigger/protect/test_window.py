"""What the window keeps, gives, lets go of, and how it goes on after a break; over the sources in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from connectors.memory import MemorySource, World
from tests.simulation.virtual import VirtualLoop
from trigger.errors import SourceError
from trigger.model import Changes, Commit, Outcome
from trigger.ports import Batch, Break
from trigger.position import Name, Position
from trigger.protect.window import Window

Test = Callable[["Stage"], Coroutine[Any, Any, None]]


class Recording(MemorySource):
    """A source that notes what it was told, and fails where it is asked to."""

    def __init__(self, world: World, name: str, *, repeats: bool = False) -> None:
        super().__init__(world, name, repeats=repeats)
        self.acknowledged: list[Position] = []
        self.heartbeats = 0
        self.opened_after: list[Position | None] = []
        self.failures: list[SourceError] = []

    async def open(self, after: Position | None) -> Break | None:
        self.opened_after.append(after)
        return await super().open(after)

    async def read(self) -> Batch:
        if self.failures:
            raise self.failures.pop()
        return await super().read()

    async def acknowledge(self, through: Position) -> None:
        await super().acknowledge(through)
        self.acknowledged.append(through)

    async def heartbeat(self) -> None:
        self.heartbeats += 1
        await super().heartbeat()


class Stage:
    """A world with a window over some streams of it."""

    def __init__(
        self, *streams: str, bound: int = 100, judge: Callable[[Commit], str | None] = lambda _: "all"
    ) -> None:
        self.loop = VirtualLoop()
        self.world = World(seconds=self.loop.time)
        self.cluster = self.world.cluster
        for stream in streams:
            self.cluster.recreate_slot(stream)
        self.sources = {stream: Recording(self.world, stream) for stream in streams}
        self.window = Window(self.sources.values(), {}, judge, bound)

    def play(self, act: Test) -> None:
        """Run `act` beside the window's readers."""

        async def main() -> None:
            readers = [asyncio.ensure_future(self.window.follow(name)) for name in self.sources]
            try:
                await asyncio.sleep(0.1)
                await act(self)
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.wait(readers)

        self.loop.run(main())

    async def arrived(self) -> list[Name]:
        """Give the names of what is pending, once everything has arrived."""
        await asyncio.sleep(5)
        return [pending.commit.name for pending in self.window.collect().pending]


def test_commits_of_all_streams_are_collected_in_log_order_and_stay_until_they_are_settled() -> None:
    async def act(stage: Stage) -> None:
        made = [stage.cluster.commit(stream).name for stream in ("shop", "bank", "shop")]
        assert await stage.arrived() == made
        assert await stage.arrived() == made
        await stage.window.settle(stage.window.collect().settled)
        assert await stage.arrived() == []
        assert len(stage.window) == 0

    Stage("bank", "shop").play(act)


def test_what_no_rule_takes_is_counted_and_not_kept() -> None:
    async def act(stage: Stage) -> None:
        stage.cluster.commit("bank")
        wanted = stage.cluster.commit("bank", {"public.t": Changes(1)})
        assert await stage.arrived() == [wanted.name]
        assert stage.window.tally.as_dict() == {"rows": 1, "": 1}

    Stage("bank", judge=lambda commit: "rows" if commit.rows else None).play(act)


def test_nothing_is_acknowledged_before_it_is_settled() -> None:
    async def act(stage: Stage) -> None:
        stage.cluster.commit("bank")
        await stage.arrived()
        source = stage.sources["bank"]
        assert source.acknowledged == []
        settled = stage.window.collect().settled
        stage.cluster.commit("bank")
        await stage.arrived()
        await stage.window.settle(settled)
        assert source.acknowledged == [settled["bank"]]
        assert len(stage.window) == 1

    Stage("bank").play(act)


def test_the_newest_commit_is_protected_and_the_others_are_coalesced() -> None:
    async def act(stage: Stage) -> None:
        for stream in ("bank", "shop", "bank"):
            stage.cluster.commit(stream, {"public.t": Changes(inserted=2)})
        await stage.arrived()
        collected = stage.window.collect()
        assert [record.outcome for record in collected.records()] == [
            Outcome.COALESCED,
            Outcome.COALESCED,
            Outcome.PROTECTED,
        ]
        assert collected.tables() == {"bank.public.t": Changes(inserted=4), "shop.public.t": Changes(inserted=2)}

    Stage("bank", "shop").play(act)


def test_a_round_is_of_one_history_and_the_next_timeline_waits_for_its_own() -> None:
    async def act(stage: Stage) -> None:
        before = stage.cluster.commit("bank")
        await stage.arrived()
        stage.cluster.promote(keep_slots=True)
        after = stage.cluster.commit("bank")
        await stage.arrived()
        for broken in stage.window.breaks:
            stage.window.forget(broken, ())
        assert await stage.arrived() == [before.name]
        collected = stage.window.collect()
        assert collected.settled == {"bank": before.position}
        await stage.window.settle(collected.settled)
        assert await stage.arrived() == [after.name]

    Stage("bank").play(act)


def test_what_a_slot_that_went_back_delivers_again_is_dropped() -> None:
    stage = Stage("bank")
    stage.sources = {"bank": Recording(stage.world, "bank", repeats=True)}
    stage.window = Window(stage.sources.values(), {}, lambda _: "all", bound=5000)

    async def act(stage: Stage) -> None:
        made = [stage.cluster.commit("bank").name for _ in range(1200)]  # what comes in several batches
        assert await stage.arrived() == made
        (end,) = stage.window.log_ends
        stage.cluster.cut_connections()
        assert await stage.arrived() == made
        assert stage.sources["bank"].opened_after == [None, end]
        assert stage.window.log_ends == (end,)

    stage.play(act)


def test_what_was_settled_before_a_failover_lies_in_no_gap_that_is_found_later() -> None:
    async def act(stage: Stage) -> None:
        kept = stage.cluster.commit("bank")
        await stage.arrived()
        fork = stage.cluster.inserted
        stage.cluster.commit("bank")
        await stage.arrived()  # the slot never hears that anything is settled, so it goes back to its beginning
        stage.cluster.promote(fork, keep_slots=True)
        await stage.arrived()
        stage.cluster.commit("shop")
        stage.cluster.recreate_slot("bank")
        await stage.arrived()
        first, second = stage.window.breaks
        assert first.seen.until == Position(stage.cluster.history, fork)
        assert second.after >= first.seen.until
        assert stage.cluster.lineage().includes(kept.position)

    Stage("bank").play(act)


def test_a_reader_reconnects_behind_what_was_delivered_with_growing_pauses() -> None:
    async def act(stage: Stage) -> None:
        made = stage.cluster.commit("bank")
        await stage.arrived()
        stage.cluster.crash()
        assert stage.window.connected() == {"bank": True}
        await asyncio.sleep(60)
        assert stage.window.connected() == {"bank": False}
        stage.cluster.restart()
        await asyncio.sleep(20)
        tried = stage.sources["bank"].opened_after
        assert 5 < len(tried) < 12
        assert tried[-1] is not None
        assert tried[-1] >= made.position
        assert stage.window.breaks == ()

    Stage("bank").play(act)


def test_an_error_that_no_waiting_can_help_ends_the_reader() -> None:
    stage = Stage("bank")
    stage.sources["bank"].failures = [SourceError("the stream cannot be understood", retryable=False)]

    async def main() -> None:
        with pytest.raises(SourceError, match="cannot be understood"):
            await stage.window.follow("bank")
        assert stage.window.connected() == {"bank": False}

    stage.loop.run(main())


def test_a_break_is_kept_until_it_is_forgotten_and_nothing_is_acknowledged_meanwhile() -> None:
    async def act(stage: Stage) -> None:
        stage.cluster.commit("bank")
        await stage.arrived()
        settled = stage.window.collect().settled
        stage.cluster.commit("shop")
        stage.cluster.recreate_slot("bank")
        await stage.arrived()
        (broken,) = stage.window.breaks
        assert broken.stream == "bank"
        assert broken.seen.until > broken.after
        await stage.window.settle(settled)
        assert stage.sources["bank"].acknowledged == []
        stage.window.forget(broken, ())
        assert stage.window.breaks == ()
        await stage.window.settle(stage.window.collect().settled)
        assert stage.sources["bank"].acknowledged == [broken.seen.until]

    Stage("bank").play(act)


def test_a_stream_with_a_break_that_has_no_gap_yet_settles_nothing() -> None:
    async def act(stage: Stage) -> None:
        stage.cluster.commit("bank")
        stage.cluster.commit("shop")
        stage.cluster.recreate_slot("shop")
        stage.cluster.commit("shop")
        await stage.arrived()
        (broken,) = stage.window.breaks
        collected = stage.window.collect()
        assert {pending.commit.stream for pending in collected.pending} == {"bank"}
        assert set(collected.settled) == {"bank"}
        stage.window.forget(broken, ())
        assert set(stage.window.collect().settled) == {"bank", "shop"}

    Stage("bank", "shop").play(act)


def test_what_a_failover_left_behind_is_told_apart_from_what_it_kept() -> None:
    async def act(stage: Stage) -> None:
        kept = stage.cluster.commit("bank")
        left = stage.cluster.commit("bank")
        await stage.arrived()
        stage.cluster.promote(kept.end, keep_slots=True)
        await stage.arrived()
        (broken,) = stage.window.breaks
        lost = stage.window.lost(broken, stage.cluster.lineage())
        assert [pending.commit.name for pending in lost] == [left.name]
        stage.window.forget(broken, lost)
        assert await stage.arrived() == [kept.name]

    Stage("bank").play(act)


def test_a_full_window_stops_reading_and_keeps_the_connection_alive() -> None:
    async def act(stage: Stage) -> None:
        for _ in range(4):
            stage.cluster.commit("bank")
            await asyncio.sleep(0.1)
        await asyncio.sleep(30)
        assert len(stage.window) == 3
        assert stage.sources["bank"].heartbeats >= 5
        await stage.window.settle(stage.window.collect().settled)
        assert len(await stage.arrived()) == 1

    Stage("bank", bound=3).play(act)


def test_a_commit_with_long_markers_or_many_tables_takes_the_room_of_several() -> None:
    async def act(stage: Stage) -> None:
        for heavy in ({"markers": ("x" * 1000, "y" * 1000)}, {"tables": {f"t{n}": Changes(1) for n in range(160)}}):
            for _ in range(4):
                stage.cluster.commit("bank", **heavy)
                await asyncio.sleep(0.1)
            await asyncio.sleep(30)
            assert len(stage.window) == 2
            await stage.window.settle(stage.window.collect().settled)
            assert len(await stage.arrived()) == 2
            await stage.window.settle(stage.window.collect().settled)

    Stage("bank", bound=30).play(act)


def test_a_window_that_was_full_of_what_a_failover_left_behind_is_read_again() -> None:
    async def act(stage: Stage) -> None:
        kept = stage.cluster.commit("bank")
        for _ in range(3):
            stage.cluster.commit("bank", markers=("x" * 1000,))
            await asyncio.sleep(0.1)
        assert len(await stage.arrived()) == 4
        stage.cluster.promote(kept.end, keep_slots=True)
        await asyncio.sleep(30)
        (broken,) = stage.window.breaks
        stage.window.forget(broken, stage.window.lost(broken, stage.cluster.lineage()))
        assert len(stage.window) == 1
        stage.cluster.commit("bank")
        await asyncio.sleep(30)
        assert len(stage.window) == 2

    Stage("bank", bound=20).play(act)


def test_waiting_for_more_ends_with_a_change_a_wake_up_or_the_moment() -> None:
    async def act(stage: Stage) -> None:
        await stage.window.more(0)
        began = stage.loop.time()
        await stage.window.more(began + 2)
        assert stage.loop.time() == pytest.approx(began + 2)
        stage.window.wake()
        await stage.window.more(began + 100)
        stage.loop.call_later(1, stage.cluster.commit, "bank")
        await stage.window.more(began + 100)
        assert stage.loop.time() == pytest.approx(began + 3)

    Stage("bank").play(act)


def test_what_no_rule_takes_wakes_nobody_before_a_second_is_over_and_then_it_does() -> None:
    async def act(stage: Stage) -> None:
        await asyncio.sleep(5)
        await stage.window.more(0)
        began, seen = stage.loop.time(), stage.window.tally.passed_over
        for number in range(20):
            stage.loop.call_later(0.1 * number, stage.cluster.commit, "bank")
        woken = 0
        while stage.loop.time() < began + 3:
            await stage.window.more(began + 3)
            woken += 1
        assert stage.window.tally.passed_over == seen + 20
        assert woken == 3, "twice for what came within two seconds, once at the end"

    Stage("bank", judge=lambda _: None).play(act)


def test_a_commit_at_or_before_what_was_settled_at_the_start_is_not_taken_again() -> None:
    stage = Stage("bank")
    first, second = stage.cluster.commit("bank"), stage.cluster.commit("bank")
    stage.window = Window(stage.sources.values(), {"bank": first.position}, lambda _: "all")

    async def act(stage: Stage) -> None:
        assert await stage.arrived() == [second.name]
        assert stage.sources["bank"].opened_after == [first.position]

    stage.play(act)


def test_the_end_of_the_log_is_the_furthest_word_of_the_newest_timeline() -> None:
    async def act(stage: Stage) -> None:
        stage.cluster.commit("bank")
        await stage.arrived()
        stage.cluster.promote(keep_slots=True)
        latest = stage.cluster.commit("bank")
        await stage.arrived()
        assert stage.window.log_ends == (latest.position,)

    stage = Stage("bank")
    assert stage.window.log_ends == ()
    stage.play(act)
