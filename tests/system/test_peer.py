"""A cluster that lets in each system user under his own name only, as Debian's do: what root is told helps."""

from __future__ import annotations

import getpass
import json
import re

import pytest

from tests.fixtures.service import deployment

pytestmark = [pytest.mark.server, pytest.mark.root, pytest.mark.slow]

STOCK = """
local   all             postgres                                peer
local   all             all                                     peer
host    all             all             127.0.0.1/32            scram-sha-256
local   replication     all                                     peer
"""
"""What pg_createcluster of Debian writes."""


def test_root_is_told_how_to_be_let_in_by_peer_and_is_let_in_that_way() -> None:
    with deployment(15, "directory") as deployed:
        hba, ident = (deployed.cluster.data / name for name in ("pg_hba.conf", "pg_ident.conf"))
        trusting = hba.read_text()
        hba.write_text(STOCK)
        deployed.cluster.run("pg_ctl", "-D", deployed.cluster.data, "reload")
        arguments = ("--conninfo", deployed.cluster.conninfo, "--state-folder", str(deployed.state), "--force")
        refused = deployed.trigpoint("init", *arguments, "--output", str(deployed.config), check=False)
        assert refused.returncode == 4
        assert 'Peer authentication failed for user "postgres"' in refused.stderr
        hint = " ".join(refused.stderr.partition("hint:")[2].split())
        assert f"runs as {getpass.getuser()}" in hint
        assert "runuser -u postgres" in hint
        lines = re.findall(r"`([^`]*)`", hint)
        hba.write_text("\n".join(line for line in lines if line.startswith("local ")) + STOCK)
        ident.write_text("\n".join(line for line in lines if line.startswith("trigpoint ")) + "\n")
        deployed.cluster.run("pg_ctl", "-D", deployed.cluster.data, "reload")
        deployed.trigpoint("init", *arguments, "--output", str(deployed.config))
        findings = json.loads(deployed.trigpoint("check", "--json").stdout)
        assert not [found for found in findings if found["severity"] == "refused"]
        hba.write_text(STOCK)
        deployed.cluster.run("pg_ctl", "-D", deployed.cluster.data, "reload")
        again = deployed.trigpoint("check", check=False)
        assert again.returncode != 0
        assert "map=trigpoint" in again.stdout + again.stderr
        hba.write_text(trusting)
        deployed.cluster.run("pg_ctl", "-D", deployed.cluster.data, "reload")
