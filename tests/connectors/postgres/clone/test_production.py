"""Whether the server of a data directory works is seen wherever it was started: by its lock file, or by who answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from connectors.databases.postgres.clone.production import at_work
from trigger.model import Volume


def said(folder: Path, conninfo: str = "") -> list[str]:
    return [finding.message for finding in at_work([Volume("data", str(folder))], conninfo)]


def test_the_process_of_a_lock_file_is_a_server_as_long_as_it_works_there(tmp_path: Path) -> None:
    main = tmp_path / "15" / "main"
    with a_server_in(main) as pid:
        assert said(tmp_path) == [f"the server in {main} runs (process {pid})"]
    assert said(tmp_path) == []


@contextmanager
def a_server_in(folder: Path) -> Iterator[int]:
    """Give the pid of a process that works in `folder`, as a postmaster does, and says so in its lock file."""
    folder.mkdir(parents=True)
    server = subprocess.Popen([sys.executable, "-c", "input()"], cwd=folder, stdin=subprocess.PIPE)
    try:
        (folder / "postmaster.pid").write_text(f"{server.pid}\n{folder}\n")
        yield server.pid
    finally:
        server.communicate(b"\n")


def test_a_lock_file_whose_process_works_elsewhere_is_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "postmaster.pid").write_text(f"{os.getpid()}\n")
    assert said(tmp_path) == []
    for torn in ("", "x\n", "99999999\n"):
        (tmp_path / "postmaster.pid").write_text(torn)
        assert said(tmp_path) == []
