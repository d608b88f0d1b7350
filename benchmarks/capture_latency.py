"""How soon a commit is known after COMMIT has returned: our source against pg_recvlogical, as ratios of one run.

Method. One writer inserts `--commits` single rows a round, `--pause` seconds apart, and notes on the monotonic clock
when each COMMIT came back. One reader at a time follows, in turns (theirs, ours, theirs, …, `--rounds` each), so that
they do not take the processor from each other; each has its own slot, with the same protocol, publications and
options. Ours is a process that notes the clock when `read` gives the commit. Theirs is pg_recvlogical writing into a
pipe, and a process that notes the clock when as many
bytes have come out of it as the transactions so far must have: what a program built on
pg_recvlogical would see. Latencies of all rounds are pooled; some are below zero, where the stream was faster than
the answer to the writer, so the ratios are of (latency + the writer's own p50 COMMIT time): from the *call* of COMMIT
to its being known. fsync is on.

Prints p50 and p99 of both and their ratios; with `--json FILE` writes them with date and versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from connectors.databases.postgres.programs import as_owner, minimal_environment
from connectors.databases.postgres.stream.source import PostgresSource
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster
from tests.fixtures.volumes import plain_folder

AIM = 1.5
_FIRST_ROW = 100_000  # all rows have six digits, and so each transaction the same number of bytes
_TRANSACTION_BYTES = 21 + 1 + 19 + 1 + 26 + 1  # Begin, Insert, Commit, and the newline behind each message
_RELATION_BYTES = 35 + 1  # Relation, once
ROOT = Path(__file__).parent.parent


async def watch_ours(dsn: str, commits: int) -> list[int]:
    """Give the clock (ns) at which each of so many commits was given by `read`."""
    source = PostgresSource(dsn, "postgres")
    await source.open(None)
    print("ready", flush=True)
    seen: list[int] = []
    while len(seen) < commits:
        batch = await source.read()
        seen += [time.monotonic_ns()] * len(batch.commits)
        await source.acknowledge(batch.through)
    await source.close()
    return seen


def watch_theirs(arguments: list[str], commits: int) -> list[int]:
    """Give the clock (ns) at which each of so many commits had come out of pg_recvlogical."""
    owner = json.loads(arguments.pop(0))
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, env=minimal_environment(), cwd="/", bufsize=0, **as_owner(owner)
    ) as program:
        assert program.stdout is not None
        print("ready", flush=True)
        seen: list[int] = []
        received = -_RELATION_BYTES
        while len(seen) < commits:
            received += len(os.read(program.stdout.fileno(), 65536))
            seen += [time.monotonic_ns()] * (received // _TRANSACTION_BYTES - len(seen))
        program.terminate()
    return seen


def write_rows(cluster: Cluster, commits: int, pause_seconds: float) -> list[tuple[int, int]]:
    """Insert rows one by one; gives the clock (ns) before and after each."""
    noted = []
    with cluster.connect() as connection:
        for number in range(commits):
            time.sleep(pause_seconds)
            before = time.monotonic_ns()
            connection.execute("INSERT INTO written VALUES (%s)", [_FIRST_ROW + number])
            noted.append((before, time.monotonic_ns()))
    return noted


def one_round(cluster: Cluster, reader: list[str], commits: int, pause_seconds: float) -> list[tuple[int, int, int]]:
    """Give (COMMIT called, COMMIT returned, commit known) of each row, with one reader following."""
    arguments = [sys.executable, "-m", "benchmarks.capture_latency", "--watch", str(commits), *reader]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        time.sleep(1.0)
        written = write_rows(cluster, commits, pause_seconds)
        known = json.loads(watcher.stdout.readline())
    return [(before, after, seen) for (before, after), seen in zip(written, known, strict=True)]


def their_arguments(cluster: Cluster) -> list[str]:
    """Give the arguments with which pg_recvlogical reads what our source reads."""
    version = 4 if cluster.major >= 16 else 3
    options = [f"proto_version={version}", 'publication_names="trigpoint","trigpoint_keyed"', "messages=true"]
    where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres", "-d", "postgres"]
    program = [cluster.programs.path("pg_recvlogical"), *where, "--slot", "theirs", "--start", "-n", "-f", "-"]
    return [*program, *(word for option in [*options, "streaming=on"] for word in ("-o", option))]


def measure(major: int, commits: int, rounds: int, pause_seconds: float) -> dict[str, Any]:
    """Give p50 and p99 of both readers, and the ratios."""
    noted: dict[str, list[tuple[int, int, int]]] = {"theirs": [], "ours": []}
    with plain_folder() as folder, running_cluster(major, folder / "data") as cluster:
        cluster.sql("CREATE TABLE written (id int)")
        asyncio.run(_make_slots(cluster))
        readers = {
            "theirs": ["theirs", json.dumps(cluster.owner), *their_arguments(cluster)],
            "ours": ["ours", cluster.conninfo],
        }
        for _ in range(rounds):
            for name, reader in readers.items():
                cluster.sql(
                    "SELECT pg_replication_slot_advance(slot_name, pg_current_wal_lsn()) FROM pg_replication_slots"
                )
                noted[name] += one_round(cluster, reader, commits, pause_seconds)
    from_return = {name: _percentiles([seen - after for _, after, seen in rows]) for name, rows in noted.items()}
    from_call = {name: _percentiles([seen - before for before, _, seen in rows]) for name, rows in noted.items()}
    return {
        "after_return_ms": from_return,
        "after_call_ms": from_call,
        "ratio": {key: from_call["ours"][key] / from_call["theirs"][key] for key in ("p50", "p99")},
        "aim": AIM,
    }


async def _make_slots(cluster: Cluster) -> None:
    source = PostgresSource(cluster.conninfo, "postgres")
    await source.open(None)
    await source.close()
    await asyncio.sleep(0.5)
    cluster.sql(f"SELECT pg_copy_logical_replication_slot('{source.slot}', 'theirs')")


def _percentiles(nanoseconds: list[int]) -> dict[str, float]:
    ordered = sorted(nanoseconds)
    return {name: ordered[int(len(ordered) * share)] / 1e6 for name, share in (("p50", 0.5), ("p99", 0.99))}


def main() -> None:
    """Run the benchmark, or (with --watch) one reader of it."""
    if sys.argv[1:2] == ["--watch"]:
        commits, who, *rest = int(sys.argv[2]), *sys.argv[3:]
        seen = asyncio.run(watch_ours(rest[0], commits)) if who == "ours" else watch_theirs(rest, commits)
        print(json.dumps(seen), flush=True)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commits", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.004)
    parser.add_argument("--major", type=int, default=MAJORS[-1])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = measure(asked.major, asked.commits, asked.rounds, asked.pause)
    for name in ("theirs", "ours"):
        after, call = found["after_return_ms"][name], found["after_call_ms"][name]
        print(f"{name:7} after COMMIT returned: p50 {after['p50']:.2f} ms, p99 {after['p99']:.2f} ms", end="; ")
        print(f"after it was called: p50 {call['p50']:.2f} ms, p99 {call['p99']:.2f} ms")
    print(f"ratio p50 {found['ratio']['p50']:.2f}, p99 {found['ratio']['p99']:.2f} (aim {AIM})")
    settings = {"postgres": asked.major, "commits": asked.commits * asked.rounds, "pause": asked.pause}
    record.write(asked.json, "capture_latency", settings, found)


if __name__ == "__main__":
    main()
