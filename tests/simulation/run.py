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
from datetime import timedelta
from functools import cache
from typing import Any, cast

from sqlalchemy import Engine

from connectors.memory import SEGMENT_BYTES, Cluster, World
from tests.simulation import checks
from tests.simulation.life import Life
from tests.simulation.story import WANTED_MARKER, WANTED_TABLE, Act, Story, Weather, tell
from tests.simulation.virtual import VirtualLoop
from tests.simulation.wire import Ended, Violation, Wire
from trigger import failpoint
from trigger.catalog import schema
from trigger.model import Changes, Commit, Extent, RecoveryPoint
from trigger.position import History, Lsn, Position

RESTART_SECONDS = 1.0
QUIET_SECONDS = 1500.0
"""Within this much virtual time after the story everything must be settled: the longest pause after failures is 600 s,
and a call may have begun to hang just before the end."""
STOP_SECONDS = 200.0
"""A stop waits for the round at hand, in which every call may hang once."""

SETTLED = """
    SELECT histories.system, histories.timeline, settled.through FROM settled
    JOIN histories ON histories.id = settled.history JOIN streams ON streams.id = settled.stream
    WHERE streams.name = ?
"""


@dataclass
class Result:
    """What one run gave."""

    seed: int
    log: list[str]
    violation: str = ""
    counts: dict[str, int] = field(default_factory=dict)


