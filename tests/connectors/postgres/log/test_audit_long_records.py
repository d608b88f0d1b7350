"""One record of the log may be longer than several of its segments; the audit looks at it with the one it ends in."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.journal import PostgresJournal
from connectors.databases.postgres.log.receiver import Receiver
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.programs import server_owner
from tests.fixtures.postgres import Cluster
from tests.fixtures.restores import damage
from tests.fixtures.volumes import flip_bit, plain_folder
from trigger.position import History

pytestmark = [pytest.mark.server]

SEGMENT_BYTES = 1 << 20
LONG = "SELECT pg_logical_emit_message(false, 'other', repeat('y', 5000000))"
"""What every role may do."""


async def unasked() -> History:
    raise AssertionError("nothing is received")


@pytest.fixture(scope="module", params=[15, 18])
def log(request: pytest.FixtureRequest) -> Iterator[tuple[Cluster, list[Path]]]:
    """Give a stopped cluster, and the segments of its log in order: short records around two that span five each."""
    with plain_folder() as folder:
        cluster = Cluster(request.param, folder / "data")
        try:
            cluster.create("--wal-segsize=1", wal_keep_size="1GB")
            cluster.start()
            for step in (
                "SELECT pg_switch_wal()",
                "CREATE TABLE t ()",
                LONG,
                "CREATE TABLE u ()",
                LONG,
                "DROP TABLE u",
            ):
                cluster.sql(step)
            last = cluster.sql("SELECT pg_walfile_name(pg_switch_wal())")[0][0]
            cluster.stop()
            found = sorted(file for file in (cluster.data / "pg_wal").iterdir() if len(file.name) == 24)
            yield cluster, [file for file in found if file.name <= last]
        finally:
            cluster.destroy()


def audited(log: tuple[Cluster, list[Path]], folder: Path, at_once: int, damaged: int | None = None) -> list[str]:
    """Give what audits of a journal find that gets so many segments between one and the next, one of them damaged."""
    cluster, segments = log
    folder.mkdir(exist_ok=True)
    journal = PostgresJournal(
        LogFolders(folder, SEGMENT_BYTES, server_owner()),
        Receiver("", cluster.programs, "none"),
        unasked,
        lambda _: WalDump(cluster.programs),
    )

    async def run() -> list[str]:
        for first in range(0, len(segments), at_once):
            for number, segment in enumerate(segments[first : first + at_once], first):
                copy = shutil.copy(segment, folder)
                if number == damaged:
                    flip_bit(Path(copy), 500_000)
            found = await damage(journal)
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_a_record_longer_than_a_segment_is_no_damage(
    log: tuple[Cluster, list[Path]], tmp_path: Path, at_once: int
) -> None:
    assert len(log[1]) > 10
    assert audited(log, tmp_path / "journal", at_once) == []


@pytest.mark.parametrize("at_once", [1, 100])
def test_damage_in_a_segment_that_one_record_fills_is_found(
    log: tuple[Cluster, list[Path]], tmp_path: Path, at_once: int
) -> None:
    (found,) = audited(log, tmp_path / "journal", at_once, damaged=4)
    assert "is damaged" in found
