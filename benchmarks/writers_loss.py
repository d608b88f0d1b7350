"""What points cost the writers: pgbench's rate with 0, 1 and 10 points a second and as fast as they go, in one run.

Method: PostgreSQL 18 with its data on btrfs on a loop device; `pgbench -N` at scale 10 with a few clients. After a
warm-up, rounds go through the settings in turn (no service, then the service without a demand for points, with one
each second, ten times a second, and one after the other without a pause), so that drift meets all of them; a run of
one setting lasts `--seconds`. The service takes points for nothing else meanwhile: its one rule matches no table. So
the setting without points shows what it costs to read and keep the log. Two settings without a service say what of it
is not ours: `peers` is PostgreSQL's own `pg_recvlogical` and `pg_receivewal` beside the writers, `bare 10/s` is `btrfs
subvolume snapshot -r` at that pace. Snapshots are removed after each run of a setting, so that none meets those of
another: hundreds of kept snapshots make writing to btrfs slower, whoever made them. Given
are the median rate of each setting, the median of its loss against the run without anything in the same round, and how
many points (or bare snapshots) a second there really were; where that is less than was asked for, the storage could
not do more beside these writers.

    python -m benchmarks.writers_loss --seconds 10 --rounds 3 --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import record
from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment, deployment
from trigger.service.control import ask

SETTINGS: dict[str, float | None] = {
    "none": None,
    "peers": 0.0,
    "bare 10/s": 10.0,
    "no points": 0.0,
    "1/s": 1.0,
    "10/s": 10.0,
    "as fast as they go": math.inf,
}
"""By name, how many points, or bare snapshots, a second are asked for; None for nothing beside the writers."""

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


@contextlib.contextmanager
def peers(cluster: Cluster) -> Iterator[None]:
    """Read and keep the log by PostgreSQL's own programs while the block runs."""
    where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres"]
    cluster.sql("CREATE PUBLICATION peers FOR ALL TABLES")
    cluster.sql("SELECT pg_create_physical_replication_slot('peer_log', true)")
    cluster.sql("SELECT pg_create_logical_replication_slot('peer', 'pgoutput')")
    options = ["-o", "proto_version=4", "-o", "publication_names=peers", "-o", "messages=true", "-o", "streaming=on"]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        commands = (
            ["pg_recvlogical", *where, "-d", "postgres", "-S", "peer", "--start", "-f", "/dev/null", *options],
            ["pg_receivewal", *where, "-D", folder, "-S", "peer_log", "--no-loop", "--status-interval=1"],
        )
        running = [
            subprocess.Popen([cluster.programs.path(program), *rest], stderr=subprocess.DEVNULL)
            for program, *rest in commands
        ]
        try:
            time.sleep(1)
            yield
        finally:
            for process in running:
                process.terminate()
                process.wait(30)
    cluster.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name LIKE 'peer%'")
    cluster.sql("DROP PUBLICATION peers")


def snapshots(deployed: Deployment, per_second: float, load: subprocess.Popen[str]) -> int:
    """Make bare snapshots at a pace until the load has ended, and remove them; gives how many there were."""
    made = 0
    due = time.monotonic()
    while load.poll() is None:
        cut = str(deployed.root / f"bare-{made}")
        subprocess.run(
            ["btrfs", "subvolume", "snapshot", "-r", str(deployed.cluster.data), cut],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        made += 1
        due = max(due + 1 / per_second, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
    for number in range(made):
        subprocess.run(
            ["btrfs", "subvolume", "delete", str(deployed.root / f"bare-{number}")],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    subprocess.run(["btrfs", "subvolume", "sync", str(deployed.root)], check=True, stdout=subprocess.DEVNULL)
    return made


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


def one_round(deployed: Deployment, name: str, clients: int, seconds: int) -> tuple[float, float]:
    """Give (transactions a second, points a second) of one run of a setting."""
    per_second = SETTINGS[name]
    if per_second is None:
        return rate(pgbench(deployed.cluster, clients, seconds)), 0.0
    if name == "peers":
        with peers(deployed.cluster):
            return rate(pgbench(deployed.cluster, clients, seconds)), 0.0
    if name.startswith("bare"):
        load = pgbench(deployed.cluster, clients, seconds)
        made = snapshots(deployed, per_second, load)
        return rate(load), made / seconds
    deployed.start()
    deployed.settle()  # what the runs without a service left in its slots is none of this run's load
    try:
        load = pgbench(deployed.cluster, clients, seconds)
        points = asyncio.run(demand(deployed.state, per_second, load))
        return rate(load), points / seconds
    finally:
        deployed.trigpoint("expire", str(deployed.status()["last_point"]), "--yes", deadline=600)
        deployed.stop()
        subprocess.run(["btrfs", "subvolume", "sync", str(deployed.root)], check=True, stdout=subprocess.DEVNULL)


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
            for name in SETTINGS:
                found[name].append(one_round(deployed, name, clients, seconds))
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
