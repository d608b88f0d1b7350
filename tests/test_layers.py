"""Who may import whom: downwards only, drivers behind one door, each library in one place; a failure says why.

The picture is drawn in `trigger/DESIGN.md`. A new room has to be put into `ROOMS`; a new library into
`LIBRARIES` or `DRIVER_LIBRARIES`, with its reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from connectors import DRIVERS

ROOT = Path(__file__).parent.parent


ROOMS = {
    "": "the words: what everything else may use; of the world they know this host's paths and locks",
    "ports": "what the service needs of the world, which drivers do",
    "config": "every option, the door to the drivers that bring some of them, and the reference",
    "catalog": "what is known of points, commits and gaps; the only SQL",
    "protect": "from a commit to a point",
    "restore": "from a point to a commit",
    "keep": "what may go",
    "service": "what runs",
    "demo": "the whole of it, on a bank",
    "cli": "what people see",
}
"""The rooms of `trigger`, from the bottom up: a room may import what stands above it in this list, and itself."""

APART = {("protect", "restore"): "both ways between a commit and a point meet in the catalog alone"}
"""Rooms that know nothing of each other, lower or higher."""

PURE = frozenset(
    {
        *(
            "position",
            "errors",
            "model",
            "point_names",
            "replay",
            "shape",
            "volumes",
            "config.sections",
            "config.options",
            "config.mistakes",
            "config.expressions",
            "config.toml_lines",
        ),
        *(
            f"ports.{name}"
            for name in ("agent", "clock", "database", "journal", "progress", "recovery", "source", "storage")
        ),
        *("config.reference", "catalog.packing", "catalog.tag", "protect.qualify", "protect.agenda"),
        *("protect.rehearse", "protect.commit_lines", "restore.held_log", "restore.planner", "keep.retention"),
    }
)
"""Modules that neither wait nor touch the world, so that they can be tested without one."""

IMPURE = frozenset({"socket", "subprocess", "sqlite3", "threading", "tempfile", "shutil", "signal", "urllib", "http"})
"""Standard library modules that touch the world."""

LIBRARIES = {
    "cel": (("protect.qualify",), "the expressions of rules are evaluated where rules are"),
    "cronsim": (
        ("config.options", "protect.agenda"),
        "a schedule is refused where it is read, and followed where points fall due",
    ),
    "pydantic": (
        ("config.sections", "config.options"),
        "one description of the configuration: what drivers derive from, and what is the service's own",
    ),
    "pydantic_core": (("config.mistakes",), "the mistakes that pydantic reports"),
    "sqlalchemy": (("catalog",), "the only SQL: tables, look-ups of commits, and the rest"),
    "typer": (("cli",), "the command line"),
    "rich": (("cli.show", "demo"), "output for people; the demo draws while it runs"),
    "psycopg": (("demo",), "the bank of the demo is a client like any other"),
}
"""Library -> (the rooms or modules of `trigger` that import it, why there)."""

DRIVER_LIBRARIES = {
    "psycopg": "connectors.databases.postgres",
}
"""Library -> the one package of `connectors` that may import it."""

SECTIONS = {
    where.partition(":")[0]: "a driver describes its options in the words in which the configuration is described"
    for name, where in DRIVERS.items()
    if name.startswith("options/")
}
"""Modules with the sections that drivers bring -> why they may import pydantic, and what they derive from."""

CONNECTORS_MAY_USE = frozenset(
    {"position", "errors", "model", "point_names", "replay", "ports", "failpoint", "lock", "trusted"}
)
"""What a driver knows of the service; with more it could not be written by a stranger, or tested alone."""

DOORS = {
    "config.drivers": "connectors",
    "demo": "connectors.databases.postgres.programs",
}
"""Who in `trigger` may import from `connectors`, and what: the table of names, and the demo that makes a cluster."""

POSTGRES = {
    "lsn": (),
    "places": ("encoding",),
    "programs": (),
    "encoding": (),
    "sections": (),
    "connection": ("encoding",),
    "stream": ("lsn", "programs", "encoding", "connection"),
    "log": ("lsn", "programs", "connection"),
    "clone": ("lsn", "places", "programs", "encoding", "connection", "log", "control"),
    "lives": ("lsn", "stream", "log"),
    "control": ("lsn", "log"),
    "locality": ("control",),
    "backup": ("lsn",),
    "made": ("encoding", "connection", "stream", "sections"),
    "preflight": ("lsn", "places", "programs", "encoding", "connection", "stream", "clone", "made"),
    "database": (
        *("lsn", "places", "programs", "encoding", "connection", "stream", "log"),
        *("lives", "control", "locality", "backup", "preflight", "made"),
    ),
    "assembly": ("lsn", "places", "programs", "stream", "log", "clone", "database", "sections"),
}
"""The rooms of the largest driver, and the modules at its door: which others each may import."""


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
    """Give the name of a module of `trigger` from the service's root: `restore.planner`, `position`."""
    return module.partition(".")[2]


