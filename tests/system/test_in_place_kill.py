"""A restore in place on a real server, killed at each of its steps: it is finished or taken back, and nothing is lost.

The model is a list of payments, each a row in two tables; where there are two volumes, the tables lie on both.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment
from trigger.errors import RestoreError

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

NUMBERS = itertools.count(1)


@dataclass
class Bank:
    """A bank that is to be restored in place to before a payment; between two tests nothing of it runs."""

    here: Deployment
    restore: tuple[str, ...]
    before: list[int]
    """What production holds once it is restored."""
    now: list[int]
    """What it holds while it is not, and once that is undone."""


@pytest.fixture(scope="module")
def banks() -> Iterator[Callable[[str], Bank]]:
    """Give what makes the bank of a storage, once."""
    with contextlib.ExitStack() as stack:
        yield cache(lambda storage: stack.enter_context(a_bank(storage)))


@pytest.fixture
def bank(request: pytest.FixtureRequest, banks: Callable[[str], Bank]) -> Bank:
    return banks(str(request.param))


kills_of = partial(pytest.mark.parametrize, indirect=["bank"], ids=str)


@contextlib.contextmanager
def a_bank(storage: str) -> Iterator[Bank]:
    """Give a bank on one btrfs subvolume, or on two plain folders of one filesystem."""
    with deployment(15, storage) as here:
        where = a_second_volume(here) if here.storage == "directory" else ""
        here.cluster.sql("CREATE TABLE paid (n int PRIMARY KEY, xid xid8 DEFAULT pg_current_xact_id())")
        here.cluster.sql(f"CREATE TABLE booked (n int PRIMARY KEY) {where}")
        here.start()
        before = [pay(here), pay(here)]
        accident = pay(here)
        here.settle()
        xid = here.cluster.sql(f"SELECT xid::text FROM paid WHERE n = {accident}")[0][0]
        stop(here)
        yield Bank(here, ("restore", "--before-xid", str(xid), "--in-place", "--yes"), before, [*before, accident])


def a_second_volume(here: Deployment) -> str:
    """Make a tablespace that is a volume of its own; gives the words that put a table there."""
    space = here.root / "space"
    space.mkdir()
    os.chown(space, *here.cluster.owner)
    here.cluster.sql(f"CREATE TABLESPACE fast LOCATION '{space}'")
    here.configure(f'[[volumes]]\nname = "space"\npath = "{space}"\n')
    return "TABLESPACE fast"


def pay(here: Deployment) -> int:
    number = next(NUMBERS)
    here.cluster.sql(f"BEGIN; INSERT INTO paid VALUES ({number}); INSERT INTO booked VALUES ({number}); COMMIT")
    return number


def held(conninfo: str) -> list[int]:
    """Give the payments that a server holds, each in both tables."""
    with psycopg.connect(f"{conninfo} dbname=postgres") as connection:
        paid, booked = (
            [row[0] for row in connection.execute(f"TABLE {name} ORDER BY n")] for name in ("paid", "booked")
        )
    assert paid == booked
    return paid


def stop(here: Deployment) -> None:
    assert here.stop() == 0
    here.cluster.stop()


def kill(here: Deployment, failpoint: str, *arguments: str) -> None:
    """Run a command that is killed at a failpoint, `name` or `name@count`."""
    name, _, count = failpoint.partition("@")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRIGPOINT_FAILPOINT", f"{name}:kill@{count or 1}")
        done = here.trigpoint(*arguments, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def kill_undo(here: Deployment, renames: int) -> None:
    """Take the newest restore in place back, and be killed after so many renames."""
    kill(here, f"after-rename@{renames}", "restore", "--undo", "last", "--yes")


def resume(here: Deployment) -> None:
    """Finish the newest restore in place: nothing is left of it but its record and the old state."""
    swap = here.ask("restore", "--resume", "last")
    assert swap["finished"]
    require_nothing_left(here, [f"{swap['name']}.swap"])


def undo(here: Deployment) -> None:
    """Take the newest restore in place back: nothing is left of it but the restored state, if it was in place."""
    here.trigpoint("restore", "--undo", "last", "--yes")
    require_nothing_left(here, [f"{path.name.rpartition('-')[2]}.undone" for path in restored(here)])
    assert here.ask("clones") == []
    assert not list(here.root.glob("*.before-*"))


def restored(here: Deployment) -> list[Path]:
    """Give what was taken back of the cluster's own volume."""
    return sorted(here.root.glob(f"{here.cluster.data.name}.restored-*"))


def require_refused(here: Deployment) -> None:
    """Nothing is protected while some volumes may be restored and others not."""
    for command in ("check", "run"):
        done = here.trigpoint(command, check=False)
        assert done.returncode == 3
        assert "was cut off" in done.stdout + done.stderr
        assert "--undo" in done.stdout + done.stderr


def require_nothing_left(here: Deployment, records: Sequence[str]) -> None:
    """See that there is no clone, no staged log, and no record but these."""
    assert not list((here.root / "snapshots" / "clones").glob("*"))
    assert not list((here.state / "staging").glob("*"))
    kept = [path.name for path in (here.state / "clones").glob("*")]
    assert sorted(kept) == sorted({*records, *(f"{path.name.rpartition('-')[2]}.undone" for path in restored(here))})


def require_in_place(here: Deployment, payments: list[int]) -> None:
    """See that the server that starts in production's place holds just these payments, and stop it."""
    here.cluster.start()
    assert held(here.cluster.conninfo) == payments
    here.cluster.stop()


