"""Tags: a recovery point and its commits survive as text, and no damage goes unseen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trigger.catalog.test_packing import busy_server, legal_records
from trigger.catalog import tag
from trigger.errors import StorageError
from trigger.model import (
    Bracket,
    Cause,
    Changes,
    CommitRecord,
    Flush,
    Outcome,
    RecoveryPoint,
    Snapshot,
    State,
    Verification,
    point_id,
)
from trigger.position import History, Lsn, Position

NOW = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)

lsns = st.integers(0, (1 << 64) - 1).map(Lsn)
texts = st.text(max_size=30)
times = st.datetimes(timezones=st.just(UTC)) | st.builds(
    lambda seconds, hours: datetime.fromtimestamp(seconds, timezone(timedelta(hours=hours))),
    st.integers(0, 1 << 32),
    st.sampled_from([-8, 0, 5.5]),
)
positions = st.builds(Position, st.builds(History, texts, st.integers(1, 1 << 32)), lsns)
counts = st.integers(0, 1 << 50)
records = st.builds(
    CommitRecord,
    texts,
    counts,
    lsns,
    lsns,
    st.integers(-(1 << 62), 1 << 62),
    st.lists(texts, max_size=3).map(tuple),
    st.sampled_from(Outcome),
)
checks = st.lists(st.tuples(texts, st.booleans(), texts), max_size=3).map(tuple)
points = st.builds(
    RecoveryPoint,
    id=st.builds(point_id, st.just(NOW), st.integers(0, (1 << 80) - 1)),
    number=counts,
    state=st.sampled_from(State),
    cause=st.sampled_from(Cause),
    floor=positions,
    opened_at=times,
    commit=st.none() | records,
    rule=texts,
    ceiling=st.none() | positions,
    redo=st.none() | positions,
    bracket=st.none() | st.builds(Bracket, positions, positions, texts, texts),
    flushes=st.lists(st.builds(Flush, texts, texts, texts, texts, times, times), max_size=2).map(tuple),
    snapshots=st.lists(st.builds(Snapshot, texts, texts, texts, times, times, counts), max_size=2).map(tuple),
    commits=counts,
    tables=st.dictionaries(texts, st.builds(Changes, counts, counts, counts, counts), max_size=3),
    sealed_at=st.none() | times,
    note=texts,
    failure=texts,
    verification=st.none() | st.builds(Verification, times, st.booleans(), texts, checks),
)


def example() -> RecoveryPoint:
    history = History("7391", 1)
    return RecoveryPoint(
        id=point_id(NOW, 1),
        number=7,
        state=State.SEALED,
        cause=Cause.COMMIT,
        floor=Position(history, Lsn(0x16B374D848)),
        opened_at=NOW,
        commit=busy_server(1)[0],
        ceiling=Position(history, Lsn(0x16B374D900)),
        bracket=Bracket(Position(history, Lsn(5)), Position(history, Lsn(9)), "START WAL LOCATION: 0/5\n"),
        flushes=(Flush("local", "data", "254:1", "af31", NOW, NOW),),
        snapshots=(Snapshot("data", "btrfs", "/snapshots/trg-1", NOW, NOW),),
        tables={"bank.public.accounts": Changes(updated=2)},
        sealed_at=NOW,
        note='"Monatsabschluss" – März',
    )


@settings(max_examples=300)
@given(points)
def test_every_field_of_a_point_survives(point: RecoveryPoint) -> None:
    assert tag.decode(tag.encode(point)) == (point, [])


@given(points, legal_records())
def test_the_commits_of_a_point_survive(point: RecoveryPoint, mine: list[CommitRecord]) -> None:
    assert tag.decode(tag.encode(point, mine)) == (point, mine)


def test_no_field_of_a_point_is_forgotten_by_the_grammar() -> None:
    content = json.loads(tag.encode(example()))["content"]
    assert content["point"].keys() == {field.name for field in dataclasses.fields(RecoveryPoint)}


def test_a_tag_is_one_line_of_ascii() -> None:
    text = tag.encode(example(), busy_server(3))
    assert text.isascii()
    assert text.isprintable()
    assert " " not in text.replace(json.dumps(example().note), "").replace("START WAL LOCATION: 0/5", "")


def test_every_flipped_bit_and_every_lost_end_is_noticed() -> None:
    raw = tag.encode(example(), busy_server(20)).encode()
    for place in range(len(raw)):
        flipped = raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :]
        with pytest.raises(StorageError):
            tag.decode(flipped.decode("latin-1"))
        with pytest.raises(StorageError):
            tag.decode(raw[:place].decode())


def test_other_spellings_of_the_same_json_are_refused() -> None:
    text = tag.encode(example())
    for other in (json.dumps(json.loads(text)), json.dumps(json.loads(text), indent=1), " " + text, text + " "):
        with pytest.raises(StorageError, match="digest"):
            tag.decode(other)


def test_a_line_end_behind_a_tag_is_no_damage() -> None:
    assert tag.decode(tag.encode(example()) + "\n") == (example(), [])


def test_a_tag_of_a_later_version_is_refused_by_number() -> None:
    later = tag.encode(example()).replace('"trigpoint_tag":1', '"trigpoint_tag":2')
    with pytest.raises(StorageError, match="version is 2, this program reads 1"):
        tag.decode(later)


@pytest.mark.parametrize(
    "content",
    ["{}", '{"commits":[],"point":{}}', '{"commits":[],"point":null}', "[]", "null", "[" * 5000 + "]" * 5000],
)
def test_a_right_digest_over_the_wrong_content_is_a_typed_error(content: str) -> None:
    digest = hashlib.sha256(content.encode()).hexdigest()
    with pytest.raises(StorageError) as caught:
        tag.decode(f'{{"content":{content},"sha256":"{digest}","trigpoint_tag":1}}')
    assert not caught.value.retryable


@given(st.text(max_size=200))
def test_noise_is_a_typed_error(noise: str) -> None:
    with pytest.raises(StorageError):
        tag.decode(noise)
