"""Decide which commits matter, and when a recovery point is due: pure, nothing here waits or writes.

`Rules.judge` says of one commit which rule takes it. `qualify` says what to do now: `Take` a point, `Wait` until a
moment, or `Skip`, since nothing that matters is pending.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from trigger.config.expressions import FACTS, FUNCTIONS, LONGEST_CHARACTERS, TooMuchWorkError, Work
from trigger.config.options import PointOptions, RuleOptions
from trigger.errors import ConfigError
from trigger.model import Cause, Changes, Commit
from trigger.position import History, Name

if TYPE_CHECKING:
    import cel

NO_RULES = "every-commit"
"""The rule that stands where none is configured."""


class UndecidedError(Exception):
    """Whether a rule takes a commit would be decided by markers of it that were not kept."""


@dataclass(frozen=True, slots=True)
class _Rule:
    options: RuleOptions
    program: cel.Program | None
    work: Work

    def takes(self, commit: Commit) -> bool:
        """Whether the rule takes `commit`; whatever its expression raises is raised.

        Raises:
            UndecidedError: markers that were not kept would decide.
        """
        options = self.options
        if not fnmatchcase(commit.stream, options.database):
            return False
        if not self._enough_changes(commit):
            return False
        marked = options.markers is None or _any_matches(commit.markers, options.markers)
        if not (marked or commit.markers_cut) or not self._says_so(commit):
            return False
        if not marked:
            raise UndecidedError
        return True

    def _says_so(self, commit: Commit) -> bool:
        """Whether the rule's expression is true of `commit`; raises as `takes` does."""
        if self.program is None:
            return True
        asked = self.program.variables()  # what is not asked for need not be handed over, which takes the longest
        seen = {name: value for name, value in facts(commit).items() if name in asked}
        self.work.require_little(seen)
        if _is_true(self.program.execute(seen)):
            return True
        if commit.markers_cut and "markers" in asked:
            raise UndecidedError
        return False

    def _enough_changes(self, commit: Commit) -> bool:
        """Whether the rule's tables and operations changed enough; a rule that names none asks for nothing."""
        operations = set(self.options.operations)
        counting = [changes for table, changes in commit.tables.items() if _any_matches((table,), self.options.tables)]
        if "truncate" in operations and any(changes.truncated for changes in counting):
            return True
        everything = self.options.tables == ["*"] and operations == set(_COUNTS)
        least = self.options.least_rows if everything else max(self.options.least_rows, 1)
        rows: int = sum(
            getattr(changes, _COUNTS[operation]) for changes in counting for operation in operations - {"truncate"}
        )
        return rows >= least


_COUNTS = {"insert": "inserted", "update": "updated", "delete": "deleted", "truncate": "truncated"}


class Rules:
    """A set of compiled rules.

    Args:
        options: the rules; without any, every commit qualifies.

    Raises:
        ConfigError: an expression cannot be compiled or asks for a fact that does not exist; the message names the
            rule and the place.
    """

    def __init__(self, options: Sequence[RuleOptions]) -> None:
        self._rules = [
            _Rule(rule, _compile(index, rule), Work.of(rule.expression or "")) for index, rule in enumerate(options)
        ]
        self.errors = 0
        """How often a rule threw; each time it protected."""

    def judge(self, commit: Commit) -> str | None:
        """Give the name of the first rule that takes `commit`, or None; a rule that throws takes it (`<name>!`).

        So does one whose expression could take too long with it, since the streams are not read meanwhile, and one that
        markers would decide which were not kept.
        """
        if not self._rules:
            return NO_RULES
        for rule in self._rules:
            try:
                if rule.takes(commit):
                    return rule.options.name
            except Exception:  # noqa: BLE001 - whatever a hostile commit makes an expression do, it protects
                self.errors += 1
                return f"{rule.options.name}!"
        return None


