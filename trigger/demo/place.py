"""Where a demo lies: one folder with all it has, on a btrfs of its own where that can be made, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from connectors.databases.postgres.programs import run, server_owner
from trigger.errors import ConfigError, TrigpointError
from trigger.host import make_passage

_VOLUME_BYTES = 8 << 30
"""Of the btrfs image; it is sparse and takes what is written."""
_PROGRAM_SECONDS = 60.0
_STOP_SECONDS = 40.0
_MARK = ".trigpoint-demo"
"""A file that says that the folder is ours to remove."""
_REFUSED = frozenset(',"$`\\')
"""What parts the folders of sockets (`host`), and what pg_ctl gives to a shell, between double quotes, as it is."""
_SERVERS = frozenset({"postgres", "pg_receivewal"})


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of a demo, and who owns the cluster in it."""

    folder: Path
    storage: str
    """The storage driver: `btrfs` or `directory`."""
    owner: tuple[int, int]

    @property
    def config(self) -> Path:
        """The configuration of the service."""
        return self.folder / "trigpoint.toml"

    @property
    def state(self) -> Path:
        """Catalog, journal and control socket."""
        return self.folder / "state"

    @property
    def data(self) -> Path:
        """The protected volume: the data directory of the cluster."""
        return self.folder / "volume" / "data"

    @property
    def snapshots(self) -> Path:
        """Snapshots and clones."""
        return self.folder / "volume" / "snapshots"

    @property
    def sockets(self) -> Path:
        """The socket of the server, and its log."""
        return self.folder / "server"

    @property
    def service_log(self) -> Path:
        """What the service said."""
        return self.folder / "service.log"


def why_no_btrfs() -> str:
    """Give what is missing for a btrfs volume of our own; "" where one can be tried."""
    if os.geteuid() != 0:
        return "a btrfs volume of its own needs root"
    gone = [program for program in ("mkfs.btrfs", "btrfs", "mount") if shutil.which(program) is None]
    if gone:
        return f"no {', '.join(gone)} here; the package btrfs-progs has them"
    if not any(Path("/usr").glob("lib*/**/libbtrfsutil.so.1")):
        return "no libbtrfsutil here; the package libbtrfsutil1 has it"
    return ""


async def prepare(folder: Path | None, storage: str) -> tuple[Place, str]:
    """Make the ground for a demo; gives it, and in words why it is not on btrfs ("" where it is, or was not asked).

    Args:
        folder: a new or empty one; None makes one under `/var/tmp`.
        storage: `btrfs`, `directory`, or `auto` for btrfs where it can be made.

    Raises:
        ConfigError: the folder is in use, or btrfs was asked for and cannot be made.
    """
    why = why_no_btrfs() if storage != "directory" else ""
    if storage == "btrfs" and why:
        raise ConfigError(why, hint="--storage directory works anywhere")
    root = _folder(folder)
    driver = "directory" if why or storage == "directory" else "btrfs"
    place = Place(root, driver, server_owner())
    try:
        if driver == "btrfs":
            try:
                await _make_btrfs(place)
            except TrigpointError as error:
                if storage == "btrfs":
                    raise
                why = error.message
                await _unmount(place)
                place = Place(root, "directory", place.owner)
        for part in (place.folder / "volume", place.data, place.sockets):
            part.mkdir(exist_ok=True)
        make_passage(place.state)
        for part in (place.data, place.sockets):
            os.chown(part, *place.owner)
        place.data.chmod(0o700)
    except BaseException:
        await dismantle(place.folder)
        raise
    return place, why


def _folder(asked: Path | None) -> Path:
    """Give an empty folder that the owner of the cluster can reach too, its path short enough for sockets."""
    if asked is None:
        folder = Path(tempfile.mkdtemp(prefix="trigpoint-demo-", dir="/var/tmp"))
    else:
        folder = asked.absolute()
        if refused := sorted(_REFUSED & set(str(folder))):
            raise ConfigError(
                f"PostgreSQL cannot be started in {folder}: {' '.join(refused)} in a path means something to it",
                hint="name another folder",
            )
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty", hint="name a new folder; a demo removes its folder at the end")
        folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / _MARK).touch()
    return folder


def kept(folder: Path | None) -> Path:
    """Give the folder of a demo that was kept; raises `ConfigError` for any other, since it will be removed."""
    if folder is None:
        raise ConfigError("--stop needs --folder", hint="the demo that was kept said which")
    if not (folder / _MARK).exists():
        raise ConfigError(f"{folder} is not the folder of a demo", hint="the demo that was kept said which")
    return folder.absolute()


async def _make_btrfs(place: Place) -> None:
    image, volume = place.folder / "volume.img", place.folder / "volume"
    volume.mkdir()
    with image.open("wb") as file:
        file.truncate(_VOLUME_BYTES)
    programs: tuple[list[str | Path], ...] = (
        ["mkfs.btrfs", "--quiet", image],
        ["mount", "-o", "loop,noatime", image, volume],
        ["btrfs", "subvolume", "create", place.data],
    )
    for arguments in programs:
        await run(arguments, deadline_seconds=_PROGRAM_SECONDS)


async def dismantle(folder: Path) -> None:
    """End what runs in the folder of a demo, unmount its volume and remove it all; what is gone already is no error."""
    await _end_processes(folder)
    place = Place(folder, "", (0, 0))
    await _unmount(place)
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _unmount(place: Place) -> None:
    volume = place.folder / "volume"
    if not volume.is_mount():
        return
    try:
        await run(["umount", volume], deadline_seconds=_PROGRAM_SECONDS)
    except TrigpointError:  # somebody looks into it: it goes when they leave
        await run(["umount", "--lazy", volume], deadline_seconds=_PROGRAM_SECONDS)


async def _end_processes(folder: Path) -> None:
    """Ask the service to end, then the servers, then whoever else is left; kill what does not listen."""
    await _end(lambda: _services(folder), signal.SIGTERM)
    await _end(lambda: _tops(_servers(folder)), signal.SIGINT)
    await _end(lambda: _servers(folder), signal.SIGKILL)


async def _end(find: Callable[[], list[int]], number: signal.Signals) -> None:
    """Send a signal to the processes that `find` gives, and wait a while until it gives none."""
    for pid in find():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_SECONDS):
            while find():  # noqa: ASYNC110 - they are not our children, nobody tells us
                await asyncio.sleep(0.05)


def _services(folder: Path) -> list[int]:
    """Give the processes that were started with the configuration of this folder."""
    config = str(Place(folder, "", (0, 0)).config)
    return [pid for pid in _processes() if config in _arguments(pid) and pid != os.getpid()]


def _servers(folder: Path) -> list[int]:
    """Give PostgreSQL's processes that work in this folder or on it; a server's working directory is its data."""
    return [
        pid
        for pid in _processes()
        if _name(pid) in _SERVERS
        and (_works_in(pid, folder) or any(argument.startswith(f"{folder}/") for argument in _arguments(pid)))
    ]


def _tops(pids: list[int]) -> list[int]:
    """Give those whose parent is not among them: postmasters, not their children."""
    parents = {pid: _stat(pid)[1:2] for pid in pids}
    return [pid for pid, parent in parents.items() if parent and int(parent[0]) not in pids]


def _processes() -> list[int]:
    """Give every process that lives; a zombie does not."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in found if _stat(pid)[:1] not in ([], ["Z"])]


def _works_in(pid: int, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(folder)
    return False


def _arguments(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _stat(pid: int) -> list[str]:
    """Give the fields of a process behind its name (state, parent, …); nothing where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []
