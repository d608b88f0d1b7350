"""What a transaction is called in short, and which one is meant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import history, transaction
from trigger.position import Name

TURN = 1 << 32
HISTORY = history("7391", 1)
ids = st.integers(3, 1 << 62)


@given(ids, st.integers(1 - TURN // 2, TURN // 2 - 1))
def test_the_low_half_of_an_id_means_the_one_nearest_to_a_late_one(late: int, behind: int) -> None:
    xid = max(3, late + behind)
    assert HISTORY.meant(transaction(xid % TURN), transaction(late)) == transaction(xid)


@given(ids.filter(lambda xid: xid >= TURN), ids)
def test_a_whole_id_means_itself_whatever_was_committed_last(xid: int, late: int) -> None:
    assert HISTORY.meant(transaction(xid), transaction(late)) == transaction(xid)


def test_what_is_no_number_means_itself() -> None:
    assert HISTORY.meant(Name("monday", None), transaction(5 * TURN)) == Name("monday", None)
    assert HISTORY.meant(Name("0-1-", 57), transaction(5 * TURN)) == Name("0-1-", 57)
