"""Catalog and journal on one volume that is full to its last byte: what makes room there still goes through."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import judge
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import loop_volume
from trigger.catalog.reserve import KEPT_PIECES, PIECE_BYTES

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]


@pytest.fixture
def deployed() -> Iterator[Deployment]:
    """A service whose state folder, catalog and journal in it, is a small volume."""
    settings: dict[str, Any] = {"max_wal_size": "64MB", "min_wal_size": "2MB"}
    with loop_volume("ext4", 96) as volume, deployment(15, initdb=["--wal-segsize=1"], **settings) as found:
        found.state = volume / "state"
        found.configure("[points]\nmin_interval_seconds = 0.2\nper_minute = 6000\nretry_seconds = 0.2\n")
        found.cluster.sql(judge.TRUTH_TABLE)
        found.start()
        yield found


def _fill(volume: Path) -> None:
    """Leave no byte free, not even for root."""
    with (volume / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 10):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)


def _commit(deployed: Deployment) -> None:
    """Commit, and fill some segments."""
    deployed.cluster.sql("INSERT INTO truth (what) VALUES ('full')")
    for _ in range(3):
        deployed.cluster.sql("SELECT pg_logical_emit_message(true, 'ballast', repeat('x', 700000))")


def _points_then_full(deployed: Deployment) -> int:
    """Take some points with much log between them, then fill the volume; gives the number of the newest point."""
    for _ in range(6):
        deployed.cluster.sql("CHECKPOINT")  # else the newest point would need the log of the first
        _commit(deployed)
        deployed.settle()
    newest = int(deployed.status()["last_point"])

    def nothing_fits() -> bool:
        _fill(deployed.state.parent)
        _commit(deployed)
        return "no room left" in "; ".join(deployed.status().get("troubles", []))

    deployed.wait_for(nothing_fits, "a catalog without room")
    reserve = deployed.state / "catalog.sqlite.reserve"
    os.truncate(reserve, min(reserve.stat().st_size, KEPT_PIECES * PIECE_BYTES))  # as thinning leaves it
    _fill(deployed.state.parent)
    return newest


def _assert_goes_on(deployed: Deployment) -> None:
    _commit(deployed)
    deployed.settle()
    assert deployed.stop() == 0
    left = judge.read(deployed)
    judge.assert_every_commit_has_one_outcome(left, judge.written_ids(deployed.cluster))
    judge.assert_bounds_hold(left)


def test_old_points_can_be_given_up_where_catalog_and_journal_share_a_full_disk(deployed: Deployment) -> None:
    newest = _points_then_full(deployed)
    given_up = deployed.ask("expire", str(newest), "--yes")
    assert given_up["segments"] > 0
    _assert_goes_on(deployed)


def test_old_points_can_be_given_up_there_after_the_service_was_killed(deployed: Deployment) -> None:
    newest = _points_then_full(deployed)
    assert deployed.stop(signal.SIGKILL) == -signal.SIGKILL
    _fill(deployed.state.parent)
    given_up = deployed.ask("expire", str(newest), "--yes")
    assert given_up["segments"] > 0
    deployed.start()
    _assert_goes_on(deployed)
