"""What is kept of a clone beside its data, so that another process can speak of it too."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from connectors.databases.postgres import lsn
from connectors.databases.postgres.clone.isolation import OWN_FOLDER, write
from connectors.databases.postgres.log.files import entered, text_inside
from connectors.databases.postgres.lsn import Lsn
from trigger.errors import RestoreError
from trigger.replay import Running

_REACHING = frozenset({"host", "port", "user", "application_name"})
"""What a connection string of ours says; other words of libpq name files of ours, or make it ask elsewhere."""


@dataclass(frozen=True, slots=True)
class State:
    """What a clone is, by what was seen when it came up."""

    FILE = "running.json"

    clone: str
    conninfo: str
    system: str
    timeline: int
    replayed: str
    last_commit_at: str
    notes: tuple[str, ...]
    next_xid: int
    """The first transaction id that the replayed log had not used."""
    incarnation: int = 0
    home: str = "template1"
    """A database that takes connections."""
    reader: str = ""
    """The role by which a sandbox is asked; "" for the superuser."""
    shrunk: dict[str, int] = field(default_factory=dict)
    """To how many pages the replayed log truncated a file, by path."""

    def write(self, data: Path) -> None:
        """Keep it in the clone, readable by the owner of the data alone."""
        write(data / OWN_FOLDER / self.FILE, self.as_json(), owner_of(data))

    def as_json(self) -> str:
        """Give it as JSON text."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def is_in(cls, data: Path) -> bool:
        """Whether a data directory is a clone's that was brought up, and was not made fit for production since."""
        return (data / OWN_FOLDER / cls.FILE).exists()

    @classmethod
    def remove(cls, data: Path) -> None:
        """Take it out of a data directory for good: what lies there is no clone any more that can be started."""
        with contextlib.suppress(FileNotFoundError), entered(data / OWN_FOLDER) as folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(cls.FILE, dir_fd=folder)
            os.fsync(folder)

    @classmethod
    def read(cls, data: Path) -> State:
        """Give what is kept in a data directory; raises `RestoreError` where it is no clone that was brought up.

        The owner of the data may have written it. So nothing is taken for a connection but a socket on this host.
        """
        try:
            found = json.loads(text_inside(data, Path(OWN_FOLDER, cls.FILE)))
            _require_local(found["conninfo"])
            return cls(**found | {"notes": tuple(found["notes"])})
        except (OSError, ValueError, TypeError, KeyError, psycopg.ProgrammingError) as error:
            raise RestoreError(f"{data} is not a clone that was brought up: {error}") from error

    def running(self, data: Path, pid: int) -> Running:
        """Give the server of the clone, which runs as process `pid`."""
        return Running(
            clone=self.clone,
            conninfo=self.conninfo,
            data_directory=data,
            pid=pid,
            history=lsn.history(self.system, self.timeline, self.incarnation),
            replayed=Lsn.parse(self.replayed),
            last_commit_at=datetime.fromisoformat(self.last_commit_at) if self.last_commit_at else None,
            notes=self.notes,
        )


def _require_local(conninfo: str) -> None:
    said = conninfo_to_dict(conninfo)
    if not said.keys() <= _REACHING or not str(said.get("host", "")).startswith("/"):
        raise ValueError(f"it is not reached by {', '.join(sorted(said))} as a clone is")


def owner_of(data: Path) -> tuple[int, int]:
    """Give the user and group id that a data directory belongs to."""
    status = data.stat()
    return status.st_uid, status.st_gid
