"""What `trigpoint init` writes is run as it stands: from an unknown cluster to a commit that comes back."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]

COMMITS = 5


@pytest.fixture(params=[pytest.param("btrfs", marks=pytest.mark.volume), "directory"])
def unknown(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Give a cluster with a shop in it that nobody has configured anything for."""
    with deployment(15, str(request.param), databases=("postgres", "shop")) as here:
        here.config.unlink()
        here.cluster.sql("CREATE TABLE sold (n int PRIMARY KEY, xid xid8 DEFAULT pg_current_xact_id())", "shop")
        yield here


def init(unknown: Deployment) -> None:
    state, config = ("--state-folder", str(unknown.state)), ("--output", str(unknown.config))
    unknown.trigpoint("init", "--conninfo", unknown.cluster.conninfo, *state, *config)


def test_what_init_writes_protects_the_cluster_and_brings_a_commit_back(unknown: Deployment) -> None:
    init(unknown)
    assert f'driver = "{unknown.storage}"' in unknown.config.read_text()
    unknown.trigpoint("check")
    unknown.start()
    assert unknown.ask("verify", "1")["passed"], "no earlier one leads to what the first was taken for"
    for number in range(COMMITS):
        unknown.cluster.sql(f"INSERT INTO sold (n) VALUES ({number})", "shop")
    unknown.trigpoint("point")  # where each costs log, init lets points be rare
    unknown.settle()
    xid = unknown.cluster.sql("SELECT xid::text FROM sold WHERE n = 2", "shop")[0][0]
    (found,) = unknown.ask("find", "--xid", xid)
    assert found["where"] in ("point", "interval")
    report = unknown.ask("restore", "--to-xid", xid)
    assert all(held for _, held, _ in report["checks"])
    with psycopg.connect(f"{report['conninfo']} dbname=shop") as clone:
        assert clone.execute("SELECT array_agg(n ORDER BY n) FROM sold").fetchone() == ([0, 1, 2],)
    assert unknown.ask("verify")["passed"]
    unknown.trigpoint("clones", "drop", "--yes", report["name"])
    assert unknown.stop() == 0
    unknown.trigpoint("release", "--yes")
    assert unknown.cluster.sql("SELECT count(*) FROM pg_replication_slots") == [(0,)]


def test_the_rules_that_init_shows_take_what_they_say_once_they_are_switched_on(unknown: Deployment) -> None:
    unknown.cluster.sql("CREATE TABLE payments_made (n int PRIMARY KEY)", "shop")
    init(unknown)
    before, mark, rules = unknown.config.read_text().partition("# [[rules]]")
    assert mark
    unknown.config.write_text(before + "\n".join(line.removeprefix("# ") for line in (mark + rules).splitlines()))
    unknown.start()
    for statement in (
        "INSERT INTO payments_made VALUES (1)",
        "UPDATE payments_made SET n = 2",
        "INSERT INTO sold SELECT generate_series(1, 1000)",
        "SELECT pg_logical_emit_message(true, 'trigpoint', 'close-of-day')",
        "SELECT pg_logical_emit_message(true, 'trigpoint', 'another')",
    ):
        unknown.cluster.sql(statement, "shop")
    unknown.trigpoint("point")
    unknown.settle()
    assert unknown.ask("rules", "test")["by_rule"] == {"large-or-marked": 2, "payments": 1}
    taken = unknown.status()["commits_by_rule"]
    assert (taken["large-or-marked"], taken["payments"]) == (2, 1)
    assert unknown.stop() == 0