def facts(commit: Commit) -> dict[str, Any]:
    """Give what expressions see of a commit, by the names in `FACTS`."""
    return {
        "database": commit.stream,
        "tables": list(commit.tables),
        "changes": {table: _counts(changes) for table, changes in commit.tables.items()},
        "operations": [name for name, count in _COUNTS.items() if any(_sum(commit, count))],
        "rows": commit.rows,
        "markers": list(commit.markers),
        "origin": commit.origin,
        "xid": commit.name.number or 0,
        "name": str(commit.name),
        "time": commit.time,
    }


def _counts(changes: Changes) -> dict[str, int]:
    return changes._asdict() | {"rows": changes.rows}


def _sum(commit: Commit, count: str) -> list[int]:
    return [getattr(changes, count) for changes in commit.tables.values()]


def _any_matches(texts: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(text, glob) for text in texts for glob in globs)


def _is_true(answer: object) -> bool:
    if not isinstance(answer, bool):
        raise TypeError(f"the expression gave {answer!r}, which is neither true nor false")
    return answer


def _compile(index: int, rule: RuleOptions) -> cel.Program | None:
    """Give the rule's program; whatever can be known to be wrong before the first commit is refused here."""
    if rule.expression is None:
        return None
    place = f"rules.{index}.expression (rule {rule.name})"
    if len(rule.expression) > LONGEST_CHARACTERS:
        raise ConfigError(
            f"{place}: it has {len(rule.expression)} characters, {LONGEST_CHARACTERS} are allowed",
            hint="make several rules of it: a commit qualifies if one takes it",
        )
    try:
        import cel  # a third of a second that only rules with expressions should cost

        program = cel.compile(rule.expression)
    except ValueError as error:
        raise ConfigError(f"{place}: {_syntax(str(error))}", hint="expressions are written in CEL") from None
    unknown = set(program.variables()) - set(FACTS) - _bound_names(rule.expression)
    if unknown:
        raise ConfigError(
            f"{place}: no such fact: {', '.join(sorted(unknown))}", hint=f"the facts are {', '.join(FACTS)}"
        )
    strange = {name for name in program.functions() if name.isidentifier()} - FUNCTIONS
    if strange:
        raise ConfigError(
            f"{place}: no such function: {', '.join(sorted(strange))}",
            hint=f"the functions are {', '.join(sorted(FUNCTIONS))}",
        )
    _try_once(place, program, Work.of(rule.expression))
    return program


def _try_once(place: str, program: cel.Program, work: Work) -> None:
    """Refuse an expression that cannot give true or false; what only some commits make it do is no reason."""
    try:
        work.require_little(facts(_EXAMPLE))
    except TooMuchWorkError as error:
        raise ConfigError(f"{place}: {error}", hint="put fewer lists into each other") from None
    try:
        answer = program.execute(facts(_EXAMPLE))
    except Exception as error:  # noqa: BLE001 - most are a table or marker that the example lacks; another commit may not
        if isinstance(error, TypeError) or str(error).startswith(_WRONG_FOR_EVERY_COMMIT):
            words = " ".join(str(error).partition(". ")[0].split()).replace("Undefined variable or", "no such fact or")
            raise ConfigError(
                f"{place}: {words}",
                hint=f"the facts are {', '.join(f'{fact} ({kind})' for fact, kind in FACTS.items())}",
            ) from None
        return
    if not isinstance(answer, bool):
        raise ConfigError(
            f"{place}: it gives {answer!r}, which is neither true nor false",
            hint="compare it with something: `rows > 100`",
        )


_WRONG_FOR_EVERY_COMMIT = ("Undefined variable or function", "Function 'matches' error")
"""How the library's messages begin where arguments, or a regular expression, are wrong whatever the commit."""

_EXAMPLE = Commit(
    "database", History("", "", 1), 0, 0, Name("", 1), 0, tables={"public.example": Changes(1)}, markers=("example",)
)

