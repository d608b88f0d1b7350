"""`trigpoint rules test`: what a set of rules would do, with the commits of a file or of the next minutes."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trigger import show
from trigger.commands.arguments import Config, Json, options
from trigger.commit_lines import read, write
from trigger.errors import ConfigError
from trigger.model import Commit, Outcome

if TYPE_CHECKING:
    from trigger.options import Options
    from trigger.rehearse import Rehearsal

app = typer.Typer(no_args_is_help=True, help="Try rules before they decide.")


@app.command("test")
def try_rules(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Commits as JSON lines.", show_default=False, dir_okay=False)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.01, max=1440, help="Watch the live stream this long.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", help="With --minutes: write what was seen to this file.")
    ] = None,
    round_seconds: Annotated[float, typer.Option(min=0, help="How long one round is taken to last.")] = 0.05,
    limit: Annotated[int, typer.Option(min=0, help="How many commits and points to show, at most.")] = 50,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Say what the rules and budgets of a configuration would have done; nothing is protected, nothing changed.

    With --file the commits come from a file of JSON lines, such as

    {"time": "2026-03-01T12:00:05.25Z", "database": "bank", "xid": 7731, "tables": {"public.accounts": {"updated": 2}},
    "markers": ["payroll"]}

    of which only "time" is needed. With --minutes they are watched live, through temporary replication slots that
    see what is committed from now on (a server does not show the past to a new slot); --record keeps them for --file.
    """
    if (file is None) == (minutes is None):
        raise ConfigError("give either --file or --minutes", hint="`trigpoint rules test --help` tells what they do")
    if record is not None and minutes is None:
        raise ConfigError("--record goes with --minutes", hint="a file of commits is a record already")
    from trigger.qualify import Rules
    from trigger.rehearse import rehearse

    chosen = options(config)
    rules = Rules(chosen.rules)
    commits = from_file(file, chosen) if file is not None else watched(chosen, timedelta(minutes=minutes or 0))
    if record is not None:
        record.write_text("".join(f"{write(commit)}\n" for commit in commits))
    answer = rehearse(commits, rules, chosen.points, round_seconds=round_seconds)
    if as_json:
        show.print_json(summary(answer) | {"commits": commit_rows(answer), "points": answer.points})
    else:
        show_rehearsal(answer, limit)


def from_file(file: Path, chosen: Options) -> list[Commit]:
    """Give the commits in `file`; raises `ConfigError` naming the line that is not one."""
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from None
    return list(read(lines, str(file), chosen.database.databases[0]))


def watched(chosen: Options, length: timedelta) -> list[Commit]:
    """Give the commits that are made during `length` from now on."""
    from trigger.watch import watch

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
            "xid": verdict.commit.xid,
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
                verdict.commit.xid or None,
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
