"""What must be looked at before a cluster is protected, each finding with its remedy; and what no stream can see.

The judgement is in pure functions over rows and paths; the few functions that ask do nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg

from connectors.databases.postgres import made, places
from connectors.databases.postgres.clone.placement import volume_of
from connectors.databases.postgres.connection import connect, database_of, encoding_of, role_of
from connectors.databases.postgres.encoding import readable, shared_text
from connectors.databases.postgres.programs import listed
from connectors.databases.postgres.stream import publication, slot
from connectors.databases.postgres.stream.copyboth import CopyBoth, way_in
from connectors.databases.postgres.stream.pgoutput import MARKER_BYTES_LIMIT, MARKERS_LIMIT
from connectors.databases.postgres.stream.source import PostgresSource
from trigger.errors import DatabaseError, SourceError
from trigger.model import Finding, Layout, Severity, Volume

_OLDEST_MAJOR, _NEWEST_MAJOR = 15, 18
_SETTINGS = """
SELECT name, setting FROM pg_settings WHERE name IN ('server_version_num', 'wal_level', 'fsync', 'full_page_writes',
    'max_slot_wal_keep_size', 'max_replication_slots', 'max_wal_senders', 'data_checksums',
    'synchronous_standby_names', 'idle_replication_slot_timeout', 'synchronous_commit')
"""
_ROLE = """
SELECT namesend(rolname), rolsuper OR rolreplication, pg_has_role('pg_checkpoint', 'USAGE'),
       has_function_privilege('pg_backup_start(text, boolean)', 'EXECUTE')
       AND has_function_privilege('pg_backup_stop(boolean)', 'EXECUTE')
  FROM pg_roles WHERE rolname = current_user
"""
_USE = """
SELECT pg_is_in_recovery(),
       (SELECT count(*) FROM pg_replication_slots WHERE slot_name <> ALL (%s)),
       (SELECT count(*) FROM pg_stat_replication WHERE application_name <> ALL (%s)),
       array(SELECT namesend(datname) FROM pg_database WHERE datallowconn AND NOT datistemplate AND datconnlimit <> -2),
       array(SELECT application_name FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid
              WHERE s.slot_type = 'physical' AND s.slot_name <> ALL (%s)),
       array(SELECT textsend(quote_literal(gid) || ' in ' || database) FROM pg_prepared_xacts
              ORDER BY prepared LIMIT 5),
       (SELECT count(*) FROM pg_replication_slots
         WHERE slot_name = ANY (%s) AND confirmed_flush_lsn IS NOT NULL AND wal_status <> 'lost')
