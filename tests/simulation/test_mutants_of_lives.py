"""Deliberate faults around lives of logs, several logs and kinds: each must be caught, as in `test_mutants`."""

from __future__ import annotations

import pytest

from connectors.memory import journal, lives, source
from tests.simulation.mutants import Mutant, check, is_copied_and_moved, is_copied_in_silence
from trigger.keep import expire
from trigger.protect import logs, window
from trigger.restore import locate, planner

MUTANTS = (
    Mutant(
        "never takes a log for another one",
        lives,
        "Lives.confirm",
        "if self._contradiction(held):",
        "if False:",
        "P1|P2|P3",
        sort="memory",
    ),
    Mutant(
        "does not compare the records that it holds",
        lives,
        "Lives._contradiction",
        "if reason := self._other_record(held, branch, left_at):",
        "if reason := '':",
        "P1|P2",
        sort="memory",
        needs=is_copied_in_silence,
    ),
    Mutant(
        "looks neither how far the log had come nor what is there",
        lives,
        "Lives._contradiction",
        "if self._ends.get(present, 0) > cluster.flushed_records:",
        "if False:",
        "P1|P2|liveness",
        ("if reason := self._other_record(held, branch, left_at):", "if reason := '':"),
        sort="announced",
        needs=is_copied_in_silence,
    ),
    Mutant(
        "keeps no record of a log that is not kept",
        lives,
        "Lives.remember",
        "log[max(0, index - 1) : index]",
        "[]",
        "P1",
        sort="announced",
        needs=is_copied_and_moved,
    ),
    Mutant(
        "puts the end of a gap where the log was before",
        source,
        "MemorySource._slot",
        "lineage.at(max(slot.confirmed, lineage.shared(after) or 0))",
        "lineage.at(max(slot.confirmed, min(after.at, cluster.flushed_records)))",
        "P1|P4",
        sort="memory",
    ),
    Mutant(
        "takes a base of another life",
        planner,
        "_unfit",
        "if not _inside(mark, lineage):",
        "if False:",
        "P2",
        sort="memory",
    ),
    Mutant(
        "keeps the newest log alone when old log is let go of",
        expire,
        "release_log",
        "journal.release(oldest.values())",
        "journal.release([*oldest.values()][-1:])",
        "P2.*let go of",
        sort="memory",
    ),
    Mutant(
        "lets go of log by the floor of the newest base",
        expire,
        "release_log",
        "min(start, oldest.get(start.history, start))",
        "start",
        "P2.*let go of",
        sort="memory",
    ),
    Mutant(
        "mixes the log of two lives",
        journal,
        "MemoryJournal._receive",
        "_take_over(held.entries.setdefault(",
        "_take_over(self._world.held[cluster.system][0].entries.setdefault(",
        "P2|unexpected|liveness",
        sort="memory",
    ),
    Mutant(
        "reads the mark of one log for the other",
        logs,
        "Logs.floors",
        "*[Mark(await database.record_end()) for database in others]",
        "*[Mark(await own.record_end()) for database in others]",
        "P3|liveness",
        sort="both",
    ),
    Mutant(
        "promises a replay of what has no log",
        locate,
        "_Known.way",
        "if not self.journal.replays:",
        "if False:",
        "P2",
        sort="announced",
    ),
    Mutant(
        "forgets what was lost with a life of the log",
        window,
        "Window.lost",
        "if not lineage.includes(p.commit.position)",
        "if False",
        "P1|P3|liveness|unexpected",
        sort="memory",
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.claim.replace(" ", "-"))
def test_a_product_or_driver_with_a_deliberate_fault_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    check(mutant, monkeypatch)
