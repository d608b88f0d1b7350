"""How the parts of one PostgreSQL cluster are put together: its journal, and the servers of its clones.

Everything here is made from a `Layout`, which the service keeps, so that a restore needs no running cluster.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from connectors.databases.postgres.clone.isolation import Placement
from connectors.databases.postgres.clone.recovery import PostgresRecovery
from connectors.databases.postgres.database import Postgres
from connectors.databases.postgres.log.archive import ArchiveReader
from connectors.databases.postgres.log.journal import Feed, PostgresJournal
from connectors.databases.postgres.log.receiver import Receiver
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.programs import find_programs
from trigger.model import Layout, Volume


def received_journal(database: Postgres, layout: Layout, folder: Path, restore_command: str | None) -> PostgresJournal:
    """Give the journal that PostgreSQL's own `pg_receivewal` keeps in `folder`; `restore_command` is not used."""
    del restore_command
    programs = find_programs(layout.version // 10_000, database.bin_directory)
    receiver = Receiver(database.conninfo, programs, database.journal_slot)
    return _journal(database, layout, folder, receiver)


def archived_journal(database: Postgres, layout: Layout, folder: Path, restore_command: str | None) -> PostgresJournal:
    """Give the journal that is read from an archive through its own `restore_command`, by way of `folder`."""
    assert restore_command is not None
    return _journal(database, layout, folder, ArchiveReader(restore_command, database))


def _journal(database: Postgres, layout: Layout, folder: Path, feed: Feed) -> PostgresJournal:
    programs = find_programs(layout.version // 10_000, database.bin_directory)
    owner = (layout.owner, layout.group)
    segments = SegmentFolder(folder, layout.wal_segment_bytes, owner)
    return PostgresJournal(segments, feed, WalDump(programs))


def recovery(
    database: Postgres,
    layout: Layout,
    volumes: Sequence[Volume],
    name: str,
    *,
    superuser: str,
    keep_libraries: Sequence[str],
    deadline_seconds: float,
) -> PostgresRecovery:
    """Give what brings up the servers of clones of the cluster called `name`.

    Raises:
        PreflightError: part of the cluster lies outside the volumes.
    """
    return PostgresRecovery(
        Placement.of(layout, volumes),
        lambda major: find_programs(major, database.bin_directory),
        sockets_folder(name),
        superuser=superuser,
        databases=database.databases,
        keep_libraries=keep_libraries,
        start_deadline_seconds=deadline_seconds,
    )


def sockets_folder(name: str) -> Path:
    """Give where the sockets of clones lie: short, ours, and in a place that the owner of the data can reach."""
    if os.geteuid() == 0:
        return Path("/run/trigpoint") / name
    return Path("/tmp") / f"trigpoint-{os.geteuid()}" / name  # noqa: S108 - made with our own rights, checked when used
