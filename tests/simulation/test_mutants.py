"""Deliberate faults in the product, each of which the simulation must catch: checkers that cannot fail prove nothing.

A mutant replaces one function by a wrong one. It is run over seeds until a checker objects; one that survives all of
them fails the test, and either a checker or the weather is too mild. `caught_by` is what must object: a fault that
only makes the run fall over would prove little.
"""

from __future__ import annotations
import __future__

import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from tests.simulation.run import simulate
from trigger.catalog import point_index, reconcile
from trigger.keep import room
from trigger.protect import agenda, logs, pipeline, window
from trigger.restore import planner

SEEDS = 400
ANNOTATIONS = __future__.annotations.compiler_flag
FIRST_SEED = 7_000


@dataclass(frozen=True)
class Mutant:
    """A fault: in one function, one piece of its source replaced by another."""

    claim: str
    """What the product does with the fault."""
    module: ModuleType
    function: str
    right: str
    wrong: str
    caught_by: str = ""
    """A pattern that the verdict must match; "" for any."""
    also: tuple[str, str] = ("", "")
    """A second replacement in the same function."""
    sort: str = "plain"
    """Of which databases the runs are that shall catch it."""


MUTANTS = (
    Mutant(
        "acknowledges what it has read, before anything is sealed",
        pipeline,
        "protect_pending",
        "    point = await take(",
        "    await window.settle(collected.settled)\n    point = await take(",
        "P4",
    ),
    Mutant(
        "acknowledges a failed round",
        pipeline,
        "protect_pending",
        "if point.state is State.SEALED:",
        "await window.settle(collected.settled)\n    if point.state is State.SEALED:",
        "P4",
    ),
    Mutant(
        "acknowledges idle streams before the catalog knows",
        pipeline,
        "settle",
        "    for stream, through",
        "    await window.settle(collected.settled)\n    for stream, through",
        "P4",
    ),
    Mutant(
        "settles what waits for its point",
        pipeline,
        "protect",
        "                case Wait(until):",
        "                case Wait(until):\n"
        "                    for stream, through in window.collect().settled.items():\n"
        "                        await cluster.catalog.settle(stream, through)",
        "P1",
    ),
    Mutant(
        "does not look whether the log covers the commit in one history",
        logs,
        "_require_cover",
        "if durable.history != floor.history and",
        "if False and",
        "P3",
    ),
    Mutant(
        "takes the snapshot without a flush",
        pipeline,
        "flush",
        "await asyncio.gather(*(agent.flush(point.id, deadline_seconds) for agent in agents))",
        '[[Flush("", "v0", "0:0", "0", point.opened_at, point.opened_at)]]',
        "P3",
    ),
    Mutant(
        "takes the snapshot before the flush",
        pipeline,
        "take",
        "            flushes = await flush",
        "            await storage.snapshot(cluster.volumes, point.id, tag.encode(point))\n"
        "            flushes = await flush",
        "P3",
    ),
    Mutant(
        "reads the ceiling before the snapshot",
        pipeline,
        "take",
        '            reached("after-cover")',
        '            reached("after-cover")\n            marks = await ceilings(covered, [None] * len(covered))',
        "P3",
        also=("            marks = await ceilings(covered, brackets)\n", ""),
    ),
    Mutant(
        "takes the flushed position for the ceiling",
        logs,
        "ceilings",
        "await database.ceiling()",
        "await database.durable()",
        "P3",
    ),
    Mutant(
        "does not look whether the history changed during the round",
        logs,
        "ceilings",
        "if ceiling.history != durable.history:",
        "if False:",
        "P3",
    ),
    Mutant("leaves the bracket out", pipeline, "bracketed", "if Capability.ATOMIC_GROUP in", "if True or", "P3|P2"),
    Mutant(
        "sets the floor behind the commit",
        logs,
        "_floor",
        "        return newest.position\n",
        "        return replace(newest.position, at=newest.end + 4096)\n",
        "P3|liveness",
    ),
    Mutant(
        "takes the flushed position for the end of a record",
        logs,
        "_floor",
        "await database.record_end()",
        "await database.durable()",
        "P3: the floor of point .* lies within a record",
    ),
    Mutant(
        "takes the newest commit for the moment at which a point was asked for",
        logs,
        "_floor",
        "newest is not None and cause is Cause.COMMIT",
        "newest is not None",
        "it was asked for at",
    ),
    Mutant(
        "takes the end of the present log for commits of before a failover",
        logs,
        "_floor",
        "end.history == newest.history and end.covers(newest.position)",
        "True",
        "P1|P3|unexpected",
    ),
    Mutant("records no gap", pipeline, "record_breaks", "await cluster.catalog.record_gap(", "repr(", "P1"),
    Mutant(
        "forgets to close gaps",
        pipeline,
        "protect_pending",
        "await cluster.catalog.close_gaps(point.number)",
        "pass",
        "gap",
    ),
    Mutant(
        "does not record what a failover left behind",
        pipeline,
        "record_breaks",
        "in itertools.groupby(",
        "in () and itertools.groupby(",
        "P1.*left behind",
    ),
    Mutant(
        "takes no point because of a gap",
        agenda,
        "Agenda._urgent",
        "if self.open_gap:",
        "if False:",
        "liveness|gap",
    ),
    Mutant(
        "drops the window when a round fails",
        pipeline,
        "protect_pending",
        "        pause = agenda.failed(",
        "        for one in window._streams.values():\n            one.pending.clear()\n        pause = agenda.failed(",
        "P1",
    ),
    Mutant(
        "calls every commit of a point protected",
        window,
        "Collected.records",
        "Outcome.PROTECTED if p is newest else Outcome.COALESCED",
        "Outcome.PROTECTED",
        "P1",
    ),
    Mutant(
        "counts the newest commit twice",
        window,
        "Collected.tables",
        "in self.pending:",
        "in [*self.pending, *self.pending[-1:]]:",
        "it says",
    ),
    Mutant(
        "leaves the oldest commit out of the records",
        window,
        "Collected.records",
        "for p in self.pending]",
        "for p in self.pending[len(self.pending) > 1 :]]",
        "P1",
    ),
    Mutant(
        "settles a stream to where it has been read, not to what was collected",
        window,
        "Window.collect",
        "through = last  #",
        "pass  #",
        "P1",
    ),
    Mutant(
        "puts commits of two histories into one point",
        window,
        "Window.collect",
        "lambda p: p.commit.history == history",
        "lambda p: True",
        "P1|P3|liveness",
    ),
    Mutant(
        "does not drop what comes twice",
        window,
        "Window._receive",
        "if stream.has(commit.position):",
        "if False:",
        "P1|liveness|it says",
    ),
    Mutant("takes no notice of a break", window, "Window._open", "if seen is not None:", "if False:", "P1"),
    Mutant(
        "loses the place when it reconnects",
        window,
        "Window._open",
        "await stream.source.open(stream.through)",
        "await stream.source.open(None)",
        "P1|P4",
    ),
    Mutant(
        "records breaks that come together as one",
        window,
        "Window.forget",
        "self._breaks.remove(broken)",
        "self._breaks.clear()",
        "P1",
    ),
    Mutant(
        "does not ask the catalog what a failed call has done",
        pipeline,
        "protect",
        "if untidy:",
        "if False:",
        "it says|P1|liveness",
    ),
    Mutant(
        "reconcile deletes what was sealed",
        reconcile,
        "_settle_point",
        "case State.SEALED if found is None or not found.complete:",
        "case State.SEALED if await storage.delete(point.id) is None:",
        "P5|P3",
    ),
    Mutant(
        "reconcile adopts what was never sealed",
        reconcile,
        "_sealed",
        "if point.state is State.SEALED else None",
        "",
        "P3|unexpected|liveness",
    ),
    Mutant(
        "reconcile forgets the snapshot of an interrupted point",
        reconcile,
        "_settle_point",
        "await _remove(storage, point.id, done)\n                await catalog.fail(point, INTERRUPTED)",
        "await catalog.fail(point, INTERRUPTED)",
        "P5",
    ),
    Mutant(
        "reconcile does not see phantoms",
        reconcile,
        "_settle_point",
        "case State.SEALED if found is None or not found.complete:",
        "case State.SEALED if False:",
        "P3|P5",
    ),
    Mutant(
        "reconcile adopts without the commits",
        reconcile,
        "_settle_point",
        "await catalog.seal(sealed[0], sealed[1],",
        "await catalog.seal(sealed[0], [],"
        " {r.stream: type(point.floor)(point.floor.history, r.end) for r in sealed[1]} or",
        "P1",
    ),
    Mutant(
        "the catalog seals without settling in the same transaction",
        point_index,
        "_settle_all",
        "    for stream, position in through.items():",
        "    for stream, position in ():",
        "P4|liveness",
    ),
    Mutant(
        "the planner takes a base that may hold the commit after the target",
        planner,
        "_unfit",
        "(ends := mark.holds_at_most) > target.at:",
        "(ends := mark.floor.at) > target.at:",
        "P2",
    ),
    Mutant(
        "the planner takes a base of another timeline",
        planner,
        "_unfit",
        "if not _inside(mark, lineage):",
        "if False:",
        "P2",
    ),
    Mutant(
        "the planner does not check that the log is there",
        planner,
        "plan",
        "if hole := _first_hole(held, Stretch(begin, max(needed, _limit(mark, target)))):",
        "if hole := None:",
        "P2",
        also=("log = Stretch(begin, _end(target, held, begin))", "log = Stretch(begin, target.at)"),
    ),
    Mutant(
        "the planner takes inclusive for exclusive",
        planner,
        "plan",
        "return _replayed(base, target,",
        "return _replayed(base, __import__('dataclasses').replace(target, inclusive=not target.inclusive),",
        "P2",
    ),
    Mutant(
        "the planner stops one record too late",
        planner,
        "plan",
        "return _replayed(base, target,",
        "return _replayed(base, __import__('dataclasses').replace(target, at=target.at + 1),",
        "P2",
    ),
    Mutant(
        "the planner refuses what the newest base cannot do",
        planner,
        "plan",
        "            continue\n        begin",
        "            break\n        begin",
        "P2",
    ),
    Mutant(
        "the thinning keeps to the restore objective whatever the storage bears",
        room,
        "Room._make",
        "thin(bases, wanted, most,",
        "thin(bases, wanted, len(bases),",
        "liveness",
    ),
    Mutant(
        "the thinning takes a base to which no log leads",
        planner,
        "HeldLog.leads",
        "return _first_hole(self._held, Stretch(begin, until)) is None",
        "return True",
        "was lost when point",
    ),
    Mutant(
        "the thinning takes a base of another past",
        planner,
        "HeldLog.leads",
        " or not _inside(before, self._lineage)",
        "",
        "was lost when point",
    ),
)


