"""The journal follows the server through kills, restarts and timelines, and says of each fault which file it is in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import psycopg
import pytest

from connectors.databases.postgres.database import Postgres
from connectors.databases.postgres.log import receiver, search
from connectors.databases.postgres.log.archive import ArchiveReader
from connectors.databases.postgres.log.journal import PostgresJournal
from connectors.databases.postgres.log.receiver import Receiver
from connectors.databases.postgres.log.wal import PAGE_BYTES, SegmentName
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import minimal_environment
from tests.fixtures.restores import SEGMENT_BYTES, Ground, damage, fill, ground, replay_from, silent
from tests.fixtures.volumes import plain_folder
from trigger.errors import JournalError
from trigger.model import CommitRecord
from trigger.position import Name, Position
from trigger.replay import Target

pytestmark = [pytest.mark.server]


@pytest.fixture
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        yield made


@pytest.fixture(params=[15, 18])
def here(request: pytest.FixtureRequest, folder: Path) -> Iterator[Ground]:
    with ground(int(request.param), folder, btrfs=False) as made:
        yield made


@pytest.fixture
def newest(folder: Path) -> Iterator[Ground]:
    with ground(18, folder, btrfs=False) as made:
        yield made


def receivers(folder: Path) -> dict[int, str]:
    """Give the running pg_receivewal programs that write into a folder, with their argument vectors."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "/pg_receivewal " in words and f"--directory={folder} " in words:
                found[int(entry.parent.name)] = words
    return found


def test_a_commit_is_in_the_journal_within_a_second(here: Ground) -> None:
    async def run() -> None:
        async with here.journaling():
            lags = []
            for _ in range(5):
                end = here.durable()
                began = time.monotonic()
                await here.journal_reaches(end)
                lags.append(time.monotonic() - began)
            assert median(lags) < 1.0, lags
        assert not receivers(here.segments.path)

    asyncio.run(run())


def test_a_receiver_that_is_killed_is_started_again(here: Ground) -> None:
    async def run() -> None:
        async with here.journaling():
            fill(here.cluster, 2)
            await here.journal_reaches(here.durable())
            (pid,) = receivers(here.segments.path)
            os.kill(pid, signal.SIGKILL)
            fill(here.cluster, 2)
            await here.journal_reaches(here.durable())
            assert pid not in receivers(here.segments.path)
            (extent,) = await here.journal.extents()
            assert extent.end >= here.inserted().at - SEGMENT_BYTES
            assert await damage(here.journal) == []

    asyncio.run(run())


def test_a_receiver_ends_with_the_service_that_is_killed_and_its_successor_goes_on(newest: Ground) -> None:
    script = f"""
import asyncio
from pathlib import Path
from statistics import median
from connectors.databases.postgres.programs import Programs
from connectors.databases.postgres.log.receiver import Receiver
from connectors.databases.postgres.log.segments import SegmentFolder
segments = SegmentFolder(Path({str(newest.segments.path)!r}), {SEGMENT_BYTES})
segments.make({newest.cluster.owner})
programs = Programs(Path({str(newest.programs.folder)!r}), 18)
receiver = Receiver({newest.cluster.conninfo!r}, programs, "trigpoint_journal", owner={newest.cluster.owner})
asyncio.run(receiver.run(segments))
"""

    async def run() -> None:
        service = await asyncio.create_subprocess_exec(sys.executable, "-c", script, cwd=Path(__file__).parents[4])
        try:
            await newest.journal_reaches(newest.durable())
            assert receivers(newest.segments.path)
        finally:
            service.kill()
            await service.wait()
        async with asyncio.timeout(5):
            while receivers(newest.segments.path):  # noqa: ASYNC110 - another program
                await asyncio.sleep(0.05)
        async with newest.journaling():
            assert await damage(newest.journal) == []

    asyncio.run(run())


