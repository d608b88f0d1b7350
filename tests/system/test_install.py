"""The lines by which the README installs Trigpoint, run as they stand, end in a service that protects a cluster.

They write below `/opt`, `/etc` and `/var/lib`: each of these is a copy, or empty, in a mount namespace of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.postgres import Cluster, running_cluster
from tests.fixtures.volumes import plain_folder

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.server, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(400)]

SCRIPT = """
set -eu
mount -t tmpfs none /opt
mkdir {work}/etc
cp -a /etc/. {work}/etc
mount --bind {work}/etc /etc
mount -t tmpfs none /var/lib
{lines}
timeout 200 {last} &
until /opt/trigpoint/bin/trigpoint status --json 2> {work}/why | grep -q '"ready": true'; do kill -0 $!; sleep 0.2; done
{psql} -qc 'INSERT INTO sold VALUES (1)' shop
until /opt/trigpoint/bin/trigpoint status --json | grep -Eq '"pending_commits": [1-9]'; do kill -0 $!; sleep 0.2; done
/opt/trigpoint/bin/trigpoint point
until /opt/trigpoint/bin/trigpoint status --json | grep -q '"pending_commits": 0'; do kill -0 $!; sleep 0.2; done
kill $!
wait $!
echo '=== points'
/opt/trigpoint/bin/trigpoint list --json
"""


def lines_to_install() -> list[str]:
    """Give the lines of the README's `sh` block, without what is said about them."""
    (block,) = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [line.partition(" #")[0].strip() for line in str(block).splitlines()]


def commands_of_the_unit() -> list[str]:
    """Give what the unit runs before, and as, the service, for the configuration that `init` writes."""
    unit = (ROOT / "configs" / "systemd" / "trigpoint@.service").read_text()
    return [line.replace("%i", "trigpoint") for line in re.findall(r"^ExecStart(?:Pre)?=(.*)$", unit, re.MULTILINE)]


def installed(cluster: Cluster, work: Path) -> str:
    """Run the lines on the host of a cluster that libpq's environment names; gives what they printed."""
    *lines, last = lines_to_install()
    before, start = commands_of_the_unit()
    assert start.startswith(last), "the unit starts something else than the README"
    psql = cluster.programs.path("psql")
    there = {"PGHOST": str(cluster.sockets), "PGPORT": str(cluster.port), "PGUSER": "postgres"}
    path = f"{sys.base_prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "bash",
            "-c",
            SCRIPT.format(work=work, lines="\n".join([*lines, before]), last=start, psql=psql),
        ],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("TRIGPOINT")}
        | there
        | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=360,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_make_install_puts_program_and_unit_where_they_find_each_other(tmp_path: Path) -> None:
    places = [f"PREFIX={tmp_path}/opt", f"UNITS={tmp_path}/units"]
    subprocess.run(["make", "install", *places], cwd=ROOT, check=True, capture_output=True, timeout=300)
    unit = (tmp_path / "units" / "trigpoint@.service").read_text()
    programs = re.findall(r"^ExecStart(?:Pre)?=(\S+)", unit, re.MULTILINE)
    assert programs == [f"{tmp_path}/opt/bin/trigpoint"] * 2
    subprocess.run([programs[0], "--version"], check=True, capture_output=True, timeout=60)
    made = subprocess.run(["make", "-n", "install"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert all(line.split()[0] in made.stdout for line in (lines_to_install()[-1], commands_of_the_unit()[1]))


def test_the_lines_by_which_it_is_installed_end_in_a_service_that_protects_a_cluster() -> None:
    with plain_folder() as folder, running_cluster(15, folder / "data") as cluster:
        cluster.sql("CREATE DATABASE shop")
        cluster.sql("CREATE TABLE sold (n int PRIMARY KEY)", "shop")
        work = folder / "work"
        work.mkdir()
        said, _, points = installed(cluster, work).partition("=== points\n")
        assert "wrote /etc/trigpoint/trigpoint.toml" in said
        assert {point["state"] for point in json.loads(points)} == {"sealed"}
        assert (work / "etc" / "trigpoint" / "trigpoint.toml").stat().st_mode & 0o777 == 0o600