class Simulation:
    """The world of one seed, and the lives of the service in it."""

    def __init__(self, story: Story, engine: Engine) -> None:
        self.story = story
        self.engine = engine
        self.loop = VirtualLoop()
        self.world = World(seconds=self.loop.time)
        self.cluster: Cluster = self.world.cluster
        self.log: list[str] = []
        self.draw = random.Random(story.seed ^ 0x5EED)
        self.life: Life | None = None
        self.lives: list[Life] = []
        self.weather = story.weather
        self.catalog_full = False
        self.lost_snapshots: set[str] = set()
        self.covered_from: dict[str, Lsn] = {}
        self._long_xid: int | None = None
        self._calls = list(story.crash_at_call)
        self._turns = list(story.at_failpoint)

    def note(self, text: str) -> None:
        """Write a line into the event log."""
        self.log.append(f"{self.loop.time():12.6f} {text}")

    # ---- the run

    def play(self) -> None:
        """Play the story, let everything settle, judge; raises `Violation`."""
        for stream in self.story.streams:
            self.cluster.recreate_slot(stream)  # as `trigpoint init` does
            self.covered_from[stream] = self.cluster.flushed
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
        return Life(self.world, self.engine, self.story, wire, draw, self._reconciled, self._begins, self._thinned)

    async def _reconciled(self, stuck: Sequence[str]) -> None:
        """One pass at the start leaves nothing behind."""
        await checks.judge_pass(self, stuck)

    def _thinned(
        self, before: Sequence[RecoveryPoint], left: Sequence[RecoveryPoint], extents: Sequence[Extent]
    ) -> None:
        """One pass of thinning costs no state that could be restored before it."""
        checks.check_thinning(self, before, left, extents)

    def _begins(self, stream: str) -> None:
        """The service answers for a stream from where it first found it, once the catalog knows of the stream."""
        if self.settled(stream) is None:
            self.covered_from[stream] = self.cluster.slots[stream].confirmed

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
        bound = self.loop.time() + QUIET_SECONDS
        names = [act.name for act in self.story.acts]
        given_up = "damage_journal" not in names and names.count("promote") < 2
        while not self._is_settled():
            if self.loop.time() > bound:
                raise Violation(f"liveness: not settled {QUIET_SECONDS:g} s after the last mishap")
            if self.loop.time() > bound - QUIET_SECONDS / 2 and not given_up and self.life and not self.life.ended:
                self.note("an operator gives up what lies before holes in the journal, and ends of old timelines")
                self.life.give_up_the_past()
                given_up = True
            await self._until(self.loop.time() + 1.0, lives)
            self._act_flush()  # the end of a burst may come in later, and a server's log writer never rests
        self.note("all is settled")

    def _is_settled(self) -> bool:
        window, agenda = (self.life.window, self.life.agenda) if self.life and not self.life.ended else (None, None)
        if window is None or agenda is None or len(window) or window.breaks or agenda.open_gap or agenda.base is None:
            return False
        if agenda.base.ceiling is None or not self.cluster.lineage().includes(agenda.base.ceiling):
            return False
        if any(not answer.done() for life in self.lives for answer in life.answers if not life.ended):
            return False
        return all(self._is_settled_to_the_end(stream) for stream in self.story.streams)

    def _is_settled_to_the_end(self, stream: str) -> bool:
        mine = [c for c in self.truth() if c.stream == stream and c.end > self.covered_from[stream]]
        settled = self.settled(stream) if mine else None
        return not mine or (settled is not None and checks.is_past(self, mine[-1], settled))

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
        return Position(History(row[0], row[1]), Lsn(row[2])) if row else None

    def truth(self, timeline: int | None = None) -> list[Commit]:
        """Give every commit in the lineage of a timeline (the present one if None), in log order."""
        return [e.commit for e in self.cluster.entries(self.cluster.lineage(timeline)) if e.commit is not None]

    def _check_acknowledge(self, name: str, through: Position) -> None:
        settled = self.settled(name)
        lineage = self.cluster.lineage(settled.history.timeline) if settled else None
        if settled is None or lineage is None or not lineage.includes(through) or through.at > settled.at:
            raise Violation(f"P4: {name} is acknowledged up to {through}, the catalog has settled {settled} only")

    # ---- acts

    def _reach(self, name: str) -> None:
        if self.life is None:
            return
        self.life.wire.reach(name)
        if self._turns and self._turns[0][0] == name:
            _, left, turn = self._turns[0]
            self._turns[0] = (name, left - 1, turn)
            if left == 0:
                self._turns.pop(0)
                self.note(f"{turn} at failpoint {name}")
                getattr(self, f"_turn_{turn}")(self.life)

    def _turn_crash(self, life: Life) -> None:
        life.kill("there")
        raise Ended

    def _turn_failover(self, _life: Life) -> None:
        """The last commit is lost, and the new timeline goes beyond where it was."""
        self._act_promote(1, keep_slots=True)
        for _ in range(3):
            self._act_commit(self.story.streams[0], {}, (), 2000, "sync")

    def _turn_unseen(self, _life: Life) -> None:
        """A commit that no stream has seen lies before the ceiling of this round, and is lost in a failover."""
        flushed = self.cluster.flushed
        self._act_commit(self.story.streams[0], {}, (), 0, "async")
        self.loop.call_later(0.05, self._promote, flushed, True)

    def _turn_burst(self, _life: Life) -> None:
        """The host writes back what the server has written but not flushed, again and again."""
        for step in range(1, 7):
            self.loop.call_later(step * 0.0004, self._act_commit, self.story.streams[0], {}, (), 0, "written")
            self.loop.call_later(step * 0.0004, self._act_write_back)

    def _do(self, act: Act) -> None:
        self.note(f"act {act.name} {' '.join(map(str, act.arguments))}")
        getattr(self, f"_act_{act.name}")(*act.arguments)

    def _act_commit(self, stream: str, tables: Any, markers: tuple[str, ...], size: int, how: str) -> None:
        if not self.cluster.up:
            return
        self.cluster.commit(stream, tables, markers, data_bytes=size, synchronous=how == "sync")
        if how == "written":
            self.cluster.write()

    def _act_ddl(self, size: int) -> None:
        if self.cluster.up:
            self.cluster.write_ahead(size)
            self.cluster.flush()

    def _act_begin_long(self) -> None:
        self._long_xid = self.cluster.next_xid
        self.cluster.next_xid += 1

    def _act_end_long(self, stream: str) -> None:
        """Commit a transaction whose id is older than those of commits before it."""
        if self._long_xid is None or not self.cluster.up:
            return
        newest, self.cluster.next_xid = self.cluster.next_xid, self._long_xid
        committed = self.cluster.commit(stream, {WANTED_TABLE: Changes(updated=5)}, (WANTED_MARKER,))
        self.cluster.next_xid = newest
        assert committed.xid == self._long_xid

    def _act_write(self) -> None:
        if self.cluster.up:
            self.cluster.write()

    def _act_flush(self) -> None:
        if self.cluster.up:
            self.cluster.flush()

    def _act_flush_pages(self) -> None:
        if self.cluster.up:
            self.cluster.flush_pages()

    def _act_write_back(self) -> None:
        self.cluster.write_back()

    def _act_checkpoint(self) -> None:
        if self.cluster.up:
            self.cluster.checkpoint()

    def _act_demand(self) -> None:
        if self.life is not None and not self.life.ended:
            self.life.ask()

    def _act_stop(self) -> None:
        if self.life is not None and not self.life.ended:
            self.life.stop()

    def _act_crash(self) -> None:
        if self.life is not None:
            self.life.kill("by the story")

    def _act_drop_slot(self, stream: str) -> None:
        self.cluster.drop_slot(stream)

    def _act_recreate_slot(self, stream: str) -> None:
        self.cluster.recreate_slot(stream)

    def _act_advance_slot(self, stream: str) -> None:
        if stream in self.cluster.slots:
            self.cluster.advance_slot(stream)

    def _act_lose_slot(self, stream: str) -> None:
        if stream in self.cluster.slots:
            self.cluster.lose_slot(stream)

    def _act_cut_connections(self) -> None:
        self.cluster.cut_connections()

    def _act_server_crash(self, power: bool) -> None:
        if self.cluster.up:
            self.cluster.crash(power=power)

    def _act_server_restart(self) -> None:
        if not self.cluster.up:
            self.cluster.restart()

    def _act_promote(self, lost: int, keep_slots: bool) -> None:
        """Fail over, with the loss of the last few commits of this timeline."""
        own = [e.end for e in self.cluster.logs[self.cluster.timeline] if e.commit and e.end <= self.cluster.flushed]
        at = own[-1 - lost] if len(own) > lost else None
        self._promote(at, keep_slots)

    def _promote(self, at: Lsn | None, keep_slots: bool) -> None:
        began = self.cluster.lineage().forks
        if at is not None and at < max(*self.covered_from.values(), began[-1][1] if began else Lsn(0)):
            at = None
        self.cluster.promote(at, keep_slots=keep_slots)

    def _act_lose_snapshot(self, which: float) -> None:
        """Somebody deletes a snapshot behind our back; never the last, which would look like a storage not mounted."""
        point = self._some_snapshot(which)
        if point is not None and len(self.world.kept) > 1:
            del self.world.kept[point]
            self.lost_snapshots.add(point)

    def _act_lose_cut(self, which: float) -> None:
        """Somebody deletes one volume of a snapshot."""
        point = self._some_snapshot(which)
        if point is not None and self.world.kept[point].cuts:
            self.world.kept[point].cuts.popitem()
            self.lost_snapshots.add(point)

    def _some_snapshot(self, which: float) -> str | None:
        there = sorted(self.world.kept)
        return there[int(which * len(there))] if there else None

    def _act_storage_full(self) -> None:
        self.world.free_bytes = 0

    def _act_storage_room(self) -> None:
        self.world.free_bytes = 1 << 40

    def _act_catalog_full(self) -> None:
        self._set_catalog_full(True)

    def _act_catalog_room(self) -> None:
        self._set_catalog_full(False)

    def _set_catalog_full(self, full: bool) -> None:
        self.catalog_full = full
        if self.life is not None:
            self.life.wire.catalog_full = full

    def _act_write_error(self) -> None:
        self.world.write_errors.add("v0")

    def _act_clear_write_error(self) -> None:
        self.world.write_errors.clear()
        self.world.poisoned.clear()

    def _act_skew(self, seconds: float) -> None:
        self.world.skew += timedelta(seconds=seconds)

    def _act_damage_journal(self) -> None:
        """A segment of the journal is lost."""
        held = self.world.journal.get(self.cluster.timeline, [])
        if held:
            start, end = held[-1]
            segment = Lsn((start + (end - start) // 2) // SEGMENT_BYTES * SEGMENT_BYTES)
            self.world.damage_journal(self.cluster.timeline, segment, Lsn(segment + SEGMENT_BYTES))


# ---- seeds


@cache
def _catalog() -> tuple[Engine, bytes]:
    """Give one engine for all runs of this process, and what an empty catalog is like."""
    engine = schema.make_engine(":memory:")
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        schema.migrate(connection)
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


def simulate(seed: int) -> Result:
    """Give the result of a seed: its event log, and what it broke, if anything."""
    engine, empty = _catalog()
    _raw(engine).deserialize(empty)
    simulation = Simulation(tell(seed), engine)
    result = Result(seed, simulation.log)
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
