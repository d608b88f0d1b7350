"""The service: run it, ask it for a point, or how it is; put catalog and storage in agreement, with it or without."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trigger.cli import show
from trigger.cli.arguments import AcceptLoss, Config, Json, Yes, confirm, given_text, options, point_reference
from trigger.cli.connected import in_order, until_ended
from trigger.errors import ConfigError, TrigpointError
from trigger.service.control import NotRunningError, ask
from trigger.shape import data, json_text, size

if TYPE_CHECKING:
    from trigger.config.options import Options

POINT_SECONDS = 3600.0
"""How long `trigpoint point` waits for the service: a round has deadlines of its own, and may be tried again."""
STATUS_SECONDS = 15.0


def run(
    force: Annotated[bool, typer.Option("--force", help="Go on where the pre-flight check refuses.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every step.")] = False,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log JSON lines.")] = False,
) -> None:
    """Protect the cluster until told to stop.

    SIGTERM and Ctrl-C end it after the round at hand. It logs to standard error; under systemd it says when it is
    ready. The first point is taken at once.
    """
    chosen = options(config)
    configure_logging(verbose=verbose, as_json=as_json)
    from trigger.service import service

    until_ended(lambda ending: service.run(chosen, ending, force=force, ready=lambda _service: notify("READY=1")))


def point(
    note: Annotated[
        str, typer.Option("--note", "-n", help="Free text that is kept with the point.", callback=given_text)
    ] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Take a recovery point now; through the running service, or without one if none runs.

    It holds everything that is visible by now, whatever the rules say, and restore --to-point brings that back. Ends
    when the point is sealed. Exit code 0 only then.

    Without a service the log that leads to it is received meanwhile; what is not kept of it by then is said. The
    database keeps the log from there on for the journal's slot, as while a service is down: `trigpoint release` ends
    that.
    """
    chosen = options(config)
    taken = in_order(_asked(chosen, {"do": "point", "note": note}))["point"]
    if as_json:
        show.print_json(taken)
    if taken["state"] != "sealed":
        raise TrigpointError(f"point {taken['number']} failed: {taken['failure']}", hint="see the service's log")
    if not as_json:
        at = (taken["ceiling"] or taken["floor"]).rpartition("@")[2]
        show.say(f"point {taken['number']} sealed at {at} ({taken['id']})")


async def _asked(chosen: Options, request: dict[str, Any]) -> dict[str, Any]:
    """Give the running service's answer to a request, or, where none runs, the same answer without it."""
    try:
        return await ask(chosen.state_folder, request, POINT_SECONDS)
    except NotRunningError:
        from trigger.service import service

        return await service.answer_alone(chosen, request)


