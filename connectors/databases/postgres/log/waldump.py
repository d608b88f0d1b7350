"""What PostgreSQL's own `pg_waldump` says about a stretch of log: damage, commits, tablespaces that were made.

It reads with the server's own reader, so it stops where a replay would stop, and passes every record's checksum.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import Programs, as_owner, minimal_environment
from trigger.errors import JournalError

_HEAD_BYTES = 64 << 10
"""So much of a line is looked at: a commit of many subtransactions is one line, of any length, its id in front."""
_CHUNK_BYTES = 1 << 20
_RECORD = re.compile(r"rmgr: \w+ .*?tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), .*?desc: (\w+)(.*)", re.DOTALL)
_PARAMETER = re.compile(r"(\w+)=(\w+)")
_TRUNCATED = re.compile(r"^rmgr: Storage .*desc: TRUNCATE (\S+) to (\d+) blocks")
_DAMAGE = ("error in WAL record", "could not find a valid record")
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
    """A stretch of one timeline whose whole segments lie in `folder`; to the end of the log there if `end` is None."""

    folder: Path
    timeline: int
    start: Lsn
    end: Lsn | None = None


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
        except _EndOfLog as end:
            if not str(end).startswith(_DAMAGE):
                raise JournalError(f"pg_waldump cannot read {stretch.folder}: {end}") from end
            return str(end)
        return ""

    async def commits(self, stretch: Stretch, limit: int) -> list[LoggedCommit]:
        """Give the first `limit` commits whose records begin in a stretch; fewer where its log ends before."""
        found: list[LoggedCommit] = []
        async with aclosing(self.transactions(stretch)) as lines:
            async for line in lines:
                commit = parse_commit(line)
                if commit is not None and commit.start >= stretch.start:
                    found.append(commit)
                if len(found) >= limit:
                    break
        return found

    async def next_record(self, stretch: Stretch) -> Lsn | None:
        """Give where the first record begins that begins in a stretch; None where its log has none."""
        with contextlib.suppress(_EndOfLog):
            async with aclosing(self._lines(stretch, "--limit=1")) as lines:
                async for line in lines:
                    match = _RECORD.match(line)
                    return Lsn.parse(match[2]) if match else None
        return None

    async def transactions(self, stretch: Stretch) -> AsyncGenerator[str, None]:
        """Give what is printed of each end of a transaction in a stretch, times in UTC; ends where its log does."""
        with contextlib.suppress(_EndOfLog):
            async with aclosing(self._lines(stretch, "--rmgr=Transaction")) as lines:
                async for line in lines:
                    yield line

    async def preview(self, stretch: Stretch) -> Preview:
        """Give what a replay of a stretch would do to folders and files, and the settings that the server had in it."""
        found = Preview([], [], {}, [])
        kinds = ("--rmgr=Tablespace", "--rmgr=XLOG", "--rmgr=Storage", "--rmgr=Database")
        with contextlib.suppress(_EndOfLog):
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

    async def _lines(self, stretch: Stretch, *options: str) -> AsyncGenerator[str, None]:
        """Give the beginnings of the lines printed; raises `_EndOfLog` with the program's words where it stops."""
        end = [f"--end={stretch.end}"] if stretch.end is not None else []
        process = await asyncio.create_subprocess_exec(
            self._program,
            f"--path={stretch.folder}",
            f"--timeline={stretch.timeline}",
            f"--start={stretch.start}",
            *end,
            *options,
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
                error = ""
                async for line in _heads(process.stdout):
                    if line.startswith("pg_waldump: error"):
                        error = line.removeprefix("pg_waldump: error: ")
                    elif line.startswith("rmgr:"):
                        yield line
                if await process.wait() != 0:
                    raise _EndOfLog(error)
        except TimeoutError:
            raise JournalError(f"pg_waldump did not end within {self._deadline_seconds:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await asyncio.shield(process.wait())


async def _heads(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Give the first part of every line of a stream, however long the lines are."""
    head = b""
    while chunk := await stream.read(_CHUNK_BYTES):
        first, *others = chunk.split(b"\n")
        head += first[: _HEAD_BYTES - len(head)]
        for following in others:
            yield head.decode(errors="replace")
            head = following[:_HEAD_BYTES]
    if head:
        yield head.decode(errors="replace")


class _EndOfLog(Exception):  # noqa: N818 - the usual end of a log that is still written
    """The reader stopped: at the end of the log that is there, or at damage."""
