"""Folders in which nobody else can put a link in the place of what is ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.room import room_for
from tests.fixtures.volumes import plain_folder
from trigger.config.options import load
from trigger.lock import lock
from trigger.model import Severity
from trigger.service.surroundings import check_ours, check_secrets
from trigger.trusted import NotOursError, open_file, open_ours, replace_file, why_not_ours

NOBODY = 65534
EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that nobody of ours may touch, in a folder of its own."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "victim").write_text("precious")
    return folder / "victim"


def of_nobody(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def writable_by_all(path: Path) -> None:
    path.chmod(0o777)


def writable_by_its_group(path: Path) -> None:
    path.chmod(0o775)


@pytest.mark.root
@pytest.mark.parametrize("spoil", [of_nobody, writable_by_all, writable_by_its_group])
@pytest.mark.parametrize("level", ["above", "above/middle", "above/middle/folder"])
def test_a_folder_that_others_can_write_is_not_ours_nor_is_what_lies_below(
    spoil: Callable[[Path], None], level: str, tmp_path: Path
) -> None:
    folder = tmp_path / "above" / "middle" / "folder"
    folder.mkdir(parents=True)
    os.close(open_ours(folder))
    spoil(tmp_path / level)
    with pytest.raises(NotOursError) as raised:
        open_ours(folder)
    assert str(tmp_path / level) in raised.value.message
    assert raised.value.remedy
    (told,) = check_ours({"state folder": folder / "not" / "yet"})
    assert (told.severity, told.message) == (Severity.REFUSED, raised.value.message)
    with pytest.raises(NotOursError):
        lock(folder / "lock")
    assert not (folder / "lock").exists()


@pytest.mark.root
def test_links_are_followed_only_where_they_are_ours(tmp_path: Path) -> None:
    (tmp_path / "target" / "deep").mkdir(parents=True)
    links = {"absolute": tmp_path / "target", "relative": Path("target"), "twice": Path("relative/../absolute")}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
        descriptor = open_ours(tmp_path / name / "deep")
        assert os.fstat(descriptor).st_ino == (tmp_path / "target" / "deep").stat().st_ino
        os.close(descriptor)
    os.chown(tmp_path / "relative", NOBODY, NOBODY, follow_symlinks=False)
    for name in ("relative", "twice"):
        with pytest.raises(NotOursError, match=r"the link .*relative belongs to user 65534"):
            open_ours(tmp_path / name / "deep")


@pytest.mark.root
def test_what_a_link_leads_through_must_be_ours_too(tmp_path: Path) -> None:
    (tmp_path / "theirs" / "folder").mkdir(parents=True)
    of_nobody(tmp_path / "theirs")
    (tmp_path / "link").symlink_to("theirs/folder")
    found = why_not_ours(tmp_path / "link")
    assert found is not None
    assert str(tmp_path / "theirs") in found.message


def test_a_folder_like_tmp_may_hold_ours_and_is_none_itself(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    tmp_path.chmod(0o1777)
    assert why_not_ours(tmp_path / "ours") is None
    assert why_not_ours(tmp_path / "not-there-yet") is None
    assert why_not_ours(tmp_path) is not None


def test_what_is_no_folder_is_an_error_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path, error in (("none", FileNotFoundError), ("file", NotADirectoryError), ("file/x", NotADirectoryError)):
        with pytest.raises(error):
            open_ours(tmp_path / path)
    with pytest.raises(OSError, match="Too many levels"):
        open_ours(tmp_path / "loop")


def test_no_descriptor_is_left_open_whatever_comes_of_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(Path("/proc/self/fd").iterdir())
    for name in ("folder", "link", "loop", "none"):
        why_not_ours(tmp_path / name)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_is_no_link_and_where_it_leads_nothing_is_made_or_changed(
    there: bool, victim: Path, tmp_path: Path
) -> None:
    target = victim if there else victim.parent / "cron.d"
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(NotOursError, match="is a symbolic link"):
        lock(tmp_path / "lock")
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]
    assert victim.read_text() == "precious"


def test_nothing_but_an_ordinary_file_is_opened_and_a_pipe_is_not_waited_for(victim: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(victim)
    for name in ("pipe", "link"):
        with pytest.raises(NotOursError):
            open_file(tmp_path / name)


def test_a_file_is_replaced_whole_for_our_eyes_only_and_no_link_is_followed(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").symlink_to(victim)
    (tmp_path / f".kept.{os.getpid()}").symlink_to(victim)
    replace_file(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "new"
    assert not (tmp_path / "kept").is_symlink()
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600
    assert victim.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "kept"]


@pytest.mark.root
def test_what_root_writes_into_the_folder_of_another_belongs_to_that_one(tmp_path: Path) -> None:
    of_nobody(tmp_path)
    replace_file(tmp_path / "layout.json", "{}")
    assert (tmp_path / "layout.json").stat().st_uid == NOBODY


@pytest.mark.root
def test_a_file_of_secrets_that_others_may_replace_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "pgpass"
    secret.touch(mode=0o600)
    assert [found.severity for found in check_secrets([secret])] == [Severity.OK]
    of_nobody(tmp_path)
    (found,) = check_secrets([secret])
    assert (found.severity, "others may replace it" in found.message) == (Severity.REFUSED, True)


@pytest.mark.root
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_no_example_puts_what_we_write_below_a_folder_of_the_data_s_owner(example: Path) -> None:
    """On Debian `/var/lib/postgresql` and all below belong to postgres, and `/srv` to root."""
    chosen = load(example)
    for place in (chosen.state_folder, chosen.catalog_path, chosen.journal_folder, *chosen.storage_folders):
        assert not place.is_relative_to("/var/lib/postgresql"), place
        assert why_not_ours(place) is None, place


def test_a_file_for_which_there_is_no_room_stays_as_it_was_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    replace_file(kept, "old")
    with room_for(2), pytest.raises(OSError, match="large"):
        replace_file(kept, "new and longer")
    assert kept.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.root
def test_a_folder_that_another_user_may_not_look_into_is_named() -> None:
    with plain_folder() as above:
        folder = above / "state"
        folder.mkdir(mode=0o711)
        os.seteuid(NOBODY)
        try:
            for act in (open_ours, lambda path: lock(path / "lock")):
                with pytest.raises(PermissionError) as refused:
                    act(folder)
                assert refused.value.filename == str(folder)
        finally:
            os.seteuid(0)
