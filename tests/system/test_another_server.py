"""The address of production leads to another server: of a host that took over, or of a cluster of its own.

No commit of that one is said to be protected by files that do not hold it, and what is known of ours stays.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.another_host import on_another_host, promoted, standby_beside
from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment, deployment
from tests.system.test_named_by_the_log import brought_back, committed

pytestmark = [pytest.mark.server, pytest.mark.slow]

COUNT = "SELECT count(*)::int FROM account"
LONGER_THAN_A_LOOK_AT_THE_PLACES = 14
OFTEN = "[points]\nmin_interval_seconds = 0.3\nper_minute = 6000\n"


@pytest.fixture
def here() -> Iterator[Deployment]:
    with deployment(15, "directory", extra=OFTEN) as made:
        made.cluster.sql("CREATE TABLE account AS SELECT n FROM generate_series(1, 1000) n")
        made.start()
        yield made


def sealed(here: Deployment) -> list[Any]:
    return [point["number"] for point in here.ask("list", "--state", "sealed", "--limit", "100")]


def kept(here: Deployment) -> list[Any]:
    return [json.loads(file.read_text()) for file in layouts(here)]


def layouts(here: Deployment) -> tuple[Path, Path]:
    return here.state / "layout.json", here.root / "snapshots" / "layout.json"


@pytest.mark.root
def test_no_point_is_made_of_the_files_that_a_failover_left_behind(here: Deployment) -> None:
    before = committed(here, "INSERT INTO account VALUES (0)")
    here.settle()
    another = standby_beside(here.cluster)
    here.cluster.stop()
    with on_another_host(here.cluster, another):
        promoted(here.cluster)
        assert here.cluster.sql("SHOW data_directory") == [(str(here.cluster.data),)]
        known = sealed(here)
        words = f"{here.cluster.data} is not where the server that answers keeps its data"
        here.wait_for(lambda: words in json.dumps(here.status()), "what is wrong")
        committed(here, "INSERT INTO account SELECT generate_series(2001, 3000)")
        here.wait_for(lambda: here.status()["pending_commits"], "the commit")
        refused = here.trigpoint("point", check=False)
        assert refused.returncode != 0
        assert words in refused.stdout + refused.stderr
        assert sealed(here) == known
        checked = here.trigpoint("check", check=False)
        assert checked.returncode != 0
        assert words in checked.stdout
        assert here.stop() == 0
        assert brought_back(here, COUNT, "--to-xid", before) == (1001,)
        started = here.trigpoint("run", check=False)
        assert started.returncode != 0
        assert words in started.stderr
        assert sealed(here) == known


def test_another_cluster_at_the_address_gets_no_points_and_ours_is_not_forgotten(here: Deployment) -> None:
    first = committed(here, "INSERT INTO account VALUES (0)")
    here.settle()
    before, known = kept(here), sealed(here)
    here.cluster.stop()
    other = Cluster(15, here.root / "other", port=here.cluster.port)
    own = other.sockets
    try:
        other.create()
        other.configure({"unix_socket_directories": str(here.cluster.sockets)})
        other.sockets = here.cluster.sockets
        other.start()
        other.sql("CREATE TABLE newer (v int); INSERT INTO newer VALUES (1)")
        words = f"in {here.cluster.data} lie the files of cluster"
        here.wait_for(lambda: words in json.dumps(here.status()), "what is wrong")
        with contextlib.suppress(AssertionError):  # so long it is watched
            here.wait_for(lambda: kept(here) != before, "a look at the places", LONGER_THAN_A_LOOK_AT_THE_PLACES)
        assert kept(here) == before
        assert sealed(here) == known
        assert other.sql("SELECT slot_name FROM pg_replication_slots") == [], "it is left alone"
        assert here.ask("list", "--gaps") == []
    finally:
        other.stop()
        other.sockets = own
        other.destroy()
    assert here.stop() == 0
    assert brought_back(here, COUNT, "--to-xid", first) == (1001,)
