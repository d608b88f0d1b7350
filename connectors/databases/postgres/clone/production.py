"""Whether a server works in a folder, wherever it was started: by its lock file, by processes, by who answers.

A server keeps a lock file in its data directory for as long as it lives, and ends by itself where that goes away. The
process id in it is one of the server's own PID namespace: for a server in a container it is another process's here, or
nobody's. Its processes are still seen from outside the container, under other ids; from another container they are not,
and then only its connection tells that it lives. A restarted host shows the same lock file with nobody behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import PGconn, Ping

from trigger.model import Finding, Severity, Volume

LOCK_FILE = "postmaster.pid"
_DEPTH = 3
"""So far below the top of a volume a data directory is looked for."""
_PING_SECONDS = 3
_FOLDER_LINE, _PORT_LINE, _SOCKET_LINE, _ADDRESS_LINE = 1, 3, 4, 5
"""What stands in a lock file, from 0 on (pidfile.h)."""
_ANYWHERE = {"*": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not listened at


def at_work(volumes: Sequence[Volume], conninfo: str) -> list[Finding]:
    """Give the servers that work in one of the volumes, or may; blocks, for a few seconds where a host is silent.

    `conninfo` is how production's is reached; "" where that is not known.
    """
    return [
        found
        for volume in volumes
        for lock in _lock_files(Path(volume.path), _DEPTH)
        if (found := _at_work(lock, conninfo)) is not None
    ]


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


def _at_work(lock: Path, conninfo: str) -> Finding | None:
    data = lock.parent
    if (pid := _holder(lock) or _worker(data)) is not None:
        return Finding(
            str(data),
            Severity.REFUSED,
            f"the server in {data} runs (process {pid})",
            "stop it first: its files must not be taken away",
        )
    if (where := _answering(lock, conninfo)) is not None:
        return Finding(
            str(data),
            Severity.REFUSED,
            f"the server in {data} may run where its processes are not seen, in a container say: {where} answers, and"
            f" {lock} is there",
            f"stop it there; where another server answers, and this one is surely down, remove {lock}",
        )
    return None


def _holder(lock: Path) -> int | None:
    """Give the process that a lock file names if it lives; one that may not be looked at counts as living.

    A server's working directory is its data directory, so a lock file whose process works elsewhere is a leftover.
    """
    try:
        pid = int(lock.read_text().split()[0])
        return pid if Path(f"/proc/{pid}/cwd").samefile(lock.parent) else None
    except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
        return None
    except PermissionError:
        return pid


def _worker(data: Path) -> int | None:
    """Give a process of PostgreSQL that works in a data directory, whichever lock file it has: in a container, say."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() in ("postgres", "postmaster") and (process / "cwd").samefile(
                data
            ):
                return int(process.name)
    return None


def _answering(lock: Path, conninfo: str) -> str | None:
    """Give where a server answers that may be the one of a lock file."""
    lines = [line.strip() for line in _text(lock).splitlines()]
    lines += [""] * (_ADDRESS_LINE + 1 - len(lines))
    if lines[_FOLDER_LINE] and _is_another(Path(lines[_FOLDER_LINE]), lock.parent):
        return None
    port = lines[_PORT_LINE]
    hosts = [lines[_SOCKET_LINE], _ANYWHERE.get(lines[_ADDRESS_LINE], lines[_ADDRESS_LINE])] if port else []
    candidates = {f"{host} port {port}": make_conninfo(host=host, port=port) for host in hosts if host}
    if conninfo:
        candidates |= {_shown(conninfo): conninfo}
    return next((where for where, reached in candidates.items() if _answers(reached)), None)


def _text(lock: Path) -> str:
    try:
        return lock.read_text(errors="replace")
    except OSError:
        return ""


def _is_another(named: Path, data: Path) -> bool:
    """Whether a lock file was written in another folder that is there: its own was moved since, and no server in it."""
    try:
        return named.exists() and not named.samefile(data)
    except OSError:
        return False


def _answers(conninfo: str) -> bool:
    """Whether a server answers, be it with a refusal; nobody has to be let in for that (PQping)."""
    patient = make_conninfo(conninfo, connect_timeout=_PING_SECONDS)
    return PGconn.ping(patient.encode()) in (Ping.OK, Ping.REJECT)


def _shown(conninfo: str) -> str:
    found = conninfo_to_dict(conninfo)
    return " ".join(str(found[name]) for name in ("host", "hostaddr", "port") if found.get(name)) or "database.conninfo"
