"""A catalog whose writer was killed holds every promise, and no half of anything."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.crash.catalog_writer import COMMITS, STRIDE
from tests.trigger.catalog.test_catalog import at
from trigger.catalog.catalog import Catalog
from trigger.model import RecoveryPoint, State
from trigger.position import Name

ROOT = Path(__file__).parent.parent.parent
NAMED = re.compile(r'reached\(f?"(catalog-[a-z-]+(?:\{state\})?)"\)')


def failpoints() -> Iterator[str]:
    """Every failpoint of the catalog, as the source names them."""
    for source in ("catalog.py", "point_index.py", "commit_index.py", "schema.py"):
        for name in NAMED.findall((ROOT / "trigger" / "catalog" / source).read_text()):
            states = ("failed", "expiring", "expired") if "{state}" in name else ("",)
            yield from (name.replace("{state}", state) for state in states)


class Promised(NamedTuple):
    """What the writer had said when it died."""

    sealed: dict[int, int]
    """The position up to which the stream was settled, by point."""
    failed: set[int]
    expired: set[int]
    missed: set[int]
    gaps: set[int]


def promised(lines: list[str]) -> Promised:
    words = [line.split() for line in lines]
    by_kind = {kind: {int(w[1]) for w in words if w[0] == kind} for kind in ("failed", "expired", "missed", "gap")}
    sealed = {int(w[1]): int(w[3]) for w in words if w[0] == "sealed"}
    return Promised(sealed, by_kind["failed"], by_kind["expired"], by_kind["missed"], by_kind["gap"])


def write_until_killed(where: Path, turn: int, *, failpoint: str = "", after_seconds: float = 30) -> list[str]:
    """Run the writer until its failpoint, or we, kill it; give the lines it had written whole."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.crash.catalog_writer", str(where), str(turn)],
        cwd=ROOT,
        env={**os.environ, "TRIGPOINT_FAILPOINT": failpoint},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if failpoint:
            writer.wait(after_seconds)
        else:
            assert writer.stdout is not None
            first = writer.stdout.readline()  # not before it works
            time.sleep(after_seconds)
            writer.kill()
            return [first, *whole_lines(writer)]
        return whole_lines(writer)
    finally:
        writer.kill()
        writer.wait()


def whole_lines(writer: subprocess.Popen[str]) -> list[str]:
    rest = writer.communicate(timeout=10)[0]
    assert writer.returncode == -9, "the writer was to be killed, and ended by itself"
    return [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]


async def check(where: Path, lines: list[str]) -> int:
    """Hold the catalog to what was promised; give the turn with which a next writer goes on."""
    said = promised(lines)
    with closing(sqlite3.connect(where)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    catalog = await Catalog.open(where)
    points = {point.number: point for point in await catalog.points()}
    assert sorted(points) == list(range(1, len(points) + 1))
    for number, point in points.items():
        await check_whole(catalog, number, point)
    assert {number for number in said.sealed if points[number].state in (State.OPEN, State.FAILED)} == set()
    assert {number for number in said.expired if points[number].state is not State.EXPIRED} == set()
    assert {number for number in said.failed if points[number].state is not State.FAILED} == set()
    for xid in said.missed:
        assert [found.reason for found in await catalog.find(name=Name("", xid))] == ["left"]
    assert said.gaps <= {int(gap.after.at) for gap in await catalog.gaps()}
    settled = await catalog.settled("bank")
    if said.sealed:
        assert settled is not None
        assert settled >= at(max(said.sealed.values()))
    totals = await catalog.totals()
    assert totals.repeated == 0
    assert sum(totals.commits.values()) == len(await catalog.find(limit=1 << 30))
    assert len([point for point in points.values() if point.state is State.OPEN]) <= 1 + lines.count("again\n")
    await catalog.close()
    return int(settled.at) // STRIDE + 1 if settled else 1


async def check_whole(catalog: Catalog, number: int, point: RecoveryPoint) -> None:
    commits = await catalog.commits_of(number)
    assert len(commits) == point.commits or (point.commits == COMMITS and len(commits) == 1)  # adopted: the tag's count
    if point.state in (State.OPEN, State.FAILED):
        assert commits == []
    elif len(commits) == COMMITS:
        turn = commits[0].start // STRIDE
        assert [found.point for found in await catalog.find(marker=f"turn {turn}")] == [number]


@pytest.mark.parametrize("name", sorted(set(failpoints())))
def test_a_writer_killed_between_two_steps_leaves_the_catalog_whole(name: str, tmp_path: Path) -> None:
    where = tmp_path / "catalog.db"
    lines = write_until_killed(where, 1, failpoint=f"{name}:kill@2")
    assert lines, "the writer was killed before it promised anything"
    turn = asyncio.run(check(where, lines))
    more = write_until_killed(where, turn, failpoint=f"{name}:kill@2")
    asyncio.run(check(where, [*lines, "again\n", *more]))


def test_a_writer_killed_at_any_moment_leaves_the_catalog_whole(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    where, turn, lines = tmp_path / "catalog.db", 1, []
    for _ in range(8):
        lines += ["again\n", *write_until_killed(where, turn, after_seconds=chance.uniform(0, 0.4))]
        turn = asyncio.run(check(where, lines))
    assert sum(line.startswith("sealed") for line in lines) > 8, f"seed {seed}"
