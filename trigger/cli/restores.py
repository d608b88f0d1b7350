"""Bring a state back beside the running cluster, look after the clones, prove that a point can be restored."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from trigger.cli import show
from trigger.cli.arguments import (
    Config,
    Json,
    Yes,
    address,
    confirm,
    options,
    place,
    point_reference,
    time,
    transaction,
)
from trigger.errors import CatalogError, ConfigError, RestoreError, VerifyError
from trigger.model import Verification

if TYPE_CHECKING:  # what reaches the database takes a while to load, and help and completion do without
    from trigger.config.options import Options
    from trigger.replay import Target
    from trigger.restore.clones import CloneStatus, Site
    from trigger.restore.inplace import Swap
    from trigger.restore.planner import Plan
    from trigger.restore.restore import Report
    from trigger.restore.target import Named
    from trigger.service.connect import Parts

T = TypeVar("T")

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Names = Annotated[list[str], typer.Argument(help="What they are called.")]


def at(chosen: Options, act: Callable[[Parts], Awaitable[T]], *, by_itself: bool = False) -> T:
    """Give what `act` gives with the parts of a configuration.

    Ctrl-C, SIGTERM and a lost terminal cancel it and wait for its tidying up, however often they come; the exit code
    says which it was. What must be done `by_itself` is refused while a service runs.
    """

    from trigger.service.service import alone, opened

    ended_by: list[signal.Signals] = []

    async def connected() -> T:
        with _ended_by_signals(ended_by):
            async with (alone if by_itself else opened)(chosen, past=True) as parts:
                return await act(parts)

    try:
        return asyncio.run(connected())
    except (asyncio.CancelledError, OSError):  # the latter of a terminal that is gone
        if not ended_by:
            raise
    if ended_by[0] is signal.SIGINT:
        raise KeyboardInterrupt
    with contextlib.suppress(OSError):  # the terminal may be gone
        show.error(f"ended by {ended_by[0].name}; what was begun is tidied up", "")
    raise SystemExit(128 + ended_by[0])


@contextlib.contextmanager
def _ended_by_signals(ended_by: list[signal.Signals]) -> Iterator[None]:
    """Let signals that end a program cancel the task at hand until the block ends; which ones, is added to a list."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def end(number: signal.Signals) -> None:
        ended_by.append(number)
        task.cancel()

    heard = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has SIGHUP
    for number in heard:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    finally:
        for number in heard:
            loop.remove_signal_handler(number)
            if ended_by:  # what comes now would only keep the exit code from being said
                signal.signal(number, signal.SIG_IGN)


def _target(flag: str, words: str) -> Any:
    return typer.Option(flag, help=words, show_default=False, rich_help_panel="Which state (exactly one)")


def _place(flag: str, words: str) -> Any:
    return typer.Option(flag, help=words, metavar="NAME", show_default=False, rich_help_panel="In place")


ToLsn = Annotated[str | None, _target("--to-lsn", "The commit whose record begins or ends there.")]
ToXid = Annotated[str | None, _target("--to-xid", "Up to this transaction.")]
ToTime = Annotated[str | None, _target("--to-time", "All commits up to then, ISO-8601 with a zone.")]
ToLatest = Annotated[bool, _target("--to-latest", "The latest state that there is.")]
ToPoint = Annotated[str | None, _target("--to-point", "What this point was taken for: a commit, or a moment.")]
ToMarker = Annotated[str | None, _target("--to-marker", "Up to the transaction with this marker.")]
BeforeXid = Annotated[str | None, _target("--before-xid", "All before this transaction, not it.")]
Database = Annotated[str | None, typer.Option("--database", help="Only commits of this one.", show_default=False)]
Timeline = Annotated[
    int | None, typer.Option("--timeline", min=1, help="Another than the present.", show_default=False)
]
InHistory = Annotated[
    str | None,
    typer.Option("--history", help="Any history that `find` shows, such as 7391/1+1.", show_default=False),
]
Name = Annotated[str, typer.Option("--name", help="What the clone is called.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print how it would be done, or why not.")]
InPlace = Annotated[
    bool, typer.Option("--in-place", help="Put it where production lies, stopped.", rich_help_panel="In place")
]
Undo = Annotated[str | None, _place("--undo", "Take back this restore in place; `last` is the newest.")]
Resume = Annotated[str | None, _place("--resume", "Finish a restore in place that was cut off.")]