"""
"""The last: which slots need not be made; one that is being made has confirmed nothing yet."""
_LASTS_SECONDS = 1.0
"""How long a transaction is open that is worth a word."""
_OK, _NOTE, _WARNING, _REFUSED = Severity.OK, Severity.NOTE, Severity.WARNING, Severity.REFUSED


async def check_cluster(
    connection: psycopg.AsyncConnection[Any], used: made.Used, name: str, seen: Collection[str], *, bracketed: bool
) -> list[Finding]:
    """Give the findings that concern the cluster as a whole; errors of psycopg pass through."""
    settings = dict(await (await connection.execute(_SETTINGS)).fetchall())
    role = await (await connection.execute(_ROLE)).fetchone()
    streams = {one: database for one, database in used.items() if database is not None}
    all_ours, ours, databases = list(used), list(streams), list(streams.values())
    use = await (await connection.execute(_USE, [ours, all_ours, all_ours, ours])).fetchone()
    assert role is not None
    assert use is not None
    standby, slots_used, senders_used, present, standbys, prepared, slots_made = use
    findings = [
        *check_settings(settings),
        *check_synchronous(settings["synchronous_standby_names"], [name, *all_ours]),
    ]
    if standby:
        findings.append(
            Finding(
                "primary", _REFUSED, "this server is a standby", "protect the primary, by a service on its own host"
            )
        )
    findings += check_room("max_replication_slots", int(settings["max_replication_slots"]) - slots_used, len(ours) + 1)
    findings += check_room("max_wal_senders", int(settings["max_wal_senders"]) - senders_used, len(ours) + 2)
    findings += check_databases(databases, list(map(shared_text, present)), seen)
    findings += check_role(shared_text(role[0]), *role[1:], bracketed=bracketed)
    if prepared and slots_made < len(ours):
        message = f"no slot can be made while transactions are in doubt: {', '.join(map(shared_text, prepared))}"
        findings.append(
            Finding("prepared transactions", _REFUSED, message, "COMMIT PREPARED or ROLLBACK PREPARED them")
        )
    elif slots_made < len(ours) and (who := await slot.oldest(connection, _LASTS_SECONDS)):
        message = f"streams open once the transactions that run have ended, of which the oldest is that of {who}"
        findings.append(Finding("running transactions", _WARNING, message, slot.END_IT))
    findings += made.judge(await made.unused(connection, name, used))
    if standbys:
        findings.append(
            Finding(
                "failover",
                _NOTE,
                f"after a failover to {', '.join(standbys)} the stream goes on only if the slot was synchronised",
                "version 17 or later: database.failover = true, hot_standby_feedback, sync_replication_slots and a"
                " dbname in primary_conninfo on the standby, synchronized_standby_slots here;"
                " otherwise a gap is recorded and a point taken",
            )
        )
    return findings


def check_settings(settings: Mapping[str, str]) -> Iterator[Finding]:
    """Judge the settings of a server, as pg_settings shows them."""
    major = int(settings["server_version_num"]) // 10_000
    if major < _OLDEST_MAJOR:
        yield Finding("version", _REFUSED, f"PostgreSQL {major} is too old", f"upgrade to {_OLDEST_MAJOR} or later")
    elif major > _NEWEST_MAJOR:
        yield Finding("version", _WARNING, f"PostgreSQL {major} is newer than all that was tested ({_NEWEST_MAJOR})")
    else:
        yield Finding("version", _OK, f"PostgreSQL {major}")
    if settings["wal_level"] != "logical":
        remedy = "ALTER SYSTEM SET wal_level = 'logical', then restart the server"
        yield Finding("wal_level", _REFUSED, f"wal_level is {settings['wal_level']}; commits cannot be read", remedy)
    for setting, why in (
        ("fsync", "what the server calls durable may not be on disk, so no snapshot can be trusted"),
        ("full_page_writes", "pages torn by a snapshot or a crash could not be repaired by replay"),
    ):
        if settings[setting] != "on":
            remedy = f"ALTER SYSTEM SET {setting} = on, then SELECT pg_reload_conf()"
            yield Finding(setting, _REFUSED, f"{setting} is {settings[setting]}: {why}", remedy)
    if settings["max_slot_wal_keep_size"] == "-1":
        yield Finding(
            "max_slot_wal_keep_size",
            _WARNING,
            "max_slot_wal_keep_size is -1: while the service is down, its slot keeps log until the disk is full",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '<what the disk can spare>', then SELECT pg_reload_conf(); a "
            "slot that falls behind further is then lost, which is recorded as a gap",
        )
    if settings.get("idle_replication_slot_timeout", "0") != "0":
        yield Finding(
            "idle_replication_slot_timeout",
            _NOTE,
            "idle_replication_slot_timeout is set: a service that is down for longer loses its slot (a gap)",
        )
    if settings["data_checksums"] != "on":
        yield Finding(
            "data_checksums",
            _NOTE,
            "data checksums are off: a verification cannot find pages that the disk has damaged",
            "stop the server and run pg_checksums --enable",
        )


def check_synchronous(setting: str, ours: Sequence[str]) -> Iterator[Finding]:
    """Judge synchronous_standby_names: our stream must not be what COMMIT waits for."""
    names = standby_names(setting)
    if "*" in names or {name.lower() for name in ours} & names:
        yield Finding(
            "synchronous_standby_names",
            _REFUSED,
            f"synchronous_standby_names ({setting}) makes COMMIT wait for our streams",
            "name the standbys that are meant, without '*' and without our names",
        )


def standby_names(setting: str) -> set[str]:
    """Give the names in a value of synchronous_standby_names, in lower case (the server ignores it too)."""
    inner = re.fullmatch(r"\s*(?:(?:FIRST|ANY)\s+)?\d+\s*\((.*)\)\s*", setting, re.IGNORECASE | re.DOTALL)
    listed = inner[1] if inner else setting
    return {name.strip().strip('"').lower() for name in listed.split(",") if name.strip()}


def check_room(setting: str, free: int, needed: int) -> Iterator[Finding]:
    """Judge whether enough slots or senders are left: one a stream, more for the journal and a short question."""
    if free < needed:
        remedy = f"raise {setting} by {needed - free} and restart the server"
        yield Finding(setting, _REFUSED, f"{setting} leaves {max(free, 0)} free, {needed} are needed", remedy)


def check_databases(wanted: Sequence[str], present: Sequence[str], seen: Collection[str]) -> Iterator[Finding]:
    """Judge the databases that are named against those that are there.

    One that was protected before and is gone by now does not keep the others from being protected.
    """
    some = any(database in present for database in wanted)
    for database in wanted:
        if database not in present:
            was = some and database in seen
            message = f"there is no database {database}" + (" any more; the others are protected" if was else "")
            remedy = f"take it out of database.databases, or correct its name; there are: {', '.join(sorted(present))}"
            yield Finding(f"database {database}", _WARNING if was else _REFUSED, message, remedy)
    others = sorted(set(present) - set(wanted))
    if others:
        yield Finding(
            "other databases",
            _NOTE,
            f"commits in {', '.join(others)} are not looked at one by one; points hold them all the same",
            "name them in database.databases",
        )


def check_role(
    role: str, may_replicate: bool, may_checkpoint: bool, may_hold_bracket: bool, *, bracketed: bool
) -> Iterator[Finding]:
    """Judge whether the role may open a replication connection, checkpoint, and hold the backup bracket if need be."""
    if not may_replicate:
        yield Finding("role", _REFUSED, f"role {role} may not replicate", f'ALTER ROLE "{role}" REPLICATION')
    if bracketed and not may_hold_bracket:
        message = f"role {role} may not begin and end a backup, which holds each point with this storage"
        remedy = f'GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO "{role}"'
        yield Finding("role", _REFUSED, message, remedy)
    if not may_checkpoint:
        message = f"role {role} may not checkpoint: replays are as long as the server's own checkpoints lie apart"
        yield Finding("role", _WARNING, message, f'GRANT pg_checkpoint TO "{role}"')


async def check_database(dsn: str, source: PostgresSource, deadline_seconds: float) -> list[Finding]:
    """Give the findings that concern one database: its publications, its slot, tables, a replication connection."""
    subject = f"database {source.name}"
    try:
        async with asyncio.timeout(deadline_seconds):
            async with await connect(dsn) as connection:
                findings = list(check_encoding(source.name, encoding_of(connection)))
                findings += await _check_publications(connection, source)
                findings += await _check_slot(connection, source)
                findings += await made.left_behind(connection, source.publication)
                findings += await _check_standbys(connection, source)
            stream = await CopyBoth.connect(dsn, deadline_seconds)
            await stream.close()
    except (psycopg.Error, SourceError, TimeoutError) as error:
        said = error.message if isinstance(error, SourceError) else str(error)
        words = " ".join(said.split()) or f"no answer within {deadline_seconds:g} s"
        remedy = (
            way_in(words, for_good=False) or "look at the role's rights and pg_hba.conf (it needs `replication` too)"
        )
        return [Finding(subject, _REFUSED, words, remedy)]
    return findings or [Finding(subject, _OK, "can be captured")]


async def check_other(dsn: str, name: str, deadline_seconds: float) -> list[Finding]:
    """Give the findings that concern a database which is not configured: what is left of ours in it.

    One that does not let us in has no say: it is none of ours.
    """
    with contextlib.suppress(psycopg.Error, TimeoutError):
        async with asyncio.timeout(deadline_seconds):
            async with await connect(dsn) as connection:
                there = database_of(connection) in await made.read(connection, name)
                return list(await made.left_behind(connection, name, unused=not there))
    return []


def check_encoding(database: str, encoding: str) -> Iterator[Finding]:
    """Judge whether names and markers of a database can be read as the characters that they mean."""
    if not readable(encoding):
        yield Finding(
            f"encoding of {database}",
            _WARNING,
            f"names and markers in {encoding} are told byte by byte where they go beyond ASCII",
            r"write them so in rules and questions: a byte f6 is \xf6",
        )


async def _check_publications(connection: psycopg.AsyncConnection[Any], source: PostgresSource) -> list[Finding]:
    name = source.publication
    existing = await publication.existing(connection, name)
    superuser = connection.info.parameter_status("is_superuser") == "on"
    tables = await publication.tables(connection, name)
    return [
        *check_publications(source.name, name, existing, superuser=superuser),
        *await _try_publications(connection, source),
        *check_tables(source.name, tables, everything=all(existing.get(name, (False,)))),
    ]


async def _try_publications(connection: psycopg.AsyncConnection[Any], source: PostgresSource) -> Iterator[Finding]:
    """Judge whether the server lets us make and change publications, as a trigger that forbids DDL does not."""
    try:
        await publication.attempt(connection, source.publication)
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction):
        return iter(())  # which is said of the role, and of a standby
    except psycopg.Error as error:
        message = f"publications cannot be made or kept up to date: {' '.join(str(error).split())}"
        remedy = f"have what forbids it (an event trigger, say) let role {role_of(connection)} pass"
        return iter([Finding(f"publication {source.publication} in {source.name}", _REFUSED, message, remedy)])
    return iter(())


def check_publications(
    database: str, name: str, existing: Mapping[str, tuple[bool, ...]], *, superuser: bool
) -> Iterator[Finding]:
    """Judge the publications there are: rows of (all tables, insert, update, delete, truncate)."""
    subject, keyed = f"publication {name} in {database}", name + publication.KEYED_SUFFIX
    if name not in existing:
        if not superuser:
            remedy = (
                f'have a superuser run in {database}: CREATE PUBLICATION "{name}" FOR ALL TABLES WITH (publish = '
                f"'insert, truncate'); CREATE PUBLICATION \"{keyed}\" WITH (publish = 'update, delete')"
            )
            yield Finding(subject, _REFUSED, "only a superuser may publish all tables", remedy)
        return
    everything, insert, _update, _delete, truncate = existing[name]
    if not (everything and insert and truncate):
        yield Finding(
            subject,
            _WARNING,
            "it does not publish inserts and truncates of all tables; commits it leaves out are not seen",
            f'DROP PUBLICATION "{name}"; it is made anew at the next start (a gap is recorded)',
        )
    if not superuser and not all(existing[name]):
        yield Finding(
            f"publication {keyed} in {database}",
            _WARNING,
            "only a superuser can keep the list of its tables up to date",
            f'add new tables yourself: ALTER PUBLICATION "{keyed}" ADD TABLE …',
        )


def check_tables(database: str, tables: Sequence[publication.Table], *, everything: bool) -> Iterator[Finding]:
    """Judge tables without a replica identity: their updates cannot be published without making them fail."""
    bare = [f"{table.schema}.{table.name}" for table in tables if not table.keyed and table.kind == "r"]
    if not bare:
        return
    shown = listed(sorted(bare), 5)
    remedy = "give it a primary key, or ALTER TABLE … REPLICA IDENTITY FULL"
    if everything:
        message = (
            f"the publication that is there makes UPDATE and DELETE fail on tables without replica identity: {shown}"
        )
        yield Finding(
            f"tables in {database}",
            _REFUSED,
            message,
            f"{remedy}; or drop the publication, ours is made so that this cannot happen",
        )
    else:
        message = (
            f"UPDATE and DELETE are not seen on tables without replica identity: {shown}; catch-all points hold them"
        )
        yield Finding(f"tables in {database}", _WARNING, message, remedy)


async def _check_slot(connection: psycopg.AsyncConnection[Any], source: PostgresSource) -> list[Finding]:
    try:
        found = await slot.look(connection, source.slot, source.name)
    except SourceError as error:
        return [Finding(f"slot {source.slot}", _REFUSED, error.message, error.hint)]
    if found is not None and found.lost:
        remedy = "nothing to do: at the next start it is made anew, the gap recorded and a point taken"
        return [Finding(f"slot {source.slot}", _WARNING, f"it was {found.lost}", remedy)]
    if found is not None and found.active_pid is not None:
        message = f"it is read at present, by the service if that runs (the server's process {found.active_pid})"
        return [Finding(f"slot {source.slot}", _NOTE, message)]
    return []


async def _check_standbys(connection: psycopg.AsyncConnection[Any], source: PostgresSource) -> list[Finding]:
    """Judge whether what was asked for as to standbys can be had, and lets commits through at present."""
    if not source.failover:
        return []
    if connection.info.server_version < slot.FAILOVER_VERSION:
        message = "slots are kept on standbys from version 17 on: after a failover there is a gap"
        return [Finding(f"failover of {source.name}", _NOTE, message, "set database.failover to false")]
    why = await slot.awaited(connection)
    return [Finding(f"failover of {source.name}", _WARNING, *why.split("; ", 1))] if why else []


# ---- paths and volumes


def check_paths(layout: Layout, volumes: Sequence[Volume]) -> list[Finding]:
    """Judge whether every part of the cluster lies on a volume, by this host's mounts (F6)."""
    parts = [("data directory", places.data_directory(layout)), ("pg_wal", layout.log)]
    parts += [(f"tablespace {oid}", path) for oid, path in places.tablespaces(layout).items()]
    parts += [("configuration file", path) for path in layout.config_files]
    mounts = mount_points(Path("/proc/self/mountinfo").read_text(errors="replace"))
    return [*place_parts(parts, volumes), *check_mounts(volumes, mounts, [path for _, path in parts])]


