"""How much longer a tagged snapshot takes than the bare call of the storage: ours : bare, in one run.

Method: a fresh btrfs on a loop device (or any btrfs folder given with `--folder`) holds one subvolume with a file of
`--megabytes`, random. Between any two snapshots 40 random pages of 8 KB are overwritten and flushed, as a database
does. Rounds alternate between

- bare: `btrfs_util_create_snapshot`, read-only, through ctypes in the same thread;
- ours: `BtrfsStorage.snapshot` awaited in an event loop, with its checks (room, budget, nested subvolumes), its
  thread, the tag written and flushed, and the finished snapshot looked at.

so that both meet the same filesystem with the same number of snapshots. Snapshots of both are kept until the end. Given
are p50 and p99 in milliseconds, and their ratios. `retag` (the replacement of the tag when the point is sealed) and
the directory storage on the same volume are measured afterwards, a tenth as often and without a counterpart.

    python -m benchmarks.seal_latency --rounds 200 --json seal.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import record
from connectors.storage import libbtrfsutil
from connectors.storage.btrfs import BtrfsStorage
from connectors.storage.directory import DirectoryStorage
from tests.fixtures.volumes import loop_volume
from trigger.model import EPOCH, Volume
from trigger.point_names import point_id

PAGE_BYTES = 8192
PAGES_A_ROUND = 40
TAG = "x" * 1500


def overwrite(path: Path, chance: random.Random) -> None:
    """Write some random pages and flush them."""
    pages = path.stat().st_size // PAGE_BYTES
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for _ in range(PAGES_A_ROUND):
            os.pwrite(descriptor, chance.randbytes(PAGE_BYTES), chance.randrange(pages) * PAGE_BYTES)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def measure(folder: Path, rounds: int, megabytes: int) -> dict[str, list[float]]:
    """Give the milliseconds of every call, by what was called."""
    source = folder / "volume"
    chance = random.Random(1)
    data = source / "file"
    with data.open("wb") as file:
        for _ in range(megabytes):
            file.write(chance.randbytes(1 << 20))
    os.sync()
    volume = Volume("data", str(source))
    storage = BtrfsStorage(folder / "ours", volumes=[volume], budget=100_000, wanted_free_bytes=0)
    copies = DirectoryStorage(folder / "copies", wanted_free_bytes=0)
    (folder / "bare").mkdir()
    taken: dict[str, list[float]] = {"bare": [], "ours": [], "retag": [], "directory": []}

    async def timed(what: str, number: int) -> None:
        overwrite(data, chance)
        point = point_id(EPOCH, number)
        before = time.perf_counter()
        if what == "bare":
            libbtrfsutil.create_snapshot(source, folder / "bare" / str(number), read_only=True)
        elif what == "ours":
            await storage.snapshot([volume], point, TAG)
        elif what == "retag":
            await storage.retag(point, TAG + TAG)
        else:
            await copies.snapshot([volume], point, TAG)
        taken[what].append((time.perf_counter() - before) * 1000)

    for number in range(rounds):
        for what in ("bare", "ours") if number % 2 else ("ours", "bare"):
            await timed(what, number)
    for number in range(0, rounds, 10):
        await timed("retag", number)
    for number in range(0, rounds, 10):
        await timed("directory", number)
    return taken


def summary(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Give p50 and p99 of each, and the ratio of ours to bare."""
    figures = {
        what: {"p50_ms": statistics.median(times), "p99_ms": statistics.quantiles(times, n=100)[98]}
        for what, times in taken.items()
    }
    figures["ratio"] = {name[:3]: figures["ours"][name] / figures["bare"][name] for name in ("p50_ms", "p99_ms")}
    return figures


@contextlib.contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """Give a folder on btrfs: a new one in `folder`, or on a loop device of its own."""
    if folder is None:
        with loop_volume("btrfs", 8192) as mount:
            yield mount
        return
    made = folder / f"seal-latency-{os.getpid()}"
    made.mkdir()
    try:
        yield made
    finally:
        for path in [made / "volume", *made.glob("bare/*"), *made.glob("ours/*/data")]:
            libbtrfsutil.delete_subvolume(path, recursive=False)
        shutil.rmtree(made)


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="a folder on btrfs; a loop device is made if not given")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with working_folder(options.folder) as folder:
        subprocess.run(["btrfs", "-q", "subvolume", "create", folder / "volume"], check=True)
        figures = summary(asyncio.run(measure(folder, options.rounds, options.megabytes)))
    for what, values in figures.items():
        print(f"{what:10}", "  ".join(f"{name} {value:.2f}" for name, value in values.items()))
    settings = {"rounds": options.rounds, "megabytes": options.megabytes}
    record.write(options.json, "seal_latency", settings, figures)


if __name__ == "__main__":
    main()
