"""The folders of clones' sockets lie where nobody else can put another one in their place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.clone import sockets
from connectors.databases.postgres.clone.isolation import Isolated
from trigger.errors import RestoreError

pytestmark = [pytest.mark.root]

OWNER, OTHER = 4321, 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """Give a folder like `/tmp`, in which everybody keeps his own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def acting_as(user: int) -> Iterator[None]:
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def make(user: int, folder: Path) -> Path:
    with acting_as(user):
        return sockets.make(folder, Isolated(Path("/clones/one/data"), (OWNER, OWNER), 15, ()))


@pytest.mark.parametrize("user", [0, OWNER])
@pytest.mark.parametrize("mode", [0o755, 0o777])
@pytest.mark.parametrize("is_made", [False, True])
def test_no_socket_lies_below_a_folder_of_another_user(shared: Path, user: int, mode: int, is_made: bool) -> None:
    above = shared / "above"
    above.mkdir()
    if is_made:
        (above / "sockets").mkdir()
        os.chown(above / "sockets", user, user)
    above.chmod(mode)
    os.chown(above, OTHER, OTHER)
    there = sorted(shared.rglob("*"))
    with pytest.raises(RestoreError, match=f"{above} belongs to user {OTHER}"):
        make(user, above / "sockets")
    assert sorted(shared.rglob("*")) == there


@pytest.mark.parametrize("user", [0, OWNER])
def test_no_socket_lies_where_others_may_write(shared: Path, user: int) -> None:
    above = shared / "above"
    above.mkdir()
    os.chown(above, user, user)
    above.chmod(0o777)
    with pytest.raises(RestoreError, match=f"{above} can be written by others"):
        make(user, above / "sockets")
    with pytest.raises(RestoreError, match=f"{above} can be written by others"):
        make(user, above)


@pytest.mark.parametrize("user", [0, OWNER])
def test_no_link_of_another_user_leads_to_the_sockets(shared: Path, user: int) -> None:
    (shared / "elsewhere").mkdir()
    os.chown(shared / "elsewhere", user, user)
    with acting_as(OTHER):
        (shared / "above").symlink_to("elsewhere")
    with pytest.raises(RestoreError, match="above"):
        make(user, shared / "above" / "sockets")
    assert not list((shared / "elsewhere").iterdir())


@pytest.mark.parametrize("user", [0, OWNER])
@pytest.mark.parametrize("whose", [0, OWNER])
def test_a_socket_lies_below_folders_of_ours_roots_or_the_owner_of_the_data(
    shared: Path, user: int, whose: int
) -> None:
    above = shared / "above"
    above.mkdir()
    os.chown(above, whose, whose)
    if whose == 0 and user == OWNER:
        (above / "sockets").mkdir()
        os.chown(above / "sockets", user, user)
    for _ in range(2):
        made = make(user, above / "sockets")
        status = made.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (OWNER, OWNER, 0o700)
        assert (above / "sockets").stat().st_mode & 0o777 == 0o755
