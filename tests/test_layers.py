"""Who may import whom: downwards only, drivers behind one door, each library in one place; a failure says why.

The picture is drawn in `trigger/DESIGN.md`. A new module has to be put into `LAYERS`; a new library into
`LIBRARIES` or `DRIVER_LIBRARIES`, with its reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from connectors import DRIVERS

ROOT = Path(__file__).parent.parent


class Layer(NamedTuple):
    """Modules of `trigger` that stand on one height; a package stands for all modules in it."""

    reason: str
    modules: tuple[str, ...]


LAYERS = (
    Layer("all may use it; the standard library only", ("errors", "position", "failpoint", "lock", "toml_lines")),
    Layer("what we talk about; does nothing", ("model",)),
    Layer(
        "ports, options, grammars and decisions; pure",
        ("ports", "options", "reference", "shape", "packing", "tag", "commit_lines", "qualify", "planner", "retention"),
    ),
    Layer(
        "what keeps state, and what this host says of itself",
        (
            "recent",
            "window",
            "agenda",
            "rehearse",
            "schema",
            "commit_index",
            "commit_search",
            "point_index",
            "catalog",
            "clone_records",
            "control",
            "host",
        ),
    ),
    Layer(
        "the acts; no I/O of their own, all through ports and catalog",
        ("pipeline", "reconcile", "rebuild", "expire", "room", "target", "locate", "clones", "restore", "inplace"),
    ),
    Layer("the door to the drivers; proof by restoring", ("connect", "verify", "initialise")),
    Layer("what runs: tasks, signals, order of start and end", ("service", "upkeep", "watch")),
    Layer("what people see", ("show", "json_reference", "commands", "demo", "cli", "__main__")),
)
"""From the bottom up, as in chapter 9 of the design."""

PURE = frozenset({"position", "errors", "agenda", "rehearse", *LAYERS[1].modules, *LAYERS[2].modules})
"""Modules that neither wait nor touch the world, so that they can be tested without one."""

IMPURE = frozenset({"socket", "subprocess", "sqlite3", "threading", "tempfile", "shutil", "signal", "urllib", "http"})
"""Standard library modules that touch the world."""

LIBRARIES = {
    "cel": (("qualify",), "the expressions of rules are evaluated where rules are"),
    "cronsim": (("options", "agenda"), "a schedule is refused where it is read, and followed where points fall due"),
    "pydantic": (("options",), "one description of the configuration"),
    "pydantic_core": (("options",), "the mistakes that pydantic reports"),
    "sqlalchemy": (
        ("schema", "commit_index", "commit_search", "point_index", "catalog"),
        "the only SQL: tables, look-ups of commits, and the rest",
    ),
    "typer": (("cli", "commands", "demo"), "the command line"),
    "rich": (("show", "demo"), "output for people; the demo draws while it runs"),
    "psycopg": (("demo",), "the bank of the demo is a client like any other"),
}
"""Library -> (where `trigger` may import it, why there)."""

DRIVER_LIBRARIES = {
    "psycopg": "connectors.databases.postgres",
}
"""Library -> the one package of `connectors` that may import it."""

CONNECTORS_MAY_USE = frozenset({"position", "errors", "model", "ports", "failpoint", "lock"})
"""What a driver knows of the service; with more it could not be written by a stranger, or tested alone."""

DOORS = {
    "connect": "connectors",
    "demo": "connectors.databases.postgres.programs",
}
"""Who in `trigger` may import from `connectors`, and what: the table of names, and the demo that makes a cluster."""


@cache
def modules() -> dict[str, Path]:
    """Give every module of the product by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("trigger", "connectors")
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@cache
def imports(module: str) -> tuple[tuple[str, int], ...]:
    """Give (dotted name, line) of everything that `module` imports, wherever in the file."""
    return tuple(_imports(ast.parse(modules()[module].read_text())))


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute, so that this test and readers see them"
            assert node.module is not None
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in modules() else node.module, node.lineno


def place(module: str) -> str:
    """Give the name by which `LAYERS` and the other tables know a module of `trigger`."""
    return module.split(".")[1] if "." in module else ""


def height(module: str) -> int:
    """Give the number of a module's layer; the package itself (`trigger/__init__.py`) is below all."""
    name = place(module)
    if not name:
        return -1
    found = [number for number, layer in enumerate(LAYERS) if name in layer.modules]
    assert len(found) == 1, f"{module} is in {len(found)} layers; put it into exactly one of LAYERS"
    return found[0]


