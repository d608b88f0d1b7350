"""What `--json` prints, command by command, made from the types themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from trigger.catalog.rebuild import Rebuilt
from trigger.catalog.reconcile import Reconciliation
from trigger.config.reference import Section
from trigger.keep.expire import GivenUp
from trigger.model import CommitRecord, Finding, Gap, RecoveryPoint, Verification
from trigger.position import History, Name, Place, Position
from trigger.protect.rehearse import RehearsedPoint
from trigger.restore.aside import Aside
from trigger.restore.clones import CloneStatus
from trigger.restore.inplace import ClonePlan, InPlacePlan, SwapPlan
from trigger.restore.locate import Location
from trigger.restore.log_search import Around
from trigger.restore.planner import Plan
from trigger.restore.restore import Report
from trigger.restore.swap import Swap
from trigger.service.initialise import Proposal
from trigger.service.rehearsal import Rehearsal

STATUS = {
    "name": "what the cluster is called",
    "ready": "whether there is a point, and every stream is connected and none stands still",
    "started_at": "when the service began",
    "now": "its time of day",
    "streams": "by database whether its stream is connected",
    "behind_bytes": "by database how far the server's log is ahead of what its stream has given, or null",
    "log_end": "position up to which commits were seen, or null",
    "log_ends": "the same for each database of a service, where it has several",
    "pending_commits": "qualifying commits that wait for a point",
    "oldest_pending_seconds": "how long the oldest of them has waited",
    "commits_by_rule": 'commits seen since the start by rule, "" for those that no rule took',
    "last_point": "number of the newest sealed point, or null",
    "last_sealed_at": "when it was sealed, or null",
    "log_since_last_point_bytes": "log behind it",
    "replay_bytes": "log that a restore to the newest commit would replay",
    "replay_limit_bytes": "how much of it the restore objective allows",
    "journal": "findings of the last audit that are not ok",
    "troubles": "what keeps commits from being protected or restored exactly at present, as sentences",
    "totals": "points by state, pruned, commits by outcome, repeated commits, open gaps, bytes of the catalog, or null",
    "retained": "log that the database keeps for us: by reader bytes and left_bytes (null where unbounded), or null",
    "space": "free_bytes, total_bytes, wanted_free_bytes, snapshots, budget, needed_bytes, freeing, or null",
}

REHEARSAL = {
    "seen": "how many commits there were",
    "qualifying": "those that a rule took",
    "protected": "those that would have had a point of their own",
    "coalesced": "those that would have gone into another one's",
    "passed_over": "those that no rule took",
    "by_rule": "commits by rule",
    "rule_errors": "how often an expression threw",
    "longest_wait_seconds": "the longest that one would have waited for its point to begin",
    "commits": "a list, in log order: database, time, name, xid, end, rows, rule, outcome, point, waited_seconds",
    "points": "a list of RehearsedPoint",
}

DEMO = {
    "proven": "whether every check held",
    "checks": "a list: what was checked, whether it held, what was seen",
    "storage": "the storage's driver",
    "commits": "how many there were",
    "commits_per_second": "while the bank worked",
    "points": "how many were sealed",
    "milliseconds": "p50 and p99 of each step of a point, by its name",
    "restore_seconds": "the whole command",
    "restore": "what that printed",
    "accident": "xid and rows of the transaction that was undone",
    "folder": "where everything lies, or null where nothing was kept",
    "config": "the configuration there, or null",
}

OBJECTS: dict[str, dict[str, str]] = {
    "status": STATUS,
    "rules test": REHEARSAL,
    "demo": DEMO,
    "config check": {"file": "which it was", "name": "of the cluster", "right": "true; else it is an error"},
    "run": {
        "time": "when, one object a line, on standard error",
        "level": "info, warning or error",
        "logger": "the part that says it",
        "message": "one sentence",
    },
}
"""Answers that are objects of their own: what stands under each key."""

SHAPES: tuple[tuple[str, Any], ...] = (
    ("check, explain", list[Finding]),
    ("check --rehearse", {"findings": list[Finding], "rehearsal": Rehearsal}),
    ("point", RecoveryPoint),
    ("expire", GivenUp),
    ("list", list[RecoveryPoint]),
    ("list --gaps", list[Gap]),
    ("show", {"point": RecoveryPoint, "commits": list[CommitRecord]}),
    ("find", list[Location]),
    ("commits", Around),
    ("restore", Report),
    ("restore --dry-run", Plan),
    ("restore --in-place", {"report": Report, "swap": Swap}),
    ("restore --in-place --dry-run", InPlacePlan),
    ("restore --in-place --from-clone", {"clone": CloneStatus, "swap": Swap}),
    ("restore --in-place --from-clone --dry-run", ClonePlan),
    ("restore --undo, restore --resume", Swap),
    ("restore --undo --dry-run, restore --resume --dry-run", SwapPlan),
    ("clones, clones list", list[CloneStatus]),
    ("clones start", list[CloneStatus]),
    ("clones stop", list[CloneStatus]),
    ("clones drop", list[str]),
    ("aside, aside list", list[Aside]),
    ("aside drop", list[Path]),
    ("verify", Verification),
    ("reconcile", Reconciliation),
    ("clear", {"cleared": str}),
    ("release", {"dropped": list[str]}),
    ("catalog rebuild", Rebuilt),
    ("init", {"file": Path, "proposal": Proposal, "text": str}),
    ("config reference", list[Section]),
)
"""What each command prints; a mapping is an object with these keys. Others are in `OBJECTS`."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One object that occurs in an answer."""

    name: str
    doc: str
    fields: Mapping[str, tuple[str, str]]
    """By name: how it is written, and what it means."""


