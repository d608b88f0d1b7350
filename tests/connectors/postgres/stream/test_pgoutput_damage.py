"""Damaged and hostile streams: a typed error or the truth, never a hang and never a commit that was not."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.databases.postgres.stream.pgoutput import Committed
from tests.connectors.postgres.stream.streams import GOLDEN, VARIANTS, Variant, read
from trigger.errors import SourceError

HEADER_BYTES = 25
ROW_BYTES = 60
"""How much of a row message is damaged byte by byte; the rest of it is never looked at."""
STREAMS = [(18, VARIANTS[0]), (16, VARIANTS[4])]


def told(variant: Variant, messages: list[bytes]) -> tuple[list[Committed], bool]:
    """Decode up to the first error; gives the commits until then, and whether there was one."""
    decoder = variant.decoder
    with contextlib.suppress(SourceError):
        for message in messages:
            decoder.feed(memoryview(message))
        return decoder.commits, False
    return decoder.commits, True


def places(commits: list[Committed]) -> list[tuple[int, int, int]]:
    """What the protocol says twice, so that damage to it must be noticed: where a commit stands, and when it was."""
    return [(commit.start, commit.end, commit.time_us) for commit in commits]


def short(messages: list[bytes]) -> list[bytes]:
    """Leave out most of the row messages of large transactions, to keep the tests short."""
    seen: dict[bytes, int] = {}
    kept = []
    for message in messages:
        key = message[HEADER_BYTES : HEADER_BYTES + 9]
        rows = message[HEADER_BYTES : HEADER_BYTES + 1] in {b"I", b"U", b"D"}
        seen[key] = seen.get(key, 0) + rows
        if not rows or seen[key] <= 1:
            kept.append(message)
    return kept


@pytest.fixture(params=STREAMS, ids=lambda one: f"{one[0]}-{one[1].name}")
def stream(request: pytest.FixtureRequest) -> tuple[Variant, list[bytes]]:
    major, variant = request.param
    return variant, short([one for one in read(GOLDEN / f"{major}-{variant.name}.gz") if one[:1] == b"w"])


Damage = Callable[[bytes, int], bytes]


@pytest.mark.parametrize(
    "damage",
    [
        lambda message, at: message[:at],
        lambda message, at: message[:at] + bytes([message[at] ^ 1 << at % 8]) + message[at + 1 :],
        lambda message, at: message[:at] + bytes([message[at] ^ 0xFF]) + message[at + 1 :],
        lambda message, at: message[:at] + message[at + 1 :],
        lambda message, at: message[:at] + b"\0" + message[at:],
    ],
    ids=["cut", "bit flipped", "byte flipped", "byte lost", "byte added"],
)
def test_damage_at_any_byte_is_an_error_or_harmless_and_never_a_commit_elsewhere(
    stream: tuple[Variant, list[bytes]], damage: Damage
) -> None:
    variant, messages = stream
    truth, failed = told(variant, messages)
    assert not failed
    assert len(truth) == 11
    errors = 0
    for number, message in enumerate(messages):
        for at in range(min(len(message), ROW_BYTES + HEADER_BYTES)):
            hurt = [*messages[:number], damage(message, at), *messages[number + 1 :]]
            commits, failed = told(variant, hurt)
            allowed = places(truth)[: len(commits)] if failed else places(truth)
            if message[HEADER_BYTES : HEADER_BYTES + 1] not in {b"c", b"K"}:
                assert places(commits) == allowed, (number, at, message[:80])
            else:  # a Stream Commit says its time and its start only once
                assert [one.end for one in commits] == [place[1] for place in allowed], (number, at)
            errors += failed
    assert errors > 100


def test_a_stream_that_ends_at_any_message_gives_only_what_was_committed_by_then(
    stream: tuple[Variant, list[bytes]],
) -> None:
    variant, messages = stream
    truth, _ = told(variant, messages)
    for number in range(len(messages)):
        commits, failed = told(variant, messages[:number])
        assert not failed
        assert commits == truth[: len(commits)]


def test_messages_lost_doubled_or_swapped_never_give_a_commit_elsewhere(stream: tuple[Variant, list[bytes]]) -> None:
    variant, messages = stream
    truth = {one[1] for one in places(told(variant, messages)[0])}
    chance = random.Random(4711)
    for number in range(len(messages)):
        other = chance.randrange(len(messages))
        swapped = messages.copy()
        swapped[number], swapped[other] = messages[other], messages[number]
        for hurt in (
            messages[:number] + messages[number + 1 :],
            messages[: number + 1] + messages[number:],
            swapped,
        ):
            commits, _ = told(variant, hurt)
            ends = [one.end for one in commits]
            assert set(ends) <= truth
            assert ends == sorted(set(ends))


KINDS = b"BCRYOTMIUDSEcAbPKrp"


@given(
    st.lists(
        st.tuples(st.sampled_from(list(KINDS)), st.integers(0, 300), st.binary(max_size=60)).map(
            lambda three: pack("!cQQqB", b"w", three[1], three[1], 0, three[0]) + three[2]
        )
        | st.binary(max_size=60),
        max_size=20,
    ),
    st.sampled_from(VARIANTS),
)
@settings(max_examples=400)
def test_hostile_messages_are_refused_with_the_typed_error_and_nothing_else(
    messages: list[bytes], variant: Variant
) -> None:
    commits, _ = told(variant, messages)
    ends = [one.end for one in commits]
    assert ends == sorted(set(ends))
    assert all(one.start < one.end for one in commits)
