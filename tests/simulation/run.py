"""One simulated run: a seed's story played to its end, then judged.

The world and the catalog's committed state outlive the service; lives of the service follow one another over them.
When the story has ended nothing goes wrong any more, and the service must settle everything within a bound of
virtual time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import cast

from sqlalchemy import Engine

from connectors.memory import Cluster, MemoryJournal, NoLog, World
from connectors.memory.cluster import Copy
from tests.simulation import checks, restores, version_1
from tests.simulation.acts import Acts
from tests.simulation.life import Life
from tests.simulation.story import Act, Story, Weather, tell
from tests.simulation.truth import Truth
from tests.simulation.virtual import VirtualLoop
from tests.simulation.wire import Violation, Wire
from trigger import failpoint
from trigger.catalog import migrations, schema
from trigger.model import Extent, RecoveryPoint
from trigger.ports import Break, Journal
from trigger.position import History, Position

RESTART_SECONDS = 1.0
QUIET_SECONDS = 1500.0
"""Within this much virtual time after the story everything must be settled: the longest pause after failures is 600 s,
and a call may have begun to hang just before the end."""
MOST_EVENTS = 4000
"""A whole story makes some hundred, the longest of a thousand stories 1,700: who does more does it for ever."""
STOP_SECONDS = 200.0
"""A stop waits for the round at hand, in which every call may hang once."""

SETTLED = """
    SELECT histories.kind, histories.system, histories.branch, histories.incarnation, settled.through FROM settled
    JOIN histories ON histories.id = settled.history JOIN streams ON streams.id = settled.stream
    WHERE streams.name = ?
"""

WRITTEN = """
    SELECT histories.system, histories.incarnation FROM gaps
    JOIN histories ON histories.id IN (gaps.after_history, gaps.until_history) WHERE gaps.stream = ?
