"""The service keeps its promises whatever happens, in as many runs as there is time for; each run follows from a seed.

A fresh range of seeds is run each time, and its first seed is printed. `TRIGPOINT_SEED=N` runs the same range again;
`python -m tests.simulation --seed N` prints the whole log of one run.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import SystemRandom

import pytest

from tests.simulation.run import Result, simulate
from tests.simulation.story import SORTS, tell
from tests.simulation.virtual import DeadlockError, RealWaitError, VirtualLoop

BASE = int(os.environ.get("TRIGPOINT_SEED") or SystemRandom().randrange(10**9))
SHARES, SEEDS_A_SHARE, SEEDS_A_SORT = 10, 100, 60
QUICK_SHARES = 4
"""How many of the shares `make quick` runs."""
CAMPAIGN_SEEDS = 100_000
ROOT = Path(__file__).parents[2]


def verdict(results: list[Result]) -> str:
    """Give what was broken, with the way to see it again; "" for nothing."""
    return "\n".join(
        f"seed {result.seed}: {result.violation}\n"
        f"  see: python -m tests.simulation --seed {result.seed} --sort {result.sort}"
        for result in results
        if result.violation
    )


_ALL_SHARES = [pytest.param(share, marks=[pytest.mark.slow] * (share >= QUICK_SHARES)) for share in range(SHARES)]


@pytest.mark.parametrize("share", _ALL_SHARES)
def test_the_promises_hold_in_every_run_of_a_fresh_range_of_seeds(share: int) -> None:
    first = BASE + share * SEEDS_A_SHARE
    print(f"TRIGPOINT_SEED={BASE}: seeds {first} to {first + SEEDS_A_SHARE - 1}")
    broken = verdict([simulate(seed) for seed in range(first, first + SEEDS_A_SHARE)])
    assert not broken, f"TRIGPOINT_SEED={BASE}\n{broken}"


def test_no_place_within_a_record_is_taken_for_the_end_of_one() -> None:
    """A source that said so, and after a crash went on past the end of the log without a word, hid commits from us."""
    assert not simulate(215_209_180, "plain").violation


@pytest.mark.parametrize("sort", SORTS)
def test_nothing_happens_any_more_when_a_story_has_ended(sort: str) -> None:
    """A slot was moved ahead right behind that now and then, and nobody was there to say so."""
    for story in (tell(seed, sort) for seed in range(BASE, BASE + 1000)):
        assert all(act.at < story.ends_at for act in story.acts), story.seed


@pytest.mark.parametrize("sort", SORTS)
def test_the_promises_hold_whatever_kind_of_database_it_is(sort: str) -> None:
    broken = verdict([simulate(seed, sort) for seed in range(BASE, BASE + SEEDS_A_SORT)])
    assert not broken, f"TRIGPOINT_SEED={BASE}, sort {sort}\n{broken}"


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_the_promises_hold_in_a_hundred_thousand_runs() -> None:
    counted: Counter[str] = Counter()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(simulate, range(BASE, BASE + CAMPAIGN_SEEDS), chunksize=100):
            assert not result.violation, f"TRIGPOINT_SEED={BASE}\n{verdict([result])}"
            counted.update(result.counts)
    print(f"seeds {BASE} to {BASE + CAMPAIGN_SEEDS - 1}: {dict(counted)}")


def test_a_seed_reproduces_its_run_to_the_last_event() -> None:
    for seed in range(BASE, BASE + 5):
        assert simulate(seed).log == simulate(seed).log


def test_a_seed_reproduces_its_run_in_another_process_whatever_the_order_of_its_hashes() -> None:
    digests = {log_digest(BASE, hash_seed) for hash_seed in ("0", "1", "4711")}
    assert len(digests) == 1


def log_digest(seed: int, hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seed", str(seed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        timeout=120,
    )
    log, _, figures = done.stdout.rpartition(b"1 runs, ")
    assert log.count(b"\n") > 20, done.stderr.decode()
    assert figures
    return hashlib.sha256(log).hexdigest()


def test_time_jumps_to_the_next_timer_and_never_waits() -> None:
    async def sleep_a_year() -> float:
        await asyncio.sleep(365 * 86_400)
        return asyncio.get_running_loop().time()

    assert VirtualLoop(now=5.0).run(sleep_a_year()) == 5.0 + 365 * 86_400


def test_who_waits_for_what_can_never_happen_is_told_so() -> None:
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError):
        VirtualLoop().run(wait_for_ever())


def test_a_thread_is_refused_in_virtual_time() -> None:
    async def ask_a_thread() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RealWaitError):
        VirtualLoop().run(ask_a_thread())


def test_a_task_that_is_left_behind_is_an_error() -> None:
    kept = []

    async def leave_one() -> None:
        kept.append(asyncio.ensure_future(asyncio.sleep(1)))

    with pytest.raises(AssertionError, match="left behind"):
        VirtualLoop().run(leave_one())
