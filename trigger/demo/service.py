"""The service in a demo: configured by a file and used by the commands that anybody would type."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

from connectors.databases.postgres.programs import Programs
from trigger.config.reference import toml
from trigger.demo.bank import DATABASE
from trigger.demo.place import Place
from trigger.demo.server import conninfo
from trigger.errors import TrigpointError
from trigger.service import control

_START_SECONDS = 60.0
_STOP_SECONDS = 45.0
_COMMAND_SECONDS = 120.0
_ASK_SECONDS = 5.0
_LAST_BYTES = 4000
_INTERVALS = {"btrfs": 0.25, "directory": 1.0}
"""Seconds between two points; a snapshot of a directory costs a copy of what changed."""


_CONFIG = """\
# Written by `trigpoint demo`; `trigpoint config reference` tells what else can stand here.
name = "bank"
state_folder = {state}

[database]
conninfo = {conninfo}
databases = [{database}]
bin_directory = {programs}

[[volumes]]
name = "data"
path = {data}

[storage]
driver = {storage}
folder = {snapshots}
keep_free = "64MiB"
budget = 2000

[points]
min_interval_seconds = {interval}
per_minute = 600

[[rules]]
name = "marked"      # what the application says matters: the payroll
markers = ["payroll-*"]

[[rules]]
name = "any"         # and everything else
"""


def write_config(place: Place, programs: Programs) -> None:
    """Write the configuration of the service; it is an ordinary one, to look at and to play with."""
    told = {
        "state": place.state,
        "conninfo": conninfo(place),
        "database": DATABASE,
        "programs": programs.folder,
        "data": place.data,
        "storage": place.storage,
        "snapshots": place.snapshots,
        "interval": _INTERVALS[place.storage],
    }
    words = _CONFIG.format_map({name: toml(value) for name, value in told.items()})
    place.config.write_text(words, encoding="utf-8")


def command(place: Place, *arguments: str) -> list[str]:
    """Give the argument vector of one `trigpoint` command on the demo's configuration."""
    return [sys.executable, "-m", "trigger", "--config", str(place.config), *arguments]


@contextlib.asynccontextmanager
async def started(place: Place) -> AsyncIterator[None]:
    """Give `trigpoint run` as a process that has sealed its first point; it lives on behind the block.

    Raises:
        TrigpointError: it ended, or did not begin in time; with its last words.
    """
    process = await asyncio.to_thread(_launch, place)
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not (await status(place)).get("last_point"):
                if process.poll() is not None:
                    raise TrigpointError(f"the service ended with exit code {process.returncode}: {last_words(place)}")
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise TrigpointError(f"the service took no point within {_START_SECONDS:g} s: {last_words(place)}") from None
    yield


def _launch(place: Place) -> subprocess.Popen[bytes]:
    """Start the service as a process of its own that outlives us; asyncio would kill it with its event loop."""
    with place.service_log.open("wb") as log:
        return subprocess.Popen(
            command(place, "run"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(),
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us; we end it in order
        )


async def status(place: Place) -> dict[str, Any]:
    """Give what the service says of itself; nothing where it does not answer yet."""
    try:
        reply = await control.ask(place.state, {"do": "status"}, _ASK_SECONDS)
    except TrigpointError:
        return {}
    return dict(reply["status"])


async def restore_before(place: Place, xid: int) -> dict[str, Any]:
    """Bring back what was committed before the transaction `xid`, by `trigpoint restore`; gives its report.

    Raises:
        TrigpointError: it failed, with what it said.
    """
    report: dict[str, Any] = json.loads(await _run(place, "restore", f"--before-xid={xid}", "--json"))
    return report


async def drop_clones(place: Place) -> None:
    """Remove every clone, the ones made by hand too; raises `TrigpointError`."""
    names = [clone["name"] for clone in json.loads(await _run(place, "clones", "list", "--json"))]
    if names:
        await _run(place, "clones", "drop", "--yes", *names)


async def _run(place: Place, *arguments: str) -> bytes:
    """Run one command and give what it printed; a cancellation interrupts it, so that it cleans up after itself."""
    process = await asyncio.create_subprocess_exec(
        *command(place, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
        cwd="/",
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_COMMAND_SECONDS):
            output, errors = await process.communicate()
    except TimeoutError:
        raise TrigpointError(f"trigpoint {arguments[0]} did not end within {_COMMAND_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await asyncio.shield(process.wait())
    if process.returncode != 0:
        words = errors.decode(errors="replace")[-_LAST_BYTES:].strip()
        raise TrigpointError(f"trigpoint {arguments[0]} ended with {process.returncode}: {words}")
    return output


def environment() -> dict[str, str]:
    """Give our environment without what would lead a client to another server, or colour into a log."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"NO_COLOR": "1"}


def last_words(place: Place) -> str:
    """Give the end of the service's log in one line."""
    with contextlib.suppress(OSError):
        return " | ".join(place.service_log.read_bytes()[-_LAST_BYTES:].decode(errors="replace").splitlines()[-8:])
    return "it said nothing"