def place_parts(parts: Sequence[tuple[str, Path]], volumes: Sequence[Volume]) -> Iterator[Finding]:
    """Say for each (what, where) on which volume it lies, or refuse it; configuration outside is only noted."""
    for what, path in parts:
        volume = volume_of(path, volumes)
        if volume is not None:
            yield Finding(what, _OK, f"{path} lies on volume {volume.name}")
        elif what == "configuration file":
            yield Finding(
                what, _WARNING, f"{path} lies on no volume; a restore will not bring it back", "keep it elsewhere"
            )
        else:
            yield Finding(what, _REFUSED, f"{path} lies on no volume", "add a volume that holds it")


def check_mounts(volumes: Sequence[Volume], mounts: Sequence[Path], parts: Sequence[Path]) -> Iterator[Finding]:
    """Refuse filesystems mounted below a volume: its snapshot holds an empty directory there."""
    own = {Path(volume.path).resolve() for volume in volumes}
    for volume in volumes:
        root = Path(volume.path).resolve()
        for mount in mounts:
            if mount == root or not mount.is_relative_to(root) or mount in own:
                continue
            ours = any(part.is_relative_to(mount) or mount.is_relative_to(part) for part in parts)
            message = f"{mount} is another filesystem, mounted below volume {volume.name}; a snapshot leaves it out"
            yield Finding(f"mount {mount}", _REFUSED if ours else _NOTE, message, "make it a volume of its own")


