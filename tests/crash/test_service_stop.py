"""The service is told to stop in the middle of a round that does not end."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import pytest

from tests.fixtures import judge
from tests.fixtures.service import deployment
from tests.fixtures.slots import QUICK, assert_outcomes, commit, unwilling_application
from trigger.model import State

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

GRACE_SECONDS = 30


def test_a_round_that_outlasts_the_grace_of_a_stop_is_given_up_and_the_next_start_protects_its_commit() -> None:
    with deployment(16, extra=QUICK) as deployed, unwilling_application(seconds=120) as (hooks, block):
        deployed.cluster.sql(judge.TRUTH_TABLE)
        deployed.configure(f'{QUICK}[agent]\nhooks = "{hooks}"\ndeadline_seconds = 240\n')
        deployed.start()
        deployed.settle()
        block.touch()
        made = commit(deployed.cluster, 1)
        deployed.wait_for(lambda: judge.read(deployed).points[-1].state is State.OPEN, "the round that does not end")
        began = time.monotonic()
        assert deployed.stop() == 0
        assert time.monotonic() - began > GRACE_SECONDS - 1
        assert "it is given up" in deployed.log.read_text()
        left = judge.read(deployed)
        assert left.points[-1].state is State.FAILED
        assert left.outcomes[made[0].xid] == 0
        judge.assert_nothing_is_left_over(deployed, left)
        block.unlink()
        deployed.start()
        deployed.settle()
        assert_outcomes(deployed, made, [])
        assert deployed.stop() == 0


def test_a_service_that_is_told_to_stop_again_and_again_ends_in_order() -> None:
    with deployment(15, "directory", extra=QUICK) as deployed:
        deployed.start()
        deployed.settle()
        process = deployed.process
        assert process is not None
        while process.poll() is None:  # the connections, the journal and the last removals take their time
            process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        assert deployed.stop() == 0
        judge.assert_nothing_is_left_over(deployed, judge.read(deployed))


def test_a_service_that_is_stopped_before_it_protects_says_so_and_leaves_nothing_running() -> None:
    with deployment(15, "directory", extra=QUICK) as deployed:
        deployed.start(wait=False)
        deployed.wait_for((deployed.state / "lock").exists, "the first of its acts")
        assert deployed.stop() == 128 + signal.SIGTERM
        assert "ended by SIGTERM" in deployed.log.read_text()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                assert str(deployed.state) not in (process / "cmdline").read_text()
        deployed.start()
        deployed.settle()
        assert deployed.stop() == 0
