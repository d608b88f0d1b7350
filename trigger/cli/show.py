"""How results are shown: tables for people, aligned lines for pipes, JSON for programs; one place for each shape.

All that is printed goes through `plain`: what others wrote commands no terminal, and makes no line of its own.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from trigger.model import Finding
from trigger.shape import data, json_text, plain, size

configured_by: ContextVar[str] = ContextVar("configured_by", default="")
"""The configuration that the command at hand was told to read, as a shell reads it; "" where it found one itself."""

_READS_IT = re.compile(
    r"\btrigpoint (?=(?:check|explain|run|point|status|list|show|find|commits|restore|verify|expire|reconcile|clear|"
    r"release|clones|aside|catalog|rules)\b)"
)
_COLOURS = {
    "ok": "green",
    "sealed": "green",
    "protected": "green",
    "passed": "green",
    "note": "cyan",
    "coalesced": "cyan",
    "warning": "yellow",
    "open": "yellow",
    "refused": "bold red",
    "failed": "bold red",
    "missed": "bold red",
}


def _words(text: str) -> str:
    """Give a text as it may be printed, the commands in it as they have to be typed for the same configuration."""
    name = configured_by.get()
    return plain(_READS_IT.sub(lambda _: f"trigpoint -c {name} ", text) if name else text)


def print_json(value: Any) -> None:
    """Print `value` as one JSON document."""
    print(json_text(value, indent=2 if sys.stdout.isatty() else None, encoding=sys.stdout.encoding or "utf-8"))


def say(text: str = "") -> None:
    """Print one line for people."""
    Console(highlight=False, soft_wrap=True).print(Text(_words(text)))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str = "") -> None:
    """Print rows under headings: a table on a terminal, else lines of aligned columns that never wrap.

    Args:
        columns: headings; one that begins with `>` stands to the right.
        rows: cells in the order of the columns; None is shown as `-`.
        empty: what to print where there are no rows.
    """
    if not rows:
        say(empty)
        return
    cells = [[_cell(cell) for cell in row] for row in rows]
    names = [column.lstrip(">") for column in columns]
    if not sys.stdout.isatty():
        _print_lines([name.upper() for name in names], cells, [column.startswith(">") for column in columns])
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name, column in zip(names, columns, strict=True):
        grid.add_column(name, justify="right" if column.startswith(">") else "left")
    for row in cells:
        grid.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    Console(highlight=False).print(grid)


def _cell(cell: object) -> str:
    return "-" if cell is None or cell == "" else _words(str(data(cell)))


def _print_lines(names: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        print("  ".join(padded).rstrip())


def facts(rows: Sequence[tuple[str, object]]) -> None:
    """Print names with their values, one a line; values that are None or empty are left out."""
    shown = [(name, _cell(value)) for name, value in rows if value is not None and value != ""]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        say(f"{name.ljust(width)}  {value}")


def finding(found: Finding) -> None:
    """Print one finding: how bad, about what, what was seen; the remedy below."""
    severity = (f"{found.severity:<8}", _COLOURS[found.severity])
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text.assemble(severity, _words(f" {found.subject}: {found.message}")))
    if found.remedy:
        console.print(Text(_words(f"{'':8} -> {found.remedy}")))


def raw(text: str) -> None:
    """Print a text of ours, of several lines, as it is."""
    sys.stdout.write(text)


def duration(seconds: float | None) -> str | None:
    """Give seconds for people: `350 ms`, `12.4 s`, `3 min 05 s`, `2 h 10 min`, `4 d 3 h`; None stays None."""
    if seconds is None:
        return None
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def moment(time: datetime | None, *, digits: int = 0) -> str | None:
    """Give a time for people, in UTC, with `digits` of the second: `2026-03-01 12:00:05Z`; None stays None."""
    if time is None:
        return None
    utc = time.astimezone(UTC)
    fraction = f".{utc.microsecond:06d}"[: digits + 1] if digits else ""
    return f"{utc:%Y-%m-%d %H:%M:%S}{fraction}Z"


def more(count: int, what: str) -> None:
    """Say that `count` of something are not shown; nothing where there are none."""
    if count > 0:
        say(f"… and {count} more {what} (--limit)")


def note(text: str) -> None:
    """Print one line about what goes on to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(_words(text)))


def error(message: str, hint: str = "") -> None:
    """Print an error to standard error: each line of `message` behind `error:`, then the hint."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in message.splitlines() or [""]:
        console.print(Text.assemble(("error:", "bold red"), _words(f" {line}")))
    if hint:
        console.print(Text.assemble(("hint:", "bold cyan"), _words(f" {hint}")))


class LogLines(logging.Formatter):
    """Gives each message in one line, whatever others wrote into it; the lines of a trace are set in."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """Give the head of a record, its own words in one line."""
        record.message = plain(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """Give a record with the trace that belongs to it."""
        return "\n    ".join(plain(line) for line in super().format(record).split("\n"))


class Steps:
    """Shows how far long work has come, on standard error: bars on a terminal, else a line at each new step."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        """Say that `done` of `total` bytes (0 where unknown) of `step` are done; may be called from any thread."""
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(_words(step), total=total or None, amount="")
            if self._bars.disable:
                print(_words(step), file=sys.stderr, flush=True)
        amount = f"{size(done)} of {size(total)}" if total else (size(done) or "")
        self._bars.update(self._tasks[step], completed=done, total=total or None, amount=amount)

    @property
    def bars(self) -> Progress:
        """The display itself, for `steps`."""
        return self._bars


@contextmanager
def steps() -> Iterator[Steps]:
    """Give a `Progress` that is shown until the block ends."""
    shown = Steps()
    with shown.bars:
        yield shown
