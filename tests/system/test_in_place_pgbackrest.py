"""A site that backs up with pgBackRest restores in place: its backups before, its archive, its backups after hold."""

from __future__ import annotations

import pytest

from tests.fixtures.pgbackrest import SUPPORTED, PgBackRest
from tests.fixtures.service import deployment
from tests.fixtures.volumes import plain_folder
from tests.system.test_in_place_archive import say, wait_for_archiver, words

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow, pytest.mark.pgbackrest]


@pytest.mark.parametrize("major", SUPPORTED)
def test_pgbackrest_goes_on_after_a_restore_in_place_and_recovers_what_is_there_from_before_and_after(
    major: int,
) -> None:
    with plain_folder() as folder, deployment(major, archive_mode="on") as here:
        cluster, backup = here.cluster, PgBackRest(here.cluster, folder / "pgbackrest")
        cluster.sql("CREATE TABLE said (id serial PRIMARY KEY, word text)")
        backup.archive()
        backup.run("--type=full", "backup")
        here.start()
        say(cluster, "one", "two")
        unwanted = say(cluster, "three")
        say(cluster, "four")
        wait_for_archiver(cluster)
        here.settle()
        assert here.stop() == 0
        cluster.stop()
        done = here.ask("restore", "--before-xid", unwanted, "--in-place", "--yes")
        cluster.start()
        backup.run("check")
        say(cluster, "five")
        wait_for_archiver(cluster)
        with backup.recovered(folder / "before") as found:
            assert words(found) == ["one", "two", "five"], "from the backup of before, to the end of the archive"
        backup.run("--type=incr", "backup")
        here.start()
        say(cluster, "six")
        wait_for_archiver(cluster)
        with backup.recovered(folder / "after") as found:
            assert words(found) == ["one", "two", "five", "six"]
        assert cluster.sql("SELECT failed_count FROM pg_stat_archiver") == [(0,)]
        assert here.ask("verify")["passed"]
        assert here.stop() == 0
        cluster.stop()
        here.trigpoint("restore", "--undo", done["swap"]["name"], "--yes")
        cluster.start()
        assert words(cluster) == ["one", "two", "three", "four"]
        backup.run("check")
        backup.run("--type=full", "backup")
