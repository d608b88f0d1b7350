"""The room that is kept on a catalog's disk: who gets how much of it."""

from __future__ import annotations

from pathlib import Path

from trigger.catalog.reserve import KEPT_PIECES, PIECES, Reserve, for_an_operator


def given(reserve: Reserve, *, makes_room: bool) -> int:
    """Give how many pieces can be had."""
    count = 0
    while reserve.give_piece(makes_room=makes_room):
        count += 1
    return count


def test_what_gives_points_up_by_itself_gets_half_and_an_operator_all_that_is_left(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "catalog.sqlite")
    (tmp_path / "catalog.sqlite").touch()
    reserve.fill()
    assert not given(reserve, makes_room=False)
    assert given(reserve, makes_room=True) == PIECES - KEPT_PIECES
    with for_an_operator():
        assert given(reserve, makes_room=False) == KEPT_PIECES
    assert not given(reserve, makes_room=True)
    reserve.fill()
    with for_an_operator():
        assert given(reserve, makes_room=True) == PIECES


def test_a_catalog_without_a_file_of_its_own_has_none() -> None:
    reserve = Reserve(None)
    reserve.fill()
    with for_an_operator():
        assert not given(reserve, makes_room=True)
