"""Prove that a point restores: bring it back into a sandbox, look at it closely, throw the sandbox away.

*Passed* is claimed only where the restore came up, every check of the recovery driver ended and held, there was at
least one, and every assertion of the user was run and held. What could not be run counts as not held: the record says
"not run" and why, and the claim is not made (P3). The sandbox goes in any case; whatever happens to it has no bearing
on what was seen in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from trigger.config.options import VerifyAssertion
from trigger.errors import RestoreError, TooEarlyError, TrigpointError
from trigger.model import RecoveryPoint, Verification
from trigger.ports import Progress
from trigger.replay import Target
from trigger.restore.clone_records import new_name
from trigger.restore.clones import Site, remove, to_its_end
from trigger.restore.planner import Plan, own
from trigger.restore.restore import Raised, inspected, prepare, raised, require_room
from trigger.restore.target import Named, resolve

log = logging.getLogger(__name__)

Check = tuple[str, bool, str]
"""(what was checked, whether it held, what was seen)."""


async def verify(
    wanted: RecoveryPoint | Target,
    site: Site,
    *,
    assertions: Sequence[VerifyAssertion] = (),
    progress: Progress,
    deadline_seconds: float = 3600.0,
) -> Verification:
    """Give what a restore of `wanted` into a sandbox showed; for a point it is stored in the catalog too.

    For a point that was taken for a commit the restore goes to that commit: it must be there, the next must not.
    Where the planner goes there from an older base, the point's own snapshot is brought up and looked at by itself
    too, since it is what later commits are restored from. So is nothing else of the first point, where that stands for
    no commit: no base leads to the moment at which it was due.

    Args:
        wanted: a sealed point, or any target.
        site: where, and with what.
        assertions: queries on the sandbox, each with the only answer that holds.
        progress: told about every step that may last.
        deadline_seconds: for everything but the removal of the sandbox.

    Raises:
        CatalogError: the result cannot be stored. A failed restore is a result, and no error. A cancellation removes
            the sandbox and stores nothing.
        RestoreError: the log for it is not kept yet; nothing was looked at, and nothing is stored.
    """
    point = wanted if isinstance(wanted, RecoveryPoint) else None
    words = f"point {point.number}" if point else ""
    checks: list[Check] = []
    try:
        async with asyncio.timeout(deadline_seconds):
            target = await _target(wanted, site)
            words = target.description
            found = await _way_to(target, point, site)
            if found is not None:
                async for check in _looked_at(found, site, assertions, progress):
                    checks.append(check)  # noqa: PERF401 - a deadline keeps what was seen before it
            elif point is not None:
                words = f"{own(point).description} alone, since no earlier one leads to {words}"
            if point is not None and (found is None or found.base.id != point.id):
                async for check in _looked_at_by_itself(point, site, progress):
                    checks.append(check)  # noqa: PERF401 - likewise
    except TimeoutError:
        checks.append(("all checks", False, f"not run to the end within {deadline_seconds:g} s"))
    except (TrigpointError, OSError) as error:
        if isinstance(error, RestoreError) and error.retryable and not checks:
            raise  # nothing was looked at, and waiting helps: that says nothing of the point
        checks.append(("restore and look", False, f"not run to the end: {error}"))
    passed = bool(checks) and all(held for _, held, _ in checks)
    verification = Verification(site.clock.now(), passed, words, tuple(checks))
    if point is not None:
        await site.catalog.verified(point, verification)
    return verification


async def _target(wanted: RecoveryPoint | Target, site: Site) -> Target:
    if isinstance(wanted, Target):
        return wanted
    return await resolve(Named(point=wanted.id), site.catalog, site.journal)


async def _way_to(target: Target, point: RecoveryPoint | None, site: Site) -> Plan | None:
    """Give the plan for a target; None where no base is early enough for a point, and no commit depends on that."""
    try:
        return await prepare(target, site)
    except TooEarlyError:
        if point is None or point.commit is not None:
            raise
    return None


async def _looked_at(
    found: Plan, site: Site, assertions: Sequence[VerifyAssertion], progress: Progress
) -> AsyncIterator[Check]:
    """Give one check after the other, from a sandbox that is gone when the last was given or one failed to run."""
    await require_room(found, site)
    name = new_name("verify")
    async with raised(found, site, name, progress, throwaway=True) as up:
        how = f"from point {found.base.number}, {found.replay_bytes} bytes replayed in {up.seconds['replay']:.2f} s"
        yield "restore", True, how
        progress("check structures and pages", 0, 0)
        seen = 0
        async for check in inspected(up, site, deep=True):
            seen += 1
            yield check
        if not seen:
            yield "inspection", False, "not run: the recovery driver looked at nothing"
        for assertion in assertions:
            yield await _asserted(assertion, up, site)
        await to_its_end(_throw_away(name, site))


async def _looked_at_by_itself(point: RecoveryPoint, site: Site, progress: Progress) -> AsyncIterator[Check]:
    """Give whether the point's own snapshot becomes a consistent server, and what is seen in it; likewise."""
    found = await prepare(own(point), site)
    await require_room(found, site)
    name = new_name("verify")
    async with raised(found, site, name, progress, throwaway=True) as up:
        floor = point.floor
        seen = f"consistent up to {floor.history.place(up.running.replayed)}, at or behind its floor {floor.place}"
        progress("check structures and pages of its own snapshot", 0, 0)
        yield "its own snapshot comes up", up.running.replayed >= floor.at, seen
        async for what, held, found_there in inspected(up, site, deep=True):
            yield f"its own snapshot: {what}", held, found_there
        await to_its_end(_throw_away(name, site))


async def _asserted(assertion: VerifyAssertion, up: Raised, site: Site) -> Check:
    what = f"{assertion.database}: {assertion.sql}"
    try:
        # The driver's own look may have restarted the server; what it says of itself is asked anew.
        running = await site.recovery.running(up.clone) or up.running
        seen = await site.recovery.query(running, assertion.database, assertion.sql)
    except TrigpointError as error:
        return what, False, f"not run: {error.message}"
    if seen == assertion.expect:
        return what, True, seen
    return what, False, f"{seen!r}, and not {assertion.expect!r}"


async def _throw_away(name: str, site: Site) -> None:
    try:
        await remove(name, site)
    except (TrigpointError, OSError) as error:
        log.warning("the sandbox %s was not removed and is left to trigpoint clones: %s", name, error)
