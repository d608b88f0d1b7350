"""`python -m tests.simulation --seed N` prints the log of one run; `--runs N` looks for one that breaks a promise.

`--mutants` looks for the seeds that catch the deliberate faults, and writes them down for the tests to begin with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

import pytest

from tests.simulation.mutants import CAUGHT, apply, caught
from tests.simulation.run import simulate
from tests.simulation.story import SORTS


def catch_mutants() -> int:
    """Write which seed catches each mutant; gives 1 where one survives."""
    from tests.simulation import test_mutants, test_mutants_of_lives

    seeds = {}
    for mutant in (*test_mutants.MUTANTS, *test_mutants_of_lives.MUTANTS):
        with pytest.MonkeyPatch.context() as patch:
            apply(mutant, patch)
            seed, verdict = caught(mutant)
        if not verdict:
            sys.stdout.write(f"what {mutant.claim} survives\n")
            return 1
        seeds[mutant.claim] = seed
    CAUGHT.write_text(json.dumps(seeds, indent=2) + "\n")
    return 0


def main() -> int:
    """Run what was asked for; gives 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the (first) seed")
    parser.add_argument("--runs", type=int, default=1, help="how many seeds, one after the other")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first violation")
    parser.add_argument("--sort", default="", choices=("", "plain", *SORTS), help="of which databases; else as drawn")
    parser.add_argument("--mutants", action="store_true", help="look for the seeds that catch the deliberate faults")
    arguments = parser.parse_args()
    if arguments.mutants:
        return catch_mutants()
    began, broken, counted = time.process_time(), 0, Counter[str]()
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        result = simulate(seed, arguments.sort)
        counted.update(result.counts | {f"runs of {result.sort}": 1})
        if arguments.runs == 1:
            sys.stdout.write("\n".join(result.log) + "\n")
        if result.violation:
            broken += 1
            sys.stdout.write(f"seed {seed} ({result.sort}): {result.violation}\n")
            if not arguments.keep_going:
                break
    spent = time.process_time() - began
    sys.stdout.write(f"{dict(counted)}\n")
    sys.stdout.write(f"{arguments.runs} runs, {broken} broken, {spent:.1f} s of processor time\n")
    return 1 if broken else 0


sys.exit(main())
