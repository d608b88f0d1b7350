"""Which commits matter, and when a point is due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from trigger.config.expressions import FACTS, FUNCTIONS
from trigger.config.options import PointOptions, RuleOptions
from trigger.errors import ConfigError
from trigger.model import Cause, Changes, Commit
from trigger.position import History, Name
from trigger.protect.qualify import (
    NO_RULES,
    Decision,
    Due,
    Pace,
    Pending,
    Rules,
    Skip,
    Take,
    Tally,
    Wait,
    facts,
    qualify,
)

HISTORY = History("postgres", "7391", 1)


def commit(
    tables: Mapping[str, Changes] | None = None, *, database: str = "bank", markers: Sequence[str] = (), **more: Any
) -> Commit:
    given: dict[str, Any] = {"name": Name("", 7), "time_us": 1_000_000} | more
    return Commit(database, HISTORY, Lsn(100), Lsn(200), tables=tables or {}, markers=tuple(markers), **given)


def rule(**options: Any) -> Rules:
    return Rules([RuleOptions.model_validate({"name": "r"} | options)])


def takes(one: Commit, **options: Any) -> bool:
    rules = rule(**options)
    verdict = rules.judge(one)
    assert rules.errors == 0
    return verdict == "r"


INSERTED = commit({"public.a": Changes(inserted=3)})


# ------------------------------------------------------------------------------------------------ which commits


def test_without_a_rule_every_commit_qualifies() -> None:
    assert Rules([]).judge(commit()) == NO_RULES


def test_the_first_rule_that_takes_a_commit_names_it() -> None:
    options = [{"name": "none", "database": "x"}, {"name": "first"}, {"name": "second"}]
    assert Rules([RuleOptions.model_validate(one) for one in options]).judge(INSERTED) == "first"


def test_a_commit_that_no_rule_takes_does_not_qualify() -> None:
    assert rule(database="shop").judge(INSERTED) is None


@pytest.mark.parametrize(
    ("glob", "name", "taken"),
    [
        ("bank", "bank", True),
        ("ban", "bank", False),
        ("b*", "bank", True),
        ("B*", "bank", False),
        ("ban?", "bank", True),
    ],
)
def test_databases_are_chosen_by_a_glob_that_minds_case(glob: str, name: str, taken: bool) -> None:
    assert takes(commit(database=name), database=glob) is taken


@pytest.mark.parametrize(
    ("globs", "taken"),
    [(["public.a"], True), (["public.*"], True), (["*.a"], True), (["a"], False), (["public.b", "public.a"], True)],
)
def test_tables_are_chosen_by_globs_over_schema_and_name(globs: list[str], taken: bool) -> None:
    assert takes(INSERTED, tables=globs) is taken


def test_a_rule_that_asks_for_nothing_takes_a_commit_that_shows_nothing() -> None:
    assert takes(commit())


@pytest.mark.parametrize("asked", [{"tables": ["public.*"]}, {"operations": ["insert"]}, {"least_rows": 1}])
def test_a_rule_that_asks_for_changes_takes_no_commit_that_shows_none(asked: dict[str, Any]) -> None:
    assert not takes(commit(), **asked)


def test_one_row_is_enough_for_a_rule_that_asks_for_changes() -> None:
    assert takes(commit({"public.a": Changes(updated=1)}), tables=["public.*"])


@pytest.mark.parametrize(("least", "taken"), [(0, True), (2, True), (3, True), (4, False)])
def test_least_rows_is_the_smallest_number_that_is_taken(least: int, taken: bool) -> None:
    assert takes(INSERTED, least_rows=least) is taken


@pytest.mark.parametrize("operation", ["insert", "update", "delete"])
def test_only_the_operations_that_are_named_count(operation: str) -> None:
    field = {"insert": "inserted", "update": "updated", "delete": "deleted"}[operation]
    for other in ("inserted", "updated", "deleted"):
        one = commit({"public.a": Changes(**{other: 5})})
        assert takes(one, operations=[operation]) is (other == field)


def test_rows_add_up_over_tables_and_operations_that_count_and_no_others() -> None:
    one = commit({"public.a": Changes(2, 3, 100), "public.b": Changes(4, 0, 100), "audit.c": Changes(500)})
    asked = {"tables": ["public.*"], "operations": ["insert", "update"]}
    assert takes(one, least_rows=9, **asked)
    assert not takes(one, least_rows=10, **asked)


def test_an_operation_named_twice_counts_once() -> None:
    assert not takes(INSERTED, operations=["insert", "insert"], least_rows=4)


@pytest.mark.parametrize(
    ("table", "operations", "taken"),
    [("public.a", ["truncate"], True), ("public.a", ["delete"], False), ("public.b", ["truncate"], False)],
)
def test_a_truncate_that_counts_is_enough_whatever_the_rows(table: str, operations: list[str], taken: bool) -> None:
    one = commit({table: Changes(truncated=1)})
    assert takes(one, tables=["public.a"], operations=operations, least_rows=1000) is taken


@pytest.mark.parametrize(
    ("markers", "taken"), [(["close"], True), (["open"], False), ([], False), (["open", "close-of-day"], True)]
)
def test_one_marker_has_to_match_one_glob(markers: list[str], taken: bool) -> None:
    assert takes(commit(markers=markers), markers=["close*", "payroll"]) is taken


def test_all_that_a_rule_says_must_hold() -> None:
    whole = {"database": "bank", "tables": ["public.a"], "markers": ["m"], "expression": "rows == 3", "least_rows": 3}
    one = commit({"public.a": Changes(inserted=3)}, markers=["m"])
    assert takes(one, **whole)
    for key, wrong in {
        "database": "x",
        "tables": ["x"],
        "markers": ["x"],
        "expression": "rows == 4",
        "least_rows": 4,
    }.items():
        assert not takes(one, **(whole | {key: wrong}))


# ------------------------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    "expression",
    [
        'database == "bank"',
        'tables.exists(t, t.startsWith("public."))',
        'changes["public.a"].updated == 2 && changes["public.a"].rows == 5',
        'operations == ["insert", "update"]',
        "rows == 5",
        'markers.exists(m, m.matches("^close-[0-9]+$"))',
        'origin == ""',
        "xid > 4294967296",
        'name == "4294967305"',
        'time > timestamp("1970-01-01T00:00:00Z") && time.getFullYear() == 1970',
        "tables . exists ( some_name , size(some_name) == 8 )",
        "changes.all(t, changes[t].deleted == 0)",
    ],
)
def test_an_expression_sees_every_fact_of_the_commit(expression: str) -> None:
    one = commit({"public.a": Changes(3, 2)}, markers=["close-12"], name=Name("", 2**32 + 9))
    assert takes(one, expression=expression)
    assert not takes(one, expression=f"!({expression})")


def test_an_operation_of_one_table_is_an_operation_of_the_commit() -> None:
    one = commit({"public.a": Changes(inserted=1), "public.b": Changes(deleted=1, truncated=1)})
    assert facts(one)["operations"] == ["insert", "delete", "truncate"]


def test_the_facts_are_those_that_are_described() -> None:
    assert list(facts(commit())) == list(FACTS)


CALLS = {
    "size": "size(tables)",
    "contains": 'database.contains("a")',
    "startsWith": 'database.startsWith("a")',
    "endsWith": 'database.endsWith("a")',
    "matches": 'database.matches("a")',
    "timestamp": 'timestamp("2020-01-01T00:00:00Z")',
    "duration": 'duration("1s")',
}


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_every_function_that_is_listed_exists(function: str) -> None:
    call = CALLS.get(function) or (f"time.{function}()" if function.startswith("get") else f"{function}(1)")
    call = "bytes('a')" if function == "bytes" else call
    assert takes(commit(), expression=f"{call} == {call}")


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("rows >", "not an expression: mismatched input '<EOF>' at column 7"),
        ("rows >\n  1 +", "at line 2, column 6"),
        ("row > 1", "no such fact: row"),
        ("tables.exists(t, t == u)", "no such fact: u"),
        ("lower(database) == 'x'", "no such function: lower"),
        ("rows", "neither true nor false"),
        ("rows > 'x'", "No such overload"),
        ("markers.exists(m, m.matches('('))", "not a valid regex"),
        ("", "not an expression"),
        ("(" * 5000, "not an expression"),
    ],
)
def test_an_expression_that_cannot_work_is_refused_with_its_place_and_reason(expression: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Rules([RuleOptions(name="good"), RuleOptions(name="bad", expression=expression)])
    assert refused.value.message.startswith("rules.1.expression (rule bad): ")
    assert words in refused.value.message
    assert refused.value.hint
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    "expression",
    [
        'changes["public.b"].rows > 1',
        "rows / size(markers) > 1",
        "markers[0] == 'x'",
        "rows * 5 > 1",
        "int(database) > 1",
    ],
)
def test_a_rule_that_throws_protects_and_is_counted(expression: str) -> None:
    rules = rule(expression=expression)
    one = commit({"public.a": Changes(2**62)})
    assert rules.judge(one) == "r!"
    assert rules.judge(one) == "r!"
    assert rules.errors == 2


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({"markers": ["pay-*"]}, "r!"),
        ({"markers": ["step-*"]}, "r"),
        ({"markers": ["pay-*"], "expression": "rows > 5"}, None),
        ({"markers": ["pay-*"], "tables": ["public.b"], "least_rows": 1}, None),
        ({"markers": ["pay-*"], "database": "shop"}, None),
        ({"expression": "markers.exists(m, m == 'pay-1')"}, "r!"),
        ({"expression": "markers.exists(m, m == 'step-1')"}, "r"),
        ({"expression": "rows > 5"}, None),
    ],
)
def test_a_rule_that_markers_might_decide_which_were_not_kept_takes_the_commit(
    options: dict[str, Any], verdict: str | None
) -> None:
    rules = rule(**options)
    assert rules.judge(commit({"public.a": Changes(3)}, markers=["step-1"], markers_cut=True)) == verdict
    assert rules.errors == (verdict == "r!")


def test_a_rule_that_throws_does_not_outrank_one_that_took_the_commit_before() -> None:
    rules = Rules([RuleOptions(name="calm"), RuleOptions(name="wild", expression="markers[0] == 'x'")])
    assert rules.judge(commit()) == "calm"
    assert rules.errors == 0


counts = st.integers(0, 2**63 - 1)
hostile_text = st.text(max_size=20) | st.just("\ud800") | st.just("a" * 10_000) | st.just("' OR 1=1 --")
hostile_commits = st.builds(
    Commit,
    stream=hostile_text,
    history=st.just(HISTORY),
    start=st.just(Lsn(1)),
    end=st.just(Lsn(2)),
    name=st.builds(Name, st.just("") | hostile_text, st.none() | st.integers(0, 2**64 - 1)),
    time_us=st.integers(-(2**55), 2**57),
    tables=st.dictionaries(hostile_text, st.builds(Changes, counts, counts, counts, counts), max_size=4),
    markers=st.lists(hostile_text, max_size=3).map(tuple),
    origin=hostile_text,
)
WILD = Rules(
    [
        RuleOptions(name=f"r{number}", expression=expression)
        for number, expression in enumerate(
            (
                "rows * rows < 0 && xid < 0",
                'time + duration("87600h") < timestamp("0001-01-01T00:00:00Z")',
                "tables.exists(t, changes[t].rows < 0 || int(t) == -1)",
                'markers.exists(m, m.matches("(a+)+$") && m.size() < 0)',
                "rows / (xid - xid) == 1 && false",
            )
        )
    ]
)


@given(hostile_commits)
@settings(max_examples=200)
def test_no_commit_makes_a_rule_do_anything_but_take_it_or_pass(one: Commit) -> None:
    assert WILD.judge(one) in {None, *(f"r{number}{mark}" for number in range(5) for mark in ("", "!"))}


def test_verdicts_are_counted_by_rule() -> None:
    tally = Tally()
    for verdict in ("a", None, "b!", "a", None, None):
        tally.count(verdict)
    assert tally.as_dict() == {"a": 2, "b!": 1, "": 3}


# ---------------------------------------------------------------------------------------------- when a point is due


def options(**given: Any) -> PointOptions:
    return PointOptions.model_validate({"min_interval_seconds": 10, "max_delay_seconds": 30, "per_minute": 3} | given)


def waiting_since(arrived: float) -> Pending:
    return Pending(INSERTED, "r", arrived)


def decide(
    now: float,
    *,
    arrived: float | None = None,
    due: Due | None = None,
    began: Sequence[float] = (),
    not_before: float = 0.0,
    **given: Any,
) -> Decision:
    pace = Pace(began[-1] if began else None, [b for b in began if b > now - 60], not_before)
    return qualify(None if arrived is None else waiting_since(arrived), due, pace, options(**given), now)


def test_nothing_is_done_where_nothing_is_pending_or_due() -> None:
    assert decide(100) == Skip()
    assert decide(100, due=Due(Cause.INTERVAL, 101)) == Skip()


def test_the_first_commit_is_taken_at_once() -> None:
    assert decide(100, arrived=100) == Take(Cause.COMMIT)


@pytest.mark.parametrize(
    ("now", "decision"), [(109.9, Wait(110)), (110, Take(Cause.COMMIT)), (111, Take(Cause.COMMIT))]
)
def test_two_rounds_begin_at_least_the_interval_apart(now: float, decision: Decision) -> None:
    assert decide(now, arrived=105, began=[100]) == decision


@pytest.mark.parametrize(("now", "decision"), [(144.9, Wait(145)), (145, Take(Cause.COMMIT))])
def test_no_more_than_so_many_rounds_begin_in_sixty_seconds(now: float, decision: Decision) -> None:
    assert decide(now, arrived=130, began=[85, 100, 115], max_delay_seconds=1000) == decision


def test_rounds_beyond_the_budget_make_the_next_wait_for_all_of_them() -> None:
    assert decide(120, arrived=120, began=[80, 85, 100, 115], max_delay_seconds=1000) == Wait(145)


@pytest.mark.parametrize(("now", "decision"), [(134.9, Wait(135)), (135, Take(Cause.COMMIT))])
def test_no_budget_keeps_a_commit_longer_than_the_longest_delay(now: float, decision: Decision) -> None:
    assert decide(now, arrived=105, began=[90, 100, 120], per_minute=3) == decision


def test_a_commit_waits_no_longer_than_its_budget_where_the_delay_allows_more() -> None:
    assert decide(104, arrived=104, began=[100]) == Wait(110)


def test_after_a_failed_round_even_the_longest_delay_and_urgent_reasons_wait() -> None:
    assert decide(150, arrived=100, not_before=160) == Wait(160)
    assert decide(150, due=Due(Cause.GAP, 150, urgent=True), not_before=160) == Wait(160)
    assert decide(160, due=Due(Cause.GAP, 150, urgent=True), not_before=160) == Take(Cause.GAP)


@pytest.mark.parametrize("cause", [Cause.START, Cause.COMMIT, Cause.DEMAND])
def test_an_urgent_reason_waits_for_no_budget(cause: Cause) -> None:
    assert decide(101, due=Due(cause, 101, urgent=True), began=[98, 99, 100], arrived=100.5) == Take(cause)


@pytest.mark.parametrize("cause", [Cause.GAP, Cause.INTERVAL, Cause.CRON, Cause.CATCH_ALL, Cause.REPLAY])
def test_another_reason_waits_for_the_budget(cause: Cause) -> None:
    assert decide(105, due=Due(cause, 104), began=[100]) == Wait(110)
    assert decide(110, due=Due(cause, 104), began=[100]) == Take(cause)


def test_a_pending_commit_gives_the_point_its_name_where_something_else_is_due_too() -> None:
    assert decide(110, arrived=109, due=Due(Cause.INTERVAL, 105), began=[100]) == Take(Cause.COMMIT)


def test_a_point_behind_a_gap_bears_its_name_whatever_is_pending() -> None:
    assert decide(110, arrived=109, due=Due(Cause.GAP, 105), began=[100]) == Take(Cause.GAP)
    assert decide(109, arrived=108, due=Due(Cause.GAP, 105), began=[100]) == Wait(110)


def test_a_reason_that_is_due_later_does_not_hurry_a_commit() -> None:
    assert decide(105, arrived=105, due=Due(Cause.INTERVAL, 106), began=[100]) == Wait(110)


times = st.integers(0, 1600).map(lambda eighths: eighths / 8)
"""Seconds whose sums and differences are exact."""


@given(
    now=times,
    arrived=st.none() | times,
    due=st.none() | st.builds(Due, st.sampled_from(Cause), times, st.booleans()),
    began=st.lists(times, max_size=8).map(sorted),
    not_before=times,
)
def test_a_wait_ends_in_a_decision_and_never_lies_in_the_past(
    now: float, arrived: float | None, due: Due | None, began: list[float], not_before: float
) -> None:
    arrived = None if arrived is None else min(arrived, now)
    began = [moment for moment in began if moment <= now]
    decision = decide(now, arrived=arrived, due=due, began=began, not_before=not_before)
    if isinstance(decision, Wait):
        assert decision.until is not None
        assert decision.until > now
        assert isinstance(decide(decision.until, arrived=arrived, due=due, began=began, not_before=not_before), Take), (
            "what was waited for is not there"
        )
    if isinstance(decision, Take) and not (due and due.urgent and due.at <= now):
        overdue = arrived is not None and now >= arrived + 30
        assert not began or overdue or now >= began[-1] + 10
        assert overdue or len([b for b in began if b > now - 60]) < 3
        assert now >= not_before
    if isinstance(decision, Skip):
        assert arrived is None
        assert due is None or due.at > now
