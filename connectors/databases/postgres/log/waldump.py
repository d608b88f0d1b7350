"""What PostgreSQL's own `pg_waldump` says about a stretch of log: damage, commits, tablespaces that were made.

It reads with the server's own reader, so it stops where a replay would stop, and passes every record's checksum.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from connectors.databases.postgres.log import printed
from connectors.databases.postgres.log.files import reading
from connectors.databases.postgres.log.printed import Cutter
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import PAGE_BYTES, TEXT_BYTES, SegmentName, behind, text_of
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import Programs, as_owner, minimal_environment
from connectors.threads import Threads
from trigger.errors import JournalError, remedy

_CHUNK_BYTES = 1 << 20
_PARAMETER = re.compile(r"(\w+)=(\w+)")
_TRUNCATED = re.compile(r"(\S+) to (\d+) blocks")
_SAID = "pg_waldump: error: "
_END = re.compile(
    r"error in WAL record at ([0-9A-F]+/[0-9A-F]+): "
    r"|could not find a valid record after [0-9A-F]+/[0-9A-F]+"
    r"|WAL segment size must be a power of two .* the WAL file \"|invalid WAL segment size in WAL file \""
)
"""What versions 15 to 18 say where a log ends, with the start of the last record that was read; the last two where not
even the first page is one of a log. A replay by the server would stop there too."""
_DIED = "run it again; if it fails again, see by the kernel's log what ended it (memory?), or run it by hand"
_ENDS = ("COMMIT", "COMMIT_PREPARED", "ABORT", "ABORT_PREPARED")
_TIME = re.compile(r"(?:\d+: )?(\d{4,}-\d\d-\d\d [\d:.]+) UTC")
_PREPARED = re.compile(r"(\d+): ")
_TABLESPACE = re.compile(r'(\d+) "(.*)"', re.DOTALL)


class LoggedCommit(NamedTuple):
    """One commit record: the 32-bit transaction id, and where the record begins."""

    xid: int
    start: Lsn


class Ended(NamedTuple):
    """A record that ends a transaction, or prepares its end."""

    start: Lsn
    time: datetime | None
    """Its time, which a replay to a time goes by; None of what only prepares."""
    stays: bool
    """Whether it adds to the state: a commit, or what is in doubt from there on."""


class Parameters(NamedTuple):
    """What the server wrote of its settings when it was started with others than before."""

    start: Lsn
    values: dict[str, str]
    """By pg_waldump's names: `max_prepared_xacts`, `track_commit_timestamp`."""


class CreatedTablespace(NamedTuple):
    """One tablespace made in the log, and the folder that a replay of it would empty and use."""

    oid: int
    location: str
    start: Lsn
    """Where the record begins."""


