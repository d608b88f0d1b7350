"""The drivers, by the name a configuration calls them; strings only, so that nothing is loaded before it is used."""

DRIVERS = {
    "database/postgres": "connectors.databases.postgres:Postgres",
    "agent/local": "connectors.hosts.local:LocalAgent",
    "storage/directory": "connectors.storage.directory:DirectoryStorage",
    "storage/btrfs": "connectors.storage.btrfs:BtrfsStorage",
}
