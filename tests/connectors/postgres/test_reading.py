"""Root reads nothing for the owner of the data by a link that he put there, and waits for no pipe of his."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases import postgres
from connectors.databases.postgres import lsn
from connectors.databases.postgres.clone import isolation, postmaster, production, recovery
from connectors.databases.postgres.clone.isolation import OWN_FOLDER, Isolated
from connectors.databases.postgres.clone.state import State
from connectors.databases.postgres.log.audit import Audit
from connectors.databases.postgres.log.files import text_inside
from connectors.databases.postgres.log.folders import LogFolders
from tests.fixtures.volumes import plain_folder
from trigger.errors import JournalError, RestoreError
from trigger.model import Volume
from trigger.position import Position
from trigger.replay import Replay, Target
from trigger.trusted import read_text

NOBODY = 65534
SECRET = "root's"
STATE = State("one", "host=/s port=5432 user=postgres application_name=trigpoint", "1", 2, "0/1", "", (), 7)
IN_KERNEL = {"entry", "process / 'comm'", "Path(f'/proc/{pid}/environ')"}
"""What is read of `/proc`, where nobody puts links."""


class Site:
    """A data directory and a folder of staged log, which belong to nobody, and a file of root's."""

    def __init__(self, folder: Path) -> None:
        self.secret, self.data, self.staged = folder / "secret", folder / "data", folder / "staged"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)
        (self.data / OWN_FOLDER).mkdir(parents=True)
        self.staged.mkdir()
        for one in (self.data, self.data / OWN_FOLDER, self.staged):
            os.chown(one, NOBODY, NOBODY)
        self.isolated = Isolated(self.data, (NOBODY, NOBODY), 16, ())

    def lead(self, name: str, text: str) -> None:
        """Put a link in the place of a file of the data directory, to one of root's with such a text."""
        self.secret.write_text(text)
        (self.data / name).symlink_to(self.secret)


@pytest.fixture
def site() -> Iterator[Site]:
    with plain_folder() as folder:
        yield Site(folder)


def test_no_file_of_a_folder_that_was_given_away_is_read_in_another_way() -> None:
    """It is opened by `trigger.trusted`, directly or by what stands in `log/files.py`."""
    top = Path(postgres.__path__[0])
    for path in [*top.glob("clone/*.py"), *top.glob("log/*.py"), top / "places.py"]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            for function in (call.func, *call.args):  # also one that is given to a thread
                if isinstance(function, ast.Attribute) and function.attr in ("read_text", "read_bytes", "open"):
                    subject = ast.unparse(function.value)
                    assert subject == "os" or subject in IN_KERNEL, f"{path.name}:{call.lineno}: {subject}"
                assert not isinstance(function, ast.Name) or function.id != "open", f"{path.name}:{call.lineno}"


@pytest.mark.root
@pytest.mark.parametrize("way", ["a link", "a pipe", "a folder that is a link", "the top that is a link"])
def test_only_an_ordinary_file_without_a_link_on_the_way_is_read(site: Site, way: str) -> None:
    file, top = Path(OWN_FOLDER, "file"), site.data
    if way == "a link":
        (site.data / file).symlink_to(site.secret)
    elif way == "a pipe":
        os.mkfifo(site.data / file)
    else:
        (site.data / file).write_text(SECRET)
        there = top if way.startswith("the top") else site.data / OWN_FOLDER
        there.rename(there.with_name("moved"))
        there.symlink_to("moved")
    with pytest.raises(OSError, match=r"symbolic link|no ordinary file|Not a directory"):
        text_inside(top, file)


def test_of_a_long_text_the_end_is_read(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.truncate(1 << 33)
        file.seek(0, os.SEEK_END)
        file.write(b"the last words")
    assert read_text(tmp_path / "log").endswith("\0the last words")


@pytest.mark.root
def test_no_history_file_that_is_a_link_becomes_the_clones(site: Site) -> None:
    history = lsn.history("1", 1)
    as_cut = Replay(Target(history, None, True, "point 1", point="1"), Position(history, 1), 1, as_cut=True)
    (site.staged / "00000002.history").write_text("1\t0/1\tno reason\n")
    (site.staged / f"{1:024X}").write_text("log")
    for _ in range(2):
        given = recovery._visible_log(site.isolated, site.staged, as_cut)
        assert [(file.name, file.stat().st_uid) for file in given.iterdir()] == [("00000002.history", NOBODY)]
    (site.staged / "000000FF.history").symlink_to(site.secret)
    with pytest.raises(RestoreError, match=r"000000FF\.history is a symbolic link"):
        recovery._visible_log(site.isolated, site.staged, as_cut)
    assert SECRET not in [file.read_text() for file in given.iterdir()]
    (site.staged / "000000FF.history").unlink()
    given.rename(given.with_name("moved"))
    given.symlink_to(site.secret.parent)
    with pytest.raises(NotADirectoryError):
        recovery._visible_log(site.isolated, site.staged, as_cut)


@pytest.mark.root
def test_no_lock_file_or_version_is_read_by_a_link(site: Site) -> None:
    (site.data / "PG_VERSION").write_text("16")
    process = subprocess.Popen(["sleep", "60"], cwd=site.data)
    try:
        site.lead("postmaster.pid", f"{process.pid}\n")
        assert postmaster.find(site.data) is None
        assert asyncio.run(production.at_work([Volume("data", str(site.data))])) == []
    finally:
        process.kill()
        process.wait()
    (site.data / "PG_VERSION").unlink()
    site.lead("PG_VERSION", "16")
    with pytest.raises(RestoreError, match="PG_VERSION is a symbolic link"):
        isolation.major_of(site.data)


@pytest.mark.root
def test_the_journal_reads_no_file_of_its_own_by_a_link(site: Site) -> None:
    segments = LogFolders(site.data, 16 << 20).all()[0]
    site.lead("audit.json", "{}")
    with pytest.raises(JournalError, match=r"audit\.json is a symbolic link"):
        Audit(segments, lambda: None).load()


@pytest.mark.root
def test_what_a_clone_is_is_not_read_by_a_link(site: Site) -> None:
    STATE.write(site.data)
    assert State.read(site.data) == STATE
    (site.data / OWN_FOLDER / State.FILE).unlink()
    site.lead(f"{OWN_FOLDER}/{State.FILE}", STATE.as_json())
    with pytest.raises(RestoreError, match=r"running\.json is a symbolic link"):
        State.read(site.data)


@pytest.mark.parametrize(
    "conninfo",
    [
        "host=/s passfile=/roots/passwords",
        "host=/s service=mine",
        "host=elsewhere port=5432 user=postgres",
        "host=/s hostaddr=192.0.2.1",
        "user=postgres",
        "nothing of that kind",
    ],
)
def test_a_clone_is_reached_by_a_socket_of_this_host_whatever_its_owner_wrote(tmp_path: Path, conninfo: str) -> None:
    (tmp_path / OWN_FOLDER).mkdir()
    (tmp_path / OWN_FOLDER / State.FILE).write_text(json.dumps(json.loads(STATE.as_json()) | {"conninfo": conninfo}))
    with pytest.raises(RestoreError, match="is not a clone that was brought up"):
        State.read(tmp_path)