def go_on(here: Deployment, payments: list[int]) -> list[int]:
    """Start all in production's place, which holds `payments`, and bring a new point back; gives what it holds then."""
    here.cluster.start()
    assert held(here.cluster.conninfo) == payments
    here.start()
    payments = [*payments, pay(here)]
    point = here.ask("point")["number"]
    later = pay(here)
    report = here.ask("restore", "--to-point", str(point), "--name", "one")
    assert held(report["conninfo"]) == payments
    here.trigpoint("clones", "drop", "--yes", "one")
    stop(here)
    return [*payments, later]


@kills_of("bank", ["btrfs"])
def test_kills_before_the_swap_leave_production_as_it_was_and_clones_to_drop(bank: Bank) -> None:
    places = ("after-intent", "after-clone", "after-stage", "after-replay")
    here = bank.here
    for place in places:
        kill(here, place, *bank.restore)
    left = here.ask("clones")
    assert [clone["state"] for clone in left] == ["unfinished"] * len(places)
    require_in_place(here, bank.now)
    for clone in left:
        here.trigpoint("clones", "drop", "--yes", clone["name"])
    require_nothing_left(here, [])
    assert here.ask("clones") == []


@kills_of(
    ("bank", "place", "renames_of_undo"),
    [
        ("btrfs", "after-swap-intent", 1),
        ("btrfs", "after-rename@1", 2),
        ("btrfs", "after-rename@2", 1),
        ("directory", "after-rename@3", 4),
    ],
)
def test_a_swap_that_was_killed_is_finished_and_a_killed_undo_of_it_is_repeated(
    bank: Bank, place: str, renames_of_undo: int
) -> None:
    here = bank.here
    kill(here, place, *bank.restore)
    resume(here)
    require_in_place(here, bank.before)
    kill_undo(here, renames_of_undo)
    undo(here)
    require_in_place(here, bank.now)


@kills_of(
    ("bank", "place", "renames_of_undo"),
    [
        ("btrfs", "after-swap-intent", None),
        ("btrfs", "after-rename@1", 1),
        ("btrfs", "after-rename@2", 1),
        ("directory", "after-rename@3", 2),
    ],
)
def test_a_swap_that_was_killed_is_taken_back_even_where_the_undo_is_killed_too(
    bank: Bank, place: str, renames_of_undo: int | None
) -> None:
    here = bank.here
    kill(here, place, *bank.restore)
    if renames_of_undo is not None:
        kill_undo(here, renames_of_undo)
    undo(here)
    require_in_place(here, bank.now)


@kills_of(("bank", "place", "renames_of_undo"), [("btrfs", "after-rename@1", 1), ("directory", "after-rename@3", 3)])
def test_the_service_goes_on_after_a_killed_restore_was_finished_and_after_it_was_taken_back(
    bank: Bank, place: str, renames_of_undo: int
) -> None:
    here = bank.here
    kill(here, place, *bank.restore)
    require_refused(here)
    resume(here)
    then = go_on(here, bank.before)
    kill_undo(here, renames_of_undo)
    resume(here)
    require_in_place(here, then)
    undo(here)
    bank.now = go_on(here, bank.now)


@kills_of("bank", ["btrfs"])
def test_a_removal_that_was_killed_leaves_nothing_that_counts_as_a_clone(bank: Bank) -> None:
    here = bank.here
    here.trigpoint("restore", *bank.restore[1:3], "--name", "early")
    kill(here, "after-drop-begun", "clones", "drop", "--yes", "early")
    listed = here.trigpoint("clones")
    assert "trigpoint clones drop early goes on with it" in listed.stdout + listed.stderr
    assert [clone["state"] for clone in here.ask("clones")] == ["being dropped"]
    for refused in (("clones", "start", "early"), ("restore", "--in-place", "--from-clone", "early", "--yes")):
        done = here.trigpoint(*refused, check=False)
        assert done.returncode == RestoreError.exit_code
        assert "clone early is being dropped" in done.stderr
    here.trigpoint("clones", "drop", "--yes", "early")
    require_nothing_left(here, [])


@kills_of("bank", ["directory"])
def test_a_clone_that_was_made_ready_in_part_is_not_started_on_productions_files_and_can_be_put_in_place(
    bank: Bank,
) -> None:
    here = bank.here
    here.trigpoint("restore", *bank.restore[1:3], "--name", "early")
    put = ("restore", "--in-place", "--from-clone", "early", "--yes")
    kill(here, "after-link", *put)
    (link,) = (here.root / "snapshots" / "clones" / "early" / "data" / "pg_tblspc").iterdir()
    assert link.readlink() == here.root / "space"
    refused = here.trigpoint("clones", "start", "early", check=False)
    assert refused.returncode == RestoreError.exit_code
    assert "clone early cannot be started: it was made ready to take production's place" in refused.stderr
    require_in_place(here, bank.now)
    here.trigpoint(*put)
    require_in_place(here, bank.before)
    undo(here)
    require_in_place(here, bank.now)


@kills_of("bank", ["btrfs"])
def test_a_swap_whose_clone_was_dropped_is_not_finished_but_taken_back(bank: Bank) -> None:
    here = bank.here
    kill(here, "after-rename@1", *bank.restore)
    (left,) = here.ask("clones")
    here.trigpoint("clones", "drop", "--yes", left["name"])
    refused = here.trigpoint("restore", "--resume", "last", check=False)
    assert refused.returncode == RestoreError.exit_code
    undo(here)
    require_in_place(here, bank.now)
