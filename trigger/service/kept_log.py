"""Whether the journal's filesystem is there: where log was kept once, a journal lies at every later start."""

from __future__ import annotations

import asyncio
from pathlib import Path

from trigger.config.options import Options
from trigger.errors import JournalError
from trigger.model import Finding, Severity
from trigger.ports import Journal
from trigger.trusted import read_text, replace_file

LOOK_SECONDS = 10.0
"""How long a disk may take to show whether anything lies on it."""
_REMEDY = "mount its filesystem, or bring all of the journal there; if that is really gone: trigpoint run --force"


def _file(options: Options) -> Path:
    """Give the file that says in which folder log was seen; where the state folder is lost, nobody counts on any."""
    return options.state_folder / "journal.begun"


def _noted(options: Options) -> str:
    try:
        return read_text(_file(options))
    except OSError:
        return ""


async def note(options: Options, journal: Journal) -> bool:
    """Note durably that the journal is kept where it is, once it lies there; gives whether that is so.

    Raises:
        JournalError: nobody can look there.
        OSError: it cannot be written.
    """
    if await journal.is_void():
        return False
    if await asyncio.to_thread(_noted, options) != (folder := str(options.journal_folder)):
        await asyncio.to_thread(replace_file, _file(options), folder)
    return True


async def look(options: Options, journal: Journal) -> Finding | None:
    """Give what stands in the way where log was kept and no journal lies there; None for nothing. Changes nothing."""
    if not (noted := await asyncio.to_thread(_noted, options)):
        return None
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            void = await journal.is_void()
    except TimeoutError:
        message = f"{options.journal_folder} does not show within {LOOK_SECONDS:g} s what lies there"
        return Finding("journal", Severity.WARNING, message, "see what its disk does")
    except JournalError as error:
        return Finding("journal", Severity.WARNING, error.message, error.hint)
    if not void:
        return None
    there = "there" if noted == str(options.journal_folder) else f"in {noted}"
    message = f"no journal lies in {options.journal_folder}, and log was kept {there}"
    return Finding("journal", Severity.REFUSED, message, _REMEDY)
