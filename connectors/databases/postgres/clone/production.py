"""Whether a server works in a folder, wherever it was started: by its lock file, by processes, by who answers.

A server keeps a lock file in its data directory for as long as it lives, and ends by itself where that goes away. The
process id in it is one of the server's own PID namespace: for a server in a container it is another process's here, or
nobody's. Its processes are still seen from outside the container, under other ids; from another container they are not,
and then only its connection tells that it lives. A restarted host shows the same lock file with nobody behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from connectors.databases.postgres.clone import isolation
from connectors.databases.postgres.control import Control
from connectors.databases.postgres.log.files import entered, reading
from connectors.databases.postgres.programs import Programs, find_programs, run
from trigger.errors import ConfigError, DatabaseError, RestoreError
from trigger.model import Finding, Severity, System, Volume
from trigger.trusted import NotOursError, read_text

LOCK_FILE = "postmaster.pid"
_DEPTH = 3
"""So far below the top of a volume a data directory is looked for."""
_PING_SECONDS = 3
_ASKING_SECONDS = 30.0
_FOLDER_LINE, _PORT_LINE, _SOCKET_LINE, _ADDRESS_LINE = 1, 3, 4, 5
"""What stands in a lock file, from 0 on (pidfile.h)."""
_REACHING = ("host", "hostaddr", "port", "service")
_ENVIRONMENT = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGSERVICEFILE", "HOME")
"""By which a connection string without a host is completed."""
_ANYWHERE = {"*": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not listened at


async def at_work(
    volumes: Sequence[Volume], conninfo: str = "", programs_for: Callable[[int], Programs] = find_programs
) -> list[Finding]:
    """Give the servers that work in one of the volumes, or may; takes a few seconds where a host is silent.

    Args:
        volumes: where they are looked for.
        conninfo: how production's is reached; "" where that is not known.
        programs_for: gives the programs of a major version.
    """
    locks = await asyncio.to_thread(lambda: [(lock, _seen(lock)) for lock in _locks(volumes)])
    found = [seen or await _heard(lock, conninfo, programs_for) for lock, seen in locks]
    return [one for one in found if one is not None]


def systems(data: Path | None) -> list[System]:
    """Give the cluster whose data directory lies there; none where its files do not say which, or it lies nowhere."""
    if data is None:
        return []
    try:
        with entered(data, Path("global")) as folder, reading(Path("pg_control"), folder=folder) as file:
            control = Control.of(data, file)
        return [System(control.system, f"PostgreSQL {isolation.major_of(data)}")]
    except (OSError, NotOursError, RestoreError):
        return []


def _locks(volumes: Sequence[Volume]) -> Iterator[Path]:
    for volume in volumes:
        yield from _lock_files(Path(volume.path), _DEPTH)


def _lock_files(folder: Path, depth: int) -> Iterator[Path]:
    """Give the lock files of servers at most `depth` folders down; in a data directory nobody else has one."""
    if (folder / LOCK_FILE).exists():
        yield folder / LOCK_FILE
    if depth == 0 or (folder / "PG_VERSION").exists():
        return
    with contextlib.suppress(PermissionError, FileNotFoundError):
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                yield from _lock_files(entry, depth - 1)


def _seen(lock: Path) -> Finding | None:
    """Give the server of a lock file, by its processes."""
    if (pid := _holder(lock) or _worker(lock.parent)) is not None:
        return _refused(lock, f"runs (process {pid})", "stop it first: its files must not be taken away")
    if (hidden := _hidden(lock)) is not None:
        return _refused(
            lock,
            f"may run: process {hidden}, which its lock file names, may not be looked at",
            f"stop it first; where it is surely down, remove {lock}",
        )
    return None


def _refused(lock: Path, why: str, remedy: str) -> Finding:
    return Finding(str(lock.parent), Severity.REFUSED, f"the server in {lock.parent} {why}", remedy)


def _named(lock: Path) -> int | None:
    """Give the process that a lock file names."""
    try:
        return int(read_text(lock).split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _holder(lock: Path) -> int | None:
    """Give the process that a lock file names, if it works there.

    A server's working directory is its data directory, so a lock file whose process works elsewhere is a leftover.
    """
    pid = _named(lock)
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/cwd").samefile(lock.parent):
            return pid
    return None


def _hidden(lock: Path) -> int | None:
    """Give the process that a lock file names, if it is there and we may not see where it works."""
    pid = _named(lock)
    try:
        Path(f"/proc/{pid}/cwd").stat()
    except PermissionError:
        return pid
    except OSError:
        return None
    return None


def _worker(data: Path) -> int | None:
    """Give a process of PostgreSQL that works in a data directory, whichever lock file it has: in a container, say."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() in ("postgres", "postmaster") and (process / "cwd").samefile(
                data
            ):
                return int(process.name)
    return None


async def _heard(lock: Path, conninfo: str, programs_for: Callable[[int], Programs]) -> Finding | None:
    """Give the server of a lock file, by an answer where it may be reached."""
    remedy = f"stop it there; where another server answers, and this one is surely down, remove {lock}"
    try:
        reached = await asyncio.to_thread(_reached, lock, conninfo)
        program = programs_for(isolation.major_of(lock.parent)).path("pg_isready") if reached else ""
    except (OSError, RestoreError):  # no data directory is without a version
        return None
    except ConfigError as error:
        return _refused(lock, f"may run: {lock} is there, and nobody can be asked: {error.message}", remedy)
    for where, parameters in reached.items():
        if await _answers(parameters, program):
            words = "may run where its processes are not seen, in a container say"
            return _refused(lock, f"{words}: {where} answers, and {lock} is there", remedy)
    return None


def _reached(lock: Path, conninfo: str) -> dict[str, dict[str, str]]:
    """Give where the server of a lock file may be reached, in words and as parameters of a connection."""
    lines = [line.strip() for line in _text(lock).splitlines()]
    lines += [""] * (_ADDRESS_LINE + 1 - len(lines))
    if lines[_FOLDER_LINE] and _is_another(Path(lines[_FOLDER_LINE]), lock.parent):
        return {}
    port = lines[_PORT_LINE]
    hosts = [lines[_SOCKET_LINE], _ANYWHERE.get(lines[_ADDRESS_LINE], lines[_ADDRESS_LINE])] if port else []
    found = {f"{host} port {port}": {"host": host, "port": port} for host in hosts if host}
    if conninfo:
        named = {name: str(value) for name, value in conninfo_to_dict(conninfo).items() if name in _REACHING}
        found[" ".join(named.values()) or "database.conninfo"] = named
    return found


def _text(lock: Path) -> str:
    try:
        return read_text(lock)
    except OSError:
        return ""


def _is_another(named: Path, data: Path) -> bool:
    """Whether a lock file was written in another folder that is there: its own was moved since, and no server in it."""
    try:
        return named.exists() and not named.samefile(data)
    except OSError:
        return False


async def _answers(parameters: Mapping[str, str], program: str) -> bool:
    """Whether a server answers, be it with a refusal; nobody has to be let in for that (PQping).

    PostgreSQL's own program asks: the library's function would hold the interpreter, and the event loop, meanwhile.
    """
    ours = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    asked = f"--dbname={make_conninfo('', **parameters)}"
    try:
        said = await run(
            [program, f"--timeout={_PING_SECONDS}", asked], deadline_seconds=_ASKING_SECONDS, environment=ours
        )
    except DatabaseError as error:
        said = error.message
    return "accepting connections" in said or "rejecting connections" in said
