"""What is written down about each clone, in one folder of small files.

`<name>.intent` is there before anything of a clone is, and locked by the process that makes it; `<name>.json` replaces
it once the clone is proven. So whatever a killed restore left behind is found by its intent, whose lock the kernel
has let go. Both are written whole and renamed or linked into place. The log for a clone's replay is staged in a
folder of its own elsewhere. All functions block on small file operations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trigger.errors import RestoreError
from trigger.host import make_passage
from trigger.trusted import sync_folder

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def clone_name(text: str) -> str:
    """Give `text` if a clone may be called that (lower-case letters, digits, `-`, 40 at most), else `RestoreError`."""
    if _NAME.fullmatch(text) is None:
        raise RestoreError(
            f"a clone cannot be called {text!r}",
            hint="use lower-case letters, digits and -, beginning with a letter or digit, 40 at most",
        )
    return text


def new_identity() -> str:
    """Give what no other clone bears."""
    return secrets.token_hex(16)


def new_name(kind: str) -> str:
    """Give a name nobody has: `trg-<kind>-` and eight hexadecimal digits."""
    return clone_name(f"trg-{kind}-{secrets.token_hex(4)}")


@dataclass(frozen=True, slots=True)
class CloneRecord:
    """One clone: what it is a copy of, and how to reach its server."""

    name: str
    target: str
    """The state it was brought to, for people."""
    base: int
    """The number of the point it is a copy of."""
    created_at: datetime
    conninfo: str = ""
    data_directory: str = ""
    notes: tuple[str, ...] = ()
    history: str = ""
    """In which it goes on by itself; "" for a clone of an earlier version."""
    stands_at: str = ""
    """The position up to which it holds the log of the database it is a copy of; "" likewise."""
    checks: tuple[tuple[str, bool, str], ...] = ()
    """By which it was proven."""
    identity: str = ""
    """What the clone in the storage bears too; "" for one of an earlier version."""


@dataclass(frozen=True, slots=True)
class Written:
    """A record with what its file says about it."""

    record: CloneRecord
    finished: bool
    """Whether the clone was proven."""
    busy: bool
    """Whether a living process is making it."""


@contextlib.contextmanager
def intent(folder: Path, record: CloneRecord) -> Iterator[None]:
    """Hold the name of a clone while it is made; the intent stays behind until `finish` or `forget`.

    Raises:
        RestoreError: the name is taken.
    """
    make_passage(folder)
    draft = folder / f".{record.name}.{secrets.token_hex(4)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, _text(record))
            os.fsync(descriptor)
            _take_name(folder, record.name, draft)
        finally:
            draft.unlink()
        sync_folder(folder)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def abandoned(folder: Path, name: str) -> Iterator[CloneRecord | None]:
    """Hold the intent of a clone whose maker died, so that nobody else removes it; None where it is no such one."""
    with contextlib.ExitStack() as held:
        try:
            descriptor = os.open(_intent(folder, name), os.O_RDONLY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_it = os.path.samestat(os.fstat(descriptor), _intent(folder, name).stat())
            record = _record(_intent(folder, name).read_text())
        except (BlockingIOError, FileNotFoundError, ValueError, TypeError, KeyError):
            is_it, record = False, None
        yield record if is_it and not _done(folder, name).exists() else None


def _take_name(folder: Path, name: str, draft: Path) -> None:
    """Put the intent in its place, whole and locked from its first moment there."""
    with contextlib.suppress(FileExistsError):
        os.link(draft, _intent(folder, name))
        if not _done(folder, name).exists():  # only now nobody else can finish one under this name
            return
        _intent(folder, name).unlink()
    raise RestoreError(
        f"there is a clone {name} already",
        hint=f"choose another name, or remove it: trigpoint clones drop {name}",
    )


def finish(folder: Path, record: CloneRecord) -> None:
    """Replace the intent of a clone by its final record."""
    draft = folder / f".{record.name}.{secrets.token_hex(4)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, _text(record))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    draft.rename(_done(folder, record.name))
    _intent(folder, record.name).unlink(missing_ok=True)
    sync_folder(folder)


def forget(folder: Path, name: str) -> None:
    """Remove everything that is written about a clone; nothing to remove is no error."""
    if folder.exists():
        _done(folder, name).unlink(missing_ok=True)
        _intent(folder, name).unlink(missing_ok=True)
        sync_folder(folder)


def written(folder: Path) -> dict[str, Written]:
    """Give every record by name; one that cannot be read is left out, and its clone shows up as nobody's."""
    found: dict[str, Written] = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.suffix not in (".intent", ".json") or _NAME.fullmatch(path.stem) is None:
            continue
        finished = path.suffix == ".json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            record = _record(path.read_text())
            if finished or path.stem not in found:  # a crash between the two steps of `finish` leaves both
                found[path.stem] = Written(record, finished, not finished and _locked(path))
    return found


def make_folder(folder: Path) -> None:
    """Make a folder for staged log, which its owner alone may enter; who may pass above is let through."""
    make_passage(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder of staged log; nothing to remove is no error. Raises `RestoreError`."""
    try:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
    except OSError as error:
        raise RestoreError(f"{folder} cannot be removed: {error.strerror}", hint="remove it by hand") from error


def free_bytes(folder: Path) -> int:
    """Give the room of the filesystem on which `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _intent(folder: Path, name: str) -> Path:
    return folder / f"{clone_name(name)}.intent"


def _done(folder: Path, name: str) -> Path:
    return folder / f"{clone_name(name)}.json"


def _text(record: CloneRecord) -> bytes:
    return json.dumps(dataclasses.asdict(record) | {"created_at": record.created_at.isoformat()}, indent=1).encode()


def _record(text: str) -> CloneRecord:
    found = json.loads(text)
    found["created_at"] = datetime.fromisoformat(found["created_at"])
    found["notes"] = tuple(found["notes"])
    found["checks"] = tuple((what, held, seen) for what, held, seen in found.get("checks", ()))
    known = {field.name for field in dataclasses.fields(CloneRecord)}
    return CloneRecord(**{name: value for name, value in found.items() if name in known})


def _locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
