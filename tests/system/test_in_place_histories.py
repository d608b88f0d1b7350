"""A restore in place of what an earlier incarnation had: the history that it begins is nobody's future but its own."""

from __future__ import annotations

import pytest

from tests.fixtures.service import Deployment
from tests.system.test_histories import (
    assert_each_has_one_outcome,
    assert_found_and_delivered,
    copied,
    histories,
    put_back,
    spoken,
    tell,
)

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]


def stop(deployed: Deployment) -> None:
    assert deployed.stop() == 0
    deployed.cluster.stop()


def start(deployed: Deployment) -> None:
    deployed.cluster.start()
    deployed.start()


def test_what_a_life_that_was_left_had_comes_back_in_a_life_of_its_own_and_is_taken_back_from_there() -> None:
    with spoken(18) as deployed:
        cluster = deployed.cluster
        deployed.start()
        tell(cluster, "one", "two")
        deployed.settle()
        deployed.stop()
        copy = copied(deployed)
        deployed.start()
        cluster.sql("INSERT INTO said (word) SELECT repeat('x', 2000) FROM generate_series(1, 2000)")
        cluster.sql("DELETE FROM said WHERE word LIKE 'xx%'")
        left = tell(cluster, "three", "four", "five")
        deployed.settle()
        stop(deployed)
        put_back(cluster, copy)
        start(deployed)
        other = tell(cluster, "drei", "vier", "fünf")
        deployed.settle()
        stop(deployed)
        first, second = histories(deployed)
        assert second == f"{first}+1"

        deployed.trigpoint("restore", "--in-place", "--to-latest", "--history", first, "--yes")
        start(deployed)
        after = tell(cluster, "trois")
        deployed.settle()
        stop(deployed)
        third = histories(deployed)[-1]
        assert third.endswith("+2"), third

        deployed.trigpoint("restore", "--undo", "last", "--yes")
        start(deployed)
        back = tell(cluster, "sechs")
        deployed.settle()
        fourth = histories(deployed)[-1]
        assert fourth == f"{first}+3"
        for told, history in ((left, first), (other, second), (after, third), (back, fourth)):
            assert_each_has_one_outcome(deployed, told, history)
            assert_found_and_delivered(deployed, told[-1])
        assert deployed.stop() == 0
