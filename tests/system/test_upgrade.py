"""What version 1 of the formats left comes up: listed, named, restored exactly, and gone on with."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests.fixtures.service import Deployment
from tests.fixtures.version_1 import left
from trigger.service.control import only_one

pytestmark = [pytest.mark.server, pytest.mark.slow]

SINCE_THEN = frozenset({"marks", "unknown", "name", "aside", "filled_to", "gaps", "path", "storage"})
"""Keys that version 2 has added to the answers."""


@pytest.fixture
def found() -> Iterator[tuple[Deployment, dict[str, Any]]]:
    with left() as unpacked:
        yield unpacked


def without_news(value: Any) -> Any:
    """Give an answer without the keys that were added since."""
    if isinstance(value, dict):
        return {key: without_news(item) for key, item in value.items() if key not in SINCE_THEN}
    return [without_news(item) for item in value] if isinstance(value, list) else value


def words_behind(deployed: Deployment, xid: int) -> list[str]:
    """Give what the clone at a commit holds; the clone goes again."""
    report = deployed.ask("restore", "--to-xid", str(xid), "--name", "old")
    assert all(held for _, held, _ in report["checks"]), report["checks"]
    with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
        rows = connection.execute("SELECT word FROM said ORDER BY id").fetchall()
    deployed.trigpoint("clones", "drop", "--yes", "old")
    return [row[0] for row in rows]


def tables(deployed: Deployment, file: str) -> set[str]:
    with sqlite3.connect(deployed.state / file) as connection:
        return {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def test_what_version_1_left_is_listed_and_found_as_it_was_with_the_server_down(
    found: tuple[Deployment, dict[str, Any]],
) -> None:
    deployed, answers = found
    assert without_news(deployed.ask("list", "--limit", "100")) == answers["list"]
    assert deployed.ask("list", "--gaps") == answers["gaps"]
    assert without_news(deployed.ask("show", "2")) == answers["show"]
    for told in answers["told"]:
        now, then = deployed.ask("find", "--xid", str(told["xid"])), answers["find"][str(told["xid"])]
        for key in ("where", "history", "after", "point", "gap"):
            assert [place[key] for place in now] == [place[key] for place in then], (told, key)
        assert without_news([place["record"] for place in now]) == [place["record"] for place in then]
        if told["marker"]:
            assert [place["record"]["xid"] for place in deployed.ask("find", "--marker", told["marker"])] == [
                told["xid"]
            ]


def test_every_commit_of_version_1_is_restored_exactly_and_the_service_goes_on_from_there(
    found: tuple[Deployment, dict[str, Any]],
) -> None:
    deployed, answers = found
    for told in answers["told"][1:]:  # no base is older than the first
        assert words_behind(deployed, told["xid"]) == told["all"]
    assert (deployed.state / "catalog.sqlite.version-1").exists()
    assert "xid_outliers" in tables(deployed, "catalog.sqlite.version-1")
    deployed.cluster.start()
    deployed.start()
    ((xid,),) = deployed.cluster.sql("INSERT INTO said (word) VALUES ('six') RETURNING pg_current_xact_id()::text")
    deployed.settle()
    assert not (deployed.state / "catalog.sqlite.version-1").exists(), "a point was sealed since"
    assert deployed.ask("list", "--gaps") == answers["gaps"], "nothing was missed between the versions"
    assert words_behind(deployed, int(xid)) == [*answers["told"][-1]["all"], "six"]
    told = answers["told"][-1]
    assert words_behind(deployed, told["xid"]) == told["all"]
    assert deployed.status()["troubles"] == []
    assert deployed.stop() == 0


def test_the_catalog_of_version_1_is_rebuilt_from_tags_of_version_1(found: tuple[Deployment, dict[str, Any]]) -> None:
    deployed, answers = found
    deployed.trigpoint("catalog", "rebuild")
    sealed = [point for point in answers["list"] if point["state"] == "sealed"]
    ours = {point["number"]: point for point in without_news(deployed.ask("list", "--limit", "100"))}
    for point in sealed:
        assert {**ours[point["number"]], "verification": None} == {**point, "verification": None}
    told = answers["told"][2]
    assert words_behind(deployed, told["xid"]) == told["all"]


def test_no_command_brings_the_catalog_up_under_an_older_service_that_works_with_it(
    found: tuple[Deployment, dict[str, Any]],
) -> None:
    deployed, answers = found
    with only_one(deployed.state):  # as the older service does
        for command in (["list"], ["find", "--xid", str(answers["told"][0]["xid"])], ["show", "2"]):
            refused = deployed.trigpoint(*command, check=False)
            assert refused.returncode != 0, command
            assert "tables are of version 1, this program's of version 2" in refused.stderr
            assert "an older service works with it" in refused.stderr
        assert "xid_outliers" in tables(deployed, "catalog.sqlite")
        assert not (deployed.state / "catalog.sqlite.version-1").exists()
    assert without_news(deployed.ask("list", "--limit", "100")) == answers["list"]
    assert "number_outliers" in tables(deployed, "catalog.sqlite")


def test_commands_that_come_all_at_once_bring_the_catalog_up_once(found: tuple[Deployment, dict[str, Any]]) -> None:
    deployed, answers = found
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(deployed.trigpoint, "list", "--json", check=False) for _ in range(4)]
    done = [each.result() for each in asked]
    assert any(each.returncode == 0 for each in done)
    assert all(each.returncode == 0 or "an older service works with it" in each.stderr for each in done), done
    assert without_news(deployed.ask("list", "--limit", "100")) == answers["list"]
    assert "xid_outliers" in tables(deployed, "catalog.sqlite.version-1")
