"""One life of the service: from its start to a stop, an error or a crash, over a world that survives it.

It starts what `service.work` starts, in the same order, from the real parts: reconcile, window, agenda, main path,
room, checkpoints. What is left out is what only a process has: the lock, the socket, signals.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

from sqlalchemy import Engine

from connectors.memory import (
    Cluster,
    MemoryAgent,
    MemoryClock,
    MemoryDatabase,
    MemorySource,
    MemoryStorage,
    World,
)
from tests.simulation.story import Story
from tests.simulation.virtual import inline
from tests.simulation.wire import Ended, Wire
from trigger.catalog import reconcile
from trigger.catalog.catalog import Catalog
from trigger.errors import TrigpointError
from trigger.keep.expire import release_log
from trigger.keep.room import Room
from trigger.model import Commit, Extent, RecoveryPoint, State, Volume
from trigger.ports import Break, Journal
from trigger.position import History, Position
from trigger.protect import pipeline
from trigger.protect.agenda import Agenda
from trigger.protect.logs import Logs
from trigger.protect.pipeline import Protected
from trigger.protect.qualify import Rules
from trigger.protect.window import Window

WATCH_SECONDS = 5.0
Bases = Sequence[RecoveryPoint]
FLUSH_DEADLINE_SECONDS = 30.0


class Witness(Protocol):
    """Who is told what a life does, and objects where it breaks a promise."""

    async def reconciled(self, stuck: Sequence[str]) -> None:
        """One pass has been made at the start; this is stuck in the storage."""

    def begins(self, stream: str) -> None:
        """A stream was opened for the first time."""

    def opened(self, stream: str, history: History, after: Position | None, broken: Break | None) -> None:
        """A stream is open in a history, behind a place or with a break."""

    def thinned(self, before: Bases, left: Bases, extents: Sequence[Extent]) -> None:
        """A pass of thinning: which bases stood before, which stand after it, what the journal held."""

    def released(self, bases: Bases, before: Sequence[Extent], after: Sequence[Extent]) -> None:
        """Old log was let go of: which bases are kept, what the journal held before, what it holds after."""

    def of(self, stream: str) -> Cluster:
        """Give the cluster that a stream is of."""

    def gives_word(self) -> bool:
        """Whether an operator says that a storage which shows nothing is really empty."""


class Released:
    """A journal that notes what it held right before and right after it let go of log: more is lost at other times."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.around_release: tuple[Sequence[Extent], Sequence[Extent]] = (), ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)

    async def release(self, starts: Collection[Position]) -> int:
        """Let go of log, and note what there was."""
        before = await self._journal.extents()
        released = await self._journal.release(starts)
        self.around_release = before, await self._journal.extents()
        return released


