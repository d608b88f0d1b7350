"""Every error that Trigpoint raises on purpose.

    TrigpointError
     ├─ ConfigError      the configuration or the command line is wrong          (exit 2)
     ├─ PositionError    a position cannot be read, or two do not compare        (exit 2)
     ├─ PreflightError   the cluster or a volume may not be protected as it is   (exit 3)
     ├─ SourceError      the stream of commits broke, or its slot is gone        (exit 4)
     ├─ DatabaseError    the database did not answer, or refused                 (exit 4)
     ├─ AgentError       a host did not prove its flush                          (exit 5)
     ├─ StorageError     a snapshot or a clone was not made                      (exit 6)
     ├─ CatalogError     the catalog cannot be read or written                   (exit 7)
     │   ├─ DamagedError     what is there is no catalog, or not whole any more  (exit 7)
     │   └─ NotFoundError    it can, and what was named is not in it             (exit 11)
     ├─ JournalError     the log is not there, or damaged                        (exit 8)
     ├─ RestoreError     a target cannot be reached, or a clone failed           (exit 9)
     └─ VerifyError      a restored point is not what it should be               (exit 10)

Each error says whether trying again can help (`retryable`) and what the operator can do (`hint`). It is logged
once, where it is handled; elsewhere it is raised on.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class TrigpointError(Exception):
    """Something failed; the message names what, with which value, and `hint` says what to do.

    Args:
        message: one sentence without a full stop, the failing value in it.
        hint: what the operator can do, or "".
        retryable: whether the same call may succeed later without anybody's doing; the class's default if None.
    """

    exit_code: ClassVar[int] = 1
    retryable: bool = False

    def __init__(self, message: str, *, hint: str = "", retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if retryable is not None:
            self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(TrigpointError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class PositionError(TrigpointError):
    """A position cannot be read, or two positions do not compare."""

    exit_code = 2


class PreflightError(TrigpointError):
    """The cluster or a volume may not be protected as it is."""

    exit_code = 3


class SourceError(TrigpointError):
    """The stream of commits broke, or its slot is gone."""

    exit_code = 4
    retryable = True


class DatabaseError(TrigpointError):
    """The database did not answer, or refused."""

    exit_code = 4
    retryable = True


class AgentError(TrigpointError):
    """A host did not prove its flush."""

    exit_code = 5
    retryable = True


class StorageError(TrigpointError):
    """A snapshot or a clone was not made, read or deleted."""

    exit_code = 6
    retryable = True


class CatalogError(TrigpointError):
    """The catalog cannot be read or written."""

    exit_code = 7


class DamagedError(CatalogError):
    """What lies in the catalog's place is no catalog, or not whole any more: waiting and rights will not help."""


class NotFoundError(CatalogError):
    """The catalog was read, and what was named is not in it."""

    exit_code = 11


class JournalError(TrigpointError):
    """The log that a restore must replay is not there, or is damaged."""

    exit_code = 8


class RestoreError(TrigpointError):
    """A target cannot be reached, or a clone failed to come up."""

    exit_code = 9


class TooEarlyError(RestoreError):
    """A target lies before every point that a restore could start from."""


class VerifyError(TrigpointError):
    """A restored point is not what it should be."""

    exit_code = 10


def remedy(error: OSError) -> str:
    """Give what the operator can do about an error of the system; "" for nothing that is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room on the filesystem that it lies on, or raise the quota"
    if error.errno == errno.EIO:
        return "its disk does not answer as it should: see the kernel's log, and mend that first"
    if error.errno == errno.EROFS:
        return "its filesystem is read-only; the kernel does that after errors: see its log, and mount it writable"
    return "run it as the user that may, or as root" if isinstance(error, PermissionError) else ""
