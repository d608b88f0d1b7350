"""Every option once: its type, unit, default and meaning; parser, messages and reference are made from here."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from cronsim import CronSim, CronSimError
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from trigger.errors import ConfigError
from trigger.model import EPOCH, Volume

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DatabaseOptions(_Section):
    """The cluster whose commits are protected."""

    driver: Literal["postgres"] = "postgres"
    """What kind of database it is."""
    conninfo: str
    """How to reach it, as libpq says it, without a password: `host=/var/run/postgresql user=trigpoint`."""
    databases: list[str] = Field(min_length=1)
    """The databases whose commits are watched, one stream each."""
    password_file: Path | None = None
    """A file in libpq's password-file format, readable by us alone."""
    bin_directory: Path | None = None
    """Where the server's own programs lie (pg_receivewal, postgres, pg_amcheck); found by itself if not given."""
    slot_prefix: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,30}$")] = "trigpoint"
    """Slots and publications are called `<prefix>_<database>`, the journal's slot `<prefix>_journal`."""
    deadline_seconds: Seconds = 10
    """How long a question to the server may take."""


class VolumeOptions(_Section):
    """One directory tree that holds part of the cluster."""

    name: Name
    """What the snapshot of it is called."""
    path: Path
    """Its root: a btrfs subvolume, or any directory for storage `directory`."""


class AgentOptions(_Section):
    """The client that flushes what the host still holds in memory."""

    driver: Literal["local"] = "local"
    """How the host is reached."""
    deadline_seconds: Seconds = 30
    """How long a flush may take before the round is given up."""
    hooks: Path | None = None
    """A root-owned TOML file that names programs to run before or after the flush."""


class StorageOptions(_Section):
    """Where snapshots are kept."""

    driver: Literal["directory", "btrfs"] = "directory"
    """`btrfs` cuts atomically and at once; `directory` copies what changed, on any filesystem."""
    folder: Path
    """The folder for snapshots and clones; for btrfs on the filesystem of the volumes."""
    budget: Annotated[int, Field(ge=2, le=100_000)] = 200
    """How many snapshots may exist; at the limit no more are made and the operator is told."""
    keep_free: ByteSize = Field(default=ByteSize(1 << 30), validate_default=True)
    """No snapshot is made while less than this is free: it would succeed, and the database stop."""
    paranoid: bool = False
    """`directory` only: compare the content of every file instead of trusting time stamps."""


class CatalogOptions(_Section):
    """The durable index of recovery points."""

    path: Path | None = None
    """The SQLite file; `<state_folder>/catalog.sqlite` if not given. Never on a protected volume."""


class JournalOptions(_Section):
    """The log, kept so that every commit between two snapshots can be replayed."""

    driver: Literal["receivewal", "archive"] = "receivewal"
    """`receivewal` keeps it with PostgreSQL's own program; `archive` reads an archive that exists already."""
    folder: Path | None = None
    """Where segments are kept; `<state_folder>/journal` if not given. Never on a protected volume."""
    restore_command: str | None = None
    """`archive` only: the archive's own command with %f and %p, as PostgreSQL would run it."""

    @model_validator(mode="after")
    def _command_belongs_to_archive(self) -> JournalOptions:
        if (self.driver == "archive") != (self.restore_command is not None):
            raise ValueError('restore_command is needed with driver = "archive", and only there')
        return self


