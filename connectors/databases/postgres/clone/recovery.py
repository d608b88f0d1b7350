"""From a clone of a cluster's volumes to a running, isolated server at an exact target.

An atomic snapshot holds its own log and first recovers from that, as after a power cut; only at its end it is
consistent, and only from there the staged log can lead it on. So the clone's pg_wal stays as it was cut, and the rest
comes through `restore_command`. A snapshot that is not one instant starts from its backup label instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

from connectors.databases.postgres import lsn
from connectors.databases.postgres.clone import (
    beside,
    inspection,
    isolation,
    postmaster,
    production,
    refusals,
    replayed,
    sockets,
    stands,
    stops,
    tablespaces,
)
from connectors.databases.postgres.clone.access import Access, find_home
from connectors.databases.postgres.clone.files import Relation
from connectors.databases.postgres.clone.inside import empty
from connectors.databases.postgres.clone.isolation import Isolated
from connectors.databases.postgres.clone.placement import Placement
from connectors.databases.postgres.clone.release import release, require_startable
from connectors.databases.postgres.clone.sandbox import relations
from connectors.databases.postgres.clone.scrub import scrub
from connectors.databases.postgres.clone.state import State, owner_of
from connectors.databases.postgres.connection import encoding_of
from connectors.databases.postgres.encoding import decoding, encoded
from connectors.databases.postgres.log.files import entered, give_open, put_new, reading, text_inside
from connectors.databases.postgres.log.wal import history_timeline
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import Programs, last_lines, run
from trigger.errors import DatabaseError, RestoreError
from trigger.model import Address, Finding, Severity, System, Volume
from trigger.ports import Clone, Progress
from trigger.position import Lineage, Position
from trigger.replay import Follows, Replay, Running, Target
from trigger.trusted import NotOursError, read_text

PORT = 5432
_SERVER_LOG = Path(isolation.OWN_FOLDER, "server.log")
_HISTORIES = "log"
_POLL_SECONDS = 0.01
_PROGRAM_SECONDS = 60.0
_SYNC_SECONDS = 600.0
_NEXT_XID = "SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())"
_REPLAYING = re.compile(r"redo in progress, elapsed time: .*, current LSN: ([0-9A-F]+/[0-9A-F]+)")


class PostgresRecovery:
    """Starts, looks into and stops the servers of clones.

    Args:
        placement: where in the volumes the cluster lies.
        programs_for: gives the programs of a major version.
        sockets: folder for the clones' socket folders; short, since a socket's path has to fit in 107 bytes, and
            reachable by the owner of the data.
        superusers: roles with which clones are prepared and asked, of which the first that is there counts: one may
            have had another name when the snapshot was cut.
        conninfo: how production's server is reached; "" where that is not known.
        databases: names of databases that should be there, by which a clone is entered where the usual two are gone.
        environment: variables by which production's server finds its locales.
        keep_libraries: `shared_preload_libraries` that a clone loads too, where reading its data needs them.
        start_deadline_seconds: for everything from the start of a server to its promotion.
    """

    def __init__(
        self,
        placement: Placement,
        programs_for: Callable[[int], Programs],
        sockets: Path,
        *,
        superusers: Sequence[str] = ("postgres",),
        conninfo: str = "",
        databases: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        keep_libraries: Sequence[str] = (),
        start_deadline_seconds: float = 3600.0,
    ) -> None:
        self._placement = placement
        self._programs_for = programs_for
        self._sockets = sockets
        self._superusers = tuple(superusers)
        self._conninfo = conninfo
        self._databases = ("template1", "postgres", *databases)
        self._environment = dict(environment or {})
        self._keep_libraries = tuple(keep_libraries)
        self._start_deadline_seconds = start_deadline_seconds

    async def start(
        self,
        clone: Clone,
        volumes: Sequence[Volume],
        replay: Replay,
        log_folder: Path,
        progress: Progress,
        *,
        throwaway: bool = False,
    ) -> Running:
        """Isolate the clone, replay to the target from `log_folder`, promote to a timeline of its own, and wait.

        A cancellation or an error ends the server that was started; the clone's files stay as they are then.

        Raises:
            RestoreError: it did not reach the target; the message holds the server's own last words.
        """
        bracket = replay.bracket
        isolated = await asyncio.to_thread(isolation.isolate, clone, self._placement, volumes, bracket)
        programs = self._programs_for(isolated.major)
        await _require_reachable(programs, isolated, log_folder)
        control = isolation.control_data(await _ask(programs, isolated, "pg_controldata", isolated.data))
        refusals.require_fit(control, replay)
        system = control["Database system identifier"]
        await asyncio.to_thread(beside.show, self._placement, volumes, system, log_folder, isolated.owner)
        redo = bracket.start.at if bracket else Lsn.parse(control["Latest checkpoint's REDO location"])
        dump = WalDump(programs, isolated.owner)
        read = await replayed.stretches(isolated.data / "pg_wal", log_folder, redo, replay)
        seen = await tablespaces.refuse_new_ones(dump, read, replay)
        stop = await stops.before_removals(dump, read, replay, seen.removals)
        carried = isolation.carried(control, [change.values for change in seen.parameters])
        staged = await asyncio.to_thread(_visible_log, isolated, log_folder, replay)
        socket_folder = sockets.make(self._sockets, isolated)
        found = isolation.settings(carried, isolated, socket_folder, self._keep_libraries, throwaway=throwaway)
        found |= isolation.recovery_settings(replay, stop)
        await asyncio.to_thread(isolation.point_at_log, isolated, staged)
        await asyncio.to_thread(isolation.write_configuration, isolated, found)
        isolation.write(isolated.data / "recovery.signal", "", isolated.owner)
        try:
            await self._launch(programs, isolated)
            await self._ready(isolated, redo, replay, progress)
            time = await stops.time_of(dump, log_folder, replay.target, stop)
            running = await self._describe(clone, isolated, socket_folder, replay, seen.shrunk, time)
            refusals.require_all(running, replay)
            if not throwaway:
                await self._make_durable(clone, running, isolated, found)
            return running
        except BaseException:
            await asyncio.shield(postmaster.end(isolated.data, signal.SIGQUIT))
            raise

    async def inspect(
        self, running: Running, target: Target, log_folder: Path, *, deep: bool, follows: Follows | None = None
    ) -> AsyncIterator[tuple[str, bool, str]]:
        """Give (what was checked, whether it held, what was seen), one a check; see `inspection`."""
        state = State.read(running.data_directory)
        programs = self._programs_for(isolation.major_of(running.data_directory))
        dump = WalDump(programs, owner_of(running.data_directory))
        subject = inspection.Subject(running, target, log_folder, state.next_xid, self._access(running, state), follows)
        for check in inspection.QUICK:
            if (seen := await check(subject, dump)) is not None:
                yield seen
        if deep:
            opened, told = await inspection.opened(subject)
            replace(state, reader=opened.reader).write(running.data_directory)
            for result in told:
                yield result
            yield await inspection.structures(subject, opened, programs, owner_of(running.data_directory))
            known = await relations(subject.access, opened, state.shrunk)
            for result in await self._files(running, programs, *known):
                yield result

    async def query(self, running: Running, database: str, sql: str) -> str:
        """Give the first column of the first row of `sql` as text ("" for NULL or no row); raises `RestoreError`.

        Names in it are looked up in pg_catalog and public, whatever the roles and databases of the clone set. After a
        deep look at a sandbox it is asked by a role that may read everything and do nothing: a table may be a view,
        and what stands in a view is its owner's.
        """
        state = State.read(running.data_directory)
        access = self._access(running, state)
        if state.reader:
            access = replace(access, conninfo=make_conninfo(access.conninfo, user=state.reader), is_superuser=False)
        try:
            async with await access.connect(database, search_path="public") as connection:
                encoding = encoding_of(connection)
                cursor = await connection.execute(encoded(sql, encoding))
                found = cursor.pgresult  # the server's own text: `t` for true, every digit of a number
                value = found.get_value(0, 0) if found is not None and found.ntuples and found.nfields else None
        except (psycopg.Error, UnicodeEncodeError) as error:
            raise RestoreError(f"the clone refused {sql!r} in database {database}: {error}") from error
        return "" if value is None else decoding(encoding)(value)

    async def stop(self, clone: Clone) -> None:
        """Stop the server of a clone; one that does not run is no error."""
        data = self._placement.data_in(clone)
        if data is None:
            if found := await self.strangers(clone):
                raise RestoreError(found[0].message, hint=found[0].remedy)
            return
        await postmaster.end(data, signal.SIGINT)
        await asyncio.to_thread(sockets.remove, self._sockets, data)

    async def resume(self, clone: Clone, listen: Address | None = None) -> Running:
        """Start the server of a clone that was brought up before, as it was left; see port `Recovery`."""
        data = self._placement.cluster_in(clone)
        await asyncio.to_thread(require_startable, data, clone)
        state = State.read(data)
        programs = self._programs_for(isolation.major_of(data))
        isolated = Isolated(data, owner_of(data), programs.major, ())
        sockets.make(self._sockets, isolated)
        await asyncio.to_thread(postmaster.forget_the_dead, data)
        await asyncio.to_thread(isolation.listen, isolated, listen)
        await self._start_again(programs, isolated, state)
        server = postmaster.find(data)
        if server is None:
            raise RestoreError(f"the server of {clone.name} ended right after its start")
        port = listen.port if listen else PORT  # of the socket too: a server has one
        state = replace(state, conninfo=make_conninfo(state.conninfo, port=port))
        await asyncio.to_thread(state.write, isolated.data)
        return state.running(data, server.pid)

    async def _start_again(self, programs: Programs, isolated: Isolated, state: State) -> None:
        """Start a server that was brought up before, and wait until it takes connections."""
        replayed = Lsn.parse(state.replayed)
        own = lsn.history(state.system, state.timeline)
        at = Target(own, replayed, True, f"clone {state.clone}")
        await self._launch(programs, isolated)
        await self._ready(isolated, replayed, Replay(at, Position(own, replayed), replayed), lambda *_: None)

    async def running(self, clone: Clone) -> Running | None:
        """Give the server of a clone if it runs."""
        data = self._placement.data_in(clone)
        server = postmaster.find(data) if data else None
        if data is None or server is None or server.status != "ready":
            return None
        try:
            return State.read(data).running(data, server.pid)
        except RestoreError:  # it is up, and its start is not finished
            return None

    async def used(self, clone: Clone) -> int | None:
        """Give how many transactions a clone began since it was brought up; None for one that is made ready to go."""
        data = self._placement.data_in(clone)
        if data is None or not State.is_in(data):
            return None
        state = State.read(data)
        if (running := await self.running(clone)) is not None:
            return int(await self.query(running, state.home, _NEXT_XID)) - state.next_xid
        control = await self._control(data)
        epoch, _, low = control["Latest checkpoint's NextXID"].partition(":")
        return (int(epoch) << 32 | int(low)) - state.next_xid

    async def unfit(self, clone: Clone, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what keeps a clone from going on as the cluster in `volumes`: its timeline was begun there or beside."""
        data = self._placement.data_in(clone)
        if data is None:
            return []
        control = await self._control(data)
        own, system = int(control["Latest checkpoint's TimeLineID"]), control["Database system identifier"]
        begun = await asyncio.to_thread(beside.timelines, self._placement, volumes, system)
        if own not in begun:
            return []
        words = f"clone {clone.name} goes on in timeline {own}, and so did what lies at {begun[own]}"
        return [Finding(clone.name, Severity.REFUSED, words, "make another clone: it takes a timeline of its own")]

    async def _control(self, data: Path) -> dict[str, str]:
        programs = self._programs_for(isolation.major_of(data))
        isolated = Isolated(data, owner_of(data), programs.major, ())
        return isolation.control_data(await _ask(programs, isolated, "pg_controldata", data))

    async def systems(self, copy: Clone) -> list[System]:
        """Give the cluster that lies in a copy of the volumes; see `production.systems`."""
        return await asyncio.to_thread(production.systems, self._placement.data_in(copy))

    async def lineage(self, copy: Clone, volumes: Sequence[Volume]) -> Lineage | None:
        """Give the lineage of the cluster in a copy, or in the volumes themselves; see `stands`."""
        return await asyncio.to_thread(stands.lineage_at, self._placement.data_in(copy), copy, volumes)

    async def outside(self, copy: Clone, volumes: Sequence[Volume]) -> list[Finding]:
        """Give the links of a copy that lead out of it; see `isolation.outside`."""
        return await asyncio.to_thread(isolation.outside, copy, self._placement, volumes)

    async def at_work(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give the servers that work in one of the volumes, also where their processes are not seen."""
        return await production.at_work(volumes, self._conninfo, self._programs_for)

    async def strangers(self, clone: Clone) -> list[Finding]:
        """Give the servers that work in a clone, or may, and are not ours; see `postmaster.is_ours`."""
        data = self._placement.data_in(clone)
        if data is not None and await asyncio.to_thread(postmaster.is_ours, data):
            return []
        copies = [Volume(volume, str(path)) for volume, path in clone.paths]
        return await production.at_work(copies, programs_for=self._programs_for)

    async def release(self, clone: Clone, volumes: Sequence[Volume]) -> None:
        """Make a stopped clone fit to take the place of the cluster it was made of; see `release`."""
        data = self._placement.cluster_in(clone)
        if postmaster.find(data) is not None:
            raise RestoreError(f"the server of {clone.name} still runs", hint="stop it first")
        control = await self._control(data)
        written = control["Latest checkpoint's REDO WAL file"]  # of a server that was stopped: the last one
        await asyncio.to_thread(release, data, clone, self._placement, volumes, written)

    async def _launch(self, programs: Programs, isolated: Isolated) -> None:
        """Start the server as the owner of the data and return at once; it outlives us, in a session of its own.

        `pg_ctl` would do that through a shell, which may read a path as more than itself.
        """
        log = isolation.write(isolated.data / _SERVER_LOG, "", isolated.owner)
        option = f"--config-file={isolated.folder / 'postgresql.conf'}"
        command: list[str | Path] = ["setsid", "--fork", programs.path("postgres"), "-D", isolated.data, option]
        try:
            own = self._environment
            await run(command, owner=isolated.owner, deadline_seconds=_PROGRAM_SECONDS, output=log, environment=own)
        except DatabaseError as error:
            raise RestoreError(f"the server of {isolated.data} cannot be started: {error.message}") from error

    async def _ready(self, isolated: Isolated, begin: int, replay: Replay, progress: Progress) -> None:
        """Wait until the server has replayed, promoted itself and takes connections."""
        total, started = max(replay.until - begin, 0), False
        told = 0
        clock = asyncio.get_running_loop().time
        appear_by, deadline = clock() + _PROGRAM_SECONDS, clock() + self._start_deadline_seconds
        while True:
            server = postmaster.find(isolated.data)
            if server is not None and server.status == "ready":
                return
            words = await asyncio.to_thread(text_inside, isolated.data, _SERVER_LOG)
            lost = server is None and (started or "FATAL" in words or "PANIC" in words or clock() > appear_by)
            if lost or clock() > deadline:
                raise refusals.failure(
                    replay.target, words, "" if lost else f"not within {self._start_deadline_seconds:g} s"
                )
            started = started or server is not None
            reports = _REPLAYING.findall(words)
            if len(reports) > told:
                told = len(reports)
                progress("replay", min(Lsn.parse(reports[-1]) - begin, total), total)
            await asyncio.sleep(_POLL_SECONDS)

    async def _describe(
        self,
        clone: Clone,
        isolated: Isolated,
        socket_folder: Path,
        replay: Replay,
        shrunk: dict[str, int],
        time: datetime | None,
    ) -> Running:
        """Make the running clone forget its ties to the world, and say what it is; its last commit was at `time`.

        None where the server says that itself: it does not of a record right behind which it was told to stop.
        """
        if replay.bracket is not None and not (isolated.data / "backup_label.old").exists():
            raise RestoreError(f"the server of {clone.name} did not start from its backup label")
        conninfo = make_conninfo(host=str(socket_folder), port=PORT, application_name="trigpoint")
        try:
            access = await find_home(conninfo, isolated.major, self._superusers, self._databases)
            facts = await scrub(access)
        except psycopg.Error as error:
            roles = " or ".join(self._superusers)
            raise RestoreError(
                f"clone {clone.name} came up and could not be prepared as role {roles}: {error}",
                hint="set restore.superuser to a superuser of the cluster; where the words above speak of damaged data,"
                " restore from another point, and see what trigpoint verify says of this one",
            ) from error
        words = await asyncio.to_thread(text_inside, isolated.data, _SERVER_LOG)
        with isolation.log_of(isolated.data, clone, ()) as wal:
            history = read_text(Path(f"{facts.timeline:08X}.history"), folder=wal)
        lineage = lsn.lineage(lsn.history(facts.system, facts.timeline), history)
        removed = f"replication slots removed: {', '.join(isolated.slots)}"
        state = State(
            clone=clone.name,
            conninfo=access.conninfo,
            system=facts.system,
            timeline=facts.timeline,
            replayed=str(Lsn(lineage.forks[-1][1])),
            last_commit_at=time.isoformat() if time else stops.told_by(words),
            notes=(*([removed] if isolated.slots else []), *facts.notes),
            next_xid=facts.next_xid,
            incarnation=replay.target.history.incarnation,
            home=access.home,
            shrunk=shrunk,
        )
        state.write(isolated.data)
        server = postmaster.find(isolated.data)
        if server is None:
            raise RestoreError(f"the server of {clone.name} ended: {last_lines(words)}")
        return state.running(isolated.data, server.pid)

    async def _make_durable(self, clone: Clone, running: Running, isolated: Isolated, found: dict[str, str]) -> None:
        """Put everything the replay wrote on stable storage at once, and everything from here on as usual.

        The replay ran with `fsync = off`: a clone that a power cut hits before it is up is made again anyway, and one
        sync of its filesystems costs a fraction of one sync a file.
        """
        await asyncio.to_thread(isolation.write_configuration, isolated, found | {"fsync": "on"})
        os.kill(running.pid, signal.SIGHUP)
        deadline = asyncio.get_running_loop().time() + _PROGRAM_SECONDS
        home = State.read(isolated.data).home
        while await self.query(running, home, "SHOW fsync") != "on":
            if asyncio.get_running_loop().time() > deadline:
                raise RestoreError(f"the server of {clone.name} did not take its final configuration")
            await asyncio.sleep(_POLL_SECONDS)
        await self.query(running, home, "CHECKPOINT")
        for _, copy in clone.paths:
            try:
                await run(["sync", "--file-system", copy], deadline_seconds=_SYNC_SECONDS)
            except DatabaseError as error:
                raise RestoreError(f"clone {clone.name} could not be made durable: {error.message}") from error

    def _access(self, running: Running, state: State) -> Access:
        return Access(running.conninfo, isolation.major_of(running.data_directory), state.home)

    async def _files(
        self, running: Running, programs: Programs, known: Sequence[Relation], unknown: Sequence[str]
    ) -> list[inspection.Result]:
        """Stop the server, check its files and all checksums, and start it again; the pid is another one then."""
        data = running.data_directory
        isolated = Isolated(data, owner_of(data), programs.major, ())
        await postmaster.end(data, signal.SIGINT)
        control = isolation.control_data(await _ask(programs, isolated, "pg_controldata", data))
        results = [await inspection.whole(data, known, unknown, control)]
        if control.get("Data page checksum version", "0") == "0":
            results.append(("page checksums, which are switched off in this cluster", True, "headers of pages only"))
        else:
            results.append(await inspection.pages(data, programs, isolated.owner))
        await self._start_again(programs, isolated, State.read(data))
        return results


async def _ask(
    programs: Programs, isolated: Isolated, name: str, *arguments: str | Path, seconds: float = _PROGRAM_SECONDS
) -> str:
    try:
        return await run([programs.path(name), *arguments], owner=isolated.owner, deadline_seconds=seconds)
    except DatabaseError as error:
        raise RestoreError(error.message, hint=error.hint) from error


async def _require_reachable(programs: Programs, isolated: Isolated, staged: Path) -> None:
    """Refuse early, and in clear words, what the owner of the data may not execute or read."""
    who = f"user id {isolated.owner[0]}, who owns the data,"
    try:
        await _ask(programs, isolated, "postgres", "--version")
    except (OSError, RestoreError) as error:
        raise RestoreError(
            f"{who} cannot run {programs.path('postgres')}: {error}",
            hint="install PostgreSQL where every user can execute it, or set database.bin_directory",
        ) from error
    for path in (isolated.data / "PG_VERSION", *sorted(staged.iterdir())[:1]):
        try:
            await run(["/usr/bin/test", "-r", path], owner=isolated.owner, deadline_seconds=_PROGRAM_SECONDS)
        except DatabaseError:
            raise RestoreError(
                f"{who} cannot read {path}",
                hint="every folder above it must be open to that user (chmod o+x), and the file must be the user's",
            ) from None


def _visible_log(isolated: Isolated, staged: Path, replay: Replay) -> Path:
    """Give the folder from which the server restores; for the end of a snapshot one with history files only.

    Those keep the clone's new timeline apart from every timeline that production ever had.
    """
    if not replay.as_cut or replay.bracket is not None:
        return staged
    with entered(isolated.data, Path(isolation.OWN_FOLDER)) as folder, contextlib.suppress(FileExistsError):
        os.mkdir(_HISTORIES, 0o700, dir_fd=folder)
    with entered(staged) as theirs, entered(isolated.folder, Path(_HISTORIES)) as own:
        give_open(own, isolated.owner)
        empty(own)
        for name in os.listdir(theirs):  # noqa: PTH208 - an open folder
            if history_timeline(name) is not None:
                try:
                    with reading(Path(name), folder=theirs) as file:
                        put_new(name, own, file, isolated.owner)
                except NotOursError as error:
                    raise RestoreError(f"in the staged log {staged}: {error.message}", hint=error.remedy) from None
    return isolated.folder / _HISTORIES
