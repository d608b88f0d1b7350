"""A stream is read at once, unless commits follow each other closely."""

from __future__ import annotations

import math
import random

import pytest

from connectors.databases.postgres.stream.pace import CLOSE_SECONDS, GATHER_SECONDS, Pace

FOR_LONG = 500
A_SMALL_ONE = 4 * 900
"""What the four messages of a small transaction take of the socket."""
SOCKET_BYTES = 212_992
WAKING_SECONDS, DECODING_SECONDS = 100e-6, 2e-6
"""What a read costs, and each message in it."""


def play(pace: Pace, now: float, mean_seconds: float, reads: int = FOR_LONG) -> tuple[float, float]:
    """Let commits come at random with so much between them; gives when that ends, and the share of pauses."""
    chance, paused = random.Random(7), 0
    for _ in range(reads):
        paused += pace.look_at > now
        now = max(now, pace.look_at) + chance.expovariate(1 / mean_seconds)
        pace.gave(now, taken_bytes=A_SMALL_ONE, emptied=True)
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
    pace.gave(now + 0.1, taken_bytes=A_SMALL_ONE, emptied=True)
    assert pace.look_at == now + 0.1
    _, share = play(pace, now + 0.1, CLOSE_SECONDS / 2, reads=10)
    assert share == 0.0


def test_a_backlog_is_not_left_to_gather() -> None:
    pace = Pace()
    now, _ = play(pace, 0.0, CLOSE_SECONDS / 10)
    pace.gave(now, taken_bytes=A_SMALL_ONE, emptied=False)
    assert pace.look_at == now


def share_delivered(bytes_a_second: float, message_bytes: int, seconds: float = 3.0) -> float:
    """Let a server send as fast as it can into a socket; gives how much of that it came to, once that went on a while.

    It stands still while the socket is full. The event loop's timers go by whole milliseconds.
    """
    pace, now, sent_until = Pace(SOCKET_BYTES), 0.0, 0.0
    held = delivered = measured_from = 0.0
    while now < seconds:
        pause = pace.look_at - now
        woken = now + (math.ceil(pause * 1e3) * 1e-3 if pause > 0 else 0.0) + WAKING_SECONDS
        held = min(SOCKET_BYTES, held + bytes_a_second * (woken - sent_until))
        now = woken + held / message_bytes * DECODING_SECONDS
        held_meanwhile = min(SOCKET_BYTES, bytes_a_second * (now - woken))
        sent_until = now
        pace.gave(now, taken_bytes=int(held), emptied=True)
        if now < 0.5:  # the first half second it learns
            measured_from = now
        else:
            delivered += held
        held = held_meanwhile
    return delivered / (bytes_a_second * (now - measured_from))


@pytest.mark.parametrize("megabytes_a_second", [1, 8, 20, 50, 120, 250])
@pytest.mark.parametrize("message_bytes", [900, 5_000, 40_000])
def test_a_server_with_a_backlog_never_stands_still_for_a_pause_of_ours(
    megabytes_a_second: int, message_bytes: int
) -> None:
    assert share_delivered(megabytes_a_second * 1e6, message_bytes) > 0.97


def test_a_stream_that_was_held_up_by_a_pause_comes_out_of_it() -> None:
    """What was learned while the socket was full is less than what the server can give."""
    pace, now = Pace(SOCKET_BYTES), 0.0
    for _ in range(FOR_LONG):
        now = max(now, pace.look_at) + 10e-6
        pace.gave(now, taken_bytes=SOCKET_BYTES, emptied=True)
    assert pace.look_at == now
