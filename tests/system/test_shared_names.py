"""What a whole cluster shares, names of databases and paths, is told the same from each database, in any encoding."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator

import pytest

from tests.fixtures.service import Deployment, deployment
from trigger.config.reference import toml

pytestmark = [pytest.mark.server, pytest.mark.slow]

BESIDE = "neu \\xe4"
"""A database that is not watched, as we say it: its name is no UTF-8."""
WATCHED = 'b\\xfcro "x'


def rewritten(text: str, databases: list[str]) -> str:
    """Give a configuration with its databases in another order."""
    lines = text.splitlines(keepends=True)
    return "".join(f"databases = {toml(databases)}\n" if line.startswith("databases =") else line for line in lines)


@contextlib.contextmanager
def named(encoding: str, watched: tuple[str, ...]) -> Iterator[Deployment]:
    """Give a service on a cluster that has databases of such names."""
    with deployment(15, "directory", initdb=("--encoding", encoding)) as here:
        with here.cluster.connect(client_encoding="SQL_ASCII") as connection:
            connection.execute(b'CREATE DATABASE "neu \xe4"')
            connection.execute(b'CREATE DATABASE "b\xfcro ""x"')
            connection.execute(b"CREATE DATABASE \"l1\" TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
            connection.execute('CREATE DATABASE "straße"'.encode())
        here.databases = watched
        here.configure()
        yield here


@pytest.fixture(params=["LATIN1", "SQL_ASCII"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_cluster_with_databases_of_any_name_is_checked_brought_back_verified_and_released(encoding: str) -> None:
    with named(encoding, ("postgres", WATCHED)) as here:
        assert BESIDE in here.trigpoint("check").stdout
        assert here.ask("check", "--rehearse")["rehearsal"]["verification"]["passed"]
        here.start()
        with here.cluster.connect(client_encoding="SQL_ASCII") as connection:
            connection.execute(b"CREATE TABLE t AS SELECT 1 AS n")
        here.settle()
        here.trigpoint("restore", "--to-latest", "--name", "back")
        assert here.ask("verify")["passed"]
        here.trigpoint("release", "--unused", "--yes")
        assert here.stop() == 0
        here.databases = ("postgres",)
        here.configure()
        assert f"publication trigpoint in {WATCHED}" in here.trigpoint("release", "--unused", "--yes").stdout


def test_what_init_writes_is_accepted_whatever_encoding_the_first_database_has(encoding: str) -> None:
    with named(encoding, ("postgres",)) as here:
        made = here.config.with_name("made.toml")
        state = here.state.with_name("made-state")
        here.trigpoint(
            "init",
            "--conninfo",
            here.cluster.conninfo,
            "--state-folder",
            str(state),
            "--output",
            str(made),
            deadline=60,
        )
        databases = tomllib.loads(made.read_text())["database"]["databases"]
        assert sorted(databases) == sorted([BESIDE, WATCHED, "l1", "straße"])
        for first in databases:
            others = [name for name in databases if name != first]
            here.config.write_text(rewritten(made.read_text(), [first, *others]))
            done = here.trigpoint("check", check=False)
            assert (done.returncode, "refused" in done.stdout) == (0, False), (first, done.stdout)
