"""Bring a state back beside the running cluster, look after the clones, prove that a point can be restored."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from trigger.cli import in_place as placing
from trigger.cli import show
from trigger.cli.arguments import (
    Config,
    InHistory,
    Json,
    Yes,
    address,
    confirm,
    given,
    given_text,
    options,
    pass_on,
    place,
    point_reference,
    require_alone,
    require_apart,
    time,
    transaction,
)
from trigger.cli.connected import at, meant
from trigger.errors import CatalogError, ConfigError, VerifyError
from trigger.model import Verification
from trigger.shape import size

if TYPE_CHECKING:  # what reaches the database takes a while to load, and help and completion do without
    from trigger.config.options import Options
    from trigger.restore.clones import CloneStatus, Site
    from trigger.restore.planner import Plan
    from trigger.restore.restore import Report
    from trigger.restore.swap import Swap
    from trigger.restore.target import Named
    from trigger.service.connect import Parts

T = TypeVar("T")

Names = Annotated[list[str], typer.Argument(help="What they are called.")]


def _target(flag: str, words: str, callback: Callable[[str | None], str | None] | None = None) -> Any:
    panel = "Which state (exactly one)"
    return typer.Option(flag, help=words, show_default=False, rich_help_panel=panel, callback=callback)


def _place(flag: str, words: str) -> Any:
    return typer.Option(flag, help=words, metavar="NAME", show_default=False, rich_help_panel="In place")


ToLsn = Annotated[str | None, _target("--to-lsn", "The commit whose record begins or ends there.")]
ToXid = Annotated[str | None, _target("--to-xid", "Up to this transaction.")]
ToTime = Annotated[str | None, _target("--to-time", "All commits up to then, ISO-8601 with a zone, or now.")]
ToLatest = Annotated[bool, _target("--to-latest", "The latest state that there is.")]
ToPoint = Annotated[str | None, _target("--to-point", "What this point was taken for: a commit, or a moment.")]
ToMarker = Annotated[str | None, _target("--to-marker", "Up to the transaction with this marker.", given_text)]
BeforeXid = Annotated[str | None, _target("--before-xid", "All before this transaction, not it.")]
Database = Annotated[
    str | None, typer.Option("--database", help="Only commits of this one.", show_default=False, callback=given_text)
]
Timeline = Annotated[
    int | None, typer.Option("--timeline", min=1, help="Another than the present.", show_default=False)
]
Name = Annotated[str, typer.Option("--name", help="What the clone is called.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print how it would be done, or why not.")]
FromClone = Annotated[str | None, _place("--from-clone", "With --in-place: put this clone there, proven already.")]
InPlace = Annotated[
    bool, typer.Option("--in-place", help="Put it where production lies, stopped.", rich_help_panel="In place")
]
ReplaceCluster = Annotated[
    bool,
    typer.Option(
        "--replace-cluster",
        help="Also where another cluster lies than the state is of, as after an upgrade.",
        rich_help_panel="In place",
    ),
]
Undo = Annotated[str | None, _place("--undo", "Take back the newest restore in place, by its time, or `last`.")]
Resume = Annotated[
    str | None, _place("--resume", "Finish this restore in place, by its time, or `last`: the one that was cut off.")
]


def restore_state(
    context: typer.Context,
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
    from_clone: FromClone = None,
    replace_cluster: ReplaceCluster = False,
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
    `<volume>.before-<time>` (`trigpoint aside` lists these), and --undo puts it back, if nothing else has come into its
    place since. The server must be stopped for that, and the service too; then start both. With --from-clone it is a
    clone that was made before, while production ran, so that it is down for no longer than the renames take. How many
    commits will be lost is said before it asks. A cluster that another one was upgraded to, or replaced by, takes its
    place again with --replace-cluster only.

    With --dry-run nothing is changed, whatever it stands beside.
    """
    _require_heeded(context, in_place=in_place)
    wishes = placing.Wishes(yes, replace_cluster, as_json)
    if undo is not None:
        placing.take_back(undo, options(config), wishes, dry_run=dry_run)
        return
    if resume is not None:
        placing.finish(resume, options(config), wishes, dry_run=dry_run)
        return
    if from_clone is not None:
        placing.put_clone(from_clone, options(config), wishes, dry_run=dry_run)
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
    chosen = options(config)
    if to_lsn is not None:
        place(to_lsn, chosen)
    if in_place:
        _restore_in_place(named, chosen, wishes, dry_run=dry_run)
    elif dry_run:
        show_plan(at(chosen, lambda parts: _plan(named, parts)), as_json=as_json)
    else:
        show_report(at(chosen, lambda parts: _restore(named, name, parts)), as_json=as_json)


