"""What the expression of a rule may ask for: the facts of a commit, the functions, and how much work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FACTS = {
    "database": "text",
    "tables": "list of texts, `schema.table`",
    "changes": "map of a table to its counts: inserted, updated, deleted, truncated, rows",
    "operations": "list of those that occur: insert, update, delete, truncate",
    "rows": "int, in all tables",
    "markers": "list of texts",
    "origin": "text, empty for a commit made here",
    "xid": "int, 64 bits: the number in the name of the commit, for PostgreSQL its transaction id",
    "name": "text, what people call the commit",
    "time": "timestamp of the commit",
}
"""What an expression can ask about a commit, and of which type it is."""

FUNCTIONS = frozenset(
    {
        *("size", "contains", "startsWith", "endsWith", "matches", "timestamp", "duration", "type", "dyn"),
        *("string", "bytes", "int", "uint", "double", "getFullYear", "getMonth", "getDate", "getDayOfMonth"),
        *("getDayOfWeek", "getDayOfYear", "getHours", "getMinutes", "getSeconds", "getMilliseconds"),
    }
)
"""What an expression can call: what the library's native standard library has (operators and macros aside)."""

LONGEST_CHARACTERS = 10_000
MOST_STEPS = 500_000
"""So much may judging one commit cost, in elements of lists looked at: some tenths of a second, in which nothing else
is read. The library has no limit of its own, and nothing ends it once it works."""
_TEXT_OF_A_STEP = 2_000
"""So many characters are searched through in the time of one step."""
_STEPS_OF_A_MAP = 25
"""So many steps the library needs to be given one element of `changes`."""


class TooMuchWorkError(Exception):
    """What an expression could make of a commit is more than may be waited for."""


@dataclass(frozen=True, slots=True)
class Work:
    """What of an expression decides how long it may take."""

    macros: int
    """How often it goes through a list."""
    depth: int
    """How many of these stand inside each other at most."""
    literals: int
    """More elements than any list that is written out has."""
    additions: int

    @classmethod
    def of(cls, expression: str) -> Work:
        """Read it from the text."""
        bare = _UNREAD.sub(" ", expression)
        macros, depth, stack = 0, 0, list[bool]()
        for found in _CALL.finditer(bare):
            if found[0] == ")":
                _ = stack and stack.pop()
                continue
            stack.append(found[1] is not None)
            macros += stack[-1]
            depth = max(depth, sum(stack))
        return cls(macros, depth, bare.count(",") + 1, bare.count("+"))

    def require_little(self, facts: Mapping[str, Any]) -> None:
        """Raise `TooMuchWorkError` where it could take too long with these facts, whatever they are in between."""
        lists = [value for value in facts.values() if isinstance(value, list | Mapping)]
        texts = (len(each) for value in (*lists, facts.values()) for each in value if isinstance(each, str))
        longest = max(2, self.literals, *map(len, lists)) * (1 + self.additions)
        step = 1 + max(texts, default=0) * (1 + self.additions) // _TEXT_OF_A_STEP
        handed_over = sum(len(each) * (_STEPS_OF_A_MAP if isinstance(each, Mapping) else 1) for each in lists)
        if handed_over + self.macros * step * longest**self.depth > MOST_STEPS:
            raise TooMuchWorkError(f"it could go through {longest} elements, {self.depth} times over")


_UNREAD = re.compile(
    r"""//[^\n]*"""
    r"""|(?:[bB]?[rR]|[rR][bB])(?:\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|"[^"\n]*"|'[^'\n]*')"""
    r"""|\"{3}(?:[^\\]|\\[\s\S])*?\"{3}|'{3}(?:[^\\]|\\[\s\S])*?'{3}|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'"""
)
"""Comments and strings."""
_CALL = re.compile(r"\.\s*(exists|all|exists_one|existsOne|filter|map)\s*\(|[()]")
