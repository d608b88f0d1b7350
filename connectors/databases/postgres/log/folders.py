"""The folders of a journal: one for each life of the log, so that no segment of one is ever taken for another's.

The journal's own folder holds the first life of the cluster that it was made for. What begins a new life (an older copy
of the cluster put back, another cluster in its place after pg_upgrade) goes on in a folder below it, called
`<system>+<incarnation>`. What is there says which lives there were: nothing else has to be kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

from connectors.databases.postgres.log.files import give, reading, write_flushed
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import page_header
from connectors.databases.postgres.lsn import KIND
from connectors.threads import Threads
from trigger.position import History
from trigger.trusted import sync_folder

_NAME_LENGTH = 24
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
        """Of the present cluster; that of another life may be another."""
        self.threads = Threads("journal")
        self.path = path
        self._owner = owner
        self._first = SegmentFolder(path, _segment_bytes(path, segment_bytes), owner)
        self._later: dict[tuple[str, int], SegmentFolder] = {}
        self._guard = threading.Lock()

    def free_bytes(self) -> int | None:
        """Give how much more finds room in the journal's own folder; None where that is not there."""
        try:
            room = os.statvfs(self._first.path)
        except OSError:
            return None
        return room.f_bavail * room.f_frsize

    def of(self, history: History) -> SegmentFolder:
        """Give the folder of the log that a history lies in; it need not be there yet. Blocks on small files."""
        self._look()
        life = history.system, history.incarnation
        if life not in self._later and (history.incarnation or not self._is_first(history.system)):
            return self._keep(*life)
        return self._later.get(life, self._first)

    def _is_first(self, system: str) -> bool:
        """Whether the log of a cluster lies, or may begin, in the journal's own folder."""
        return self._first.system() in ("", system) or self._first.oldest_system() == system

    def all(self) -> list[SegmentFolder]:
        """Give every folder that there is, the first one first."""
        self._look()
        later = [folder for _, folder in sorted(self._known().items())]
        return [self._first, *(folder for folder in later if folder.path.is_dir())]

    def of_system(self, system: str) -> list[SegmentFolder]:
        """Give the folders that there are of a cluster's lives, the newest first."""
        self._look()
        found = [folder for life, folder in sorted(self._known().items(), reverse=True) if life[0] == system]
        if self._is_first(system):
            found.append(self._first)
        return [folder for folder in found if folder.path.is_dir()]

    def newest(self, system: str) -> int:
        """Give the newest incarnation of a cluster that there is a folder of."""
        self._look()
        return max((incarnation for of, incarnation in self._known() if of == system), default=0)

    def begin(self, history: History, writer: tuple[int, int] | None, past: str) -> SegmentFolder:
        """Make the folder of a life that begins, durably, so that it is known after a crash too.

        `past` is the server's history file of its timeline, "" for the first: an archive may have another one.
        """
        folder = self.of(history)
        folder.make(writer)
        if past:
            file = folder.path / f"{history.branch:08X}.history"
            write_flushed(file, past)
            give(file, writer)
            sync_folder(folder.path)
        sync_folder(folder.path.parent)
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
                self._keep(match[1], int(match[2]))

    def _known(self) -> dict[tuple[str, int], SegmentFolder]:
        """Give the folders of later lives that are known at this moment; many threads find them."""
        with self._guard:
            return dict(self._later)

    def _keep(self, system: str, incarnation: int) -> SegmentFolder:
        """Give the one object of a life, whoever comes first: what is damaged is known to it."""
        found = self._folder(system, incarnation)
        with self._guard:
            return self._later.setdefault((system, incarnation), found)

    def _folder(self, system: str, incarnation: int) -> SegmentFolder:
        path = self._first.path / f"{system}+{incarnation}"
        folder = SegmentFolder(path, _segment_bytes(path, self.segment_bytes), self._owner, incarnation)
        folder.top = self._first.path
        return folder


def _segment_bytes(folder: Path, default: int) -> int:
    """Give the size of the segments that lie in a folder, as the first of them says; `default` for none."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if len(entry.name) == _NAME_LENGTH)
    except OSError:
        return default
    for entry in entries[:1]:
        with contextlib.suppress(OSError), reading(entry) as file:
            header = page_header(file.read(64))
            return header.segment_bytes if header is not None and header.segment_bytes else default
    return default


def is_of(folder: SegmentFolder, history: History) -> bool:
    """Whether a folder's log is, or may become, the one that a history lies in. Blocks on a small file."""
    same_cluster = folder.system() in ("", history.system)
    return history.kind == KIND and history.incarnation == folder.incarnation and same_cluster