def mount_points(mountinfo: str) -> list[Path]:
    """Give the mount points in the text of /proc/self/mountinfo (proc(5)); spaces in it are written as \\040."""
    fields = (line.split() for line in mountinfo.splitlines())
    return [
        Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field[4]))
        for field in fields
        if len(field) > 4
    ]


def unreachable(error: DatabaseError) -> Finding:
    """Give the finding for files that this host cannot see."""
    return Finding("data directory", _REFUSED, error.message, error.hint)


# ---- what a stream cannot see

_HELD = "a catch-all point holds it: one is taken when the log has moved by 512 bytes and no commit was seen"
_SEEN, _UNSEEN = "seen", "not seen"
BLIND_SPOTS: tuple[tuple[str, str, str], ...] = (
    ("insert, COPY, CREATE TABLE AS", _SEEN, "every inserted row is counted"),
    ("update, delete", _SEEN, "on tables with a primary key or another replica identity"),
    ("truncate", _SEEN, "counted once a table"),
    ("commit prepared", _SEEN, "as the commit it is, with its rows; PREPARE alone is not a commit"),
    (
        "pg_logical_emit_message(true, …)",
        _SEEN,
        "also when a transaction writes nothing else; prefix trigpoint: a marker",
    ),
    ("update, delete without replica identity", _UNSEEN, f"add one to make it visible; {_HELD}"),
    ("update, delete on a new table", _UNSEEN, f"until it is noticed (1 s after its first insert, else 10 s); {_HELD}"),
    ("DDL, GRANT", _UNSEEN, _HELD),
    ("sequence (nextval, setval)", _UNSEEN, f"{_HELD}; after a restore a sequence may be up to 32 values ahead"),
    ("large object", _UNSEEN, _HELD),
    ("refresh of a materialized view, rewrite of a table", _UNSEEN, _HELD),
    ("row locks (SELECT … FOR UPDATE)", _UNSEEN, "nothing was changed"),
    (
        "unlogged and temporary table",
        _UNSEEN,
        "a restore by replay cannot bring them back: unlogged tables are empty then",
    ),
    ("pg_logical_emit_message(false, …), NOTIFY", _UNSEEN, "they do not belong to what a commit wrote"),
    ("databases that are not named", _UNSEEN, _HELD),
)
"""(what was committed, whether a stream of ours shows it, what is done about it); held by a test on each version."""


