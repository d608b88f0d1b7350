"""Tags: a recovery point and its commits survive as text, of version 1 too, and no damage goes unseen."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from tests.trigger.catalog.test_packing import BLOCK_OF_0_1_0, busy_server, legal_records, names
from trigger.catalog import tag
from trigger.errors import StorageError
from trigger.model import (
    Bracket,
    Cause,
    Changes,
    CommitRecord,
    Flush,
    Mark,
    Outcome,
    RecoveryPoint,
    Snapshot,
    State,
    Verification,
)
from trigger.point_names import point_id
from trigger.position import History, Name, Position

NOW = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)

lsns = st.integers(0, (1 << 64) - 1).map(Lsn)
texts = st.text(max_size=30)
times = st.datetimes(timezones=st.just(UTC)) | st.builds(
    lambda seconds, hours: datetime.fromtimestamp(seconds, timezone(timedelta(hours=hours))),
    st.integers(0, 1 << 32),
    st.sampled_from([-8, 0, 5.5]),
)
kinds = st.sampled_from(["postgres", "memory", "mariadb"]) | texts
histories = st.builds(History, kinds, texts, st.integers(0, 1 << 32), st.integers(0, 1 << 32))
positions = st.builds(Position, histories, lsns)
counts = st.integers(0, 1 << 50)
records = st.builds(
    CommitRecord,
    texts,
    names,
    lsns,
    lsns,
    st.integers(-(1 << 62), 1 << 62),
    st.lists(texts, max_size=3).map(tuple),
    st.sampled_from(Outcome),
)
documents = st.dictionaries(texts, st.recursive(st.none() | st.booleans() | counts | texts, st.lists), max_size=3)
brackets = st.builds(Bracket, positions, positions, documents, st.none() | positions)
maybe = st.none() | positions
marks = st.lists(st.builds(Mark, positions, maybe, maybe, st.none() | brackets), min_size=1, max_size=3).map(tuple)
checks = st.lists(st.tuples(texts, st.booleans(), texts), max_size=3).map(tuple)
points = st.builds(
    RecoveryPoint,
    id=st.builds(point_id, st.just(NOW), st.integers(0, (1 << 80) - 1)),
    number=counts,
    state=st.sampled_from(State),
    cause=st.sampled_from(Cause),
    marks=marks,
    opened_at=times,
    commit=st.none() | records,
    rule=texts,
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
    history = History("postgres", "7391", 1)
    return RecoveryPoint(
        id=point_id(NOW, 1),
        number=7,
        state=State.SEALED,
        cause=Cause.COMMIT,
        marks=(
            Mark(
                Position(history, Lsn(0x16B374D848)),
                Position(history, Lsn(0x16B374D900)),
                bracket=Bracket(
                    Position(history, Lsn(5)), Position(history, Lsn(9)), {"label": "START WAL LOCATION: 0/5\n"}
                ),
            ),
        ),
        opened_at=NOW,
        commit=busy_server(1)[0],
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
    point = dataclasses.replace(
        example(), snapshots=tuple(dataclasses.replace(kept, storage="fast") for kept in example().snapshots)
    )
    assert tag.decode(tag.encode(point))[0].snapshots == point.snapshots
    written = json.loads(tag.encode(point))["content"]["point"]
    assert written.keys() == {field.name for field in dataclasses.fields(RecoveryPoint)} - {"unknown"}
    for kind, there in (
        (Mark, written["marks"][0]),
        (Bracket, written["marks"][0]["bracket"]),
        (Flush, written["flushes"][0]),
        (Snapshot, written["snapshots"][0]),
    ):
        assert there.keys() == {field.name for field in dataclasses.fields(kind)}


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
    later = tag.encode(example()).replace('"trigpoint_tag":2', '"trigpoint_tag":3')
    with pytest.raises(StorageError, match="version is 3, this program reads 1 to 2"):
        tag.decode(later)


@pytest.mark.parametrize("version", [0, -1, 3, 4, "2", 2.5, None, [2]])
def test_a_version_that_is_none_of_ours_is_refused_and_named(version: object) -> None:
    other = tag.encode(example()).replace('"trigpoint_tag":2', f'"trigpoint_tag":{json.dumps(version)}')
    with pytest.raises(StorageError, match=re.escape(f"version is {version!r}, this program reads 1 to 2")):
        tag.decode(other)


@pytest.mark.parametrize(
    "content",
    ["{}", '{"commits":[],"point":{}}', '{"commits":[],"point":null}', "[]", "null", "[" * 5000 + "]" * 5000],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_right_digest_over_the_wrong_content_is_a_typed_error(content: str, version: int) -> None:
    digest = hashlib.sha256(content.encode()).hexdigest()
    with pytest.raises(StorageError) as caught:
        tag.decode(f'{{"content":{content},"sha256":"{digest}","trigpoint_tag":{version}}}')
    assert not caught.value.retryable


def sealed_text(content: object, version: int = 2) -> str:
    """Give the tag of some content, with its digest, as the grammar has it."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return f'{{"content":{canonical},"sha256":"{digest}","trigpoint_tag":{version}}}'


