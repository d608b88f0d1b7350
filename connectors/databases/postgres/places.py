"""What PostgreSQL's part of a layout says: version, segment size, and which folder is which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, LiteralString

from connectors.databases.postgres.encoding import shared_text
from trigger.errors import ConfigError, DatabaseError
from trigger.model import Layout
from trigger.trusted import read_text

_DATA, _WAL, _TABLESPACE = "data", "wal", "tablespace-"
_USUAL_SUPERUSER = "postgres"
_OF_LOCALES = ("LOCPATH", "ICU_DATA")
LAYOUT: LiteralString = """
SELECT current_setting('server_version_num')::int,
       textsend(current_setting('data_directory')),
       (SELECT setting::int FROM pg_settings WHERE name = 'wal_segment_size'),
       array(SELECT ARRAY[textsend(oid::text), textsend(pg_tablespace_location(oid))] FROM pg_tablespace
              WHERE pg_tablespace_location(oid) <> ''),
       array(SELECT DISTINCT textsend(file) FROM (
                 SELECT current_setting(name) FROM unnest(ARRAY['config_file', 'hba_file', 'ident_file']) AS name
                 UNION SELECT sourcefile FROM pg_file_settings WHERE sourcefile IS NOT NULL) AS files(file)),
       (SELECT namesend(rolname) FROM pg_roles WHERE oid = 10)
"""
"""What `look_at_files` is told. Role 10 is the one that initdb made (BOOTSTRAP_SUPERUSERID)."""


def layout(
    version: int,
    data: Path,
    wal: Path,
    tablespaces: Mapping[int, Path],
    config_files: tuple[Path, ...],
    owner: tuple[int, int],
    segment_bytes: int,
    superuser: str = _USUAL_SUPERUSER,
    environment: Mapping[str, str] | None = None,
) -> Layout:
    """Give the layout of a cluster; every path real, tablespaces by oid, of those outside the data directory."""
    found = {_DATA: data}
    if not wal.is_relative_to(data):
        found[_WAL] = wal
    found |= {f"{_TABLESPACE}{oid}": path for oid, path in sorted(tablespaces.items())}
    own = {"version": version, "superuser": superuser, "environment": dict(environment or {})}
    return Layout(found, wal, config_files, *owner, segment_bytes, own)


def recall(document: Mapping[str, Any]) -> Layout:
    """Give the layout that was kept as JSON, also by version 0.1.0, which called its parts by other names.

    Raises:
        ConfigError: it is none.
    """
    try:
        if "data_directory" in document:
            return layout(
                document["version"],
                Path(document["data_directory"]),
                Path(document["wal_directory"]),
                {oid: Path(path) for oid, path in document["tablespaces"]},
                tuple(map(Path, document["config_files"])),
                (document["owner"], document["group"]),
                document["wal_segment_bytes"],
            )
        return Layout(
            {role: Path(path) for role, path in document["places"].items()},
            Path(document["log"]),
            tuple(map(Path, document["config_files"])),
            document["owner"],
            document["group"],
            document["log_file_bytes"],
            dict(document["driver"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the layout that was kept cannot be read: {error!r}", hint="start the cluster, which tells it anew"
        ) from error


def data_directory(of: Layout) -> Path:
    """Give the data directory."""
    return of.places[_DATA]


def tablespaces(of: Layout) -> dict[int, Path]:
    """Give by oid the tablespaces that lie outside the data directory."""
    found = {role.removeprefix(_TABLESPACE): path for role, path in of.places.items() if role.startswith(_TABLESPACE)}
    return {int(oid): path for oid, path in found.items()}


def major(of: Layout) -> int:
    """Give the major version of the server."""
    return int(of.driver["version"]) // 10_000


def first_superuser(of: Layout) -> str:
    """Give the role that initdb made, which no cluster is without, as it is called."""
    return str(of.driver.get("superuser", _USUAL_SUPERUSER))


def environment(of: Layout) -> dict[str, str]:
    """Give the variables by which the server finds its locales; a clone's has to find the same."""
    return dict(of.driver.get("environment", {}))


def _environment(data: Path) -> dict[str, str]:
    """Give such variables of the server that runs in a data directory; none where we may not look."""
    try:
        pid = int(read_text(data / "postmaster.pid").split()[0])
        if not Path(f"/proc/{pid}/cwd").samefile(data):  # of a server that is gone
            return {}
        found = (entry.partition("=") for entry in Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    except (OSError, ValueError, IndexError):
        return {}
    return {name: value for name, _, value in found if name in _OF_LOCALES}


def look_at_files(
    version: int, data: bytes, segment_bytes: int, spaces: list[list[bytes]], files: list[bytes], superuser: bytes
) -> Layout:
    """Resolve what the server says of its files against this host's filesystem; touches nothing."""
    try:
        directory = Path(os.fsdecode(data)).resolve(strict=True)
        stat = directory.stat()
        wal = (directory / "pg_wal").resolve(strict=True)
        resolved = [(int(oid), Path(os.fsdecode(path)).resolve(strict=True)) for oid, path in spaces]
    except OSError as error:
        raise DatabaseError(
            f"the cluster's files are not reachable here: {error}",
            hint="the service must run on the database's host, as a user that may read its data directory",
        ) from error
    outside = (Path(os.path.realpath(directory / os.fsdecode(file))) for file in files)
    return layout(
        version,
        directory,
        wal,
        {oid: path for oid, path in resolved if not path.is_relative_to(directory)},
        tuple(sorted({file for file in outside if not file.is_relative_to(directory)})),
        (stat.st_uid, stat.st_gid),
        segment_bytes,
        shared_text(superuser),
        _environment(directory),
    )
