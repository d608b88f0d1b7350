"""`trigpoint catalog`: make the index anew from what the storage holds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from trigger.cli import show
from trigger.cli.arguments import Config, Json, options
from trigger.cli.connected import in_order
from trigger.service.control import only_one

if TYPE_CHECKING:
    from trigger.catalog.rebuild import Known, Rebuilt
    from trigger.catalog.reconcile import Reconciliation
    from trigger.config.options import Options

app = typer.Typer(no_args_is_help=True, help="Make the catalog anew from what the storage holds.")


_UNKNOWN = (
    "failed and expired points, missed commits, open gaps, results of verifications, and what lies behind the newest"
    " commit of each stream: the next start records a gap there"
)


@app.command("rebuild")
def rebuild(config: Config = None, as_json: Json = False) -> None:
    """Set the catalog aside and make it anew from the tags of all snapshots; the service must not run.

    Where that fails, the old catalog is put back. What tags do not say is taken over from the old one as far as that
    can still be read (open gaps, how far streams are settled), or listed. Where it cannot, the next start records a gap
    behind the newest commit that a tag knows: nobody can say any more what lies there.
    """
    done = in_order(_rebuild(options(config)))
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
            ("not known any more", None if done.set_aside and not done.unreadable else _UNKNOWN),
            ("removed", ", ".join(done.done.removed)),
            ("left alone", ", ".join(done.done.strange)),
            ("only the old one knew", f"points {lost}" if lost else None),
            ("long expired", f"{done.lost_pruned} points, with their commits" if done.lost_pruned else None),
            ("differs", f"points {changed}" if changed else None),
            ("missed commits lost", done.lost_missed or None),
            *(("gap lost", f"{gap.stream}: {gap.after} to {gap.until}, {gap.reason}") for gap in done.lost_gaps),
        ]
    )


async def _rebuild(chosen: Options) -> Rebuilt:
    from trigger.catalog.rebuild import known, take_over
    from trigger.catalog.rebuild import rebuild as make_anew
    from trigger.catalog.reconcile import reconcile
    from trigger.service.service import opened

    async def fill(old: Known) -> tuple[Reconciliation, Known]:
        async with opened(chosen) as parts:
            done = await reconcile(parts.catalog, parts.storage)
            await take_over(parts.catalog, old)
            return done, await known(parts.catalog)

    with only_one(chosen.state_folder):
        return await make_anew(chosen.catalog_path, datetime.now(UTC), fill)
