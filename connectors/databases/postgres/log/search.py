"""The commits that lie in the log itself, DDL and whatever else no stream shows too: read by `pg_waldump`."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import PAGE_BYTES, SegmentName, behind, commit_stamp
from connectors.databases.postgres.log.waldump import EndOfLogError, Stretch, WalDump, goes_on
from connectors.databases.postgres.lsn import Lsn, full_xid, transaction
from trigger.model import Logged, to_microseconds
from trigger.position import History, Name
from trigger.trusted import NotOursError

_COMMIT = re.compile(
    r"rmgr: Transaction len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), .*?"
    r"desc: (?:COMMIT|COMMIT_PREPARED(?: (\d+):)?) ",
    re.DOTALL,
)
_TIME = re.compile(r"(\d{4,}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?) UTC")
_FILES = re.compile(r"rels: ([^;]+)")
_CHILDREN = re.compile(r"subxacts: ([\d ]+)")


async def commits(
    segments: SegmentFolder, dump: WalDump, history: History, begin: int, end: int, like: Name
) -> AsyncGenerator[Logged, None]:
    """Give the commits whose records begin from `begin` up to `end` of a timeline, in order.

    The log stands there without a hole. It has the lower halves of transaction ids only: the upper one is that of the
    id which is nearest to `like`.

    Raises:
        JournalError: part of the stretch cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="trigpoint-") as view:
        await segments.threads.run(partial(_link, segments, history.branch, begin, end, Path(view)))
        stretch = Stretch(Path(view), history.branch, segments.segment_bytes, Lsn(begin), Lsn(end))
        try:
            async with aclosing(dump.transactions(stretch, whole=True)) as lines:
                async for line in lines:
                    one = _logged(line, history, segments.segment_bytes, like)
                    if one is not None and begin <= one.start < end:
                        yield one
        except EndOfLogError as error:  # it says so too where no record begins in a stretch
            if await segments.threads.run(partial(goes_on, stretch, error, segments)):
                raise


def _link(segments: SegmentFolder, timeline: int, begin: int, end: int, view: Path) -> None:
    """Show the segments of a stretch, and the one behind it, under the names by which a program looks for them."""
    size = segments.segment_bytes
    for name in segments.names():
        if name.timeline == timeline and begin // size <= name.number <= end // size + 1:
            (view / name.text(size)).symlink_to(segments.file(name))


def _logged(line: str, history: History, segment_bytes: int, like: Name) -> Logged | None:
    found, made = _COMMIT.match(line), _TIME.search(line)
    if found is None or made is None:
        return None
    start, low = Lsn.parse(found[3]), int(found[4] or found[2])
    children = _CHILDREN.search(line)
    return Logged(
        history,
        _near(low, like),
        start,
        Lsn(behind(start, int(found[1]), segment_bytes)),
        to_microseconds(datetime.fromisoformat(made[1]).replace(tzinfo=UTC)),
        tuple(_near(int(child), like) for child in children[1].split()) if children else (),
        _did(line),
    )


def database_of(segments: SegmentFolder, commit: Logged) -> int:
    """Give the oid of the database that a commit was made in; 0 where its record is not held, or lies in two segments.

    `pg_waldump` does not print it.
    """
    size, begin = segments.segment_bytes, commit.start - commit.start % PAGE_BYTES
    if commit.start // size != (commit.end - 1) // size:
        return 0
    name = SegmentName(commit.history.branch, commit.start // size)
    name = name if segments.locate(name.text(size)) else name._replace(partial=True)
    with contextlib.suppress(OSError, NotOursError), segments.slices(name) as segment:
        pages = bytes(segment[begin - name.start(size) : commit.end - name.start(size)])
        stamp = commit_stamp(pages, commit.start - begin)
        return stamp.database if stamp else 0
    return 0


def _near(low: int, like: Name) -> Name:
    return transaction(max(full_xid(low, like.number or 0), low))  # of no commit that is known: as it stands there


def _did(line: str) -> str:
    """Give what a commit record itself says of what was done: what was changed is in records before it."""
    said = []
    if "inval msgs:" in line:
        said.append("changes the catalog (DDL)")
    if files := _FILES.search(line):
        said.append(f"drops {len(files[1].split())} files")
    if " origin:" in line:
        said.append("was replicated from elsewhere")
    return ", ".join(said)
