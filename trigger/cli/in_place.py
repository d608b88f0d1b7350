"""Put a state in production's place, or take it back: what is said before, what is asked, what lies where after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from trigger.cli import show
from trigger.cli.arguments import Config, Json, Yes, confirm, options, pass_on, require_answer
from trigger.cli.connected import at, meant
from trigger.errors import RestoreError
from trigger.model import Finding, Severity
from trigger.shape import size

if TYPE_CHECKING:  # what reaches the database takes a while to load, and help and completion do without
    from trigger.config.options import Options
    from trigger.restore.aside import Aside
    from trigger.restore.clones import CloneStatus
    from trigger.restore.inplace import ClonePlan, InPlacePlan, SwapPlan
    from trigger.restore.losses import Losses
    from trigger.restore.restore import Report
    from trigger.restore.swap import Swap
    from trigger.restore.target import Named
    from trigger.service.connect import Parts


_FIRST = "--dry-run says which commits would be lost; "


class Wishes(NamedTuple):
    """How somebody wishes a state to be put in production's place."""

    yes: bool
    """Without being asked."""
    replacing: bool
    """Also where another cluster lies."""
    as_json: bool


def put(named: Named, chosen: Options, wishes: Wishes) -> tuple[Report, Swap]:
    """Say what will be lost, ask, and put a state in production's place; gives what was done."""
    what = _putting("the state of then", chosen)
    require_answer(what, yes=wishes.yes, first=_FIRST)
    planned = at(chosen, lambda parts: look(named, wishes, parts), by_itself=True)
    _require_allowed(planned)
    _ask(what, planned.losses, (), yes=wishes.yes)
    report, swap = at(chosen, lambda parts: _put(named, wishes, parts), by_itself=True)
    if wishes.as_json:
        show.print_json({"report": report, "swap": swap})
    return report, swap


def put_clone(name: str, chosen: Options, wishes: Wishes, *, dry_run: bool) -> None:
    """Say what will be lost, ask, and put a clone that is there in production's place; or only say it."""
    what = _putting(f"clone {name}", chosen)
    require_answer(what, yes=wishes.yes or dry_run, first=_FIRST)
    planned = at(chosen, lambda parts: _planned_clone(name, wishes, parts), by_itself=not dry_run)
    if dry_run:
        show_clone_plan(_with_service(planned.refused, chosen), planned, as_json=wishes.as_json)
        return
    _require_allowed(planned)
    _ask(what, planned.losses, [f"clone {name}: {planned.record.target}", *_notes(planned)], yes=wishes.yes)
    status, swap = at(chosen, lambda parts: _put_clone(name, wishes, parts), by_itself=True)
    if wishes.as_json:
        show.print_json({"clone": status, "swap": swap})
    else:
        show_swap(swap, undone=False, as_json=False)


def _require_allowed(planned: InPlacePlan | ClonePlan | SwapPlan) -> None:
    from trigger.restore.obstacles import require_none

    require_none(planned.refused)


def _ask(what: str, losses: Losses, notes: Sequence[str], *, yes: bool) -> None:
    for line in (*losses.describe(), *notes):
        show.note(line)
    confirm(what, yes=yes)


def _putting(what: str, chosen: Options) -> str:
    return f"put {what} where production of {chosen.name} lies; the old state is kept beside it"


async def look(named: Named, wishes: Wishes, parts: Parts) -> InPlacePlan:
    """Give what putting a state in place would mean; production is not made to commit anything for it."""
    from trigger.restore.inplace import prepare_in_place

    target = await meant(named, parts, None)
    return await prepare_in_place(target, parts.site, replacing=wishes.replacing)


async def _planned_clone(name: str, wishes: Wishes, parts: Parts) -> ClonePlan:
    from trigger.restore.inplace import prepare_clone

    return await prepare_clone(name, parts.site, replacing=wishes.replacing)


async def _put(named: Named, wishes: Wishes, parts: Parts) -> tuple[Report, Swap]:
    from trigger.restore.inplace import restore_in_place

    target = await meant(named, parts, parts.database)
    with show.steps() as progress:
        return await restore_in_place(target, parts.site, progress=progress, replacing=wishes.replacing)