def test_a_half_made_segment_does_not_stop_the_journal(newest: Ground) -> None:
    async def run() -> None:
        async with newest.journaling():
            pass
        (partial,) = [entry for entry in newest.segments.path.iterdir() if entry.suffix == ".partial"]
        os.truncate(partial, 12345)
        async with newest.journaling():
            assert await damage(newest.journal) == []

    asyncio.run(run())


def test_a_receiver_that_stands_still_is_replaced(newest: Ground) -> None:
    async def run() -> None:
        async with newest.journaling():
            (pid,) = receivers(newest.segments.path)
            os.kill(pid, signal.SIGSTOP)
            await newest.journal_reaches(newest.durable())
            assert pid not in receivers(newest.segments.path)

    asyncio.run(run())


def test_the_check_says_where_the_slot_is_not_there_that_keeps_the_log(here: Ground) -> None:
    async def said() -> str:
        return next(one.message for one in await here.journal.check() if one.subject == "pg_receivewal")

    async def run() -> None:
        missing = "by slot trigpoint_journal, which is not there: no log is kept for it"
        assert missing in await said()
        async with here.journaling():
            await here.journal_reaches(here.durable())
            assert missing not in await said()

    asyncio.run(run())


def test_the_journal_goes_on_behind_a_restart_of_the_server(here: Ground) -> None:
    async def run() -> None:
        async with here.journaling():
            fill(here.cluster, 1)
            await asyncio.to_thread(here.cluster.stop)
            await asyncio.sleep(0.3)
            findings = await here.journal.audit()
            assert [finding.subject for finding in findings] == ["pg_receivewal"]
            await asyncio.to_thread(here.cluster.start)
            fill(here.cluster, 1)
            await here.journal_reaches(here.durable())
            assert len(await here.journal.extents()) == 1

    asyncio.run(run())


def test_the_journal_follows_production_to_another_timeline(newest: Ground) -> None:
    async def run() -> None:
        here = newest
        async with here.journaling():
            await asyncio.to_thread(here.keep_for_fork)
            fill(here.cluster, 2)
            fork = here.durable()
            fill(here.cluster, 3)  # lost on the new timeline: its segments have higher numbers than the fork
            lost = here.durable()
            await here.journal_reaches(lost)
            await here.fork(Target(fork.history, fork.at, True, "fork"))
            assert here.history().branch == 2
            fill(here.cluster, 1)
            await here.journal_reaches(here.durable())
            extents = {extent.history.branch: extent for extent in await here.journal.extents()}
            assert extents[1].end >= lost.at
            assert extents[2].start <= fork.at
            lineage = await here.journal.lineage(here.history())
            assert lineage.includes(Position(fork.history, fork.at - 100))
            assert not lineage.includes(lost)
            assert await damage(here.journal) == []

    asyncio.run(run())


