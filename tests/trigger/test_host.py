"""What the pre-flight check says of this host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trigger.host import Mount, mount_of, mounts, read_mounts
from trigger.model import Severity, Volume
from trigger.service.surroundings import (
    check_clock,
    check_places,
    check_secrets,
    check_state_folder,
    clock_is_synchronised,
)

MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /srv/pg\\040data rw,noatime - btrfs /dev/vdb rw,subvol=/
31 22 0:26 / /srv rw - xfs /dev/vdc rw
32 31 0:27 / /srv rw shared:5 master:2 - tmpfs tmpfs rw
a line that is none
"""


def severities(found: object) -> list[Severity]:
    return [finding.severity for finding in list(found)]  # type: ignore[call-overload]


def test_mounts_are_read_with_blanks_and_optional_fields() -> None:
    assert mounts(MOUNTINFO) == [
        Mount(Path("/"), "ext4"),
        Mount(Path("/srv/pg data"), "btrfs"),
        Mount(Path("/srv"), "xfs"),
        Mount(Path("/srv"), "tmpfs"),
    ]


@pytest.mark.parametrize(
    ("path", "filesystem"), [("/srv/pg data/x", "btrfs"), ("/srv/other", "tmpfs"), ("/srvx", "ext4"), ("/", "ext4")]
)
def test_a_path_lies_on_the_longest_and_last_mount_above_it(path: str, filesystem: str) -> None:
    assert mount_of(Path(path), mounts(MOUNTINFO)).filesystem == filesystem


def test_this_machine_has_a_root() -> None:
    assert mount_of(Path("/"), read_mounts()).point == Path("/")


def test_a_place_on_a_protected_volume_is_refused_by_whatever_name_it_is_reached(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(data / "inner")
    volumes = [Volume("data", str(data))]
    places = {
        "the volume itself": data,
        "inside": data / "inner" / "not" / "there" / "yet",
        "through a link": tmp_path / "link" / "catalog",
        "beside": elsewhere / "not-there-yet",
        "above": tmp_path,
    }
    found = {finding.subject: finding for finding in check_places(places, volumes)}
    assert {what: finding.severity for what, finding in found.items()} == {
        "the volume itself": Severity.REFUSED,
        "inside": Severity.REFUSED,
        "through a link": Severity.REFUSED,
        "beside": Severity.OK,
        "above": Severity.OK,
    }
    assert all(finding.remedy for finding in found.values() if finding.severity is Severity.REFUSED)


def test_a_volume_that_is_not_there_refuses_no_place(tmp_path: Path) -> None:
    volumes = [Volume("data", str(tmp_path / "gone"))]
    assert severities(check_places({"state": tmp_path}, volumes)) == [Severity.OK]


@pytest.mark.parametrize(
    ("mode", "severity"),
    [(0o600, Severity.OK), (0o644, Severity.OK), (0o620, Severity.REFUSED), (0o602, Severity.REFUSED)],
)
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int, severity: Severity) -> None:
    path = tmp_path / "hooks.toml"
    path.touch()
    path.chmod(mode)
    assert severities(check_secrets([path])) == [severity]


def test_a_file_of_another_user_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert severities(check_secrets([tmp_path / "none"])) == [Severity.REFUSED]
    if os.geteuid() == 0:
        path = tmp_path / "file"
        path.touch(mode=0o600)
        os.chown(path, 65534, 65534)
        assert severities(check_secrets([path])) == [Severity.REFUSED]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (0o711, []),
        (0o755, []),
        (0o777, [Severity.REFUSED]),
        (0o721, [Severity.REFUSED]),
        (0o700, [Severity.WARNING] if os.geteuid() == 0 else []),
    ],
)
def test_a_state_folder_is_refused_where_others_may_write_it_and_a_warning_where_clones_cannot_pass(
    tmp_path: Path, mode: int, expected: list[Severity]
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    assert severities(check_state_folder(folder)) == expected


def test_a_state_folder_that_can_be_made_is_no_finding(tmp_path: Path) -> None:
    assert severities(check_state_folder(tmp_path / "a" / "b")) == []


def test_a_state_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert severities(check_state_folder(tmp_path / "file" / "state")) == [Severity.REFUSED]


def test_the_clock_is_judged_by_the_kernel() -> None:
    assert clock_is_synchronised() in (True, False, None)
    assert check_clock(True).severity is Severity.OK
    assert check_clock(False).severity is Severity.NOTE
    assert check_clock(None).severity is Severity.NOTE
