"""The catalog's tables, how they came to be, and the database that serves them.

SQLite serves them by default, and how it opens its file is told by `sqlite`; PostgreSQL can.

Commits have no rows of their own. A row of `blocks` holds up to a thousand (see `packing`), so that 10^8 commits are
10^5 rows, and finds them by range: place in the log, number in the name, commit time. Ranges of one kind overlap
(neither numbers nor times rise in log order), so each has a *level*: the range is narrower than 16^level. Whoever looks
for a value then needs to look, level by level, only at ranges that begin less than 16^level below it, and of those
there are a few, not all that began earlier. Numbers far outside the range of their block have rows in
`number_outliers`, and markers, which few commits carry, have rows in `markers`, by a 64-bit digest of their text.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from trigger.catalog import sqlite
from trigger.errors import CatalogError, DamagedError, TrigpointError, remedy
from trigger.trusted import sync_folder

VERSION = 2
"""The version of the tables below; how older ones are brought to it is told by `migrations`."""

BIGINT_MAX = (1 << 63) - 1
BIGINT_MIN = -(1 << 63)
LEVELS = 17
"""A block's range has a level from 0 to 16: it is narrower than 16^level."""

metadata = MetaData()

_Serial = BigInteger().with_variant(Integer, "sqlite")  # only INTEGER PRIMARY KEY numbers rows by itself in SQLite

schema_version = Table(
    "schema_version",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("reached_at", Text, nullable=False),
)
counters = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
histories = Table(
    "histories",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("system", Text, nullable=False),
    Column("branch", BigInteger, nullable=False),
    Column("incarnation", BigInteger, nullable=False),
    UniqueConstraint("kind", "system", "branch", "incarnation"),
)
HISTORY_COLUMNS = ("kind", "system", "branch", "incarnation")
"""The columns of `histories` that are a history, in the order of its fields."""
streams = Table(
    "streams",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
)
settled = Table(
    "settled",
    metadata,
    Column("stream", ForeignKey("streams.id"), primary_key=True, autoincrement=False),
    Column("history", ForeignKey("histories.id"), nullable=False),
    Column("through", BigInteger, nullable=False),
)
PRUNED = "pruned"
"""In the place of a state: a point that expired long ago, of which its number and id are left (see `pruning`)."""
points = Table(
    "points",
    metadata,
    Column("number", _Serial, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False, unique=True),
    Column("state", Text, nullable=False),
    Column("gaps_before", BigInteger, nullable=False),  # the last gap that was known when the point was opened
    Column("document", Text, nullable=False),  # the whole point, in the form of `trigger.catalog.tag`
    Index("points_by_state", "state", "number"),
)
blocks = Table(
    "blocks",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("history", ForeignKey("histories.id"), nullable=False),
    Column("stream", ForeignKey("streams.id"), nullable=False),
    Column("first", BigInteger, nullable=False),
    Column("last", BigInteger, nullable=False),
    Column("number_level", Integer, nullable=False),
    Column("number_low", BigInteger, nullable=False),
    Column("number_high", BigInteger, nullable=False),
    Column("time_level", Integer, nullable=False),
    Column("time_low_us", BigInteger, nullable=False),
    Column("time_high_us", BigInteger, nullable=False),
    Column("time_peak_us", BigInteger, nullable=False),  # the latest time in this and all earlier blocks of the stream
    Column("point", ForeignKey("points.number")),  # null: missed
    Column("reason", Text),  # why missed
    Column("commits", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    UniqueConstraint("history", "stream", "first"),
    Index("blocks_by_number", "number_level", "number_low", "number_high"),
    Index("blocks_by_time", "time_level", "time_low_us", "time_high_us"),
    Index("blocks_by_peak", "history", "stream", "time_peak_us", "first"),
    Index("blocks_by_point", "point"),
)
number_outliers = Table(
    "number_outliers",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("block", ForeignKey("blocks.id"), primary_key=True, autoincrement=False),
    sqlite_with_rowid=False,
)
markers = Table(
    "markers",
    metadata,
    Column("digest", BigInteger, primary_key=True, autoincrement=False),
    Column("block", ForeignKey("blocks.id"), primary_key=True, autoincrement=False),
    sqlite_with_rowid=False,
)
gaps = Table(
    "gaps",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("stream", Text, nullable=False),
    Column("after_history", ForeignKey("histories.id"), nullable=False),
    Column("after_at", BigInteger, nullable=False),
    Column("until_history", ForeignKey("histories.id"), nullable=False),
    Column("until_at", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("found_at_us", BigInteger, nullable=False),
    Column("closed_by", BigInteger, nullable=False),
    Index("gaps_by_closing", "closed_by"),
)


def make_engine(url_or_path: str | Path) -> Engine:
    """Give the engine for a database URL, a path to a SQLite file, or `:memory:`; nothing is opened yet.

    Raises:
        CatalogError: the URL cannot be read, or there is no driver for it.
    """
    where = str(url_or_path)
    try:
        url = make_url(where) if "://" in where else URL.create("sqlite", database=where)
        return _sqlite_engine(url) if url.get_backend_name() == "sqlite" else _server_engine(url)
    except (SQLAlchemyError, ImportError) as error:
        raise CatalogError(
            f"catalog URL {where.partition('://')[0]}://… cannot be used: {error}",  # the rest may hold a password
            hint="give a path, or a URL like postgresql+psycopg://user@host/database",
        ) from error


def _server_engine(url: URL) -> Engine:
    # Serializable: two services that share a catalog by mistake conflict instead of interleaving.
    return create_engine(url, pool_size=1, max_overflow=1, pool_pre_ping=True, isolation_level="SERIALIZABLE")


def _sqlite_engine(url: URL) -> Engine:
    in_memory = url.database in (None, "", ":memory:")
    options: dict[str, Any] = {"poolclass": StaticPool} if in_memory else {"pool_size": 1, "max_overflow": 1}
    engine = create_engine(url, **options)
    file = sqlite_file(engine)
    alone = file is not None and sqlite.must_be_alone(file)

    def connect(_dialect: object, _entry: object, database: list[str], options: dict[str, Any]) -> sqlite3.Connection:
        return sqlite.opened(*database, alone=alone, **options)

    event.listen(engine, "do_connect", connect)
    if file is not None:
        event.listen(engine, "checkin", sqlite.let_go)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def sqlite_file(engine: Engine) -> Path | None:
    """Give the file of a SQLite catalog; None for one in memory or on a server."""
    url = engine.url
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database)).absolute()


