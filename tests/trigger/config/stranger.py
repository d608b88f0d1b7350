"""A database that is no PostgreSQL, its log, its host and its storage, as somebody else would bring them: sections with
words that nothing in the service knows, and what is built from them, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from connectors.memory import (
    MemoryAgent,
    MemoryDatabase,
    MemoryJournal,
    MemoryRecovery,
    MemorySource,
    MemoryStorage,
    World,
)
from connectors.memory.manner import BINLOG
from trigger.config.sections import (
    AgentOptions,
    DatabaseOptions,
    JournalOptions,
    RestoreOptions,
    Section,
    StorageOptions,
    WholePath,
)
from trigger.model import Finding, Layout, Severity, Volume

WORLD = World(manners=[BINLOG])

TABLE = {
    "places/binlog": "connectors.memory.manner:BinlogPlace",
    **{
        name.format(kind): f"tests.trigger.config.stranger:{attribute}"
        for kind, section, builder in (
            ("database/binlog", "LedgerOptions", "database"),
            ("recovery/binlog", "ReplayOptions", "recovery"),
            ("journal/rows", "RowsOptions", "journal"),
            ("agent/courier", "CourierOptions", "agent"),
            ("storage/shelves", "ShelvesOptions", "storage"),
        )
        for name, attribute in (("options/{}", section), ("{}", builder))
    },
}
"""What somebody would write into the table of drivers."""


class Replica(Section):
    """Another server of the ledger."""

    url: str = Field(examples=["ledger://two"])
    """Where it is."""


class LedgerOptions(DatabaseOptions):
    """A ledger."""

    url: str = Field(examples=["ledger://one"])
    """Where it is."""
    pin: str = Field(default="0000", repr=False, max_length=4)
    """What it asks for."""
    key_file: WholePath | None = Field(default=None, examples=["/etc/ledger/key"])
    """What it is signed with."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 99
    """How long a page may take to be turned."""
    replicas: list[Replica] = Field(default=[])

    @model_validator(mode="after")
    def _is_no_replica_of_itself(self) -> LedgerOptions:
        if any(replica.url == self.url for replica in self.replicas):
            raise ValueError("is a replica of itself")
        return self

    @property
    def guarded_files(self) -> tuple[Path, ...]:
        return (self.key_file,) if self.key_file else ()

    @property
    def address(self) -> str:
        return self.url

    @classmethod
    def reached(cls, at: str | None, environment: Mapping[str, str]) -> Self:
        return cls.model_validate({"url": at or environment["LEDGER"], "databases": ["index"]})


class RowsOptions(JournalOptions):
    """Kept row by row."""

    of = ("binlog",)
    ink: Literal["black", "red"] = "black"
    """What it is written with."""


class ReplayOptions(RestoreOptions):
    """Turned page by page."""

    pages_at_once: Annotated[int, Field(ge=1)] = 2
    """How many pages are turned at once."""


class CourierOptions(AgentOptions):
    """A host that is reached on foot."""

    bags: int = 1
    """How much is carried."""


class ShelvesOptions(StorageOptions):
    """Shelves."""

    shelves: Annotated[int, Field(ge=1)]
    """How many there are."""


class Ledger(MemoryDatabase):
    def __init__(self, section: LedgerOptions, suffix: str) -> None:
        super().__init__(WORLD)
        self.section, self.suffix = section, suffix

    def sources(self) -> list[MemorySource]:
        return [MemorySource(WORLD, name) for name in self.section.databases]

    async def existing(self) -> list[str]:
        return ["index", "accounts"]

    async def explain(self) -> list[Finding]:
        return [Finding("ink", Severity.NOTE, f"{self.section.url} does not show what was written in pencil")]


def database(section: LedgerOptions, suffix: str = "") -> Ledger:
    return Ledger(section, suffix)


def journal(section: RowsOptions, database: Ledger, layout: Layout, folder: Path) -> MemoryJournal:
    assert (section.ink, database.section.url, folder.name) == ("red", "ledger://one", "journal")
    return MemoryJournal(WORLD)


def recovery(
    section: ReplayOptions, database: Ledger, layout: Layout, volumes: Sequence[Volume], name: str
) -> MemoryRecovery:
    assert section.pages_at_once == 7
    return MemoryRecovery(WORLD)


def agent(section: CourierOptions, name: str, state_folder: Path) -> MemoryAgent:
    return MemoryAgent(WORLD, f"{name} with {section.bags} bags")


def storage(section: ShelvesOptions, volumes: Sequence[Volume], layout: Layout) -> MemoryStorage:
    return MemoryStorage(WORLD, budget=section.budget * section.shelves)
