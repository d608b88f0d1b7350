"""`trigpoint rules test`: what a set of rules would do, with the commits of the last or next minutes, or of a file."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trigger.cli import show
from trigger.cli.arguments import Config, Json, options
from trigger.errors import ConfigError
from trigger.model import Commit, Outcome
from trigger.protect.commit_lines import read, write
from trigger.service.control import NotRunningError

if TYPE_CHECKING:
    from trigger.config.options import Options
    from trigger.protect.rehearse import Rehearsal

app = typer.Typer(no_args_is_help=True, help="Try rules before they decide.")


@app.command("test")
def try_rules(
    last: Annotated[
        float | None, typer.Option("--last", min=0.01, metavar="MINUTES", help="Only commits of the last minutes.")
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option("--watch", min=0.01, max=1440, metavar="MINUTES", help="Watch the commits of the next minutes."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Commits as JSON lines.", show_default=False, dir_okay=False)
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", help="Write the commits to this file, for --file.", show_default=False)
    ] = None,
    round_seconds: Annotated[float, typer.Option(min=0, help="How long one round is taken to last.")] = 0.05,
    limit: Annotated[
        int, typer.Option(min=0, help="How many commits and points to show, at most; --json prints all.")
    ] = 50,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Say what the rules and budgets of a configuration would have done; nothing is protected, nothing changed.

    The commits are those that the running service saw last; it remembers ten thousand, also those that none of its
    own rules took. With --watch they are watched from now on, through temporary replication slots, also where no
    service runs. With --file they come from a file of JSON lines, such as

    {"time": "2026-03-01T12:00:05.25Z", "database": "bank", "xid": 7731, "tables": {"public.accounts": {"updated": 2}},
    "markers": ["payroll"]}

    of which only "time" is needed; --record writes one of what was seen.
    """
    if sum(option is not None for option in (last, watch, file)) > 1:
        raise ConfigError("give one of --last, --watch and --file", hint="`trigpoint rules test --help` tells more")
    if record is not None and file is not None:
        raise ConfigError("--record does not go with --file", hint="a file of commits is a record already")
    from trigger.protect.qualify import Rules
    from trigger.protect.rehearse import rehearse

    chosen = options(config)
    rules = Rules(chosen.rules)
    if file is not None:
        commits = from_file(file, chosen)
    elif watch is not None:
        commits = watched(chosen, timedelta(minutes=watch))
    else:
        commits = seen(chosen, timedelta(minutes=last) if last is not None else None)
    if record is not None:
        record.write_text("".join(f"{write(commit)}\n" for commit in commits))
    answer = rehearse(commits, rules, chosen.points, round_seconds=round_seconds)
    if as_json:
        show.print_json(summary(answer) | {"commits": commit_rows(answer), "points": answer.points})
    else:
        show_rehearsal(answer, limit)


def seen(chosen: Options, length: timedelta | None) -> list[Commit]:
    """Give the commits that the running service saw in the last `length`, or all that it remembers."""
    from trigger.service.watch import remembered

    try:
        found = asyncio.run(remembered(chosen))
    except NotRunningError as error:
        raise NotRunningError(
            error.message, hint="start it with `trigpoint run`, or watch the commits to come: --watch MINUTES"
        ) from None
    begin = datetime.now(UTC) - length if length is not None else found.started_at
    commits = [commit for commit in found.commits if length is None or commit.time >= begin]
    if found.forgotten and len(commits) == len(found.commits):
        show.note(f"{found.forgotten} earlier commits are not remembered by the service any more")
    elif begin < found.started_at:
        show.note(f"the service was started at {show.moment(found.started_at)} and saw none before")
    return commits


def from_file(file: Path, chosen: Options) -> list[Commit]:
    """Give the commits in `file`; raises `ConfigError` naming the line that is not one."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from None
    return list(read(lines, str(file), chosen.database.databases[0], chosen.database.driver))


def watched(chosen: Options, length: timedelta) -> list[Commit]:
    """Give the commits that are made during `length` from now on."""
    from trigger.service.watch import watch

    seconds = length.total_seconds()
    databases = ", ".join(chosen.database.databases)
    show.note(
        f"watching {databases} for {show.duration(seconds)} through temporary slots; earlier commits are not seen"
    )
    commits: list[Commit] = []
    asyncio.run(watch(chosen, seconds, commits.append))
    return commits


def summary(answer: Rehearsal) -> dict[str, object]:
    """Give the counts, as JSON has them."""
    return {
        "seen": len(answer.verdicts),
        "qualifying": len(answer.verdicts) - answer.count(None),
        "protected": answer.count(Outcome.PROTECTED),
        "coalesced": answer.count(Outcome.COALESCED),
        "passed_over": answer.count(None),
        "by_rule": answer.by_rule(),
        "rule_errors": answer.rule_errors,
        "longest_wait_seconds": max((v.waited_seconds for v in answer.verdicts if v.waited_seconds), default=0.0),
    }


def commit_rows(answer: Rehearsal) -> list[dict[str, object]]:
    """Give one object a commit, in log order."""
    return [
        {
            "database": verdict.commit.stream,
            "time": verdict.commit.time,
            "xid": verdict.commit.name.number,
            "name": str(verdict.commit.name),
            "end": verdict.commit.end,
            "rows": verdict.commit.rows,
            "rule": verdict.rule,
            "outcome": verdict.outcome,
            "point": verdict.point,
            "waited_seconds": verdict.waited_seconds,
        }
        for verdict in answer.verdicts
    ]


def show_rehearsal(answer: Rehearsal, limit: int) -> None:
    """Print the answer for people."""
    rows = commit_rows(answer)[:limit]
    show.table(
        ("time", "database", ">xid", ">rows", "rule", "outcome", ">point", ">waited"),
        [
            (
                show.moment(verdict.commit.time, digits=3),
                verdict.commit.stream,
                str(verdict.commit.name) or None,
                verdict.commit.rows,
                verdict.rule,
                verdict.outcome or "passed over",
                verdict.point,
                show.duration(verdict.waited_seconds),
            )
            for verdict in answer.verdicts[:limit]
        ],
        empty="no commits",
    )
    show.more(len(answer.verdicts) - len(rows), "commits")
    show.say()
    show.table(
        (">point", "began", "cause", ">commits"),
        [(p.number, show.moment(p.began_at, digits=3), p.cause, p.commits) for p in answer.points[:limit]],
        empty="no point would have been taken",
    )
    show.more(len(answer.points) - limit, "points")
    show.say()
    counts = summary(answer)
    taken = ", ".join(f"{rule} {count}" for rule, count in answer.by_rule().items())
    show.facts(
        [
            (
                "commits",
                f"{counts['seen']}, of which {counts['qualifying']} qualify" + (f" ({taken})" if taken else ""),
            ),
            ("points", f"{len(answer.points)}: {counts['protected']} for a commit of its own"),
            ("coalesced", counts["coalesced"]),
            ("longest wait", show.duration(float(str(counts["longest_wait_seconds"])))),
            ("rules that threw", counts["rule_errors"] or None),
        ]
    )
