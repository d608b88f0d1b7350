"""A cluster whose locales only a variable of its server leads to comes back: a clone's server finds them too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from connectors.databases.postgres.programs import minimal_environment
from tests.fixtures.service import deployment
from tests.fixtures.volumes import plain_folder

pytestmark = [pytest.mark.server, pytest.mark.slow]

LOCALE = "de_TRIG.UTF-8"


def compiled(folder: Path) -> None:
    """Make a locale that only `LOCPATH` leads to."""
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(folder / LOCALE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (folder / LOCALE).is_dir(), done.stderr


@pytest.mark.parametrize("major", [15, 18])
def test_a_cluster_whose_locale_only_a_variable_leads_to_comes_back(
    major: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain_folder() as folder:
        folder.chmod(0o755)
        compiled(folder)
        environment = minimal_environment() | {"LOCPATH": str(folder)}
        monkeypatch.setattr("tests.fixtures.postgres.minimal_environment", lambda: environment)
        with deployment(major, "directory", initdb=[f"--locale={LOCALE}"]) as here:
            here.cluster.sql(
                "CREATE TABLE t (v text COLLATE \"default\" PRIMARY KEY); INSERT INTO t VALUES ('ä'), ('z')"
            )
            assert here.ask("check", "--rehearse")["rehearsal"]["verification"]["passed"]
            here.start()
            here.cluster.sql("INSERT INTO t VALUES ('ö')")
            here.settle()
            assert here.stop() == 0
            here.cluster.stop()  # what its server had is kept
            here.trigpoint("restore", "--to-latest", "--name", "back")
            here.trigpoint("clones", "stop", "back")
            here.trigpoint("clones", "start", "back")
            assert [clone["state"] for clone in here.ask("clones", "list")] == ["running"]
            here.trigpoint("clones", "drop", "--yes", "back")
            here.cluster.start()
