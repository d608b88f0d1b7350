"""What was made in a cluster and is of no use any more is found, said with what it costs, and dropped when asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from connectors.databases.postgres.connection import connect
from connectors.databases.postgres.database import Postgres
from connectors.databases.postgres.made import is_ours
from connectors.databases.postgres.programs import minimal_environment
from connectors.databases.postgres.stream.slot import slot_name
from tests.fixtures.postgres import Cluster, running_cluster, running_standby
from tests.fixtures.service import deployment
from tests.fixtures.volumes import plain_folder
from trigger.errors import DatabaseError, SourceError
from trigger.model import Finding, Severity

pytestmark = pytest.mark.server


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with plain_folder() as folder, running_cluster(18, folder / "data", fsync="off") as made:
        made.sql("CREATE DATABASE shop")
        yield made


def slots(cluster: Cluster) -> list[str]:
    return sorted(row[0] for row in cluster.sql("SELECT slot_name FROM pg_replication_slots"))


def publications(cluster: Cluster, database: str) -> list[str]:
    return sorted(row[0] for row in cluster.sql("SELECT pubname FROM pg_publication", database))


async def made_for(cluster: Cluster, *databases: str) -> None:
    """Make what streams of these databases need, and leave it."""
    database = Postgres(cluster.conninfo, databases)
    for source in database.sources():
        await source.open(None)
        await source.close()
    await database.close()


def asked(cluster: Cluster, question: Any) -> Any:
    """Ask as a service does whose journal reads the server's log by a slot."""

    async def run() -> Any:
        database = Postgres(cluster.conninfo, ["postgres"])
        database.journal_slot()
        try:
            return await question(database)
        finally:
            await database.close()

    return asyncio.run(run())


def test_what_a_database_that_was_taken_out_left_is_found_and_dropped_alone(cluster: Cluster) -> None:
    asyncio.run(made_for(cluster, "postgres", "shop"))
    cluster.sql("ALTER DATABASE shop RENAME TO store")
    cluster.sql("SELECT pg_create_physical_replication_slot('trigpoint_journal', true)")
    cluster.sql("SELECT pg_create_physical_replication_slot('trigpoints_own', true)")
    assert slots(cluster) == ["trigpoint_journal", "trigpoint_postgres", "trigpoint_shop", "trigpoints_own"]
    found = [one for one in asked(cluster, lambda database: database.check([])) if one.subject.startswith("slot ")]
    assert [(one.subject, one.severity) for one in found] == [("slot trigpoint_shop", Severity.WARNING)]
    assert "store" in found[0].message
    assert "release --unused" in found[0].remedy
    kept = asked(cluster, lambda database: database.retained())
    assert [one.reader for one in kept] == ["trigpoint_journal", "trigpoint_postgres", "trigpoint_shop"]
    gone = asked(cluster, lambda database: database.remove(unused=True))
    assert sorted(gone) == [
        "publication trigpoint in store",
        "publication trigpoint_keyed in store",
        "slot trigpoint_shop",
    ]
    assert slots(cluster) == ["trigpoint_journal", "trigpoint_postgres", "trigpoints_own"]
    assert publications(cluster, "postgres") == ["trigpoint", "trigpoint_keyed"]
    assert publications(cluster, "store") == []
    assert asked(cluster, lambda database: database.remove(unused=True)) == []
    assert "slot trigpoint_journal" in asked(cluster, lambda database: database.remove())
    assert slots(cluster) == ["trigpoints_own"]


def test_the_slot_of_a_database_that_was_renamed_is_unused_while_the_configuration_has_its_old_name(
    cluster: Cluster,
) -> None:
    asyncio.run(made_for(cluster, "postgres", "shop"))
    cluster.sql("ALTER DATABASE shop RENAME TO store")

    async def run() -> tuple[list[Finding], list[str], list[str]]:
        database = Postgres(cluster.conninfo, ["postgres", "shop"])
        try:
            found = await database.check([])
            return found, await database.remove(unused=True), await database.remove()
        finally:
            await database.close()

    found, unused, gone = asyncio.run(run())
    assert any(one.subject == "slot trigpoint_shop" and "store" in one.message for one in found)
    assert "slot trigpoint_shop" in unused
    assert "publication trigpoint in store" in unused
    assert "slot trigpoint_postgres" in gone
    assert slots(cluster) == []


