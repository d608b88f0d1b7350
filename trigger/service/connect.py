"""From a configuration to everything that one service works with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from socket import gethostname
from stat import S_IFREG

from trigger import host
from trigger.catalog.catalog import Catalog, Upgrade
from trigger.catalog.presence import look, look_back
from trigger.catalog.reconcile import lost
from trigger.config.drivers import driver, know_places
from trigger.config.options import Options
from trigger.errors import AgentError, CatalogError, ConfigError, DatabaseError, StorageError, remedy
from trigger.model import Finding, Layout, Severity, Volume
from trigger.ports import Agent, Capability, Database, Journal, Recovery, Source, Storage
from trigger.position import History
from trigger.protect.logs import Logs
from trigger.restore.clones import Site
from trigger.restore.swap import mixed
from trigger.service import costs, kept, surroundings
from trigger.service.control import if_free, only_one
from trigger.service.members import Members
from trigger.shape import data
from trigger.trusted import replace_file, why_not_ours
from trigger.volumes import is_of, listed, volumes_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that one configured service works with."""

    options: Options
    volumes: tuple[Volume, ...]
    layout: Layout
    database: Database
    sources: Sequence[Source]
    agents: Sequence[Agent]
    storage: Storage
    catalog: Catalog
    journal: Journal
    recovery: Recovery

    @property
    def logs(self) -> Logs:
        """The databases by the streams of their commits."""
        return Logs({source.name: self.database for source in self.sources})

    @property
    def site(self) -> Site:
        """Where restores happen, and with what."""
        return Site(
            catalog=self.catalog,
            storage=self.storage,
            journal=self.journal,
            recovery=self.recovery,
            volumes=self.volumes,
            clock=SystemClock(),
            records_folder=self.options.state_folder / "clones",
            staging_folder=self.options.state_folder / "staging",
            replay_bytes_per_second=float(self.options.points.replay_bytes_per_second),
        )

    async def close(self) -> None:
        """Let go of everything; never raises."""
        for source in self.sources:
            await source.close()
        for agent in self.agents:
            await agent.close()
        await self.storage.close()
        await self.database.close()
        await self.catalog.close()


class SystemClock:
    """The time of day of this machine."""

    def now(self) -> datetime:
        """Give the present time, aware UTC."""
        return datetime.now(UTC)


async def connect(
    options: Options,
    *,
    only_look: bool = False,
    upgrade: Upgrade | None = None,
    suffix: str = "",
    past: bool = False,
    anew: Path | None = None,
) -> Parts:
    """Give the parts that `options` name; nothing is changed in the world but the state folder.

    With `only_look` nothing is changed there either, and one that is not there, or that somebody else could change, is
    no error: the pre-flight check says it.
    `suffix` keeps what is made in the cluster apart from what a service makes there. Whoever asks for the `past` is not
    given an empty catalog where there are points; like him who only looks, he makes none. `anew` is the file of a
    catalog that is to take the place of the configured one.
    The layout of the cluster is asked for and kept in the state folder, and beside the snapshots, so that restores need
    no running cluster.

    Raises:
        ConfigError: a driver's library is missing, the state folder is somebody else's to change, or the cluster does
            not answer and was never seen before.
        CatalogError: the catalog cannot be opened, or was lost.
    """
    know_places()
    if not only_look:
        host.make_passage(options.state_folder)
        if (alien := why_not_ours(options.state_folder)) is not None:
            raise ConfigError(f"state_folder: {alien.message}", hint=alien.remedy)
    volumes = options.volume_list
    database = driver("database", options.database.driver)(options.database, suffix)
    database.claim(str(options.catalog_path))
    layout, answered = await known_layout(database, layout_files(options))
    database.lies_at(layout)
    storage = storage_of(options, layout)
    file = anew or options.catalog_path
    none_yet = (only_look or past) and _is_yet_to_be_made(file, options.state_folder)
    catalog = await Catalog.open(":memory:" if none_yet else file, upgrade=upgrade, place=options.catalog_path)
    try:
        if past:
            await refuse_lost(catalog, storage)
        database.recognise(await catalog.seen())
        journal = driver("journal", options.journal.driver)(options.journal, database, layout, options.journal_folder)
        journal.look_into(partial(newest_copy, catalog, storage, volumes, layout.log))
        recovery = driver("recovery", options.database.driver)(options.restore, database, layout, volumes, options.name)
        agents = [driver("agent", options.agent.driver)(options.agent, gethostname(), options.state_folder)]
        # It answered, and fits: another cluster that answers there now must not make us forget where ours lies.
        if answered and not only_look:
            files = layout_files(options)
            if await storage.claimed_by_another(str(options.catalog_path)) is not None:
                files = files[:1]  # beside another's snapshots lies the layout of another cluster
            await asyncio.to_thread(keep_layout, layout, files)
    except BaseException:
        await catalog.close()
        raise
    sources = database.sources()
    return Parts(options, volumes, layout, database, sources, agents, storage, catalog, journal, recovery)


