"""Where the data directory lies in copies of volumes that were others when they were cut."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from connectors.databases.postgres.clone.placement import Placement, Spot
from trigger.errors import RestoreError
from trigger.ports import Clone

PLACEMENT = Placement(Spot("pg", "15/main"), None, (), Path("/srv/pg/15/main"))


def clone_of(**paths: Path) -> Clone:
    return Clone("one", "", tuple(paths.items()), datetime.now(UTC))


def cluster_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "PG_VERSION").write_text("15\n")
    return folder


@pytest.mark.parametrize(
    ("volume", "inside"),
    [("pg", "15/main"), ("data", "15/main"), ("main", "."), ("pg", "pg/15/main"), ("root", "srv/pg/15/main")],
)
def test_a_data_directory_is_found_whatever_its_volume_was_called_and_wherever_that_began(
    volume: str, inside: str, tmp_path: Path
) -> None:
    data = cluster_at(tmp_path / "copy" / inside)
    (tmp_path / "other").mkdir()
    copy = clone_of(**{volume: tmp_path / "copy", "other": tmp_path / "other"})
    assert PLACEMENT.data_in(copy) == PLACEMENT.cluster_in(copy) == data


def test_a_data_directory_is_found_where_two_volumes_have_exchanged_their_names(tmp_path: Path) -> None:
    data = cluster_at(tmp_path / "space" / "15/main")
    (tmp_path / "pg").mkdir()
    assert PLACEMENT.data_in(clone_of(pg=tmp_path / "pg", space=tmp_path / "space")) == data


def test_no_link_in_a_copy_leads_to_another_cluster(tmp_path: Path) -> None:
    cluster_at(tmp_path / "production")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "main").symlink_to(tmp_path / "production")
    assert PLACEMENT.data_in(clone_of(data=tmp_path / "copy")) is None
    with pytest.raises(RestoreError, match="no PostgreSQL cluster in clone one, whose volumes are: data"):
        PLACEMENT.cluster_in(clone_of(data=tmp_path / "copy"))
