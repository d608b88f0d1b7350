"""Positions compare inside one history only, a lineage knows what belongs to the past, and names are read whole."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn, lineage
from trigger.errors import PositionError
from trigger.position import LAST, History, Lineage, Name, Place, Position, distance

lsns = st.integers(0, (1 << 64) - 1).map(Lsn)
places = st.integers(0, LAST).map(Place)
histories = st.builds(
    History, st.just("postgres"), st.text(min_size=1), st.integers(1, (1 << 32) - 1), st.integers(0, (1 << 32) - 1)
)
positions = st.builds(Position, histories, lsns)
names = st.builds(Name, st.text(), st.none() | st.integers(0, (1 << 63) - 1))


@st.composite
def trees(draw: st.DrawFn) -> dict[int, Lineage]:
    """Timelines that left others at rising places, as failovers and restores make them."""
    lineages = {1: Lineage(History("postgres", "7391", 1))}
    for timeline in range(2, draw(st.integers(2, 6)) + 1):
        parent = lineages[draw(st.sampled_from(sorted(lineages)))]
        earliest = parent.forks[-1][1] if parent.forks else 0
        left_at = Lsn(draw(st.integers(earliest, earliest + 1000)))
        forks = (*parent.forks, (parent.history.branch, left_at))
        lineages[timeline] = Lineage(History("postgres", "7391", timeline), forks)
    return lineages


@given(lsns)
def test_an_lsn_is_read_as_it_is_printed(lsn: Lsn) -> None:
    assert Lsn.parse(str(lsn)) == lsn
    assert f"{lsn:>20}" == str(lsn).rjust(20)
    assert f"{lsn:#x}" == hex(int(lsn))  # what prints any number in a base prints this one
    assert repr(lsn) == f"Lsn({lsn})"


@given(positions)
def test_a_position_is_read_as_it_is_printed(position: Position) -> None:
    history, _, place = str(position).rpartition("@")
    mine = History.parse(history, "postgres")
    assert Position(mine, mine.parse_place(place)) == position


@given(st.text() | st.from_regex(r"[0-9]{1,3}/[0-9]{1,3}(\+[0-9]{1,3})?", fullmatch=True))
def test_a_text_is_read_in_full_or_refused(text: str) -> None:
    for parse in (Lsn.parse, Place.parse, partial(History.parse, kind="postgres")):
        try:
            again = parse(text)
        except PositionError:
            continue
        assert parse(str(again)) == again


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "0/0 ", "0/123456789", "G/0", "0/0\n", "-1/0", "٣/0"])
def test_what_is_no_lsn_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(PositionError, match="not an LSN"):
        Lsn.parse(text)


@given(places)
def test_a_place_of_a_kind_without_a_driver_is_a_number_and_read_as_it_is_printed(place: Place) -> None:
    assert str(place) == str(int(place))
    assert Place.parse(str(place)) == place
    assert f"{place:>20}" == str(int(place)).rjust(20)
    assert repr(place) == f"Place({int(place)})"


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", " 1", "1\n", "0x10", "1_0", "٣", "0/1", str(LAST + 1)])
def test_what_is_no_place_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(PositionError) as refused:
        Place.parse(text)
    assert repr(text) in refused.value.message


@given(st.integers(0, LAST))
def test_a_place_is_written_and_read_in_the_form_of_its_kind(number: int) -> None:
    for kind, form in (("postgres", Lsn), ("a kind of which no driver is loaded", Place)):
        history = History(kind, "7391", 1)
        place = history.place(number)
        assert (type(place), place) == (form, number)
        assert history.place(place) is place
        assert history.parse_place(f" {place}\n") == place
        assert type(history.parse_place(str(place))) is form
        assert str(Position(history, number)) == f"7391/1@{form(number)}"
        assert type(Position(history, number).place) is form


def test_a_kind_derives_its_own_form_of_a_place() -> None:
    with patch.dict(Place.KINDS):

        class Tens(Place, kind="tens"):
            def since(self, earlier: int) -> int:
                return super().since(earlier) * 10

            def __str__(self) -> str:
                return f"T{int(self)}"

        history = History("tens", "7391")
        assert str(Position(history, 5)) == "7391/0@T5"
        assert distance(Position(history, 7), Position(history, 5)) == 20
        assert distance(Position(history, 5), Position(history, 7)) == 0
    assert str(Position(history, 5)) == "7391/0@5"


@given(places, places)
def test_what_lies_between_two_places_is_none_for_one_that_is_behind(one: Place, other: Place) -> None:
    assert one.since(other) == max(0, int(one) - int(other))


@given(histories)
def test_a_history_is_read_as_it_is_printed(history: History) -> None:
    assert History.parse(str(history), "postgres") == history
    assert ("+" in str(history).rpartition("/")[2]) == bool(history.incarnation)


@pytest.mark.parametrize(
    "text", ["", "7391", "/1", "7391/", "7391/x", "7391/1+", "7391/1+x", "7391/-1", "7391/1 ", "7391/٣"]
)
def test_what_is_no_history_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(PositionError) as refused:
        History.parse(text, "postgres")
    assert repr(text) in refused.value.message


@given(histories, histories)
def test_histories_of_one_database_are_told_by_kind_and_system_and_ordered_by_when_they_began(
    one: History, other: History
) -> None:
    assert one.is_of_system(other) == ((one.kind, one.system) == (other.kind, other.system))
    assert one.is_of_system(History(one.kind, one.system, other.branch, other.incarnation))
    assert not one.is_of_system(History("mariadb", one.system, one.branch, one.incarnation))
    if one.incarnation != other.incarnation:
        assert (one.age < other.age) == (one.incarnation < other.incarnation)
    else:
        assert (one.age < other.age) == (one.branch < other.branch)


@given(st.text() | names.map(str) | st.from_regex(r"\A[a-z-]{0,3}[0-9]{0,22}\Z"))
def test_a_name_is_printed_as_it_was_written(text: str) -> None:
    name = Name.parse(text)
    assert str(name) == text
    assert f"{name:>30}" == text.rjust(30)
    assert Name.parse(str(name)) == name


@given(st.text() | st.from_regex(r"\A[a-z-]{0,3}[0-9]{0,22}\Z"))
def test_the_number_of_a_name_is_canonical_and_fits_into_64_bits(text: str) -> None:
    name = Name.parse(text)
    if name.number is None:
        assert name.text == text
        assert not name.is_number
        return
    assert 0 <= name.number < 1 << 63
    assert text.endswith(str(name.number))
    assert name.text + str(name.number) == text
    assert name.is_number == (text == str(name.number))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("7731", Name("", 7731)),
        ("0", Name("", 0)),
        ("0-1-57", Name("0-1-", 57)),
        ("job", Name("job", None)),
        ("", Name("", None)),
        ("-7", Name("-", 7)),
        (str((1 << 63) - 1), Name("", (1 << 63) - 1)),
        (str(1 << 63), Name(str(1 << 63), None)),
        ("1" * 40, Name("1" * 40, None)),
        ("line\n12", Name("line\n", 12)),
        ("12\n", Name("12\n", None)),
        ("x٣", Name("x٣", None)),
    ],
)
def test_a_name_ends_in_its_number(text: str, name: Name) -> None:
    assert Name.parse(text) == name


@pytest.mark.parametrize("text", ["007", "a00", "a-01"])
def test_a_number_with_zeros_before_it_is_no_number_of_a_name_but_its_last_digits_may_be(text: str) -> None:
    name = Name.parse(text)
    assert str(name) == text
    assert name.number == int(text[-1])
    assert name.text == text[:-1]


@given(positions, positions)
def test_positions_of_one_history_order_by_their_place(one: Position, other: Position) -> None:
    other = Position(one.history, other.at)
    assert (one < other) == (one.at < other.at)
    assert (one >= other) == (not one < other)
    assert one.covers(other) == (one.at >= other.at)
    assert (one <= other and other <= one) == (one == other)
    assert distance(one, other) == max(0, one.at - other.at)


@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge, Position.covers])
@pytest.mark.parametrize(
    "other",
    [
        History("postgres", "7391", 2),
        History("postgres", "7392", 1),
        History("postgres", "7391", 1, 1),
        History("mariadb", "7391", 1),
    ],
)
def test_positions_of_two_histories_never_compare(compare: object, other: History) -> None:
    assert callable(compare)
    with pytest.raises(PositionError, match="different histories"):
        compare(Position(History("postgres", "7391", 1), Lsn(5)), Position(other, Lsn(5)))


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
    assert lineage.includes(place) == (mine or place.at <= left.get(place.history.branch, -1))
    assert not lineage.includes(Position(History("postgres", "7392", place.history.branch), place.at))


@given(trees(), st.integers(0, 3), st.data())
def test_nothing_of_another_incarnation_or_kind_is_in_a_lineage(
    lineages: dict[int, Lineage], incarnation: int, data: st.DataObject
) -> None:
    drawn = lineages[data.draw(st.sampled_from(sorted(lineages)))]
    lineage = replace(drawn, history=replace(drawn.history, incarnation=incarnation))
    at = Lsn(data.draw(st.integers(0, 6000)))
    stretches = lineage.stretches()
    assert {history.incarnation for history, _, _ in stretches} == {incarnation}
    assert [history.branch for history, _, _ in stretches] == [
        *(branch for branch, _ in lineage.forks),
        drawn.history.branch,
    ]
    assert [begin for _, begin, _ in stretches] == [0, *(end for _, _, end in stretches[:-1])]
    assert stretches[-1][2] == LAST
    assert lineage.at(at).history.incarnation == incarnation
    for branch in range(1, 8):
        place = Position(lineage.branch(branch), at)
        assert lineage.includes(place) == drawn.includes(Position(drawn.branch(branch), at))
        for stranger in (replace(place.history, incarnation=incarnation + 1), replace(place.history, kind="mariadb")):
            assert not lineage.includes(Position(stranger, at))
            assert lineage.shared(Position(stranger, at)) is None
        if incarnation:
            assert not lineage.includes(Position(replace(place.history, incarnation=incarnation - 1), at))


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
    assert owner.history.branch == (later[0] if later else lineage.history.branch)


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
    place = Position(History("postgres", "7391", data.draw(st.integers(1, 9))), Lsn(data.draw(st.integers(0, 6000))))
    held = [at for at in range(place.at + 1) if lineage.includes(Position(place.history, Lsn(at)))]
    assert lineage.shared(place) == (held[-1] if held else None)
    assert lineage.shared(Position(History("postgres", "7392", place.history.branch), place.at)) is None


def test_a_history_file_gives_its_forks_and_ignores_comments_and_reasons() -> None:
    text = "1\t0/3000148\tbefore 2026-01-01 12:00:00+00\n\n# a comment\n2\t0/5000000\tno recovery target specified\n"
    past = lineage(History("postgres", "7391", 3), text)
    assert past.forks == ((1, Lsn(0x3000148)), (2, Lsn(0x5000000)))


@pytest.mark.parametrize("line", ["x 0/0 why", "1", "1 zero", "1.5 0/0"])
def test_a_damaged_history_file_is_refused(line: str) -> None:
    with pytest.raises(PositionError):
        lineage(History("postgres", "7391", 2), line)


def test_each_branch_that_was_left_since_a_position_ends_where_the_next_began_or_with_that_position() -> None:
    one, two, three = (History("postgres", "7391", branch) for branch in (1, 2, 3))
    lineage = Lineage(three, ((1, 100), (2, 200)))
    both = ((Position(one, 100), Position(two, 100)), (Position(two, 200), Position(three, 200)))
    assert lineage.ends_since(Position(one, 70)) == both
    assert lineage.ends_since(Position(one, 130)) == ((Position(one, 130), Position(two, 100)), both[1])
    assert lineage.ends_since(Position(two, 150)) == both[1:]
    assert lineage.ends_since(Position(three, 250)) == ()
    assert lineage.ends_since(Position(History("postgres", "7391", 4), 250)) == ()
