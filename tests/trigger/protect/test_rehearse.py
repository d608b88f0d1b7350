"""What rules and budgets would have done with recorded commits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from trigger.config.options import PointOptions, RuleOptions
from trigger.errors import ConfigError
from trigger.model import Cause, Changes, Commit, Outcome
from trigger.position import History, Name
from trigger.protect.commit_lines import read, write
from trigger.protect.qualify import Rules
from trigger.protect.rehearse import Rehearsal, rehearse

EVERY = Rules([])


def at(*seconds: float, xid: int = 1, end: int = 0) -> list[Commit]:
    return [
        Commit(
            "bank",
            History("postgres", ""),
            Lsn(end and end + i),
            Lsn(end and end + i + 1),
            Name("", xid + i),
            round(s * 1e6),
        )
        for i, s in enumerate(seconds)
    ]


def played(commits: list[Commit], rules: Rules = EVERY, round_seconds: float = 0.0, **options: Any) -> Rehearsal:
    return rehearse(commits, rules, PointOptions.model_validate(options), round_seconds=round_seconds)


def outcomes(answer: Rehearsal) -> list[tuple[int | None, str | None]]:
    return [(verdict.point, verdict.outcome) for verdict in answer.verdicts]


def test_no_commits_need_no_points() -> None:
    assert played([]) == Rehearsal((), (), 0)


def test_commits_apart_have_a_point_each() -> None:
    answer = played(at(0, 10, 20), min_interval_seconds=5)
    assert outcomes(answer) == [(1, "protected"), (2, "protected"), (3, "protected")]


def test_commits_that_come_within_the_interval_are_coalesced_into_the_point_of_the_newest() -> None:
    answer = played(at(0, 1, 2, 3), min_interval_seconds=5)
    assert outcomes(answer) == [(1, "protected"), (2, "coalesced"), (2, "coalesced"), (2, "protected")]
    assert [verdict.waited_seconds for verdict in answer.verdicts] == [0, 4, 3, 2]
    assert [point.commits for point in answer.points] == [1, 3]


def test_commits_that_come_during_a_round_wait_for_the_next() -> None:
    answer = played(at(0, 0.5, 3), round_seconds=2, min_interval_seconds=0)
    assert [point.began_at.timestamp() for point in answer.points] == [0, 2, 4]


def test_a_commit_that_no_rule_takes_has_no_outcome_and_no_point() -> None:
    answer = played(at(0, 1), Rules([RuleOptions(name="none", database="shop")]))
    assert outcomes(answer) == [(None, None), (None, None)]
    assert answer.points == ()


def test_the_longest_delay_breaks_the_budget() -> None:
    answer = played(at(0, 1, 2), min_interval_seconds=0, per_minute=1, max_delay_seconds=10)
    assert [point.began_at.timestamp() for point in answer.points] == [0, 11]
    answer = played(at(0, 1, 2), min_interval_seconds=0, per_minute=1, max_delay_seconds=1000)
    assert [point.began_at.timestamp() for point in answer.points] == [0, 60]


def test_points_by_interval_and_cron_are_taken_between_commits() -> None:
    answer = played(at(0, 100), Rules([RuleOptions(name="none", database="x")]), interval_seconds=30)
    assert {point.cause for point in answer.points} == {Cause.INTERVAL}
    assert len(answer.points) >= 2
    answer = played(at(0, 200), Rules([RuleOptions(name="none", database="x")]), cron="* * * * *")
    assert [(point.cause, point.began_at.second) for point in answer.points] == [(Cause.CRON, 0)] * 3


def test_a_catch_all_is_taken_where_the_log_moved_without_a_qualifying_commit() -> None:
    commits = [*at(0, end=1000), *at(1, end=9000), *at(500, end=9100)]
    first = RuleOptions(name="first", expression="time < timestamp('1970-01-01T00:00:01Z')")
    answer = played(commits, Rules([first]), catch_all_seconds=60)
    assert [point.cause for point in answer.points][:2] == [Cause.COMMIT, Cause.CATCH_ALL]


def test_rules_that_threw_are_counted() -> None:
    answer = played(at(0), Rules([RuleOptions(name="wild", expression="markers[0] == 'x'")]))
    assert answer.rule_errors == 1
    assert answer.by_rule() == {"wild!": 1}


@given(
    st.lists(st.floats(0, 300, allow_nan=False), min_size=1, max_size=60),
    st.integers(0, 30),
    st.integers(1, 10),
    st.integers(30, 90),
    st.sampled_from([0.0, 0.2, 7.0]),
)
@settings(max_examples=60)
def test_each_qualifying_commit_has_one_outcome_and_budgets_hold(
    seconds: list[float], interval: int, per_minute: int, delay: int, round_seconds: float
) -> None:
    answer = played(
        at(*seconds),
        round_seconds=round_seconds,
        min_interval_seconds=interval,
        per_minute=per_minute,
        max_delay_seconds=delay,
    )
    assert all(verdict.outcome for verdict in answer.verdicts)
    for point in answer.points:
        held = [verdict for verdict in answer.verdicts if verdict.point == point.number]
        assert len(held) == point.commits
        assert [verdict.outcome for verdict in held].count(Outcome.PROTECTED) == 1
        assert held[-1].outcome is Outcome.PROTECTED
    waits = [verdict.waited_seconds or 0 for verdict in answer.verdicts]
    assert max(waits) <= delay + round_seconds + 1e-3
    assert min(waits) >= 0
    began = [point.began_at.timestamp() for point in answer.points]
    assert began == sorted(began)


# ------------------------------------------------------------------------------------------ commits as JSON lines

commits_of_any_kind = st.builds(
    Commit,
    stream=st.text(),
    history=st.just(History("postgres", "")),
    start=st.integers(0, 2**64 - 1).map(Lsn),
    end=st.integers(0, 2**64 - 1).map(Lsn),
    name=st.builds(Name, st.sampled_from(["", "0-1-"]), st.integers(0, 2**63 - 1)) | st.text().map(Name.parse),
    time_us=st.integers(-(2**54), 2**57),
    tables=st.dictionaries(st.text(), st.builds(Changes, *(st.integers(0, 2**40),) * 4), max_size=3),
    markers=st.lists(st.text(), max_size=3).map(tuple),
    origin=st.text(),
    markers_cut=st.booleans(),
)


@given(st.lists(commits_of_any_kind, max_size=3))
def test_what_is_recorded_is_what_is_read(commits: list[Commit]) -> None:
    assert list(read([write(commit) for commit in commits], "file", "x", "postgres")) == commits


def test_only_the_time_is_needed() -> None:
    (commit,) = read(["", '{"time": "1970-01-01T01:00:01+01:00"}', "  "], "file", "bank", "postgres")
    assert commit == Commit("bank", History("postgres", ""), Lsn(0), Lsn(0), Name("", 0), 1_000_000)


def test_a_transaction_id_as_earlier_versions_wrote_it_is_a_name() -> None:
    (commit,) = read(['{"time": "1970-01-01T00:00:01Z", "xid": 7731}'], "file", "bank", "postgres")
    assert commit.name == Name("", 7731)


@pytest.mark.parametrize("line", ['"name": "9223372036854775808"', '"xid": 9223372036854775808'])
def test_a_number_that_is_too_great_to_be_stored_is_part_of_the_text(line: str) -> None:
    (commit,) = read([f'{{"time": "1970-01-01T00:00:01Z", {line}}}'], "file", "bank", "postgres")
    assert commit.name == Name("9223372036854775808", None)
    assert list(read([write(commit)], "file", "x", "postgres")) == [commit]


def test_places_are_read_in_the_form_of_the_kind() -> None:
    line = '{"time": "1970-01-01T00:00:01Z", "name": "0-1-57", "start": "7", "end": "8"}'
    (commit,) = read([line], "file", "bank", "a kind of which no driver is loaded")
    assert (commit.name, commit.start, commit.end) == (Name("0-1-", 57), 7, 8)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "file:2: not JSON: Expecting property name"),
        ("[]", "file:2: a commit must be an object, not []"),
        ("{}", "file:2: time is needed"),
        ('{"time": "yesterday"}', "file:2: time 'yesterday' is not ISO-8601"),
        ('{"time": "2026-03-01T12:00:00"}', "file:2: time '2026-03-01T12:00:00' has no zone; add Z"),
        ('{"time": 5}', "file:2: time must be text"),
        ('{"tim": 5}', "file:2: a commit has no tim; did you mean time?"),
        ('{"time": "2026-03-01T12:00:00Z", "xid": -1}', "file:2: xid must be a whole number"),
        ('{"time": "2026-03-01T12:00:00Z", "xid": true}', "file:2: xid must be a whole number"),
        ('{"time": "2026-03-01T12:00:00Z", "name": 7}', "file:2: name must be text"),
        ('{"time": "2026-03-01T12:00:00Z", "end": "7"}', "file:2: not an LSN: '7'"),
        ('{"time": "2026-03-01T12:00:00Z", "tables": {"a": {"insert": 1}}}', "did you mean inserted?"),
        ('{"time": "2026-03-01T12:00:00Z", "tables": []}', "tables must be an object"),
        ('{"time": "2026-03-01T12:00:00Z", "markers": "m"}', "markers must be a list of texts"),
        ('{"time": "0001-01-01T00:00:00+14:00"}', "file:2: "),
    ],
)
def test_a_line_that_is_no_commit_is_named_with_its_reason(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        list(read(['{"time": "2026-03-01T12:00:00Z"}', line], "file", "x", "postgres"))
    assert words in refused.value.message


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["time", "xid", "name", "tables", "markers", "end"])
    return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), nested, max_leaves=8))
def test_any_json_is_a_commit_or_a_config_error(value: Any) -> None:
    try:
        assert len(list(read([json.dumps(value)], "file", "x", "postgres"))) == 1
    except ConfigError as error:
        message = error.message
    else:
        return
    assert message.startswith("file:1: ")
