"""What a configuration says of a PostgreSQL cluster, its journal and its clones; light, and without psycopg."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator

from trigger.config.sections import DatabaseOptions, JournalOptions, RestoreOptions, WholePath

_SECRET = re.compile(
    r"(?i)(?:^|[\s?&])(password|sslpassword|scram_client_key|scram_server_key|oauth_client_secret)\s*="
)
_URI = re.compile(r"(?i)postgres(?:ql)?://")
_URI_WITH_PASSWORD = re.compile(r"(?i)postgres(?:ql)?://[^/@]*:[^/@]*@")
PASSING = ("_rehearsal", "_try")
"""What stands behind the prefix of what a rehearsal, or a trial of rules, makes for a while."""
_NAME_IN_PREFIX = 16
"""How much of a service's name stands in the prefix that is made of it."""


def _decoded(uri: str) -> str:
    return re.sub("%([0-9a-fA-F]{2})", lambda code: chr(int(code[1], 16)), uri)


class PostgresOptions(DatabaseOptions):
    """A cluster of PostgreSQL, version 15 or later."""

    conninfo: str = Field(repr=False, examples=["host=/var/run/postgresql user=postgres"])
    """How to reach it, as libpq says it, without secrets: `host=/var/run/postgresql user=trigpoint`."""
    databases: list[Annotated[str, Field(min_length=1, max_length=63)]] = Field(min_length=1, examples=[["bank"]])
    """The databases whose commits are watched, one stream each; a byte that is no UTF-8 is written `\\xe4`."""
    password_file: WholePath | None = Field(default=None, examples=["/etc/trigpoint/pgpass"])
    """A file in libpq's password-file format, readable by us alone."""
    bin_directory: WholePath | None = Field(default=None, examples=["/usr/lib/postgresql/15/bin"])
    """Where the server's own programs lie (pg_receivewal, postgres, pg_amcheck); found by itself if not given."""
    slot_prefix: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,30}$")] = "trigpoint"
    """Slots and publications are called `<prefix>_<database>`, the journal's slot `<prefix>_journal`."""
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

    @field_validator("slot_prefix")
    @classmethod
    def _prefix_is_no_rehearsals(cls, value: str) -> str:
        if value.endswith(PASSING):
            raise ValueError(f"must not end in {' or '.join(PASSING)}: what a rehearsal or a trial makes is called so")
        return value

    @property
    def guarded_files(self) -> tuple[Path, ...]:
        """The password file."""
        return (self.password_file,) if self.password_file else ()

    def apart(self, name: str, number: int) -> Self:
        """Give the section with a prefix of the service's own, which begins like nobody else's."""
        own = re.sub(r"[^a-z0-9_]", "_", f"{name[:_NAME_IN_PREFIX]}{number if number > 1 else ''}")
        prefix = f"{'_' if own[0].isdigit() else ''}{own}_trigpoint"
        return self.model_copy(update={"slot_prefix": prefix})

    @property
    def address(self) -> str:
        """The connection string, which holds no secret."""
        return self.conninfo

    @classmethod
    def reached(cls, at: str | None, environment: Mapping[str, str]) -> Self:
        """Give the section of a cluster by a connection string, or by libpq's variables; through `postgres`.

        It is written out complete, since a service does not have the variables.
        """
        user = environment.get("PGUSER", "postgres")
        port = f" port={environment['PGPORT']}" if "PGPORT" in environment else ""
        usual = f"host={environment.get('PGHOST', '/var/run/postgresql')}{port} user={user}"
        return cls.model_validate({"conninfo": at or usual, "databases": ["postgres"]})


class ReceivewalOptions(JournalOptions):
    """Kept by PostgreSQL's own program `pg_receivewal`."""

    of = ("postgres",)


class ArchiveOptions(JournalOptions):
    """Copied out of an archive that exists already, in which nothing is changed."""

    of = ("postgres",)

    restore_command: str = Field(examples=["cp /srv/archive/%f %p"])
    """The archive's own command with %f and %p, as PostgreSQL would run it."""


class CloneOptions(RestoreOptions):
    """Servers of PostgreSQL, beside the running one."""

    superuser: Annotated[str, Field(min_length=1, max_length=63)] | None = Field(default=None, examples=["postgres"])
    """The role with which clones are prepared and proven, a superuser; the cluster's first one if not given."""
    keep_libraries: list[str] = Field(default=[])
    """Entries of shared_preload_libraries that clones load too; none by default, so that nothing runs by itself."""
