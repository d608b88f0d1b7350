"""Before the first run: write a configuration, look at what stands in the way, say what cannot be seen."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trigger.cli import show
from trigger.cli.arguments import LOCAL_CONFIG, SYSTEM_CONFIG, Config, Json, options
from trigger.cli.connected import in_order
from trigger.errors import ConfigError, PreflightError, StorageError, VerifyError
from trigger.model import Finding, Layout, Severity
from trigger.trusted import why_not_ours

SERVICE_NAME = r"[a-z0-9][a-z0-9-]{0,39}"
"""What `name` may be in a configuration (`trigger.config.sections.Name`)."""
MOST_NUMBERS = 100
"""So many folders are tried for one that is nobody else's."""

if TYPE_CHECKING:  # what reaches the database takes a while to load, and help and completion do without
    from trigger.config.options import Options
    from trigger.config.sections import DatabaseOptions
    from trigger.service.initialise import Proposal
    from trigger.service.rehearsal import Rehearsal


def init(
    conninfo: Annotated[
        str | None,
        typer.Option(
            "--conninfo", help="How to reach the cluster, as libpq says it; else from PGHOST, PGPORT, PGUSER."
        ),
    ] = None,
    databases: Annotated[
        list[str] | None,
        typer.Option(
            "--database",
            "-d",
            help="Watch this one; may be given several times. Else all there are, and of several not the one that"
            " every cluster has.",
        ),
    ] = None,
    state_folder: Annotated[
        Path | None, typer.Option("--state-folder", help="For catalog and journal.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it; - is standard output.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    driver: Annotated[
        str | None, typer.Option("--driver", help="Which kind of database it is; else the usual one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at a running cluster and write a configuration for it, with comments.

    Run it on the database's host, as the user that will run the service (root, or the owner of the data). Nothing is
    changed but the file; one that is there is only replaced with --force. A file of another name is of another service,
    which is called like it and gets folders of its own.
    """
    from trigger.config.options import parse
    from trigger.service.initialise import text

    target = output or (SYSTEM_CONFIG if os.geteuid() == 0 else LOCAL_CONFIG)
    if str(target) != "-" and target.exists() and not force:
        raise ConfigError(f"{target} is there already", hint="--output writes elsewhere, --force replaces it")
    name = service_name(target)
    found = asyncio.run(look(driver, conninfo, databases or [], state_folder or default_state_folder(name), name))
    written = text(found)
    parse(written, str(target))
    if str(target) != "-":
        target.parent.mkdir(parents=True, exist_ok=True)
        put(target, written)
    if as_json:
        show.print_json({"file": target, "proposal": found, "text": written})
        return
    if str(target) == "-":
        show.raw(written)
        return
    show.say(f"wrote {target}")
    show.facts(
        [
            ("databases", ", ".join(found.databases)),
            ("volumes", ", ".join(f"{name} ({path})" for name, path in found.volumes)),
            ("storage", f"{found.driver} in {found.storage_folder}"),
        ]
    )
    for why in (*found.why, *found.points_why):
        show.say(why)
    _show_next("" if target in (SYSTEM_CONFIG, LOCAL_CONFIG) else f" -c {shlex.quote(str(target))}")


def _show_next(option: str) -> None:
    show.say()
    show.say(f"next:  trigpoint check{option}               what stands in the way, with remedies")
    show.say(f"       trigpoint explain{option}             what is protected, and what cannot be seen")
    show.say(f"       trigpoint check --rehearse{option}    protect, restore and prove once, and leave nothing")
    show.say(f"       trigpoint run{option}                 protect it")


def service_name(target: Path) -> str:
    """Give what a service is called by its configuration's file; `main` by the usual one, and by what is no name."""
    stem = target.stem
    return stem if stem != LOCAL_CONFIG.stem and re.fullmatch(SERVICE_NAME, stem) else "main"


async def look(kind: str | None, at: str | None, databases: list[str], state_folder: Path, name: str) -> Proposal:
    """Give the proposal for the cluster that is reached at `at`; raises `DatabaseError` where it does not answer."""
    from trigger.config.drivers import driver
    from trigger.config.options import reached
    from trigger.host import free_bytes, read_mounts, size_bytes, subvolume_of
    from trigger.service.initialise import propose

    section = reached(kind, at, os.environ)
    database = driver("database", section.driver)(section)
    try:
        present = list(await database.existing())
        missing = [name for name in databases if name not in present]
        if missing:
            raise ConfigError(f"there is no database {', '.join(missing)}", hint=f"there are: {', '.join(present)}")
        layout = await database.layout()
    finally:
        await database.close()
    section = await _with_own_names(section, str(state_folder / "catalog.sqlite"), name)
    for number in range(1, MOST_NUMBERS + 1):
        found = propose(
            section,
            databases or present,
            layout,
            state_folder=state_folder,
            name=name,
            mounts=read_mounts(),
            subvolume_of=subvolume_of,
            root=os.geteuid() == 0,
            ours=lambda folder: why_not_ours(folder) is None,
            free_bytes=free_bytes,
            size_bytes=size_bytes,
            number=number,
        )
        if await is_free(found, layout):
            return found
    raise ConfigError(
        f"{found.storage_folder}, and so many before it, are other services' folders for snapshots",
        hint="give the service a --state-folder with another name",
    )


async def _with_own_names(section: DatabaseOptions, holder: str, name: str) -> DatabaseOptions:
    """Give the section under whose names no other service than that of the catalog `holder` has made something."""
    from trigger.config.drivers import driver

    for number in range(MOST_NUMBERS):
        own = section.apart(name, number) if number else section
        database = driver("database", own.driver)(own)
        try:
            if await database.claimed_by_another(holder) is None or (number and own == section):
                break
        finally:
            await database.close()
    return own  # where it is another's all the same, the check says it


async def is_free(found: Proposal, layout: Layout) -> bool:
    """Whether nobody else has claimed the folder for snapshots of a proposal, as far as can be seen."""
    from trigger.config.options import parse
    from trigger.service.connect import storage_of
    from trigger.service.initialise import text

    chosen = parse(text(found), "the proposal")
    try:
        storage = storage_of(chosen, layout)
        return await storage.claimed_by_another(str(chosen.catalog_path)) is None
    except StorageError:  # the check says it
        return True


def default_state_folder(name: str) -> Path:
    """Give where the state of a service belongs: in the system's place for root, else in the user's own."""
    folder = "trigpoint" if name == "main" else f"trigpoint-{name}"
    if os.geteuid() == 0:
        return Path("/var/lib") / folder
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / folder


def put(target: Path, written: str) -> None:
    """Write the file whole or not at all, for our eyes only."""
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(written)
            file.flush()
            os.fsync(descriptor)
        draft.rename(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def check(
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Then protect, take a point, restore it, prove it, and remove all of it."),
    ] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Look at everything that must hold before commits can be protected, and print each finding with its remedy.

    The database's settings, roles, slots and paths; volumes and storage; this host's clock and permissions. Nothing
    is protected. Exit code 3 where something is refused.

    With --rehearse it is done once, with a state folder, snapshots and slots of its own, beside a running service too;
    nothing of it stays. It costs a checkpoint and, on storage `directory`, a copy. Exit code 10 where a proof fails.
    """
    chosen = options(config)
    findings = asyncio.run(_check(chosen))
    refused = sum(finding.severity is Severity.REFUSED for finding in findings)
    if not (as_json and rehearse):
        _show_findings(findings, as_json=as_json)
    if refused:
        if as_json and rehearse:
            show.print_json({"findings": findings, "rehearsal": None})
        elif not as_json:
            show.say()
            show.say(f"{refused} of {len(findings)} refused: the service would not start")
        raise typer.Exit(PreflightError.exit_code)
    if rehearse:
        _show_rehearsal(in_order(_rehearse(chosen)), findings, as_json=as_json)


async def _rehearse(chosen: Options) -> Rehearsal:
    from trigger.service.rehearsal import rehearse

    with show.steps() as progress:
        return await rehearse(chosen, progress)


def _show_rehearsal(done: Rehearsal, findings: list[Finding], *, as_json: bool) -> None:
    proof = done.verification
    if as_json:
        show.print_json({"findings": findings, "rehearsal": done})
    else:
        show.say()
        show.table(
            ("check", "result", "seen"),
            [(what, "passed" if held else "failed", seen) for what, held, seen in proof.checks],
        )
        show.say()
        proven = "proven" if proof.passed else "NOT PROVEN"
        show.say(
            f"rehearsed: protected after {done.protected_seconds:.1f} s, a point in {done.point_seconds:.1f} s,"
            f" restored and {proven} in {done.proof_seconds:.1f} s; all of it removed"
        )
    if not proof.passed:
        raise typer.Exit(VerifyError.exit_code)


async def _check(chosen: Options) -> list[Finding]:
    from trigger.service.connect import check as check_parts
    from trigger.service.connect import opened

    async with opened(chosen, only_look=True) as parts:
        return await check_parts(parts)


def explain(config: Config = None, as_json: Json = False) -> None:
    """Print what a stream of this server's commits does not show, and what is done about it."""
    findings = asyncio.run(_explain(options(config)))
    _show_findings(findings, as_json=as_json)


async def _explain(chosen: Options) -> list[Finding]:
    from trigger.service.connect import opened

    async with opened(chosen, only_look=True) as parts:
        return await parts.database.explain()


def _show_findings(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        show.print_json(findings)
        return
    order = list(Severity)
    for finding in sorted(findings, key=lambda finding: -order.index(finding.severity)):
        show.finding(finding)
