"""A snapshot that lasts longer than the server's patience: the service goes on answering everybody meanwhile.

The storage is a filesystem of its own that is frozen while the snapshot is made, so the call into it stands still in
the kernel, where nothing can interrupt it. `wal_sender_timeout` is 3 s.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import judge
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.slots import SLOT, Made, as_usual, commit
from tests.fixtures.volumes import loop_volume

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

FROZEN_SECONDS = 20
PROMPT_SECONDS = 5
STANDS_SECONDS = 1
CUT = "terminating walsender process due to replication timeout"


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    with loop_volume("ext4") as volume, deployment(15, "directory", wal_sender_timeout="3s") as found:
        found.root = volume  # only the snapshots lie there: a frozen server would prove nothing
        found.cluster.sql(judge.TRUTH_TABLE)
        yield found


@pytest.fixture
def deployed(shared: Deployment) -> Iterator[Deployment]:
    with as_usual(shared) as found:
        yield found


@contextlib.contextmanager
def _frozen(volume: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Freeze a filesystem; gives the process that thaws it in time, whatever becomes of the test."""
    script = 'sleep "$1"; exec fsfreeze --unfreeze "$2"'
    thawing = subprocess.Popen(["sh", "-c", script, "sh", str(FROZEN_SECONDS), str(volume)], start_new_session=True)
    try:
        subprocess.run(["fsfreeze", "--freeze", str(volume)], check=True, timeout=30)
        yield thawing
    finally:
        if thawing.poll() is None:
            subprocess.run(["fsfreeze", "--unfreeze", str(volume)], check=False, timeout=30)
            thawing.wait(2 * FROZEN_SECONDS)


def _uninterruptible(deployed: Deployment) -> set[tuple[str, str]]:
    """Give the threads of the service that wait uninterruptibly, each with how often it has waited until now."""
    assert deployed.process is not None
    found = set()
    for task in Path(f"/proc/{deployed.process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            told = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
            if told["State"].startswith("D"):
                found.add((task.name, told["voluntary_ctxt_switches"]))
    return found


def _stands_in_the_kernel(deployed: Deployment) -> bool:
    """Whether one thread of the service waits in one system call for longer than any write to a disk takes."""
    before = _uninterruptible(deployed)
    time.sleep(STANDS_SECONDS)
    return bool(before & _uninterruptible(deployed))


def _streams(deployed: Deployment) -> list[tuple[Any, ...]]:
    """Give who reads which slot, as the server sees it."""
    return deployed.cluster.sql("SELECT slot_name, active, active_pid FROM pg_replication_slots ORDER BY slot_name")


def _assert_each_has_one_outcome(deployed: Deployment, made: list[Made]) -> None:
    left = judge.read(deployed)
    judge.assert_every_commit_has_one_outcome(left, {one.xid for one in made})
    judge.assert_bounds_hold(left)
    judge.assert_nothing_is_left_over(deployed, left)


def _assert_answers(deployed: Deployment, before: list[tuple[Any, ...]], pending: int) -> None:
    """See that the service answers in time and has received every commit, and that its readers were not cut off."""

    def knows_all() -> bool:
        status = json.loads(deployed.trigpoint("status", "--json", deadline=PROMPT_SECONDS).stdout)
        assert status["streams"] == {"postgres": True}
        return bool(status["pending_commits"] == pending)

    deployed.wait_for(knows_all, f"{pending} commits that wait", PROMPT_SECONDS)
    assert _streams(deployed) == before
    assert _stands_in_the_kernel(deployed)


def test_a_snapshot_of_twenty_seconds_costs_no_stream_and_no_answer(deployed: Deployment) -> None:
    deployed.start()
    deployed.settle()
    before, cuts = _streams(deployed), deployed.cluster.log.read_text().count(CUT)
    assert [active for _, active, _ in before] == [True, True]
    with _frozen(deployed.root) as thawing:
        began = time.monotonic()
        made = commit(deployed.cluster)
        deployed.wait_for(lambda: _stands_in_the_kernel(deployed), "a snapshot that stands still")
        while time.monotonic() - began < FROZEN_SECONDS - 2 * PROMPT_SECONDS:  # the last round may need one of them
            _assert_answers(deployed, before, len(made))
            made += commit(deployed.cluster, 1)
        assert thawing.wait(FROZEN_SECONDS) == 0
    deployed.settle()
    left = judge.read(deployed)
    (slow,) = [
        p for p in left.points if made[0].xid in [judge.xid(record) for record in left.commits.get(p.number, ())]
    ]
    assert slow.sealed_at is not None
    assert (slow.sealed_at - slow.opened_at).total_seconds() > FROZEN_SECONDS - 2
    assert _streams(deployed) == before, "the server has hung up meanwhile"
    assert deployed.cluster.log.read_text().count(CUT) == cuts
    _assert_each_has_one_outcome(deployed, made)
    assert deployed.stop() == 0


def test_a_service_that_does_not_answer_is_cut_off_and_comes_back_without_a_loss(deployed: Deployment) -> None:
    deployed.start()
    deployed.settle()
    assert deployed.process is not None
    log, cuts = deployed.cluster.log, deployed.cluster.log.read_text().count(CUT)
    made = commit(deployed.cluster)
    deployed.process.send_signal(signal.SIGSTOP)
    try:
        made += commit(deployed.cluster)
        deployed.wait_for(lambda: log.read_text().count(CUT) > cuts, "a server that has lost its patience", 15)
    finally:
        deployed.process.send_signal(signal.SIGCONT)
    deployed.wait_for(lambda: _holds(deployed), "the stream again")
    made += commit(deployed.cluster)
    deployed.settle()
    assert "trying again" in deployed.log.read_text()
    _assert_each_has_one_outcome(deployed, made)
    assert deployed.stop() == 0


def _holds(deployed: Deployment) -> bool:
    return (SLOT, True) in [(name, active) for name, active, _ in _streams(deployed)]
