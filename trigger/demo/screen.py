"""What a demo shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trigger.demo.figures import steps
from trigger.model import CommitRecord, RecoveryPoint, State
from trigger.shape import plain

_ROWS = 12
_COLUMNS = ("point", "commit", "holds", "marked", "wait", "flush", "snapshot", "tag", "total")
_TITLE = "from the commit: wait, flush, snapshot, tag and seal, in milliseconds"
_PLAIN_EVERY_SECONDS = 0.5


class Screen:
    """Shows what happens.

    Args:
        plain: lines only, even on a terminal.
        to_errors: everything to standard error, since standard output is for a document.
    """

    def __init__(self, *, plain: bool, to_errors: bool) -> None:
        self._console = Console(file=sys.stderr if to_errors else sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._plain = plain or not self._console.is_terminal
        self._rows: deque[tuple[str, ...]] = deque(maxlen=_ROWS)
        self._began = time.monotonic()
        self._shown_at = 0.0

    def chapter(self, title: str, detail: str = "") -> None:
        """Begin a part of the story; with the time since the demo began."""
        seconds = time.monotonic() - self._began
        words = Text.assemble((f"{seconds:5.1f} s  ", "dim"), (plain(title), "bold"))
        self._console.print(words.append(plain(f"  {detail}"), style="dim") if detail else words)

    def line(self, text: str = "", style: str = "") -> None:
        """Print one line below a chapter."""
        self._console.print(Text(plain(f"         {text}") if text else "", style=style))

    def check(self, claim: str, seen: str, *, held: bool) -> None:
        """Print whether something holds that must."""
        mark = ("✔ ", "green") if held else ("✘ ", "bold red")
        self._console.print(Text.assemble("         ", mark, (plain(claim), "" if held else "bold red")))
        self.line(f"  {seen}", "dim")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Show the points that `point` is told of until the block ends."""
        if self._plain:
            yield
            return
        with Live(self._table(""), console=self._console, refresh_per_second=10) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def point(self, point: RecoveryPoint, records: Sequence[CommitRecord]) -> None:
        """Show a point that was taken, with the commits that it protects."""
        cells = _cells(point, [marker for record in records for marker in record.markers])
        self._rows.append(cells)
        now = time.monotonic()
        if self._live is None and now - self._shown_at >= _PLAIN_EVERY_SECONDS:
            self._shown_at = now
            self.line(_sentence(*cells))

    def pulse(self, words: str) -> None:
        """Refresh the live table, with `words` above it."""
        if self._live is not None:
            self._live.update(self._table(words))

    def _table(self, words: str) -> Table:
        title = f"{words}\n{_TITLE}"
        table = Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="dim"
        )
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name == "marked" else "right", header_style="bold", no_wrap=True)
        for cells in self._rows:
            table.add_row(*cells, style="green" if cells[3] else "")
        return table


def _sentence(*cells: str) -> str:
    """Give what is shown of a point, in one line."""
    number, commit, holds, marked, wait, flush, snapshot, tag, total = cells
    times = f": wait {wait}, flush {flush}, snapshot {snapshot}, tag {tag} = {total} ms" if total else ""
    return f"point {number} for {commit}, holds {holds}{f' with {marked}' if marked else ''}{times}"


def _cells(point: RecoveryPoint, markers: Sequence[str]) -> tuple[str, ...]:
    """Give what is shown of a point, in the order of the columns."""
    number, holds = str(point.number), str(point.commits)
    commit = f"xid {point.commit.name}" if point.commit else f"the {point.cause}"
    taken = steps(point)
    if point.state is State.FAILED or taken is None:
        return number, commit, "failed" if point.state is State.FAILED else holds, "", "", "", "", "", ""
    times = (taken.wait, taken.flush, taken.snapshot, taken.tag, taken.total)
    return number, commit, holds, plain(", ".join(markers)), *(f"{milliseconds:.1f}" for milliseconds in times)
