"""What sections of the configuration are made of: the types of options, and the tables that a driver brings, as far as
the service itself asks something of them.

A driver derives the section of its port, adds its own options with their meaning below each, and is built from it:

    class BtrfsOptions(StorageOptions):
        \"""Cuts atomically and at once.\"""

        compress: bool = False
        \"""Whether ...\"""

An option whose value may hold a secret is declared with `Field(repr=False)`: no message shows it. One that is only
read so that older files go on is declared with `Field(deprecated=...)`: no reference shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, create_model

from trigger.errors import ConfigError


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


class Section(BaseModel):
    """One table of the file; a key that it does not have is an error."""

    # Built when it is first read by: most sections are there to be derived from, and every command pays for the others.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class DriverSection(Section):
    """A table that a driver brings; what it is derived from says for which port."""

    of: ClassVar[tuple[str, ...]] = ()
    """The drivers of databases that it goes with; any, where none is named."""

    @property
    def guarded_files(self) -> tuple[Path, ...]:
        """The files named here that hold secrets, or say what is run: nobody else may write or replace them."""
        return ()


class DatabaseOptions(DriverSection):
    """The cluster whose commits are protected."""

    driver: str
    """What kind of database it is."""
    databases: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, examples=[["bank"]])
    """The databases whose commits are watched, one stream each."""
    deadline_seconds: Seconds = 10
    """How long a question to the server may take."""

    @classmethod
    def reached(cls, at: str | None, environment: Mapping[str, str]) -> Self:  # noqa: ARG003 - for those that can
        """Give the section by which a cluster is looked at before there is a configuration, for `trigpoint init`.

        What is set in it is written into the configuration; its `databases` are those that every cluster has, and that
        are watched only where there is no other.

        Args:
            at: how to reach it, in the driver's own words; None for what the environment says, or the usual place.
            environment: the variables of the environment.

        Raises:
            ConfigError: it cannot be reached so, or the driver cannot look before there is a configuration.
        """
        raise ConfigError(
            "this kind of database has to be configured by hand", hint="`trigpoint config reference` lists every option"
        )

    def apart(self, name: str, number: int) -> Self:  # noqa: ARG002 - for those that make something
        """Give the section of another service, called `name`, whose names in the database are its own.

        Args:
            name: what the service is called.
            number: counts what was given for that name, from 1; each is another.
        """
        return self

    @property
    def address(self) -> str:
        """How it is reached, for people, without secrets."""
        return self.driver


class AgentOptions(DriverSection):
    """The client that flushes what the host still holds in memory."""

    driver: str
    """How the host is reached."""
    deadline_seconds: Seconds = 30
    """How long a flush may take before the round is given up."""


class StorageOptions(DriverSection):
    """Where snapshots are kept."""

    driver: str
    """How snapshots are made."""
    folder: WholePath = Field(examples=["/var/lib/trigpoint/snapshots"])
    """The folder for snapshots and clones; outside every volume."""
    budget: Annotated[int, Field(ge=2, le=100_000)] = 200
    """How many snapshots may exist; from nine tenths of it on older ones are thinned, which loses no commit."""
    keep_free: ByteSize = Field(default=ByteSize(1 << 30), validate_default=True)
    """No snapshot is made while less than this is free: it would succeed, and the database stop."""


class JournalOptions(DriverSection):
    """The log, kept so that every commit between two snapshots can be replayed."""

    driver: str
    """How it is kept."""
    folder: WholePath | None = Field(default=None, examples=["/var/lib/trigpoint/journal"])
    """Where it is kept; `<state_folder>/journal` if not given. Never on a protected volume."""


class RestoreOptions(DriverSection):
    """How clones come up."""

    deadline_seconds: Seconds = 3600
    """How long the replay may take."""


@lru_cache(maxsize=256)
def choosing(section: type[DriverSection], names: tuple[str, ...], name: str) -> type[DriverSection]:
    """Give a section whose `driver` is one of `names`, and `name` if not given; as it is where it has no such key."""
    asked = section.model_fields.get("driver")
    if asked is None:
        return section
    choice: Any = Literal.__getitem__(names)
    driver: Any = (choice, name)
    return create_model(section.__name__, __base__=section, __module__=section.__module__, driver=driver)