@pytest.mark.slow
def test_the_slot_of_a_journal_that_is_read_from_an_archive_by_now_is_unused() -> None:
    with deployment(18, "directory") as here:
        here.start()
        nothing = here.trigpoint("release", "--unused", "--yes").stdout
        assert nothing == "nothing of ours in the cluster is unused\n"
        here.stop()
        here.configure('[journal]\ndriver = "archive"\nrestore_command = "cp /nowhere/%f %p"\n')
        (found,) = (one for one in here.ask("check") if one["subject"] == "slot trigpoint_journal")
        assert (found["severity"], "release --unused" in found["remedy"]) == ("warning", True)
        assert here.ask("release", "--unused", "--yes")["dropped"] == ["slot trigpoint_journal"]
        assert here.trigpoint("release", "--unused", "--yes").stdout == nothing
        assert slots(here.cluster) == ["trigpoint_postgres"]


def test_publications_of_a_database_that_was_taken_out_are_named_though_its_slot_is_gone(cluster: Cluster) -> None:
    asyncio.run(made_for(cluster, "postgres", "shop"))
    cluster.sql("SELECT pg_drop_replication_slot('trigpoint_shop')")
    found = [one for one in asked(cluster, lambda database: database.check([])) if "in shop" in one.subject]
    assert [one.subject for one in found] == ["publication trigpoint in shop", "publication trigpoint_keyed in shop"]
    assert {one.severity for one in found} == {Severity.WARNING}
    assert "release --unused" in found[0].remedy
    asked(cluster, lambda database: database.remove(unused=True))
    assert not [one for one in asked(cluster, lambda database: database.check([])) if "in shop" in one.subject]


def test_what_another_service_of_the_same_name_reads_is_left_to_it(cluster: Cluster) -> None:
    async def run() -> list[str]:
        other = Postgres(cluster.conninfo, ["shop"])
        (stream,) = other.sources()
        await stream.open(None)
        mine = Postgres(cluster.conninfo, ["postgres"])
        try:
            return await mine.remove()
        finally:
            await stream.close()
            await other.close()
            await mine.close()

    assert asyncio.run(run()) == []
    assert slots(cluster) == ["trigpoint_shop"]
    assert publications(cluster, "shop") == ["trigpoint", "trigpoint_keyed"]


def test_publications_of_a_rehearsal_that_was_killed_are_named_and_dropped_though_its_slots_are_gone(
    cluster: Cluster,
) -> None:
    """A table that loses its key would refuse UPDATE, for good: nobody keeps them up to date."""
    asyncio.run(made_for(cluster, "postgres"))
    for name in ("trigpoint_rehearsal", "trigpoint_rehearsal_keyed"):
        cluster.sql(f"CREATE PUBLICATION {name}")
    found = [one for one in asked(cluster, lambda database: database.check([])) if "rehearsal" in one.subject]
    assert {one.severity for one in found} == {Severity.WARNING}
    assert len(found) == 2
    gone = asked(cluster, lambda database: database.remove(unused=True))
    assert gone == [f"publication trigpoint_rehearsal{of} in postgres" for of in ("", "_keyed")]
    assert publications(cluster, "postgres") == ["trigpoint", "trigpoint_keyed"]


def test_what_the_whole_cluster_is_asked_does_not_hang_on_one_database(cluster: Cluster) -> None:
    async def run() -> None:
        database = Postgres(cluster.conninfo, ["shop", "postgres"])
        try:
            before = await database.durable()
            cluster.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'shop'")
            cluster.sql("ALTER DATABASE shop RENAME TO store")
            assert (await database.durable()).history == before.history
            async with database.bracket("still") as finish:
                await finish()
            findings = await database.check([])
            assert any(one.subject == "database shop" and one.severity is Severity.REFUSED for one in findings)
        finally:
            await database.close()

    asyncio.run(run())


