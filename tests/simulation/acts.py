"""The acts of a story: everything that happens to the world, by name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from connectors.memory import Cluster, World
from connectors.memory.cluster import Copy
from tests.simulation.story import WANTED_MARKER, WANTED_TABLE, Act, Story
from tests.simulation.truth import Truth
from tests.simulation.wire import Ended
from trigger.model import Changes

if TYPE_CHECKING:
    from tests.simulation.life import Life
    from tests.simulation.virtual import VirtualLoop


class Acts:
    """What can happen to a world; `_act_<name>` does what an act of that name says.

    What is not said to which of several clusters, happens to the one that the act's time picks.
    """

    story: Story
    world: World
    truth: Truth
    loop: VirtualLoop
    life: Life | None
    catalog_full: bool
    lost_snapshots: set[str]
    began_at: dict[str, int]
    copies: dict[Cluster, list[Copy]]
    cluster: Cluster
    """The one at hand."""
    _turns: list[tuple[str, int, str]]
    _long_xid: tuple[str, int] | None

    def note(self, text: str) -> None:
        """Write a line into the event log."""
        raise NotImplementedError

    def of(self, stream: str) -> Cluster:
        """Give the cluster that a stream is of."""
        return self.world.clusters[self.story.streams.index(stream) % len(self.world.clusters)]

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
        self.cluster = self.of(self.story.streams[0])
        self._act_promote(1, keep_slots=True)
        for _ in range(3):
            self._act_commit(self.story.streams[0], {}, (), 2000, "sync")

    def _turn_unseen(self, _life: Life) -> None:
        """A commit that no stream has seen lies before the ceiling of this round, and is lost in a failover."""
        cluster = self.of(self.story.streams[0])
        flushed = cluster.flushed
        self._act_commit(self.story.streams[0], {}, (), 0, "async")
        self._later(0.05, self._promote, cluster, flushed, True)

    def _turn_put_back(self, _life: Life) -> None:
        """An older copy is put back, and goes beyond where the log was."""
        self.cluster = self.of(self.story.streams[0])
        self._act_put_back(0.9, 3)

    def _turn_burst(self, _life: Life) -> None:
        """The host writes back what the server has written but not flushed, again and again."""
        for step in range(1, 7):
            self._later(step * 0.0004, self._act_commit, self.story.streams[0], {}, (), 0, "written")
            self._later(step * 0.0004, self.of(self.story.streams[0]).write_back)

    def _later(self, seconds: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Let something happen a little later, unless the story has ended by then."""
        if self.loop.time() + seconds < self.story.ends_at:
            self.loop.call_later(seconds, happen, *arguments)

    def _do(self, act: Act) -> None:
        self.note(f"act {act.name} {' '.join(map(str, act.arguments))}")
        self.cluster = self.world.clusters[int(act.at * 1e6) % len(self.world.clusters)]
        getattr(self, f"_act_{act.name}")(*act.arguments)

    def _act_commit(self, stream: str, tables: Any, markers: tuple[str, ...], size: int, how: str) -> None:
        cluster = self.of(stream)
        if not cluster.up:
            return
        cluster.commit(stream, tables, markers, data_bytes=size, synchronous=how == "sync")
        if how == "written":
            cluster.write()

    def _act_ddl(self, size: int) -> None:
        if self.cluster.up:
            self.cluster.write_ahead(size)
            self.cluster.flush()

    def _act_begin_long(self, stream: str) -> None:
        cluster = self.of(stream)
        self._long_xid = cluster.system, cluster.next_xid
        cluster.next_xid += 1

    def _act_end_long(self, stream: str) -> None:
        """Commit a transaction whose id is older than those of commits before it."""
        cluster = self.of(stream)
        if self._long_xid is None or not cluster.up or self._long_xid[0] != cluster.system:
            return
        number = self._long_xid[1]
        newest, cluster.next_xid = cluster.next_xid, number
        cluster.commit(stream, {WANTED_TABLE: Changes(updated=5)}, (WANTED_MARKER,))
        cluster.next_xid = max(newest, cluster.next_xid)

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
        self.of(stream).drop_slot(stream)

    def _act_recreate_slot(self, stream: str) -> None:
        self.of(stream).recreate_slot(stream)

    def _act_advance_slot(self, stream: str) -> None:
        if stream in self.of(stream).slots:
            self.of(stream).advance_slot(stream)

    def _act_lose_slot(self, stream: str) -> None:
        if stream in self.of(stream).slots:
            self.of(stream).lose_slot(stream)

    def _act_cut_connections(self) -> None:
        self.cluster.cut_connections()

    def _act_server_crash(self, power: bool) -> None:
        if self.cluster.up:
            self.cluster.crash(power=power)

    def _act_server_restart(self) -> None:
        for cluster in self.world.clusters:
            if not cluster.up:
                cluster.restart()

    def _act_promote(self, lost: int, keep_slots: bool) -> None:
        """Fail over, with the loss of the last few commits of this timeline."""
        own = [e.end for e in self.cluster.logs[self.cluster.timeline] if e.commit and e.end <= self.cluster.flushed]
        at = own[-1 - lost] if len(own) > lost else None
        self._promote(self.cluster, at, keep_slots)

    def _promote(self, cluster: Cluster, at: int | None, keep_slots: bool) -> None:
        begun = [place for stream, place in self.began_at.items() if self.of(stream) is cluster]
        if at is not None and at < max(*begun, cluster.book.begin(cluster.timeline), 0):
            at = None
        if cluster.manner.branches:
            self.truth.leaves(cluster)
        else:
            self._leave(cluster)
        cluster.promote(at, keep_slots=keep_slots)

    def _leave(self, cluster: Cluster) -> None:
        """Note that the log of a cluster is about to be another one."""
        self.truth.leaves(cluster)
        for stream in self.story.streams:
            if self.of(stream) is cluster:
                self.began_at[stream] = 0

    def _act_copy(self) -> None:
        """Somebody copies the cluster."""
        if self.cluster.up:
            self.copies[self.cluster].append(self.cluster.copy())

    def _act_put_back(self, which: float, ahead: int) -> None:
        """Somebody puts an older copy back, and it has written on before anybody looks."""
        copies, cluster = self.copies[self.cluster], self.cluster
        if not copies:
            return
        self._leave(cluster)
        cluster.put_back(copies[int(which * len(copies))])
        mine = [stream for stream in self.story.streams if self.of(stream) is cluster]
        for number in range(ahead):
            self._act_commit(mine[number % len(mine)], {WANTED_TABLE: Changes(updated=1)}, (), 2000, "sync")

    def _act_reset_log(self) -> None:
        """Somebody has the log begin anew, since the server would not start."""
        self._leave(self.cluster)
        self.cluster.reset_log()

    def _act_give_up(self) -> None:
        """An operator gives up all but the newest base."""
        if self.life is not None and not self.life.ended and self.life.agenda is not None:
            self.life.give_up_the_past()

    def _flush_all(self) -> None:
        for cluster in self.world.clusters:
            if cluster.up:
                cluster.flush()

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
        cluster = self.cluster
        held = self.world.lives(cluster).held.pieces.get(cluster.timeline, [])
        if held:
            start, end = held[-1]
            segment = cluster.manner.file_start(start + (end - start) // 2)
            behind = cluster.manner.file_start(cluster.manner.behind(segment)) - segment
            self.world.damage_journal(cluster.timeline, segment, segment + behind // 2, cluster)
