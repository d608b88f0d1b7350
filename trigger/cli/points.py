"""Look into the catalog: list points, show one, find the point that holds a transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from trigger.cli import show
from trigger.cli.arguments import (
    Config,
    InHistory,
    Json,
    given_text,
    options,
    place,
    point_reference,
    require_alone,
    time,
    transaction,
)
from trigger.cli.connected import require_known
from trigger.errors import CatalogError, ConfigError, NotFoundError
from trigger.model import CommitRecord, Gap, Mark, RecoveryPoint, State
from trigger.shape import size

if TYPE_CHECKING:  # the catalog's library takes a while to load, and help and completion do without
    from trigger.catalog.catalog import Catalog
    from trigger.config.options import Options
    from trigger.restore.locate import Location

T = TypeVar("T")


@asynccontextmanager
async def catalog(chosen: Options) -> AsyncIterator[Catalog]:
    """Hold the catalog of a configuration; raises `CatalogError` where there is none yet, or it was lost."""
    from trigger.catalog.catalog import Catalog
    from trigger.service.connect import opened as connected
    from trigger.service.control import if_free

    if not chosen.catalog_path.exists():
        lost = any(folder.is_dir() and any(folder.iterdir()) for folder in chosen.storage_folders)
        hint = "`trigpoint catalog rebuild` makes it anew from the snapshots" if lost else "`trigpoint run` makes it"
        raise CatalogError(f"there is no catalog at {chosen.catalog_path}", hint=hint)
    opened = await Catalog.open(chosen.catalog_path, upgrade=if_free(chosen.state_folder))
    try:
        if not await opened.points(states={State.OPEN, State.SEALED}, limit=1):
            async with connected(chosen, past=True):  # the storage may have some
                pass
        yield opened
    finally:
        await opened.close()


def ask(chosen: Options, question: Callable[[Catalog], Awaitable[T]]) -> T:
    """Give what `question` gets out of the catalog."""

    async def with_catalog() -> T:
        async with catalog(chosen) as opened:
            return await question(opened)

    return asyncio.run(with_catalog())


def list_points(
    context: typer.Context,
    states: Annotated[
        list[State] | None, typer.Option("--state", help="Only these; may be given several times.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-l", min=1, help="How many, the newest first.")] = 30,
    before: Annotated[int | None, typer.Option("--before", min=1, help="Only points below this number.")] = None,
    gaps: Annotated[bool, typer.Option("--gaps", help="List the gaps instead.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List recovery points, the newest first; expired ones only if asked for. Open gaps are always mentioned."""
    chosen = options(config)
    if gaps:
        require_alone(context, "--gaps", "--json")
        found_gaps = ask(chosen, lambda opened: opened.gaps())
        if as_json:
            show.print_json(found_gaps)
        else:
            _show_gaps(found_gaps)
        return
    wanted = set(states or set(State) - {State.EXPIRED})

    async def look(opened: Catalog) -> tuple[list[RecoveryPoint], list[Gap]]:
        page = await opened.points(states=wanted, limit=limit, before_number=before)
        return page, await opened.gaps(open_only=True)

    found, open_gaps = ask(chosen, look)
    if as_json:
        show.print_json(found)
        return
    show.table(
        (
            ">number",
            "state",
            "cause",
            "opened",
            "rule",
            ">commits",
            "ceiling",
            "history",
            "transaction",
            "verified",
            "note",
        ),
        [_row(point) for point in found],
        empty="there are no recovery points",
    )
    for gap in open_gaps:
        show.note(f"open gap in {gap.stream}: {gap.after} to {gap.until}: {gap.reason}")


def _row(point: RecoveryPoint) -> tuple[object, ...]:
    checked = point.verification
    return (
        point.number,
        point.state,
        point.cause,
        show.moment(point.opened_at),
        point.rule,
        point.commits,
        point.ceiling.place if point.ceiling else None,
        f"{point.floor.history.branch}" + (f"+{life}" if (life := point.floor.history.incarnation) else ""),
        point.commit.name if point.commit else None,
        None if checked is None else f"{'passed' if checked.passed else 'FAILED'} {show.moment(checked.at)}",
        point.failure or point.note,
    )