def of(package: str) -> list[str]:
    return [name for name in modules() if top(name) == package]


def top(name: str) -> str:
    """Give the package at the head of a dotted name."""
    return name.partition(".")[0]


def driver_of(name: str) -> str:
    """Give the driver that a module belongs to, as the table of names calls it; "" for what belongs to none."""
    for kind, where in DRIVERS.items():
        if f"{name}.".startswith(f"{where.partition(':')[0]}."):
            return kind
    return ""


def is_library(name: str) -> bool:
    return top(name) not in sys.stdlib_module_names | {"trigger", "connectors"}


def refuse(package: str, wrong: Callable[[str, str], str]) -> None:
    """Fail with a line for every import in `package` of which `wrong(module, imported)` says what is wrong."""
    breaches = "\n".join(
        f"{modules()[module].relative_to(ROOT)}:{line} imports {name}: {words}"
        for module in of(package)
        for name, line in imports(module)
        if (words := wrong(module, name))
    )
    assert not breaches, breaches


def test_a_module_of_the_service_imports_only_downwards() -> None:
    def wrong(module: str, name: str) -> str:
        if top(name) != "trigger" or height(name) <= height(module):
            return ""
        return f"'{LAYERS[height(module)].reason}' may not know '{LAYERS[height(name)].reason}'"

    refuse("trigger", wrong)


def test_connectors_are_loaded_by_name_and_nowhere_else() -> None:
    def wrong(module: str, name: str) -> str:
        if top(name) != "connectors" or name == DOORS.get(place(module)):
            return ""
        return f"only {DOORS} may; everybody else gets drivers as ports, so that any of them can be exchanged"

    refuse("trigger", wrong)


def test_a_driver_knows_no_more_of_the_service_than_its_contract() -> None:
    def wrong(_module: str, name: str) -> str:
        if top(name) != "trigger" or place(name) in CONNECTORS_MAY_USE:
            return ""
        return f"a driver knows only {', '.join(sorted(CONNECTORS_MAY_USE))} of trigger"

    refuse("connectors", wrong)


def test_a_driver_knows_no_other_driver() -> None:
    """What lies beside the drivers (threads, shelves) is for all of them, and knows none."""

    def wrong(module: str, name: str) -> str:
        owner = driver_of(name)
        return f"that is the driver {owner}'s own" if owner and owner != driver_of(module) else ""

    refuse("connectors", wrong)


def test_nothing_imports_itself_by_a_detour() -> None:
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle of imports: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for name, _ in imports(module):
                if name in modules() and name != module:
                    walk(name, (*trail, module))
            done.add(module)

    for module in modules():
        walk(module, ())


def test_the_service_imports_a_library_in_one_place_only() -> None:
    def wrong(module: str, name: str) -> str:
        if not is_library(name):
            return ""
        if top(name) not in LIBRARIES:
            return "it is in no table; see LIBRARIES"
        allowed, reason = LIBRARIES[top(name)]
        return "" if place(module) in allowed else f"it belongs into {', '.join(allowed)}: {reason}"

    refuse("trigger", wrong)


def test_a_driver_imports_only_the_library_it_drives() -> None:
    def wrong(module: str, name: str) -> str:
        if not is_library(name):
            return ""
        owner = DRIVER_LIBRARIES.get(top(name), "no driver; see DRIVER_LIBRARIES")
        return "" if f"{module}.".startswith(f"{owner}.") else f"it belongs to {owner}"

    refuse("connectors", wrong)


def test_a_pure_module_does_not_touch_the_world() -> None:
    def wrong(module: str, name: str) -> str:
        return f"{module} is pure" if place(module) in PURE and top(name) in IMPURE else ""

    refuse("trigger", wrong)


def test_the_tables_name_nothing_that_is_gone() -> None:
    there = {place(module) for module in of("trigger")} - {""}
    named = {name for layer in LAYERS for name in layer.modules}
    assert named <= there, f"LAYERS names modules that do not exist: {sorted(named - there)}"
    for library, (allowed, _) in LIBRARIES.items():
        users = {place(module) for module in of("trigger") if library in {top(name) for name, _ in imports(module)}}
        assert users == set(allowed), f"{library} is allowed in {allowed} and used in {sorted(users)}; keep them equal"
