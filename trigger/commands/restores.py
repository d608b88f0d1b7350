"""Bring a state back beside the running cluster, look after the clones, prove that a point can be restored."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from trigger import show
from trigger.commands.arguments import Config, Json, lsn, options, time, transaction
from trigger.connect import Parts
from trigger.errors import CatalogError, ConfigError, VerifyError
from trigger.model import Verification
from trigger.options import Options
from trigger.planner import Plan
from trigger.restore import CloneStatus, Report, drop, prepare, restore
from trigger.restore import clones as all_clones
from trigger.service import opened
from trigger.target import Named, resolve
from trigger.verify import verify

T = TypeVar("T")


def at(chosen: Options, act: Callable[[Parts], Awaitable[T]]) -> T:
    """Give what `act` gives with the parts of a configuration; Ctrl-C cancels it and waits for its tidying up."""

    async def connected() -> T:
        async with opened(chosen) as parts:
            return await act(parts)

    return asyncio.run(connected())


def restore_state(
    to_lsn: Annotated[
        str | None, typer.Option("--to-lsn", help="The commit whose record begins or ends there.", show_default=False)
    ] = None,
    to_xid: Annotated[str | None, typer.Option("--to-xid", help="Up to this transaction.", show_default=False)] = None,
    to_time: Annotated[
        str | None, typer.Option("--to-time", help="All commits up to then, ISO-8601 with a zone.", show_default=False)
    ] = None,
    to_point: Annotated[
        str | None, typer.Option("--to-point", help="What this point was taken for.", show_default=False)
    ] = None,
    to_marker: Annotated[
        str | None, typer.Option("--to-marker", help="Up to the transaction with this marker.", show_default=False)
    ] = None,
    before_xid: Annotated[
        str | None, typer.Option("--before-xid", help="All before this transaction, not it.", show_default=False)
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", help="Only commits of this one are meant.", show_default=False)
    ] = None,
    timeline: Annotated[
        int | None, typer.Option("--timeline", min=1, help="Another than the present one.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What the clone is called.", show_default=False)] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print how it would be done, or why not.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Bring back exactly the state after one commit (or before it), in a clone beside the running cluster.

    The state holds the commit and every one before it in the log, and none behind it; that is checked before the
    clone is reported. Its server listens on a Unix socket only, has no archive, no subscriptions and no slots, and
    runs on a timeline of its own. Nothing of the running cluster is touched.
    """
    named = Named(
        lsn=lsn(to_lsn) if to_lsn is not None else None,
        xid=transaction(to_xid) if to_xid is not None else None,
        time=time(to_time) if to_time is not None else None,
        point=_point(to_point) if to_point is not None else None,
        marker=to_marker,
        before_xid=transaction(before_xid) if before_xid is not None else None,
        stream=database,
        timeline=timeline,
    )
    require_one_target(named)
    chosen = options(config)
    if dry_run:
        show_plan(at(chosen, lambda parts: _plan(named, parts)), as_json=as_json)
        return
    show_report(at(chosen, lambda parts: _restore(named, name, parts)), as_json=as_json)


TARGETS = "--to-lsn, --to-xid, --to-time, --to-point, --to-marker, --before-xid"


def require_one_target(named: Named) -> None:
    """Refuse a command line that names no target or several; raises `ConfigError`."""
    given = [named.lsn, named.xid, named.time, named.point, named.marker, named.before_xid]
    count = sum(value is not None for value in given)
    if count != 1:
        words = "no target is named" if count == 0 else f"{count} targets are named"
        raise ConfigError(words, hint=f"give exactly one of {TARGETS}")


def _point(text: str) -> str | int:
    return int(text) if text.isdigit() else text


async def _plan(named: Named, parts: Parts) -> Plan:
    return await prepare(await resolve(named, parts.catalog, parts.journal), parts.site)


async def _restore(named: Named, name: str, parts: Parts) -> Report:
    target = await resolve(named, parts.catalog, parts.journal)
    with show.steps() as progress:
        return await restore(target, parts.site, progress=progress, name=name)


