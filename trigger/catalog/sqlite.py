"""How a SQLite catalog's file is opened: shared with other processes all the time, or held alone for a transaction.

Processes share it by an index of its log that all of them map (`-shm`). Where the filesystem writes nothing in place,
each write to a mapped page asks for room anew, and a full disk ends the process by a signal. There, and where that file
finds no room, nobody maps anything: whoever has a transaction has the file to itself, and the next one waits for that.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry

from trigger.host import mount_of, read_mounts

BUSY_TIMEOUT_SECONDS = 5.0
"""How long a call waits for another process that is writing, or has the file to itself."""

_PAUSE_SECONDS = 0.005

NO_ROOM_TO_SHARE = "SQLITE_IOERR_SHMSIZE"
"""SQLite's name of the error where the file that is mapped cannot be made as long as it has to be."""

_COPIES_ON_WRITE = ("btrfs", "bcachefs")


def must_be_alone(file: Path) -> bool:
    """Whether a mapped file, where `file` lies or will lie, asks for room each time that it is written to."""
    try:
        return mount_of(file.resolve(), read_mounts()).filesystem in _COPIES_ON_WRITE
    except OSError:
        return False


def connect_to(file: Path) -> sqlite3.Connection:
    """Give a connection to `file` for one purpose, alone where it must be."""
    return opened(str(file), alone=must_be_alone(file))


def opened(database: str, *, alone: bool, **options: Any) -> sqlite3.Connection:
    """Give a connection on which transactions begin and end where we say; one that is `alone` is so once it is used.

    It is alone too where there is no room to share the file. `options` are those of `sqlite3.connect`.
    """
    if not alone:
        try:
            return _opened(database, alone=False, **options)
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorname", "") != NO_ROOM_TO_SHARE:
                raise
    return _opened_alone(database, **options)


def _opened_alone(database: str, **options: Any) -> sqlite3.Connection:
    """Give a connection that has the file to itself; who waits for that holds nothing.

    SQLite asks for the file in two steps, and would keep the first while it waits for the second: of two who wait, each
    would have what the other wants, and whoever came later would join them.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            return _opened(database, alone=True, **options | {"timeout": 0})
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorname", "") != "SQLITE_BUSY" or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def _opened(database: str, *, alone: bool, **options: Any) -> sqlite3.Connection:
    wanted = {"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False} | options
    connection = sqlite3.connect(database, **wanted)
    try:
        connection.isolation_level = None  # transactions begin and end where we say, not where the driver guesses
        if alone:  # before anything else: from then on it would be shared
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        if connection.execute("PRAGMA page_count").fetchone() == (0,):  # it can be said of a new file only
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def let_go(connection: sqlite3.Connection | None, entry: ConnectionPoolEntry) -> None:
    """Close a connection that has the file to itself, when a transaction has ended: others wait for it."""
    if connection is not None and connection.execute("PRAGMA locking_mode").fetchone() == ("exclusive",):
        entry.invalidate()
