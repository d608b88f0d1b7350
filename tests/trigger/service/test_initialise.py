"""The configuration that `trigpoint init` proposes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from connectors.databases.postgres import places
from connectors.databases.postgres.sections import PostgresOptions
from trigger.config.options import parse
from trigger.host import Mount
from trigger.model import Layout
from trigger.service.initialise import Proposal, propose, text

EXT4 = [Mount(Path("/"), "ext4")]
REACHED = PostgresOptions(driver="postgres", conninfo="host=/run/postgresql", databases=["postgres"])
BTRFS = [*EXT4, Mount(Path("/srv/pg"), "btrfs")]


def layout(data: str = "/srv/pg/data", **more: Any) -> Layout:
    given: dict[str, Any] = {"wal_directory": Path(data) / "pg_wal", "tablespaces": {}} | more
    return places.layout(
        150018, Path(data), given["wal_directory"], given["tablespaces"], (), (105, 110), segment_bytes=16 << 20
    )


def proposed(found: Layout, mounts: list[Mount] | None = None, *, root: bool = True, **more: Any) -> Proposal:
    given: dict[str, Any] = {"subvolume_of": lambda path: path, "databases": ["bank", "postgres"]} | more
    return propose(
        REACHED,
        given["databases"],
        found,
        state_folder=given.get("state_folder", Path("/var/lib/trigpoint")),
        mounts=mounts or EXT4,
        subvolume_of=given["subvolume_of"],
        root=root,
        **{key: given[key] for key in ("ours", "size_bytes", "number") if key in given},
    )


def test_any_filesystem_gets_copies_beside_the_data() -> None:
    found = proposed(layout("/var/lib/postgresql/15/main"))
    assert found.driver == "directory"
    assert found.volumes == (("data", Path("/var/lib/postgresql/15/main")),)
    assert found.storage_folder == Path("/var/lib/postgresql/15/trigpoint-snapshots")


DEBIAN = "/var/lib/postgresql/15/main"


def not_below(*theirs: str) -> Any:
    """Give what says whether a folder is ours, where these and all below them are another's."""
    return lambda folder: not any(folder.is_relative_to(each) for each in theirs)


@pytest.mark.parametrize(
    ("mounts", "theirs", "place", "shares"),
    [
        (["/"], "/var/lib/postgresql", "/var/lib/trigpoint/snapshots", True),
        (["/", "/var/lib/postgresql"], "/var/lib/postgresql/15", "/var/lib/postgresql/trigpoint-snapshots", True),
        (["/", "/var/lib/postgresql"], "/var/lib/postgresql", "/var/lib/trigpoint/snapshots", False),
        (["/"], "/var/lib/postgresql/15/main", "/var/lib/postgresql/15/trigpoint-snapshots", None),
    ],
)
def test_snapshots_lie_where_the_owner_of_the_data_cannot_change_them_on_its_filesystem_if_there_is_a_place(
    mounts: list[str], theirs: str, place: str, shares: bool | None
) -> None:
    found = proposed(layout(DEBIAN), [Mount(Path(each), "xfs") for each in mounts], ours=not_below(theirs))
    assert found.storage_folder == Path(place)
    said = "".join(why for why in found.why if "changed by others" in why)
    assert ("same filesystem" in said, "another filesystem" in said) == (shares is True, shares is False)


def test_snapshots_of_a_subvolume_lie_in_the_nearest_folder_that_nobody_else_can_change() -> None:
    deep: dict[str, Any] = {"subvolume_of": lambda _path: Path("/srv/pg/15/main")}
    found = proposed(layout("/srv/pg/15/main"), BTRFS, ours=not_below("/srv/pg/15"), **deep)
    assert (found.driver, found.storage_folder) == ("btrfs", Path("/srv/pg/trigpoint"))
    found = proposed(layout("/srv/pg/15/main"), BTRFS, ours=not_below("/srv/pg"), **deep)
    assert (found.driver, found.storage_folder) == ("directory", Path("/var/lib/trigpoint/snapshots"))
    assert any("let root own it" in why for why in found.why)


@pytest.mark.parametrize("mounts", [EXT4, BTRFS])
@pytest.mark.parametrize("theirs", ["/nowhere", "/srv/pg/theirs"])
def test_two_services_of_one_host_are_proposed_two_folders(mounts: list[Mount], theirs: str) -> None:
    place: Any = layout("/srv/pg/theirs/data")
    states = ["/var/lib/trigpoint", "/var/lib/trigpoint-shop", "/var/lib/bank"]
    folders = [
        proposed(place, mounts, state_folder=Path(state), number=number, ours=not_below(theirs)).storage_folder
        for state in states
        for number in (1, 2)
    ]
    assert len(set(folders)) == len(folders)
    assert all("trigpoint" in str(folder) or "bank" in str(folder) for folder in folders)


