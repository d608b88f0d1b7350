"""How the catalog's tables came to be: from each version to the next, inside one transaction.

A catalog in a file is copied before its first step; the copy stays beside it until a point was sealed after it, so that
the older program can be gone back to as long as nothing new would be lost.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy import Connection, text

from trigger.catalog.schema import VERSION, gaps, histories, metadata, reached, schema_version, version
from trigger.catalog.sqlite import connect_to
from trigger.errors import CatalogError
from trigger.trusted import sync_folder

KIND_OF_VERSION_1 = "postgres"
"""The only kind of database that version 1 knew."""


def migrate(connection: Connection) -> None:
    """Bring the tables to `VERSION` inside the caller's transaction; makes them where there are none.

    Raises:
        CatalogError: a newer Trigpoint made them.
    """
    schema_version.create(connection, checkfirst=True)
    have = version(connection)
    if have == VERSION:
        return
    if have is None:
        metadata.create_all(connection)
    elif have > VERSION:
        raise CatalogError(
            f"its tables are of version {have}, this program knows versions up to {VERSION}",
            hint="run the newer Trigpoint that made it",
        )
    else:
        for step in STEPS[have - 1 :]:
            step(connection)
    reached(connection, VERSION)


def _to_version_2(connection: Connection) -> None:
    """Histories get a kind and an incarnation, and gaps point to them; ids of transactions become numbers in names."""
    if connection.dialect.name == "sqlite":
        _run(connection, "PRAGMA defer_foreign_keys = ON")  # rows point to histories, which are made anew
    _run(connection, "CREATE TABLE histories_1 AS SELECT id, system, timeline FROM histories")
    _run(
        connection,
        """
        INSERT INTO histories_1 (id, system, timeline)
        SELECT (SELECT coalesce(max(id), 0) FROM histories) + row_number() OVER (ORDER BY named.system, named.timeline),
               named.system, named.timeline
          FROM (SELECT after_system AS system, after_timeline AS timeline FROM gaps
                UNION SELECT until_system, until_timeline FROM gaps) AS named
         WHERE NOT EXISTS (SELECT 1 FROM histories AS old
                            WHERE old.system = named.system AND old.timeline = named.timeline)
        """,
    )
    _run(connection, "CREATE TABLE gaps_1 AS SELECT * FROM gaps")
    _run(connection, "DROP TABLE gaps")
    _make_histories_anew(connection)
    gaps.create(connection)
    _run(
        connection,
        """
        INSERT INTO gaps (id, stream, after_history, after_at, until_history, until_at, reason, found_at_us, closed_by)
        SELECT gap.id, gap.stream, after.id, gap.after_lsn, until.id, gap.until_lsn, gap.reason, gap.found_at_us,
               gap.closed_by
          FROM gaps_1 AS gap
          JOIN histories AS after ON after.system = gap.after_system AND after.branch = gap.after_timeline
          JOIN histories AS until ON until.system = gap.until_system AND until.branch = gap.until_timeline
         ORDER BY gap.id
        """,
    )
    for old in ("level", "low", "high"):
        _run(connection, f"ALTER TABLE blocks RENAME COLUMN xid_{old} TO number_{old}")
    _run(connection, "ALTER TABLE xid_outliers RENAME TO number_outliers")
    _run(connection, "ALTER TABLE number_outliers RENAME COLUMN xid TO number")
    _run(connection, "DROP INDEX blocks_by_xid")
    _run(connection, "CREATE INDEX blocks_by_number ON blocks (number_level, number_low, number_high)")
    for done in ("gaps_1", "histories_1"):
        _run(connection, f"DROP TABLE {done}")
    if connection.dialect.name != "sqlite":
        for name in ("histories", "gaps"):
            newest = f"SELECT max(id) + 1 FROM {name}"  # noqa: S608 - a table of ours
            _run(connection, f"SELECT setval(pg_get_serial_sequence('{name}', 'id'), ({newest}))")


def _make_histories_anew(connection: Connection) -> None:
    """Put the rows of `histories_1` into a table of the present form, with the same keys."""
    if connection.dialect.name == "sqlite":  # which cannot take a unique constraint away
        _run(connection, "DROP TABLE histories")
        histories.create(connection)
    else:
        _run(connection, "ALTER TABLE histories DROP CONSTRAINT histories_system_timeline_key")
        _run(connection, "ALTER TABLE histories RENAME COLUMN timeline TO branch")
        _run(connection, f"ALTER TABLE histories ADD COLUMN kind TEXT NOT NULL DEFAULT '{KIND_OF_VERSION_1}'")
        _run(connection, "ALTER TABLE histories ADD COLUMN incarnation BIGINT NOT NULL DEFAULT 0")
        _run(connection, "ALTER TABLE histories ALTER COLUMN kind DROP DEFAULT")
        _run(connection, "ALTER TABLE histories ALTER COLUMN incarnation DROP DEFAULT")
        _run(connection, "ALTER TABLE histories ADD UNIQUE (kind, system, branch, incarnation)")
    _run(
        connection,
        f"""
        INSERT INTO histories (id, kind, system, branch, incarnation)
        SELECT id, '{KIND_OF_VERSION_1}', system, timeline, 0 FROM histories_1 AS old
         WHERE NOT EXISTS (SELECT 1 FROM histories WHERE histories.id = old.id)
         ORDER BY id
        """,  # noqa: S608 - a word of ours
    )


STEPS: Sequence[Callable[[Connection], None]] = (_to_version_2,)
"""The step from version n to n + 1 at place n - 1; a new catalog is made at `VERSION` at once."""


def _run(connection: Connection, statement: str) -> None:
    connection.execute(text(statement))


def copy_of(file: Path, have: int) -> Path:
    """Give where the copy of a catalog lies that was kept before it left a version."""
    return file.with_name(f"{file.name}.version-{have}")


def keep_copy(file: Path, have: int) -> None:
    """Copy a SQLite catalog that is about to leave a version, durably; one of an earlier try is replaced.

    Raises:
        CatalogError: there is no room for it, or its folder cannot be written; nothing is left of it.
    """
    copy = copy_of(file, have)
    half_made = copy.with_name(f"{copy.name}.new")
    try:
        half_made.unlink(missing_ok=True)
        descriptor = os.open(half_made, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            _back_up(file, half_made)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        half_made.rename(copy)
        sync_folder(copy.parent)
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            half_made.unlink(missing_ok=True)
        raise CatalogError(
            f"no copy of {file} could be kept, so it stays of version {have}: {error}",
            hint=f"make room in {file.parent} for a second one of {file.stat().st_size} bytes, and start again",
        ) from error


def _back_up(file: Path, copy: Path) -> None:
    with contextlib.closing(connect_to(file)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def has_copies(file: Path) -> bool:
    """Whether a copy is kept of an earlier version of a catalog."""
    return any(copy_of(file, have).exists() for have in range(1, VERSION))


def drop_copies(file: Path) -> None:
    """Remove the copies that were kept of a catalog: what was sealed since would be lost with them."""
    for have in range(1, VERSION):
        copy_of(file, have).unlink(missing_ok=True)
