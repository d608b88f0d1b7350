"""The log comes out of an archive that the server fills by itself: what comes back, what is said, what is left alone.

The archive's two commands are small scripts of the operator's, so that a test can break and mend either while server
and service run. A file is copied into the archive as `cp` does it: it can be seen there half written.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fixtures import judge
from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import plain_folder
from trigger.errors import RestoreError

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

SEGMENT_BYTES = 1 << 20
_POINTS = "[points]\nmin_interval_seconds = 0\nper_minute = 6000\nretry_seconds = 0.2\n"


@dataclass
class Archive:
    """A folder of segments, with the command that the server fills it by and the one that reads it."""

    folder: Path

    def __post_init__(self) -> None:
        self.files, self.keep, self.bring = self.folder / "files", self.folder / "keep", self.folder / "bring"
        self.asked = self.folder / "asked"
        self.files.mkdir()
        self.files.chmod(0o777)
        self.asked.touch()
        self.mend()

    def mend(self) -> None:
        """Let both commands work."""
        self.write(self.keep, f'test ! -f {self.files}/$2 && cp "$1" {self.files}/$2')
        self.write(self.bring, f'echo $1 >> {self.asked}; cp {self.files}/$1 "$2"')

    def write(self, script: Path, text: str) -> None:
        fresh = script.with_suffix(".new")
        fresh.write_text(f"#!/bin/sh\n{text}\n")
        fresh.chmod(0o755)
        fresh.replace(script)

    def held(self) -> dict[str, str]:
        """Give what the archive holds, by name."""
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(self.files.iterdir())}


@contextlib.contextmanager
def archived(major: int) -> Iterator[tuple[Deployment, Archive]]:
    """A cluster that archives its log, and a service that is to read it there and is not started yet."""
    settings: dict[str, Any] = {"archive_mode": "on", "max_wal_size": "64MB", "min_wal_size": "2MB"}
    with (
        plain_folder() as folder,
        deployment(major, initdb=["--wal-segsize=1"], **settings) as found,
    ):
        archive = Archive(folder)
        found.cluster.configure({"archive_command": f"{archive.keep} %p %f"})
        found.cluster.sql("SELECT pg_reload_conf()")
        found.configure(f'{_POINTS}[journal]\ndriver = "archive"\nrestore_command = "{archive.bring} %f %p"\n')
        found.cluster.sql(judge.TRUTH_TABLE)
        yield found, archive


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Deployment, Archive]]:
    with archived(16) as made:
        yield made


@pytest.fixture
def here(shared: tuple[Deployment, Archive]) -> Deployment:
    """The deployment with its service running, and an archive that works."""
    deployed, archive = shared
    archive.mend()
    if deployed.process is None or deployed.process.poll() is not None:
        _begin(deployed)
    return deployed


@pytest.fixture
def archive(shared: tuple[Deployment, Archive]) -> Archive:
    return shared[1]


def _journal(deployed: Deployment) -> Path:
    return deployed.state / "journal"


def _begin(deployed: Deployment) -> None:
    """Start the service, and wait for a first segment, which an idle server does not finish by itself."""
    deployed.start()
    _arrives(deployed, _switch(deployed))


def _commit(deployed: Deployment, marker: str = "") -> int:
    with deployed.cluster.connect() as connection, connection.transaction():
        row = connection.execute("INSERT INTO truth (what) VALUES ('archived') RETURNING xid::text").fetchone()
        if marker:
            connection.execute("SELECT pg_logical_emit_message(true, 'trigpoint', %s)", [marker])
    assert row is not None
    return int(row[0])


def _switch(deployed: Deployment) -> str:
    """End the segment that is written; gives its name."""
    deployed.cluster.sql("SELECT pg_logical_emit_message(true, 'ballast', repeat('x', 100))")
    return str(deployed.cluster.sql("SELECT pg_walfile_name(pg_switch_wal() - 1)")[0][0])


def _arrives(deployed: Deployment, segment: str) -> None:
    deployed.wait_for((_journal(deployed) / segment).exists, f"segment {segment} in the journal")


def _findings(deployed: Deployment) -> dict[str, str]:
    return {finding["subject"]: finding["message"] for finding in deployed.status()["journal"]}


def test_a_first_start_waits_for_no_segment_and_promises_nothing_of_which_the_log_is_not_there_yet() -> None:
    with archived(18) as (here, _):
        here.cluster.sql("CHECKPOINT")  # so that the log is needed from the segment on that is being written
        began = time.monotonic()
        here.start()
        assert time.monotonic() - began < 15
        assert [name for name in _journal(here).glob("0*") if name.suffix != ".partial"] == []
        assert "the journal has not begun" not in here.log.read_text()
        xid = str(_commit(here))
        here.settle()
        (found,) = here.ask("find", "--xid", xid)
        assert "not yet restorable" in found["reason"] or found["base"] is None, found
        refused = here.trigpoint("restore", "--to-xid", xid, "--dry-run", check=False)
        assert refused.returncode != 0, refused.stdout
        _arrives(here, _switch(here))
        here.wait_for(lambda: here.trigpoint("restore", "--to-xid", xid, "--dry-run", check=False).returncode == 0, xid)
        _assert_comes_back(here, f"--to-xid={xid}", {int(xid)})
        assert here.stop() == 0


def test_what_is_archived_while_no_service_runs_is_found_planned_for_and_restored() -> None:
    with archived(15) as (here, archive):
        _begin(here)
        before = _commit(here)
        _arrives(here, _switch(here))
        here.wait_for(lambda: here.trigpoint("find", "--xid", str(before), check=False).returncode == 0, "its outcome")
        assert here.stop() == 0
        xids = [_commit(here) for _ in range(3)]
        for _ in range(3):
            last = _switch(here)
        here.wait_for(lambda: last in archive.held(), "all is archived")
        planned = here.trigpoint("restore", "--to-xid", str(xids[1]), "--dry-run").stdout
        assert f"commit {xids[1]}" in planned
        _assert_comes_back(here, f"--before-xid={xids[2]}", {before, *xids[:2]})
        _assert_comes_back(here, "--to-latest", {before, *xids})


def _assert_comes_back(deployed: Deployment, option: str, xids: set[int]) -> None:
    """An exact restore to what `option` names holds these transactions and nothing else."""
    report = deployed.ask("restore", option, "--name", "back")
    try:
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            assert {int(row[0]) for row in connection.execute("SELECT xid::text FROM truth")} == xids
    finally:
        deployed.trigpoint("clones", "drop", "--yes", "back")


def _through(deployed: Deployment, xid: int) -> set[int]:
    """Give the transactions up to one; they were made one after the other."""
    return {one for one in judge.written_ids(deployed.cluster) if one <= xid}


def test_a_commit_comes_back_exactly_once_its_segment_is_archived_and_is_refused_with_the_reason_before(
    here: Deployment,
) -> None:
    assert "which the server archived last" in " ".join(here.trigpoint("check").stdout.split())
    first = _commit(here, "wanted")
    second = _commit(here)
    here.settle()
    for arguments in (["--to-marker", "wanted", "--dry-run"], ["--before-xid", str(second)]):
        refused = here.trigpoint("restore", *arguments, check=False)
        assert refused.returncode == RestoreError.exit_code
        words = " ".join(refused.stderr.split())
        assert "lies in the future of the journal, which ends at" in words
        assert "wait until the journal has caught up" in words
    _arrives(here, _switch(here))
    assert here.trigpoint("restore", "--to-marker", "wanted", "--dry-run").returncode == 0
    _assert_comes_back(here, "--to-marker=wanted", _through(here, first))
    _assert_comes_back(here, f"--before-xid={second}", _through(here, first))


def test_an_archive_that_has_no_further_segment_yet_is_no_trouble(here: Deployment, archive: Archive) -> None:
    _commit(here)
    here.settle()
    following = here.cluster.sql("SELECT pg_walfile_name(pg_current_wal_flush_lsn())")[0][0]
    here.wait_for(lambda: archive.asked.read_text().split().count(following) >= 4, "a reader that was refused it")
    assert _findings(here) == {}
    assert here.status()["troubles"] == []


def _not_executable(archive: Archive) -> None:
    archive.bring.chmod(0o644)


def _killed(archive: Archive) -> None:
    archive.write(archive.bring, "kill -KILL $$")


def _unreadable(archive: Archive) -> None:
    archive.write(archive.bring, "echo Permission denied >&2; exit 1")


def _cut_short(archive: Archive) -> None:
    archive.write(archive.bring, f'head -c 1000 {archive.files}/$1 > "$2"')


@pytest.mark.parametrize(
    ("hurt", "subject", "said"),
    [
        (
            lambda archive: archive.bring.unlink(),
            "restore_command",
            "cannot be read: the command ended with exit code 127",
        ),
        (_not_executable, "restore_command", "cannot be read: the command ended with exit code 126"),
        (_killed, "restore_command", "cannot be read: the command ended with signal 9"),
        (_unreadable, "archive", "exit code 1: Permission denied"),
        (_cut_short, "archive", f"the command gave 1000 of {SEGMENT_BYTES} bytes"),
    ],
    ids=["not there", "not executable", "killed", "may not read", "cut short"],
)
def test_an_archive_that_cannot_be_read_is_shown_in_the_status_until_it_can(
    here: Deployment, archive: Archive, hurt: Any, subject: str, said: str
) -> None:
    hurt(archive)
    xid = _commit(here)
    name = _switch(here)
    for _ in range(5):
        _switch(here)
    here.wait_for(lambda: said in _findings(here).get(subject, ""), "the trouble in the status")
    if subject == "archive":
        assert name in _findings(here)[subject]
    shown = here.trigpoint("status").stdout
    assert said in shown
    assert "cannot be restored exactly until" in shown, "what it means, and what to do"
    archive.mend()
    here.wait_for(lambda: not _findings(here), "a status without what was mended")
    _assert_comes_back(here, f"--to-xid={xid}", _through(here, xid))


def test_a_segment_lost_from_journal_and_archive_is_found_gets_a_new_base_and_is_fetched_when_it_is_back(
    here: Deployment, archive: Archive
) -> None:
    here.trigpoint("point", "--note", "before the loss")
    _switch(here)
    lost, after = _switch(here), _switch(here)
    _arrives(here, after)
    newest = here.status()["last_point"]
    (archive.files / lost).rename(archive.folder / lost)
    (_journal(here) / lost).unlink()
    here.wait_for(lambda: _findings(here) == {lost: f"segment {lost} is missing"}, "the loss in the status")
    here.wait_for(lambda: here.status()["last_point"] > newest, "a new base behind it")
    xid = _commit(here)
    here.settle()
    _arrives(here, _switch(here))
    _assert_comes_back(here, f"--to-xid={xid}", _through(here, xid))
    (archive.folder / lost).rename(archive.files / lost)
    here.wait_for(lambda: not _findings(here), "a whole journal")
    assert (_journal(here) / lost).read_bytes() == (archive.files / lost).read_bytes()


def test_a_segment_that_the_archive_gives_damaged_is_found_and_a_new_base_follows(
    here: Deployment, archive: Archive
) -> None:
    newest = here.status()["last_point"]
    archive.write(
        archive.keep,
        f'cp "$1" {archive.files}/$2.sound && cd {archive.files} && cp $2.sound $2.rotten'
        " && printf ROTTEN | dd of=$2.rotten bs=1 seek=100 conv=notrunc && mv $2.rotten $2",
    )
    rotten = _switch(here)
    here.wait_for(lambda: f"segment {rotten} is damaged" in _findings(here).get(rotten, ""), "the damage in the status")
    here.wait_for(lambda: here.status()["last_point"] > newest, "a new base behind the damage")
    archive.mend()
    (archive.files / f"{rotten}.sound").replace(archive.files / rotten)
    (_journal(here) / rotten).unlink()
    here.wait_for(lambda: not _findings(here), "a journal that fetched the sound one")


def test_expire_and_release_let_go_of_our_own_copies_and_of_nothing_in_the_archive(
    here: Deployment, archive: Archive
) -> None:
    _arrives(here, _switch(here))
    here.cluster.sql("CHECKPOINT")
    here.trigpoint("point", "--note", "the oldest to keep")
    newest = here.status()["last_point"]
    before, copies = archive.held(), {file.name for file in _journal(here).glob("0*")}
    assert here.ask("expire", str(newest), "--yes")["segments"] > 0
    assert {file.name for file in _journal(here).glob("0*")} < copies
    following = here.cluster.sql("SELECT pg_walfile_name(pg_current_wal_flush_lsn())")[0][0]
    assert here.stop() == 0
    _switch(here)
    here.trigpoint("release", "--yes")
    _assert_holds_still(archive, before)
    here.cluster.sql("CHECKPOINT")
    here.start()
    _arrives(here, following)
    xid = _commit(here)
    here.settle()
    _arrives(here, _switch(here))
    _assert_comes_back(here, f"--to-xid={xid}", _through(here, xid))
    _assert_holds_still(archive, before)


def _assert_holds_still(archive: Archive, before: dict[str, str]) -> None:
    after = archive.held()
    assert {name: after.get(name) for name in before} == before


def test_a_journal_without_a_segment_begins_after_a_restart_where_it_would_have_before() -> None:
    with archived(18) as (deployed, _):
        _switch(deployed)
        deployed.cluster.sql("CHECKPOINT")
        deployed.start(wait=False)
        deployed.wait_for(lambda: any(_journal(deployed).glob("0*")), "a journal that knows where it begins")
        first = deployed.cluster.sql("SELECT pg_walfile_name(redo_lsn) FROM pg_control_checkpoint()")[0][0]
        assert deployed.stop() == 0
        assert [file.name for file in _journal(deployed).glob("0*")] == [f"{first}.partial"]
        for _ in range(3):
            _switch(deployed)
            deployed.cluster.sql("CHECKPOINT")
        deployed.start()
        deployed.wait_for((_journal(deployed) / first).exists, "the segment that it knew, whole")
        assert min(file.name for file in _journal(deployed).glob("0*")) == first
        assert deployed.stop() == 0


@pytest.mark.parametrize("begin", [_begin, Deployment.start])
def test_log_that_the_archive_gets_after_the_next_timelines_history_is_fetched_all_the_same(
    begin: Callable[[Deployment], None],
) -> None:
    with archived(15) as (deployed, archive):
        deployed.cluster.sql("CHECKPOINT")  # so that there is no first segment before one is begun
        begin(deployed)
        archive.write(archive.keep, f'case $2 in 00000001*) exit 1;; esac; cp "$1" {archive.files}/$2')
        behind = [_switch(deployed), _switch(deployed)]
        xid = _commit(deployed)
        deployed.settle()
        behind.append(_switch(deployed))
        deployed.cluster.switch_timeline()
        deployed.wait_for((_journal(deployed) / "00000002.history").exists, "the history of the next timeline")
        archive.mend()
        _arrives(deployed, _switch(deployed))
        for name in behind:
            _arrives(deployed, name)
        _assert_comes_back(deployed, f"--to-xid={xid}", _through(deployed, xid))
        assert deployed.stop() == 0


def test_what_a_server_committed_right_before_it_crashed_comes_back_out_of_the_next_timelines_segment() -> None:
    with archived(16) as (deployed, archive):
        _begin(deployed)
        whole = _switch(deployed)
        _arrives(deployed, whole)
        kept = []
        for _ in range(3):
            kept.append(_commit(deployed))
            deployed.settle()
        _promote_after_a_crash(deployed.cluster)
        deployed.settle()
        following = _switch(deployed)
        _arrives(deployed, following)
        deployed.wait_for(lambda: any(name.endswith(".partial") for name in archive.held()), "the unfinished segment")
        assert following.replace("00000002", "00000001", 1) not in archive.held()
        for xid in kept:
            (found,) = deployed.ask("find", "--xid", str(xid))
            assert (found["aside"], bool(found["base"])) == ("", True), found
            _assert_comes_back(deployed, f"--to-xid={xid}", _through(deployed, xid))
        _assert_comes_back(deployed, f"--before-xid={kept[-1]}", _through(deployed, kept[-2]))
        report = deployed.ask("restore", "--to-xid", str(kept[1]), "--name", "proven")
        assert "the next commit is not there" in [what for what, _, _ in report["checks"]], report["checks"]
        assert deployed.stop() == 0


def _promote_after_a_crash(cluster: Cluster) -> None:
    """Let the cluster recover from a crash onto its next timeline, with its last segment unfinished."""
    cluster.stop("immediate")
    cluster.configure({"restore_command": "false"})
    (cluster.data / "recovery.signal").touch()
    cluster.start()
    deadline = time.monotonic() + 60
    while cluster.sql("SELECT pg_is_in_recovery()")[0][0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
