"""What roles and databases set has no say in our connections to a clone, from the first statement on."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Iterator

import pytest

from connectors.databases.postgres.clone.access import clone_options
from connectors.databases.postgres.clone.recovery import PostgresRecovery
from connectors.databases.postgres.lsn import Lsn
from tests.fixtures.restores import Cut, Ground, ground, silent
from tests.fixtures.volumes import loop_volume
from trigger.errors import RestoreError
from trigger.position import Position
from trigger.replay import Running, Target

pytestmark = [pytest.mark.server, pytest.mark.volume]

HOSTILE = {
    "search_path": "evil, pg_catalog",
    "role": "app",
    "statement_timeout": "1ms",
    "lock_timeout": "1ms",
    "idle_session_timeout": "1ms",
    "idle_in_transaction_session_timeout": "1ms",
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "serializable",
    "local_preload_libraries": "nowhere",
    "session_preload_libraries": "nowhere",
    "dynamic_library_path": "/nowhere",
    "zero_damaged_pages": "on",
    "ignore_checksum_failure": "on",
    "client_encoding": "latin1",
    "datestyle": "German",
    "bytea_output": "escape",
    "temp_tablespaces": "",
    "work_mem": "64kB",
    "timezone_abbreviations": "Default",
}
NAMES = ("pg_extension", "pg_class", "pg_namespace", "pg_database", "pg_prepared_xacts", "pg_foreign_server")


@pytest.fixture(params=[15, 18])
def here(request: pytest.FixtureRequest) -> Iterator[Ground]:
    """Give a production whose database `shop` belongs to `app`, who is no superuser."""
    with loop_volume("btrfs", 4096) as folder, ground(request.param, folder, btrfs=True) as made:
        made.cluster.sql("CREATE ROLE app LOGIN")
        made.cluster.sql("CREATE DATABASE shop OWNER app")
        yield made


def looked_at(
    here: Ground, also: Callable[[Running], Awaitable[None]] | None = None, cut: Cut | None = None
) -> dict[str, tuple[bool, str]]:
    """Bring up the snapshot of production as it is, look at it closely, and give what was seen by check."""

    async def run(cut: Cut) -> dict[str, tuple[bool, str]]:
        staged = here.folder / "empty"
        staged.mkdir(exist_ok=True)
        clone = here.clone(cut)
        running = await here.recovery.start(
            clone, here.volumes, cut.replay(the_end(cut)), staged, silent, throwaway=True
        )
        looks = here.recovery.inspect(running, the_end(cut), staged, deep=True)
        seen = {what: (held, words) async for what, held, words in looks}
        if also is not None:
            again = await here.recovery.running(clone)
            assert again is not None
            await also(again)
        await here.drop(clone)
        return seen

    return asyncio.run(run(cut or here.cut()))


def the_end(cut: Cut) -> Target:
    return Target(cut.floor.history, None, True, "the snapshot", reach=cut.ceiling.at, point="cut")


def cut_after(here: Ground, *statements: str, settings: list[str] | None = None) -> Cut:
    """Do what may let no further session in, and cut the volume then; `settings` are made wherever they can be."""
    floor = here.durable()
    with here.cluster.connect("shop") as connection:
        for statement in statements:
            connection.execute(statement)
        for database, role in (("shop", ""), ("", "postgres"), ("", "")) if settings else ():
            connection.execute(
                "INSERT INTO pg_db_role_setting VALUES (coalesce((SELECT oid FROM pg_database WHERE datname = %s), 0),"
                " coalesce((SELECT oid FROM pg_roles WHERE rolname = %s), 0), %s)",
                [database, role, settings],
            )
        row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
    path = here.folder / "cut"
    subprocess.run(["btrfs", "-q", "subvolume", "snapshot", "-r", here.volume, path], check=True)
    return Cut(path, floor, Position(floor.history, Lsn.parse(row[0])))


def test_the_owner_of_a_database_runs_no_program_at_a_restore(here: Ground) -> None:
    spoils = here.cluster.sockets / "spoils"
    with here.cluster.connect("shop") as connection:
        connection.execute("SET ROLE app; CREATE SCHEMA evil")
        connection.execute(f"""
            CREATE FUNCTION evil.strike() RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN COPY (SELECT 1) TO PROGRAM 'touch {spoils}'; RETURN true; END $$;
            CREATE FUNCTION evil.current_database() RETURNS name LANGUAGE sql AS 'SELECT evil.strike()::text::name';
        """)
        for name in NAMES:
            connection.execute(f"CREATE VIEW evil.{name} AS SELECT * FROM pg_catalog.{name} WHERE evil.strike()")
        connection.execute("ALTER DATABASE shop SET search_path = evil, pg_catalog")
    seen = looked_at(here)
    assert not spoils.exists(), "a program was run as the server's user"
    assert all(held for held, _ in seen.values()), seen


def test_what_is_set_for_roles_and_databases_makes_no_restore_fail_and_no_sound_point_a_bad_one(here: Ground) -> None:
    async def asked(running: Running) -> None:
        for name, wanted in (("statement_timeout", "0"), ("work_mem", "4MB"), ("default_transaction_read_only", "off")):
            assert await here.recovery.query(running, "shop", f"SHOW {name}") == wanted

    here.cluster.sql("CREATE TABLE goods AS SELECT n FROM generate_series(1, 10000) n", "shop")
    settings = [f"{name}={value}" for name, value in HOSTILE.items()]
    settings += ["transaction_timeout=1ms"] if here.cluster.major >= 17 else []
    seen = looked_at(here, asked, cut_after(here, settings=settings))
    assert all(held for held, _ in seen.values()), seen


def test_no_trigger_of_the_application_is_fired_by_a_restore_or_a_look_at_it(here: Ground) -> None:
    with here.cluster.connect("shop") as connection:
        connection.execute("CREATE TABLE fired (what text)")
        connection.execute("""
            CREATE FUNCTION tell() RETURNS event_trigger LANGUAGE plpgsql AS $$
            BEGIN INSERT INTO public.fired VALUES (tg_event); RAISE 'no DDL here, and no logins'; END $$
        """)
        connection.execute(
            "CREATE SUBSCRIPTION feed CONNECTION 'host=/nowhere' PUBLICATION feed WITH (connect = false)"
        )
        events = ["ddl_command_start", "ddl_command_end", *(["login"] if here.cluster.major >= 17 else [])]
        for event in events:
            connection.execute(f"CREATE EVENT TRIGGER on_{event} ON {event} EXECUTE FUNCTION tell()")
        for event in events[::-1]:
            connection.execute(f"ALTER EVENT TRIGGER on_{event} ENABLE ALWAYS")

    async def asked(running: Running) -> None:
        assert await here.recovery.query(running, "shop", "SELECT count(*) FROM fired") == "0"
        assert await here.recovery.query(running, "shop", "SELECT subenabled FROM pg_subscription") == "f"

    seen = looked_at(here, asked)
    assert all(held for held, _ in seen.values()), seen


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_clone_is_entered_by_another_database_where_template1_is_no_way_in(here: Ground, how: str) -> None:
    here.cluster.sql("UPDATE pg_database SET datistemplate = false WHERE datname = 'template1'")
    shut = "DROP DATABASE template1" if how == "dropped" else "ALTER DATABASE template1 ALLOW_CONNECTIONS false"
    here.cluster.sql(shut)
    seen = looked_at(here)
    assert all(held for held, _ in seen.values()), seen


def test_a_clone_without_a_known_way_in_is_refused_with_the_option_that_names_one(here: Ground) -> None:
    shut = [f"ALTER DATABASE {name} ALLOW_CONNECTIONS false" for name in ("template1", "postgres")]
    cut = cut_after(here, *shut)
    with pytest.raises(RestoreError, match="no database of the clone takes connections") as refusal:
        looked_at(here, cut=cut)
    assert "database.databases" in refusal.value.hint
    here.recovery = PostgresRecovery(
        here.placement, lambda _: here.programs, here.cluster.sockets / "c", databases=["shop"]
    )
    seen = looked_at(here, cut=cut)
    assert all(held for held, _ in seen.values()), seen


def test_a_database_whose_drop_was_interrupted_stands_in_the_way_of_nothing(here: Ground) -> None:
    here.cluster.sql("CREATE DATABASE old")
    here.cluster.sql("UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'old'")
    notes: list[str] = []

    async def asked(running: Running) -> None:
        notes.extend(running.notes)

    seen = looked_at(here, asked)
    assert all(held for held, _ in seen.values()), seen
    assert any("database old" in note and "can only be dropped" in note for note in notes)


def test_a_value_of_any_form_is_one_setting_of_a_connection() -> None:
    assert clone_options(15, {"datestyle": "ISO, MDY", "x": "a\\b"}).endswith(r"-c x=a\\b")
    assert r"-c datestyle=ISO,\ MDY" in clone_options(15)
    assert "event_triggers" not in clone_options(16)
    assert "-c event_triggers=off" in clone_options(17)
