"""A stream is read at once, unless commits follow each other closely."""

from __future__ import annotations

import random

from connectors.databases.postgres.stream.pace import CLOSE_SECONDS, GATHER_SECONDS, Pace

FOR_LONG = 500


def play(pace: Pace, now: float, mean_seconds: float, reads: int = FOR_LONG) -> tuple[float, float]:
    """Let commits come at random with so much between them; gives when that ends, and the share of pauses."""
    chance, paused = random.Random(7), 0
    for _ in range(reads):
        paused += pace.look_at > now
        now = max(now, pace.look_at) + chance.expovariate(1 / mean_seconds)
        pace.gave(now, emptied=True)
    return now, paused / reads


def test_commits_that_follow_each_other_closely_are_left_to_gather() -> None:
    pace = Pace()
    now, _ = play(pace, 0.0, CLOSE_SECONDS / 2)
    now, share = play(pace, now, CLOSE_SECONDS / 2)
    assert share > 0.9
    assert pace.look_at == now + GATHER_SECONDS


def test_commits_that_come_now_and_then_are_read_at_once() -> None:
    _, share = play(Pace(), 0.0, CLOSE_SECONDS * 2.5)
    assert share < 0.1


def test_the_first_commits_are_read_at_once_however_close_they_are() -> None:
    _, share = play(Pace(), 0.0, CLOSE_SECONDS / 10, reads=40)
    assert share == 0.0


def test_a_commit_after_a_pause_is_read_at_once_and_so_are_those_behind_it() -> None:
    pace = Pace()
    now, _ = play(pace, 0.0, CLOSE_SECONDS / 2)
    pace.gave(now + 0.1, emptied=True)
    assert pace.look_at == now + 0.1
    _, share = play(pace, now + 0.1, CLOSE_SECONDS / 2, reads=10)
    assert share == 0.0


def test_a_backlog_is_not_left_to_gather() -> None:
    pace = Pace()
    now, _ = play(pace, 0.0, CLOSE_SECONDS / 10)
    pace.gave(now, emptied=False)
    assert pace.look_at == now