def display(engine: Engine) -> str:
    """Give where a catalog lies, for people: a path, `:memory:`, or a URL without its password."""
    if engine.url.get_backend_name() == "sqlite":
        return str(sqlite_file(engine) or ":memory:")
    return engine.url.render_as_string(hide_password=True)


def create_file(path: Path) -> None:
    """Make an empty catalog file that only its owner can read, and its name durable; one that is there stays."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        sync_folder(path.parent)


def inode(path: Path) -> tuple[int, int] | None:
    """Give (device, inode) of the file at `path`; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def version(connection: Connection) -> int | None:
    """Give the version of the tables that are there; None where there are none."""
    if not inspect(connection).has_table(schema_version.name):
        return None
    found: int | None = connection.scalar(select(func.max(schema_version.c.version)))
    return found


def reached(connection: Connection, number: int) -> None:
    """Note that the tables are of a version now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    connection.execute(insert(schema_version).values(version=number, reached_at=now))


_COUNT = (
    update(counters)
    .where(counters.c.name == bindparam("key"))
    .values(value=counters.c.value + bindparam("more", type_=BigInteger))
)


def count(connection: Connection, name: str, more: int) -> None:
    """Add `more` to the counter `name`."""
    if more == 0:
        return
    if connection.execute(_COUNT, {"key": name, "more": more}).rowcount == 0:
        connection.execute(insert(counters), {"name": name, "value": more})


def size_bytes(connection: Connection) -> int:
    """Give the room that the catalog's tables and indexes take."""
    if connection.dialect.name == "sqlite":
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        return int(pages) * int(connection.exec_driver_sql("PRAGMA page_size").scalar_one())
    each = text("SELECT pg_total_relation_size(CAST(:name AS regclass))")
    return sum(int(connection.scalar(each, {"name": table.name}) or 0) for table in metadata.sorted_tables)


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the write lock at once: one that read first could lose it to another and fail half way.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


