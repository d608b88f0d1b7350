"""How the parts of one PostgreSQL cluster are put together, each from its own section: its journal, its clones.

Everything here is made from a `Layout`, which the service keeps, so that a restore needs no running cluster.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from connectors.databases.postgres import places
from connectors.databases.postgres.clone.placement import Placement
from connectors.databases.postgres.clone.recovery import PostgresRecovery
from connectors.databases.postgres.database import Postgres
from connectors.databases.postgres.log.archive import ArchiveReader
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.journal import Feed, PostgresJournal
from connectors.databases.postgres.log.receiver import Receiver
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.programs import find_programs
from connectors.databases.postgres.sections import ArchiveOptions, CloneOptions, PostgresOptions, ReceivewalOptions
from trigger.errors import ConfigError, DatabaseError
from trigger.model import Layout, Volume


def database(section: PostgresOptions, suffix: str = "") -> Postgres:
    """Give the cluster that a section names; `suffix` keeps what is made in it apart from a service's."""
    return Postgres(
        section.conninfo,
        section.databases,
        f"{section.slot_prefix}{suffix}",
        section.bin_directory,
        section.password_file,
        section.deadline_seconds,
        failover=section.failover,
    )


def received_journal(
    section: ReceivewalOptions,  # noqa: ARG001 - all that it holds is the folder
    database: Postgres,
    layout: Layout,
    folder: Path,
) -> PostgresJournal:
    """Give the journal that PostgreSQL's own `pg_receivewal` keeps in `folder`."""
    programs = find_programs(places.major(layout), database.bin_directory)
    receiver = Receiver(database.conninfo, programs, database.journal_slot(), recognise=database.recognised)
    return _journal(database, layout, folder, receiver)


def archived_journal(section: ArchiveOptions, database: Postgres, layout: Layout, folder: Path) -> PostgresJournal:
    """Give the journal that is read from an archive through its own `restore_command`, by way of `folder`."""
    return _journal(database, layout, folder, ArchiveReader(section.restore_command, database))


def _journal(database: Postgres, layout: Layout, folder: Path, feed: Feed) -> PostgresJournal:
    owner = (layout.owner, layout.group)
    folders = LogFolders(folder, layout.log_file_bytes, owner)
    database.lives.folders, database.lives.writer = folders, feed.owner

    def dump_for(segments: SegmentFolder) -> WalDump | None:
        try:
            return WalDump(find_programs(segments.major() or places.major(layout), database.bin_directory))
        except ConfigError:
            return None

    async def names() -> dict[int, str]:
        try:
            return {oid: name for name, oid in (await database.existing()).items()}
        except DatabaseError:  # they are for people, who are told the oids then
            return {}

    return PostgresJournal(folders, feed, database.present, dump_for, database.lives.newest_known, names)


def recovery(
    section: CloneOptions, database: Postgres, layout: Layout, volumes: Sequence[Volume], name: str
) -> PostgresRecovery:
    """Give what brings up the servers of clones of the cluster called `name`.

    Raises:
        PreflightError: part of the cluster lies outside the volumes.
    """
    return PostgresRecovery(
        Placement.of(layout, volumes),
        lambda major: find_programs(major, database.bin_directory),
        sockets_folder(name),
        superusers=[section.superuser] if section.superuser else [places.first_superuser(layout), "postgres"],
        conninfo=database.conninfo,
        databases=database.databases,
        environment=places.environment(layout),
        keep_libraries=section.keep_libraries,
        start_deadline_seconds=section.deadline_seconds,
    )


def sockets_folder(name: str) -> Path:
    """Give where the sockets of clones lie: short, ours, and in a place that the owner of the data can reach."""
    if os.geteuid() == 0:
        return Path("/run/trigpoint") / name
    return Path("/tmp") / f"trigpoint-{os.geteuid()}" / name  # noqa: S108 - made with our own rights, checked when used
