"""What a demo shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trigger.demo.figures import steps
from trigger.model import RecoveryPoint, State

_ROWS = 12
_COLUMNS = ("point", "taken for", "holds", "commit →", "flush →", "snapshot →", "tag", "sealed after")
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
        self._rows: deque[RecoveryPoint] = deque(maxlen=_ROWS)
        self._began = time.monotonic()
        self._shown_at = 0.0

    def chapter(self, title: str, detail: str = "") -> None:
        """Begin a part of the story; with the time since the demo began."""
        seconds = time.monotonic() - self._began
        words = Text.assemble((f"{seconds:5.1f} s  ", "dim"), (title, "bold"))
        self._console.print(words.append(f"  {detail}", style="dim") if detail else words)

    def line(self, text: str = "", style: str = "") -> None:
        """Print one line below a chapter."""
        self._console.print(Text(f"         {text}" if text else "", style=style))

    def check(self, claim: str, seen: str, *, held: bool) -> None:
        """Print whether something holds that must."""
        mark = ("✔ ", "green") if held else ("✘ ", "bold red")
        self._console.print(
            Text.assemble("         ", mark, (claim, "" if held else "bold red"), (f"  ({seen})", "dim"))
        )

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

    def point(self, point: RecoveryPoint) -> None:
        """Show a point that was taken."""
        self._rows.append(point)
        now = time.monotonic()
        if self._live is None and now - self._shown_at >= _PLAIN_EVERY_SECONDS:
            self._shown_at = now
            names = ("", "", "holds ", "commit → ", "flush → ", "snapshot → ", "tag, ", "sealed after ")
            number, reason, holds, *times = _cells(point)
            lines = [f"{name}{time}" for name, time in zip(names[3:], times, strict=True)]
            self.line(
                f"point {number}  {reason}, holds {holds}  {'  '.join(lines) if times[0] != '-' else ''}".rstrip()
            )

    def pulse(self, words: str) -> None:
        """Refresh the live table, with `words` above it."""
        if self._live is not None:
            self._live.update(self._table(words))

    def _table(self, words: str) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2), title=words, title_justify="left", title_style="dim")
        for number, name in enumerate(_COLUMNS):
            table.add_column(name, justify="left" if number == 1 else "right", header_style="bold", no_wrap=True)
        for point in self._rows:
            marked = point.rule == "marked"
            table.add_row(*_cells(point), style="green" if marked else "")
        return table


def _cells(point: RecoveryPoint) -> tuple[str, ...]:
    """Give what is shown of a point, in the order of the columns."""
    commit = point.commit
    reason = f"{', '.join(commit.markers) or 'transaction'} {commit.xid}" if commit else str(point.cause)
    holds = f"{point.commits} commit{'' if point.commits == 1 else 's'}"
    taken = steps(point)
    if point.state is State.FAILED:
        return str(point.number), f"{reason}: failed", "-", "-", "-", "-", "-", "-"
    if taken is None:
        return str(point.number), reason, holds, "-", "-", "-", "-", "-"
    times = (taken.wait, taken.flush, taken.snapshot, taken.tag, taken.total)
    return str(point.number), reason, holds, *(f"{milliseconds:.1f} ms" for milliseconds in times)
