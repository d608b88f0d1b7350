"""What a program prints of the records of a log, cut into one line a record: some hold text that anybody may choose.

`pg_waldump` prints such text as it is, line ends and all. The id of a prepared transaction has room for a whole line of
another record, with any place, time and transaction in it. So no line is taken for what it looks like: the first one is
that of a record, and so is each behind one whose text, by the log itself, has no further line end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from connectors.databases.postgres.lsn import Lsn

_HEAD_BYTES = 64 << 10
"""So much of a line is held at once: a commit of many subtransactions is one line, of any length, its id in front."""
_WORD_BYTES = 1 << 10
_HEAD = r" +len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), prev [0-9A-F]+/[0-9A-F]+, desc: "
_RECORD = re.compile(r"rmgr: (\w+)" + _HEAD + r"(\S+) ?(.*)", re.DOTALL)
_KINDS_WITH_TEXT = (b"PREPARE", b"RESTORE_POINT", b"CREATE")
_WITH_TEXT = re.compile(
    b"rmgr: (?:Transaction|XLOG|Tablespace)" + _HEAD.encode() + b"(?:" + b"|".join(_KINDS_WITH_TEXT) + b") "
)
"""Of Transaction, XLOG, Tablespace, Storage and Database, in versions 15 to 18, only these records print text: see
`xact_desc_prepare`, `xlog_desc` and `tblspc_desc`."""
_ASKING = tuple(b"desc: " + kind + b" " for kind in _KINDS_WITH_TEXT)


class Printed(NamedTuple):
    """The line of one record."""

    manager: str
    """The resource manager's name."""
    length: int
    """Of the record in bytes, with full-page images."""
    xid: int
    """32 bits, 0 for none."""
    start: Lsn
    kind: str
    rest: str
    """What stands behind the kind."""


def parse(line: str) -> Printed | None:
    """Give what the line of a record, or the first part of one, says; None for anything else."""
    match = _RECORD.match(line)
    if match is None:
        return None
    return Printed(match[1], int(match[2]), int(match[3]), Lsn.parse(match[4]), match[5], match[6])


class Cutter:
    """Cuts what is printed, as it comes, into the lines of records, with the line ends that their texts have.

    Long lines come in parts, cut in front of a blank where they have one, so that each but the first begins with it.

    Args:
        text_at: gives the text that a record, by its start and its length, has in the log itself; it may block.
    """

    def __init__(self, text_at: Callable[[Lsn, int], bytes]) -> None:
        self._text_at = text_at
        self._held = b""
        self._looked = 0
        """So much of what is held has no end of its line."""
        self._owed: int | None = None
        """How many line ends are yet to come that belong to the text of the line; None where it is not known."""
        self._begins = True
        """Whether what is held is the beginning of a line."""

    def asks(self, chunk: bytes) -> bool:
        """Whether a record with text may begin in a chunk, or end there, so that taking it blocks."""
        return _may_have_text(self._held + chunk)

    def take(self, chunk: bytes) -> list[str]:
        """Give the lines, or parts of them, that a chunk makes whole.

        Raises:
            JournalError: a record of which a line tells is not there, or another.
        """
        data = self._held + chunk
        if self._owed is None and not _may_have_text(data):
            *lines, self._held = data.split(b"\n")
        else:
            lines, self._held = self._with_texts(data)
        found = [part.decode(errors="replace") for line in lines for part in _cut(line)]
        *parts, self._held = _cut(self._held)
        found += [part.decode(errors="replace") for part in parts]
        self._begins, self._looked = not parts and (self._begins or bool(lines)), len(self._held)
        return found

    def rest(self) -> list[str]:
        """Give what is left once nothing comes any more."""
        return [self._held.decode(errors="replace")] if self._held else []

    def _with_texts(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Give the lines that are whole, and what is left."""
        lines, begin, at = list[bytes](), 0, self._looked
        while (end := data.find(b"\n", at)) >= 0:
            at = end + 1
            if self._owed is None:
                self._owed = self._text_lines(data, begin, end) if lines or self._begins else 0
            if self._owed:
                self._owed -= 1
                continue
            lines.append(data[begin:end])
            begin, self._owed = at, None
        return lines, data[begin:]

    def _text_lines(self, data: bytes, begin: int, end: int) -> int:
        """Give how many line ends the text of a line has, of which the first one ends at `end`."""
        match = _WITH_TEXT.match(data, begin, end)
        if match is None:
            return 0
        return self._text_at(Lsn.parse(match[3].decode()), int(match[1])).count(b"\n")


def _may_have_text(data: bytes) -> bool:
    return any(kind in data for kind in _ASKING)


def _cut(line: bytes) -> Sequence[bytes]:
    """Give a line in parts of about `_HEAD_BYTES`, the last of which may go on."""
    if len(line) <= _HEAD_BYTES:
        return (line,)
    parts, begin = list[bytes](), 0
    while len(line) - begin > _HEAD_BYTES:
        end = line.find(b" ", begin + _HEAD_BYTES - _WORD_BYTES)
        if end < 0:
            break
        parts.append(line[begin:end])
        begin = end
    return [*parts, line[begin:]]
