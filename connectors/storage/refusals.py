"""Errors of the operating system as those of the port."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from trigger.errors import StorageError, remedy
from trigger.trusted import NotOursError


@contextlib.contextmanager
def as_storage_error(doing: str, *, denied: str = "run as root, or as the owner of the files") -> Iterator[None]:
    """Turn an error of the operating system into a `StorageError` that says what was being done.

    `denied` is the hint where permission is missing.
    """
    try:
        yield
    except NotOursError as error:
        raise StorageError(f"{doing}: {error.message}", hint=error.remedy, retryable=False) from error
    except FileNotFoundError as error:
        raise StorageError(f"{doing}: {_words(error)}", retryable=False) from error
    except PermissionError as error:
        raise StorageError(f"{doing}: {_words(error)}", hint=denied, retryable=False) from error
    except OSError as error:
        raise StorageError(f"{doing}: {_words(error)}", hint=remedy(error)) from error


def _words(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