def text() -> str:
    """Give the reference of all answers in Markdown."""
    lines = ["# Answers of `--json`", "", *_INTRODUCTION, ""]
    lines += [f"- `{command}`: {_kind(shape)}" for command, shape in SHAPES]
    for command, keys in OBJECTS.items():
        lines += [f"- `{command}`: an object with", *(f"  - `{key}`: {doc}" for key, doc in keys.items())]
    lines.append("")
    for shape in shapes():
        lines += [f"## {shape.name}", "", shape.doc, ""]
        lines += [f"- `{name}`: {kind}{'; ' + doc if doc else ''}" for name, (kind, doc) in shape.fields.items()]
        lines.append("")
    return "\n".join(lines)


_INTRODUCTION = (
    "One document a command. Times are ISO-8601 in UTC with a `Z`, durations seconds, sizes bytes. A position is",
    "`<system>/<branch>@<place>`, with `+<incarnation>` behind the branch where that is not 0; a branch is a timeline",
    "in PostgreSQL, and a place an LSN. Errors go to standard error as text, and then nothing is printed here. Keys",
    "may be added in later versions; none is renamed or removed.",
)


def shapes() -> list[Shape]:
    """Give every object that occurs in an answer, by name."""
    found: dict[str, Shape] = {}
    for _, shape in (*SHAPES, ("rules test", RehearsedPoint)):
        for kind in shape.values() if isinstance(shape, dict) else [shape]:
            _collect(kind, found)
    return [found[name] for name in sorted(found)]


def _collect(kind: Any, found: dict[str, Shape]) -> None:
    for inner in get_args(kind):
        _collect(inner, found)
    if not _is_object(kind) or kind.__name__ in found:
        return
    hints, docs = get_type_hints(kind, include_extras=True), _field_docs(kind)
    for name in getattr(kind, "SHOWN", ()):
        found_by = getattr(kind, name).fget
        hints[name], docs[name] = get_type_hints(found_by)["return"], " ".join((inspect.getdoc(found_by) or "").split())
    names = [name for name in _names(kind) if name in hints]
    doc = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]
    fields = {name: (_kind(hints[name]), docs.get(name, "")) for name in names}
    if hints.get("name") is Name:
        fields["xid"] = ("number", "the number in the name, where nothing else is in it")
    found[kind.__name__] = Shape(kind.__name__, " ".join(doc.split()), fields)
    for name in names:
        _collect(hints[name], found)


def _is_object(kind: Any) -> bool:
    if not isinstance(kind, type) or kind in (Position, History, Name):
        return False
    return dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")


def _names(kind: Any) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [*(field.name for field in dataclasses.fields(kind)), *getattr(kind, "SHOWN", ())]
    return list(kind._fields)


def _field_docs(kind: type) -> dict[str, str]:
    """Give the texts that stand below the fields in the source of a class."""
    return dict(_below(ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]))


def _below(tree: ast.stmt) -> Iterator[tuple[str, str]]:
    assert isinstance(tree, ast.ClassDef)
    for above, node in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and isinstance(node, ast.Expr):
            value = node.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield above.target.id, " ".join(value.value.split())


_PLAIN = {
    Position: "position",
    History: "text, `<system>/<branch>`",
    Place: "place",
    Name: "text",
    datetime: "time",
    timedelta: "seconds",
    Path: "path",
    str: "text",
    bool: "true or false",
    int: "number",
    float: "number",
    Any: "value",
}


def _kind(kind: Any) -> str:
    """Give how a value of a type is written."""
    if isinstance(kind, dict):
        return "an object with " + ", ".join(f"`{key}` ({_kind(value)})" for key, value in kind.items())
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind(arguments[1])
    if origin in (Union, UnionType):
        inner = [_kind(part) for part in arguments if part is not type(None)]
        return " or ".join(inner) + (" or null" if type(None) in arguments else "")
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return f"object of {_kind(arguments[1])}"
    if origin is not None:
        parts = [part for part in arguments if part is not Ellipsis]
        return f"list of {_kind(parts[0])}" if len(set(map(str, parts))) == 1 else f"[{', '.join(map(_kind, parts))}]"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{member.value}`" for member in kind)
    return _PLAIN.get(kind) or f"[{kind.__name__}](#{kind.__name__.lower()})"
