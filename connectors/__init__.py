"""The drivers, by the name a configuration calls them; strings only, so that nothing is loaded before it is used."""

DRIVERS = {
    "places/postgres": "connectors.databases.postgres.lsn:Lsn",
    "database/postgres": "connectors.databases.postgres.assembly:database",
    "journal/receivewal": "connectors.databases.postgres.assembly:received_journal",
    "journal/archive": "connectors.databases.postgres.assembly:archived_journal",
    "recovery/postgres": "connectors.databases.postgres.assembly:recovery",
    "agent/local": "connectors.hosts.local:LocalAgent",
    "storage/directory": "connectors.storage.directory:DirectoryStorage",
    "storage/btrfs": "connectors.storage.btrfs:BtrfsStorage",
}
