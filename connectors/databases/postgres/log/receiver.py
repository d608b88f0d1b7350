"""Feed of a journal: PostgreSQL's own `pg_receivewal` under supervision, with a physical slot of its own.

It runs without `--synchronous`: what arrives is written at once and can be staged at once either way, and an fsync
for every few kilobytes would be paid by the host. Nothing is lost by that, since the server's slot moves only when a
whole segment is on stable storage; after a power cut the server sends the rest of it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from connectors.databases.postgres import lsn
from connectors.databases.postgres.connection import as_conninfo, opened, role_of
from connectors.databases.postgres.log.files import give
from connectors.databases.postgres.log.folders import is_of
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import Programs, as_owner, last_lines, minimal_environment
from connectors.threads import Threads
from trigger.errors import ConfigError, PositionError, SourceError
from trigger.model import Extent, Finding, Severity
from trigger.position import History

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0
_GOOD_RUN_SECONDS = 30.0
_CONNECT_SECONDS = 10
_COMMAND_SECONDS = 30.0
_END_SECONDS = 10.0
_WORDS_BYTES = 8192
_SLOT_NAME = re.compile(r"[a-z0-9_]{1,63}")
_SECRETS = frozenset({"password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"})
"""What of a connection string everybody on the host could read in `ps` (the keywords of libpq 18)."""
_SERVICE = "trigpoint"
_CANNOT_SERVE = re.compile(
    r"has already been removed|can no longer access replication slot|has been invalidated"
    r"|cannot read from replication slot"
)
_OTHER_PAST = re.compile(
    r"is not in this server's history|requested timeline \d+ is not|requested timeline \d+ does not"
)
_WENT_BACK = re.compile(r"starting timeline \d+ is not present in the server")
_ENGLISH = re.compile(r"(C|POSIX|en)\b|en_|C\.|$")
_LET_IN = (
    "physical replication needs a line of its own in pg_hba.conf, with `replication` in the place of the database, such"
    " as `local replication postgres peer`, and then SELECT pg_reload_conf(); without any log only snapshots can be"
    " brought back: see [journal]"
)
_WAIT = "until it goes on, the server keeps the log for the journal's slot, up to max_slot_wal_keep_size"
_BY_HAND = (
    "the server went back to an earlier timeline, as where an old data directory was put back; the journal follows by"
    " itself as soon as it can read where slot {slot} reserves the log and can write into its own folder; see to both,"
    " or stop the service, move the segments of the later timelines into the folder `left` in the journal's folder,"
    " those of the server's timeline out of it, and start the service: the journal finds what lies in either"
)


class _Head(NamedTuple):
    """Where the server stands."""

    system: str
    timeline: int
    written: Lsn


Recognise = Callable[[], Awaitable[History]]
"""Gives the history that the server is in."""


class Receiver:
    """Runs `pg_receivewal` until cancelled, starts it again when it ends or stands still, and leads it over holes.

    Args:
        conninfo: how to connect; needs a role with REPLICATION. Secrets in it go to files of mode 0600, never into an
            argument vector.
        programs: of the server's version or a later one.
        slot: the physical slot; made where it is missing.
        owner: user and group id to run as; ignored where we are not root.
        stall_seconds: it is started again when the server was ahead for so long and nothing arrived.
        recognise: says which history the server is in, by what is known of it; the first of its timeline by default.
    """

    def __init__(
        self,
        conninfo: str,
        programs: Programs,
        slot: str,
        *,
        owner: tuple[int, int] | None = None,
        stall_seconds: float = 30.0,
        recognise: Recognise | None = None,
    ) -> None:
        if _SLOT_NAME.fullmatch(slot) is None:
            raise ConfigError(f"{slot!r} is no name of a slot", hint="use a to z, 0 to 9 and _")
        self._conninfo = conninfo
        self._programs = programs
        self._slot = slot
        self.owner = owner
        self.begun = False  # before the first log is here, the slot may not keep it yet
        self._stall_seconds = stall_seconds
        self._recognise = recognise or self._first_of_its_timeline
        self._trouble = ""
        self._threads = Threads("pg_receivewal")

    def fetch(self, segments: SegmentFolder, name: str, loop: asyncio.AbstractEventLoop | None = None) -> bool:  # noqa: ARG002 - the feed's
        """Whether a sound file is in the folder; a stream cannot be asked for one."""
        return segments.is_sound(name)

    async def catch_up(self, segments: SegmentFolder) -> None:
        """Bring nothing: a stream brings the log while it runs."""

    async def check(self, segment_bytes: int) -> list[Finding]:  # noqa: ARG002 - the feed's
        """Say which program receives the log, and by which slot; and whether the server's words can be understood."""
        program = self._programs.path("pg_receivewal")
        found: list[Finding] = []
        try:
            async with self._connect() as connection:
                slot = await (await connection.execute(f"READ_REPLICATION_SLOT {self._slot}".encode())).fetchone()
                how = f"{program} receives the log, by slot {self._slot}"
                if slot is None or slot[0] is None:
                    how += ", which is not there: no log is kept for it until the service makes it"
                found.append(Finding("pg_receivewal", Severity.OK, how))
                row = await (await connection.execute(b"SHOW lc_messages")).fetchone()
                if not _may_ask_for_english(connection) and row and not _ENGLISH.match(str(row[0])):
                    role = role_of(connection)
                    message = f"lc_messages is {row[0]}: by its words alone a program tells why no log comes any more"
                    remedy = f"have a superuser run: ALTER ROLE \"{role}\" SET lc_messages = 'C'"
                    found.append(Finding("pg_receivewal", Severity.WARNING, message, remedy))
        except (TimeoutError, psycopg.Error, OSError) as error:
            words = last_lines(str(error)) or f"no answer within {_COMMAND_SECONDS:g} s"
            return [Finding("pg_receivewal", Severity.REFUSED, f"no log can be received: {words}", _LET_IN)]
        return found

    def findings(self) -> list[Finding]:
        """Give why nothing is received at present; nothing while it is."""
        if not self._trouble:
            return []
        remedy = _BY_HAND.format(slot=self._slot) if _WENT_BACK.search(self._trouble) else _WAIT
        return [Finding("pg_receivewal", Severity.WARNING, f"the log is not received: {self._trouble}", remedy)]

    async def run(self, segments: SegmentFolder) -> None:
        """Receive until cancelled, which ends the program cleanly, or until the log belongs into another folder."""
        pause = _FIRST_PAUSE_SECONDS
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            words = await self._receive_once(segments)
            if words is None:
                return
            self._trouble = words or "pg_receivewal ended"
            pause = _FIRST_PAUSE_SECONDS if clock() - began > _GOOD_RUN_SECONDS else pause
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            if await self._lead_on(segments, words):
                pause = _FIRST_PAUSE_SECONDS

    async def _receive_once(self, segments: SegmentFolder) -> str | None:
        """Run the program until it ends or stands still; gives its last words, None where the log is another one."""
        try:
            history = await self._recognise()
            if not await segments.threads.run(partial(is_of, segments, history)):
                return None
            async with self._connect() as connection:
                begin, head = await _make_slot(connection, self._slot), await _head(connection)
                if begin is not None and begin[1] > head.written:  # of a log that is no more, as before pg_resetwal
                    await _make_slot_anew(connection, self._slot)
                english = _may_ask_for_english(connection)
            await segments.threads.run(partial(_drop_half_made, segments))
            async with self._arguments(english=english) as (option, environment):
                return await self._supervise(segments, option, environment)
        except (TimeoutError, OSError, psycopg.Error, SourceError) as error:
            return last_lines(str(error))

    async def _supervise(self, segments: SegmentFolder, option: list[str], environment: dict[str, str]) -> str:
        process = await asyncio.create_subprocess_exec(
            *_dies_with_us(),
            self._programs.path("pg_receivewal"),
            f"--directory={segments.path}",
            f"--slot={self._slot}",
            "--no-loop",
            "--status-interval=1",
            *option,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=minimal_environment() | self._inherited() | environment,
            cwd="/",
            start_new_session=True,
            **as_owner(self.owner),
        )
        assert process.stderr is not None
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._until_stall(segments, process))
                words = await _last_words(process.stderr)
                watch.cancel()
            return last_lines(words)
        finally:
            await asyncio.shield(_end(process))

    async def _until_stall(self, segments: SegmentFolder, process: asyncio.subprocess.Process) -> None:
        """End the program when the server was ahead for `stall_seconds` and nothing arrived."""
        clock = asyncio.get_running_loop().time
        arrived: list[Extent] = []
        since, pause = clock(), 0.5
        while True:
            await asyncio.sleep(pause)
            pause = min(self._stall_seconds / 4, 5.0)
            try:
                held = await segments.threads.run(segments.extents)
                head = await self._head()
            except (TimeoutError, OSError, psycopg.Error):
                continue  # the program notices for itself that the server, or its folder, is gone
            if held != arrived or _reaches(held, head):
                arrived, since, self._trouble = held, clock(), ""
            elif clock() - since > self._stall_seconds:
                await _end(process, signal.SIGKILL)
                return

    async def _lead_on(self, segments: SegmentFolder, words: str) -> bool:
        """Let the program go on where the server still can; where that leaves a hole, `audit` will report it.

        Gives whether it could not where it was. A server that left our timeline exactly there, as a standby of an
        archive does where a segment ends, gives the program no word of it: so that is told by where either stands.

        `pg_receivewal` resumes behind the newest file of its folder. Where the server cannot serve that any more, an
        empty file marks where it can: where its timeline began, if it left ours (a standby was promoted, or production
        was restored in place); where our slot reserves the log, if it went back to an earlier timeline (such a restore
        was undone); else where a new slot reserves it.
        """
        is_said = any(sign.search(words) for sign in (_CANNOT_SERVE, _OTHER_PAST, _WENT_BACK))
        try:
            resumes = await segments.threads.run(partial(_resumes, segments))
            async with self._connect() as connection:
                head = await _head(connection)
                begin = None
                if _WENT_BACK.search(words):
                    begin = await _reserved(connection, self._slot)
                elif head.timeline > 1 and not _CANNOT_SERVE.search(words) and (is_said or resumes is not None):
                    begin = await _fork(connection, head, None if is_said else resumes)
                if begin is None and not is_said:
                    return False
                if begin is None:
                    begin = await _make_slot_anew(connection, self._slot) or (head.timeline, head.written)
            timeline, number = begin[0], begin[1] // segments.segment_bytes
            await segments.threads.run(
                partial(_mark, segments, SegmentName(timeline, number, partial=True), self.owner)
            )
        except (TimeoutError, psycopg.Error, OSError, PositionError) as error:
            if is_said:
                self._trouble = last_lines(f"{words}\n{error}")
            return is_said
        return True

    async def _first_of_its_timeline(self) -> History:
        head = await self._head()
        return lsn.history(head.system, head.timeline)

    async def _head(self) -> _Head:
        async with self._connect() as connection:
            return await _head(connection)

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Give a connection that speaks the replication protocol's commands, which need no more than REPLICATION."""
        own = make_conninfo(
            self._conninfo,
            replication="yes",
            client_encoding="utf8",
            connect_timeout=_CONNECT_SECONDS,
            application_name=self._slot,
        )
        async with asyncio.timeout(_COMMAND_SECONDS):
            async with await opened(own) as connection:
                yield connection

    def _inherited(self) -> dict[str, str]:
        """Give of our environment what libpq reads, so that the program is let in by all that lets us in.

        These are its variables, and the home folder, where .pgpass and .postgresql lie.
        """
        ours = {} if as_owner(self.owner) else {"HOME": str(Path("~").expanduser())}
        return ours | {name: value for name, value in os.environ.items() if name.startswith("PG")}

    @contextlib.asynccontextmanager
    async def _arguments(self, *, english: bool) -> AsyncIterator[tuple[list[str], dict[str, str]]]:
        """Give the options and the environment with which the program connects; secrets go into files.

        With `english` the server is asked for words that are known here: it is it that says why no log comes.
        """
        found = conninfo_to_dict(self._conninfo)
        if english:
            asked = found.get("options") or os.environ.get("PGOPTIONS") or ""
            found["options"] = f"{asked} -c lc_messages=C".strip()
        secrets = {name: str(found.pop(name)) for name in sorted(_SECRETS) if name in found}
        for name in ("dbname", "replication"):
            found.pop(name, None)
        found["application_name"] = self._slot  # by its own name it might be what COMMIT waits for
        if set(secrets) - {"password"}:
            if "service" in found:
                raise psycopg.ProgrammingError(
                    f"{', '.join(secrets)} belongs into the file of the service that is named"
                )
            found["service"] = _SERVICE
        option = [f"--dbname={os.fsdecode(as_conninfo(found))}", "--no-password"]
        environment: dict[str, str] = {}
        if not secrets:
            yield option, environment
            return
        folder = Path(await self._threads.run(partial(tempfile.mkdtemp, prefix="trigpoint-")))
        try:
            for variable, content in _secret_files(secrets).items():
                file = folder / variable.lower()
                file.touch(mode=0o600)
                file.write_text(content)
                give(file, self.owner)
                environment[variable] = str(file)
            give(folder, self.owner)
            yield option, environment
        finally:
            await self._threads.run(partial(shutil.rmtree, folder, ignore_errors=True))


