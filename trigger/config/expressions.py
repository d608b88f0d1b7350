"""What the expression of a rule may ask for: the facts of a commit, and the functions."""

from __future__ import annotations

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
