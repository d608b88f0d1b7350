"""Two services on one host: a folder for snapshots, or slots, of the first are refused to the second, by `check` as by
`run`, and `init` proposes others.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]


def second_of(here: Deployment) -> Deployment:
    """Give another service of another name for the same cluster, with the same folder for snapshots."""
    desk = here.state.parent / "second"
    desk.mkdir()
    second = replace(here, state=desk / "state", process=None)
    second.configure()
    text = second.config.read_text().replace('name = "test"', 'name = "second"', 1)
    second.config.write_text(text.replace("[database]", '[database]\nslot_prefix = "second"', 1))
    return second


def refused(second: Deployment, *command: str) -> str:
    """Give what a command is refused for, as `another trigpoint …`."""
    done = second.trigpoint(*command, check=False)
    assert done.returncode == 3, done.stderr
    found = re.search(r"another trigpoint makes points in (.*)", done.stdout + done.stderr)
    assert found is not None, done.stdout + done.stderr
    return found[0]


def test_what_belongs_to_another_service_is_refused_by_check_as_by_run_while_that_is_down_too() -> None:
    with deployment(16, "directory") as here:
        here.start()
        second, snapshots = second_of(here), here.root / "snapshots"
        here.trigpoint("check")
        here.wait_for((snapshots / "layout.json").exists, "where the cluster lies, beside the snapshots too")
        layout = (snapshots / "layout.json").read_bytes()
        claimed = f"another trigpoint makes points in {snapshots}: that of the catalog {here.state / 'catalog.sqlite'}"
        for _ in range(2):
            assert claimed in refused(second, "check")
            assert claimed in refused(second, "run")
            assert here.stop() == 0
        forced = second.trigpoint("run", "--force", check=False)
        assert (forced.returncode != 0, claimed in forced.stderr) == (True, True)
        assert (snapshots / "layout.json").read_bytes() == layout
        here.trigpoint("check")
        (here.state / "catalog.sqlite").rename(here.state / "given-up.sqlite")
        second.trigpoint("check")


def test_init_gives_a_file_of_another_name_a_service_with_folders_of_its_own() -> None:
    with deployment(16, "directory") as here:
        found = []
        for file in ("trigpoint.toml", "bank.toml", "shop.toml"):
            target = here.state.parent / "etc" / file
            found.append(here.ask("init", "--conninfo", here.cluster.conninfo, "--output", str(target))["proposal"])
    assert [one["name"] for one in found] == ["main", "bank", "shop"]
    for key in ("state_folder", "storage_folder"):
        assert len({one[key] for one in found}) == len(found), key


def test_init_proposes_no_folder_that_another_service_has() -> None:
    with deployment(16, "directory") as here:

        def init(state: Path) -> str:
            options = ("--conninfo", here.cluster.conninfo, "--state-folder", str(state), "--output", "-")
            found = re.search('^folder = "(.*)"', here.trigpoint("init", *options).stdout, re.MULTILINE)
            assert found is not None
            return found[1]

        first = init(here.state)
        text = here.config.read_text().replace(str(here.root / "snapshots"), first)
        here.config.write_text(text)
        here.start()
        assert here.stop() == 0
        assert init(here.state) == first
        elsewhere = here.state.parent / "second" / here.state.name
        assert init(elsewhere) == f"{first}-2"
        assert init(here.state.parent / "shop") not in (first, f"{first}-2")


def test_slots_of_another_service_are_refused_and_init_proposes_names_of_its_own() -> None:
    with deployment(16, "directory", databases=("postgres", "shop")) as here:
        here.start()
        second = second_of(here)
        text = second.config.read_text().replace('slot_prefix = "second"\n', "").replace(', "shop"', "")
        second.config.write_text(text.replace(str(here.root / "snapshots"), str(here.root / "others")))
        claimed = f"are those of another trigpoint, of the catalog {here.state / 'catalog.sqlite'}"
        made = sorted(here.cluster.sql("SELECT slot_name::text FROM pg_replication_slots"))
        for _ in range(2):
            for command in ("check", "run"):
                done = second.trigpoint(command, check=False)
                assert (done.returncode, claimed in done.stdout + done.stderr) == (3, True), done.stdout + done.stderr
            assert here.stop() == 0
        dropped = second.trigpoint("release", "--yes", check=False)
        assert (dropped.returncode, claimed in dropped.stderr) == (4, True), dropped.stderr
        assert sorted(here.cluster.sql("SELECT slot_name::text FROM pg_replication_slots")) == made
        here.trigpoint("check")

        def init(file: str, state: Path) -> str:
            target = here.state.parent / file
            found = here.ask(
                *("init", "--conninfo", here.cluster.conninfo, "--output", str(target)), "--state-folder", str(state)
            )
            return str(found["proposal"]["database"].get("slot_prefix"))

        assert init("here.toml", here.state) == "None"
        assert init("shop-2.toml", here.state.parent / "shop-2") == "shop_2_trigpoint"
        (here.state / "catalog.sqlite").rename(here.state / "lost.sqlite")
        assert init("anew.toml", here.state.parent / "anew") == "None"
