"""The sources that the suite is run against: each a rig that can commit, and hurt the slot and the server."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from connectors.databases.postgres.lives import Lives
from connectors.databases.postgres.stream.source import PostgresSource
from connectors.memory import MemorySource, World
from tests.fixtures.postgres import Cluster
from trigger.ports import Source


class SourceRig(Protocol):
    """One stream of commits under test."""

    def driver(self) -> Source:
        """Give the source, built anew as after a restart of the service."""
        ...

    def commit(self, marker: str) -> None:
        """Commit a transaction that bears a marker."""
        ...

    def commit_elsewhere(self) -> None:
        """Commit a transaction that this stream does not see."""
        ...

    def cut_connections(self) -> None:
        """Break the connection of the source."""
        ...

    def drop_slot(self) -> None:
        """Drop the slot while nobody reads."""
        ...

    def recreate_slot(self) -> None:
        """Drop the slot and make it again at the present end of the log."""
        ...

    def advance_slot(self) -> None:
        """Move the slot to the present end of the log."""
        ...

    def crash(self) -> None:
        """Kill the server and start it again."""
        ...

    def copy(self) -> Any:
        """Give a copy of the server as it is now."""
        ...

    def put_back(self, copy: Any) -> None:
        """Have the server go on from a copy of it."""
        ...

    def promote(self) -> None:
        """Have the server leave its history for a new one, as a failover does."""
        ...


@dataclass
class MemorySourceRig:
    """The reference driver."""

    build: type[MemorySource] = MemorySource
    world: World = field(default_factory=World)

    def driver(self) -> Source:
        return self.build(self.world, "bank")

    def commit(self, marker: str) -> None:
        self.world.cluster.commit("bank", markers=(marker,))

    def commit_elsewhere(self) -> None:
        self.world.cluster.commit("shop")

    def cut_connections(self) -> None:
        self.world.cluster.cut_connections()

    def drop_slot(self) -> None:
        self.world.cluster.drop_slot("bank")

    def recreate_slot(self) -> None:
        self.world.cluster.recreate_slot("bank")

    def advance_slot(self) -> None:
        self.world.cluster.advance_slot("bank")

    def crash(self) -> None:
        self.world.cluster.crash()
        self.world.cluster.restart()

    def copy(self) -> Any:
        return self.world.cluster.copy()

    def put_back(self, copy: Any) -> None:
        self.world.cluster.put_back(copy)

    def promote(self) -> None:
        self.world.cluster.promote(keep_slots=True)


@dataclass
class PostgresSourceRig:
    """A database of its own in a running cluster."""

    cluster: Cluster
    database: str

    def __post_init__(self) -> None:
        self.cluster.sql(f"CREATE DATABASE {self.database}")
        for database in (self.database, "postgres"):
            self.cluster.sql("CREATE TABLE IF NOT EXISTS t (id bigserial PRIMARY KEY)", database)
        self.slot = PostgresSource(self.cluster.conninfo, self.database).slot
        self._lives = Lives()

    def driver(self) -> Source:
        lives = self._lives
        return PostgresSource(self.cluster.conninfo, self.database, recognise=lives.confirm, saw=lives.saw)

    def commit(self, marker: str) -> None:
        with self.cluster.connect(self.database) as connection, connection.transaction():
            connection.execute("INSERT INTO t DEFAULT VALUES")
            connection.execute("SELECT pg_logical_emit_message(true, 'trigpoint', %s)", (marker,))

    def commit_elsewhere(self) -> None:
        self.cluster.sql("INSERT INTO t DEFAULT VALUES")

    def cut_connections(self) -> None:
        kill = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots"
        self.cluster.sql(f"{kill} WHERE slot_name = '{self.slot}' AND active_pid IS NOT NULL")

    def drop_slot(self) -> None:
        self.cluster.sql(f"SELECT pg_drop_replication_slot('{self.slot}')", self.database)

    def recreate_slot(self) -> None:
        self.drop_slot()
        self.cluster.sql(f"SELECT pg_create_logical_replication_slot('{self.slot}', 'pgoutput')", self.database)

    def advance_slot(self) -> None:
        move = f"SELECT pg_replication_slot_advance('{self.slot}', pg_current_wal_lsn())"
        self.cluster.sql(move, self.database)

    def crash(self) -> None:
        self.cluster.kill()
        self.cluster.start()

    def copy(self) -> Any:
        copy = self.cluster.data.parent / "copy"
        self._copied(self.cluster.data, copy)
        return copy

    def put_back(self, copy: Any) -> None:
        self._copied(copy, self.cluster.data)

    def promote(self) -> None:
        self.cluster.switch_timeline()

    def _copied(self, data: Path, to: Path) -> None:
        """Put a copy of a data directory into the place of another, while the server stands still."""
        self.cluster.stop()
        shutil.rmtree(to, ignore_errors=True)
        subprocess.run(["cp", "-a", data, to], check=True)
        self.cluster.start()
