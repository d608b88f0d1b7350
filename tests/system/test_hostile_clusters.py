"""What `check` lets pass works, however a cluster is set up: it is rehearsed on clusters that are set up oddly."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]

HOSTILE = {
    "role": "app",
    "search_path": "evil",
    "statement_timeout": "1ms",
    "lock_timeout": "1ms",
    "idle_session_timeout": "100ms",
    "idle_in_transaction_session_timeout": "100ms",
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "client_min_messages": "error",
    "client_encoding": "latin1",
    "datestyle": "German",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
}
FORBID = """
CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF session_user <> 'trusted' THEN RAISE 'no DDL here'; END IF;
END $$;
CREATE EVENT TRIGGER forbid ON ddl_command_start EXECUTE FUNCTION forbid();
"""


def statements(here: Deployment, *texts: str, user: str = "postgres") -> None:
    with psycopg.connect(here.cluster.conninfo, dbname="postgres", user=user, autocommit=True) as connection:
        for text in texts:
            connection.execute(text.encode())


def reload(here: Deployment, hba: str) -> None:
    (here.cluster.data / "pg_hba.conf").write_text(hba)
    here.cluster.run("pg_ctl", "-D", here.cluster.data, "reload")


def refused(here: Deployment) -> list[dict[str, Any]]:
    done = here.trigpoint("check", "--json", check=False)
    return [one for one in json.loads(done.stdout) if one["severity"] == "refused"]


def require_rehearsed(here: Deployment) -> None:
    done = here.ask("check", "--rehearse")["rehearsal"]
    assert done["verification"]["passed"], done
    assert done["protected_seconds"] < 30, "some stream or the journal did not come"


@pytest.mark.parametrize("major", [15, 18])
def test_a_cluster_whose_roles_and_databases_are_set_for_everything_but_us_is_protected(major: int) -> None:
    """The superuser is called otherwise, read-only and in a hurry; databases are gone, half gone, called like ours."""
    with deployment(major, "directory", databases=("postgres", "journal"), idle_session_timeout="500ms") as here:
        statements(here, "CREATE ROLE app LOGIN", "CREATE ROLE admin SUPERUSER LOGIN")
        statements(
            here,
            "ALTER ROLE postgres RENAME TO boss",
            "CREATE DATABASE old",
            "UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'old'",
            "UPDATE pg_database SET datistemplate = false WHERE datname = 'template1'",
            "DROP DATABASE template1",
            f"INSERT INTO pg_db_role_setting SELECT 0, oid, ARRAY[{listed()}] FROM pg_roles WHERE rolname = 'admin'",
            user="admin",
        )
        here.cluster.configure({"default_transaction_read_only": "on"})
        here.cluster.restart()
        here.state = here.state.parent / ("long" * 25) / ("longer" * 20)
        here.configure()
        here.config.write_text(here.config.read_text().replace("user=postgres", "user=admin"))
        require_rehearsed(here)
        here.start()
        assert here.ask("point")["state"] == "sealed"
        assert here.stop() == 0
        here.trigpoint("release", "--yes")


def listed() -> str:
    return ", ".join(f"'{name}={value}'" for name, value in HOSTILE.items())


@pytest.mark.parametrize("major", [15, 18])
def test_what_no_log_can_be_received_over_and_no_publication_be_made_in_is_refused(major: int) -> None:
    with deployment(major, "directory") as here:
        trusting = (here.cluster.data / "pg_hba.conf").read_text()
        reload(here, "local all all trust\n")
        (found,) = refused(here)
        assert "no log can be received" in found["message"]
        assert "replication" in found["remedy"]
        reload(here, trusting)
        statements(here, FORBID, "ALTER EVENT TRIGGER forbid ENABLE ALWAYS", "CREATE ROLE trusted SUPERUSER LOGIN")
        (found,) = refused(here)
        assert "no DDL here" in found["message"]
        assert "let role postgres pass" in found["remedy"]
        here.config.write_text(here.config.read_text().replace("user=postgres", "user=trusted"))
        require_rehearsed(here)


@pytest.mark.parametrize("major", [15, 18])
def test_a_role_that_is_no_superuser_is_told_all_that_it_needs_and_works_with_it(major: int) -> None:
    with deployment(major, "directory") as here:
        statements(here, "CREATE TABLE t (n int PRIMARY KEY)", "CREATE ROLE tri LOGIN")
        here.config.write_text(here.config.read_text().replace("user=postgres", "user=tri"))
        told = " ".join(here.trigpoint("check", check=False).stderr.split())
        statements(here, *told.partition("have a superuser run: ")[2].split("; "))
        for _ in range(5):
            if not (found := refused(here)):
                break
            for one in found:
                remedies = one["remedy"].rpartition(" run in postgres: ")[2]
                statements(here, *(one for one in remedies.split("; ") if one[:6] in ("ALTER ", "GRANT ", "CREATE")))
        for name in ("trigpoint_rehearsal", "trigpoint_rehearsal_keyed"):  # which the README says of a rehearsal
            made = "FOR ALL TABLES WITH (publish = 'insert, truncate')"
            kept = "WITH (publish = 'update, delete')"
            statements(here, f"CREATE PUBLICATION {name} {kept if name.endswith('keyed') else made}")
        require_rehearsed(here)
        here.start()
        assert here.ask("point")["state"] == "sealed"
        assert here.stop() == 0


@pytest.mark.parametrize("way", ["PGPASSFILE", "HOME", "PGPASSWORD", "PGSERVICEFILE"])
def test_what_lets_us_in_lets_the_program_in_that_receives_the_log(way: str) -> None:
    with deployment(15, "directory") as here:
        statements(here, "CREATE ROLE keeper SUPERUSER LOGIN PASSWORD 'open'")
        reload(here, "local all all trust\nhost all,replication all 127.0.0.1/32 scram-sha-256\n")
        home = here.state.parent / "home"
        home.mkdir()
        (home / ".pgpass").write_text("*:*:*:*:open\n")
        (home / "services").write_text("[bank]\nuser=keeper\npassword=open\n")
        for file in home.iterdir():
            file.chmod(0o600)
        reached = f"host=127.0.0.1 port={here.cluster.port} " + (
            "service=bank" if way == "PGSERVICEFILE" else "user=keeper"
        )
        here.config.write_text(here.config.read_text().replace(here.cluster.conninfo, reached))
        found = {
            "PGPASSFILE": f"{home}/.pgpass",
            "HOME": f"{home}",
            "PGPASSWORD": "open",
            "PGSERVICEFILE": f"{home}/services",
        }
        here.before = ("env", f"{way}={found[way]}")
        require_rehearsed(here)
