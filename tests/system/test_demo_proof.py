"""The demo's proof, given a clone that is wrong: each lie is caught, by the check that is there for it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from trigger.demo.bank import Accident, Books
from trigger.demo.figures import Spread, spread, spreads, steps
from trigger.demo.proof import Evidence, checks
from trigger.model import EPOCH, Cause, CommitRecord, Flush, Mark, Outcome, RecoveryPoint, Snapshot, State
from trigger.position import History, Name, Position

BEFORE = Books({1: 90, 2: 110}, {1: 90, 2: 110}, frozenset({(1, 700), (2, 701)}), 0, EPOCH)
AFTER = Books({}, {}, BEFORE.ledger, 3, EPOCH)
ACCIDENT = Accident(702, 2, BEFORE, 701)
TRUTH = Evidence(BEFORE, AFTER, "aborted", "committed", "committed", 5, {"protected": 1, "coalesced": 4, "missed": 0})


def failed(evidence: Evidence) -> list[str]:
    return [check.claim for check in checks(ACCIDENT, evidence) if not check.held]


def clone(**differences: Any) -> Evidence:
    return replace(TRUTH, clone=replace(BEFORE, **differences))


def test_a_clone_that_is_right_passes_every_check() -> None:
    assert failed(TRUTH) == []
    assert failed(replace(TRUTH, accident_in_clone="unknown")) == []


@pytest.mark.parametrize(
    ("evidence", "claim"),
    [
        (clone(balances={1: 90}, by_ledger={1: 90}), "every balance is back"),
        (clone(balances={1: 80, 2: 120}), "every balance is what the bank's own ledger says"),
        (clone(balances={1: 91, 2: 110}), "no money was made or lost"),
        (clone(balances={}, by_ledger={}), "every balance is back"),
        (clone(ledger=frozenset({(1, 700)})), "every transfer before the accident is there"),
        (clone(ledger=BEFORE.ledger | {(3, 703)}), "every transfer before the accident is there"),
        (clone(complaints=1), "nothing that came after it is there"),
        (replace(TRUTH, accident_in_clone="committed"), "the accident is not there"),
        (replace(TRUTH, last_transfer_in_clone="unknown"), "every transfer before the accident is there"),
        (replace(TRUTH, accident_in_production="aborted"), "production has lost its accounts"),
        (replace(TRUTH, production=BEFORE), "production has lost its accounts"),
        (replace(TRUTH, commits_made=6), "every commit of the bank has exactly one outcome"),
        (replace(TRUTH, commits_recorded={"protected": 4, "missed": 1}), "every commit of the bank has exactly one"),
    ],
)
def test_a_clone_that_is_wrong_fails_the_check_for_it(evidence: Evidence, claim: str) -> None:
    assert any(found.startswith(claim) for found in failed(evidence))


def sealed_point() -> RecoveryPoint:
    """Give a point whose commit waited 2 ms; its flush took 3 ms, the snapshot 5 ms after it, the rest 7 ms."""
    moments = [EPOCH + timedelta(milliseconds=passed) for passed in (2, 5, 9, 10, 17)]
    floor = Position(History("postgres", "7", 1), 0x100)
    return RecoveryPoint(
        id="0" * 26,
        number=1,
        state=State.SEALED,
        cause=Cause.COMMIT,
        marks=(Mark(floor),),
        opened_at=moments[0],
        commit=CommitRecord("bank", Name("", 701), floor.at, floor.at, 0, (), Outcome.PROTECTED),
        flushes=(Flush("local", "data", "8:1", "00", moments[0], moments[1]),),
        snapshots=(Snapshot("data", "memory", "there", moments[2], moments[3]),),
        sealed_at=moments[4],
    )


def test_the_steps_of_a_point_add_up_to_its_total() -> None:
    taken = steps(sealed_point())
    assert taken is not None
    assert (taken.wait, taken.flush, taken.snapshot, taken.tag, taken.total) == pytest.approx((2, 3, 5, 7, 17))


def test_a_point_that_was_taken_for_no_commit_has_no_steps() -> None:
    assert steps(replace(sealed_point(), commit=None)) is None
    assert spreads([replace(sealed_point(), commit=None)]) == {}


def test_percentiles_are_the_nearest_rank_of_what_was_measured() -> None:
    assert spread([7.0]) == Spread(7.0, 7.0)
    assert spread([float(number) for number in range(100, 0, -1)]) == Spread(50.0, 99.0)