def show_plan(plan: Plan, *, as_json: bool) -> None:
    """Print how a target would be reached."""
    if as_json:
        show.print_json(plan)
        return
    for line in plan.describe():
        show.say(line)


def show_report(report: Report, *, as_json: bool) -> None:
    """Print what was restored and how to reach it."""
    if as_json:
        show.print_json(report)
        return
    show.facts(
        [
            ("clone", report.name),
            ("holds", report.target.description),
            ("base", f"point {report.base}"),
            ("replayed", f"{show.size(report.replay_bytes)} to {report.replayed}, now {report.history}"),
            ("last commit", show.moment(report.last_commit_at, digits=6)),
            ("took", ", ".join(f"{step} {show.duration(seconds)}" for step, seconds in report.seconds.items())),
            *((f"  {what}", f"{'held' if held else 'DID NOT HOLD'}: {seen}") for what, held, seen in report.checks),
            *(("note", note) for note in report.notes),
            ("data", report.data_directory),
            ("connect", f'psql "{report.conninfo}"'),
            ("remove", f"trigpoint clones drop {report.name}"),
        ]
    )


clones = typer.Typer(invoke_without_command=True, help="List the clones that restores made, or drop one.")


@clones.callback()
def list_by_default(context: typer.Context, config: Config = None, as_json: Json = False) -> None:
    """List the clones that restores made, or drop one."""
    if context.invoked_subcommand is None:
        list_clones(config, as_json)


@clones.command("list")
def list_clones(config: Config = None, as_json: Json = False) -> None:
    """List the clones: what each holds, whether its server runs, how to reach it."""
    found = at(options(config), lambda parts: all_clones(parts.site))
    if as_json:
        show.print_json(found)
        return
    show.table(
        ("name", "state", ">age", "holds", ">base", "connect"), [_clone(one) for one in found], empty="no clones"
    )


def _clone(one: CloneStatus) -> tuple[object, ...]:
    record = one.record
    return (
        one.name,
        one.state,
        show.duration(max(0.0, one.age.total_seconds())),
        record.target if record else None,
        record.base if record else None,
        record.conninfo if record else None,
    )


@clones.command("drop")
def drop_clone(
    names: Annotated[list[str], typer.Argument(help="What they are called.")], config: Config = None
) -> None:
    """Stop the servers of clones and remove all there is of them. Production is not touched."""

    async def drop_all(parts: Parts) -> None:
        for name in names:
            await drop(name, parts.site)
            show.say(f"dropped {name}")

    at(options(config), drop_all)


def verify_point(
    ref: Annotated[
        str | None, typer.Argument(help="A number, an id, or a name (trg-…); else the newest.", show_default=False)
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Restore a point into a sandbox, look at it closely, and store the result with the point.

    That its commit is there and the next one is not; that structures and pages are sound; that the assertions of the
    configuration hold. The sandbox is removed. Exit code 10 where something did not hold.
    """
    chosen = options(config)
    result = at(chosen, lambda parts: _verify(ref, chosen, parts))
    if as_json:
        show.print_json(result)
    else:
        show.table(
            ("check", "result", "seen"),
            [(what, "passed" if held else "failed", seen) for what, held, seen in result.checks],
        )
        show.say(f"\n{result.target}: {'verified' if result.passed else 'NOT VERIFIED'}")
    if not result.passed:
        raise typer.Exit(VerifyError.exit_code)


async def _verify(ref: str | None, chosen: Options, parts: Parts) -> Verification:
    point = await parts.catalog.latest() if ref is None else await parts.catalog.point(_point(ref))
    if point is None:
        raise CatalogError("there is no sealed recovery point yet", hint="`trigpoint run` takes the first at its start")
    with show.steps() as progress:
        return await verify(
            point,
            parts.site,
            assertions=chosen.verify.assertions,
            progress=progress,
            deadline_seconds=chosen.verify.deadline_seconds,
        )
