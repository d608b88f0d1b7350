"""How much work an expression can make of a commit is known before it is begun."""

from __future__ import annotations

import time

import pytest

from trigger.config.expressions import LONGEST_CHARACTERS, TooMuchWorkError, Work
from trigger.config.options import RuleOptions
from trigger.errors import ConfigError
from trigger.model import Changes, Commit
from trigger.position import History, Name
from trigger.protect.qualify import Rules, facts

PROMPT_SECONDS = 2.0


def commit(tables: int = 1, markers: tuple[str, ...] = ("m",)) -> Commit:
    changes = {f"public.t{number}": Changes(1) for number in range(tables)}
    return Commit("bank", History("postgres", "7", 1), 1, 2, Name("", 3), 4, changes, markers)


def judged(expression: str, one: Commit) -> str | None:
    return Rules([RuleOptions(name="r", expression=expression)]).judge(one)


def literal_loops(depth: int) -> str:
    """Give an expression that goes through ten numbers, and for each through ten, and so on."""
    expression = "xid != 1"
    for level in range(depth):
        expression = f"[0,1,2,3,4,5,6,7,8,9].all(x{level}, {expression})"
    return expression


@pytest.mark.parametrize(
    ("expression", "macros", "depth"),
    [
        ("rows > 1", 0, 0),
        ("tables.exists(t, t == 'a') || markers.exists(m, m == 'b')", 2, 1),
        ("tables.all(a, markers . exists\n(b, (a + b).matches('x')))", 2, 2),
        ("tables.map(a, a).filter(b, b != '').all(c, true)", 3, 1),
        ("tables.all(a, a != ')' && tables.all(b, b != \"\\\")\" && tables.all(c, c != r'\\')))", 3, 3),
        ("tables.all(a, // )\n tables.all(b, true))", 2, 2),
        ("markers.exists(m, m == '.all(x, .all(y, ')", 1, 1),
        ("markers.exists(m, m == '''\n' .all('''  && tables./* no comment*/all(t, true))", 1, 1),
    ],
)
def test_what_stands_inside_each_other_is_counted_whatever_strings_and_comments_say(
    expression: str, macros: int, depth: int
) -> None:
    work = Work.of(expression)
    assert (work.macros, work.depth) == (macros, depth)


@pytest.mark.parametrize(
    ("expression", "one"),
    [
        ("tables.all(a, tables.all(b, tables.all(c, a + b != c)))", commit(20_000)),
        ("changes.all(a, changes.all(b, a != b || xid != 1))", commit(20_000)),
        ("tables.map(a, tables).all(b, b.all(c, c.size() > 0))", commit(20_000)),
        ("markers.all(a, markers.all(b, !a.matches(b + '(x*)*$')))", commit(1, ("x" * 100_000,) * 300)),
        ("[markers].all(a, [a + a].all(b, [b + b].all(c, c + c != [])))", commit(1, ("m",) * 9000)),
        ("changes.exists(t, changes[t].deleted > 5)", commit(50_000)),
    ],
)
def test_a_commit_that_would_take_too_long_to_judge_is_taken_at_once(expression: str, one: Commit) -> None:
    rules = Rules([RuleOptions(name="r", expression=expression)])
    began = time.thread_time()
    assert rules.judge(one) == "r!"
    assert time.thread_time() - began < PROMPT_SECONDS
    assert rules.errors == 1


@pytest.mark.parametrize("depth", [7, 12, 40])
def test_an_expression_that_takes_too_long_with_any_commit_is_refused(depth: int) -> None:
    began = time.thread_time()
    with pytest.raises(ConfigError, match=r"rules.0.expression \(rule r\): it could go through") as refused:
        judged(literal_loops(depth), commit())
    assert time.thread_time() - began < PROMPT_SECONDS
    assert refused.value.hint


def test_an_expression_that_is_too_long_to_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"{LONGEST_CHARACTERS} are allowed"):
        judged("true" + " && true" * LONGEST_CHARACTERS, commit())


@pytest.mark.parametrize(
    ("expression", "one"),
    [
        ("tables.exists(t, t == 'public.t99999')", commit(100_000)),
        ("tables.exists(t, markers.exists(m, t == 'public.t399' && m == 'm'))", commit(400)),
        ("markers.exists(m, m.contains('z')) || rows > 10", commit(100, ("a" * 100_000,) * 50)),
        ("changes.exists(t, changes[t].inserted == 1)", commit(10_000)),
        (literal_loops(3), commit()),
    ],
)
def test_what_is_large_and_still_quick_is_judged(expression: str, one: Commit) -> None:
    began = time.thread_time()
    assert judged(expression, one) == "r"
    assert time.thread_time() - began < PROMPT_SECONDS


def test_what_an_expression_does_not_ask_for_costs_it_nothing() -> None:
    assert judged("rows > 1", commit(50_000)) == "r"
    with pytest.raises(TooMuchWorkError):
        Work.of("tables.all(t, tables.all(u, true))").require_little(facts(commit(50_000)))
