"""The commits that lie in the log itself, DDL and whatever else no stream shows too: read by `pg_waldump`."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

from connectors.databases.postgres.log.said import Said
from connectors.databases.postgres.log.segments import FileBytes, SegmentFolder
from connectors.databases.postgres.log.wal import PAGE_BYTES, SegmentName, behind, commit_stamp, holds_record, tail
from connectors.databases.postgres.log.waldump import EndOfLogError, Stretch, WalDump
from connectors.databases.postgres.lsn import Lsn, full_xid, transaction
from trigger.errors import JournalError
from trigger.model import Logged
from trigger.position import History, Name

SHOWN = 64
"""So many segments, and a few more where one record fills many, are held open at once."""
_LOW = (1 << 32) - 1


async def commits(
    segments: SegmentFolder, dump: WalDump, history: History, begin: int, end: int, like: Name
) -> AsyncGenerator[Logged, None]:
    """Give the commits whose records begin from `begin` up to `end` of a timeline, in order.

    The log stands there without a hole. It has the lower halves of transaction ids only: the upper one is that of the
    id which is nearest to `like`.

    Raises:
        JournalError: part of the stretch cannot be read.
    """
    at = begin
    while at < end:
        async with _shown(segments, history.branch, at, end) as shown:
            async with aclosing(_commits_in(shown, dump, segments, history, like)) as found:
                async for one in found:
                    yield one
            at = shown.end


async def _commits_in(
    shown: Stretch, dump: WalDump, segments: SegmentFolder, history: History, like: Name
) -> AsyncGenerator[Logged, None]:
    begin, end = shown.start, shown.end
    said: Said | None = None
    try:
        async with aclosing(dump.transactions(shown, whole=True, further=True)) as lines:
            async for line in lines:
                if line.startswith(" "):
                    if said is not None:
                        said.add(line)
                    continue
                if said is not None:
                    yield _logged(said, history, segments.segment_bytes, like)
                said = Said.of(line, wanted=(like.number or 0) & _LOW)
                said = said if said is not None and begin <= said.start < end else None
    except EndOfLogError as error:  # it says so too where no record begins in a stretch
        if await segments.threads.run(partial(_goes_on_behind, shown, error)):
            raise
    if said is not None:
        yield _logged(said, history, segments.segment_bytes, like)


def _goes_on_behind(shown: Stretch, end: EndOfLogError) -> bool:
    """Whether there is a record behind the last one that was read: it is damage at which the program stopped."""
    size, begin = shown.segment_bytes, shown.start if end.last is None else max(shown.start, end.last + 1)
    return any(
        holds_record(FileBytes(file.fileno()), number * size, begin, shown.end)
        for number, file in enumerate(shown.opened, shown.start // size)
        if number >= begin // size
    )


@asynccontextmanager
async def _shown(segments: SegmentFolder, timeline: int, begin: int, end: int) -> AsyncIterator[Stretch]:
    """Show a stretch, or so much of it as may be open at once, up to a place where a record begins.

    By descriptors: a file that is open can be read on, whatever becomes of its name.
    """
    run, size = segments.threads.run, segments.segment_bytes
    with contextlib.ExitStack() as opened:
        view = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="trigpoint-")))
        files: list[io.FileIO] = []
        for number in range(begin // size, (end - 1) // size + 1):
            if len(files) >= SHOWN and (last := await run(partial(_next_record, files, begin // size, size))) > begin:
                end = last
                break
            file = opened.enter_context(await run(partial(segments.opened, timeline, number)))
            text = SegmentName(timeline, number).text(size)
            (view / text).symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
            files.append(file)
        yield Stretch(view, timeline, size, Lsn(begin), Lsn(end), files)


def _next_record(files: Sequence[io.FileIO], first: int, segment_bytes: int) -> int:
    """Give behind the last record that ends in open segments that follow on each other; 0 where none does."""
    for number in reversed(range(len(files))):
        found = tail(FileBytes(files[number].fileno()), Lsn((first + number) * segment_bytes))
        if found.last_record is not None:
            return found.end
    return 0


def _logged(said: Said, history: History, segment_bytes: int, like: Name) -> Logged:
    return Logged(
        history,
        _near(said.xid, like),
        said.start,
        Lsn(behind(said.start, said.length, segment_bytes)),
        said.time_us,
        tuple(_near(child, like) for child in said.children),
        said.did,
        more_children=said.more_children,
    )


def database_of(segments: SegmentFolder, commit: Logged) -> int:
    """Give the oid of the database that a commit was made in; 0 where its record is not held, or lies in two segments.

    `pg_waldump` does not print it.
    """
    size, begin = segments.segment_bytes, commit.start - commit.start % PAGE_BYTES
    number = commit.start // size
    if number != (commit.end - 1) // size:
        return 0
    with contextlib.suppress(OSError, JournalError), segments.opened(commit.history.branch, number) as file:
        pages = FileBytes(file.fileno())[begin - number * size : commit.end - number * size]
        stamp = commit_stamp(pages, commit.start - begin)
        return stamp.database if stamp else 0
    return 0


def _near(low: int, like: Name) -> Name:
    return transaction(max(full_xid(low, like.number or 0), low))  # of no commit that is known: as it stands there