class Preview(NamedTuple):
    """What a stretch of log says of the world besides the data, in order."""

    tablespaces: list[CreatedTablespace]
    """Those outside the data directory."""
    parameters: list[Parameters]
    shrunk: dict[str, int]
    """To how many pages a file was truncated, by its path."""
    removals: list[Lsn]
    """Where the records begin by which folders of databases and tablespaces go, before their DROP is committed."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of one timeline, all of whose segments lie in `folder`."""

    folder: Path
    timeline: int
    segment_bytes: int
    start: Lsn
    end: Lsn
    opened: Sequence[io.FileIO] = ()
    """Its segments in order, where they are open; else they are found by name."""

    @property
    def files(self) -> tuple[str, str]:
        """The names of its first and its last segment."""
        first = SegmentName(self.timeline, self.start // self.segment_bytes)
        last = SegmentName(self.timeline, (self.end - 1) // self.segment_bytes)
        return first.text(self.segment_bytes), last.text(self.segment_bytes)

    def text_at(self, at: Lsn, length: int) -> bytes:
        """Give the text from outside that a record has, see `wal.text_of`; blocks on the files of the stretch.

        Args:
            at: where the record begins.
            length: of the whole record.

        Raises:
            JournalError: there is no such record, or it cannot be read.
        """
        begin, until = at - at % PAGE_BYTES, behind(at, min(length, TEXT_BYTES), self.segment_bytes)
        pages = b""
        try:
            while begin + len(pages) < until:
                number, offset = divmod(begin + len(pages), self.segment_bytes)
                count = min(until - begin - len(pages), self.segment_bytes - offset)
                with self._segment(number) as file:
                    read = os.pread(file.fileno(), count, offset)
                if not read:
                    break
                pages += read
        except OSError as error:
            message = f"the log in {self.folder} at {at} cannot be read: {error}"
            raise JournalError(message, hint=remedy(error), retryable=True) from error
        text = text_of(pages, at - begin, length)
        if text is None:
            raise JournalError(
                f"the log in {self.folder} has at {at} another record than pg_waldump read there",
                hint="it was changed meanwhile; ask again",
                retryable=True,
            )
        return text

    def _segment(self, number: int) -> contextlib.AbstractContextManager[io.FileIO]:
        if self.opened:
            return contextlib.nullcontext(self.opened[number - self.start // self.segment_bytes])
        return reading(self.folder / SegmentName(self.timeline, number).text(self.segment_bytes))


class EndOfLogError(JournalError):
    """The log ended before a stretch did, by the program's own words; `last` is where its last record begins.

    None where it has no record at all from the beginning of the stretch on.
    """

    words: str
    last: Lsn | None

    def __init__(self, stretch: Stretch, words: str) -> None:
        super().__init__(
            f"the log in {stretch.folder} cannot be read from {stretch.start} to {stretch.end}: {words}",
            hint="`trigpoint status` tells what the audit finds in it; choose a state before it, or a later point",
        )
        self.words = words
        found = _END.match(words)
        self.last = Lsn.parse(found[1]) if found and found[1] else None


def parse_commit(line: str) -> LoggedCommit | None:
    """Give the commit that a line of pg_waldump prints; of a prepared transaction the id it was prepared under."""
    record = printed.parse(line)
    if record is None or record.kind not in ("COMMIT", "COMMIT_PREPARED"):
        return None
    prepared = _PREPARED.match(record.rest) if record.kind == "COMMIT_PREPARED" else None
    return LoggedCommit(int(prepared[1]) if prepared else record.xid, record.start)


def parse_ended(line: str) -> Ended | None:
    """Give the end of a transaction that a line of pg_waldump, with times in UTC, prints."""
    record = printed.parse(line)
    if record is None or record.manager != "Transaction":
        return None
    if record.kind == "PREPARE":
        return Ended(record.start, None, True)
    match = _TIME.match(record.rest) if record.kind in _ENDS else None
    if match is None:
        return None
    return Ended(record.start, datetime.fromisoformat(match[1]).replace(tzinfo=UTC), record.kind.startswith("COMMIT"))


def parse_tablespace(line: str) -> CreatedTablespace | None:
    """Give the tablespace that a line of pg_waldump makes, except one inside the data directory."""
    record = printed.parse(line)
    if record is None or (record.manager, record.kind) != ("Tablespace", "CREATE"):
        return None
    made = _TABLESPACE.match(record.rest)
    return CreatedTablespace(int(made[1]), made[2], record.start) if made and made[2] else None


def parse_parameters(line: str) -> Parameters | None:
    """Give the settings that a line of pg_waldump says the server was started with."""
    record = printed.parse(line)
    if record is None or record.kind != "PARAMETER_CHANGE":
        return None
    return Parameters(record.start, dict(_PARAMETER.findall(record.rest)))


def goes_on(stretch: Stretch, end: EndOfLogError) -> bool:
    """Whether a stretch has a record behind the last one that was read: it is damage at which the program stopped.

    Blocks on the files of the stretch.
    """
    begin = stretch.start if end.last is None else max(stretch.start, end.last + 1)
    return SegmentFolder(stretch.folder, stretch.segment_bytes).holds_record(stretch.timeline, begin, stretch.end)


class WalDump:
    """`pg_waldump` of one version, run as `owner`; every call ends within `deadline_seconds`."""

    def __init__(
        self, programs: Programs, owner: tuple[int, int] | None = None, deadline_seconds: float = 600.0
    ) -> None:
        self._program = programs.path("pg_waldump")
        self._owner = owner
        self._deadline_seconds = deadline_seconds
        self._threads = Threads("pg_waldump")

    async def fault(self, stretch: Stretch) -> str:
        """Give what is wrong with the records of a stretch, in pg_waldump's words; "" where nothing is.

        Raises:
            JournalError: it could not look; that says nothing about the log.
        """
        try:
            async with aclosing(self._lines(stretch, "--quiet")) as lines:
                async for _ in lines:
                    pass
        except EndOfLogError as end:
            return end.words
        return ""

    async def commits(self, stretch: Stretch, limit: int) -> list[LoggedCommit]:
        """Give the first `limit` commits whose records begin in a stretch.

        Raises:
            EndOfLogError: there are fewer, and its log ends before.
            JournalError: it could not look.
        """
        found: list[LoggedCommit] = []
        async with aclosing(self.transactions(stretch, whole=True)) as lines:
            async for line in lines:
                commit = parse_commit(line)
                if commit is not None and commit.start >= stretch.start:
                    found.append(commit)
                if len(found) >= limit:
                    break
        return found

    async def next_record(self, stretch: Stretch) -> Lsn | None:
        """Give where the first record begins that begins in a stretch; None where its log has none.

        Raises:
            JournalError: it could not look.
        """
        with contextlib.suppress(EndOfLogError):
            async with aclosing(self._lines(stretch, "--limit=1")) as lines:
                async for line in lines:
                    record = printed.parse(line)
                    return record.start if record else None
        return None

    async def transactions(
        self, stretch: Stretch, *, whole: bool = False, further: bool = False, one: bool = False
    ) -> AsyncGenerator[str, None]:
        """Give what is printed of each end of a transaction in a stretch, times in UTC; ends where its log does.

        Of a long line the beginning; `further` parts, cut at blanks, each begin with one. Only `one` is there at once:
        else the program holds what it prints back until it has read some hundred of them, or all.

        Raises:
            EndOfLogError: its log ends before, and it was to be read as a `whole`.
            JournalError: it could not look.
        """
        try:
            options = ("--rmgr=Transaction", *(["--limit=1"] if one else []))
            async with aclosing(self._lines(stretch, *options, further=further)) as lines:
                async for line in lines:
                    yield line
        except EndOfLogError:
            if whole:
                raise

    async def preview(self, stretch: Stretch) -> Preview:
        """Give what a replay of a stretch would do to folders and files, and the settings that the server had in it.

        As far as its log goes: a replay goes no further. Raises `JournalError` where it could not look.
        """
        found = Preview([], [], {}, [])
        kinds = ("--rmgr=Tablespace", "--rmgr=XLOG", "--rmgr=Storage", "--rmgr=Database")
        with contextlib.suppress(EndOfLogError):
            async with aclosing(self._lines(stretch, *kinds)) as lines:
                async for line in lines:
                    if made := parse_tablespace(line):
                        found.tablespaces.append(made)
                    elif changed := parse_parameters(line):
                        found.parameters.append(changed)
                    elif record := printed.parse(line):
                        match = _TRUNCATED.match(record.rest) if record.kind == "TRUNCATE" else None
                        if match and record.manager == "Storage":
                            found.shrunk[match[1]] = int(match[2])
                        elif record.manager in ("Database", "Tablespace") and record.kind == "DROP":
                            found.removals.append(record.start)
        return found

    async def _lines(self, stretch: Stretch, *options: str, further: bool = False) -> AsyncGenerator[str, None]:
        """Give the beginnings of the lines printed, or all parts of them.

        The files are named: by itself the program takes the size of segments from the first that it finds in the
        folder, which in a pg_wal may be one that the server has yet to write.

        Raises:
            EndOfLogError: it says that the log ends there, or is damaged.
            JournalError: it could not look, died, or did not end in time; that says nothing about the log.
        """
        process = await asyncio.create_subprocess_exec(
            self._program,
            f"--path={stretch.folder}",
            f"--timeline={stretch.timeline}",
            f"--start={stretch.start}",
            f"--end={stretch.end}",
            *options,
            *stretch.files,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_CHUNK_BYTES,
            env=minimal_environment() | {"TZ": "UTC"},
            cwd="/",
            start_new_session=True,
            **as_owner(self._owner),
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._deadline_seconds):
                words = ""
                async for line in self._parts(stretch, process.stdout):
                    if line.startswith("rmgr:"):
                        yield line
                    elif line.startswith(" "):
                        if further:
                            yield line
                    elif line.startswith(_SAID) or not words:
                        words = line.removeprefix(_SAID)
                if code := await process.wait():
                    raise _ended(stretch, code, words)
        except TimeoutError:
            raise JournalError(f"pg_waldump did not end within {self._deadline_seconds:g} s") from None
        except BlockingIOError as error:
            raise JournalError(f"the log in {stretch.folder} cannot be read: {error}", retryable=True) from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await asyncio.shield(process.wait())

    async def _parts(self, stretch: Stretch, stream: asyncio.StreamReader) -> AsyncIterator[str]:
        """Give the lines of a stream, one a record, each whole; long ones in parts, cut in front of a blank."""
        cutter = Cutter(stretch.text_at)
        while chunk := await stream.read(_CHUNK_BYTES):
            take = partial(cutter.take, chunk)
            for part in await self._threads.run(take) if cutter.asks(chunk) else take():
                yield part
        for part in cutter.rest():
            yield part


def _ended(stretch: Stretch, code: int, words: str) -> JournalError:
    """Give why a program ended with another exit code than 0: the end of a log is only what its own words say it is."""
    if code == 1 and _END.match(words):
        return EndOfLogError(stretch, words)
    how = f"ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    said = f": {words}" if words else ""
    message = f"the log in {stretch.folder} was not read from {stretch.start} to {stretch.end}: pg_waldump {how}{said}"
    return JournalError(message, hint=_DIED, retryable=True)