@dataclass(eq=False)
class Life:
    """A service that lives until it is stopped, fails, or is killed.

    Args:
        world: what outlives it.
        engine: the catalog's database, which outlives it too.
        story: rules, options, volumes.
        wire: what its calls pass through.
        draw: for the ids of its points.
    """

    world: World
    engine: Engine
    story: Story
    wire: Wire
    draw: random.Random
    journal: Journal
    witness: Witness
    """Told what it does that must not cost anything."""
    window: Window | None = None
    agenda: Agenda | None = None
    cluster: Protected | None = None
    room: Room | None = None
    delivered: list[Commit] = field(default_factory=list)
    """What has come into its window."""
    answers: list[asyncio.Future[RecoveryPoint]] = field(default_factory=list)
    too_early: list[str] = field(default_factory=list)
    """Of the answers, those that do not hold what was there when they were asked for."""
    storage: MemoryStorage = field(init=False)
    noted: Released = field(init=False)
    ended: str = ""
    """How it ended; "" while it lives."""
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.noted = Released(self.journal)
        self.storage = MemoryStorage(self.world, capabilities=self.story.capabilities, budget=self.story.budget)

    async def run(self) -> str:
        """Live; gives how it ended."""
        self.wire.end = self.kill
        self._start(self._body)
        await self._over.wait()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            await _finish(task)
        self.world.kill_service()
        return self.ended

    def kill(self, reason: str) -> None:
        """End it at once, as SIGKILL does: nothing it does from here on has an effect."""
        if not self.ended:
            self.wire.log(f"killed {reason}")
            self.wire.alive = False
            self._end("killed")
            present = asyncio.current_task()
            for task in self._tasks:
                if task is not present:  # the present one meets the end where it is
                    task.cancel()

    def stop(self) -> None:
        """Ask it to end after the round at hand, as SIGTERM does."""
        if self.agenda is not None and self.window is not None:
            self.agenda.stopping = True
            self.window.wake()

    def ask(self) -> None:
        """Ask for a point, as `trigpoint point` does."""
        if self.agenda is not None and self.window is not None:
            answer = self.agenda.ask("asked for")
            self.answers.append(answer)
            for cluster in self.world.clusters:
                answer.add_done_callback(partial(self._answered, cluster, cluster.inserted, cluster.session))
            self.window.wake()

    def _answered(self, cluster: Cluster, asked: int, session: int, answer: asyncio.Future[RecoveryPoint]) -> None:
        """Note a point that does not hold what was there when it was asked for, on a server that lost nothing since."""
        if answer.cancelled() or cluster.session != session:
            return
        point = answer.result()
        present = self.world.lives(cluster).lineage().history
        mark = point.mark_in(present)
        if mark is None or point.state is not State.SEALED:
            return
        if mark.floor.history != present or mark.floor.at < asked:
            self.too_early.append(f"point {point.number} holds log up to {mark.floor}, it was asked for at {asked}")

    def give_up_the_past(self) -> None:
        """Give up all but the newest base, as `trigpoint expire` does."""
        self._start(self._give_up_the_past)

    async def _give_up_the_past(self) -> None:
        assert self.cluster is not None
        assert self.room is not None
        if newest := await self.cluster.catalog.latest():
            await self.room.give_up_before(newest.id)
            self.witness.released(await self.cluster.catalog.bases(), *self.noted.around_release)

    def _end(self, how: str) -> None:
        if not self.ended:
            self.ended = how
            self._over.set()

    def _start(self, act: Callable[[], Awaitable[None]]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(self._watched(act)))

    async def _watched(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except Ended:
            self._end("killed")
        except TrigpointError as error:
            self.wire.log(f"the service fails: {error}")
            self._end("failed")
        except Exception:
            self._end("broken")
            raise

    async def _body(self) -> None:
        """Begin as the service begins, then work until the main path ends."""
        cluster = self.cluster = await self._parts()
        self.room = Room(cluster.catalog, cluster.storage, cast("Journal", self.noted), inline)
        believed = self.witness.gives_word()
        done = await reconcile.reconcile(cluster.catalog, cluster.storage, accept_loss=believed)
        cluster.leftovers[:] = done.stuck
        for database in cluster.logs.databases:
            database.recognise(await cluster.catalog.seen())  # again: points may have been adopted
        await self.witness.reconciled(cluster.leftovers)
        for agent in cluster.agents:
            await agent.prepare(cluster.volumes)
        settled = {name: await cluster.catalog.settled(name) for name in self.story.streams}
        sources = [self.wire.to("source", _Noted(self, name)) for name in self.story.streams]
        rules = Rules(self.story.rules.rules)

        def judge(commit: Commit) -> str | None:
            self.delivered.append(commit)
            return rules.judge(commit)

        self.window = Window(sources, settled, judge)
        self.agenda = await pipeline.agenda_of(cluster)
        self._start(self.journal.run)
        for name in self.story.streams:
            self._start(partial(self.window.follow, name))
        self._start(partial(self._every, WATCH_SECONDS, partial(self._watch_checkpoints, cluster)))
        self._start(partial(self._every, WATCH_SECONDS, partial(self._keep_room, cluster)))
        await pipeline.protect(cluster, self.window, self.agenda)
        self._end("stopped")

    def will_be_given_again(self, stream: str, broken: Break) -> None:
        """Take back what a stream that was put back gives once more: until it has, a gap is the word for it."""

        def again(commit: Commit) -> bool:
            until, mine = broken.until, commit.history
            before = commit.end <= until.at if mine == until.history else mine.age < until.history.age
            return commit.stream == stream and broken.lineage.includes(commit.position) and not before

        self.delivered[:] = [commit for commit in self.delivered if not again(commit)]

    async def _parts(self) -> Protected:
        catalog = await Catalog.open(self.engine, run=self.wire.run)
        databases = {
            cluster: self.wire.to("database", MemoryDatabase(self.world, cluster)) for cluster in self.world.clusters
        }
        for database in databases.values():
            database.recognise(await catalog.seen())
        return Protected(
            logs=Logs({stream: databases[self.witness.of(stream)] for stream in self.story.streams}),
            volumes=tuple(Volume(f"v{number}", f"/v{number}") for number in range(self.story.volumes)),
            agents=(self.wire.to("agent", MemoryAgent(self.world)),),
            storage=self.wire.to("storage", self.storage),
            catalog=catalog,
            clock=MemoryClock(self.world),
            options=self.story.points,
            flush_deadline_seconds=FLUSH_DEADLINE_SECONDS,
            random=self.draw,
        )

    async def _watch_checkpoints(self, cluster: Protected) -> None:
        assert self.agenda is not None
        assert self.window is not None
        databases = cluster.logs.databases
        self.agenda.redos = [redo for database in databases if (redo := await database.redo())]
        if any(self.agenda.wants_checkpoint(end) for end in self.window.log_ends):
            for database in databases:
                await database.checkpoint()
            self.agenda.redos = [redo for database in databases if (redo := await database.redo())]
        self.window.wake()

    async def _keep_room(self, cluster: Protected) -> None:
        assert self.agenda is not None
        before, held = await cluster.catalog.bases(), await self.journal.extents()
        assert self.room is not None
        gone = await self.room.make(self.agenda.replay_limit_bytes)
        if gone:
            left = [base for base in before if base.id not in {point.id for point in gone}]
            self.witness.thinned(before, left, [*held, *await self.journal.extents()])
            await release_log(cluster.catalog, cast("Journal", self.noted))
            self.witness.released(await cluster.catalog.bases(), *self.noted.around_release)
        if self.room.eased:
            self.agenda.retry()

    async def _every(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await act()
            except (TrigpointError, OSError) as error:
                self.wire.log(f"not now: {error}")
            await asyncio.sleep(seconds)


class _Noted(MemorySource):
    """A source that writes into the event log what it gives, and repeats, as the port allows."""

    def __init__(self, life: Life, name: str) -> None:
        super().__init__(life.world, name, life.witness.of(name), repeats=True)
        self._life = life

    async def open(self, after: Position | None) -> Break | None:
        """Connect; what the service is answerable for begins where a stream is opened for the first time."""
        broken = await super().open(after)
        if after is None:
            self._life.witness.begins(self.name)
        if broken is not None:
            self._life.will_be_given_again(self.name, broken)
        self._life.witness.opened(self.name, self._lineage.history, after, broken)
        return broken

    async def read(self) -> Any:
        """Give what has arrived."""
        batch = await super().read()
        self._life.wire.log(f"source.read {self.name} gives {len(batch.commits)} commits through {batch.through}")
        return batch


async def _finish(task: asyncio.Task[None]) -> None:
    """Wait for a cancelled task; what it raised on its way out is raised here."""
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise
    except Ended:
        pass
