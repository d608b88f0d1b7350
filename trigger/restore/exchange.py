"""The renames that exchange the states of volumes; what exists tells which of them were done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from trigger.errors import RestoreError
from trigger.failpoint import reached
from trigger.model import Finding, Severity
from trigger.restore.obstacles import require_none
from trigger.trusted import sync_folder


@dataclass(frozen=True, slots=True)
class Place:
    """The four paths of one volume."""

    path: str
    """Where production lies."""
    kept: str
    """Where the old state is kept."""
    clone: str
    """Where the clone's copy is until it takes the place."""
    restored: str
    """Where the restored state goes when the swap is undone."""

    @classmethod
    def of(cls, path: str, name: str, clone: str = "") -> Self:
        """Give the paths of the volume at `path` in the swap called `name`."""
        return cls(path, f"{path}.before-{name}", clone, f"{path}.restored-{name}")


class Rename(NamedTuple):
    """One step of an exchange."""

    source: str
    destination: str

    @property
    def refusal(self) -> Finding:
        """What is said where something lies at the destination."""
        words = f"{self.source} cannot be renamed: {self.destination} exists"
        return Finding(self.destination, Severity.REFUSED, words, "move it away and try again")


def waiting(place: Place) -> str | None:
    """Give where a volume's restored state waits: in the clone, or where the undoing put it; None if it does not."""
    return next((path for path in (place.clone, place.restored) if os.path.lexists(path)), None)


def forward(place: Place) -> list[Rename]:
    """Give what puts one volume's restored state in place; what exists tells what was done already."""
    restored = waiting(place)
    if restored is None:
        return []
    first = [] if os.path.lexists(place.kept) else [Rename(place.path, place.kept)]
    return [*first, Rename(restored, place.path)]


def backward(place: Place) -> list[Rename]:
    """Give what puts one volume's old state back; what exists tells what was done already."""
    if not os.path.lexists(place.kept):
        return []
    first = [Rename(place.path, place.restored)] if os.path.lexists(place.path) else []
    return [*first, Rename(place.kept, place.path)]


def blocked(renames: Sequence[Rename]) -> list[Finding]:
    """Give what is in the way of renames that are done in order."""
    sources = [one.source for one in renames]
    found = [one for at, one in enumerate(renames) if one.destination not in sources[:at]]
    return [one.refusal for one in found if os.path.lexists(one.destination)]


def carry_out(renames: Sequence[Rename]) -> None:
    """Rename one after the other, each durably; raises `RestoreError` where something is in the way. Blocks."""
    for one in renames:
        require_none(blocked([one]))
        _rename(*one)


def _rename(source: str, destination: str) -> None:
    """Rename durably; raises `RestoreError` where that fails."""
    try:
        os.rename(source, destination)  # noqa: PTH104 - the words of the system call
        for folder in {os.path.dirname(source), os.path.dirname(destination)}:  # noqa: PTH120
            sync_folder(Path(folder))
    except OSError as error:
        raise RestoreError(f"{source} cannot be renamed to {destination}: {error.strerror}") from error
    reached("after-rename")
