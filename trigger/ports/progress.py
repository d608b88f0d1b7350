"""Who is told how far long work has come."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how far a long piece of work has come."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Say that `done` of `total` bytes (0 where unknown) of `step` are done."""
        ...