def apply(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the function by the wrong one, made from its present source."""
    *owners, name = mutant.function.split(".")
    owner: Any = mutant.module
    for each in owners:
        owner = getattr(owner, each)
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    for right, wrong in ((mutant.right, mutant.wrong), mutant.also):
        assert not right or source.count(right) == 1, f"{mutant.function} has {source.count(right)} times: {right}"
        source = source.replace(right, wrong) if right else source
    names: dict[str, Any] = {}
    code = compile(source, f"<mutant of {mutant.function}>", "exec", flags=ANNOTATIONS)
    exec(code, vars(mutant.module), names)
    right = getattr(owner, name)
    users = [module for module in [*sys.modules.values()] if getattr(module, "__dict__", {}).get(name) is right]
    for place in [owner, *users]:
        monkeypatch.setattr(place, name, names[name])


def caught(mutant: Mutant) -> str:
    """Give the first verdict that says what is wrong, or ""."""
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        violation = simulate(seed, mutant.sort).violation
        if violation and re.search(mutant.caught_by, violation):
            return f"seed {seed}: {violation}"
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.claim.replace(" ", "-"))
def test_a_product_with_a_deliberate_fault_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(mutant, monkeypatch)
    verdict = caught(mutant)
    print(f"{mutant.claim}: {verdict[:160]}")
    assert verdict, f"a service that {mutant.claim} survives {SEEDS} seeds"


def test_the_product_without_a_fault_passes_the_seeds_that_catch_the_mutants() -> None:
    verdicts = [simulate(seed, "plain").violation for seed in range(FIRST_SEED, FIRST_SEED + 50)]
    assert not any(verdicts), [verdict for verdict in verdicts if verdict]