def restore_state(
    to_lsn: ToLsn = None,
    to_xid: ToXid = None,
    to_time: ToTime = None,
    to_latest: ToLatest = False,
    to_point: ToPoint = None,
    to_marker: ToMarker = None,
    before_xid: BeforeXid = None,
    database: Database = None,
    timeline: Timeline = None,
    history: InHistory = None,
    name: Name = "",
    in_place: InPlace = False,
    undo: Undo = None,
    resume: Resume = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Bring back exactly the state after one commit (or before it), in a clone beside the running cluster.

    The state holds the commit and every one before it in the log, and none behind it; that is checked before the
    clone is reported. Its server listens on a Unix socket only (for TCP: `clones start --listen`), has no archive, no
    subscriptions and no slots, and runs on a timeline of its own. Nothing of the running cluster is touched; for a
    --to-time behind the last known commit it is made to commit an empty transaction.

    With --in-place the proven clone takes the place of production, by renames: the old state stays beside it as
    `<volume>.before-<time>`, and --undo puts it back. The server must be stopped for that, and the service too; then
    start both.
    """
    if undo is not None or resume is not None:
        swap = at(options(config), lambda parts: _end_swap(undo, resume, parts), by_itself=True)
        show_swap(swap, undone=undo is not None, as_json=as_json)
        return
    from trigger.restore.target import Named

    named = Named(
        place=to_lsn,
        name=transaction(to_xid) if to_xid is not None else None,
        time=_past(time(to_time)) if to_time is not None else None,
        latest=to_latest,
        point=point_reference(to_point) if to_point is not None else None,
        marker=to_marker,
        before=transaction(before_xid) if before_xid is not None else None,
        stream=database,
        history=history if history is not None else str(timeline) if timeline is not None else None,
    )
    require_one_target(named)
    if timeline is not None and history is not None:
        raise ConfigError("--timeline and --history both name a history", hint="give one of them")
    chosen = options(config)
    if to_lsn is not None:
        place(to_lsn, chosen)
    if dry_run:
        show_plan(at(chosen, lambda parts: _plan(named, parts)), as_json=as_json)
        return
    if in_place:
        _put_in_place(named, name, chosen, yes=yes, as_json=as_json)
        return
    show_report(at(chosen, lambda parts: _restore(named, name, parts)), as_json=as_json)


TARGETS = "--to-lsn, --to-xid, --to-time, --to-latest, --to-point, --to-marker, --before-xid"


def _past(moment: datetime) -> datetime:
    """Give a time of which the state is known already; raises `ConfigError` for another."""
    if moment > datetime.now(UTC):
        raise ConfigError(f"{moment.isoformat()} lies in the future", hint="--to-latest gives all that there is by now")
    return moment


def require_one_target(named: Named) -> None:
    """Refuse a command line that names no target or several; raises `ConfigError`."""
    if named.targets != 1:
        words = "no target is named" if named.targets == 0 else f"{named.targets} targets are named"
        raise ConfigError(words, hint=f"give exactly one of {TARGETS}")


async def _plan(named: Named, parts: Parts) -> Plan:
    from trigger.restore.restore import prepare
    from trigger.restore.target import resolve

    target = await resolve(named, parts.catalog, parts.journal, parts.database, only_look=True)
    return await prepare(target, parts.site)


async def _meant(named: Named, parts: Parts) -> Target:
    from trigger.restore.target import resolve

    return await resolve(named, parts.catalog, parts.journal, parts.database)


async def _restore(named: Named, name: str, parts: Parts) -> Report:
    from trigger.restore.restore import restore

    target = await _meant(named, parts)
    with show.steps() as progress:
        return await restore(target, parts.site, progress=progress, name=name)


def _put_in_place(named: Named, name: str, chosen: Options, *, yes: bool, as_json: bool) -> None:
    """Restore in place and say what lies where."""
    if name:
        raise ConfigError("--name is for clones; a restore in place is called by its time", hint="leave it out")
    confirm(f"put the state of then where production of {chosen.name} lies; the old state is kept beside it", yes=yes)
    report, swap = at(chosen, lambda parts: _restore_in_place(named, parts), by_itself=True)
    if as_json:
        show.print_json({"report": report, "swap": swap})
    else:
        show_report(report, as_json=False, clone=False)
        show_swap(swap, undone=False, as_json=False)


async def _restore_in_place(named: Named, parts: Parts) -> tuple[Report, Swap]:
    from trigger.restore.inplace import restore_in_place

    target = await _meant(named, parts)
    with show.steps() as progress:
        return await restore_in_place(target, parts.site, progress=progress)


async def _end_swap(undo: str | None, resume: str | None, parts: Parts) -> Swap:
    """Take a restore in place back, or finish it."""
    from trigger.restore import inplace

    if undo is not None and resume is not None:
        raise ConfigError("--undo and --resume are opposites", hint="give one of them")
    known = await inplace.swaps(parts.site)
    name = undo or resume or ""
    if name == "last" and known:
        name = known[-1].name
    if name not in {swap.name for swap in known}:
        there = ", ".join(f"{swap.name} ({swap.target})" for swap in known) or "none"
        raise RestoreError(f"there is no restore in place called {name}", hint=f"there are: {there}")
    return await (inplace.undo if undo is not None else inplace.resume)(name, parts.site)


def show_swap(swap: Swap, *, undone: bool, as_json: bool) -> None:
    """Print what a restore in place put where."""
    if as_json:
        show.print_json(swap)
        return
    for one in swap.places:
        if undone:
            show.say(f"{one.path} is as it was before; what had taken its place is {one.restored}")
        else:
            show.say(f"{one.path} is {swap.target}; the old state is {one.kept}")
    if not undone:
        show.say(f"start the server and the service again; take it back with: trigpoint restore --undo {swap.name}")


def show_plan(plan: Plan, *, as_json: bool) -> None:
    """Print how a target would be reached."""
    if as_json:
        show.print_json(plan)
        return
    for line in plan.describe():
        show.say(line)


def show_report(report: Report, *, as_json: bool, clone: bool = True) -> None:
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
            ("data", report.data_directory if clone else None),
            ("connect", f'psql "{report.conninfo}"' if clone else None),
            ("remove", f"trigpoint clones drop {report.name}" if clone else None),
        ]
    )


clones = typer.Typer(invoke_without_command=True, help="List the clones that restores made; stop, start, drop one.")


@clones.callback()
def list_by_default(context: typer.Context, config: Config = None, as_json: Json = False) -> None:
    """List the clones that restores made; stop, start, drop one."""
    if context.invoked_subcommand is None:
        list_clones(config, as_json)


@clones.command("list")
def list_clones(config: Config = None, as_json: Json = False) -> None:
    """List the clones: what each holds, whether its server runs, how to reach it."""
    found, swaps = at(options(config), _clones_and_swaps)
    show_clones(found, as_json=as_json)
    for number, swap in () if as_json else enumerate(swaps, 1):
        done = _became(swap, next((later for later in swaps[number:] if later.finished), None))
        show.note(f"{swap.target} {done}; trigpoint restore --undo {swap.name} puts the old state back")


def _became(swap: Swap, later: Swap | None) -> str:
    """Give what became of a restore in place, of which the next one took the place if there is one."""
    if not swap.finished:
        return "was cut off on the way into production's place"
    if later is None:
        return "stands in place of production"
    return f"stood in place of production before {later.name}"


async def _clones_and_swaps(parts: Parts) -> tuple[list[CloneStatus], list[Swap]]:
    from trigger.restore.clones import clones as all_clones
    from trigger.restore.inplace import swaps

    return await all_clones(parts.site), await swaps(parts.site)


def show_clones(found: list[CloneStatus], *, as_json: bool) -> None:
    """Print clones, one a line."""
    if as_json:
        show.print_json(found)
        return
    columns = ("name", "state", ">age", "holds", ">base", "connect")
    show.table(columns, [_clone(one) for one in found], empty="no clones")


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


@clones.command("stop")
def stop_clones(names: Names, config: Config = None, as_json: Json = False) -> None:
    """Stop the servers of clones; what they hold stays, and `start` brings them up again."""
    from trigger.restore.clones import stop

    show_clones(at(options(config), lambda parts: _each(names, parts, stop)), as_json=as_json)


@clones.command("start")
def start_clones(
    names: Names,
    listen: Annotated[
        str | None, typer.Option("--listen", metavar="ADDRESS:PORT", help="Let it be reached over TCP too.")
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Start the servers of stopped clones again, as they were left: after a reboot of the host, say.

    With --listen one clone, which may run already, can be reached over TCP until it is stopped: by the roles that it
    holds, with the passwords that they had then (SCRAM only). What is sent is not encrypted.
    """
    from trigger.restore.clones import start

    where = address(listen) if listen is not None else None
    if where is not None and len(names) > 1:
        raise ConfigError("--listen is for one clone", hint="two servers cannot share an address")

    async def begin(name: str, site: Site) -> CloneStatus:
        return await start(name, site, where)

    show_clones(at(options(config), lambda parts: _each(names, parts, begin)), as_json=as_json)


@clones.command("drop")
def drop_clones(names: Names, yes: Yes = False, config: Config = None, as_json: Json = False) -> None:
    """Stop the servers of clones and remove all there is of them. Production is not touched."""
    from trigger.restore.clones import drop

    confirm(f"stop and remove, with all that was written to them since, the clones {', '.join(names)}", yes=yes)
    at(options(config), lambda parts: _each(names, parts, drop))
    if as_json:
        show.print_json(names)
    else:
        show.say(f"dropped {', '.join(names)}")


async def _each(names: list[str], parts: Parts, act: Callable[[str, Site], Awaitable[T]]) -> list[T]:
    return [await act(name, parts.site) for name in names]


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
        show.say()
        show.say(f"{result.target}: {'verified' if result.passed else 'NOT VERIFIED'}")
    if not result.passed:
        raise typer.Exit(VerifyError.exit_code)


async def _verify(ref: str | None, chosen: Options, parts: Parts) -> Verification:
    from trigger.restore.verify import verify

    point = await parts.catalog.latest() if ref is None else await parts.catalog.point(point_reference(ref))
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
