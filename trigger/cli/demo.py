"""The command `trigpoint demo`: plays the story, then says what was measured, proven, and where it lies."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trigger.cli import show
from trigger.cli.arguments import require_apart
from trigger.cli.connected import in_order
from trigger.demo.place import kept
from trigger.demo.screen import Screen
from trigger.demo.story import Told, Wishes, end, play
from trigger.errors import VerifyError


class StorageChoice(StrEnum):
    """Where a demo keeps its snapshots."""

    AUTO = "auto"
    BTRFS = "btrfs"
    DIRECTORY = "directory"


def demo(
    context: typer.Context,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running at the end, to play with.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End what --keep left in --folder, and remove it.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where it lies; a new folder in /var/tmp by default.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=2, max=3600, help="How long the bank works before the accident.")] = 12,
    storage: Annotated[StorageChoice, typer.Option(help="auto: btrfs where one can be made.")] = StorageChoice.AUTO,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live table.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; the story to standard error.")
    ] = False,
) -> None:
    """Show it: a bank on a PostgreSQL of its own, an accident, and back to the commit right before it, proven.

    Nothing of this machine is touched: it all happens in one folder and over a socket in it, and it is removed at the
    end, also after Ctrl-C. As root the cluster lies on a btrfs volume of its own where the machine can make one; else
    snapshots are kept by copying what changed. Needs the extra `demo`, which brings PostgreSQL.

    Exit code 10 where the proof fails.
    """
    if stop:
        require_apart(context, "--stop", ("--keep", "--json"), "it ends a demo, and prints nothing")
        in_order(end(kept(folder)))
        return
    wishes = Wishes(folder, seconds, storage.value, keep)
    told = in_order(play(wishes, Screen(plain=plain, to_errors=as_json)))
    if as_json:
        show.print_json(document(told, keep=keep))
    else:
        _show_figures(told)
        _show_whereabouts(told, keep=keep)
    if not told.proven:
        wrong = [f"{check.claim}: {check.seen}" for check in told.checks if not check.held]
        raise VerifyError("\n".join(wrong), hint="this must not happen; please report it with the output above")


def document(told: Told, *, keep: bool) -> dict[str, object]:
    """Give what `--json` prints."""
    return {
        "proven": told.proven,
        "checks": told.checks,
        "storage": told.place.storage,
        "commits": told.commits,
        "commits_per_second": round(told.commits_per_second, 1),
        "points": told.points,
        "milliseconds": told.spreads,
        "restore_seconds": round(told.restore_seconds, 3),
        "restore": told.restore,
        "accident": {"xid": told.accident.xid, "rows": told.accident.rows},
        "folder": told.place.folder if keep else None,
        "config": told.place.config if keep else None,
    }


def _show_figures(told: Told) -> None:
    show.say()
    show.facts(
        [
            ("commits", f"{told.commits}, {told.commits_per_second:.0f} a second; none without its outcome"),
            ("points", f"{told.points} sealed, snapshots by {told.place.storage}"),
            *(
                (name, f"p50 {spread.p50:.1f} ms, p99 {spread.p99:.1f} ms{_MEANINGS[step]}")
                for step, name in _NAMES.items()
                if (spread := told.spreads.get(step))
            ),
            ("restore", f"{told.restore_seconds:.1f} s, command and all"),
            ("proof", "every check held" if told.proven else "FAILED"),
        ]
    )


_NAMES = {"flush": "flush", "snapshot": "snapshot", "tag": "tag and seal", "total": "commit to seal"}
_MEANINGS = {
    "flush": " (what the host still held, to disk)",
    "snapshot": " (durable up to the commit, volume cut)",
    "tag": " (ceiling, tag, catalog)",
    "total": " (with what the budget let it wait)",
}


def _show_whereabouts(told: Told, *, keep: bool) -> None:
    show.say()
    if not keep:
        show.say("Everything is removed again. `trigpoint demo --keep` leaves it running, to play with.")
        return
    place, psql = told.place, shlex.quote(told.programs.path("psql"))
    config = f"trigpoint --config {shlex.quote(str(place.config))}"
    show.say("It all runs on. Look further:")
    show.facts(
        [
            ("  configuration", place.config),
            ("  catalog, journal", place.state),
            ("  snapshots", place.snapshots),
            ("  clone", told.restore.get("data_directory")),
            ("  points", f"{config} list"),
            ("  one point", f"{config} show {told.restore['base']}"),
            ("  where is a commit", f"{config} find --xid {told.accident.last_transfer_xid}"),
            ("  a point now", f"{config} point"),
            ("  production", f"{psql} -h {shlex.quote(str(place.sockets))} -U postgres bank"),
            ("  the clone", f"{psql} {shlex.quote(str(told.restore['conninfo']) + ' dbname=bank')}"),
            ("  end it", f"trigpoint demo --stop --folder {shlex.quote(str(place.folder))}"),
        ]
    )
