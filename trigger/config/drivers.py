"""The door to the drivers: what makes one, and the section that it brings, by its name in a configuration.

Light, so that a command which only reads the catalog does not load what connects: a section stands in a module that
does without its driver's library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from connectors import DRIVERS
from trigger.config.sections import (
    AgentOptions,
    DatabaseOptions,
    DriverSection,
    JournalOptions,
    RestoreOptions,
    StorageOptions,
    choosing,
)
from trigger.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the configuration that a driver brings."""

    kind: str
    """Of which kind the drivers are that bring it."""
    base: type[DriverSection]
    """What the service asks of it, whoever brings it."""
    chosen_in: str
    """The table whose `driver` says who brings it."""

    @property
    def chosen_by(self) -> str:
        """The option that says who brings it."""
        return f"{self.chosen_in}.driver"


TABLES = {
    "database": Table("database", DatabaseOptions, "database"),
    "agent": Table("agent", AgentOptions, "agent"),
    "storage": Table("storage", StorageOptions, "storage"),
    "journal": Table("journal", JournalOptions, "journal"),
    "restore": Table("recovery", RestoreOptions, "database"),
}
"""The tables that drivers bring, by name."""


def know_places() -> None:
    """Load the form of places of every kind of database, so that they are written and read as its users do."""
    for name in names("places"):
        driver("places", name)


def names(kind: str) -> tuple[str, ...]:
    """Give the drivers of a kind; the first of them is meant where a configuration names none."""
    return tuple(name.removeprefix(f"{kind}/") for name in DRIVERS if name.startswith(f"{kind}/"))


def driver(kind: str, name: str) -> Any:
    """Give what makes the driver `kind/name`; raises `ConfigError` where its library is not installed."""
    module, _, attribute = DRIVERS[f"{kind}/{name}"].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"driver {name} needs the package {error.name}",
            hint=f"pip install 'trigpoint[{name.rpartition('/')[2]}]'",
        ) from error


def brought(table: str, database: str | None = None) -> dict[str, type[DriverSection]]:
    """Give the sections that drivers bring for a table, by driver, the usual one first.

    Only those that go with a driver of databases, if one is named. A driver that brings none has what the service asks.
    """
    kind, base = TABLES[table].kind, TABLES[table].base
    own = {name: driver("options", f"{kind}/{name}") for name in names(f"options/{kind}")}
    sections = {name: own.get(name, base) for name in names(kind)}
    if database is None:
        return sections
    if TABLES[table].chosen_in == "database" != table:
        return {database: sections.get(database, base)}
    return {name: section for name, section in sections.items() if not section.of or database in section.of}


def having(table: str, key: str) -> tuple[str, ...]:
    """Give the drivers whose section for a table has `key`; nothing where all of them have it."""
    sections = brought(table)
    found = tuple(name for name, section in sections.items() if key in keys(section))
    return () if len(found) == len(sections) else found


def keys(section: type[Any]) -> tuple[str, ...]:
    """Give the keys of a section, without those that are read only so that older files go on."""
    return tuple(key for key, field in section.model_fields.items() if not field.deprecated)


def named(document: Mapping[str, Any]) -> dict[str, type[DriverSection]]:
    """Give by table the section of the driver that a configuration names; a name that is none is left to the section.

    Raises:
        ConfigError: nothing goes with the database that it names.
    """
    database = _named(document, "database", tuple(brought("database")))
    found = {}
    for name, table in TABLES.items():
        sections = brought(name, database)
        if not sections:
            raise ConfigError(f'{name}: no driver goes with database.driver = "{database}"')
        wanted = _named(document, table.chosen_in, tuple(sections))
        found[name] = choosing(sections[wanted], tuple(sections), wanted)
    return found


def storages_named(document: Mapping[str, Any]) -> Iterator[type[DriverSection]]:
    """Give the sections of the drivers that a configuration names in its several storages, in their order."""
    sections, several = brought("storage"), document.get("storages")
    for one in several if isinstance(several, list) else ():
        wanted = _named({"storages": one}, "storages", tuple(sections))
        yield choosing(sections[wanted], tuple(sections), wanted)


def _named(document: Mapping[str, Any], table: str, known: tuple[str, ...]) -> str:
    """Give the driver that a table names, if it is known; else the usual one."""
    given = document.get(table)
    wanted = given.get("driver") if isinstance(given, Mapping) else None
    return wanted if wanted in known else known[0]


def database_section(name: str | None) -> type[DatabaseOptions]:
    """Give the section of a driver of databases, the usual one if None; raises `ConfigError` where there is none."""
    known = brought("database")
    wanted = next(iter(known)) if name is None else name
    if wanted not in known:
        raise ConfigError(f"there is no database driver {wanted}", hint=f"there are: {', '.join(known)}")
    section = choosing(known[wanted], tuple(known), wanted)
    assert issubclass(section, DatabaseOptions)
    return section