def _show_gaps(found: list[Gap]) -> None:
    show.table(
        ("stream", "after", "until", "found", "closed by", "reason"),
        [
            (gap.stream, gap.after, gap.until, show.moment(gap.found_at), gap.closed_by or "OPEN", gap.reason)
            for gap in found
        ],
        empty="there are no gaps",
    )


def show_point(
    ref: Annotated[str, typer.Argument(help="A number, an id, or the name of its snapshots (trg-…).")],
    limit: Annotated[
        int, typer.Option("--limit", "-l", min=0, help="How many of its commits; --json prints all.")
    ] = 20,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show one recovery point with its proofs, its snapshots and the commits it protects."""

    async def look(opened: Catalog) -> tuple[RecoveryPoint, list[CommitRecord]]:
        point = await opened.point(point_reference(ref))
        return point, await opened.commits_of(point.number)

    point, commits = ask(options(config), look)
    if as_json:
        show.print_json({"point": point, "commits": commits})
        return
    show.facts(_facts(point))
    for title, rows in _proofs(point):
        show.say()
        show.say(title)
        show.table(*rows)
    show.say()
    show.table(
        (">transaction", "database", "time", "start", "end", "outcome", "markers"),
        [_commit(commit) for commit in commits[:limit]],
        empty="it was not taken for a commit",
    )
    show.more(len(commits) - limit, "commits")


def _facts(point: RecoveryPoint) -> list[tuple[str, object]]:
    checked = point.verification
    changed = [f"{table} +{c.inserted} ~{c.updated} -{c.deleted}" for table, c in point.tables.items()]
    return [
        ("point", f"{point.number}, {point.state}"),
        ("id", point.id),
        ("cause", f"{point.cause}, rule {point.rule}" if point.rule else point.cause),
        *(line for mark in point.marks for line in _log(mark)),
        ("opened", show.moment(point.opened_at, digits=3)),
        ("sealed", show.moment(point.sealed_at, digits=3)),
        ("commits", point.commits),
        ("changed", ", ".join(changed)),
        ("note", point.note),
        ("failure", point.failure),
        (
            "verified",
            checked and f"{'passed' if checked.passed else 'FAILED'} {show.moment(checked.at)}, {checked.target}",
        ),
        *((f"  {what}", f"{'held' if held else 'DID NOT HOLD'}: {seen}") for what, held, seen in _checks(point)),
    ]


def _log(mark: Mark) -> list[tuple[str, object]]:
    """Give where a point stands in one log."""
    history, bracket = mark.floor.history, mark.bracket
    again = f", incarnation {history.incarnation}" if history.incarnation else ""
    return [
        ("history", f"system {history.system}, timeline {history.branch}{again}"),
        ("holds", f"everything up to {mark.floor.place}"),
        ("holds nothing behind", mark.ceiling.place if mark.ceiling else None),
        ("replay begins at", mark.redo.place if mark.redo else None),
        ("backup bracket", f"{bracket.start.place} to {bracket.stop.place}" if bracket else None),
    ]


def _checks(point: RecoveryPoint) -> tuple[tuple[str, bool, str], ...]:
    return point.verification.checks if point.verification else ()


def _proofs(point: RecoveryPoint) -> list[tuple[str, tuple[Any, Any]]]:
    flushes = [
        (f.volume, f.agent, f.device, show.moment(f.began_at, digits=3), _took(f.began_at, f.ended_at))
        for f in point.flushes
    ]
    snapshots = [
        (s.volume, s.driver, s.location, _took(s.began_at, s.ended_at), size(s.bytes_copied)) for s in point.snapshots
    ]
    tables = (
        ("flushed", (("volume", "agent", "device", "began", ">took"), flushes)),
        ("snapshots", (("volume", "driver", "location", ">took", ">copied"), snapshots)),
    )
    return [(title, rows) for title, rows in tables if rows[1]]


def _took(began: Any, ended: Any) -> str | None:
    return show.duration((ended - began).total_seconds())


def _commit(commit: CommitRecord) -> tuple[object, ...]:
    return (
        commit.name,
        commit.stream,
        show.moment(_time(commit), digits=6),
        commit.start,
        commit.end,
        commit.outcome,
        ", ".join(commit.markers),
    )


def _time(commit: CommitRecord) -> Any:
    from trigger.model import from_microseconds

    return from_microseconds(commit.time_us)


def find(
    xid: Annotated[str | None, typer.Option("--xid", help="A transaction id.", show_default=False)] = None,
    at: Annotated[str | None, typer.Option("--lsn", help="A place in the log.", show_default=False)] = None,
    when: Annotated[
        str | None, typer.Option("--time", help="ISO-8601 with a zone, or now.", show_default=False)
    ] = None,
    marker: Annotated[
        str | None, typer.Option("--marker", help="The text of a marker.", show_default=False, callback=given_text)
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", help="Only in this one.", show_default=False, callback=given_text)
    ] = None,
    history: InHistory = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Say which recovery point holds a transaction: a point, an interval between two, or a gap.

    A transaction is looked for in every history, a place or a time in the present one. With --history only in that one
    and its past; its log is read to the end then, however long that takes.

    Exit code 11 where that is not known, with the reason.
    """
    from trigger.restore.locate import Where

    wanted = {
        "name": transaction(xid) if xid is not None else None,
        "place": at,
        "time": time(when) if when is not None else None,
        "marker": marker,
    }
    if sum(value is not None for value in wanted.values()) != 1:
        raise ConfigError("say what to look for", hint="give exactly one of --xid, --lsn, --time, --marker")
    chosen = options(config)
    if at is not None:
        place(at, chosen)
    found = asyncio.run(_locate(chosen, database, history, wanted))
    if as_json:
        show.print_json(found)
    else:
        _show_found(found)
    if all(one.where is Where.UNKNOWN for one in found):
        raise typer.Exit(NotFoundError.exit_code)


async def _locate(chosen: Options, database: str | None, history: str | None, wanted: dict[str, Any]) -> list[Location]:
    from trigger.restore.locate import locate
    from trigger.restore.obstacles import left_out
    from trigger.service.connect import opened

    async with opened(chosen, past=True) as parts:
        await require_known(database, parts)
        whole = partial(left_out, recovery=parts.recovery, volumes=parts.volumes)
        where: dict[str, Any] = {"stream": database, "history": history, "left_out": whole, **wanted}
        return await locate(parts.catalog, parts.journal, storage=parts.storage, **where)


def _show_found(found: list[Location]) -> None:
    from trigger.restore.locate import Where

    for number, one in enumerate(found):
        if number:
            show.say()
        record, gap = one.record, one.gap
        point = f"point {one.point}" + ("" if one.snapshot else ", whose snapshots are gone")
        show.facts(
            [
                ("held by", {Where.POINT: point, Where.INTERVAL: "an interval"}.get(one.where, one.where)),
                ("why", one.reason),
                ("commit", record and f"{_called(record)}, {show.moment(_time(record), digits=6)}"),
                ("record", record and f"{record.start} to {record.end}"),
                ("markers", record and ", ".join(record.markers)),
                ("history", one.history),
                ("base for a restore", one.base and f"point {one.base}"),
                ("in the snapshot of", one.snapshot and f"point {one.snapshot}"),
                ("gap", gap and f"{gap.stream}: {gap.after.place} to {gap.until.place}, {gap.reason}"),
                ("restore", record and one.base and f"trigpoint restore --to-xid {record.name} {one.aside}".rstrip()),
            ]
        )


def _called(record: CommitRecord) -> str:
    return f"{record.name} of {record.stream}" if record.stream else str(record.name)
