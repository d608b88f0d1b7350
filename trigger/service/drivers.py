"""The door to the drivers: loads one by its name in a configuration, and the form of places of every kind.

Light, so that a command which only reads the catalog does not load what connects.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from connectors import DRIVERS
from trigger.errors import ConfigError


def know_places() -> None:
    """Load the form of places of every kind of database, so that they are written and read as its users do."""
    for name in DRIVERS:
        kind, _, of = name.partition("/")
        if kind == "places":
            driver(kind, of)


def driver(kind: str, name: str) -> Any:
    """Give what makes the driver `kind/name`; raises `ConfigError` where its library is not installed."""
    module, _, attribute = DRIVERS[f"{kind}/{name}"].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"driver {name} needs the package {error.name}", hint=f"pip install 'trigpoint[{name}]'"
        ) from error