def test_data_in_a_btrfs_subvolume_gets_atomic_snapshots() -> None:
    found = proposed(layout(), BTRFS)
    assert (found.driver, found.storage_folder) == ("btrfs", Path("/srv/pg/trigpoint"))


def test_the_subvolume_is_the_volume_where_the_data_lies_deeper_in_it() -> None:
    deep = layout("/srv/pg/sub/15/main")
    found = proposed(deep, BTRFS, subvolume_of=lambda _path: Path("/srv/pg/sub"))
    assert found.volumes == (("data", Path("/srv/pg/sub")),)


@pytest.mark.parametrize(
    "why",
    [
        {"root": False},
        {"subvolume_of": lambda _path: Path("/srv/pg")},  # the top of the btrfs: nothing lies beside it
        {"mounts": [Mount(Path("/"), "btrfs")], "subvolume_of": lambda _path: Path("/")},
    ],
)
def test_btrfs_without_a_place_or_right_for_snapshots_gets_copies_and_the_reason(why: dict[str, Any]) -> None:
    found = proposed(layout(), why.pop("mounts", BTRFS), **why)
    assert found.driver == "directory"
    assert "btrfs" in found.why[0]


def test_a_part_on_another_filesystem_rules_btrfs_out() -> None:
    found = proposed(layout(tablespaces={16400: Path("/fast/space")}), BTRFS)
    assert found.driver == "directory"
    assert dict(found.volumes) == {"data": Path("/srv/pg/data"), "tablespace-16400": Path("/fast/space")}


def test_log_outside_the_data_directory_is_a_volume_of_its_own() -> None:
    found = proposed(layout(wal_directory=Path("/wal/15")))
    assert found.volumes[1] == ("wal", Path("/wal/15"))


def test_two_parts_in_one_subvolume_are_one_volume() -> None:
    found = proposed(layout(wal_directory=Path("/srv/pg/wal")), BTRFS, subvolume_of=lambda _path: Path("/srv/pg/all"))
    assert found.volumes == (("data", Path("/srv/pg/all")),)


def test_the_maintenance_database_is_left_out_where_there_is_another() -> None:
    assert proposed(layout()).databases == ("bank",)
    assert proposed(layout(), databases=["postgres"]).databases == ("postgres",)


@pytest.mark.parametrize("mounts", [EXT4, BTRFS])
@pytest.mark.parametrize(
    "name", ['we"ird', "bänk", "a\\b", "new\nline", "esc\x1b[2J", "del\x7f", "c1\x9b", "tag\U000e0001"]
)
def test_what_is_written_is_read_back_as_proposed(mounts: list[Mount], name: str) -> None:
    theirs = not_below("/srv/pg/theirs")
    place = layout(f"/srv/pg/theirs/{name}/data", tablespaces={1: Path("/srv/pg/space")})
    found = proposed(place, mounts, databases=[name], ours=theirs)
    assert all(line.isprintable() for line in text(found).splitlines())
    read = parse(text(found), "written")
    assert tuple(read.database.databases) == (name,)
    assert tuple((volume.name, volume.path) for volume in read.volumes) == found.volumes
    assert (read.storage.driver, read.storage.folder) == (found.driver, found.storage_folder)
    assert read.state_folder == found.state_folder


@pytest.mark.parametrize(
    ("disk", "kept"), [(1 << 30, 102 << 20), (2 << 30, 204 << 20), (9 << 30, 921 << 20), (1 << 40, 1 << 30)]
)
def test_of_a_small_disk_a_tenth_is_to_stay_free_and_of_a_large_one_a_gigabyte(disk: int, kept: int) -> None:
    sizes = {Path("/srv/pg/trigpoint"): disk}
    found = proposed(layout(), BTRFS, size_bytes=sizes.__getitem__)
    assert parse(text(found), "written").storage.keep_free == kept


def test_every_line_that_says_something_stands_under_a_comment() -> None:
    lines = text(proposed(layout())).splitlines()
    for above, line in pairwise(lines):
        if " = " in line and not line.startswith("#"):
            assert above.startswith("# "), line
