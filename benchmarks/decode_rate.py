"""How fast a backlog of commits is decoded: our source against pg_recvlogical, as ratios of one run.

Method. A server of its own (newest version at hand, fsync off: only reading is measured) gets a pgbench load of
`--transactions` transactions (TPC-B-like without branches, 8 clients) while nobody reads its slots: for each round one
for us and one for pg_recvlogical, all made before the load and so with the same log to read.
In turns, `--rounds` times: pg_recvlogical writes the stream (protocol, publication and options as ours) to /dev/null
and ends at the load's last log position; then our source is opened in a process of its own and read, batch by batch,
until it has come past the same position. Wall time counts from the start of the program (connection included) to its
end, processor time is the process's own (user and system). The server decodes the same for both; it is the limit.

Prints medians and ratios; with `--json FILE` writes them with date and versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import as_owner, minimal_environment
from connectors.databases.postgres.stream.source import PostgresSource
from tests.fixtures.memory import peak_megabytes
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster
from tests.fixtures.volumes import plain_folder

AIM_WALL, AIM_CORE = 1.2, 0.5


async def read_backlog(dsn: str, database: str, name: str, until: int) -> dict[str, float]:
    """Read a source up to `until`; gives commits, batches, seconds and processor seconds."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    source = PostgresSource(dsn, database, name)
    await source.open(None)
    commits = batches = 0
    through = 0
    while through < until:
        batch = await source.read()
        commits += len(batch.commits)
        batches += 1
        through = batch.through.at
    ended = resource.getrusage(resource.RUSAGE_SELF)
    await source.close()
    return {
        "commits": commits,
        "batches": batches,
        "wall_seconds": time.perf_counter() - began,
        "cpu_seconds": ended.ru_utime - used.ru_utime + ended.ru_stime - used.ru_stime,
        "peak_megabytes": peak_megabytes(),
    }


def by_us(cluster: Cluster, name: str, until: Lsn) -> dict[str, float]:
    """Run `read_backlog` in a process of its own; opening counts, the start of the interpreter does not."""
    arguments = [sys.executable, "-m", "benchmarks.decode_rate", "--read", cluster.conninfo, name, str(int(until))]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def by_pg_recvlogical(cluster: Cluster, number: int, until: Lsn) -> dict[str, float]:
    """Run pg_recvlogical to the same position."""
    options = ["proto_version=4" if cluster.major >= 16 else "proto_version=3", "messages=true", "streaming=on"]
    options.append(f'publication_names="round{number}","round{number}_keyed"')
    arguments = [cluster.programs.path("pg_recvlogical"), "-h", str(cluster.sockets), "-p", str(cluster.port)]
    arguments += [
        "-U",
        "postgres",
        "-d",
        "postgres",
        "--slot",
        f"theirs_{number}",
        "--start",
        "--endpos",
        str(until),
        "-n",
        "-s",
        "1",
    ]
    arguments += ["-f", "/dev/null", *(word for option in options for word in ("-o", option))]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(arguments, check=True, env=minimal_environment(), cwd="/", **as_owner(cluster.owner))
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_seconds": wall,
        "cpu_seconds": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
    }


async def make_slots(cluster: Cluster, rounds: int) -> None:
    """Make publications and slot of a source for each round, and a copy of the slot for the other reader."""
    for number in range(rounds):
        source = PostgresSource(cluster.conninfo, "postgres", f"round{number}")
        await source.open(None)
        await source.close()
        cluster.sql(f"SELECT pg_copy_logical_replication_slot('{source.slot}', 'theirs_{number}')")


def load(cluster: Cluster, transactions: int) -> Lsn:
    """Run pgbench; gives where the log ends."""
    where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres", "postgres"]
    cluster.run("pgbench", "-n", "-N", "-c", "8", "-t", str(transactions // 8), *where)
    cluster.sql("SELECT pg_switch_wal()")
    return Lsn.parse(cluster.sql("SELECT pg_current_wal_flush_lsn()::text")[0][0])


def measure(major: int, transactions: int, rounds: int) -> dict[str, Any]:
    """Give the medians and ratios of all rounds."""
    with plain_folder() as folder, running_cluster(major, folder / "data", fsync="off") as cluster:
        where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres", "postgres"]
        cluster.run("pgbench", "-i", "-q", "-s", "5", *where)
        asyncio.run(make_slots(cluster, rounds))
        until = load(cluster, transactions)
        theirs, ours = [], []
        for number in range(rounds):
            theirs.append(by_pg_recvlogical(cluster, number, until))
            ours.append(by_us(cluster, f"round{number}", until))
    mid = {key: statistics.median(one[key] for one in ours) for key in ours[0]}
    peer = {key: statistics.median(one[key] for one in theirs) for key in theirs[0]}
    return {
        "ours": mid,
        "pg_recvlogical": peer,
        "wall_ratio": mid["wall_seconds"] / peer["wall_seconds"],
        "core_used": mid["cpu_seconds"] / mid["wall_seconds"],
        "aims": {"wall_ratio": AIM_WALL, "core_used": AIM_CORE},
    }


def main() -> None:
    """Run the benchmark, or (with --read) one reader of it."""
    if sys.argv[1:2] == ["--read"]:
        dsn, name, until = sys.argv[2:]
        print(json.dumps(asyncio.run(read_backlog(dsn, "postgres", name, int(until)))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transactions", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--major", type=int, default=MAJORS[-1])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = measure(asked.major, asked.transactions, asked.rounds)
    print(f"pg_recvlogical {found['pg_recvlogical']['wall_seconds']:.2f} s, ours {found['ours']['wall_seconds']:.2f} s")
    print(f"wall {found['wall_ratio']:.2f} x (aim {AIM_WALL}), {found['core_used']:.2f} of a core (aim {AIM_CORE})")
    settings = {"postgres": asked.major, "transactions": asked.transactions, "rounds": asked.rounds}
    record.write(asked.json, "decode_rate", settings, found)


if __name__ == "__main__":
    main()
