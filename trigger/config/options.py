"""Every option of the service itself: its type, unit, default and meaning; parser, messages and reference are made
from here, and from the sections that drivers bring (`trigger.config.drivers`).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from cronsim import CronSim, CronSimError
from pydantic import ByteSize, Field, ValidationError, create_model, field_validator, model_validator

from trigger.config import drivers, mistakes
from trigger.config.sections import (
    AgentOptions,
    DatabaseOptions,
    DriverSection,
    Glob,
    JournalOptions,
    Name,
    RestoreOptions,
    Seconds,
    Section,
    StorageOptions,
    WholePath,
)
from trigger.errors import ConfigError
from trigger.model import EPOCH, Volume

REHEARSAL = "rehearsal"
"""The folder of rehearsals, in that for state and in that for snapshots."""


class VolumeOptions(Section):
    """One directory tree that holds part of the cluster."""

    name: Name = Field(examples=["data"])
    """What the snapshot of it is called."""
    path: WholePath = Field(examples=["/srv/bank/data"])
    """Its root; the driver of its storage says what that has to be."""
    storage: Name | None = Field(default=None, examples=["fast"])
    """Which of the `[[storages]]` keeps its snapshots; needed where there are some. It may be changed: what was cut
    before stays where it is, and is found there; so that storage has to stand here under its name."""


class OneStorage(Section):
    """One of several storages, in place of `[storage]` and with all of its options: for volumes that lie on filesystems
    of their own. No two are cut at one instant, so that points are taken inside the database's backup bracket."""

    name: Name = Field(examples=["fast"])
    """By which volumes name it."""


class CatalogOptions(Section):
    """The durable index of recovery points."""

    path: WholePath | None = Field(default=None, examples=["/var/lib/trigpoint/catalog.sqlite"])
    """The SQLite file; `<state_folder>/catalog.sqlite` if not given. Never on a protected volume."""
    keep_expired_seconds: Seconds = 30 * 86_400
    """How old an expired point becomes before no more is kept of it than its number and the outcomes of its commits,
    but for the last thousand; by `--to-point` it can be named no more then, its commits as ever."""


