"""Lines of `pg_waldump`, recorded from versions 15 and 18, say which transactions were committed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from connectors.databases.postgres.log.waldump import (
    CreatedTablespace,
    Ended,
    LoggedCommit,
    Parameters,
    Stretch,
    WalDump,
    parse_commit,
    parse_ended,
    parse_parameters,
    parse_tablespace,
)
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import Programs

_TRANSACTION = (
    "rmgr: Transaction len (rec/tot):     {length}/    {length}, tx:        {tx}, lsn: 0/01759A78, prev 0/01759A38, "
)


_AT = datetime(2026, 11, 26, 10, 18, 40, tzinfo=UTC)


@pytest.mark.parametrize(
    ("tx", "description", "xid"),
    [
        ("725", "desc: COMMIT 2026-11-21 23:12:53.690434 UTC", 725),
        ("728", "desc: COMMIT 2026-11-21 23:12:53.704983 UTC; inval msgs: catcache 67; sync", 728),
        ("  0", "desc: COMMIT_PREPARED 729: 2026-11-21 23:12:53.712985 UTC", 729),
    ],
)
def test_a_commit_is_read_from_its_line(tx: str, description: str, xid: int) -> None:
    line = _TRANSACTION.format(length=46, tx=tx) + description
    assert parse_commit(line) == LoggedCommit(xid, Lsn.parse("0/1759A78"))


@pytest.mark.parametrize(
    "description",
    [
        "desc: ABORT 2026-11-21 23:12:53.690434 UTC",
        "desc: PREPARE gid COMMIT 5: 2026-11-21 23:12:53.709037 UTC",
        "desc: INVALIDATION ; inval msgs: catcache 67",
        "desc: ABORT_PREPARED 729: 2026-11-21 23:12:53.712985 UTC",
        "desc: ASSIGNMENT xtop 730: subxacts: 731",
    ],
)
def test_other_records_of_transactions_are_no_commits(description: str) -> None:
    assert parse_commit(_TRANSACTION.format(length=46, tx="725") + description) is None


def test_a_new_tablespace_is_read_with_its_folder() -> None:
    line = (
        "rmgr: Tablespace  len (rec/tot):     54/    54, tx:        728, lsn: 0/01759E98, prev 0/01759DE8, "
        'desc: CREATE 16387 "/srv/with space/ts"'
    )
    assert parse_tablespace(line) == CreatedTablespace(16387, "/srv/with space/ts", Lsn(0x1759E98))


def test_a_tablespace_inside_the_data_directory_is_none_to_worry_about() -> None:
    line = (
        "rmgr: Tablespace  len (rec/tot):     54/    54, tx:        728, lsn: 0/01759E98, prev 0/01759DE8, "
        'desc: CREATE 16387 ""'
    )
    assert parse_tablespace(line) is None


def test_the_settings_that_a_server_was_started_with_are_read_by_name() -> None:
    line = (
        "rmgr: XLOG        len (rec/tot):     54/    54, tx:          0, lsn: 0/01759E98, prev 0/01759DE8, desc: "
        "PARAMETER_CHANGE max_connections=100 max_worker_processes=8 max_wal_senders=20 max_prepared_xacts=40 "
        "max_locks_per_xact=64 wal_level=logical wal_log_hints=off track_commit_timestamp=on"
    )
    found = parse_parameters(line)
    assert found == Parameters(Lsn.parse("0/1759E98"), found.values if found else {})
    assert found.values["max_prepared_xacts"] == "40"
    assert found.values["track_commit_timestamp"] == "on"
    assert parse_parameters(line.replace("PARAMETER_CHANGE", "NOOP")) is None


def test_a_commit_of_millions_of_subtransactions_is_a_line_like_any_other(tmp_path: Path) -> None:
    """The program is a stand-in that prints, in the form of version 15, what 2.4 million subtransactions would give."""
    line = _TRANSACTION.format(length=9_600_046, tx="725") + "desc: COMMIT 2026-11-21 23:12:53.690434 UTC; subxacts:"
    other = _TRANSACTION.format(length=46, tx="9000000").replace("01759A78", "02759A78")
    program = tmp_path / "pg_waldump"
    program.write_text(f"""#!/bin/sh
        printf '%s' '{line}'
        seq -f ' %.0f' 1000000 3400000 | tr -d '\\n'
        printf '\\n%s\\n' '{other}desc: COMMIT 2026-11-21 23:12:54.000000 UTC'
    """)
    program.chmod(0o755)
    dump = WalDump(Programs(tmp_path, 15))
    found = asyncio.run(dump.commits(Stretch(tmp_path, 1, 16 << 20, Lsn(0), Lsn(48 << 20)), 10))
    assert found == [LoggedCommit(725, Lsn.parse("0/1759A78")), LoggedCommit(9000000, Lsn.parse("0/2759A78"))]


def test_one_end_of_a_transaction_is_there_before_the_program_has_read_all(tmp_path: Path) -> None:
    """Its output to a pipe comes in pieces of some KiB: the record asked for came last, seconds later."""
    line = _TRANSACTION.format(length=34, tx=725) + "desc: COMMIT 2026-11-26 10:18:40 UTC"
    program = tmp_path / "pg_waldump"
    program.write_text(f"#!/bin/sh\ncase \"$*\" in *--limit=1*) ;; *) sleep 60 ;; esac\necho '{line}'\n")
    program.chmod(0o755)
    dump = WalDump(Programs(tmp_path, 15), deadline_seconds=10)

    async def read() -> list[str]:
        return [
            line async for line in dump.transactions(Stretch(tmp_path, 1, 16 << 20, Lsn(0), Lsn(48 << 20)), one=True)
        ]

    assert list(map(parse_ended, asyncio.run(read()))) == [Ended(Lsn.parse("0/1759A78"), _AT, True)]


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        ("COMMIT 2026-11-26 10:18:40.123456 UTC; inval msgs: catcache 7", (_AT.replace(microsecond=123456), True)),
        ("COMMIT_PREPARED 741: 2026-11-26 10:18:40 UTC", (_AT, True)),
        ("ABORT 2026-11-26 10:18:40.500000 UTC", (_AT.replace(microsecond=500000), False)),
        ("PREPARE gid 2020-01-01 00:00:00 UTC: 2026-11-26 10:18:40 UTC", (None, True)),
        ("ASSIGNMENT xtop 700: subxacts: 701", None),
    ],
)
def test_the_end_of_a_transaction_is_read_with_its_time(said: str, ended: tuple[datetime | None, bool] | None) -> None:
    found = parse_ended(_TRANSACTION.format(length=34, tx=741) + f"desc: {said}")
    assert found == ((Lsn(0x1759A78), *ended) if ended else None)
