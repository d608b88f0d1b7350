"""`trigpoint catalog`: make the index anew from what the storage holds."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trigger.cli import show
from trigger.cli.arguments import AcceptLoss, Config, Json, options
from trigger.cli.connected import in_order
from trigger.errors import StorageError
from trigger.model import State
from trigger.service.control import only_one

if TYPE_CHECKING:
    from trigger.catalog.rebuild import Known, Rebuilt
    from trigger.catalog.reconcile import Reconciliation
    from trigger.config.options import Options
    from trigger.service.connect import Parts

app = typer.Typer(no_args_is_help=True, help="Make the catalog anew from what the storage holds.")


_BEHIND = (
    "what lies behind the newest commit of each stream, or behind the oldest point where no tag has one: the next start"
    " reads on there, or records a gap where the server has let go of it"
)


@app.command("rebuild")
def rebuild(
    accept_loss: AcceptLoss = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Make the catalog anew from the tags of all snapshots, and set the old one aside; the service must not run.

    Where that fails, the old catalog stays where it is. What tags do not say is taken over from it (open gaps, how far
    streams are settled), or listed. Where it is damaged or lost, nobody can say any more what lies in each stream
    behind the newest of its commits that a tag knows, or behind the oldest point: the next start reads on there, or
    records a gap where the server has let go of it.
    """
    from trigger.catalog.reconcile import ONLY_IT_KNEW

    done = in_order(_rebuild(options(config), accept_loss=accept_loss))
    if as_json:
        show.print_json(done)
        return
    lost = ", ".join(f"{point.number} ({point.state})" for point in done.lost_points)
    changed = ", ".join(f"{number} ({', '.join(fields)})" for number, fields in done.changed_points.items())
    show.facts(
        [
            ("points", f"{done.sealed} sealed, {len(done.done.adopted)} adopted from tags"),
            ("old catalog", done.set_aside or "there was none"),
            ("not readable", done.unreadable),
            (
                "not known any more",
                None if done.set_aside and not done.unreadable else f"{ONLY_IT_KNEW}, and {_BEHIND}",
            ),
            ("removed", ", ".join(done.done.removed)),
            ("left alone", ", ".join(done.done.strange)),
            ("only the old one knew", f"points {lost}" if lost else None),
            ("long expired", f"{done.lost_pruned} points, with their commits" if done.lost_pruned else None),
            ("differs", f"points {changed}" if changed else None),
            ("missed commits lost", done.lost_missed or None),
            *(("gap lost", f"{gap.stream}: {gap.after} to {gap.until}, {gap.reason}") for gap in done.lost_gaps),
        ]
    )


async def _require_points(parts: Parts, old: Known) -> None:
    """Raise `StorageError` where points were kept, and the storage shows none: more likely it is not mounted."""
    from trigger.service import kept

    known = sum(point.state is State.SEALED for point in old.points.values())
    anyway = "trigpoint catalog rebuild --accept-loss"
    missing = await kept.missed_points(parts.options, parts.catalog, parts.storage, known=known, anyway=anyway)
    if missing is not None:
        raise StorageError(missing.message, hint=missing.remedy)


async def _rebuild(chosen: Options, *, accept_loss: bool) -> Rebuilt:
    from trigger.catalog.rebuild import known, take_over
    from trigger.catalog.rebuild import rebuild as make_anew
    from trigger.catalog.reconcile import reconcile
    from trigger.service.connect import opened

    async def fill(file: Path, old: Known) -> tuple[Reconciliation, Known]:
        async with opened(chosen, anew=file) as parts:
            if not accept_loss:
                await _require_points(parts, old)
            unknown = () if old.points else [source.name for source in parts.sources]
            done = await reconcile(parts.catalog, parts.storage, accept_loss=accept_loss, streams=unknown)
            await take_over(parts.catalog, old)
            return done, await known(parts.catalog)

    with only_one(chosen.state_folder):
        return await make_anew(chosen.catalog_path, datetime.now(UTC), fill)
