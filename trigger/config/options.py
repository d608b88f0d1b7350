"""Every option once: its type, unit, default and meaning; parser, messages and reference are made from here."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from trigger.config.toml_lines import Place, line_of
from trigger.errors import ConfigError
from trigger.model import EPOCH, Volume


def _whole(path: Path) -> Path:
    """Refuse a path that means something else in another working directory, or that only looks contained."""
    if not path.is_absolute():
        raise ValueError(f"{path}: paths must begin with /")
    if ".." in path.parts:
        raise ValueError(f"{path}: paths must not contain ..")
    return path


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
WholePath = Annotated[Path, AfterValidator(_whole)]
Glob = Annotated[str, Field(min_length=1)]
DatabaseName = Annotated[str, Field(min_length=1, max_length=63)]

_SECRET = re.compile(
    r"(?i)(?:^|[\s?&])(password|sslpassword|scram_client_key|scram_server_key|oauth_client_secret)\s*="
)
_URI = re.compile(r"(?i)postgres(?:ql)?://")
_URI_WITH_PASSWORD = re.compile(r"(?i)postgres(?:ql)?://[^/@]*:[^/@]*@")


def _decoded(uri: str) -> str:
    return re.sub("%([0-9a-fA-F]{2})", lambda code: chr(int(code[1], 16)), uri)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DatabaseOptions(_Section):
    """The cluster whose commits are protected."""

    driver: Literal["postgres"] = "postgres"
    """What kind of database it is."""
    conninfo: str = Field(examples=["host=/var/run/postgresql user=postgres"])
    """How to reach it, as libpq says it, without secrets: `host=/var/run/postgresql user=trigpoint`."""
    databases: list[DatabaseName] = Field(min_length=1, examples=[["bank"]])
    """The databases whose commits are watched, one stream each."""
    password_file: WholePath | None = Field(default=None, examples=["/etc/trigpoint/pgpass"])
    """A file in libpq's password-file format, readable by us alone."""
    bin_directory: WholePath | None = Field(default=None, examples=["/usr/lib/postgresql/15/bin"])
    """Where the server's own programs lie (pg_receivewal, postgres, pg_amcheck); found by itself if not given."""
    slot_prefix: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,30}$")] = "trigpoint"
    """Slots and publications are called `<prefix>_<database>`, the journal's slot `<prefix>_journal`."""
    deadline_seconds: Seconds = 10
    """How long a question to the server may take."""
    failover: bool = False
    """Version 17 and later: have the streams' slots kept on standbys too; commits then wait for those that
    `synchronized_standby_slots` names, and none is seen while one of them is down."""

    @field_validator("conninfo")
    @classmethod
    def _conninfo_bears_no_password(cls, value: str) -> str:
        named = _SECRET.search(_decoded(value) if _URI.match(value) else value)  # a URI may encode keywords, too
        if _URI_WITH_PASSWORD.match(value) or (named and named[1].lower() == "password"):
            raise ValueError("must not hold a password; put it into a file and name that in password_file")
        if named:
            where = "a file of libpq's connection services (service=…, PGSERVICEFILE) that only its user can read"
            raise ValueError(f"must not hold {named[1].lower()}, which is a secret; put it into {where}")
        return value


class VolumeOptions(_Section):
    """One directory tree that holds part of the cluster."""

    name: Name = Field(examples=["data"])
    """What the snapshot of it is called."""
    path: WholePath = Field(examples=["/var/lib/postgresql/15/main"])
    """Its root: a btrfs subvolume, or any directory for storage `directory`."""


class AgentOptions(_Section):
    """The client that flushes what the host still holds in memory."""

    driver: Literal["local"] = "local"
    """How the host is reached."""
    deadline_seconds: Seconds = 30
    """How long a flush may take before the round is given up."""
    hooks: WholePath | None = Field(default=None, examples=["/etc/trigpoint/hooks.toml"])
    """A root-owned TOML file that names programs to run before or after the flush."""


class StorageOptions(_Section):
    """Where snapshots are kept."""

    driver: Literal["directory", "btrfs"] = "directory"
    """`btrfs` cuts atomically and at once; `directory` copies what changed, on any filesystem."""
    folder: WholePath = Field(examples=["/var/lib/trigpoint/snapshots"])
    """The folder for snapshots and clones; for btrfs on the filesystem of the volumes."""
    budget: Annotated[int, Field(ge=2, le=100_000)] = 200
    """How many snapshots may exist; from nine tenths of it on older ones are thinned, which loses no commit."""
    keep_free: ByteSize = Field(default=ByteSize(1 << 30), validate_default=True)
    """No snapshot is made while less than this is free: it would succeed, and the database stop."""
    paranoid: bool = False
    """`directory` only: compare the content of every file instead of trusting time stamps."""


class CatalogOptions(_Section):
    """The durable index of recovery points."""

    path: WholePath | None = Field(default=None, examples=["/var/lib/trigpoint/catalog.sqlite"])
    """The SQLite file; `<state_folder>/catalog.sqlite` if not given. Never on a protected volume."""


class JournalOptions(_Section):
    """The log, kept so that every commit between two snapshots can be replayed."""

    driver: Literal["receivewal", "archive"] = "receivewal"
    """`receivewal` keeps it with PostgreSQL's own program; `archive` copies it out of an archive
    that exists already, in which it changes nothing."""
    folder: WholePath | None = Field(default=None, examples=["/var/lib/trigpoint/journal"])
    """Where segments are kept; `<state_folder>/journal` if not given. Never on a protected volume."""
    restore_command: str | None = Field(default=None, examples=["cp /srv/archive/%f %p"])
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