class PointOptions(Section):
    """When points are taken besides those that rules ask for, and how many at most."""

    min_interval_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1
    """At least this long between the beginnings of two points; commits that arrive meanwhile are coalesced."""
    max_delay_seconds: Seconds = 60
    """The longest that a budget may keep a qualifying commit waiting; it wins over the two other limits."""
    per_minute: Annotated[int, Field(ge=1, le=6000)] = 60
    """At most this many points in any sixty seconds."""
    interval_seconds: Seconds | None = Field(default=None, examples=[900])
    """Take a point this long after the last one began, whatever was committed."""
    cron: str | None = Field(default=None, examples=["0 3 * * *"])
    """Take points by this cron schedule (five fields, UTC)."""
    catch_all_seconds: Seconds | None = 300
    """Take a point where the log moved for this long without a point: it holds what no source can see."""
    restore_objective_seconds: Seconds = 30
    """Take a point whenever the log since the last base could not be replayed within this time."""
    replay_bytes_per_second: ByteSize = Field(default=ByteSize(50_000_000), gt=0, validate_default=True)
    """How fast this host replays log; `trigpoint verify` says how many bytes it replayed in which time."""
    round_seconds: Seconds = 3600
    """The longest that one round may last, the copying of what changed included; then it is given up."""
    retry_seconds: Seconds = 5
    """How long to wait after a round that failed; doubled at each failure in a row, to ten minutes at most."""

    @field_validator("cron")
    @classmethod
    def _cron_can_be_read(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                CronSim(value, EPOCH)
            except CronSimError as error:
                raise ValueError(f"{value!r} is not a cron schedule: {error}") from None
        return value

    @model_validator(mode="after")
    def _delay_leaves_room(self) -> PointOptions:
        if self.max_delay_seconds < self.min_interval_seconds:
            raise ValueError("max_delay_seconds must not be less than min_interval_seconds")
        return self


class RuleOptions(Section):
    """Which commits matter. All that a rule says must hold; a commit qualifies if one rule takes it."""

    name: Name = Field(examples=["payments"])
    """What the catalog says took the commit."""
    database: Glob = "*"
    """A glob over the name of the database."""
    tables: list[Glob] = Field(default=["*"], min_length=1)
    """Globs over `schema.table`; a commit counts with the changes in tables that match one of them."""
    operations: list[Literal["insert", "update", "delete", "truncate"]] = Field(
        default=["insert", "update", "delete", "truncate"], min_length=1
    )
    """Only these operations count."""
    least_rows: Annotated[int, Field(ge=0)] = 0
    """At least this many counting rows; a counting TRUNCATE is always enough."""
    markers: Annotated[list[Glob], Field(min_length=1)] | None = Field(default=None, examples=[["payroll-*"]])
    """Globs over markers; at least one of the commit's markers must match one. Where not all were kept, it does."""
    expression: str | None = Field(default=None, examples=["rows > 1000 || markers.exists(m, m == 'close-of-day')"])
    """A CEL expression over the facts of the commit that must be true; so is one that would take too long."""


class VerifyAssertion(Section):
    """A query that must give a certain answer on every verified point."""

    database: str = Field(examples=["bank"])
    """Where it is run."""
    sql: str = Field(examples=["select sum(balance) from accounts"])
    """The query; the first column of its first row counts, as text. It is run by a role that may read everything and
    do nothing else, and names without a schema are looked up in `public`."""
    expect: str = Field(examples=["1000000"])
    """What it must give."""


class VerifyOptions(Section):
    """What `trigpoint verify` asks of a restored point, besides what it always checks."""

    assertions: list[VerifyAssertion] = Field(default=[])
    """Queries with their expected answers."""
    deadline_seconds: Seconds = 3600
    """How long one verification may take."""


class Options(Section):
    """The whole configuration of one service, which protects one cluster."""

    # What drivers bring stands here as far as the service knows it; `shaped` puts the drivers' own in its place.

    name: Name = "main"
    """What this cluster is called, in tags and messages."""
    state_folder: WholePath = Field(examples=["/var/lib/trigpoint"])
    """For catalog, journal, control socket and lock; never on a protected volume."""
    database: DatabaseOptions
    volumes: list[VolumeOptions] = Field(min_length=1)
    agent: AgentOptions
    storage: StorageOptions
    storages: list[OneStorage] = Field(default=[])
    """A point is whole when its snapshots are there in each."""
    catalog: CatalogOptions = CatalogOptions()
    journal: JournalOptions
    points: PointOptions = PointOptions()
    rules: list[RuleOptions] = Field(default=[])
    """Without any, every commit qualifies."""
    restore: RestoreOptions
    verify: VerifyOptions = VerifyOptions()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Options:
        for what, names in (
            ("volumes.{}.name", [volume.name for volume in self.volumes]),
            ("volumes.{}.path", [str(volume.path) for volume in self.volumes]),
            ("storages.{}.name", [storage.name for storage in self.storages]),
            ("storages.{}.folder", [str(folder) for folder in self.storage_folders]),
            ("rules.{}.name", [rule.name for rule in self.rules]),
            ("database.databases.{}", self.database.databases),
        ):
            for index, name in enumerate(names):
                if name in names[:index]:
                    raise ValueError(f"{what.format(index)}: {name} is there twice")
        return self

    @model_validator(mode="after")
    def _what_we_write_is_not_protected(self) -> Options:
        """What lies on a protected volume would be rolled back with it, and be copied into every snapshot."""
        for what, path in (
            ("state_folder", self.state_folder),
            *self._storage_folders,
            ("catalog.path", self.catalog_path),
            ("journal.folder", self.journal_folder),
        ):
            for volume in self.volumes:
                if path.is_relative_to(volume.path):
                    raise ValueError(f"{what}: {path} lies inside the protected volume {volume.name} ({volume.path})")
        return self

    @model_validator(mode="after")
    def _what_we_write_is_no_rehearsals(self) -> Options:
        for what, folder in (
            ("state_folder", self.state_folder),
            *self._storage_folders,
            ("catalog.path", self.catalog_path.parent),
            ("journal.folder", self.journal_folder),
        ):
            if folder.name == REHEARSAL:
                raise ValueError(f"{what}: {folder}: must not be called {REHEARSAL}: what a rehearsal makes lies there")
        return self

    @model_validator(mode="after")
    def _volumes_have_a_storage(self) -> Options:
        names = [storage.name for storage in self.storages]
        for index, volume in enumerate(self.volumes):
            if names and volume.storage is None:
                raise ValueError(f"volumes.{index}.storage: is needed with [[storages]], one of {', '.join(names)}")
            if volume.storage is not None and volume.storage not in names:
                known = f"there are {', '.join(names)}" if names else "there is one [storage], without a name"
                raise ValueError(f"volumes.{index}.storage: there is no storage {volume.storage}: {known}")
        return self

    @model_validator(mode="after")
    def _rules_can_match(self) -> Options:
        for index, rule in enumerate(self.rules):
            if not any(fnmatchcase(name, rule.database) for name in self.database.databases):
                known = ", ".join(self.database.databases)
                raise ValueError(
                    f"rules.{index}.database: {rule.database} matches none of database.databases ({known})"
                )
        return self

    @property
    def catalog_path(self) -> Path:
        """Where the catalog lies."""
        return self.catalog.path or self.state_folder / "catalog.sqlite"

    @property
    def journal_folder(self) -> Path:
        """Where the journal lies."""
        return self.journal.folder or self.state_folder / "journal"

    @property
    def stores(self) -> dict[str, StorageOptions]:
        """Every storage by its name; "" where there is one alone."""
        several: dict[str, Any] = {storage.name: storage for storage in self.storages}
        return several or {"": self.storage}

    @property
    def storage_folders(self) -> tuple[Path, ...]:
        """The folder of every storage."""
        return tuple(store.folder for store in self.stores.values())

    @property
    def _storage_folders(self) -> list[tuple[str, Path]]:
        """The folder of every storage, with the option that says it."""
        named = [f"storages.{index}.folder" for index, _ in enumerate(self.storages)] or ["storage.folder"]
        return list(zip(named, self.storage_folders, strict=True))

    @property
    def volume_list(self) -> tuple[Volume, ...]:
        """The volumes, as the ports take them."""
        return tuple(Volume(v.name, str(v.path)) for v in self.volumes)

    @property
    def guarded_files(self) -> tuple[Path, ...]:
        """The files named here that nobody else may write or replace, by the word of the drivers' own sections."""
        one_each: list[DriverSection] = [getattr(self, table) for table in drivers.TABLES if table != "storage"]
        return tuple(path for section in (*one_each, *self.stores.values()) for path in section.guarded_files)


def shaped(document: Mapping[str, Any]) -> type[Options]:
    """Give the options as the drivers have them that a configuration names; one that is unknown is left to be refused.

    Raises:
        ConfigError: no journal goes with the database that it names.
    """
    return _shaped(tuple(drivers.named(document).items()), tuple(drivers.storages_named(document)))


@lru_cache(maxsize=64)
def _shaped(
    sections: tuple[tuple[str, type[DriverSection]], ...], storages: tuple[type[DriverSection], ...]
) -> type[Options]:
    tables: dict[str, Any] = {}
    for table, section in sections:
        needed = any(field.is_required() for field in section.model_fields.values())
        tables[table] = (section, ... if needed else section())
    if storages:
        each = tuple(create_model(one.__name__, __base__=(OneStorage, one), __module__=__name__) for one in storages)
        tables |= {"storage": (None, None), "storages": (tuple.__class_getitem__(each), ...)}
    return create_model("Options", __base__=Options, __module__=__name__, **tables)


def load(path: Path) -> Options:
    """Give the options in the TOML file `path`.

    Raises:
        ConfigError: it cannot be read or is wrong; every mistake is named with its place, an unknown key with the
            nearest known one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
            hint="`trigpoint init` writes a configuration for a running cluster",
        ) from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Options:
    """Give the options in TOML `text`; `name` stands in messages. Raises `ConfigError` as `load` does."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        where = f"{name}:{line[1]}" if line else name
        raise ConfigError(f"{where}: not TOML: {error}", hint="text stands in quotes; see https://toml.io") from None
    try:
        model = shaped(document)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.message}", hint=error.hint) from None
    try:
        # Strict, and by way of JSON, where a path may be a string: `true` is no number of seconds, "5" is none either.
        return model.model_validate_json(json.dumps(document, default=str), strict=True)
    except ValidationError as error:
        found = [mistakes.explain(text, name, mistake, model) for mistake in error.errors(include_url=False)]
        raise ConfigError(
            "\n".join(found), hint="`trigpoint config reference` lists every option with its meaning"
        ) from None


def reached(driver: str | None, at: str | None, environment: Mapping[str, str]) -> DatabaseOptions:
    """Give the section by which a cluster is looked at before there is a configuration; see `DatabaseOptions.reached`.

    Raises:
        ConfigError: there is no such driver (the usual one is meant by None), or the cluster cannot be reached so.
    """
    section = drivers.database_section(driver)
    try:
        return section.reached(at, environment)
    except ValidationError as error:
        found = [mistakes.say(mistake, section) for mistake in error.errors(include_url=False)]
        raise ConfigError("\n".join(found)) from None