def test_a_role_that_may_not_drop_publications_drops_its_slots_all_the_same(cluster: Cluster) -> None:
    cluster.sql("CREATE ROLE tri LOGIN REPLICATION IN ROLE pg_monitor")
    cluster.sql("CREATE PUBLICATION trigpoint FOR ALL TABLES WITH (publish = 'insert, truncate')")
    cluster.sql("CREATE PUBLICATION trigpoint_keyed WITH (publish = 'update, delete')")

    async def run() -> list[str]:
        database = Postgres(cluster.conninfo.replace("user=postgres", "user=tri"), ["postgres"])
        try:
            (stream,) = database.sources()
            await stream.open(None)
            await stream.close()
            return await database.remove()
        finally:
            await database.close()

    assert asyncio.run(run()) == ["slot trigpoint_postgres"]
    assert slots(cluster) == []
    assert publications(cluster, "postgres") == ["trigpoint", "trigpoint_keyed"]


@pytest.mark.parametrize(
    ("name", "database", "prefix", "ours"),
    [
        ("trigpoint_shop", "shop", "trigpoint", True),
        ("trigpoint_shop", "store", "trigpoint", True),  # it was renamed
        ("trigpoint_b_shop", "b_shop", "trigpoint", True),
        ("trigpoint_b_shop", "shop", "trigpoint", False),
        ("trigpoint_b_shop", "shop", "trigpoint_b", True),
        ("trigpoint_rehearsal_2026", "rehearsal_2026", "trigpoint_rehearsal", False),
        ("trigpoint_rehearsal_2026", "rehearsal_2026", "trigpoint", True),
        ("trigpoint_journal", None, "trigpoint", True),
        ("trigpoint_b_journal", None, "trigpoint", False),
        (slot_name("trigpoint", "Größe"), "Größe", "trigpoint", True),
        (slot_name("trigpoint_b", "Größe"), "Größe", "trigpoint", False),
    ],
)
def test_a_slot_belongs_to_the_prefix_that_is_left_when_its_databases_name_is_taken_off(
    name: str, database: str | None, prefix: str, ours: bool
) -> None:
    assert is_ours(name, database, prefix) is ours


@pytest.mark.slow
def test_commit_never_waits_for_the_journal_by_its_programs_name_and_that_it_waits_for_us_is_told() -> None:
    with deployment(18, "directory") as here:
        here.cluster.sql("CREATE TABLE t (v int PRIMARY KEY)")
        here.start()
        here.cluster.sql("INSERT INTO t VALUES (1)")
        here.settle()
        names = {row[0] for row in here.cluster.sql("SELECT application_name FROM pg_stat_replication")}
        assert names == {"trigpoint_postgres", "trigpoint_journal"}
        here.cluster.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        here.cluster.sql("SELECT pg_reload_conf()")
        here.wait_for(
            lambda: any("COMMIT waits for trigpoint_" in one for one in here.status()["troubles"]), "a trouble"
        )
        refused = here.trigpoint("check", check=False)
        assert refused.returncode != 0
        assert "synchronous_standby_names" in refused.stdout