LIMITS: tuple[tuple[str, str], ...] = (
    (
        "markers",
        f"the first {MARKERS_LIMIT:,} of a transaction are kept, and {MARKER_BYTES_LIMIT:,} bytes of each: no other is "
        "found, and a rule that one might decide takes the commit",
    ),
    (
        "time of a commit that came by replication",
        "it is the origin's own commit time, not this server's; a restore to a time goes by this server's",
    ),
    (
        "table whose primary key or replica identity is dropped",
        "its UPDATE and DELETE fail (as under any logical replication) until it is taken out of our publication: "
        "within 10 s while the service runs; before a longer stop, run the DDL first or drop the publication",
    ),
    (
        "ALTER TABLE … SET UNLOGGED on a table with a primary key or another replica identity",
        "PostgreSQL refuses it (as under any logical replication) while the table is in our publication: before it, run"
        " ALTER PUBLICATION trigpoint_keyed DROP TABLE …",
    ),
    (
        "transaction that stays open, or in doubt",
        "until it has ended, in whichever database, no slot can be made; check names it, and status while one waits",
    ),
)
"""What is true of every version beside the table above."""


def blind_spots(major: int) -> list[Finding]:
    """Give what a stream of PostgreSQL `major` shows and what not; the same from 15 to 18, as measured."""
    subject = f"PostgreSQL {major}: "
    return [
        Finding(subject + what, _OK if seen == _SEEN else _NOTE, seen, remedy) for what, seen, remedy in BLIND_SPOTS
    ] + [Finding(subject + what, _NOTE, message) for what, message in LIMITS]
