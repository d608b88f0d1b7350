"""The folders of a journal: one for each life of the log, so that no segment of one is ever taken for another's.

The journal's own folder holds the first life of the cluster that it was made for. What begins a new life (an older copy
of the cluster put back, another cluster in its place after pg_upgrade) goes on in a folder below it, called
`<system>+<incarnation>`. What is there says which lives there were: nothing else has to be kept.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.lsn import KIND
from connectors.threads import Threads
from trigger.position import History

_NAME = re.compile(r"([0-9]{1,20})\+([0-9]{1,9})")


class LogFolders:
    """Gives the folder of each life.

    Args:
        path: the journal's own folder; made where it is missing.
        segment_bytes: the cluster's WAL segment size.
        owner: see `SegmentFolder`.
    """

    def __init__(self, path: Path, segment_bytes: int, owner: tuple[int, int] | None = None) -> None:
        self.segment_bytes = segment_bytes
        self.threads = Threads("journal")
        self._owner = owner
        self._first = SegmentFolder(path, segment_bytes, owner)
        self._first_system = ""
        self._later: dict[tuple[str, int], SegmentFolder] = {}

    def of(self, history: History) -> SegmentFolder:
        """Give the folder of the log that a history lies in; it need not be there yet. Blocks on small files."""
        self._look()
        life = history.system, history.incarnation
        if not self._first_system:
            self._first_system = self._first.system()
        if life not in self._later and (history.incarnation or self._first_system not in ("", history.system)):
            self._later[life] = self._folder(*life)
        return self._later.get(life, self._first)

    def all(self) -> list[SegmentFolder]:
        """Give every folder that there is, the first one first."""
        self._look()
        return [self._first, *(self._later[life] for life in sorted(self._later))]

    def newest(self, system: str) -> int:
        """Give the newest incarnation of a cluster that there is a folder of."""
        self._look()
        return max((incarnation for of, incarnation in self._later if of == system), default=0)

    def begin(self, history: History, writer: tuple[int, int] | None) -> SegmentFolder:
        """Make the folder of a life that begins, durably, so that it is known after a crash too."""
        folder = self.of(history)
        folder.make(writer)
        descriptor = os.open(folder.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return folder

    def _look(self) -> None:
        """Find the folders of later lives, also those that another process has made meanwhile."""
        try:
            entries = list(self._first.path.iterdir())
        except FileNotFoundError:
            return
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match and (match[1], int(match[2])) not in self._later and entry.is_dir():
                self._later[match[1], int(match[2])] = self._folder(match[1], int(match[2]))

    def _folder(self, system: str, incarnation: int) -> SegmentFolder:
        path = self._first.path / f"{system}+{incarnation}"
        return SegmentFolder(path, self.segment_bytes, self._owner, incarnation)


def is_of(folder: SegmentFolder, history: History) -> bool:
    """Whether a folder's log is, or may become, the one that a history lies in. Blocks on a small file."""
    same_cluster = folder.system() in ("", history.system)
    return history.kind == KIND and history.incarnation == folder.incarnation and same_cluster