OLD_POINT = {
    "id": point_id(NOW, 1),
    "number": 7,
    "state": "sealed",
    "cause": "commit",
    "floor": ["7391", 2, "16/B374D878"],
    "opened_at": "2026-03-01T12:00:00.123456+00:00",
    "commit": ["bank", 7729, "16/B374D848", "16/B374D878", 1772366400100000, ["m"], "protected"],
    "rule": "all",
    "ceiling": ["7391", 2, "16/B374D900"],
    "redo": ["7391", 1, "16/B3000028"],
    "bracket": {
        "start": ["7391", 1, "16/B3000028"],
        "stop": ["7391", 2, "16/B374D900"],
        "label": "START WAL LOCATION: 16/B3000028\n",
        "tablespace_map": "16400 /spaces\n",
    },
    "flushes": [
        {
            "agent": "local",
            "volume": "data",
            "device": "254:1",
            "filesystem": "af31",
            "began_at": "2026-03-01T12:00:00.123456+00:00",
            "ended_at": "2026-03-01T12:00:00.123456+00:00",
        }
    ],
    "snapshots": [
        {
            "volume": "data",
            "driver": "btrfs",
            "location": "/snapshots/trg-1",
            "began_at": "2026-03-01T12:00:00.123456+00:00",
            "ended_at": "2026-03-01T12:00:00.123456+00:00",
            "bytes_copied": 5,
        }
    ],
    "commits": 2,
    "tables": {"bank.public.accounts": [1, 2, 3, 4]},
    "sealed_at": "2026-03-01T12:00:01.123456+00:00",
    "note": "März",
    "failure": "",
    "verification": {
        "at": "2026-03-01T12:00:00.123456+00:00",
        "passed": True,
        "target": "commit 7729",
        "checks": [["the last commit", True, "seen"]],
    },
}
"""A point as version 1 wrote it, every field set."""


def old(timeline: int, place: str) -> Position:
    return Position(History("postgres", "7391", timeline), Lsn.parse(place))


def test_a_tag_of_version_1_is_read_whole() -> None:
    content = {"commits": [{"packed": BLOCK_OF_0_1_0, "stream": "bank"}], "point": OLD_POINT}
    point, commits = tag.decode(sealed_text(content, 1))
    later = NOW + timedelta(seconds=1)
    bracket = Bracket(
        old(1, "16/B3000028"),
        old(2, "16/B374D900"),
        {"label": "START WAL LOCATION: 16/B3000028\n", "tablespace_map": "16400 /spaces\n"},
    )
    assert point == RecoveryPoint(
        id=point_id(NOW, 1),
        number=7,
        state=State.SEALED,
        cause=Cause.COMMIT,
        marks=(Mark(old(2, "16/B374D878"), old(2, "16/B374D900"), old(1, "16/B3000028"), bracket),),
        opened_at=NOW,
        commit=CommitRecord(
            "bank",
            Name("", 7729),
            Lsn.parse("16/B374D848"),
            Lsn.parse("16/B374D878"),
            1_772_366_400_100_000,
            ("m",),
            Outcome.PROTECTED,
        ),
        rule="all",
        flushes=(Flush("local", "data", "254:1", "af31", NOW, NOW),),
        snapshots=(Snapshot("data", "btrfs", "/snapshots/trg-1", NOW, NOW, 5),),
        commits=2,
        tables={"bank.public.accounts": Changes(1, 2, 3, 4)},
        sealed_at=later,
        note="März",
        verification=Verification(NOW, True, "commit 7729", (("the last commit", True, "seen"),)),
    )
    assert [str(commit.name) for commit in commits] == ["7731", "7729"]
    assert {type(commit.end) for commit in commits} == {Lsn}
    again = tag.encode(point, commits)
    assert again.endswith('"trigpoint_tag":2}')
    assert tag.decode(again) == (point, commits)


def test_a_tag_of_version_1_may_lack_what_an_open_point_lacks() -> None:
    absent = {"commit": None, "ceiling": None, "redo": None, "bracket": None, "sealed_at": None, "verification": None}
    nothing = {"flushes": [], "snapshots": [], "tables": {}, "commits": 0, "rule": "", "note": "", "state": "open"}
    point, commits = tag.decode(sealed_text({"commits": [], "point": OLD_POINT | absent | nothing}, 1))
    floor = old(2, "16/B374D878")
    assert commits == []
    assert point == RecoveryPoint(point_id(NOW, 1), 7, State.OPEN, Cause.COMMIT, (Mark(floor),), NOW)


def test_every_flipped_bit_of_a_tag_of_version_1_is_noticed() -> None:
    raw = sealed_text({"commits": [{"packed": BLOCK_OF_0_1_0, "stream": "bank"}], "point": OLD_POINT}, 1).encode()
    for place in range(len(raw)):
        flipped = raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :]
        with pytest.raises(StorageError):
            tag.decode(flipped.decode("latin-1"))


