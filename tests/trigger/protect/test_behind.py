"""How far a stream is behind the server, and when it counts as standing still."""

from __future__ import annotations

from connectors.databases.postgres.lsn import Lsn
from trigger.position import History, Position
from trigger.protect.behind import STILL_SECONDS, Behind

HERE = History("postgres", "71", 1)


def at(place: int, history: History = HERE) -> Position:
    return Position(history, Lsn(place))


def looked(
    *looks: tuple[float, Position | None, Position | None], connected: bool = True
) -> tuple[int | None, str, Behind]:
    """Look at one stream: (when, where the server is, where the stream is); gives what is known after the last look."""
    behind, why = Behind(), ""
    for now, server, through in looks:
        ((_, why),) = behind.look(now, server, {"bank": through}, {"bank": connected})
    return behind.bytes["bank"], why, behind


def test_a_stream_that_has_given_all_is_not_behind_however_long_nothing_is_committed() -> None:
    assert looked((0, at(100), at(100)), (10_000, at(100), at(100)))[:2] == (0, "")


def test_a_stream_that_gives_nothing_while_the_log_goes_on_stands_still_after_a_while() -> None:
    first = (0.0, at(100), at(100))
    assert looked(first, (5, at(200), at(100)), (5 + STILL_SECONDS - 1, at(900), at(100)))[:2] == (800, "")
    much, why, behind = looked(first, (5, at(200), at(100)), (5 + STILL_SECONDS, at(900), at(100)))
    assert (much, behind.still) == (800, frozenset({"bank"}))
    assert "given nothing for 25 s" in why
    assert "800 bytes" in why


def test_a_log_that_has_only_just_gone_on_makes_no_stream_stand_still_however_long_it_was_idle() -> None:
    assert looked((0, at(100), at(100)), (10_000, at(100), at(100)), (10_001, at(200), at(100)))[1] == ""


def test_a_stream_that_gives_something_does_not_stand_still_however_far_it_is_behind() -> None:
    much, why, behind = looked(*((step * 10.0, at(10**9), at(step)) for step in range(100)))
    assert (much, why, behind.still) == (10**9 - 99, "", frozenset())


def test_a_stream_that_goes_on_is_in_order_again() -> None:
    assert looked((0, at(200), at(100)), (99, at(200), at(100)), (100, at(300), at(300)))[:2] == (0, "")


def test_a_stream_that_never_opens_is_said_so() -> None:
    much, why, _ = looked((0, at(100), None), (STILL_SECONDS, at(100), None), connected=False)
    assert much is None
    assert "not open" in why


def test_a_server_that_does_not_answer_makes_no_stream_stand_still() -> None:
    assert looked((0, at(200), at(100)), (500, None, at(100)), (501, at(300), at(100)))[:2] == (200, "")


def test_a_stream_on_the_next_timeline_is_past_what_the_server_was_at_on_the_one_before() -> None:
    later = History("postgres", "71", 2)
    assert looked((0, at(900), at(100)), (50, at(500, later), at(490, later)))[:2] == (10, "")


def test_a_stream_of_another_cluster_is_not_measured_by_this_one() -> None:
    assert (
        looked(
            (0, at(900, History("postgres", "72", 1)), at(100)), (50, at(900, History("postgres", "72", 1)), at(100))
        )[0]
        is None
    )


def test_a_mark_on_a_history_that_was_left_for_the_one_before_makes_no_stream_stand_still() -> None:
    undone = History("postgres", "71", 2)
    first = (0.0, at(100, undone), at(100, undone))
    for now in (20.0, 31.0, 600.0):
        much, why, behind = looked(first, (5, at(90), at(90)), (now, at(90), at(90)))
        assert (much, why, behind.still) == (0, "", frozenset())


def test_a_stream_that_gives_nothing_in_the_history_the_server_went_back_to_stands_still_after_a_while() -> None:
    undone = History("postgres", "71", 2)
    looks = ((0.0, at(100, undone), at(100, undone)), (5.0, at(90), at(80)), (10.0, at(200), at(80)))
    assert looked(*looks, (5 + STILL_SECONDS - 1, at(200), at(80)))[1] == ""
    assert "given nothing for 25 s" in looked(*looks, (5 + STILL_SECONDS, at(200), at(80)))[1]
