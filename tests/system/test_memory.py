"""What the real service holds in memory: bounded, whatever waits in its window and whatever passes through its stream.

The bound is for the process as a whole, at its worst moment: `VmHWM`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fixtures import judge
from tests.fixtures.memory import peak_megabytes
from tests.fixtures.postgres import MAJORS
from tests.fixtures.service import Deployment, deployment
from trigger.protect.window import BOUND

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

LIMIT_MEGABYTES = 150
BACKLOG = BOUND - 1
"""As many commits as wait without a point: the next one fills the window, and what is full makes a point due."""
ROWS = 5_000_000
TABLES = ("a", "b", "c", "d")
NO_POINT_UNASKED = "[points]\nmin_interval_seconds = 3600\nmax_delay_seconds = 3600\nrestore_objective_seconds = 3600\n"


@pytest.fixture
def deployed() -> Iterator[Deployment]:
    with deployment(MAJORS[-1], extra=NO_POINT_UNASKED, synchronous_commit="off") as found:
        for table in TABLES:
            found.cluster.sql(f"CREATE TABLE {table} (n int)")
        found.cluster.sql(judge.TRUTH_TABLE)
        found.forks = False  # a fork's memory begins with all that the process it comes from has loaded
        found.start()
        yield found


def _commit(deployed: Deployment, first: int, last: int) -> None:
    """Commit `first` to `last`; whatever is near each other differs in how much of which tables it changes."""
    changes = "".join(
        f" INSERT INTO {table} SELECT generate_series(1, n / {6**place} % 6);" for place, table in enumerate(TABLES)
    )
    deployed.cluster.sql(
        f"DO $$ BEGIN FOR n IN {first}..{last} LOOP INSERT INTO truth DEFAULT VALUES;{changes} COMMIT; END LOOP; END $$"
    )


def _wait_for_pending(deployed: Deployment, number: int) -> None:
    deployed.wait_for(lambda: deployed.status().get("pending_commits") == number, f"{number} that wait", 120)


def _peak(deployed: Deployment) -> float:
    assert deployed.process is not None
    return peak_megabytes(deployed.process.pid)


def test_a_full_window_with_five_million_rows_in_the_stream_stays_below_the_limit(deployed: Deployment) -> None:
    _commit(deployed, 1, BACKLOG // 2)
    deployed.cluster.sql(f"INSERT INTO a SELECT generate_series(1, {ROWS})")
    _commit(deployed, BACKLOG // 2 + 1, BACKLOG - 1)
    _wait_for_pending(deployed, BACKLOG)
    assert _peak(deployed) < LIMIT_MEGABYTES
    deployed.trigpoint("point")
    assert _peak(deployed) < LIMIT_MEGABYTES
    left = judge.read(deployed)
    written = judge.written_ids(deployed.cluster)
    assert len(written) == BACKLOG - 1
    judge.assert_every_commit_has_one_outcome(left, written)
    assert left.points[-1].commits == BACKLOG
    assert left.points[-1].tables["postgres.public.a"].inserted > ROWS
    assert deployed.stop() == 0
