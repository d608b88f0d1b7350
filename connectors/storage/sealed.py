"""Small documents that are sealed with a digest, so that one which is torn or was changed counts as missing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trigger.trusted import open_file, sync_folder


def replace(path: Path, content: dict[str, Any]) -> None:
    """Put a document in its place durably: the old one is there or the new one, and never neither."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    write_new(fresh, content)
    fresh.replace(path)
    sync_folder(path.parent)


def write_new(path: Path, content: dict[str, Any]) -> None:
    """Write a document where none is; its content is durable, its name with the filesystem's next commit."""
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
        file.write(json.dumps({"content": content, "sha256": _digest(content)}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any] | None:
    """Give what a document says; None where it is not there, damaged, or cannot be read.

    So it shows nothing of what lies beside it: that has to be looked at by itself.
    """
    try:
        with os.fdopen(open_file(path), "rb") as file:
            document = json.loads(file.read())
        content: dict[str, Any] = document["content"]
        return content if document["sha256"] == _digest(content) else None
    except (OSError, KeyError, TypeError, ValueError, RecursionError):  # of what cannot be read nothing else is known
        return None


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