_RETRYABLE_STATES = ("40001", "40P01", "53100", "53300", "57P01", "57P02", "57P03")
"""PostgreSQL's codes for: conflict, deadlock, disk full, too many connections, and three kinds of shutting down."""

_NO_ROOM = ("SQLITE_FULL", sqlite.NO_ROOM_TO_SHARE)
_SQLITE_WORDS: dict[str | tuple[str, ...], tuple[str, str, bool]] = {
    _NO_ROOM: (
        "no room left",
        "free some space on its filesystem, or give up old points: `trigpoint expire`",
        True,
    ),
    "SQLITE_READONLY": (
        "it cannot be written",
        "mount it read-write, and give the service's user the right to it and to its -wal and -shm files",
        False,
    ),
    "SQLITE_BUSY": ("another process holds it", "see which Trigpoint is writing to it; tried for 5 s", True),
    "SQLITE_LOCKED": ("another call holds it", "see which Trigpoint is writing to it; tried for 5 s", True),
    "SQLITE_CORRUPT": ("it is damaged", "set it aside and run: trigpoint catalog rebuild", False),
    "SQLITE_NOTADB": ("it is not a catalog, or damaged", "check the path; else: trigpoint catalog rebuild", False),
    "SQLITE_ERROR": ("its tables are not a catalog's", "check the path; else: trigpoint catalog rebuild", False),
    "SQLITE_CANTOPEN": ("it cannot be opened", "its folder must exist and be writable for the service's user", False),
    "SQLITE_PERM": ("permission denied", "give the service's user the right to its file and folder", False),
    "SQLITE_AUTH": ("permission denied", "give the service's user the right to its file and folder", False),
    "SQLITE_IOERR_LOCK": ("it cannot be locked", "mount it read-write, on a filesystem that has locks", True),
    "SQLITE_IOERR": ("its disk failed", "look at the kernel's log and at the filesystem's free space", True),
}
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR")
"""Of these the file itself is the cause; the last one is that it lacks a table or a column of ours, which all have."""


def is_full(error: DBAPIError) -> bool:
    """Whether SQLite found no room on its disk."""
    return str(getattr(error.orig, "sqlite_errorname", "")).startswith(_NO_ROOM)


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise every error of the database inside the block as `CatalogError` that names the catalog and the remedy."""
    try:
        yield
    except CatalogError as error:
        raise type(error)(_named(where, error.message), hint=error.hint, retryable=error.retryable) from error
    except TrigpointError:
        raise
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise _explained(where, error) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space" if full else "its folder must exist and be writable for the service's user"
        raise CatalogError(_named(where, error.strerror or str(error)), hint=hint, retryable=full) from error
    except (UnicodeEncodeError, OverflowError) as error:
        raise CatalogError(_named(where, f"a value cannot be kept: {error}")) from error


def _explained(where: str, error: Exception) -> CatalogError:
    origin = error.orig if isinstance(error, DBAPIError) else error
    name = str(getattr(origin, "sqlite_errorname", ""))
    for beginning, (what, hint, retryable) in _SQLITE_WORDS.items():
        if name.startswith(beginning):
            kind = DamagedError if beginning in _DAMAGE else CatalogError
            read_only = beginning == "SQLITE_CANTOPEN" and _is_read_only(Path(where).parent)
            does = remedy(OSError(errno.EROFS, "")) if read_only else hint
            return kind(_named(where, f"{what} ({origin})"), hint=does, retryable=retryable)
    state = getattr(origin, "sqlstate", None)
    unreached = isinstance(error, OperationalError) and state is None  # a server that cannot be connected to
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    again = unreached or lost or state in _RETRYABLE_STATES
    words = str(origin or error).strip().splitlines() or [type(error).__name__]
    return CatalogError(_named(where, words[0]), hint="see the database's own log", retryable=again)


def _is_read_only(folder: Path) -> bool:
    """Whether a folder is there, on a filesystem that is mounted read-only."""
    with contextlib.suppress(OSError):
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    return False


def _named(where: str, what: str) -> str:
    prefix = f"catalog {where}: "
    return what if what.startswith(prefix) else prefix + what
