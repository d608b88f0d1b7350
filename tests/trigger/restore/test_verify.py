"""A point is verified only after a restore of it was looked at, and every look held (P3)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from connectors.memory import MemoryRecovery
from tests.fixtures.bank import Bank, quiet, run
from trigger.config.options import VerifyAssertion
from trigger.errors import RestoreError, StorageError
from trigger.model import RecoveryPoint, Verification
from trigger.ports import Clone
from trigger.replay import Running
from trigger.restore.clones import CloneState, clones
from trigger.restore.target import Named
from trigger.restore.verify import verify

Check = tuple[str, bool, str]


async def a_point(it: Bank) -> RecoveryPoint:
    """Give the second of three points; behind its commit another follows at once."""
    it.commit()
    await it.point()
    it.commit()
    point = await it.point()
    it.commit()
    await it.point()
    return point


class Looking(MemoryRecovery):
    """A recovery whose inspection is as the test says."""

    def __init__(self, it: Bank, look: Callable[[], AsyncIterator[Check]]) -> None:
        super().__init__(it.world)
        self._look = look

    def inspect(self, *arguments: Any, **named: Any) -> AsyncIterator[Check]:
        return self._look()


async def verified(it: Bank, point: RecoveryPoint, recovery: Any = None, **more: Any) -> Verification:
    """Verify, and see that nothing of the sandbox is left and that the catalog has the same result."""
    site = replace(it.site, recovery=recovery) if recovery else it.site
    result = await verify(point, site, progress=quiet, **more)
    assert not await clones(it.site)
    assert not it.world.restored
    assert (await it.catalog.point(point.number)).verification == result
    return result


def test_a_point_is_verified_when_its_commit_is_there_and_every_look_held(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        point = await a_point(it)
        assert point.commit
        holds = VerifyAssertion(database="bank", sql="select count(*) from account", expect="2")
        result = await verified(it, point, assertions=[holds])
        assert result.passed
        assert f"commit {point.commit.name} of bank" in result.target
        assert [what for what, _, _ in result.checks][-1] == "bank: select count(*) from account"
        assert "structures" in [what for what, _, _ in result.checks]

    run(tmp_path, story)


def test_a_snapshot_that_the_restore_did_not_need_is_brought_up_by_itself(tmp_path: Path) -> None:
    class Particular(MemoryRecovery):
        """A recovery that cannot bring up the snapshot of one point."""

        async def start(self, clone: Clone, *arguments: Any, **named: Any) -> Running:
            if clone.point == refused:
                raise RestoreError("invalid page in block 7")
            return await super().start(clone, *arguments, **named)

    refused = ""

    async def story(it: Bank) -> None:
        nonlocal refused
        it.commit()
        await it.point()
        it.commit()
        behind = it.commit(data_bytes=0)
        it.pending.remove(behind)  # it lies in the snapshot already, so that the point is restored from the one before
        point = await it.point()
        result = await verified(it, point)
        assert result.passed
        assert [check[:2] for check in result.checks[-3:]] == [
            ("its own snapshot comes up", True),
            ("its own snapshot: no commit behind it", True),
            ("its own snapshot: structures", True),
        ]
        refused = point.id
        result = await verified(it, point, Particular(it.world))
        assert not result.passed
        assert result.checks[-1] == ("restore and look", False, "not run to the end: invalid page in block 7")

    run(tmp_path, story)


def test_an_assertion_that_gives_another_answer_is_not_passed(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        point = await a_point(it)
        wrong = VerifyAssertion(database="bank", sql="select count(*)", expect="3")
        result = await verified(it, point, assertions=[wrong])
        assert not result.passed
        assert result.checks[-1] == ("bank: select count(*)", False, "'2', and not '3'")

    run(tmp_path, story)


def test_an_assertion_that_cannot_be_run_is_not_passed(tmp_path: Path) -> None:
    class Mute(MemoryRecovery):
        async def query(self, *arguments: Any, **named: Any) -> str:
            raise RestoreError("no such database")

    async def story(it: Bank) -> None:
        point = await a_point(it)
        holds = VerifyAssertion(database="bank", sql="select 1", expect="1")
        result = await verified(it, point, Mute(it.world), assertions=[holds, holds])
        assert not result.passed
        assert result.checks[-2:] == (("bank: select 1", False, "not run: no such database"),) * 2

    run(tmp_path, story)


async def one_that_fails() -> AsyncIterator[Check]:
    yield "the commit is there", True, "yes"
    yield "pages", False, "one is torn"
    yield "structures", True, "clean"


async def one_that_ends_early() -> AsyncIterator[Check]:
    yield "the commit is there", True, "yes"
    raise RestoreError("pg_amcheck is not installed")


async def one_that_hangs() -> AsyncIterator[Check]:
    yield "the commit is there", True, "yes"
    await asyncio.sleep(60)


async def none() -> AsyncIterator[Check]:
    nothing: tuple[Check, ...] = ()
    for check in nothing:
        yield check


@pytest.mark.parametrize(
    ("look", "seen"),
    [
        (one_that_fails, ("pages", False, "one is torn")),
        (one_that_ends_early, ("restore and look", False, "not run to the end: pg_amcheck is not installed")),
        (one_that_hangs, ("all checks", False, "not run to the end within 0.5 s")),
        (none, ("inspection", False, "not run: the recovery driver looked at nothing")),
    ],
)
def test_a_point_is_not_verified_unless_every_check_was_run_and_held(
    tmp_path: Path, look: Callable[[], AsyncIterator[Check]], seen: Check
) -> None:
    async def story(it: Bank) -> None:
        point = await a_point(it)
        result = await verified(it, point, Looking(it, look), deadline_seconds=0.5)
        assert not result.passed
        assert seen in result.checks
        assert result.checks[0][:2] == ("restore", True)

    run(tmp_path, story)


def test_a_point_that_cannot_be_restored_is_recorded_as_not_verified(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        point = await a_point(it)
        it.world.journal[1] = [(low, low) for low, _ in it.world.journal[1]]
        it.world.kept.clear()
        result = await verified(it, point)
        assert not result.passed
        assert not any(held for _, held, _ in result.checks)

    run(tmp_path, story)


def test_a_later_result_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        point = await a_point(it)
        assert (await verified(it, point)).passed
        assert not (await verified(it, point, Looking(it, none))).passed

    run(tmp_path, story)


def test_any_target_can_be_verified_and_then_no_point_claims_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await a_point(it)
        commit = it.commit()
        it.commit(data_bytes=0)
        await it.point()
        result = await verify(await it.resolve(Named(name=commit.name)), it.site, progress=quiet)
        assert result.passed
        assert all(point.verification is None for point in await it.catalog.points())

    run(tmp_path, story)


def test_a_cancelled_verification_removes_its_sandbox_and_claims_nothing(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        point = await a_point(it)
        looking = asyncio.Event()

        async def announced() -> AsyncIterator[Check]:
            looking.set()
            await asyncio.sleep(60)
            yield "never", True, "seen"

        site = replace(it.site, recovery=Looking(it, announced))
        task = asyncio.create_task(verify(point, site, progress=quiet))
        await looking.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await clones(it.site)
        assert (await it.catalog.point(point.number)).verification is None

    run(tmp_path, story)


def test_a_sandbox_that_cannot_be_removed_changes_nothing_that_was_seen_and_stays_on_the_list(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        point = await a_point(it)

        class Sticky:
            def __getattr__(self, name: str) -> Any:
                return getattr(it.site.storage, name)

            async def drop_clone(self, name: str) -> None:
                raise StorageError(f"{name} is busy")

        storage: Any = Sticky()
        assert (await verify(point, replace(it.site, storage=storage), progress=quiet)).passed
        (left,) = await clones(it.site)
        assert left.state is CloneState.UNFINISHED
        assert left.name.startswith("trg-verify-")

    run(tmp_path, story)