async def _put_clone(name: str, wishes: Wishes, parts: Parts) -> tuple[CloneStatus, Swap]:
    from trigger.restore.inplace import put_in_place

    with show.steps() as progress:
        return await put_in_place(name, parts.site, progress=progress, replacing=wishes.replacing)


def show_plan(planned: InPlacePlan, chosen: Options, *, as_json: bool) -> None:
    """Print what a restore in place would do, lose and be refused for; the exit code says whether it would be."""
    from dataclasses import replace

    planned = replace(planned, refused=_with_service(planned.refused, chosen))
    if as_json:
        show.print_json(planned)
    else:
        for line in (*planned.plan.describe(), *(f"lost      {line}" for line in planned.losses.describe())):
            show.say(line)
    _show_refused(planned.refused, as_json=as_json)


def show_clone_plan(refused: tuple[Finding, ...], planned: ClonePlan, *, as_json: bool) -> None:
    """Print what putting a clone in place would lose and be refused for, likewise."""
    from dataclasses import replace

    if as_json:
        show.print_json(replace(planned, refused=refused))
    else:
        show.say(f"clone     {planned.record.name}: {planned.record.target}")
        for line in planned.losses.describe():
            show.say(f"lost      {line}")
        for note in _notes(planned):
            show.say(f"note      {note}")
    _show_refused(refused, as_json=as_json)


def _notes(planned: ClonePlan) -> list[str]:
    proofs = [f"when it was made, {what}: {seen}" for what, _, seen in planned.record.checks]
    since = (
        [f"{planned.used} transactions were begun in the clone itself since, and go with it"] if planned.used else []
    )
    return [*proofs, *since, *planned.record.notes]


def _with_service(refused: tuple[Finding, ...], chosen: Options) -> tuple[Finding, ...]:
    """Give the findings, with one more where somebody holds the state folder."""
    from trigger.service.control import holder, if_free

    with if_free(chosen.state_folder) as free:
        if free:
            return refused
    return (*refused, Finding("service", Severity.REFUSED, *holder(chosen.state_folder)))


def _show_refused(refused: Sequence[Finding], *, as_json: bool) -> None:
    if not as_json:
        for finding in refused:
            show.finding(finding)
    if refused:
        raise typer.Exit(RestoreError.exit_code)


def take_back(name: str, chosen: Options, wishes: Wishes, *, dry_run: bool) -> None:
    """Say what goes aside, ask, and put the old state back in production's place; or only say what would go where."""
    from trigger.restore.inplace import prepare_undo

    what = f"put back what lay in place of production of {chosen.name} before {{}}; what lies there now goes aside"
    first = "--dry-run says what would go where; "
    require_answer(what.format(f"the restore in place {name}"), yes=wishes.yes or dry_run, first=first)
    planned = at(chosen, lambda parts: prepare_undo(name, parts.site), by_itself=not dry_run)
    if dry_run:
        _show_swap_plan(planned, chosen, as_json=wishes.as_json)
        return
    _require_allowed(planned)
    found = planned.swap
    if found.finished and any(Path(path).exists() for path in found.paths):
        show.note(f"{found.target} was put there by {found.name}; all that was written since goes aside with it")
    confirm(what.format(f"the restore in place {found.name}"), yes=wishes.yes)
    swap = at(chosen, lambda parts: _undone(found.name, parts), by_itself=True)
    show_swap(swap, undone=True, as_json=wishes.as_json)


async def _undone(name: str, parts: Parts) -> Swap:
    from trigger.restore.swap import undo

    return await undo(name, parts.site)


def finish(name: str, chosen: Options, wishes: Wishes, *, dry_run: bool) -> None:
    """Finish a restore in place, which was asked for when it began; or only say what would go where."""
    from trigger.restore.inplace import prepare_resume

    if dry_run:
        planned = at(chosen, lambda parts: prepare_resume(name, parts.site))
        _show_swap_plan(planned, chosen, as_json=wishes.as_json)
        return
    swap = at(chosen, lambda parts: _resumed(name, parts), by_itself=True)
    show_swap(swap, undone=False, as_json=wishes.as_json)