def _secret_files(secrets: Mapping[str, str]) -> dict[str, str]:
    """Give the content of the files that libpq reads secrets from, by the variable that names each.

    Raises:
        psycopg.ProgrammingError: a secret cannot stand in such a file.
    """
    files = {}
    others = dict(secrets)
    if (password := others.pop("password", None)) is not None:
        escaped = password.replace("\\", "\\\\").replace(":", "\\:")
        files["PGPASSFILE"] = f"*:*:*:*:{escaped}\n"
    for name, value in others.items():
        if value != value.strip() or not value.isprintable():
            raise psycopg.ProgrammingError(
                f"{name} with a blank at an end, or an end of line, cannot be kept in a file"
            )
    if others:
        files["PGSERVICEFILE"] = "\n".join(
            [f"[{_SERVICE}]", *(f"{name}={value}" for name, value in others.items()), ""]
        )
    return files


async def _head(connection: psycopg.AsyncConnection[Any]) -> _Head:
    row = await (await connection.execute(b"IDENTIFY_SYSTEM")).fetchone()
    assert row is not None
    return _Head(str(row[0]), int(row[1]), Lsn.parse(row[2]))


def _may_ask_for_english(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the role may set `lc_messages`, which is a superuser's."""
    return connection.info.parameter_status("is_superuser") == "on"


async def _make_slot(connection: psycopg.AsyncConnection[Any], slot: str) -> tuple[int, Lsn] | None:
    """Make a physical slot that reserves the log from now on; gives from which timeline and position on it does."""
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        await connection.execute(f"CREATE_REPLICATION_SLOT {slot} PHYSICAL RESERVE_WAL".encode())
    return await _reserved(connection, slot)


async def _make_slot_anew(connection: psycopg.AsyncConnection[Any], slot: str) -> tuple[int, Lsn] | None:
    """Drop the slot and make it again; gives what `_make_slot` gives."""
    await connection.execute(f"DROP_REPLICATION_SLOT {slot} WAIT".encode())
    return await _make_slot(connection, slot)


async def _reserved(connection: psycopg.AsyncConnection[Any], slot: str) -> tuple[int, Lsn] | None:
    """Give from which timeline and position on a slot reserves the log; None where there is none, or it does not."""
    row = await (await connection.execute(f"READ_REPLICATION_SLOT {slot}".encode())).fetchone()
    return (int(row[2]), Lsn.parse(row[1])) if row and row[1] and row[2] else None


async def _fork(
    connection: psycopg.AsyncConnection[Any], head: _Head, resumes: tuple[int, Lsn] | None
) -> tuple[int, Lsn] | None:
    """Give the server's timeline and where it left the one before.

    With a place at which a program resumes, only where the server has left that timeline there, or before.
    """
    if resumes is not None and resumes[0] >= head.timeline:
        return None
    try:
        row = await (await connection.execute(f"TIMELINE_HISTORY {head.timeline}".encode())).fetchone()
    except psycopg.errors.UndefinedFile:  # pg_resetwal gave it its number: it left none
        return None
    if row is None:
        return None
    text = row[1] if isinstance(row[1], str) else bytes(row[1]).decode(errors="replace")
    forks = lsn.lineage(lsn.history(head.system, head.timeline), text).forks
    if resumes is not None and not any(timeline == resumes[0] and at <= resumes[1] for timeline, at in forks):
        return None
    return (head.timeline, Lsn(forks[-1][1])) if forks else None


def _dies_with_us() -> list[str]:
    """Give what, put before a program, ends it when we are killed: it would hold the slot against our successor."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig=INT", "--"] if setpriv else []


def _resumes(segments: SegmentFolder) -> tuple[int, Lsn] | None:
    """Give the timeline and the place at which `pg_receivewal` resumes: behind the newest file that it sees."""
    newest = max(segments.in_sight(), key=lambda name: (name.number, name.timeline, not name.partial), default=None)
    if newest is None:
        return None
    return newest.timeline, Lsn((newest.number + (not newest.partial)) * segments.segment_bytes)


def _drop_half_made(segments: SegmentFolder) -> None:
    """Remove a partial segment whose making was cut short: the program refuses it, and the server has its bytes."""
    for name in segments.names():
        if name.partial and 0 < segments.file(name).stat().st_size < segments.segment_bytes:
            segments.file(name).unlink()


def _mark(segments: SegmentFolder, mark: SegmentName, owner: tuple[int, int] | None) -> None:
    """Let the program begin at `mark`, or behind what is held of that timeline from there on.

    What was set aside of the timeline comes back into sight, what outranks it on other timelines is set aside; and an
    empty partial segment is left as the newest file where nothing of that stretch is held.
    """
    segments.bring_back(mark.timeline)
    for name in segments.in_sight():
        if name.number >= mark.number and name.timeline != mark.timeline:
            segments.set_aside(name)
    if mark not in segments.in_sight() and mark._replace(partial=False) not in segments.in_sight():
        segments.mark(mark, owner)


def _reaches(held: list[Extent], head: _Head) -> bool:
    """Whether the log of the server's timeline is held up to where it stands."""
    return any(extent.history.branch == head.timeline and extent.end >= head.written for extent in held)


async def _last_words(stream: asyncio.StreamReader) -> str:
    words = b""
    while block := await stream.read(_WORDS_BYTES):
        words = (words + block)[-_WORDS_BYTES:]
    return words.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process, how: signal.Signals = signal.SIGINT) -> None:
    """End the program and wait for it; one that does not end in time is killed."""
    for attempt in (how, signal.SIGKILL):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, attempt)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
                return
