"""What is remembered of the commits that were seen last: the newest that there is room for, each once, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from trigger.model import Commit
from trigger.position import History, Name
from trigger.protect.recent import Recent


def commit(number: int, markers: tuple[str, ...] = ()) -> Commit:
    return Commit(
        "bank",
        History("postgres", "7", 1),
        Lsn(100 * number),
        Lsn(100 * number + 48),
        Name("", number),
        0,
        markers=markers,
    )


@given(weights=st.lists(st.integers(0, 4), max_size=60), limit=st.integers(1, 7), bound=st.integers(1, 30))
def test_page_by_page_everything_that_there_is_room_for_is_given_once_and_in_order(
    weights: list[int], limit: int, bound: int
) -> None:
    commits = [commit(100 + number, markers=("x" * 120,) * weight) for number, weight in enumerate(weights)]
    recent = Recent(bound)
    for one in commits:
        recent.saw(one)
    given_out: list[Commit] = []
    last = 0
    while (page := recent.behind(last, limit))[0]:
        assert len(page[0]) <= limit
        given_out += page[0]
        last = page[1]
    kept = len(commits) - recent.forgotten
    assert given_out == commits[recent.forgotten :]
    assert sum(one.weight for one in given_out) <= bound
    assert kept == len(commits) or sum(one.weight for one in commits[recent.forgotten - 1 :]) > bound


def test_who_asks_again_gets_what_has_come_since_also_where_some_was_forgotten() -> None:
    recent = Recent(bound=3)
    commits = [commit(number) for number in range(10)]
    recent.saw(commits[0])
    _, last = recent.behind(0, 10)
    assert last == 1
    for one in commits[1:3]:
        recent.saw(one)
    assert recent.behind(last, 10) == (commits[1:3], 3)
    for one in commits[3:]:
        recent.saw(one)
    assert recent.behind(last, 10) == (commits[7:], 10)
    assert recent.behind(10, 10) == ([], 10)