_ERROR = re.compile(r"ERROR: <input>:(\d+):(\d+): (?:Syntax error: )?(.*?)(?: expecting .*)?$", re.MULTILINE)


def _syntax(message: str) -> str:
    """Give the parser's first complaint in one line, with the place inside the expression."""
    found = _ERROR.search(message)
    if found is None:
        return " ".join(message.split())[:200]
    line, column, what = found.groups()
    where = f"column {column}" if line == "1" else f"line {line}, column {column}"
    return f"not an expression: {what} at {where}"


_BINDING = re.compile(r"\.\s*(?:exists|all|exists_one|filter|map)\s*\(\s*(\w+)\s*,")


def _bound_names(expression: str) -> set[str]:
    """Give the names that comprehension macros bind (`x` in `tables.exists(x, …)`); they are no facts."""
    return set(_BINDING.findall(expression))


@dataclass(frozen=True, slots=True)
class Pending:
    """A qualifying commit that has no point yet."""

    commit: Commit
    rule: str
    arrived: float
    """By the monotonic clock, in seconds."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What has been taken so far, as far as budgets and schedules ask."""

    last_began: float | None
    """When the last round began, by the monotonic clock; None before the first."""
    began_in_last_minute: Sequence[float] = ()
    """When the rounds of the last sixty seconds began, oldest first."""
    not_before: float = 0.0
    """After a failed round: no other before this moment."""


@dataclass(frozen=True, slots=True)
class Take:
    """Take a point now."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until` (monotonic seconds; None: until something happens)."""

    until: float | None


@dataclass(frozen=True, slots=True)
class Skip:
    """Nothing that matters is pending: what was seen may be settled."""


Decision = Take | Wait | Skip


@dataclass(frozen=True, slots=True)
class Due:
    """A reason other than a commit to take a point, and when it came up or will (monotonic seconds)."""

    cause: Cause
    at: float
    urgent: bool = False
    """Urgent ones (no base at all, a demand, a full window) do not wait for a budget."""


def qualify(oldest: Pending | None, due: Due | None, pace: Pace, options: PointOptions, now: float) -> Decision:
    """Say what to do now.

    Args:
        oldest: the qualifying commit that waits longest, or None.
        due: the other reason that comes up first, or None.
        pace: what has been taken so far.
        options: intervals and budgets.
        now: monotonic seconds, as every time here.
    """
    due_now = due is not None and due.at <= now
    if oldest is None and not due_now:
        return Skip()
    if due_now and due is not None and due.urgent:
        return Take(due.cause) if now >= pace.not_before else Wait(pace.not_before)
    allowed = _allowed_from(pace, options)
    if oldest is not None:
        allowed = min(allowed, oldest.arrived + options.max_delay_seconds)
    allowed = max(allowed, pace.not_before)
    if now < allowed:
        return Wait(allowed)
    if due_now and due is not None and (oldest is None or due.cause is Cause.GAP):
        return Take(due.cause)  # behind a gap a base is wanted, whatever is pending
    return Take(Cause.COMMIT)


def _allowed_from(pace: Pace, options: PointOptions) -> float:
    """Give the moment from which both budgets allow another round."""
    if pace.last_began is None:
        return 0.0
    spaced = pace.last_began + options.min_interval_seconds
    if len(pace.began_in_last_minute) < options.per_minute:
        return spaced
    return max(spaced, pace.began_in_last_minute[-options.per_minute] + 60)


@dataclass(slots=True)
class Tally:
    """How many commits each rule took, and how many none did."""

    by_rule: dict[str, int] = field(default_factory=dict)
    passed_over: int = 0

    def count(self, rule: str | None) -> None:
        """Count one verdict."""
        if rule is None:
            self.passed_over += 1
        else:
            self.by_rule[rule] = self.by_rule.get(rule, 0) + 1

    def as_dict(self) -> Mapping[str, int]:
        """Give the counts by rule, with `""` for commits that no rule took."""
        return {**self.by_rule, "": self.passed_over}
