"""What is run where: the full counts only when asked for, and nothing left out in silence.

A test that needs what the machine has not fails, unless the run says `--leave-out-missing`; then it is not run, and
the end of the report names what was left out, and why.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

from connectors.databases.postgres.programs import find_programs
from tests.fixtures.volumes import ground, own_ground
from trigger.errors import ConfigError

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine is no fault of what is tested

LEFT_OUT = pytest.StashKey[Counter[str]]()
OPEN = pytest.StashKey[ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--leave-out-missing",
        action="store_true",
        help="leave out, and name at the end, what this machine cannot run; without it such tests fail",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give all processes of a run their ground, before pytest chooses where temporary folders lie."""
    config.stash[OPEN] = stack = ExitStack()
    if not hasattr(config, "workerinput"):  # a worker has it from who started it
        stack.enter_context(own_ground())
        config.option.basetemp = config.option.basetemp or str(ground() / "t")


def pytest_report_header() -> str:
    return f"files of tests lie in {ground()}"


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[OPEN].close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons: Counter[str] = Counter()
    kept: list[pytest.Item] = []
    gone: list[pytest.Item] = []
    for item in items:
        reason = why_not(item) if config.getoption("--leave-out-missing") else ""
        if reason:
            reasons[reason] += 1
        unasked = item.get_closest_marker("campaign") is not None and "campaign" not in config.option.markexpr
        (gone if reason or unasked else kept).append(item)
    config.stash[LEFT_OUT] = reasons
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the process, with where each thread stands, when even the time limit's exception has ended no test.

    That one is raised once, in the main thread: who waits again while it is handled, for a thread that hangs, say,
    waits for ever.
    """
    mark = item.get_closest_marker("timeout")
    limit = float(mark.args[0] if mark and mark.args else item.config.getini("timeout"))
    if limit and sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(limit * 1.5 + 60, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, count in sorted(config.stash.get(LEFT_OUT, Counter()).items()):
        terminalreporter.write_line(f"left out: {count} tests: {reason}", yellow=True)


def why_not(item: pytest.Item) -> str:
    """Give the first thing that a test needs and this machine has not; "" where it can run."""
    return next(filter(None, (look() for look in needs(item))), "")


def needs(item: pytest.Item) -> Iterator[Callable[[], str]]:
    """Give what has to be looked at before `item` runs, from its marks and its parameter `major`."""
    if item.get_closest_marker("root"):
        yield no_root
    if item.get_closest_marker("volume"):
        yield no_volumes
    if item.get_closest_marker("pgbackrest"):
        yield no_pgbackrest
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if isinstance(major := parameters.get("major"), int):
        yield lambda: no_server(major)


@cache
def no_root() -> str:
    return "" if os.geteuid() == 0 else "this needs root"


@cache
def no_volumes() -> str:
    if os.geteuid() != 0:
        return "loop volumes need root"
    gone = [name for name in ("mkfs.btrfs", "mkfs.xfs", "mkfs.ext4", "mount") if shutil.which(name) is None]
    return f"loop volumes need {', '.join(gone)}" if gone else ""


@cache
def no_pgbackrest() -> str:
    return "this needs pgbackrest" if shutil.which("pgbackrest") is None else ""


@cache
def no_server(major: int) -> str:
    try:
        find_programs(major)
    except ConfigError as error:
        return error.message
    return ""