class PointOptions(_Section):
    """When points are taken besides those that rules ask for, and how many at most."""

    min_interval_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1
    """At least this long between the beginnings of two points; commits that arrive meanwhile are coalesced."""
    max_delay_seconds: Seconds = 60
    """The longest that a budget may keep a qualifying commit waiting; it wins over the two other limits."""
    per_minute: Annotated[int, Field(ge=1, le=6000)] = 60
    """At most this many points in any sixty seconds."""
    interval_seconds: Seconds | None = None
    """Take a point this long after the last one began, whatever was committed."""
    cron: str | None = None
    """Take points by this cron schedule (five fields, UTC)."""
    catch_all_seconds: Seconds | None = 300
    """Take a point where the log moved for this long without a point: it holds what no source can see."""
    restore_objective_seconds: Seconds = 30
    """Take a point whenever the log since the last base could not be replayed within this time."""
    replay_bytes_per_second: ByteSize = Field(default=ByteSize(50_000_000), validate_default=True)
    """How fast this host replays log; `trigpoint verify` measures it."""
    retry_seconds: Seconds = 5
    """How long to wait after a round that failed; doubled at each failure in a row, to ten minutes at most."""

    @field_validator("cron")
    @classmethod
    def _cron_can_be_read(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                CronSim(value, EPOCH)
            except CronSimError as error:
                raise ValueError(f"not a cron schedule: {error}") from None
        return value

    @model_validator(mode="after")
    def _delay_leaves_room(self) -> PointOptions:
        if self.max_delay_seconds < self.min_interval_seconds:
            raise ValueError("max_delay_seconds must not be less than min_interval_seconds")
        return self


class RuleOptions(_Section):
    """Which commits matter. All that a rule says must hold; a commit qualifies if one rule takes it."""

    name: Name
    """What the catalog says took the commit."""
    database: str = "*"
    """A glob over the name of the database."""
    tables: list[str] = ["*"]
    """Globs over `schema.table`; a commit counts with the changes in tables that match one of them."""
    operations: list[Literal["insert", "update", "delete", "truncate"]] = [
        "insert",
        "update",
        "delete",
        "truncate",
    ]
    """Only these operations count."""
    least_rows: Annotated[int, Field(ge=0)] = 0
    """At least this many counting rows; a counting TRUNCATE is always enough."""
    markers: list[str] | None = None
    """Globs over markers; at least one of the commit's markers must match one."""
    expression: str | None = None
    """A CEL expression over the facts of the commit that must be true."""


class VerifyAssertion(_Section):
    """A query that must give a certain answer on every verified point."""

    database: str
    """Where it is run."""
    sql: str
    """The query; the first column of its first row counts, as text."""
    expect: str
    """What it must give."""


class VerifyOptions(_Section):
    """What `trigpoint verify` asks of a restored point, besides what it always checks."""

    assertions: list[VerifyAssertion] = []
    """Queries with their expected answers."""
    deadline_seconds: Seconds = 3600
    """How long one verification may take."""


class RestoreOptions(_Section):
    """How clones come up."""

    deadline_seconds: Seconds = 3600
    """How long the replay may take."""
    keep_libraries: list[str] = []
    """Entries of shared_preload_libraries that clones load too; none by default, so that nothing runs by itself."""


class Options(_Section):
    """The whole configuration of one service, which protects one cluster."""

    name: Name = "main"
    """What this cluster is called, in tags and messages."""
    state_folder: Path
    """For catalog, journal, control socket and lock; never on a protected volume."""
    database: DatabaseOptions
    volumes: list[VolumeOptions] = Field(min_length=1)
    agent: AgentOptions = AgentOptions()
    storage: StorageOptions
    catalog: CatalogOptions = CatalogOptions()
    journal: JournalOptions = JournalOptions()
    points: PointOptions = PointOptions()
    rules: list[RuleOptions] = []
    """Without any, every commit qualifies."""
    restore: RestoreOptions = RestoreOptions()
    verify: VerifyOptions = VerifyOptions()

    @model_validator(mode="after")
    def _names_are_unique_and_paths_whole(self) -> Options:
        for what, names in (
            ("volumes", [v.name for v in self.volumes]),
            ("rules", [r.name for r in self.rules]),
            ("database.databases", self.database.databases),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what}: {', '.join(sorted(twice))} is there twice")
        for path in (self.state_folder, self.storage.folder, *(v.path for v in self.volumes)):
            if not path.is_absolute():
                raise ValueError(f"{path}: paths must begin with /")
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
    def volume_list(self) -> tuple[Volume, ...]:
        """The volumes, as the ports take them."""
        return tuple(Volume(v.name, str(v.path)) for v in self.volumes)


def load(path: Path) -> Options:
    """Give the options in the TOML file `path`.

    Raises:
        ConfigError: it cannot be read or is wrong; every mistake is named with its place, an unknown key with the
            nearest known one.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
            hint="`trigpoint init` writes a configuration for a running cluster",
        ) from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Options:
    """Give the options in TOML `text`; `name` stands in messages. Raises `ConfigError` as `load` does."""
    try:
        return Options.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not TOML: {error}") from None
    except ValidationError as error:
        mistakes = [_explain(mistake["loc"], mistake["type"], mistake["msg"]) for mistake in error.errors()]
        raise ConfigError("\n".join(f"{name}: {mistake}" for mistake in mistakes)) from None


def _explain(place: tuple[int | str, ...], kind: str, message: str) -> str:
    dotted = ".".join(str(part) for part in place)
    if kind != "extra_forbidden":
        return (
            f"{dotted}: {message.removeprefix('Value error, ')}"
            if dotted
            else message.removeprefix("Value error, ")
        )
    near = difflib.get_close_matches(str(place[-1]), _keys_at(place[:-1]), n=1)
    return f"{dotted}: there is no such key" + (f"; did you mean {near[0]}?" if near else "")


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    section: Any = Options
    for part in place:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = annotation.__args__[0] if getattr(annotation, "__args__", None) else annotation
    return list(section.model_fields)
