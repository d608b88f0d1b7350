"""What is done every so often beside the main path, and what of it is not done at present.

Snapshots are thinned and old log is let go of, checkpoints are asked for, the journal is audited, and it is looked
whether the cluster still lies where it is protected, and the snapshots where they are kept.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from trigger.catalog.presence import Watch
from trigger.errors import DatabaseError, TrigpointError
from trigger.keep.expire import release_log
from trigger.keep.retention import longest_replay
from trigger.keep.room import Room
from trigger.model import Finding, Layout, Severity, Volume
from trigger.protect.agenda import Agenda
from trigger.protect.behind import Behind
from trigger.protect.window import Window
from trigger.restore.leftovers import clear
from trigger.service import kept
from trigger.service.connect import Parts, keep_layout, layout_files

log = logging.getLogger(__name__)

WATCH_SECONDS = 5.0
ROOM_SECONDS = 1.0
ROOM_SHARE = 0.5
"""How often it is looked whether snapshots must go: a tenth of a small budget may last no longer; and how much of the
time their removal may take, since commits wait for it."""
AUDIT_SECONDS = 5.0
HINDERED_SECONDS = 10.0
"""How long something keeps log from the journal before that is a trouble."""
PLACES_SECONDS = 10.0
CLONES_SECONDS = 10.0
PRUNE_SECONDS = 10.0
PRUNE_POINTS = 500
PRUNE_ROUNDS = 4
GIVE_BACK_PAGES = 1000
"""How often what is known of points that expired long ago goes from the catalog, of how many at once (so long a seal
waits for it), how often one after the other, and how much of the file is given back after that."""
UPKEEP_SHARE = 0.05
LONG_SECONDS = 30.0
"""How long one act may take before the status says that it is still at it."""


@dataclass(slots=True)
class Upkeep:
    """The upkeep of one running service."""

    parts: Parts
    window: Window
    agenda: Agenda
    room: Room
    troubles: dict[str, str] = field(default_factory=dict)
    """What is not done at present, or not in order, and why."""
    last_audit: Sequence[Finding] = ()
    hindered_since: float | None = None
    """Since when, by the loop's clock, the journal's audits tell of what keeps log from it; None while they do not."""
    behind: Behind = field(default_factory=Behind)
    log_is_noted: bool = False
    points_are_noted: bool = False
    """Whether a later start knows that they are kept where they are."""
    log_may_go: bool = True
    """Whether points went since log was last let go of; before a first time nobody knows."""
    replaced: int = 0
    """The newest point for which a new base was asked for, since its snapshot was gone."""
    shown: Watch = field(default_factory=Watch)

    def acts(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """Give everything that is to run for ever, by name."""
        yield "checkpoints", self._every(WATCH_SECONDS, self.watch_checkpoints, "checkpoints are not watched")
        yield "room", self._every(ROOM_SECONDS, self.keep_room, "no room is made for snapshots", ROOM_SHARE)
        yield "old log", self._every(WATCH_SECONDS, self.release_log, "old log is not let go of")
        yield "kept", self._every(WATCH_SECONDS, self.note_kept, "a later start would not miss what is kept")
        yield "audit", self._every(AUDIT_SECONDS, self.audit_journal, "the journal is not audited")
        yield "streams", self._every(WATCH_SECONDS, self.watch_streams, "it is not known how far the streams are")
        yield "old points", self._every(PRUNE_SECONDS, self.prune, "what expired long ago stays in the catalog")
        yield "snapshots", self._every(WATCH_SECONDS, self.watch_snapshots, "it is not known what snapshots are there")
        yield "clones", self._every(CLONES_SECONDS, self.clear_clones, "what killed restores left is not removed")
        yield "places", self._every(PLACES_SECONDS, self.watch_places, "it is not known where the cluster lies")

    async def _every(
        self,
        seconds: float,
        act: Callable[[], Awaitable[None]],
        if_not: str,
        share: float = UPKEEP_SHARE,
    ) -> None:
        """Do `act` for ever, `seconds` apart; an expected error is shown in the status until it has gone.

        What takes long is done less often, so that it takes no more than `share` of the time; what failed is tried
        again sooner.
        """
        loop = asyncio.get_running_loop()
        while True:
            began, may_take, why = loop.time(), share, ""
            still = loop.call_later(LONG_SECONDS, self.show, if_not, f"still at it after {LONG_SECONDS:g} s")
            try:
                await act()
            except (TrigpointError, OSError) as error:
                may_take, why = 1.0, str(error)
            finally:
                still.cancel()
            self.show(if_not, why)
            await asyncio.sleep(max(seconds, (loop.time() - began) / may_take))

    async def watch_checkpoints(self) -> None:
        """Keep the agenda's redo positions fresh, and ask for a checkpoint where replays would grow too long."""
        databases, agenda = self.parts.logs.databases, self.agenda
        agenda.redos = [redo for database in databases if (redo := await database.redo())]
        if any(agenda.wants_checkpoint(end) for end in self.window.log_ends):
            log.info("asking for a checkpoint: the log since the last one is long for the restore objective")
            for database in databases:
                await database.checkpoint()
            agenda.redos = [redo for database in databases if (redo := await database.redo())]
        self.window.wake()

    async def keep_room(self) -> None:
        """Thin snapshots before the storage is used up."""
        agenda, room = self.agenda, self.room
        gone = await room.make(agenda.replay_limit_bytes)
        self.show("the storage has too little room", room.trouble)
        if room.eased:
            agenda.retry()
            self.window.wake()
        if gone:
            log.info("thinned %d snapshots, points %d to %d", len(gone), gone[0].number, gone[-1].number)
            self.log_may_go = True
        what = "the restore objective is not kept"
        if gone or what in self.troubles:
            bases = await self.parts.catalog.bases()
            there = [base for base in bases if base.number not in self.shown.gone]
            self._note_long_replays(what, longest_replay(there))

    async def release_log(self) -> None:
        """Let go of log that no kept point needs: beside thinning, which must not wait for the journal's disk."""
        if not self.log_may_go:
            return
        self.log_may_go = False  # before, since more points may go meanwhile
        try:
            released = await release_log(self.parts.catalog, self.parts.journal)
        except (TrigpointError, OSError):
            self.log_may_go = True
            raise
        if released:
            log.info("let go of %d segments of old log", released)

    async def prune(self) -> None:
        """Let go of what is known of points that expired long ago, and of the room that it took in the catalog."""
        catalog, kept = self.parts.catalog, self.parts.options.catalog.keep_expired_seconds
        before = self.parts.site.clock.now() - timedelta(seconds=kept)
        for _ in range(PRUNE_ROUNDS):
            if await catalog.prune(before, PRUNE_POINTS) < PRUNE_POINTS:
                break
        await catalog.give_back(GIVE_BACK_PAGES)

    async def watch_snapshots(self) -> None:
        """Show the sealed points whose snapshots are gone; where the newest one's is, a new base is taken."""
        await self.shown.look(self.parts.catalog, self.parts.storage)
        self.show("snapshots are gone", self.shown.trouble)
        base = self.agenda.base
        if base is not None and base.number in self.shown.gone and base.number != self.replaced:
            self.replaced = base.number
            await self._new_base(f"the snapshot of point {base.number} is gone")

    async def clear_clones(self) -> None:
        """Remove what restores left that were killed; where somebody else's server works in it, show that."""
        gone, stay = await clear(self.parts.site)
        for name in gone:
            log.warning("removed clone %s, which a restore left that was killed", name)
        self.show("an unfinished clone stays", "; ".join(stay))

    def show(self, what: str, why: str, level: int = logging.WARNING) -> None:
        """Show in the status why something is not done at present; "" for nothing any more."""
        if not why:
            if self.troubles.pop(what, None) is not None and level > logging.WARNING:
                log.warning("%s: over", what)
            return
        if what not in self.troubles:  # once, not every second
            log.log(level, "%s: %s", what, why)
        self.troubles[what] = why

    def _note_long_replays(self, what: str, replay: int) -> None:
        """Show in the status whether the snapshots that are left lie too far apart for the restore objective."""
        self.show(
            what,
            f"the storage bears no more snapshots, so that restores of old commits replay up to {replay} bytes; make it"
            " larger (bytes, or storage.budget), or give up what is too old (trigpoint expire)"
            if replay > self.agenda.replay_limit_bytes
            else "",
        )

    async def note_kept(self) -> None:
        """Note durably, once, that points and log are kept where they are: a later start misses what is not there.

        Points come first: a journal that nobody can look at keeps nothing from them.
        """
        if not self.points_are_noted:
            self.points_are_noted = await kept.note_points(self.parts.options, self.parts.catalog)
        if not self.log_is_noted:
            self.log_is_noted = await kept.note_log(self.parts.options, self.parts.journal)

    async def audit_journal(self) -> None:
        """Look at the journal's new segments; new damage is logged, and a new base is taken behind it."""
        known, self.last_audit = set(self.last_audit), await self.parts.journal.audit()
        self._note_hindrance([found for found in self.last_audit if found.severity is Severity.WARNING])
        damage = [found for found in self.last_audit if found.severity is Severity.REFUSED and found not in known]
        for finding in damage:
            log.error("%s: %s; %s", finding.subject, finding.message, finding.remedy)
        if damage:
            self.room.known_log.look_again()
            await self._new_base(f"the journal is damaged: {damage[0].message}")

    def _note_hindrance(self, found: Sequence[Finding]) -> None:
        """Show what keeps log from the journal once it has lasted: a receiver that connects again is no trouble yet."""
        now = asyncio.get_running_loop().time()
        self.hindered_since = None if not found else now if self.hindered_since is None else self.hindered_since
        lasts = self.hindered_since is not None and now - self.hindered_since >= HINDERED_SECONDS
        why = "; ".join(f"{each.subject}: {each.message}; {each.remedy}" for each in found) if lasts else ""
        self.show("the journal is held up, and commits since then may not be restorable", why, logging.ERROR)

    async def _new_base(self, note: str) -> None:
        """Insist on a point from which a replay begins here, not at the last checkpoint, however long ago that was."""
        try:
            await self.parts.database.checkpoint()
        except DatabaseError as error:
            log.warning("no checkpoint was made, so the next point's replay begins at the last one: %s", error)
        self.agenda.ask(note, insists=True)
        self.window.wake()

    async def watch_streams(self) -> None:
        """Note how far the streams are behind the server, and show the ones that stand still."""
        server = None
        with suppress(DatabaseError):  # of a server that does not answer the streams say so
            server = await self.parts.database.durable()
        now, window = asyncio.get_running_loop().time(), self.window
        for name, why in self.behind.look(now, server, window.delivered(), window.connected()):
            self.show(f"stream {name} stands still", why)

    async def watch_places(self) -> None:
        """Show a part of the cluster that lies on no volume by now, as a new tablespace may: no point holds it.

        Where another one answers than the one that is protected, what is known of that one stays.
        """
        with suppress(DatabaseError):  # of a server that does not answer, or is another, streams and points say so
            layout = await self.parts.database.layout()
            await asyncio.to_thread(keep_layout, layout, layout_files(self.parts.options))
            outside = await asyncio.to_thread(_outside, layout, self.parts.volumes)
            remedy = "move it onto a volume, or add one that holds it and start the service again"
            self.show("a part of the cluster is in no point", f"{', '.join(outside)}; {remedy}" if outside else "")


def _outside(layout: Layout, volumes: Sequence[Volume]) -> list[str]:
    """Give the places of a cluster that lie on no volume, by this host's filesystem."""
    roots = [os.path.realpath(volume.path) for volume in volumes]
    return [str(place) for place in layout.places.values() if not any(place.is_relative_to(root) for root in roots)]