def storage_of(options: Options, layout: Layout) -> Storage:
    """Give the storage that `options` name, or several as one; each is told which volumes it keeps.

    Raises:
        ConfigError: the library of a driver is not installed.
    """
    homes = {volume.name: volume.storage or "" for volume in options.volumes}

    def made(name: str) -> Storage:
        section, volumes = options.stores[name], [each for each in options.volume_list if homes[each.name] == name]
        storage: Storage = driver("storage", section.driver)(section, volumes, layout)
        return storage

    storages = {name: made(name) for name in options.stores}
    return Members(storages, homes) if len(storages) > 1 else next(iter(storages.values()))


@contextlib.asynccontextmanager
async def opened(
    options: Options, *, only_look: bool = False, past: bool = False, anew: Path | None = None
) -> AsyncIterator[Parts]:
    """Hold the parts of a service, connected (see `connect`); they are let go of at the end."""
    upgrade = if_free(options.state_folder)
    parts = await connect(options, only_look=only_look, upgrade=upgrade, past=past, anew=anew)
    try:
        yield parts
    finally:
        await parts.close()


@contextlib.asynccontextmanager
async def alone(options: Options, *, past: bool = False) -> AsyncIterator[Parts]:
    """Hold the state folder and the parts; raises `ConfigError` where another process holds the folder.

    `past` as in `connect`.
    """
    with only_one(options.state_folder):
        parts = await connect(options, past=past)
        try:
            yield parts
        finally:
            await parts.close()


def _is_yet_to_be_made(file: Path, state_folder: Path) -> bool:
    """Whether there is no catalog yet, and one could be made; where it could not, opening it says why."""
    folder = file.parent
    return not file.exists() and (os.access(folder, os.W_OK) or (folder == state_folder and not folder.exists()))


async def refuse_lost(catalog: Catalog, storage: Storage) -> None:
    """Raise `CatalogError` where a catalog has no sealed point, and the storage has some: mostly it was lost."""
    if (found := await lost(catalog, storage)) is not None:
        raise CatalogError(f"catalog: {found.message}", hint=found.remedy)


async def newest_copy(
    catalog: Catalog, storage: Storage, volumes: Sequence[Volume], path: Path, history: History
) -> tuple[Path, Path] | None:
    """Give (a volume's snapshot, where in it), of what lies at a path of production, as it was last in a history.

    None where no point that is one instant was sealed there, or none of those has its snapshots.
    """
    bases, gone = await catalog.bases(), set[str]()
    with contextlib.suppress(StorageError):  # of one that cannot be looked at, each that is looked into says so
        gone = await storage.absent(bases)
    for base in reversed([base for base in bases if base.id not in gone]):
        mark = base.mark_in(history)
        if mark is None or mark.ceiling is None or mark.ceiling.history != history or mark.bracket is not None:
            continue
        roots = {volume.name: Path(volume.path).resolve() for volume in volumes_of(base, volumes)}
        within = [name for name, root in roots.items() if path.is_relative_to(root)]
        volume = max(within, key=lambda name: len(roots[name].parts), default="")
        for snapshot in base.snapshots:
            if snapshot.volume == volume:
                return Path(snapshot.location), path.relative_to(roots[volume])
    return None


def layout_files(options: Options) -> tuple[Path, ...]:
    """Give where the layout is kept: in the state folder, and where that may be lost, beside the snapshots."""
    return tuple(folder / "layout.json" for folder in (options.state_folder, *options.storage_folders))


async def known_layout(database: Database, kept: Sequence[Path]) -> tuple[Layout, bool]:
    """Give the cluster's layout, and whether it is the cluster's own word; else it is as it was kept."""
    try:
        return await database.layout(), True
    except DatabaseError as error:
        there = next((file for file in kept if file.exists()), None)
        if there is None:
            raise
        log.info("the layout is the one last seen, since the cluster does not tell it: %s", error.message)
        return _recalled(database, there), False