@pytest.mark.parametrize("major", [15, 18])
def test_the_journal_follows_a_server_that_left_its_timeline_where_a_segment_ends(folder: Path, major: int) -> None:
    """As a standby that is fed by an archive; the program that receives gets no word of why nothing comes then."""

    async def run(here: Ground) -> None:
        async with here.journaling():
            history = here.durable().history
            here.cluster.sql("CHECKPOINT")
            switched = here.cluster.sql("SELECT pg_switch_wal()::text")[0][0]
            edge = Lsn((Lsn.parse(switched) // SEGMENT_BYTES + 1) * SEGMENT_BYTES)
            async with asyncio.timeout(30):
                while here.segments.names()[-1].partial:  # noqa: ASYNC110 - another program's work
                    await asyncio.sleep(0.02)
            await here.journal_reaches(Position(history, edge))
            here.cluster.stop("immediate")
            here.cluster.configure({"restore_command": "false"})
            (here.cluster.data / "recovery.signal").touch()
            await asyncio.to_thread(here.cluster.start)
            async with asyncio.timeout(60):
                while here.cluster.sql("SELECT pg_is_in_recovery()")[0][0]:  # noqa: ASYNC110 - another program's work
                    await asyncio.sleep(0.05)
            fork = (here.cluster.data / "pg_wal" / "00000002.history").read_text().split()[1]
            assert Lsn.parse(fork) == edge
            here.cluster.sql("CREATE TABLE later (v int)")
            await here.journal_reaches(here.durable())
            first, second = await here.journal.extents()
            assert (first.end, second.start) == (edge, edge)
            assert await damage(here.journal) == []

    with ground(major, folder, btrfs=False) as here:
        asyncio.run(run(here))


async def undone(here: Ground, segments: int, between: Callable[[], None] = lambda: None) -> tuple[Position, ...]:
    """Let production be restored in place, write a number of segments, and have that undone.

    Gives the ends of both of its pasts; the journal holds either, three segments of the first behind the fork.
    """
    await asyncio.to_thread(here.keep_for_fork)
    fill(here.cluster, 2)
    fork = here.durable()
    fill(here.cluster, 3)
    first = here.durable()
    await here.journal_reaches(first)
    await here.fork(Target(fork.history, fork.at, True, "fork"))
    fill(here.cluster, segments)
    second = here.durable()
    await here.journal_reaches(second)
    between()
    await asyncio.to_thread(here.undo_fork)
    assert (second.history.branch, here.history()) == (2, fork.history)
    return first, second


@pytest.mark.parametrize(("major", "segments"), [(15, 1), (16, 6), (18, 1), (18, 6)])
def test_the_journal_follows_a_restore_that_is_undone(folder: Path, major: int, segments: int) -> None:
    async def run(here: Ground) -> None:
        begin = here.durable()
        async with here.journaling():
            ends = [*await undone(here, segments)]
        async with here.journaling():  # from what it holds by now
            fill(here.cluster, 2)
            ends.append(here.durable())
            await here.journal_reaches(ends[-1])
            assert [extent.history.branch for extent in await here.journal.extents()] == [1, 2]
            assert await damage(here.journal) == []
            for end in ends:
                target = Target(end.history, end.at - 1, True, "end")
                await here.journal.stage(replay_from(begin, target), folder / "staged", silent)

    with ground(major, folder, btrfs=False) as here:
        asyncio.run(run(here))


def test_a_journal_that_cannot_follow_it_says_what_to_do(newest: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> None:
        raise PermissionError("the folder is locked")

    async def run() -> None:
        async with newest.journaling():
            await undone(newest, 1, lambda: monkeypatch.setattr(receiver, "_mark", locked))
            async with asyncio.timeout(20):
                while not any("is locked" in found.message for found in newest.receiver.findings()):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            (found,) = newest.receiver.findings()
            assert "starting timeline 2 is not present" in found.message
            assert "move the segments of the later timelines" in found.remedy
            monkeypatch.undo()
            await newest.journal_reaches(newest.durable())

    asyncio.run(run())


@pytest.mark.parametrize("language", ["English", "German"])
def test_a_hole_that_the_server_cannot_fill_is_crossed_and_reported(
    language: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server's words alone `pg_receivewal` tells that the log is gone, so it is asked to speak English."""
    if language == "German":
        german = minimal_environment() | {"LANGUAGE": "de", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        monkeypatch.setattr("tests.fixtures.postgres.minimal_environment", lambda: german)
    with ground(18, folder, btrfs=False) as newest:
        if language == "German":
            newest.cluster.sql("ALTER SYSTEM SET lc_messages = 'C.UTF-8'")
            newest.cluster.sql("SELECT pg_reload_conf()")
        _crosses_a_hole(newest)


def _crosses_a_hole(newest: Ground) -> None:
    async def run() -> None:
        here = newest
        async with here.journaling():
            fill(here.cluster, 1)
            await here.journal_reaches(here.durable())
        assert await here.journal.audit() == []
        here.cluster.sql("SELECT pg_drop_replication_slot('trigpoint_journal')")
        here.cluster.configure({"max_wal_size": "32MB", "min_wal_size": "32MB", "wal_keep_size": "0"})
        here.cluster.restart()
        fill(here.cluster, 6)
        here.cluster.sql("CHECKPOINT")
        async with here.journaling():
            fill(here.cluster, 2)
            await here.journal_reaches(here.durable())
            before, behind = await here.journal.extents()
            assert before.end < behind.start
            missing = [f for f in await here.journal.audit() if "missing" in f.message]
            hole = range(before.end // SEGMENT_BYTES, behind.start // SEGMENT_BYTES)
            assert {f.subject for f in missing} >= {SegmentName(1, n).text(SEGMENT_BYTES) for n in list(hole)[1:]}

    asyncio.run(run())


def test_a_password_is_in_no_argument_vector(newest: Ground) -> None:
    async def run() -> None:
        here = newest
        here.cluster.sql("CREATE ROLE keeper LOGIN REPLICATION PASSWORD 'open:se\\same'")
        hba = here.cluster.data / "pg_hba.conf"
        hba.write_text("host replication keeper 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
        here.cluster.sql("SELECT pg_reload_conf()")
        conninfo = psycopg.conninfo.make_conninfo(
            host="127.0.0.1", port=here.cluster.port, user="keeper", password="open:se\\same"
        )
        receiver = Receiver(conninfo, here.programs, "keeper", owner=here.cluster.owner)
        here.journal = here.journal_by(receiver)
        async with here.journaling():
            (arguments,) = receivers(here.segments.path).values()
            assert "same" not in arguments

    asyncio.run(run())


def _encrypted_identity(folder: Path, owner: tuple[int, int]) -> None:
    """Make a certificate that signs itself, with its key once as it is and once under the password `open sesame`."""
    folder.mkdir()
    whole = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=postgres"]
    for arguments in (
        [*whole, "-keyout", str(folder / "server.key"), "-out", str(folder / "server.crt")],
        ["openssl", "rsa", "-aes256", "-passout", "pass:open sesame", "-in", "server.key", "-out", "client.key"],
    ):
        subprocess.run(arguments, cwd=folder, check=True, capture_output=True, timeout=30)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.chown(path, *owner)


def test_a_password_of_a_key_is_in_no_argument_vector_and_opens_it(folder: Path) -> None:
    async def run() -> None:
        with ground(15, folder, btrfs=False) as here:
            keys = folder / "keys"
            _encrypted_identity(keys, here.cluster.owner)
            for name in ("ssl_cert_file", "ssl_ca_file", "ssl_key_file"):
                file = keys / ("server.key" if name == "ssl_key_file" else "server.crt")
                here.cluster.sql(f"ALTER SYSTEM SET {name} = '{file}'")
            here.cluster.sql("ALTER SYSTEM SET ssl = on")
            hba = here.cluster.data / "pg_hba.conf"
            hba.write_text(f"hostssl replication {'postgres'} 127.0.0.1/32 cert\n" + hba.read_text())
            here.cluster.sql("SELECT pg_reload_conf()")
            conninfo = psycopg.conninfo.make_conninfo(
                host="127.0.0.1",
                port=here.cluster.port,
                user="postgres",
                sslmode="require",
                sslcert=str(keys / "server.crt"),
                sslkey=str(keys / "client.key"),
                sslpassword="open sesame",
            )
            receiver = Receiver(conninfo, here.programs, "keeper", owner=here.cluster.owner)
            here.journal = here.journal_by(receiver)
            async with here.journaling():
                (arguments,) = receivers(here.segments.path).values()
                assert "sesame" not in arguments
                await here.journal_reaches(here.durable())

    asyncio.run(run())


def test_secrets_that_no_file_can_hold_are_refused_and_not_shown() -> None:
    for value in ("blank at the end ", "line\nend"):
        with pytest.raises(psycopg.ProgrammingError, match="sslpassword") as raised:
            receiver._secret_files({"sslpassword": value})
        assert value not in str(raised.value)


def test_the_log_of_another_cluster_goes_into_a_folder_of_its_own(newest: Ground) -> None:
    async def run() -> None:
        async with newest.journaling():
            pass
        (mine,) = await newest.journal.extents()
        names = newest.segments.names()
        with ground(18, newest.folder / "other", btrfs=False) as other:
            feed = Receiver(other.cluster.conninfo, other.programs, "other", owner=other.cluster.owner)
            other.journal = PostgresJournal(newest.folders, feed, other.present, lambda _: newest.dump)
            async with other.journaling():
                pass
            assert [extent.history for extent in await other.journal.extents()] == [mine.history, other.history()]
            assert (await newest.journal.extents())[0] == mine
            assert newest.segments.names() == names
            assert await damage(other.journal) == []

    (newest.folder / "other").mkdir()
    asyncio.run(run())


def test_an_archive_is_followed_and_asked_for_what_a_restore_needs(folder: Path) -> None:
    archive = folder / "archive"
    archive.mkdir()
    archive.chmod(0o777)

    async def run() -> None:
        command = f"test ! -f {archive}/%f && cp %p {archive}/%f"
        with ground(15, folder, btrfs=False, archive_mode="on", archive_command=command) as here:
            begin, server = here.durable(), Postgres(here.cluster.conninfo, ["postgres"])
            reader = ArchiveReader(f"cp {archive}/%f %p", server, owner=here.cluster.owner, poll_seconds=0.1)
            here.journal = here.journal_by(reader)
            task = asyncio.create_task(here.journal.run())
            fill(here.cluster, 3)
            end = here.durable()
            here.cluster.sql("SELECT pg_switch_wal()")
            await here.journal_reaches(end)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert await here.journal.audit() == []
            lost = next(name for name in here.segments.names() if not name.partial)
            here.segments.file(lost).unlink()
            target = Target(end.history, end.at, True, "end")
            await here.journal.stage(replay_from(begin, target), folder / "staged", silent)
            assert (folder / "staged" / lost.text(SEGMENT_BYTES)).exists()
            await server.close()  # which is asked whether what comes out of the archive is its own

    asyncio.run(run())


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_a_log_that_has_not_what_the_catalog_has_around_a_state_is_not_replayed(newest: Ground, side: str) -> None:
    async def run() -> None:
        begin = newest.durable()
        async with newest.journaling():
            for _ in range(3):
                newest.cluster.sql("CREATE TABLE IF NOT EXISTS once (v int); INSERT INTO once VALUES (1)")
            end = newest.durable()
            await newest.journal_reaches(end)
        dump, like = WalDump(newest.programs), Name("", 700)
        found = search.commits(newest.segments, dump, begin.history, begin.at, end.at, like)
        logged = [one async for one in found]
        before, after = (one.record for one in logged[-2:])
        target = Target(begin.history, before.end, False, "the state before a place")
        replay = replay_from(begin, replace(target, around=(before, after)))
        assert await newest.journal.stage(replay, newest.folder / "staged", silent)
        if side == "inside":
            around: tuple[CommitRecord, ...] = (before._replace(time_us=before.time_us + 1), after)
        else:
            around = (before, after._replace(time_us=after.time_us + 1))
        with pytest.raises(JournalError, match=r"has something else at .* than commit"):
            await newest.journal.stage(replay_from(begin, replace(target, around=around)), newest.folder / "s", silent)
        next_page = end.at - end.at % PAGE_BYTES + PAGE_BYTES
        beyond = after._replace(start=next_page + 64, end=next_page + 112)  # the log has not come so far
        replay = replay_from(begin, replace(target, around=(before, beyond)))
        assert await newest.journal.stage(replay, newest.folder / "staged", silent)

    asyncio.run(run())