def test_a_refusal_of_a_server_that_speaks_another_language_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    german = minimal_environment() | {"LANGUAGE": "de", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
    monkeypatch.setattr("tests.fixtures.postgres.minimal_environment", lambda: german)
    with (
        plain_folder() as folder,
        running_cluster(18, folder / "data", lc_messages="C.UTF-8") as made,
        pytest.raises(psycopg.OperationalError) as refused,
    ):
        asyncio.run(connect(f"{made.conninfo} dbname=schrödinger"))
    assert "schrödinger" in str(refused.value)


def test_a_role_that_may_not_read_where_the_files_lie_is_told_what_to_be_granted(cluster: Cluster) -> None:
    cluster.sql("CREATE ROLE tri LOGIN REPLICATION")

    async def run() -> None:
        database = Postgres(cluster.conninfo.replace("user=postgres", "user=tri"), ["postgres"])
        try:
            with pytest.raises(DatabaseError) as refused:
                await database.layout()
            assert "GRANT SELECT ON pg_file_settings TO tri" in refused.value.hint
        finally:
            await database.close()

    asyncio.run(run())


class TestOfAnotherCatalog:
    """Two services on one cluster with one prefix: what the first has made is not the second's to take or to drop."""

    @staticmethod
    def of(cluster: Cluster, databases: list[str], holder: Path, question: Any) -> Any:
        async def run() -> Any:
            database = Postgres(cluster.conninfo, databases)
            database.claim(str(holder))
            try:
                return await question(database)
            finally:
                await database.close()

        return asyncio.run(run())

    @staticmethod
    async def opened(database: Postgres) -> None:
        for source in database.sources():
            await source.open(None)
            await source.close()

    def test_its_slots_are_refused_until_its_catalog_is_gone(self, cluster: Cluster, tmp_path: Path) -> None:
        ours, other = tmp_path / "ours ä", tmp_path / "other"
        ours.touch()
        self.of(cluster, ["shop"], ours, self.opened)
        before = slots(cluster)
        assert self.of(cluster, ["shop"], ours, lambda database: database.claimed_by_another(str(ours))) is None
        found = self.of(cluster, ["postgres"], other, lambda database: database.claimed_by_another(str(other)))
        assert found.severity is Severity.REFUSED
        assert str(ours) in found.message
        assert "slot_prefix" in found.remedy
        with pytest.raises(DatabaseError, match="nothing was dropped"):
            self.of(cluster, ["postgres"], other, lambda database: database.remove())
        with pytest.raises(SourceError, match="are those of the catalog"):
            self.of(cluster, ["shop"], other, self.opened)
        assert slots(cluster) == before
        ours.unlink()  # its state was lost: what it made is taken by the next
        self.of(cluster, ["shop"], other, self.opened)
        other.touch()
        assert self.of(cluster, ["shop"], ours, lambda database: database.claimed_by_another(str(ours))) is not None
        assert "slot trigpoint_shop" in self.of(cluster, ["shop"], other, lambda database: database.remove())

    def test_a_note_without_a_slot_or_of_another_cluster_claims_nothing(self, cluster: Cluster, tmp_path: Path) -> None:
        ours, other = tmp_path / "ours", tmp_path / "other"
        ours.touch()
        self.of(cluster, ["shop"], ours, self.opened)
        cluster.sql("SELECT pg_drop_replication_slot('trigpoint_shop')")
        assert self.of(cluster, ["shop"], other, lambda database: database.claimed_by_another(str(other))) is None
        self.of(cluster, ["shop"], ours, self.opened)
        said = cluster.sql("SELECT obj_description(oid) FROM pg_publication WHERE pubname = 'trigpoint'", "shop")[0][0]
        cluster.sql(f"COMMENT ON PUBLICATION trigpoint IS '{said}0'", "shop")  # as of a copy of another cluster
        assert self.of(cluster, ["shop"], other, lambda database: database.claimed_by_another(str(other))) is None

    def test_the_word_of_an_operator_stays(self, cluster: Cluster, tmp_path: Path) -> None:
        cluster.sql("CREATE PUBLICATION trigpoint FOR ALL TABLES", "shop")
        cluster.sql("COMMENT ON PUBLICATION trigpoint IS 'mine'", "shop")
        self.of(cluster, ["shop"], tmp_path / "ours", self.opened)
        said = cluster.sql("SELECT obj_description(oid) FROM pg_publication WHERE pubname = 'trigpoint'", "shop")
        assert said == [("mine",)]


def test_of_a_standby_nothing_is_said_to_forbid_publications(cluster: Cluster) -> None:
    with running_standby(cluster, streams=False) as standby:
        found = asked(standby, lambda database: database.check([]))
    refused = [one for one in found if one.severity is Severity.REFUSED]
    assert [one.message for one in refused if one.subject == "primary"] == ["this server is a standby"]
    assert not [one for one in refused if one.subject.startswith("publication")]
