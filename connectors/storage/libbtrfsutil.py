"""The few calls of libbtrfsutil that the btrfs storage needs, through ctypes.

The library's own Python binding keeps the interpreter's lock while the kernel works, which would stop the event loop
for as long as a snapshot takes, and it has to be compiled; ctypes lets go of the lock, and the library itself is
part of every distribution (Debian: libbtrfsutil1). Numbers and structures are those of `btrfsutil.h` 1.1 and of
`linux/btrfs.h`. Every function blocks, and raises `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int, c_long, c_size_t, c_uint8, c_uint64, c_void_p
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from uuid import UUID

from trigger.errors import StorageError
from trigger.model import EPOCH

_OK, _STOP_ITERATION, _NOT_BTRFS, _NOT_SUBVOLUME = 0, 1, 4, 5
_SNAPSHOT_READ_ONLY = 1 << 1
_DELETE_RECURSIVE = 1 << 0
_ROOT_READ_ONLY = 1 << 0
_FS_INFO = 0x8400941F  # BTRFS_IOC_FS_INFO: _IOR(0x94, 31, 1024 bytes)


class _Time(Structure):
    _fields_ = (("seconds", c_long), ("nanoseconds", c_long))


class _Info(Structure):
    _fields_ = (
        ("id", c_uint64),
        ("parent_id", c_uint64),
        ("dir_id", c_uint64),
        ("flags", c_uint64),
        ("uuid", c_uint8 * 16),
        ("parent_uuid", c_uint8 * 16),
        ("received_uuid", c_uint8 * 16),
        ("generation", c_uint64),
        ("ctransid", c_uint64),
        ("otransid", c_uint64),
        ("stransid", c_uint64),
        ("rtransid", c_uint64),
        ("ctime", _Time),
        ("otime", _Time),
        ("stime", _Time),
        ("rtime", _Time),
    )


@dataclass(frozen=True, slots=True)
class Subvolume:
    """What the filesystem says of one subvolume."""

    uuid: UUID
    parent_uuid: UUID
    """The subvolume that this one is a snapshot of."""
    read_only: bool
    created_at: datetime
    """When it was made, by the kernel's coarse clock (some milliseconds early)."""


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbtrfsutil.so.1", use_errno=True)
    except OSError as error:
        hint = "install it (Debian: libbtrfsutil1), or use storage directory"
        raise StorageError(f"libbtrfsutil is not here: {error}", hint=hint, retryable=False) from error
    library.btrfs_util_strerror.restype = c_char_p
    library.btrfs_util_is_subvolume.argtypes = [c_char_p]
    library.btrfs_util_create_snapshot.argtypes = [c_char_p, c_char_p, c_int, POINTER(c_uint64), c_void_p]
    library.btrfs_util_set_subvolume_read_only.argtypes = [c_char_p, c_bool]
    library.btrfs_util_delete_subvolume.argtypes = [c_char_p, c_int]
    library.btrfs_util_subvolume_info.argtypes = [c_char_p, c_uint64, POINTER(_Info)]
    library.btrfs_util_create_subvolume_iterator.argtypes = [c_char_p, c_uint64, c_int, POINTER(c_void_p)]
    library.btrfs_util_destroy_subvolume_iterator.argtypes = [c_void_p]
    library.btrfs_util_destroy_subvolume_iterator.restype = None
    library.btrfs_util_subvolume_iterator_next.argtypes = [c_void_p, POINTER(c_void_p), POINTER(c_uint64)]
    library.btrfs_util_deleted_subvolumes.argtypes = [c_char_p, POINTER(c_void_p), POINTER(c_size_t)]
    return library


def load() -> None:
    """Load the library; raises `StorageError` where it is not installed."""
    _library()


def _require_ok(result: int, path: Path) -> None:
    if result == _OK:
        return
    number = ctypes.get_errno()
    words: bytes = _library().btrfs_util_strerror(result) or b"unknown error"
    raise OSError(number, f"{words.decode()}: {os.strerror(number)}", str(path))


def is_subvolume(path: Path) -> bool:
    """Whether `path` is the root of a btrfs subvolume."""
    result = _library().btrfs_util_is_subvolume(os.fsencode(path))
    if result in (_NOT_BTRFS, _NOT_SUBVOLUME):
        return False
    _require_ok(result, path)
    return True


def create_snapshot(source: Path, path: Path, *, read_only: bool) -> None:
    """Make a snapshot of the subvolume `source` at `path`, which must not be there.

    On return it is on stable storage: the kernel commits the transaction that it belongs to within the call
    (`create_snapshot` in fs/btrfs/ioctl.c; the asynchronous form was removed in Linux 5.7).
    """
    flags = _SNAPSHOT_READ_ONLY if read_only else 0
    result = _library().btrfs_util_create_snapshot(os.fsencode(source), os.fsencode(path), flags, None, None)
    _require_ok(result, path)


def delete_subvolume(path: Path, *, recursive: bool) -> None:
    """Delete a subvolume, with `recursive` also those inside it; its space comes back some time later.

    Only root deletes a read-only one; for an ordinary user it is made writable first.
    """
    flags = _DELETE_RECURSIVE if recursive else 0
    if os.geteuid() != 0:
        _require_ok(_library().btrfs_util_set_subvolume_read_only(os.fsencode(path), False), path)
    _require_ok(_library().btrfs_util_delete_subvolume(os.fsencode(path), flags), path)


def subvolume(path: Path) -> Subvolume:
    """Give what the filesystem says of the subvolume at `path`."""
    info = _Info()
    _require_ok(_library().btrfs_util_subvolume_info(os.fsencode(path), 0, byref(info)), path)
    since = timedelta(seconds=info.otime.seconds, microseconds=info.otime.nanoseconds // 1000)
    return Subvolume(
        UUID(bytes=bytes(info.uuid)),
        UUID(bytes=bytes(info.parent_uuid)),
        bool(info.flags & _ROOT_READ_ONLY),
        (EPOCH + since).astimezone(UTC),
    )


def nested(path: Path) -> list[str]:
    """Give the subvolumes inside the subvolume at `path`, by their paths in it."""
    library, iterator = _library(), c_void_p()
    _require_ok(library.btrfs_util_create_subvolume_iterator(os.fsencode(path), 0, 0, byref(iterator)), path)
    found: list[str] = []
    try:
        while True:
            text = c_void_p()
            result = library.btrfs_util_subvolume_iterator_next(iterator, byref(text), None)
            if result == _STOP_ITERATION:
                return found
            _require_ok(result, path)
            found.append(os.fsdecode(ctypes.string_at(text)))
            _free(text)
    finally:
        library.btrfs_util_destroy_subvolume_iterator(iterator)


def is_cleaning(path: Path) -> bool | None:
    """Whether deleted subvolumes of the filesystem that holds `path` still give room back; None where only root knows.

    The kernel cleans them up in the background, after the commit that deleted them.
    """
    identifiers, count = c_void_p(), c_size_t()
    result = _library().btrfs_util_deleted_subvolumes(os.fsencode(path), byref(identifiers), byref(count))
    if result != _OK and ctypes.get_errno() == errno.EPERM:
        return None
    _require_ok(result, path)
    _free(identifiers)
    return count.value > 0


def _free(pointer: c_void_p) -> None:
    ctypes.CDLL(None).free(pointer)


def filesystem_id(path: Path) -> UUID | None:
    """Give the id of the btrfs filesystem that holds `path`; None for any other filesystem."""
    buffer = bytearray(1024)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _FS_INFO, buffer)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return UUID(bytes=bytes(buffer[16:32]))
