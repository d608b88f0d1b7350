"""The service is killed between the members of a point, which lie in several storages: P5 must hold over them all."""

from __future__ import annotations

import pytest

from tests.crash.test_service_kill import POINTS, assert_sound, die_at
from tests.fixtures.loading import Load
from tests.fixtures.members import members

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

FAILPOINTS = ("after-member-cut", "after-member-tagged", "after-member-removed")


def test_a_service_killed_between_two_members_at_any_step_loses_nothing_and_leaves_nothing_over() -> None:
    with members(POINTS) as (here, _):
        here.config.write_text(here.config.read_text().replace("keep_free", "budget = 12\nkeep_free"))
        here.start()
        here.stop()
        for failpoint in (*FAILPOINTS, *FAILPOINTS):
            load = Load(here)
            try:
                die_at(here, failpoint)
            finally:
                load.end()
            assert_sound(here)
