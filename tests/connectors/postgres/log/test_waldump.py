"""Lines of `pg_waldump`, recorded from versions 15 and 18, say which transactions were committed."""

from __future__ import annotations

import pytest

from connectors.databases.postgres.log.waldump import CreatedTablespace, LoggedCommit, parse_commit, parse_tablespace
from connectors.databases.postgres.lsn import Lsn

_TRANSACTION = (
    "rmgr: Transaction len (rec/tot):     {length}/    {length}, tx:        {tx}, lsn: 0/01759A78, prev 0/01759A38, "
)


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
    assert parse_tablespace(line) == CreatedTablespace(16387, "/srv/with space/ts")


def test_a_tablespace_inside_the_data_directory_is_none_to_worry_about() -> None:
    line = (
        "rmgr: Tablespace  len (rec/tot):     54/    54, tx:        728, lsn: 0/01759E98, prev 0/01759DE8, "
        'desc: CREATE 16387 ""'
    )
    assert parse_tablespace(line) is None
