"""What a pre-flight check says of our own places on this host: where they lie, who may write them; and of the clock."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from trigger.config.options import Options
from trigger.model import Finding, Severity, Volume
from trigger.trusted import why_not_ours

_TIME_ERROR = 5
"""What adjtimex(2) gives while the clock is not synchronised."""


def check(options: Options, volumes: Sequence[Volume]) -> list[Finding]:
    """Give what the pre-flight check has to say of our own places, their permissions, and the clock."""
    places = {
        "state folder": options.state_folder,
        "catalog": options.catalog_path.parent,
        "journal": options.journal_folder,
    }
    storages = {f"storage folder {name}".rstrip(): store.folder for name, store in options.stores.items()}
    return [
        *check_places(places | storages, volumes),
        *check_apart(storages),
        *check_ours(places),
        *check_secrets(options.guarded_files),
        *check_state_folder(options.state_folder),
        check_clock(clock_is_synchronised()),
    ]


def check_places(places: dict[str, Path], volumes: Sequence[Volume]) -> Iterator[Finding]:
    """Refuse what we write where it lies on a protected volume, by whatever name, link or mount it is reached."""
    roots = {_identity(Path(volume.path)): volume for volume in volumes if Path(volume.path).exists()}
    for what, path in places.items():
        inside = next((roots[i] for i in map(_identity, _with_parents(path)) if i in roots), None)
        if inside is not None:
            yield Finding(
                what,
                Severity.REFUSED,
                f"{path} lies on the protected volume {inside.name} ({inside.path})",
                "put it elsewhere: an in-place restore would take it back in time together with the data",
            )
        else:
            yield Finding(what, Severity.OK, f"{path} lies on no protected volume")


def check_apart(folders: dict[str, Path]) -> Iterator[Finding]:
    """Refuse two folders of storages that are one, by whatever link or mount they are reached."""
    seen: dict[tuple[int, int], str] = {}
    for what, path in folders.items():
        if path.exists() and (other := seen.setdefault(_identity(path), what)) != what:
            yield Finding(what, Severity.REFUSED, f"{path} is the {other} too", "give each storage a folder of its own")


def _identity(path: Path) -> tuple[int, int]:
    """Give device and inode, which are the same through links and bind mounts; on btrfs each subvolume is a device."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _with_parents(path: Path) -> Iterator[Path]:
    """Give the part of `path` that exists, without links, and all folders above it."""
    while not path.exists():
        path = path.parent
    real = path.resolve()
    yield from (real, *real.parents)


def check_ours(places: dict[str, Path]) -> Iterator[Finding]:
    """Refuse what we write where somebody else decides what lies there; of its own folder a storage says so itself."""
    told = set()
    for what, path in places.items():
        if (alien := why_not_ours(path)) is not None and alien.message not in told:
            told.add(alien.message)
            yield Finding(what, Severity.REFUSED, alien.message, alien.remedy)


def check_secrets(paths: Sequence[Path]) -> Iterator[Finding]:
    """Judge files that hold secrets, or that say what is run: nobody else may read or write them."""
    for path in paths:
        try:
            found = path.stat()
        except OSError as error:
            yield Finding(str(path), Severity.REFUSED, f"it cannot be read: {error.strerror}", "see the configuration")
            continue
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            owner = f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}"
            yield Finding(str(path), Severity.REFUSED, f"others may write it ({owner})", f"chown and chmod 0600 {path}")
        elif (alien := why_not_ours(path.parent)) is not None:
            yield Finding(str(path), Severity.REFUSED, f"others may replace it: {alien.message}", alien.remedy)
        else:
            yield Finding(str(path), Severity.OK, "nobody else may write it")


def check_state_folder(folder: Path) -> Iterator[Finding]:
    """Judge whether we may write the state folder, and nobody else may."""
    if not folder.exists():
        parent = next(above for above in folder.parents if above.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            message = f"{folder} is not there and cannot be made in {parent}"
            yield Finding(
                "state folder", Severity.REFUSED, message, f"make it, owned by user {os.geteuid()}, mode 0711"
            )
        return
    found = folder.stat()
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("state folder", Severity.REFUSED, f"{folder} cannot be written", f"chown {os.geteuid()} {folder}")
    elif found.st_mode & 0o022:
        message = f"{folder} can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
        yield Finding("state folder", Severity.REFUSED, message, f"chmod 0711 {folder}: whoever may write it is us")
    elif os.geteuid() == 0 and not found.st_mode & 0o001:
        message = f"clones' servers run as the data's owner, who does not get through {folder} to the log they replay"
        yield Finding("state folder", Severity.WARNING, message, f"chmod 0711 {folder}")


def check_clock(synchronised: bool | None) -> Finding:
    """Judge the clock; None where the kernel does not say."""
    if synchronised is None:
        return Finding("clock", Severity.NOTE, "the kernel does not say whether the clock is synchronised")
    if synchronised:
        return Finding("clock", Severity.OK, "synchronised")
    return Finding(
        "clock",
        Severity.NOTE,
        "not synchronised: --to-time is as exact as the clock; order is by position and does not depend on it",
        "run chrony or systemd-timesyncd",
    )


def clock_is_synchronised() -> bool | None:
    """Ask the kernel with adjtimex(2), which changes nothing when asked so; None where it cannot be asked."""
    try:
        answer = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))  # struct timex, zeroed: modes = 0
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else bool(answer != _TIME_ERROR)
