"""What points cost the writers: pgbench's rate with 0, 1 and 10 points a second and as fast as they go, in one run.

Method: PostgreSQL 18 with its data on btrfs on a loop device; `pgbench -N` at scale 10 with a few clients. After a
warm-up, rounds go through the settings in turn (no service, then the service without a demand for points, with one
each second, ten times a second, and one after the other without a pause), so that drift meets all of them; a run of
one setting lasts `--seconds`. The service takes points for nothing else meanwhile: its one rule matches no table. So
the second setting shows what it costs to read and keep the log, the others what the points cost on top. Given are the
median rate of each setting, the median of its loss against the run without a service in the same round, and how many
points a second were really sealed; where that is less than was asked for, the storage could not do more beside these
writers.

    python -m benchmarks.writers_loss --seconds 10 --rounds 3 --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks import record
from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment, deployment
from trigger.control import ask

SETTINGS: dict[str, float | None] = {
    "none": None,
    "no points": 0.0,
    "1/s": 1.0,
    "10/s": 10.0,
    "as fast as they go": math.inf,
}
"""By name, how many points a second are asked for; None for no service."""

NO_COMMITS = """
[points]
min_interval_seconds = 0
per_minute = 6000
catch_all_seconds = 3600
[[rules]]
name = "none"
tables = ["no.table"]
"""


def pgbench(cluster: Cluster, clients: int, seconds: int) -> subprocess.Popen[str]:
    """Start the load and give its process."""
    where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres"]
    command = [cluster.programs.path("pgbench"), *where, "-n", "-N", "-c", str(clients), "-T", str(seconds), "postgres"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def rate(process: subprocess.Popen[str]) -> float:
    """Give the transactions a second that a finished load reports."""
    output, _ = process.communicate(timeout=600)
    found = re.search(r"tps = ([0-9.]+)", output)
    if found is None:
        raise RuntimeError(f"pgbench gave no rate: {output}")
    return float(found[1])


async def demand(state: Path, per_second: float, load: subprocess.Popen[str]) -> int:
    """Ask for points at a pace until the load has ended; gives how many were sealed meanwhile."""
    sealed = 0
    due = time.monotonic()
    while load.poll() is None:
        if per_second:
            answer = await ask(state, {"do": "point"}, 60)
            sealed += answer["point"]["state"] == "sealed"
        due = max(due + 1 / (per_second or 1), time.monotonic())
        await asyncio.sleep(due - time.monotonic())
    return sealed


def one_round(deployed: Deployment, per_second: float | None, clients: int, seconds: int) -> tuple[float, float]:
    """Give (transactions a second, points a second) of one round."""
    if per_second is None:
        return rate(pgbench(deployed.cluster, clients, seconds)), 0.0
    deployed.start()
    try:
        load = pgbench(deployed.cluster, clients, seconds)
        points = asyncio.run(demand(deployed.state, per_second, load))
        return rate(load), points / seconds
    finally:
        deployed.stop()


def measure(seconds: int, rounds: int, clients: int) -> dict[str, dict[str, float]]:
    """Give by setting the median rate, the loss against no service, and the points a second."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    with deployment(18, "btrfs", extra=NO_COMMITS, shared_buffers="256MB") as deployed:
        deployed.config.write_text(deployed.config.read_text().replace("keep_free", "budget = 2000\nkeep_free"))
        cluster = deployed.cluster
        where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres"]
        cluster.run("pgbench", *where, "-i", "-q", "-s", "10", "postgres")
        rate(pgbench(cluster, clients, seconds))
        for _ in range(rounds):
            for name, per_second in SETTINGS.items():
                found[name].append(one_round(deployed, per_second, clients, seconds))
                print(f"{name:>20}: {found[name][-1][0]:7.0f} tps, {found[name][-1][1]:5.1f} points/s", flush=True)
    bare = [tps for tps, _ in found["none"]]
    return {
        name: {
            "tps": statistics.median(tps for tps, _ in of),
            "loss": statistics.median(1 - tps / alone for (tps, _), alone in zip(of, bare, strict=True)),
            "points_per_second": statistics.median(points for _, points in of),
        }
        for name, of in found.items()
    }


def main() -> None:
    """Measure, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = measure(options.seconds, options.rounds, options.clients)
    for name, of in figures.items():
        print(f"{name:>20}: {of['tps']:7.0f} tps, loss {of['loss']:6.1%}, {of['points_per_second']:5.1f} points/s")
    settings = {"seconds": options.seconds, "rounds": options.rounds, "clients": options.clients}
    record.write(options.json, "writers_loss", settings, figures)


if __name__ == "__main__":
    main()