async def _resumed(name: str, parts: Parts) -> Swap:
    from trigger.restore.swap import resumable, resume

    found = await resumable(name, parts.site)
    return await resume(found.name, parts.site)


def _show_swap_plan(planned: SwapPlan, chosen: Options, *, as_json: bool) -> None:
    """Print what taking a restore in place back, or finishing it, would rename and be refused for, likewise."""
    from dataclasses import replace

    planned = replace(planned, refused=_with_service(planned.refused, chosen))
    if as_json:
        show.print_json(planned)
    else:
        show.say(f"in place  {planned.swap.name}: {planned.swap.target}")
        for source, destination in planned.renames:
            show.say(f"rename    {source} to {destination}")
        if not planned.renames:
            show.say("rename    nothing: all of it is where it belongs")
    _show_refused(planned.refused, as_json=as_json)


def show_swap(swap: Swap, *, undone: bool, as_json: bool) -> None:
    """Print what a restore in place put where."""
    if as_json:
        show.print_json(swap)
        return
    for one in swap.places:
        if not undone:
            show.say(f"{one.path} is {swap.target}; the old state is {one.kept}")
        elif Path(one.restored).exists():
            show.say(f"{one.path} is as it was before; what had taken its place is {one.restored}")
        else:
            show.say(f"{one.path} is as it was before")
    if undone and any(Path(one.restored).exists() for one in swap.places):
        show.say(f"trigpoint aside drop {swap.name} removes that, with all that was written since it was put there")
    elif not undone:
        show.say(f"start the server and the service again; take it back with: trigpoint restore --undo {swap.name}")


aside = typer.Typer(
    invoke_without_command=True, help="List what restores in place left beside the volumes; drop what is not needed."
)


@aside.callback()
def list_by_default(context: typer.Context, config: Config = None, as_json: Json = False) -> None:
    """List what restores in place left beside the volumes; drop what is not needed."""
    if context.invoked_subcommand is None:
        list_aside(config, as_json)
    else:
        pass_on(config, as_json=as_json)


@aside.command("list")
def list_aside(config: Config = None, as_json: Json = False) -> None:
    """List what restores in place left beside the volumes: of which one it is, how old, how large."""
    found = at(options(config), _aside)
    if as_json:
        show.print_json(found)
        return
    columns = ("name", "kind", ">age", ">size", "restored then", "needed", "paths")
    rows = [
        (
            one.name,
            one.kind,
            show.duration(max(0.0, one.age.total_seconds())),
            size(one.bytes),
            one.target,
            one.needed,
            ", ".join(one.paths),
        )
        for one in found
    ]
    show.table(columns, rows, empty="nothing lies aside")
    for one in found:
        if one.not_undone:
            words = f"{one.name} cannot be undone as things are: {one.not_undone}"
            show.note(f"{words}; it can be looked into, and removed: trigpoint aside drop {one.name}")


async def _aside(parts: Parts) -> list[Aside]:
    from trigger.restore.aside import aside as lying_aside

    return await lying_aside(parts.site)


@aside.command("drop")
def drop_aside(
    names: Annotated[list[str], typer.Argument(help="The times of the restores in place, as `aside` lists them.")],
    yes: Yes = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Remove for good what restores in place left beside the volumes. A restore whose old state goes cannot be undone.

    What a restore in place needs that was cut off stays, and so does what a server works in.
    """
    confirm(f"remove for good what lies aside of {', '.join(names)}", yes=yes)
    removed = at(options(config), lambda parts: _discarded(names, parts))
    if as_json:
        show.print_json(removed)
    else:
        for path in removed:
            show.say(f"removed {path}")


async def _discarded(names: list[str], parts: Parts) -> list[Path]:
    from trigger.restore.aside import discard

    return [path for name in dict.fromkeys(names) for path in await discard(name, parts.site)]
