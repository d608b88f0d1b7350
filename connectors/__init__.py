"""The drivers, by the name a configuration calls them; strings only, so that nothing is loaded before it is used.

A line for what makes each (`storage/btrfs`), and one for the section of the configuration that it brings
(`options/storage/btrfs`), which stands in a module that loads without the driver's library. Where a configuration names
no driver, the first of its kind is meant.
"""

DRIVERS = {
    "options/database/postgres": "connectors.databases.postgres.sections:PostgresOptions",
    "options/journal/receivewal": "connectors.databases.postgres.sections:ReceivewalOptions",
    "options/journal/archive": "connectors.databases.postgres.sections:ArchiveOptions",
    "options/recovery/postgres": "connectors.databases.postgres.sections:CloneOptions",
    "options/agent/local": "connectors.hosts.sections:LocalOptions",
    "options/storage/directory": "connectors.storage.sections:DirectoryOptions",
    "options/storage/btrfs": "connectors.storage.sections:BtrfsOptions",
    "places/postgres": "connectors.databases.postgres.lsn:Lsn",
    "database/postgres": "connectors.databases.postgres.assembly:database",
    "journal/receivewal": "connectors.databases.postgres.assembly:received_journal",
    "journal/archive": "connectors.databases.postgres.assembly:archived_journal",
    "recovery/postgres": "connectors.databases.postgres.assembly:recovery",
    "agent/local": "connectors.hosts.local:agent",
    "storage/directory": "connectors.storage.directory:storage",
    "storage/btrfs": "connectors.storage.btrfs:storage",
}
