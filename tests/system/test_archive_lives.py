"""An older copy is put back, and the archive still has the log of before under the names that come next."""

from __future__ import annotations

import psycopg
import pytest

from tests.system.test_archive import _arrives, _begin, _findings, _switch, archived
from tests.system.test_histories import Told, copied, put_back, tell

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]


def test_the_log_of_before_is_replayed_for_no_commit_of_the_copy_and_its_own_is_once_it_can_be_archived() -> None:
    with archived(16) as (deployed, archive):
        cluster = deployed.cluster
        cluster.sql("CREATE TABLE said (id serial PRIMARY KEY, word text)")
        _begin(deployed)
        tell(cluster, "both")
        deployed.settle()
        _arrives(deployed, _switch(deployed))
        deployed.stop()
        copy = copied(deployed)
        deployed.start()
        for number in range(3):
            tell(cluster, f"old{number}")
            deployed.settle()
            _arrives(deployed, _switch(deployed))
        deployed.stop()
        cluster.stop()
        put_back(cluster, copy)
        cluster.start()
        deployed.start(wait=False)
        deployed.wait_for(lambda: deployed.status().get("ready"), "a base of the new life")
        told: list[Told] = []
        for number in range(3):
            told += tell(cluster, f"new{number}")
            deployed.settle()
        said = "the log of another life of the cluster under that name"
        deployed.wait_for(lambda: said in _findings(deployed).get("restore_command", ""), "a word on the archive")
        for option in [f"--to-xid={told[1].xid}", f"--before-xid={told[2].xid}"]:
            assert deployed.trigpoint("restore", option, "--name", "back", check=False).returncode
        (life,) = (deployed.state / "journal").glob("*+*")
        assert not [file for file in life.glob("0*") if file.stat().st_size], "nothing of it was taken"

        archive.files.rename(archive.folder / "of the earlier life")  # as the finding says
        archive.files.mkdir()
        archive.files.chmod(0o777)
        segment = _switch(deployed)
        deployed.wait_for((life / segment).exists, "the log of the new life in its folder")
        deployed.wait_for(lambda: not _findings(deployed), "a status without it")
        assert (life / segment).read_bytes() == (archive.files / segment).read_bytes()
        for option, words in [
            (f"--to-xid={told[1].xid}", told[1].all),
            (f"--before-xid={told[2].xid}", told[1].all),
        ]:
            report = deployed.ask("restore", option, "--name", "back")
            with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
                rows = connection.execute("SELECT word FROM said ORDER BY id").fetchall()
            assert tuple(row[0] for row in rows) == words
            deployed.trigpoint("clones", "drop", "--yes", "back")
        assert [path.name for path in (deployed.state / "journal").glob("*+*")] == [life.name], "no life but these two"
        assert deployed.stop() == 0
