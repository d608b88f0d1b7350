"""How long it takes to have one random commit back and running, against pgBackRest's point-in-time restore of it.

Method: for each size a PostgreSQL 15 with `pgbench` data of about that many gigabytes lies on btrfs on a loop device;
the service protects it and pgBackRest (Debian's, default compression, repository on the same disk outside the volume)
archives its log and has a full backup taken right after the service's first point. Then pgbench writes for
`--seconds`. Of the commits that the catalog knows `--restores` random ones are brought back in turn by both:

- ours: the process `trigpoint restore --to-xid` from its start to its end: clone, log, replay, promotion, proof;
- pgBackRest: `restore --type=lsn` of the same commit record into an empty folder, then the server started and waited
  for until it is promoted and answers.

Both clones are dropped before the next, and all filesystems synced, so that neither meets what the removal of the
other's gigabytes left to write. Given are medians in seconds, how ours divides into steps, and the ratio
pgBackRest : ours. Needs root and pgBackRest (`apt-get install pgbackrest`).

    python -m benchmarks.restore_time --sizes 0.1 1 10 --restores 5 --json FILE
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import record
from tests.fixtures import judge
from tests.fixtures.pgbackrest import PgBackRest
from tests.fixtures.service import Deployment, deployment
from trigger.model import CommitRecord

SCALE_OF_A_GIGABYTE = 68
"""pgbench's scale 68 makes about a gigabyte of tables and indexes."""


def theirs(backup: PgBackRest, commit: CommitRecord, folder: Path) -> float:
    """Give the seconds until a server with that commit answers from `folder`; all of it is removed afterwards."""
    os.sync()
    began = time.monotonic()
    where = f"--target={commit.start}"
    with backup.recovered(folder, "--type=lsn", where, "--target-action=promote") as clone:
        took = time.monotonic() - began
        state = clone.sql(f"SELECT pg_xact_status('{commit.name}')")[0][0]
        if state != "committed":
            raise RuntimeError(f"pgBackRest restored without transaction {commit.name}: {state}")
    return took


@contextlib.contextmanager
def prepared(gigabytes: float, seconds: int) -> Iterator[tuple[Deployment, PgBackRest]]:
    """Give a protected and backed-up cluster of a size, after some seconds of load."""
    megabytes = int(gigabytes * 6000) + 8000
    folder = Path(f"/var/tmp/trg-pgbackrest-{os.getpid()}")
    with deployment(15, "btrfs", megabytes=megabytes, archive_mode="on", max_wal_size="1GB") as deployed:
        cluster, deployed.forks = deployed.cluster, False
        backup = PgBackRest(cluster, folder)
        try:
            # Nobody needs the log of a load.
            cluster.configure({"archive_command": "/bin/true", "wal_level": "logical"})
            cluster.restart()
            where: list[str | Path] = ["-h", cluster.sockets, "-p", str(cluster.port), "-U", "postgres"]
            scale = max(1, round(gigabytes * SCALE_OF_A_GIGABYTE))
            cluster.run("pgbench", *where, "-i", "-q", "-s", str(scale), "postgres", seconds=3000)
            cluster.sql("CHECKPOINT")
            cluster.sql("SELECT pg_switch_wal()")
            backup.archive()
            deployed.start()
            backup.run("--type=full", "backup")
            cluster.run("pgbench", *where, "-n", "-N", "-c", "4", "-T", str(seconds), "postgres", seconds=3000)
            deployed.settle()
            cluster.sql("SELECT pg_switch_wal()")
            yield deployed, backup
        finally:
            deployed.stop()
            shutil.rmtree(folder, ignore_errors=True)


def ours(deployed: Deployment, commit: CommitRecord) -> dict[str, float]:
    """Give the seconds of one restore by us, whole and by step; the clone is dropped afterwards."""
    os.sync()
    began = time.monotonic()
    report: dict[str, Any] = deployed.ask("restore", "--to-xid", str(commit.name))
    took = time.monotonic() - began
    deployed.trigpoint("clones", "drop", "--yes", report["name"])
    return {"all": took, **report["seconds"], "replay_mb": report["replay_bytes"] / 1e6}


def measure(gigabytes: float, restores: int, seconds: int) -> dict[str, float]:
    """Give medians for one size."""
    with prepared(gigabytes, seconds) as (deployed, backup):
        known = [record for records in judge.read(deployed).commits.values() for record in records]
        mine, others = [], []
        for commit in random.sample(known, restores):
            mine.append(ours(deployed, commit))
            others.append(theirs(backup, commit, deployed.root / "pgbackrest-clone"))
            print(f"{gigabytes:6} GB: ours {mine[-1]}, pgBackRest {others[-1]:.2f} s", flush=True)
    found = {f"ours_{step}": statistics.median(one[step] for one in mine) for step in mine[0]}
    found["pgbackrest"] = statistics.median(others)
    found["ratio"] = statistics.median(b / a["all"] for a, b in zip(mine, others, strict=True))
    return found


def main() -> None:
    """Measure, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--restores", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if shutil.which("pgbackrest") is None:
        sys.exit("pgBackRest is not installed: apt-get install pgbackrest")
    figures = {str(size): measure(size, options.restores, options.seconds) for size in options.sizes}
    for size, found in figures.items():
        ours_and_theirs = f"ours {found['ours_all']:.2f} s, pgBackRest {found['pgbackrest']:.2f} s"
        print(f"{size:>6} GB: {ours_and_theirs}, {found['ratio']:.1f} x")
    settings = {"restores": options.restores, "seconds": options.seconds}
    record.write(options.json, "restore_time", settings, figures)


if __name__ == "__main__":
    main()