@pytest.mark.parametrize(
    "spoiled",
    [
        {"floor": ["7391", 1, "17"]},
        {"floor": ["7391", 1]},
        {"floor": None},
        {"ceiling": ["7391", 1, None]},
        {"commit": ["bank", 1, "x", "16/B374D878", 5, [], "protected"]},
        {"commit": ["bank", 1]},
        {"bracket": {"label": ""}},
    ],
    ids=str,
)
def test_a_right_digest_over_a_wrong_point_of_version_1_is_a_typed_error(spoiled: dict[str, Any]) -> None:
    with pytest.raises(StorageError) as caught:
        tag.decode(sealed_text({"commits": [], "point": OLD_POINT | spoiled}, 1))
    assert not caught.value.retryable


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Give every object in a value that is one of a grammar of ours, which those by tables and of drivers are not."""
    if isinstance(value, dict):
        yield value
        for key, below in value.items():
            if key not in ("tables", "document"):
                yield from objects(below)
    if isinstance(value, list):
        for below in value:
            yield from objects(below)


strangers = st.dictionaries(
    st.sampled_from(["colour", "weight", "zone"]),
    st.recursive(
        st.none() | st.booleans() | counts | texts, lambda below: st.lists(below) | st.dictionaries(texts, below)
    ),
    max_size=2,
)


@settings(max_examples=200)
@given(points, legal_records(), st.data())
def test_what_is_not_known_here_is_kept_at_every_depth_of_a_point(
    point: RecoveryPoint, mine: list[CommitRecord], data: st.DataObject
) -> None:
    content = json.loads(tag.encode(point, mine))["content"]
    for there in list(objects(content["point"])):
        there.update(data.draw(strangers))
    text = sealed_text(content)
    read, commits = tag.decode(text)
    assert dataclasses.replace(read, unknown={}) == point
    assert commits == mine
    assert tag.encode(read, commits) == text


def test_what_is_not_known_here_is_kept_where_the_point_changes() -> None:
    content = json.loads(tag.encode(dataclasses.replace(example(), state=State.OPEN, snapshots=(), sealed_at=None)))[
        "content"
    ]
    for there in objects(content["point"]):
        there["colour"] = "blue"
    read, _ = tag.decode(sealed_text(content))
    snapshot = Snapshot("data", "btrfs", "/snapshots/trg-1", NOW, NOW)
    sealed = dataclasses.replace(read, state=State.SEALED, sealed_at=NOW, snapshots=(snapshot,), note="red")
    point = json.loads(tag.encode(sealed))["content"]["point"]
    assert (point["state"], point["note"], point["colour"]) == ("sealed", "red", "blue")
    assert point["marks"][0]["colour"] == point["marks"][0]["bracket"]["colour"] == "blue"
    assert point["flushes"][0]["colour"] == "blue"
    assert point["snapshots"][0]["location"] == "/snapshots/trg-1"
    assert tag.decode(tag.encode(sealed))[0] == sealed


@pytest.mark.parametrize("where", ["content", "block"])
def test_what_is_not_known_here_is_kept_beside_a_point_too(where: str) -> None:
    content = json.loads(tag.encode(example(), busy_server(3)))["content"]
    (content if where == "content" else content["commits"][0])["colour"] = "blue"
    text = sealed_text(content)
    assert tag.encode(*tag.decode(text)) == text


NEEDED = {"id", "number", "state", "cause", "marks", "opened_at"}


@given(points, st.sets(st.sampled_from([field.name for field in dataclasses.fields(RecoveryPoint)])))
def test_what_a_tag_lacks_has_its_default(point: RecoveryPoint, lacking: set[str]) -> None:
    content = json.loads(tag.encode(point))["content"]
    for key in lacking:
        content["point"].pop(key, None)
    if lacking & NEEDED:
        with pytest.raises(StorageError):
            tag.decode(sealed_text(content))
        return
    kept = {f.name: getattr(point, f.name) for f in dataclasses.fields(RecoveryPoint) if f.name not in lacking}
    assert tag.decode(sealed_text(content)) == (RecoveryPoint(**kept), [])


def test_what_a_mark_a_bracket_or_a_snapshot_lacks_has_its_default() -> None:
    content = json.loads(tag.encode(example()))["content"]
    for whole, lacking in (
        (content["point"]["marks"][0]["bracket"], ("document", "filled_to")),
        (content["point"]["marks"][0], ("ceiling", "redo")),
        (content["point"]["snapshots"][0], ("bytes_copied",)),
    ):
        for key in lacking:
            del whole[key]
    point, _ = tag.decode(sealed_text(content))
    (mark,) = example().marks
    assert mark.bracket is not None
    bare = Mark(mark.floor, bracket=Bracket(mark.bracket.start, mark.bracket.stop))
    assert point == dataclasses.replace(example(), marks=(bare,))
    without = copy.deepcopy(content)
    del without["point"]["marks"][0]["bracket"]
    assert tag.decode(sealed_text(without))[0].marks == (Mark(mark.floor),)
    del without["point"]["marks"][0]["floor"]
    with pytest.raises(StorageError):
        tag.decode(sealed_text(without))


@given(st.text(max_size=200))
def test_noise_is_a_typed_error(noise: str) -> None:
    with pytest.raises(StorageError):
        tag.decode(noise)
