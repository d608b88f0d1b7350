"""The service is killed with SIGKILL between any two steps, under load, and started again: P1, P3 and P5 must hold.

Each failpoint is hit once in the usual suite, at a moment that differs from run to run, and twenty-five times in the
campaign. One cluster and one catalog see all of it, so that what an early kill left behind meets the later ones.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.fixtures import judge
from tests.fixtures.loading import Load
from tests.fixtures.service import Deployment, deployment

FAILPOINTS = (
    "after-open",
    "after-flush",
    "after-cover",
    "after-snapshot",
    "after-ceiling",
    "after-retag",
    "after-seal",
    "after-close-gaps",
    "after-settle",
    "after-expiring",
    "after-delete",
    "catalog-point-opened",
    "catalog-open-committed",
    "catalog-seal-begun",
    "catalog-blocks-written",
    "catalog-point-sealed",
    "catalog-settled-written",
    "catalog-seal-committed",
    "catalog-point-expiring",
    "catalog-point-expired",
    "catalog-point-failed",
)
_AFTER = {"catalog-point-failed": "after-open"}
"""What is reached only by a start that has something to undo: where the one before it was killed."""
POINTS = """
[points]
min_interval_seconds = 0.1
per_minute = 6000
catch_all_seconds = 2
"""
_DEADLY_SECONDS = 40
_JUDGED = 0.15
"""The share of kills after which everything is judged at once; the others meet the next kill first."""


@pytest.fixture(scope="module", params=["btrfs", "directory"])
def deployed(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """A service on PostgreSQL 18 (btrfs) or 15 (directory), whose storage bears few snapshots, so that it thins."""
    storage = str(request.param)
    with deployment(18 if storage == "btrfs" else 15, storage) as found:
        found.configure(POINTS)
        found.config.write_text(found.config.read_text().replace("keep_free", "budget = 12\nkeep_free"))
        found.cluster.sql(judge.TRUTH_TABLE)
        yield found


def die_at(deployed: Deployment, failpoint: str) -> None:
    """Run the service until the failpoint kills it."""
    if failpoint in _AFTER:
        die_at(deployed, _AFTER[failpoint])
    count = 1 if failpoint in _AFTER else random.randint(1, 4)
    deployed.start({"TRIGPOINT_FAILPOINT": f"{failpoint}:kill@{count}"}, wait=False)
    assert deployed.process is not None
    try:
        assert deployed.process.wait(_DEADLY_SECONDS) == -signal.SIGKILL, deployed.log.read_text()[-3000:]
    except subprocess.TimeoutExpired:
        said = deployed.log.read_text()[-3000:]
        pytest.fail(
            f"{failpoint} was not reached in {_DEADLY_SECONDS} s; {deployed.status()}; the service said:\n{said}"
        )
    finally:
        deployed.process.kill()


def assert_sound(deployed: Deployment) -> None:
    """Start the service once more, let it settle, end it, and judge what is there."""
    deployed.start()
    deployed.settle()
    assert deployed.stop() == 0
    left = judge.read(deployed)
    judge.assert_every_commit_has_one_outcome(left, judge.written_ids(deployed.cluster))
    judge.assert_nothing_is_left_over(deployed, left)
    judge.assert_bounds_hold(left)


def _matrix(deployed: Deployment, rounds: int) -> None:
    deployed.start()  # the slot is there before the first commit that is judged
    deployed.stop()
    for _ in range(rounds):
        for failpoint in random.sample(FAILPOINTS, len(FAILPOINTS)):
            load = Load(deployed)
            try:
                die_at(deployed, failpoint)
            finally:
                load.end()
            if random.random() < _JUDGED:
                assert_sound(deployed)
        assert_sound(deployed)


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_service_killed_between_any_two_steps_loses_nothing_and_leaves_nothing_over(deployed: Deployment) -> None:
    _matrix(deployed, rounds=1)


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.campaign
@pytest.mark.timeout(14_400)
def test_hundreds_of_kills_between_any_two_steps_lose_nothing_and_leave_nothing_over(deployed: Deployment) -> None:
    _matrix(deployed, rounds=25)
    left = judge.read(deployed)
    print(f"{25 * len(FAILPOINTS)} kills, PostgreSQL {deployed.cluster.major}: {len(left.outcomes)} commits, none lost")


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.slow
def test_a_term_signal_under_load_ends_between_two_rounds_with_nothing_left_to_undo(deployed: Deployment) -> None:
    for _ in range(3):
        load = Load(deployed)
        try:
            deployed.start()
            time.sleep(random.uniform(0.2, 1.5))
            assert deployed.stop() == 0
        finally:
            load.end()
        judge.assert_nothing_is_left_over(deployed, judge.read(deployed))
