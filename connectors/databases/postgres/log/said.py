"""What `pg_waldump` says of a commit: read part by part, since the line of one with many savepoints has no bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from connectors.databases.postgres.log import printed
from connectors.databases.postgres.lsn import Lsn
from trigger.model import to_microseconds

CHILDREN = 10_000
"""So many subtransactions of one commit are kept."""
_COMMITS = ("COMMIT", "COMMIT_PREPARED")
_TIME = re.compile(r"(?:(\d+): )?(\d{4,}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?) UTC")


@dataclass(slots=True)
class Said:
    """One commit record, as far as it was read by now."""

    xid: int
    """32 bits; of a prepared transaction the id it was prepared under."""
    start: Lsn
    length: int
    """In bytes."""
    time_us: int
    wanted: int
    """A subtransaction that is kept however many there are before it."""
    children: list[int] = field(default_factory=list)
    """Its subtransactions, 32 bits each: the first ones, and that which is wanted."""
    more_children: int = 0
    """How many others there are."""
    _files: int = 0
    _is_ddl: bool = False
    _came_from_elsewhere: bool = False
    _section: str = ""
    """Which part of the line was read last: its name, or as much of that as there is."""
    _is_named: bool = False

    @classmethod
    def of(cls, line: str, *, wanted: int = 0) -> Self | None:
        """Give the commit that a line, or the first part of one, prints, with times in UTC; None for anything else."""
        record = printed.parse(line)
        match = _TIME.match(record.rest) if record is not None and record.kind in _COMMITS else None
        if record is None or match is None:
            return None
        time = to_microseconds(datetime.fromisoformat(match[2]).replace(tzinfo=UTC))
        made = cls(int(match[1] or record.xid), record.start, record.length, time, wanted)
        made._is_named = True
        made.add(record.rest[match.end() :])
        return made

    def add(self, part: str) -> None:
        """Read the next part of the line, which does not begin amid a word."""
        for number, text in enumerate(part.split(";")):
            if number:
                self._section, self._is_named = "", False
            self._add(text)

    def _add(self, text: str) -> None:
        if not self._is_named:
            name, is_named, text = (self._section + text).partition(":")
            self._section, self._is_named = name, bool(is_named)
        match self._section.strip():
            case "subxacts":
                self._add_children(text.split())
            case "rels":
                self._files += len(text.split())
            case "inval msgs":
                self._is_ddl = True
            case "origin":
                self._came_from_elsewhere = True

    def _add_children(self, words: list[str]) -> None:
        room = max(CHILDREN - len(self.children), 0)
        self.children += map(int, words[:room])
        rest = words[room:]
        wanted = str(self.wanted) in rest and self.wanted not in self.children[CHILDREN:]
        self.children += [self.wanted] if wanted else []
        self.more_children += len(rest) - wanted

    @property
    def did(self) -> str:
        """What the record itself says of what was done, in words: what was changed is in records before it."""
        said = []
        if self._is_ddl:
            said.append("changes the catalog (DDL)")
        if self._files:
            said.append(f"drops {self._files} files")
        if self._came_from_elsewhere:
            said.append("was replicated from elsewhere")
        return ", ".join(said)