def expire(
    before: Annotated[str, typer.Argument(help="The oldest point to keep: a number, an id, or a name (trg-…).")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which points would go.")] = False,
    yes: Yes = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Give up every point older than one, and the log that only they needed: what came before cannot be had again.

    Through the running service, or without one if none runs. Points of which there is a clone stay. The records of
    commits stay too, so that `trigpoint find` still knows them.
    """
    chosen = options(config)
    if not dry_run:
        confirm(f"make every commit of {chosen.name} before point {before} impossible to restore", yes=yes)
    request = {"do": "expire", "before": point_reference(before), "dry_run": dry_run}
    done = in_order(_asked(chosen, request))["expired"]
    if as_json:
        show.print_json(done)
        return
    show.facts(
        [
            ("would go" if dry_run else "expired", _numbers(done["points"]) or "no point is older"),
            ("kept", f"{_numbers(done['kept'])}: there are clones of them" if done["kept"] else None),
            ("journal", None if dry_run else f"{done['segments']} segments let go of"),
        ]
    )


def _numbers(numbers: Sequence[int]) -> str:
    """Give numbers in order as words: `3 to 9, 11`."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda place: place[1] - place[0])]
    ends = [(run[0][1], run[-1][1]) for run in runs]
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ends)


def status(config: Config = None, as_json: Json = False) -> None:
    """Say how the running service is: streams, last point, what waits, what a restore would replay, room.

    Exit code 1 where no service runs; `trigpoint list` reads the catalog without one.
    """
    chosen = options(config)
    answer = asyncio.run(ask(chosen.state_folder, {"do": "status"}, STATUS_SECONDS))["status"]
    if as_json:
        show.print_json(answer)
        return
    now, space, totals = datetime.now(UTC), answer["space"], answer["totals"]
    behind = answer.get("behind_bytes", {})  # a service that was started before an upgrade does not say it
    streams = ", ".join(f"{name} {'connected' if up else 'NOT CONNECTED'}" for name, up in answer["streams"].items())
    limit = size(answer["replay_limit_bytes"])
    show.facts(
        [
            ("service", f"{answer['name']}, up {_ago(answer['started_at'], now)}"),
            ("streams", streams),
            ("behind", ", ".join(f"{name} {_behind(much)}" for name, much in behind.items()) or None),
            ("log end", answer["log_end"]),
            ("last point", f"{answer['last_point']}, sealed {_ago(answer['last_sealed_at'], now)} ago")
            if answer["last_point"]
            else ("last point", "none yet"),
            ("log since then", size(answer["log_since_last_point_bytes"])),
            ("replay", f"{size(answer['replay_bytes'])} of {limit} that the restore objective allows"),
            ("waiting", f"{answer['pending_commits']} commits, {show.duration(answer['oldest_pending_seconds'])}"),
            ("commits", _counts(answer["commits_by_rule"])),
            *(_kept(totals) if totals else ()),
            (
                "snapshots",
                space and f"{space['snapshots']} of {space['budget']}, {size(space['free_bytes'])} free",
            ),
            ("database keeps", _retained(answer["retained"])),
            *(("journal", f"{one['subject']}: {one['message']}; {one['remedy']}") for one in answer["journal"]),
            *(("TROUBLE", trouble) for trouble in answer["troubles"]),
        ]
    )


def _behind(much: int | None) -> str:
    return size(much) or "unknown"


def _kept(totals: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("points", ", ".join(f"{count} {state}" for state, count in totals["points"].items() if count)),
        ("long expired", totals.get("pruned") or None),
        ("outcomes", ", ".join(f"{count} {outcome}" for outcome, count in totals["commits"].items() if count)),
        ("open gaps", totals["open_gaps"]),
        ("catalog", size(totals["bytes"])),
    ]


def _retained(readers: list[dict[str, Any]] | None) -> str | None:
    return ", ".join(f"{size(one['bytes'])} of log for {one['reader']}" for one in readers or ()) or None


def _counts(by_rule: dict[str, int]) -> str:
    return ", ".join(f"{count} {rule or 'taken by no rule'}" for rule, count in by_rule.items() if count) or "none yet"


def _ago(then: str | None, now: datetime) -> str | None:
    return None if then is None else show.duration(max(0.0, (now - datetime.fromisoformat(then)).total_seconds()))


def reconcile(
    accept_loss: AcceptLoss = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Make catalog and storage agree, as every start does: adopt, fail, remove what a crash left, report what is gone.

    The service must not run. Snapshots that bear our names but that nobody can read are reported and left alone.
    """
    done = in_order(_reconcile(options(config), accept_loss=accept_loss))
    if as_json:
        show.print_json(done)
        return
    rows = [(what, ", ".join(ids)) for what, ids in data(done).items() if ids]
    show.facts(rows or [("reconciled", "catalog and storage agree; nothing to do")])


async def _reconcile(chosen: Options, *, accept_loss: bool) -> Any:
    from trigger.catalog.reconcile import reconcile as settle
    from trigger.service.connect import alone

    async with alone(chosen) as parts:
        names = [source.name for source in parts.sources]
        return await settle(parts.catalog, parts.storage, accept_loss=accept_loss, streams=names)


def release(
    yes: Yes = False,
    unused: Annotated[
        bool,
        typer.Option("--unused", help="Only what nothing that is configured has a use for; the service may run."),
    ] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Let the server go: drop our slots and publications, so that it keeps no log for us any more.

    Points, journal and clones stay, and what they hold can still be restored. If the service is started again later,
    the log between is recorded as a gap. The service must not run, unless only what is unused is dropped: that of
    databases that were renamed or are not in the configuration any more, and the slot of a journal that is read from
    an archive by now.
    """
    chosen = options(config)
    which = "that bears our name and nothing configured has a use for" if unused else f"that {chosen.name} has made"
    confirm(f"drop every slot and publication {which} in the cluster", yes=yes)
    dropped = in_order(_release(chosen, unused=unused))
    if as_json:
        show.print_json({"dropped": dropped})
    else:
        for name in dropped:
            show.say(f"dropped {name}")
        if not dropped:
            show.say(
                "nothing of ours in the cluster is unused" if unused else "there was nothing of ours in the cluster"
            )


async def _release(chosen: Options, *, unused: bool) -> list[str]:
    from trigger.service.connect import alone, opened

    async with opened(chosen) if unused else alone(chosen) as parts:
        try:
            return await parts.database.remove(unused=unused)
        except asyncio.CancelledError as error:
            error.add_note("some of what is ours may be dropped already: release again drops the rest")
            raise


def clear(
    volume: Annotated[str, typer.Argument(help="The volume's name in the configuration.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Trust a volume again whose flush has failed, after you have looked at its disk and at the data on it.

    Until then every point is refused: a write-back error is reported once, and what it lost stays lost. The service
    must not run.
    """
    chosen = options(config)
    in_order(_clear(chosen, volume))
    if as_json:
        show.print_json({"cleared": volume})
    else:
        show.say(f"volume {volume} is trusted again")


async def _clear(chosen: Options, volume: str) -> None:
    from trigger.service.connect import alone

    names = [known.name for known in chosen.volumes]
    if volume not in names:
        raise ConfigError(f"there is no volume {volume!r}", hint=f"the volumes are {', '.join(names)}")
    async with alone(chosen) as parts:
        for agent in parts.agents:
            await agent.clear(volume)


def configure_logging(*, verbose: bool, as_json: bool) -> None:
    """Log to standard error: for people, for the journal of systemd, or as JSON lines."""
    handler = logging.StreamHandler()
    if as_json:
        handler.setFormatter(_JsonLines())
    elif "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_ForJournald("%(message)s"))
    else:
        handler.setFormatter(show.LogLines("%(asctime)s %(levelname)-7s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    for library in ("asyncio", "sqlalchemy"):
        logging.getLogger(library).setLevel(logging.WARNING)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": data(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json_text(line, encoding=sys.stderr.encoding or "utf-8")


class _ForJournald(show.LogLines):
    """Puts the priority in front as sd-daemon(3) says; the journal has time and unit itself."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def notify(state: str) -> None:
    """Tell systemd `state` as sd_notify(3) says; nothing happens outside systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or sys.platform != "linux":
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