"""


@dataclass
class Result:
    """What one run gave."""

    seed: int
    log: list[str]
    violation: str = ""
    sort: str = ""
    """Of which kind the databases were."""
    counts: dict[str, int] = field(default_factory=dict)


class Simulation(Acts):
    """The world of one seed, and the lives of the service in it."""

    def __init__(self, story: Story, engine: Engine) -> None:
        self.story = story
        self.engine = engine
        self.loop = VirtualLoop()
        self.world = World(manners=story.manners, seconds=self.loop.time)
        self.world.homes = {f"v{number}": cluster for number, cluster in enumerate(self.world.clusters)}
        self.truth = Truth(self.world)
        self.journal: Journal = MemoryJournal(self.world) if story.manners[0].replays else NoLog()
        self.log: list[str] = []
        self.draw = random.Random(story.seed ^ 0x5EED)
        self.life: Life | None = None
        self.lives: list[Life] = []
        self.weather = story.weather
        self.catalog_full = False
        self.lost_snapshots: set[str] = set()
        self.not_ours: dict[str, set[int]] = {stream: set() for stream in story.streams}
        """By stream the commits that were there before the service was first told of it."""
        self.began_at: dict[str, int] = {}
        """By stream where the service found it first, as long as the log is the same."""
        self.promises = 0
        self.copies: dict[Cluster, list[Copy]] = {cluster: [] for cluster in self.world.clusters}
        self._long_xid: tuple[str, int] | None = None
        self._calls = list(story.crash_at_call)
        self._turns = list(story.at_failpoint)

    def note(self, text: str) -> None:
        """Write a line into the event log; raises `Violation` where it has no end."""
        self.log.append(f"{self.loop.time():12.6f} {text}")
        if len(self.log) % MOST_EVENTS == 0:
            raise Violation(f"liveness: {len(self.log)} events, and no end of them")

    # ---- the run

    def play(self) -> None:
        """Play the story, let everything settle, judge; raises `Violation`."""
        for stream in self.story.streams:
            self.of(stream).recreate_slot(stream)  # as `trigpoint init` does
        failpoint.hook = self._reach
        try:
            self.loop.run(self._main())
        finally:
            failpoint.hook = None

    async def _main(self) -> None:
        for act in self.story.acts:
            self.loop.call_at(act.at, self._do, act)
        lives = asyncio.ensure_future(self._live())
        try:
            await self._until(self.story.ends_at, lives)
            self._calm()
            await self._settled(lives)
            await self._stop(lives)
        finally:
            lives.cancel()
            if self.life is not None:
                self.life.kill("at the end of the test")
            await asyncio.wait([lives])
        await checks.judge(self)

    async def _until(self, moment: float, lives: asyncio.Future[None]) -> None:
        await asyncio.wait([lives], timeout=moment - self.loop.time())
        if lives.done():
            lives.result()

    async def _live(self) -> None:
        """Start the service again and again, as systemd does, until it is to stop for good."""
        while True:
            if len(self.lives) + 1 in self.story.older_at_lives:
                self.note("all that is kept is put into the form of version 1")
                version_1.go_back(_raw(self.engine), self.world)
            life = self.life = self._new_life()
            self.lives.append(life)
            self.note(f"life {len(self.lives)} begins")
            how = await life.run()
            self.note(f"life {len(self.lives)} ended: {how}")
            await asyncio.sleep(RESTART_SECONDS)

    def _new_life(self) -> Life:
        chaos = self.loop.time() < self.story.ends_at
        wire = Wire(self.note, self.weather, self.draw, self._calls.pop(0) if self._calls and chaos else None)
        wire.catalog_full = self.catalog_full
        wire.before["source.acknowledge"] = self._check_acknowledge
        draw = random.Random(self.draw.getrandbits(64))
        return Life(self.world, self.engine, self.story, wire, draw, self.journal, self)

    async def reconciled(self, stuck: Sequence[str]) -> None:
        """One pass at the start leaves nothing behind."""
        await checks.judge_pass(self, stuck)

    def thinned(
        self, before: Sequence[RecoveryPoint], left: Sequence[RecoveryPoint], extents: Sequence[Extent]
    ) -> None:
        """One pass of thinning costs no state that could be restored before it."""
        restores.check_thinning(self, before, left, extents)

    def released(self, bases: Sequence[RecoveryPoint], before: Sequence[Extent], after: Sequence[Extent]) -> None:
        """Old log that was let go of costs no state either."""
        restores.check_release(self, bases, before, after)

    def opened(self, stream: str, history: History, after: Position | None, broken: Break | None) -> None:
        """What is lost of a log is answered for by the streams that were open in it; a gap takes in nothing else."""
        self.truth.is_open(stream, self.of(stream), history, after, broken)
        if after is not None and broken is not None:
            checks.check_break(self, stream, after, broken)
        elif after is not None:
            self.truth.is_back(stream, history, _raw(self.engine).execute(WRITTEN, (stream,)).fetchall())

    def gives_word(self) -> bool:
        """An operator knows that the last snapshot was deleted, and says so."""
        return bool(self.lost_snapshots) and not self.world.kept

    def begins(self, stream: str) -> None:
        """The service answers for a stream from where it first found it, once the catalog knows of the stream."""
        if self.settled(stream) is None:
            cluster = self.of(stream)
            begin = self.began_at[stream] = cluster.slots[stream].confirmed
            there = [c for at, c in self.truth.of_present(cluster) if at is None or c.end <= begin]
            there += [commit for _, commit in self.truth.flushed_and_lost()]
            self.not_ours[stream] = {id(commit) for commit in there if commit.stream == stream}

    def _calm(self) -> None:
        """End everything that goes wrong."""
        self.note("calm from here on")
        self.weather = Weather()
        self._turns.clear()
        for act in ("catalog_room", "storage_room", "clear_write_error", "server_restart", "flush"):
            self._do(Act(0.0, act))
        if self.life is not None:
            self.life.wire.weather = self.weather
            self.life.wire.spare()

    async def _settled(self, lives: asyncio.Future[None]) -> None:
        """Wait until every stream is settled up to the end of its log."""
        if self.gives_word() and self.life is not None and not self.life.ended:
            self.life.kill("by an operator, who starts it with that word")
        bound = self.loop.time() + QUIET_SECONDS
        given_up = not self._may_be_used_up()
        while not self._is_settled():
            if self.loop.time() > bound:
                raise Violation(f"liveness: not settled {QUIET_SECONDS:g} s after the last mishap")
            if self.loop.time() > bound - QUIET_SECONDS / 2 and not given_up and self.life and not self.life.ended:
                self.note("an operator gives up what lies before holes in the journal, and ends of old timelines")
                self.life.give_up_the_past()
                given_up = True
            await self._until(self.loop.time() + 1.0, lives)
            self._flush_all()  # the end of a burst may come in later, and a server's log writer never rests
        self.note("all is settled")

    def _may_be_used_up(self) -> bool:
        """Whether the storage may be full of points to which no log leads, so that an operator has to make room.

        A hole does that, and so does every end of a log that comes to an end, and a clock that was put back: by time
        nothing of before leads to the first point behind it. A few of them together are more than the budget.
        """
        acts, branches = self.story.acts, all(manner.branches for manner in self.story.manners)
        names = [*(act.name for act in acts), *(turn for _, _, turn in self.story.at_failpoint)]
        back = [act for act in acts if act.name == "skew" and str(act.arguments[0]).startswith("-")]
        ends = sum(map(names.count, ("promote", "failover", "unseen")))
        ends *= 1 if branches else 2  # another server's log has a beginning of its own too
        return bool({"damage_journal", "put_back", "reset_log"} & {*names}) or ends + len(back) >= 2

    def _is_settled(self) -> bool:
        window, agenda = (self.life.window, self.life.agenda) if self.life and not self.life.ended else (None, None)
        if window is None or agenda is None or len(window) or window.breaks or agenda.open_gap or agenda.base is None:
            return False
        if not all(self._has_come_to(stream, window.reached().get(stream)) for stream in self.story.streams):
            return False
        if not all(self._is_based_on(cluster, agenda.base) for cluster in self.world.clusters):
            return False
        if any(not answer.done() for life in self.lives for answer in life.answers if not life.ended):
            return False
        return all(self._is_settled_to_the_end(stream) for stream in self.story.streams)

    def _has_come_to(self, stream: str, through: Position | None) -> bool:
        """Whether a stream goes on in the present history of its cluster."""
        return through is not None and through.history == self.truth.present(self.of(stream))

    def _is_based_on(self, cluster: Cluster, base: RecoveryPoint) -> bool:
        """Whether the newest base is in the past of a cluster, whose present history the drivers know."""
        present = self.truth.present(cluster)
        mark = base.mark_in(present) if present else None
        if present is None or mark is None or mark.ceiling is None:
            return False
        return self.truth.includes(present, mark.ceiling)

    def _is_settled_to_the_end(self, stream: str) -> bool:
        there = [(at, c) for at, c in self.truth.of_present(self.of(stream)) if c.stream == stream]
        mine = [(at.history, c.end) for at, c in there if at and id(c) not in self.not_ours[stream]]
        settled = self.settled(stream) if mine else None
        return not mine or (settled is not None and self.truth.is_past(*mine[-1], settled))

    async def _stop(self, lives: asyncio.Future[None]) -> None:
        """Stop the service as SIGTERM does: it must end by itself."""
        life = self.life
        assert life is not None
        self.note("stop")
        life.stop()
        bound = self.loop.time() + STOP_SECONDS
        while not life.ended:
            if self.loop.time() > bound:
                raise Violation(f"liveness: still running {STOP_SECONDS:g} s after it was told to stop")
            await self._until(self.loop.time() + 0.1, lives)
        if life.ended != "stopped":
            raise Violation(f"told to stop, the service {life.ended}")

    # ---- what checks need to know

    def settled(self, stream: str) -> Position | None:
        """Give how far the catalog says that a stream is settled; read past the code under test."""
        row = _raw(self.engine).execute(SETTLED, (stream,)).fetchone()
        return Position(History(*row[:4]), row[4]) if row else None

    def _check_acknowledge(self, name: str, through: Position) -> None:
        settled = self.settled(name)
        if settled is None or not self.world.past(settled.history).includes(through) or through.at > settled.at:
            raise Violation(f"P4: {name} is acknowledged up to {through}, the catalog has settled {settled} only")


# ---- seeds


@cache
def _catalog() -> tuple[Engine, bytes]:
    """Give one engine for all runs of this process, and what an empty catalog is like."""
    engine = schema.make_engine(":memory:")
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        migrations.migrate(connection)
    return engine, _raw(engine).serialize()


def _raw(engine: Engine) -> sqlite3.Connection:
    return cast("sqlite3.Connection", engine.raw_connection().driver_connection)


@contextmanager
def _logged(simulation: Simulation) -> Iterator[None]:
    """Write what the service logs into the event log, and nowhere else."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            simulation.note(f"{record.levelname.lower()} {record.name}: {record.getMessage()}")

    logger, handler = logging.getLogger("trigger"), Handler()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def simulate(seed: int, sort: str = "") -> Result:
    """Give the result of a seed: its event log, and what it broke, if anything; `sort` as in `story.tell`."""
    engine, empty = _catalog()
    _raw(engine).deserialize(empty)
    story = tell(seed, sort)
    simulation = Simulation(story, engine)
    result = Result(seed, simulation.log, sort=story.sort)
    with _logged(simulation):
        try:
            simulation.play()
        except Violation as violation:
            result.violation = str(violation)
        except Exception as error:  # whatever the product raises that it does not handle is a finding
            simulation.log += traceback.format_exception(error)
            result.violation = f"unexpected {type(error).__name__}: {error}"
    result.counts = checks.counts(simulation)
    return result
