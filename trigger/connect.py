"""From the names in a configuration to driver objects; the only module that loads connectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from connectors import DRIVERS
from trigger.catalog import Catalog
from trigger.errors import ConfigError
from trigger.model import Volume
from trigger.options import Options
from trigger.ports import Agent, Database, Journal, Recovery, Source, Storage


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that one configured service works with."""

    options: Options
    volumes: tuple[Volume, ...]
    database: Database
    sources: Sequence[Source]
    agents: Sequence[Agent]
    storage: Storage
    catalog: Catalog
    journal: Journal
    recovery: Recovery

    async def close(self) -> None:
        """Let go of everything; never raises."""
        for source in self.sources:
            await source.close()
        for agent in self.agents:
            await agent.close()
        await self.database.close()
        await self.catalog.close()


def driver(kind: str, name: str) -> Any:
    """Give the class of the driver `kind/name`; raises `ConfigError` where its library is not installed."""
    module, _, attribute = DRIVERS[f"{kind}/{name}"].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"driver {name} needs the package {error.name}", hint=f"pip install 'trigpoint[{name}]'"
        ) from error


def clones_folder(options: Options) -> Path:
    """Where records, sockets and logs of clones lie."""
    return options.state_folder / "clones"