def keep_layout(layout: Layout, kept: Sequence[Path]) -> None:
    """Write a layout into the first of some files, and, if their folders are in use and take it, into the others."""
    text = json.dumps(data(layout), indent=2)
    for number, file in enumerate(kept):
        with contextlib.suppress(*([OSError] if number else [])):
            if not _is_kept(file, text) and (not number or _is_used(file.parent)):
                replace_file(file, text)


def _is_used(folder: Path) -> bool:
    """Whether a folder is there, with something in it: an empty one may be what a filesystem is mounted on."""
    return folder.is_dir() and any(folder.iterdir())


def _is_kept(file: Path, text: str) -> bool:
    """Whether a file holds `text` and is ours alone; with no room left, what is known already is no reason to stop."""
    try:
        return file.lstat().st_mode & 0o170077 == S_IFREG and file.read_text() == text
    except (FileNotFoundError, ValueError):
        return False


def _recalled(database: Database, kept: Path) -> Layout:
    try:
        document = json.loads(kept.read_text())
    except (OSError, ValueError, RecursionError) as error:
        words = error.strerror or error if isinstance(error, OSError) else error
        hint = remedy(error) if isinstance(error, OSError) else ""
        raise ConfigError(
            f"{kept}, which says where the cluster lies, cannot be read: {words}",
            hint=hint or "start the cluster, which tells it anew",
        ) from error
    return database.recall(document)


async def check(parts: Parts) -> list[Finding]:
    """Give what every part has to say before the cluster may be protected; changes nothing.

    While a restore in place is cut off that is all there is to say: the server may be down for it, or of two states.
    """
    if unfinished := await mixed(parts.site):
        return unfinished
    bracketed = Capability.ATOMIC_GROUP not in parts.storage.capabilities
    seen = (await parts.catalog.all_settled()).keys()
    findings = await parts.database.check(parts.volumes, bracketed=bracketed, seen=seen)
    findings += await parts.storage.check(parts.volumes)
    ours = str(parts.options.catalog_path)
    claims = [await claimed.claimed_by_another(ours) for claimed in (parts.database, parts.storage)]
    findings += [taken for taken in claims if taken is not None]
    if claims[-1] is None:
        findings += await _agreement(parts)
    if (unseen := await kept.missed_log(parts.options, parts.journal)) is not None:
        findings.append(unseen)
    findings += await _other_volumes(parts)
    findings += await parts.journal.check()
    findings.append(await asyncio.to_thread(_cost, parts))
    findings += await asyncio.to_thread(surroundings.check, parts.options, parts.volumes)
    for agent in parts.agents:
        try:
            await agent.prepare(parts.volumes)
            findings.append(Finding(f"agent {agent.name}", Severity.OK, "every volume can be flushed"))
        except AgentError as error:
            findings.append(Finding(f"agent {agent.name}", Severity.REFUSED, error.message, error.hint))
    return findings


async def _agreement(parts: Parts) -> list[Finding]:
    """Give in which way catalog and storage do not agree; of a storage that cannot be read nothing."""
    with contextlib.suppress(StorageError):
        seen = (
            await look(parts.catalog, parts.storage),
            await lost(parts.catalog, parts.storage) or await look_back(parts.catalog, parts.storage),
            await kept.missed_points(parts.options, parts.catalog, parts.storage),
        )
        return [finding for finding in seen if finding is not None]
    return []


async def _other_volumes(parts: Parts) -> list[Finding]:
    """Give that the newest point is of other volumes than those that are configured now."""
    newest = await parts.catalog.latest()
    if newest is None or is_of(newest, parts.volumes):
        return []
    theirs, ours = listed(volumes_of(newest, ())), listed(parts.volumes)
    words = f"point {newest.number}, the newest, is of {theirs}, and the configuration has {ours}"
    remedy = "start the service again, which takes a new point at once; those from before stay what they are"
    return [Finding("volumes", Severity.WARNING, words, remedy)]


def _cost(parts: Parts) -> Finding:
    """Give what a day of points costs, by the room where the journal lies or will lie."""
    folder = parts.options.journal_folder
    free_bytes = host.free_bytes(folder)
    bracketed = Capability.ATOMIC_GROUP not in parts.storage.capabilities
    return costs.look(parts.options.points, parts.layout.log_file_bytes, free_bytes, bracketed=bracketed)