_ENDING = ("--yes", "--dry-run", "--json")
_ALONE = (
    ("--undo", _ENDING),
    ("--resume", _ENDING),
    ("--from-clone", ("--in-place", "--replace-cluster", *_ENDING)),
)
"""Options, and what each goes with."""
_APART = (
    ("--in-place", ("--name",), "a restore in place is called by its time"),
    ("--to-point", ("--database", "--history", "--timeline"), "a point is of one history, and holds every database"),
    ("--timeline", ("--history",), "both name a history"),
)
"""Options, what each does not go with, and why."""


_NAMED = {
    "--undo": "the time of a restore in place, or `last`",
    "--resume": "the time of a restore in place, or `last`",
    "--from-clone": "the name of a clone",
}
"""Options that take a name, and of what: an option that follows is none."""


def _require_heeded(context: typer.Context, *, in_place: bool) -> None:
    """Refuse a command line with an option that another one would pass over; raises `ConfigError`."""
    for option, beside in _ALONE:
        require_alone(context, option, *beside)
    for option, others, why in _APART:
        require_apart(context, option, others, why)
    for option in () if in_place else ("--from-clone", "--replace-cluster"):
        if option in given(context):
            raise ConfigError(f"{option} goes with --in-place only", hint="add that, or leave it out")
    for option, what in _NAMED.items():
        if str(name := context.params[option.lstrip("-").replace("-", "_")]).startswith("-"):
            raise ConfigError(f"{option} takes {what}, not {name}", hint="name it right behind the option")


def _restore_in_place(named: Named, chosen: Options, wishes: placing.Wishes, *, dry_run: bool) -> None:
    """Restore in place, or say how it would be done."""
    if dry_run:
        placing.show_plan(at(chosen, lambda parts: placing.look(named, wishes, parts)), chosen, as_json=wishes.as_json)
        return
    report, swap = placing.put(named, chosen, wishes)
    if not wishes.as_json:
        show_report(report, as_json=False, clone=False)
        placing.show_swap(swap, undone=False, as_json=False)


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

    target = await meant(named, parts, parts.database, only_look=True)
    return await prepare(target, parts.site)


async def _restore(named: Named, name: str, parts: Parts) -> Report:
    from trigger.restore.restore import restore

    target = await meant(named, parts, parts.database)
    with show.steps() as progress:
        return await restore(target, parts.site, progress=progress, name=name)


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
            ("replayed", f"{size(report.replay_bytes)} to {report.replayed}, now {report.history}"),
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
    else:
        pass_on(config, as_json=as_json)


@clones.command("list")
def list_clones(config: Config = None, as_json: Json = False) -> None:
    """List the clones: what each holds, whether its server runs, how to reach it."""
    from trigger.restore.clones import CloneState

    found, swaps = at(options(config), _clones_and_swaps)
    show_clones(found, as_json=as_json)
    for name in () if as_json else [one.name for one in found if one.state is CloneState.DROPPED]:
        show.note(f"clone {name} is being dropped, or that was cut off; trigpoint clones drop {name} goes on with it")
    for number, (swap, instead) in () if as_json else enumerate(swaps, 1):
        later = next((later for later, _ in swaps[number:] if later.finished), None)
        show.note(f"{swap.target} {_became(swap, later, instead)}")


def _became(swap: Swap, later: Swap | None, instead: str) -> str:
    """Give what became of a restore in place: the next one took the place, or something else is there `instead`."""
    back = f"trigpoint restore --undo {swap.name} puts the old state back"
    if not swap.finished:
        return f"was cut off on the way into production's place; {back}"
    if later is not None:
        return f"stood in place of production before {later.name}; once that is taken back, {back}"
    if instead:
        return f"was put in place of production by {swap.name}, and stands there no more: {instead}"
    return f"stands in place of production; {back}"


async def _clones_and_swaps(parts: Parts) -> tuple[list[CloneStatus], list[tuple[Swap, str]]]:
    """Give the clones, and each restore in place with what stands there in its place."""
    from trigger.restore.clones import clones as all_clones
    from trigger.restore.swap import stranger, swaps

    found = await swaps(parts.site)
    return await all_clones(parts.site), [(swap, await stranger(swap, parts.site)) for swap in found]


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
