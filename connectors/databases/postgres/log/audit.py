"""The audit of a journal's chain: every complete segment is looked at once, and what was found is remembered.

A segment is damaged where it is not whole, does not say what its name says, belongs to another cluster, or holds a
record that fails its checksum. Headers are read here, records by PostgreSQL's own `pg_waldump`. A record that fills
segments whole is looked at with the one that it ends in, which is what is called damaged then.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from connectors.databases.postgres.log.segments import MISSING, SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName, is_filled, page_faults, page_header
from connectors.databases.postgres.log.waldump import Stretch, WalDump
from connectors.databases.postgres.lsn import Lsn
from trigger.errors import JournalError
from trigger.model import Finding, Severity
from trigger.trusted import read_text

_STATE_FILE = "audit.json"
_KEEP_SECONDS = 2.0
"""How much of a long audit may be lost with the process; it may never come to an end where that dies often."""
_CUT = "truncated"
_REMEDY = (
    "commits whose replay needs it cannot be restored: take a point now, and bring a sound copy of the file back if"
    " the server's pg_wal or another archive still has it"
)


@dataclass(slots=True)
class _Timeline:
    """How far the audit of one timeline has come."""

    first: int
    """The oldest segment that must still be there."""
    following: int
    """The first that was not looked at yet."""
    resume: int
    """Where the first record begins that was not looked at yet."""


_VERSION = 2
"""Of the file; version 1 did not say it."""
_KEYS = frozenset({"version", "system", "timelines", "damaged", "looked_ns"})


@dataclass(slots=True)
class _State:
    system: str = ""
    timelines: dict[int, _Timeline] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    looked_ns: int = 0
    """When it was last seen whether known segments changed; what was written to since is looked at again."""
    unknown: dict[str, Any] = field(default_factory=dict)
    """What else stands in the file, as a later version may write it."""


class _New(NamedTuple):
    """What is known of a segment before its records are looked at."""

    why: str
    """What its headers say against it."""
    dump: WalDump | None
    stretch: Stretch
    is_filled: bool
    """Whether one record fills it, which can be looked at only with the segment that it ends in."""


class Audit:
    """Looks at the segments of one folder; what it found survives a restart, in a file beside them."""

    def __init__(self, segments: SegmentFolder, dump: Callable[[], WalDump | None]) -> None:
        self._segments = segments
        self._dump = dump
        self._state: _State | None = None
        self.between_segments = asyncio.Lock()
        """Held while one segment is looked at; to be held by whoever takes segments away meanwhile."""

    async def begin(self) -> None:
        """Leave the file of what was found in the folder, so that it is known for one in which log is kept."""
        async with self.between_segments:
            await self._segments.threads.run(self._kept)  # where that cannot be, the next `run` says so

    def was_begun(self) -> bool:
        """Whether that file is there: what anybody else puts into the folder, as for a replay, is no log that is kept.

        Blocks; raises `OSError` where that cannot be told.
        """
        try:
            (self._segments.path / _STATE_FILE).lstat()
        except FileNotFoundError:
            return False
        return True

    async def run(self) -> list[Finding]:
        """Look at the segments that are new since the last audit, and whether the others are still there, and whole.

        Gives all that is wrong, also what an earlier audit found.
        """
        began_ns = time.time_ns()
        async with self.between_segments:
            state, new = await self._segments.threads.run(partial(self._look_around, began_ns))
        kept_at = time.monotonic()
        for name in new:
            async with self.between_segments:
                await self._look_at_new(state, name)
                if time.monotonic() - kept_at > _KEEP_SECONDS:
                    await self._segments.threads.run(self._kept)
                    kept_at = time.monotonic()
        async with self.between_segments:
            kept = await self._segments.threads.run(self._kept)
        return [*kept, *(_damage(*one) for one in sorted(state.damaged.items()))]

    def _look_around(self, began_ns: int) -> tuple[_State, list[SegmentName]]:
        """Look whether what is known is still there; gives what earlier audits found, and what none has looked at."""
        state, held = self.load(), self._segments.complete()
        self._look_at_known(state, held)
        state.looked_ns = began_ns
        looked_at = {timeline: known.following for timeline, known in state.timelines.items()}
        return state, [name for name in held if name.number >= looked_at.get(name.timeline, 0)]

    def _kept(self) -> list[Finding]:
        """Keep what was found; gives why that could not be done, since what was found is worth telling all the same."""
        try:
            self._keep()
        except JournalError as error:
            return [Finding("audit", Severity.WARNING, error.message, "make room, or give the folder back to us")]
        return []

    def load(self) -> _State:
        """Give what earlier audits found; blocks on a small file."""
        if self._state is None:
            self._state = self._read()
            self._segments.damaged = self._state.damaged
        return self._state

    def forget(self, gone: Collection[SegmentName]) -> None:
        """Miss segments no more, looked at or not, that are deleted on purpose; with them all before on a timeline."""
        state = self.load()
        oldest = {name.timeline: name.number + 1 for name in sorted(gone)}
        for number, timeline in state.timelines.items():
            timeline.first = max(timeline.first, oldest.get(number, 0))
            if timeline.following < oldest.get(number, 0):
                timeline.following, timeline.resume = oldest[number], 0
        for name in list(state.damaged):
            parsed = SegmentName.parse(name, self._segments.segment_bytes)
            if parsed is not None and parsed.number < oldest.get(parsed.timeline, 0):
                del state.damaged[name]
        self._keep()

    def _look_at_known(self, state: _State, held: Mapping[SegmentName, tuple[int, int]]) -> None:
        """See that what was looked at before is still there, whole, and not written to since."""
        for timeline, known in state.timelines.items():
            for number in range(known.first, known.following):
                name = SegmentName(timeline, number)
                text = name.text(self._segments.segment_bytes)
                size, written_ns = held.get(name, (-1, 0))
                if size < 0:
                    state.damaged[text] = MISSING
                elif size != self._segments.segment_bytes:
                    state.damaged[text] = _truncated(size, self._segments.segment_bytes)
                elif written_ns > state.looked_ns or _may_be_whole_by_now(state.damaged.get(text, "")):
                    known.following, known.resume = number, 0  # look at it anew, and at all behind it
                    state.damaged.pop(text, None)
                    break

    async def _look_at_new(self, state: _State, name: SegmentName) -> None:
        new = await self._segments.threads.run(partial(self._look_at_headers, state, name))
        if new is not None:
            why = new.why
            if not why and new.dump is not None and not new.is_filled:
                why = await new.dump.fault(new.stretch)
            await self._segments.threads.run(partial(self._note, state, name, new, why))

    def _look_at_headers(self, state: _State, name: SegmentName) -> _New | None:
        """Say of a segment what its headers do, and how to look at its records; None where it need not be looked at."""
        size = self._segments.segment_bytes
        if not self._segments.file(name).exists():  # gone since it was listed
            return None
        known = state.timelines.get(name.timeline)
        if known is None:
            known = state.timelines[name.timeline] = _Timeline(name.number, name.number, 0)
        if name.number < known.following:
            return None
        for number in range(known.following, name.number):
            state.damaged[SegmentName(name.timeline, number).text(size)] = MISSING
        start, folder = name.start(size), self._segments.file(name).parent
        follows = known.following == name.number and known.resume and self._lies_in(folder, name, known.resume)
        begin = Lsn(known.resume if follows else start)
        stretch = Stretch(folder, name.timeline, size, begin, Lsn(start + size))
        with self._segments.slices(name) as segment:
            return _New(self._headers(state, name), self._dump(), stretch, is_filled(segment))

    def _lies_in(self, folder: Path, name: SegmentName, begin: int) -> bool:
        """Whether all segments from `begin` up to a segment lie in its folder."""
        before = (name._replace(number=each) for each in range(begin // self._segments.segment_bytes, name.number))
        return all(file.parent == folder and file.exists() for file in map(self._segments.file, before))

    def _note(self, state: _State, name: SegmentName, new: _New, why: str) -> None:
        """Note what is wrong with a segment, "" for nothing, and from where on the next one is looked at."""
        known, text = state.timelines[name.timeline], name.text(self._segments.segment_bytes)
        state.damaged.pop(text, None)
        if why:
            state.damaged[text] = why
        known.following = name.number + 1
        if why:
            known.resume = 0
        elif not new.is_filled:
            known.resume = self._segments.tail(name).end

    def _headers(self, state: _State, name: SegmentName) -> str:
        """Give what the size and the page headers of a segment say against it; "" for nothing."""
        size = self._segments.file(name).stat().st_size
        if size != self._segments.segment_bytes:
            return _truncated(size, self._segments.segment_bytes)
        with self._segments.slices(name) as segment:
            first = page_header(segment[:64])
            if not state.system and first is not None:
                state.system = first.system
            return "; ".join(page_faults(segment, name, self._segments.segment_bytes, state.system))

    def _read(self) -> _State:
        path = self._segments.path / _STATE_FILE
        try:
            found = json.loads(read_text(path))
            if (version := found.get("version", 1)) > _VERSION:
                raise JournalError(
                    f"what the audit found, in {path}, is of version {version}, this program reads up to {_VERSION}",
                    hint="run the newer Trigpoint that wrote it, or delete the file: the audit then looks at all again",
                )
            timelines = {int(number): _Timeline(*fields) for number, fields in found["timelines"].items()}
            unknown = {key: value for key, value in found.items() if key not in _KEYS}
            return _State(found["system"], timelines, dict(found["damaged"]), int(found.get("looked_ns", 0)), unknown)
        except FileNotFoundError:
            return _State()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise JournalError(
                f"what the audit of the journal found cannot be read from {path}: {error}",
                hint="delete the file; the next audit looks at every segment again",
            ) from error

    def _keep(self) -> None:
        state = self.load()
        text = json.dumps(
            state.unknown
            | {
                "version": _VERSION,
                "system": state.system,
                "timelines": {
                    number: [one.first, one.following, one.resume] for number, one in state.timelines.items()
                },
                "damaged": state.damaged,
                "looked_ns": state.looked_ns,
            }
        )
        path = self._segments.path / _STATE_FILE
        try:
            _replace(path, text)
        except OSError as error:
            raise JournalError(f"what the audit found cannot be kept in {path}: {error.strerror}") from error


def _damage(name: str, why: str) -> Finding:
    message = f"segment {name} is missing" if why == MISSING else f"segment {name} is damaged: {why}"
    return Finding(name, Severity.REFUSED, message, _REMEDY)


def _replace(path: Path, text: str) -> None:
    """Replace a small file at once: the old text or the new one, never half of it."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _may_be_whole_by_now(why: str) -> bool:
    """Whether a segment of the right size that is there cannot be damaged as was found: another file took its place."""
    return why == MISSING or why.startswith(_CUT)


def _truncated(size: int, wanted: int) -> str:
    return f"{_CUT}: {size} of {wanted} bytes"
