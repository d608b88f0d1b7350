"""Where a stream resumes behind what was settled, and when that is a break: every case, without a server."""

from __future__ import annotations

import pytest

from connectors.databases.postgres.lsn import Lsn, full_xid
from connectors.databases.postgres.stream.copyboth import Present
from connectors.databases.postgres.stream.slot import resume, slot_name
from trigger.position import History, Lineage, Position

HERE = Lineage(History("postgres", "s", 3), ((1, Lsn(100)), (2, Lsn(200))))


def at(lsn: int, timeline: int = 3, system: str = "s") -> Position:
    return Position(History("postgres", system, timeline), Lsn(lsn))


@pytest.mark.parametrize(
    ("after", "confirmed", "made", "behind", "reason"),
    [
        (None, 250, "", 250, ""),
        (None, 250, "the slot had been dropped", 250, ""),
        (at(300), 300, "", 300, ""),
        (at(300), 250, "", 300, ""),
        (at(300), 301, "", 301, "recreated or moved ahead"),
        (at(300), 350, "the slot had been dropped", 350, "the slot had been dropped"),
        (at(401), 250, "", 250, "older copy"),
        (at(300, system="t"), 250, "", 250, "the cluster was replaced"),
        # a synchronised slot on a promoted standby: what was settled in the common past is not given again
        (at(150, timeline=2), 120, "", 150, "the timeline changed from 2 to 3"),
        (at(150, timeline=2), 160, "", 160, "the timeline changed from 2 to 3"),
        # more was settled than the standby ever had (C6): its own commits begin where it left the old timeline
        (at(270, timeline=2), 120, "", 200, "the timeline changed from 2 to 3"),
        (at(150, timeline=1), 90, "", 100, "the timeline changed from 1 to 3"),
        # not in this past at all: everything that the slot still has
        (at(150, timeline=7), 120, "", 120, "the timeline changed from 7 to 3"),
        (at(150, timeline=2), 300, "the slot had been dropped", 300, "; the slot had been dropped"),
    ],
)
def test_a_stream_resumes_where_nothing_is_lost_or_else_says_why(
    after: Position | None, confirmed: int, made: str, behind: int, reason: str
) -> None:
    found, why = resume(after, HERE, Lsn(confirmed), Present(HERE.history, Lsn(400)), made)
    assert found == behind
    assert (reason in why) if reason else why == ""


def test_where_another_life_of_the_log_goes_on_it_is_said_what_was_seen_and_no_cause_is_made_up() -> None:
    again = Lineage(History("postgres", "s", 1, 3))
    seen = "timeline 1 may stand on s/1+1, and not on s/1+2, before 0/64"
    for told in ("", seen):
        found, why = resume(at(300), again, Lsn(50), Present(again.history, Lsn(400), told))
        assert found == 50
        assert (f"lies in: {told}; as where" if told else "lies in, as where") in why
        assert "an older copy of the cluster was put back" in why
        assert "restore in place" in why


@pytest.mark.parametrize("near", [5 << 32, (5 << 32) + 3, (6 << 32) - 1, (6 << 32) + 2**31])
@pytest.mark.parametrize("distance", [0, 1, -1, 2**31 - 1, -(2**31), 1000, -1000])
def test_a_full_transaction_id_is_the_nearest_with_that_low_half(near: int, distance: int) -> None:
    assert full_xid((near + distance) & 0xFFFFFFFF, near) == near + distance


def test_names_of_slots_are_legal_and_never_the_same_for_two_databases() -> None:
    names = ["journal", "bank", "Bank", "b-ank", "b_ank", "ba nk", "größe", "x" * 63, "x" * 62]
    slots = [slot_name("trigpoint", name) for name in names]
    assert slots[1] == "trigpoint_bank"
    assert "trigpoint_journal" not in slots
    assert len(set(slots)) == len(names)
    assert all(len(slot) <= 63 and set(slot) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") for slot in slots)
