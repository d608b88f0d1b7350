"""What makes a mutant: one function of the product or of a driver with a fault, and the stories that can show it."""

from __future__ import annotations
import __future__

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.simulation.run import simulate
from tests.simulation.story import Story, tell
from trigger.ports import Capability

TOLD, SEEDS = 6000, 400
"""How many stories are told for a mutant, and how many of those that fit it are run at most."""
ANNOTATIONS = __future__.annotations.compiler_flag
FIRST_SEED = 7_000
CAUGHT = Path(__file__).with_name("caught.json")
"""By claim the seed that caught a mutant when this was written: run first, so that others are looked for only where the
code has changed since. `python -m tests.simulation --mutants` writes it anew."""


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
    needs: Callable[[Story], bool] = lambda _: True
    """Whether a story may come to where the fault matters; the others are not run."""


def happens(*names: str, without: Collection[str] = ()) -> Callable[[Story], bool]:
    """Give whether one of these acts is in a story, and none of the others."""

    def needs(story: Story) -> bool:
        there = {act.name for act in story.acts}
        return not there.isdisjoint(names) and there.isdisjoint(without)

    return needs


def is_idle(story: Story) -> bool:
    """Whether slots are lost, and no point is due unless something has happened."""
    points = story.points
    return SLOTS_ALONE(story) and not (points.interval_seconds or points.cron or points.catch_all_seconds)


def is_narrow(story: Story) -> bool:
    """Whether the storage bears few snapshots."""
    return story.budget <= 8


def is_left_crowded(story: Story) -> bool:
    """Whether it does, and the log is gone on with from before its end."""
    return is_narrow(story) and happens("promote")(story)


def is_copied_in_silence(story: Story) -> bool:
    """Whether an older copy is put back behind which hardly anything but what no stream shows was logged."""
    return [act.name for act in story.acts].count("ddl") >= 12


def is_copied_and_moved(story: Story) -> bool:
    """Whether an older copy is put back, and slots are moved ahead while nobody is there."""
    return happens("put_back")(story) and happens("advance_slot")(story)


def is_crowded(story: Story) -> bool:
    """Whether the storage bears few snapshots, and the journal gets holes."""
    return is_narrow(story) and happens("damage_journal")(story)


def is_bracketed(story: Story) -> bool:
    """Whether the storage cannot cut all volumes at one instant."""
    return Capability.ATOMIC_GROUP not in story.capabilities


def is_asked_for_within_a_record(story: Story) -> bool:
    """Whether a point is asked for right after the log was flushed as far as a page goes."""
    return ("flush_pages", "demand") in pairwise(act.name for act in story.acts)


SLOTS = ("drop_slot", "recreate_slot", "advance_slot", "lose_slot")
ELSEWHERE = ("promote", "put_back", "reset_log")
"""What ends a log: a stream that takes no notice of it never settles, which hides what else is wrong."""
SLOTS_ALONE = happens(*SLOTS, without=ELSEWHERE)


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


def known(mutant: Mutant) -> list[int]:
    """Give the seed that has caught a mutant before, if any."""
    seed = json.loads(CAUGHT.read_text()).get(mutant.claim)
    return [] if seed is None else [seed]


def caught(mutant: Mutant) -> tuple[int, str]:
    """Give the first seed whose verdict says what is wrong, and the verdict; "" for none."""
    fit = (seed for seed in range(FIRST_SEED, FIRST_SEED + TOLD) if mutant.needs(tell(seed, mutant.sort)))
    for seed in chain(known(mutant), islice(fit, SEEDS)):
        violation = simulate(seed, mutant.sort).violation
        if violation and re.search(mutant.caught_by, violation):
            return seed, violation
    return 0, ""


def check(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Require that a mutant is caught, by a run in which nothing is wrong without its fault."""
    apply(mutant, monkeypatch)
    seed, verdict = caught(mutant)
    print(f"{mutant.claim}: seed {seed}: {verdict[:160]}")
    assert verdict, f"what {mutant.claim} survives"
    monkeypatch.undo()
    sound = simulate(seed, mutant.sort).violation
    assert not sound, f"seed {seed} of {mutant.sort} breaks by itself: {sound}"
