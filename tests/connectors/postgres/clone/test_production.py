"""Whether the server of a data directory works is seen wherever it was started: by its lock file, or by who answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from connectors.databases.postgres.clone.production import at_work, systems
from trigger.model import System, Volume


def said(folder: Path, conninfo: str = "") -> list[str]:
    return [finding.message for finding in asyncio.run(at_work([Volume("data", str(folder))], conninfo))]


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


def test_the_place_of_a_lock_file_that_was_moved_is_asked_nothing(tmp_path: Path) -> None:
    """After a restore in place the old state may hold the leftover of a crash, which names what is production now."""
    with a_listener() as port:
        for name in ("data", "data.before"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "PG_VERSION").write_text("15\n")
            lock = tmp_path / name / "postmaster.pid"
            lock.write_text(f"99999999\n{tmp_path / 'data'}\n1\n{port}\n\n127.0.0.1\n")
        (asked,) = said(tmp_path)
        assert f"the server in {tmp_path / 'data'} may run where its processes are not seen" in asked
        assert f"127.0.0.1 port {port} answers" in asked
    assert said(tmp_path) == []


@contextmanager
def a_listener() -> Iterator[int]:
    """Give the port of what refuses each client in PostgreSQL's own way, as a server that is starting does."""
    refusal = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"

    def serve(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                with client:
                    while client.recv(8)[:6] == b"\0\0\0\x08\x04\xd2":  # may it be encrypted?
                        client.sendall(b"N")
                    client.sendall(b"E" + (len(refusal) + 4).to_bytes(4, "big") + refusal)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        yield int(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_which_cluster_lies_somewhere_is_read_from_its_own_files_and_through_no_link(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    assert systems(data) == []
    (data / "global").mkdir(parents=True)
    (data / "PG_VERSION").write_text("16\n")
    control = data / "global" / "pg_control"
    control.write_bytes(b"cut off")
    assert systems(data) == []
    control.write_bytes((7712619737458263487).to_bytes(8, sys.byteorder) + bytes(300))
    assert systems(data) == [System("7712619737458263487", "PostgreSQL 16")]
    (data / "global").rename(elsewhere)
    (data / "global").symlink_to(elsewhere)
    assert systems(data) == []
