"""The window keeps what is pending where streams go from history to history, and back, in whatever order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tests.simulation.virtual import VirtualLoop
from trigger.errors import SourceError
from trigger.model import Commit
from trigger.ports import Batch, Break
from trigger.position import History, Lineage, Name, Position
from trigger.protect.window import Broken, Window


class Scripted:
    """A source that gives what it was told to, one batch a connection, and is then disconnected."""

    heartbeat_seconds = 10.0
    trouble = ""
    stays = False
    """Whether the last connection holds."""

    def __init__(self, name: str, *script: tuple[Break | None, Batch]) -> None:
        self.name = name
        self._script = list(script)
        self._batches: list[Batch] = []

    async def open(self, after: Position | None) -> Break | None:
        if not self._script:
            await asyncio.Event().wait()
        seen, batch = self._script.pop(0)
        self._batches = [batch]
        return seen

    async def read(self) -> Batch:
        if not self._batches:
            await asyncio.sleep(1 if self._script or not self.stays else 1000)
            raise SourceError("the connection broke")
        return self._batches.pop()

    async def acknowledge(self, through: Position) -> None:
        pass

    async def heartbeat(self) -> None:
        pass

    async def close(self) -> None:
        pass


def commit_at(history: History, at: int, stream: str = "bank") -> Commit:
    return Commit(stream, history, history.place(at - 1), history.place(at), Name("", at), at)


def play_scripted(sources: Sequence[Scripted], act: Callable[[Window], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        window = Window(sources, {}, lambda _: "all")
        readers = [asyncio.ensure_future(window.follow(source.name)) for source in sources]
        try:
            await act(window)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)

    VirtualLoop().run(main())


def test_what_a_server_that_is_back_delivers_again_is_pending_once() -> None:
    """A cluster that was upgraded, and then given up for the one of before, which goes on where it was."""
    old, new = History("postgres", "7001", 1), History("postgres", "7002", 1)
    first, second, third = commit_at(old, 10), commit_at(old, 20), commit_at(new, 5)
    source = Scripted(
        "bank",
        (None, Batch([first, second], second.position)),
        (Break(Position(new, 2), "another cluster", Lineage(new)), Batch([third], third.position)),
        (Break(Position(old, 10), "another cluster", Lineage(old)), Batch([second], second.position)),
    )

    async def act(window: Window) -> None:
        await asyncio.sleep(10)
        assert [broken.seen.until for broken in window.breaks] == [Position(new, 2), Position(old, 10)]
        for broken in window.breaks:
            window.forget(broken, ())
        collected = []
        while pending := window.collect().pending:
            collected.append([one.commit for one in pending])
            await window.settle(window.collect().settled)
        assert collected == [[first], [third], [second]]

    play_scripted([source], act)


def test_of_two_logs_the_one_whose_commit_waits_longest_comes_first_whatever_it_is_called() -> None:
    early, late = History("memory", "9", 1), History("binlog", "1", 0)
    waits, busy = commit_at(early, 10, "far"), [commit_at(late, at, "near") for at in (10, 20)]

    async def act(window: Window) -> None:
        await asyncio.sleep(0.5)
        assert [one.commit for one in window.collect().pending] == [waits]
        await window.settle(window.collect().settled)
        await asyncio.sleep(1)
        assert [one.commit for one in window.collect().pending] == busy

    near, far = ((None, Batch(busy[:1], busy[0].position)), (None, Batch(busy[1:], busy[1].position))), waits
    play_scripted([Scripted("far", (None, Batch([far], far.position))), Scripted("near", *near)], act)


def test_a_stream_that_cannot_come_back_after_a_failover_does_not_keep_the_others_from_their_points() -> None:
    old, new = History("postgres", "7001", 1), History("postgres", "7001", 2)
    left, mine = commit_at(old, 20, "far"), commit_at(new, 30, "near")
    far = Scripted("far", (None, Batch([left], left.position)))
    near = Scripted(
        "near",
        (None, Batch([], Position(old, 10))),
        (Break(Position(new, 10), "a failover", Lineage(new)), Batch([mine], mine.position)),
    )
    near.stays = True

    async def act(window: Window) -> None:
        await asyncio.sleep(10)
        assert dict(window.connected()) == {"far": False, "near": True}
        for broken in window.breaks:
            window.forget(broken, ())
        collected = window.collect()
        assert [one.commit for one in collected.pending] == [mine]
        assert set(collected.settled) == {"near"}
        due = window.oldest
        await window.settle(collected.settled)
        assert (due and due.commit, window.oldest) == (mine, None), "a round could do nothing with what is left"
        assert window.waiting_since is not None

    play_scripted([far, near], act)


def test_of_a_batch_that_leads_over_forks_one_history_after_the_other_is_settled() -> None:
    first, second, third = (commit_at(History("postgres", "7001", branch), branch * 10) for branch in (1, 2, 3))
    begins = Batch([], Position(first.history, 5))
    source = Scripted("bank", (None, begins), (None, Batch([first, second, third], third.position)))

    async def act(window: Window) -> None:
        await asyncio.sleep(10)
        for commit in (first, second, third):
            collected = window.collect()
            assert [one.commit for one in collected.pending] == [commit]
            await window.settle(collected.settled)
        assert not len(window)

    play_scripted([source], act)


def test_what_a_later_history_settled_lets_go_of_nothing_where_the_server_went_back() -> None:
    """As where a restore in place is undone: commits of the timeline of before come again behind those of the later."""
    old, new = History("postgres", "7001", 1), History("postgres", "7001", 2)
    later, mine = commit_at(new, 30), commit_at(old, 40)
    source = Scripted(
        "bank",
        (None, Batch([later], later.position)),
        (Break(Position(old, 35), "undone", Lineage(old)), Batch([mine], mine.position)),
    )

    async def act(window: Window) -> None:
        await asyncio.sleep(10)
        for broken in window.breaks:
            window.forget(broken, window.lost(broken, Lineage(old)))
        await window.settle({"bank": later.position})
        assert [one.commit for one in window.collect().pending] == [mine]

    play_scripted([source], act)


def test_nor_where_it_has_left_once_more_what_it_went_back_to_since() -> None:
    """As where a log begins anew behind a timeline that was gone back to, before anything of that was settled."""
    old, new = History("postgres", "7001", 1), History("postgres", "7001", 2)
    later, mine, anew = commit_at(new, 30), commit_at(old, 40), History("postgres", "7001", 1, 1)
    source = Scripted(
        "bank",
        (None, Batch([later], later.position)),
        (Break(Position(old, 35), "undone", Lineage(old)), Batch([mine], mine.position)),
        (Break(Position(anew, 90), "begun anew", Lineage(anew)), Batch([], Position(anew, 90))),
    )

    async def act(window: Window) -> None:
        await asyncio.sleep(10)
        undone, begun_anew = window.breaks
        window.forget(undone, window.lost(undone, Lineage(old)))
        await window.settle({"bank": later.position})
        assert [pending.commit for pending in window.lost(begun_anew, Lineage(anew))] == [mine]

    play_scripted([source], act)


def test_what_is_pending_where_a_server_is_back_is_not_kept_beside_what_its_slot_gives_once_more() -> None:
    """The slot went back to before the history began, and the stream begins there."""
    first, second, third = (History("postgres", "7001", branch) for branch in (1, 2, 3))
    present = Lineage(second, ((1, 15),))
    mine, away = commit_at(second, 20), commit_at(third, 30)
    again = commit_at(second, 20)
    source = Scripted(
        "bank",
        (None, Batch([mine], mine.position)),
        (Break(Position(third, 25), "a failover", Lineage(third)), Batch([away], away.position)),
        (Break(Position(first, 5), "undone", present), Batch([again], again.position)),
    )

    async def act(window: Window) -> None:
        await asyncio.sleep(10)
        for broken in window.breaks:
            lost = window.lost(broken, present)
            window.forget(broken, lost)
        assert [id(one.commit) for one in window.collect().pending] == [id(again)]

    play_scripted([source], act)


def test_what_each_branch_had_behind_its_end_is_a_gap_and_what_is_given_is_none() -> None:
    one, two, three = (History("postgres", "7001", branch) for branch in (1, 2, 3))
    first = (Position(one, 100), Position(two, 100))
    second = (Position(two, 200), Position(three, 200))

    lineage = Lineage(three, ((1, 100), (2, 200)))

    def holes(after: Position, until: Position) -> list[tuple[Position, Position]]:
        return list(Broken("bank", after, Break(until, "a failover", lineage)).holes)

    kept = Position(one, 70)
    assert holes(kept, kept) == [first, second]
    beyond = Position(one, 130)
    assert holes(beyond, first[1]) == [(beyond, first[1]), second]
    ahead = Position(three, 250)
    assert holes(kept, ahead) == [(kept, ahead)], "it takes in all that was left on the way"
    assert holes(Position(three, 210), ahead) == [(Position(three, 210), ahead)]