def room(module: str) -> str:
    """Give the room that a module of `trigger` lies in; "" for the words at the root."""
    head, _, rest = place(module).partition(".")
    return head if rest or (ROOT / "trigger" / head).is_dir() else ""


def lies_in(module: str, places: Iterable[str]) -> bool:
    """Whether a module of `trigger` is one of `places`, or lies in one of them."""
    return any(f"{place(module)}.".startswith(f"{one}.") for one in places)


def of(package: str) -> list[str]:
    return [name for name in modules() if top(name) == package]


def top(name: str) -> str:
    """Give the package at the head of a dotted name."""
    return name.partition(".")[0]


def driver_of(name: str) -> str:
    """Give the driver that a module belongs to, as the table of names calls it; "" for what belongs to none.

    The sections of several drivers may stand beside them in one module; what makes a driver says whose a package is.
    """
    for kind, where in DRIVERS.items():
        if kind.startswith("options/"):
            continue
        package = ".".join(where.partition(":")[0].split(".")[:3])
        if f"{name}.".startswith(f"{package}."):
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


def test_a_room_of_the_service_imports_only_downwards() -> None:
    def wrong(module: str, name: str) -> str:
        if top(name) != "trigger" or module == "trigger.__main__":
            return ""
        assert {room(module), room(name)} <= ROOMS.keys(), f"{module} or {name} lies in no room; see ROOMS"
        low, high = sorted((room(module), room(name)), key=list(ROOMS).index)
        if reason := APART.get((low, high), ""):
            return reason
        if high == room(module):
            return ""
        return f"'{ROOMS[low] or low}' may not know '{ROOMS[high]}'"

    refuse("trigger", wrong)


def test_the_rooms_of_postgresql_import_only_what_lies_below_them() -> None:
    driver = "connectors.databases.postgres."

    def wrong(module: str, name: str) -> str:
        if not (module.startswith(driver) and name.startswith(driver)):
            return ""
        mine, other = (whole.removeprefix(driver).partition(".")[0] for whole in (module, name))
        return "" if other == mine or other in POSTGRES[mine] else f"{mine} knows {', '.join(POSTGRES[mine])} only"

    refuse("connectors", wrong)


def test_connectors_are_loaded_by_name_and_nowhere_else() -> None:
    def wrong(module: str, name: str) -> str:
        if top(name) != "connectors" or any(lies_in(module, (who,)) and name == what for who, what in DOORS.items()):
            return ""
        return f"only {DOORS} may; everybody else gets drivers as ports, so that any of them can be exchanged"

    refuse("trigger", wrong)


def test_a_driver_knows_no_more_of_the_service_than_its_contract() -> None:
    def wrong(module: str, name: str) -> str:
        if top(name) != "trigger" or place(name) in CONNECTORS_MAY_USE:
            return ""
        if module in SECTIONS and place(name) == "config.sections":
            return ""
        return f"a driver knows only {', '.join(sorted(CONNECTORS_MAY_USE))} of trigger"

    refuse("connectors", wrong)


def test_a_section_loads_nothing_but_what_describes_it() -> None:
    """Every command reads the configuration, and most of them never connect."""

    def wrong(module: str, name: str) -> str:
        if module not in SECTIONS or place(name) == "config.sections" or top(name) == "pydantic":
            return ""
        light = top(name) in sys.stdlib_module_names - IMPURE - {"asyncio", "ctypes"}
        return "" if light else "a section is read by commands that never connect"

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
        return "" if lies_in(module, allowed) else f"it belongs into {', '.join(allowed)}: {reason}"

    refuse("trigger", wrong)


def test_a_driver_imports_only_the_library_it_drives() -> None:
    def wrong(module: str, name: str) -> str:
        if not is_library(name) or (top(name) == "pydantic" and module in SECTIONS):
            return ""
        owner = DRIVER_LIBRARIES.get(top(name), "no driver; see DRIVER_LIBRARIES")
        return "" if f"{module}.".startswith(f"{owner}.") else f"it belongs to {owner}"

    refuse("connectors", wrong)


def test_a_pure_module_does_not_touch_the_world() -> None:
    def wrong(module: str, name: str) -> str:
        return f"{module} is pure" if place(module) in PURE and top(name) in IMPURE else ""

    refuse("trigger", wrong)


def test_the_tables_name_nothing_that_is_gone() -> None:
    there = {room(module) for module in of("trigger")} - {"__main__"}
    assert there == set(ROOMS), f"ROOMS and the folders differ: {sorted(there ^ set(ROOMS))}"
    gone = [name for name in PURE if f"trigger.{name}" not in modules()]
    assert not gone, f"PURE names what is gone: {gone}"
    for library, (allowed, _) in LIBRARIES.items():
        users = {module for module in of("trigger") if library in {top(name) for name, _ in imports(module)}}
        idle = [one for one in allowed if not any(lies_in(module, (one,)) for module in users)]
        assert not idle, f"{library} is allowed in {idle} and not used there"
