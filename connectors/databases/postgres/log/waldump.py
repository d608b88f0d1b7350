"""What PostgreSQL's own `pg_waldump` says about a stretch of log: damage, commits, tablespaces that were made.

It reads with the server's own reader, so it stops where a replay would stop, and passes every record's checksum.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import Programs, as_owner, minimal_environment
from trigger.errors import JournalError

_HEAD_BYTES = 64 << 10
"""So much of a line is held at once: a commit of many subtransactions is one line, of any length, its id in front."""
_WORD_BYTES = 1 << 10
_CHUNK_BYTES = 1 << 20
_RECORD = re.compile(r"rmgr: \w+ .*?tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), .*?desc: (\w+)(.*)", re.DOTALL)
_PARAMETER = re.compile(r"(\w+)=(\w+)")
_TRUNCATED = re.compile(r"^rmgr: Storage .*desc: TRUNCATE (\S+) to (\d+) blocks")
_SAID = "pg_waldump: error: "
_END = re.compile(
    r"error in WAL record at ([0-9A-F]+/[0-9A-F]+): "
    r"|could not find a valid record after [0-9A-F]+/[0-9A-F]+"
    r"|WAL segment size must be a power of two .* the WAL file \"|invalid WAL segment size in WAL file \""
)
"""What versions 15 to 18 say where a log ends, with the start of the last record that was read; the last two where not
even the first page is one of a log. A replay by the server would stop there too."""
_DIED = "run it again; if it fails again, see by the kernel's log what ended it (memory?), or run it by hand"
_REMOVAL = re.compile(r"^rmgr: (?:Database|Tablespace) .*?, lsn: ([0-9A-F]+/[0-9A-F]+), .*?desc: DROP ", re.DOTALL)
_ENDED = re.compile(
    r"^rmgr: Transaction .*?, lsn: ([0-9A-F]+/[0-9A-F]+), .*?"
    r"desc: (?:(COMMIT|COMMIT_PREPARED \d+:|ABORT|ABORT_PREPARED \d+:) (\d{4,}-\d\d-\d\d [\d:.]+) UTC|(PREPARE) )",
    re.DOTALL,
)
_PREPARED = re.compile(r" (\d+): ")
_TABLESPACE = re.compile(r' (\d+) "(.*)"', re.DOTALL)


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

    @property
    def files(self) -> tuple[str, str]:
        """The names of its first and its last segment."""
        first = SegmentName(self.timeline, self.start // self.segment_bytes)
        last = SegmentName(self.timeline, (self.end - 1) // self.segment_bytes)
        return first.text(self.segment_bytes), last.text(self.segment_bytes)


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
    match = _RECORD.match(line)
    if match is None or match[3] not in ("COMMIT", "COMMIT_PREPARED"):
        return None
    prepared = _PREPARED.match(match[4]) if match[3] == "COMMIT_PREPARED" else None
    return LoggedCommit(int(prepared[1] if prepared else match[1]), Lsn.parse(match[2]))


def parse_ended(line: str) -> Ended | None:
    """Give the end of a transaction that a line of pg_waldump, with times in UTC, prints."""
    match = _ENDED.match(line)
    if match is None:
        return None
    time = datetime.fromisoformat(match[3]).replace(tzinfo=UTC) if match[3] else None
    return Ended(Lsn.parse(match[1]), time, match[4] is not None or match[2].startswith("COMMIT"))


def parse_tablespace(line: str) -> CreatedTablespace | None:
    """Give the tablespace that a line of pg_waldump makes, except one inside the data directory."""
    match = _RECORD.match(line)
    if match is None or match[3] != "CREATE":
        return None
    made = _TABLESPACE.match(match[4])
    return CreatedTablespace(int(made[1]), made[2], Lsn.parse(match[2])) if made and made[2] else None


def parse_parameters(line: str) -> Parameters | None:
    """Give the settings that a line of pg_waldump says the server was started with."""
    match = _RECORD.match(line)
    if match is None or match[3] != "PARAMETER_CHANGE":
        return None
    return Parameters(Lsn.parse(match[2]), dict(_PARAMETER.findall(match[4])))


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
                    match = _RECORD.match(line)
                    return Lsn.parse(match[2]) if match else None
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
                    elif match := _TRUNCATED.search(line):
                        found.shrunk[match[1]] = int(match[2])
                    elif match := _REMOVAL.match(line):
                        found.removals.append(Lsn.parse(match[1]))
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
                async for line in _parts(process.stdout):
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
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await asyncio.shield(process.wait())


async def _parts(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Give the lines of a stream; long ones in parts, cut in front of a blank, where they have one."""
    held = b""
    while chunk := await stream.read(_CHUNK_BYTES):
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            *parts, last = _cut(line)
            for part in (*parts, last):
                yield part.decode(errors="replace")
        *parts, held = _cut(held)
        for part in parts:
            yield part.decode(errors="replace")
    if held:
        yield held.decode(errors="replace")


def _cut(line: bytes) -> Iterator[bytes]:
    """Give a line in parts of about `_HEAD_BYTES`, the last of which may go on."""
    begin = 0
    while len(line) - begin > _HEAD_BYTES:
        end = line.find(b" ", begin + _HEAD_BYTES - _WORD_BYTES)
        if end < 0:
            break
        yield line[begin:end]
        begin = end
    yield line[begin:]


def _ended(stretch: Stretch, code: int, words: str) -> JournalError:
    """Give why a program ended with another exit code than 0: the end of a log is only what its own words say it is."""
    if code == 1 and _END.match(words):
        return EndOfLogError(stretch, words)
    how = f"ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    said = f": {words}" if words else ""
    message = f"the log in {stretch.folder} was not read from {stretch.start} to {stretch.end}: pg_waldump {how}{said}"
    return JournalError(message, hint=_DIED, retryable=True)
