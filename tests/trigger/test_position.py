"""Positions compare inside one history only, and a lineage knows what belongs to the past."""

from __future__ import annotations

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigger.errors import PositionError
from trigger.position import History, Lineage, Lsn, Position, distance

lsns = st.integers(0, (1 << 64) - 1).map(Lsn)
histories = st.builds(History, st.text(min_size=1), st.integers(1, (1 << 32) - 1))
positions = st.builds(Position, histories, lsns)


@st.composite
def trees(draw: st.DrawFn) -> dict[int, Lineage]:
    """Timelines that left others at rising places, as failovers and restores make them."""
    lineages = {1: Lineage(History("7391", 1))}
    for timeline in range(2, draw(st.integers(2, 6)) + 1):
        parent = lineages[draw(st.sampled_from(sorted(lineages)))]
        earliest = parent.forks[-1][1] if parent.forks else 0
        left_at = Lsn(draw(st.integers(earliest, earliest + 1000)))
        forks = (*parent.forks, (parent.history.timeline, left_at))
        lineages[timeline] = Lineage(History("7391", timeline), forks)
    return lineages


@given(lsns)
def test_an_lsn_is_read_as_it_is_printed(lsn: Lsn) -> None:
    assert Lsn.parse(str(lsn)) == lsn
    assert f"{lsn:>20}" == str(lsn).rjust(20)
    assert repr(lsn) == f"Lsn({lsn})"


@given(positions)
def test_a_position_is_read_as_it_is_printed(position: Position) -> None:
    if position.history.system.isascii() and position.history.system.isdigit() and len(position.history.system) < 20:
        assert Position.parse(str(position)) == position


@given(st.text())
def test_a_text_is_read_in_full_or_refused(text: str) -> None:
    for kind in (Lsn, Position):
        try:
            again = kind.parse(text)
        except PositionError:
            continue
        assert kind.parse(str(again)) == again


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "0/0 ", "0/123456789", "G/0", "0/0\n", "-1/0", "٣/0"])
def test_what_is_no_lsn_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(PositionError, match="not an LSN"):
        Lsn.parse(text)


@given(positions, positions)
def test_positions_of_one_history_order_by_their_place(one: Position, other: Position) -> None:
    other = Position(one.history, other.at)
    assert (one < other) == (one.at < other.at)
    assert (one >= other) == (not one < other)
    assert one.covers(other) == (one.at >= other.at)
    assert (one <= other and other <= one) == (one == other)
    assert distance(one, other) == max(0, one.at - other.at)


@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge, Position.covers])
@pytest.mark.parametrize("other", [History("7391", 2), History("7392", 1)])
def test_positions_of_two_histories_never_compare(compare: object, other: History) -> None:
    assert callable(compare)
    with pytest.raises(PositionError, match="different histories"):
        compare(Position(History("7391", 1), Lsn(5)), Position(other, Lsn(5)))


@given(trees(), st.data())
def test_a_lineage_holds_exactly_what_its_ancestors_had_when_they_were_left(
    lineages: dict[int, Lineage], data: st.DataObject
) -> None:
    lineage = lineages[data.draw(st.sampled_from(sorted(lineages)))]
    place = Position(
        lineages[data.draw(st.sampled_from(sorted(lineages)))].history, Lsn(data.draw(st.integers(0, 6000)))
    )
    left = dict(lineage.forks)
    mine = place.history == lineage.history
    assert lineage.includes(place) == (mine or place.at <= left.get(place.history.timeline, -1))
    assert not lineage.includes(Position(History("7392", place.history.timeline), place.at))


@given(trees(), st.data())
def test_every_place_of_a_lineage_belongs_to_one_timeline_of_it(
    lineages: dict[int, Lineage], data: st.DataObject
) -> None:
    lineage = lineages[data.draw(st.sampled_from(sorted(lineages)))]
    lsn = Lsn(data.draw(st.integers(0, 6000)))
    owner = lineage.at(lsn)
    assert owner.at == lsn
    assert lineage.includes(owner)
    later = [timeline for timeline, left_at in lineage.forks if left_at > lsn]
    assert owner.history.timeline == (later[0] if later else lineage.history.timeline)


@given(trees(), st.data())
def test_a_descendant_holds_what_its_ancestor_held_up_to_the_fork(
    lineages: dict[int, Lineage], data: st.DataObject
) -> None:
    child = lineages[data.draw(st.sampled_from(sorted(lineages)))]
    if not child.forks:
        return
    parent, left_at = child.forks[-1]
    place = lineages[parent].at(Lsn(data.draw(st.integers(0, left_at))))
    assert lineages[parent].includes(place)
    assert child.includes(place)


@given(trees(), st.data())
def test_what_a_place_shares_with_a_lineage_is_the_last_of_it_that_the_lineage_holds(
    lineages: dict[int, Lineage], data: st.DataObject
) -> None:
    lineage = lineages[data.draw(st.sampled_from(sorted(lineages)))]
    place = Position(History("7391", data.draw(st.integers(1, 9))), Lsn(data.draw(st.integers(0, 6000))))
    held = [at for at in range(place.at + 1) if lineage.includes(Position(place.history, Lsn(at)))]
    assert lineage.shared(place) == (held[-1] if held else None)
    assert lineage.shared(Position(History("7392", place.history.timeline), place.at)) is None


def test_a_history_file_gives_its_forks_and_ignores_comments_and_reasons() -> None:
    text = "1\t0/3000148\tbefore 2026-01-01 12:00:00+00\n\n# a comment\n2\t0/5000000\tno recovery target specified\n"
    lineage = Lineage.from_history_file(History("7391", 3), text)
    assert lineage.forks == ((1, Lsn(0x3000148)), (2, Lsn(0x5000000)))


@pytest.mark.parametrize("line", ["x 0/0 why", "1", "1 zero", "1.5 0/0"])
def test_a_damaged_history_file_is_refused(line: str) -> None:
    with pytest.raises(PositionError):
        Lineage.from_history_file(History("7391", 2), line)