class RuleOptions(_Section):
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
    """Globs over markers; at least one of the commit's markers must match one."""
    expression: str | None = Field(default=None, examples=["rows > 1000 || markers.exists(m, m == 'close-of-day')"])
    """A CEL expression over the facts of the commit that must be true; so is one that would take too long."""


class VerifyAssertion(_Section):
    """A query that must give a certain answer on every verified point."""

    database: str = Field(examples=["bank"])
    """Where it is run."""
    sql: str = Field(examples=["select sum(balance) from accounts"])
    """The query; the first column of its first row counts, as text. It is run by a role that may read everything and
    do nothing else, and names without a schema are looked up in `public`."""
    expect: str = Field(examples=["1000000"])
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
    superuser: Annotated[str, Field(min_length=1, max_length=63)] = "postgres"
    """The role with which clones are prepared and proven; a superuser of the cluster."""
    keep_libraries: list[str] = []
    """Entries of shared_preload_libraries that clones load too; none by default, so that nothing runs by itself."""


class Options(_Section):
    """The whole configuration of one service, which protects one cluster."""

    name: Name = "main"
    """What this cluster is called, in tags and messages."""
    state_folder: WholePath = Field(examples=["/var/lib/trigpoint"])
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
    def _names_are_unique(self) -> Options:
        for what, names in (
            ("volumes.{}.name", [volume.name for volume in self.volumes]),
            ("volumes.{}.path", [str(volume.path) for volume in self.volumes]),
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
            ("storage.folder", self.storage.folder),
            ("catalog.path", self.catalog_path),
            ("journal.folder", self.journal_folder),
        ):
            for volume in self.volumes:
                if path.is_relative_to(volume.path):
                    raise ValueError(f"{what}: {path} lies inside the protected volume {volume.name} ({volume.path})")
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
        # Strict, and by way of JSON, where a path may be a string: `true` is no number of seconds, "5" is none either.
        return Options.model_validate_json(json.dumps(tomllib.loads(text), default=str), strict=True)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        where = f"{name}:{line[1]}" if line else name
        raise ConfigError(f"{where}: not TOML: {error}", hint="text stands in quotes; see https://toml.io") from None
    except ValidationError as error:
        mistakes = [_explain(text, name, mistake) for mistake in error.errors(include_url=False)]
        raise ConfigError(
            "\n".join(mistakes), hint="`trigpoint config reference` lists every option with its meaning"
        ) from None


def place_in(path: Path, message: str) -> str:
    """Give `file:line: ` of the option that `message` begins with (`rules.0.expression …`); the line if it is known."""
    place = _named_place(message)
    line = line_of(path.read_text(), place) if place else None
    return f"{path}:{line}: " if line else f"{path}: "


def _named_place(message: str) -> Place:
    named = re.match(r"[a-z_]+(?:\.[a-z_0-9]+)*(?=[: ])", message)
    return tuple(int(part) if part.isdigit() else part for part in named[0].split(".")) if named else ()


def _explain(text: str, name: str, mistake: ErrorDetails) -> str:
    """Give `file:line: place: what is wrong`; the line is left out where the file does not have the place."""
    place, message = mistake["loc"], _message(mistake)
    if not place and (place := _named_place(message)):
        message = message.partition(": ")[2]
    line = line_of(text, place)
    where = f"{name}:{line}" if line else name
    return f"{where}: {'.'.join(map(str, place))}: {message}" if place else f"{where}: {message}"


def _message(mistake: ErrorDetails) -> str:
    """Give what is wrong in words that do not ask for a knowledge of pydantic; never a value that may be a secret."""
    kind, place, context = mistake["type"], mistake["loc"], mistake.get("ctx", {})
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), _keys_at(place[:-1]), n=1)
        return "there is no such key" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "missing":
        return "is needed and not there"
    dotted = ".".join(map(str, place))
    wanted = {
        "literal_error": f"must be {context.get('expected')}",
        "string_pattern_mismatch": "must be lower-case letters, digits and -, beginning with a letter or digit, "
        "40 at most"
        if "-]" in str(context.get("pattern"))
        else f"must match {context.get('pattern')}",
        "greater_than": f"must be more than {context.get('gt', 0):g}",
        "greater_than_equal": f"must be {context.get('ge', 0):g} or more",
        "less_than_equal": f"must be {context.get('le', 0):g} or less",
        "finite_number": "must be a finite number",
        "too_short": "must not be empty",
        "string_too_short": "must not be empty",
        "string_too_long": f"must have {context.get('max_length')} characters at most",
        "byte_size": 'must be a number of bytes or a text such as "10GiB"',
        "byte_size_unit": 'must be a number of bytes or a text such as "10GiB"',
        "string_type": "must be text in quotes",
        "path_type": "must be text in quotes",
        "float_type": "must be a number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "bool_type": "must be true or false",
        "list_type": f"must be a list of tables, each under [[{dotted}]]"
        if isinstance(mistake["input"], dict)
        else "must be a list in [ ]",
        "model_type": f"must be a table, such as [{dotted}]",
    }.get(kind, mistake["msg"].removeprefix("Value error, "))
    value = mistake["input"]
    shown = isinstance(value, str | int | float) and kind not in _SAYS_IT_ALL and place[-1:] != ("conninfo",)
    return f"{wanted}, not {json.dumps(value)[:80]}" if shown else wanted


_SAYS_IT_ALL = ("value_error", "too_short", "string_too_short")
"""Mistakes whose message shows the value already, or has none to show."""


def _keys_at(place: Place) -> list[str]:
    """Give the keys of the section at `place`."""
    section: Any = Options
    for part in place:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = annotation.__args__[0] if getattr(annotation, "__args__", None) else annotation
    return list(section.model_fields)
