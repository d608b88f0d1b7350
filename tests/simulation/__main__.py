"""`python -m tests.simulation --seed N` prints the log of one run; `--runs N` looks for one that breaks a promise."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.run import simulate
from tests.simulation.story import SORTS


def main() -> int:
    """Run what was asked for; gives 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the (first) seed")
    parser.add_argument("--runs", type=int, default=1, help="how many seeds, one after the other")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first violation")
    parser.add_argument("--sort", default="", choices=("", "plain", *SORTS), help="of which databases; else as drawn")
    arguments = parser.parse_args()
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
