"""What becomes of clones: listed, stopped, started, dropped, found again after a restore that was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.fixtures.bank import Bank, Breaking, nothing_left, quiet, run, two_points
from trigger.errors import RestoreError, StorageError
from trigger.model import EPOCH, Address
from trigger.ports import Clone
from trigger.restore import clone_records
from trigger.restore.clone_records import CloneRecord, clone_name
from trigger.restore.clones import CloneState, clones, drop, start, stop
from trigger.restore.inplace import put_in_place
from trigger.restore.leftovers import clear
from trigger.restore.restore import restore


def test_clones_are_listed_with_their_state_and_dropped_with_all_they_have(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        target = await two_points(it)
        await restore(target, it.site, progress=quiet, name="one")
        it.seconds[0] += 90
        (status,) = await clones(it.site)
        assert (status.name, status.state, status.age) == ("one", CloneState.RUNNING, timedelta(seconds=90))
        assert status.record
        assert (status.record.target, status.record.conninfo) == (target.description, "memory:one")
        await it.site.recovery.stop((await it.site.storage.clones())[0])
        assert (await clones(it.site))[0].state is CloneState.STOPPED
        with pytest.raises(RestoreError, match="there is a clone one already"):
            await restore(target, it.site, progress=quiet, name="one")
        await it.site.storage.drop_clone("one")
        assert (await clones(it.site))[0].state is CloneState.GONE
        await drop("one", it.site)
        assert nothing_left(it)
        with pytest.raises(RestoreError, match="there is no clone one"):
            await drop("one", it.site)

    run(tmp_path, story)


def test_a_clone_is_stopped_and_started_again_with_what_it_held(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await restore(await two_points(it), it.site, progress=quiet, name="one")
        before = it.held("one")
        for _ in range(2):  # what is so already stays so
            assert (await stop("one", it.site)).state is CloneState.STOPPED
        for listen in (None, None, Address("127.0.0.1", 5433)):
            assert (await start("one", it.site, listen)).state is CloneState.RUNNING
        assert it.held("one") == before
        await it.site.storage.drop_clone("one")
        with pytest.raises(RestoreError, match="clone one is gone"):
            await start("one", it.site)

    run(tmp_path, story)


def test_a_clone_is_not_forgotten_while_the_storage_shows_nothing_at_all(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await restore(await two_points(it), it.site, progress=quiet, name="one")
        kept, made = dict(it.world.kept), dict(it.world.clones)
        it.world.kept.clear()  # as of what is not mounted
        it.world.clones.clear()
        for act in (start, stop, drop):
            with pytest.raises(RestoreError, match="shows no snapshot at all") as refused:
                await act("one", it.site)
            assert "mount the storage's filesystem" in refused.value.hint
        it.world.kept.update(kept)
        it.world.clones.update(made)
        assert (await stop("one", it.site)).state is CloneState.STOPPED

    run(tmp_path, story)


def test_a_clone_of_which_nothing_is_written_is_shown_as_unfinished_and_can_be_dropped(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await two_points(it)
        await it.site.storage.clone((await it.catalog.bases())[0].id, "stray", quiet)
        assert [status.state for status in await clones(it.site)] == [CloneState.UNFINISHED]
        await drop("stray", it.site)
        assert not it.world.clones

    run(tmp_path, story)


def test_a_clone_that_is_being_made_is_shown_so_and_not_dropped(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        target = await two_points(it)
        seen = []

        async def look() -> None:
            seen.extend(await clones(it.site))
            with pytest.raises(RestoreError, match="is being made"):
                await drop("one", it.site)
            assert await clear(it.site) == ([], [])
            assert "one" in {clone.name for clone in await it.site.storage.clones()}

        recovery = Breaking(it.site.recovery, "start", look, after=False)
        with pytest.raises(AttributeError):  # the wrapper gives no server back
            await restore(target, replace(it.site, recovery=recovery), progress=quiet, name="one")
        assert [status.state for status in seen] == [CloneState.RESTORING]

    run(tmp_path, story)


@pytest.mark.parametrize("place", ["after-intent", "after-clone", "after-stage", "after-replay"])
def test_a_killed_restore_is_found_as_unfinished_and_dropped(tmp_path: Path, place: str) -> None:
    kill_one(tmp_path, place)

    async def story(it: Bank) -> None:
        target = await two_points(it)
        await what_the_killed_one_made(it)
        (status,) = await clones(it.site)
        assert (status.state, status.record and status.record.target) == (CloneState.UNFINISHED, target.description)
        await drop("one", it.site)
        assert nothing_left(it)

    run(tmp_path, story)


def test_a_clone_that_is_being_dropped_is_neither_started_nor_put_in_place_and_is_dropped_to_its_end(
    tmp_path: Path,
) -> None:
    async def story(it: Bank) -> None:
        await restore(await two_points(it), it.site, progress=quiet, name="one")
        await stop("one", it.site)
        clone, held = it.world.clones["one"]
        it.world.clones["one"] = replace(clone, dropped=True), held  # as a removal leaves it that was cut off
        (status,) = await clones(it.site)
        assert (status.state, status.record and status.record.name) == (CloneState.DROPPED, "one")
        for act in (start("one", it.site), put_in_place("one", it.site, progress=quiet)):
            with pytest.raises(RestoreError, match="clone one is being dropped") as refused:
                await act
            assert "trigpoint clones drop one" in refused.value.hint
        assert (await stop("one", it.site)).state is CloneState.DROPPED
        await drop("one", it.site)
        assert nothing_left(it)

    run(tmp_path, story)


def test_what_a_killed_restore_left_goes_by_itself_and_nothing_else(tmp_path: Path) -> None:
    kill_one(tmp_path, "after-stage")

    async def story(it: Bank) -> None:
        target = await two_points(it)
        await what_the_killed_one_made(it)
        await it.site.storage.clone((await it.catalog.bases())[0].id, "stray", quiet)
        await restore(target, it.site, progress=quiet, name="whole")
        assert await clear(it.site) == (["one"], [])
        assert await clear(it.site) == ([], [])
        states = {status.name: status.state for status in await clones(it.site)}
        assert states == {"stray": CloneState.UNFINISHED, "whole": CloneState.RUNNING}
        await drop("stray", it.site)
        await drop("whole", it.site)
        assert nothing_left(it)

    run(tmp_path, story)


def test_what_a_killed_restore_left_stays_while_somebody_elses_server_works_in_it(tmp_path: Path) -> None:
    kill_one(tmp_path, "after-stage")

    async def story(it: Bank) -> None:
        await two_points(it)
        clone = await what_the_killed_one_made(it)
        it.world.at_work.add(str(clone.paths[0][1]))
        gone, (why,) = await clear(it.site)
        assert not gone
        assert "clone one, which a restore left that was killed: the server in" in why
        assert [status.state for status in await clones(it.site)] == [CloneState.UNFINISHED]
        it.world.at_work.clear()
        assert await clear(it.site) == (["one"], [])
        assert nothing_left(it)

    run(tmp_path, story)


async def what_the_killed_one_made(it: Bank) -> Clone:
    record = clone_records.written(it.site.records_folder)["one"].record
    base = (await it.catalog.bases())[0].id
    return await it.site.storage.clone(base, "one", quiet, identity=record.identity)


def test_a_refused_restore_leaves_the_clone_that_was_there_before(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        target = await two_points(it)
        await restore(target, it.site, progress=quiet, name="one")
        held = it.held("one")
        shutil.rmtree(it.site.records_folder)  # as with the state folder
        with pytest.raises(StorageError, match="one exists already"):
            await restore(target, it.site, progress=quiet, name="one")
        assert it.held("one") == held, "its server runs"
        assert [clone.name for clone in await it.site.storage.clones()] == ["one"]
        assert not clone_records.written(it.site.records_folder), "nobody knows more of it than before"

    run(tmp_path, story)


def test_a_record_tells_nothing_of_another_clone_of_its_name(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await restore(await two_points(it), it.site, progress=quiet, name="one")
        await it.site.storage.drop_clone("one")
        await it.site.storage.clone((await it.catalog.bases())[0].id, "one", quiet, identity="of another service")
        (status,) = await clones(it.site)
        assert (status.state, status.record) == (CloneState.UNFINISHED, None)

    run(tmp_path, story)


@pytest.mark.parametrize("by", ["this version", "an earlier one"])
def test_what_was_there_before_a_restore_that_was_killed_stays(tmp_path: Path, by: str) -> None:
    kill_one(tmp_path, "after-intent")
    intent = tmp_path / "clones" / "one.intent"
    if by == "an earlier one":
        old = json.loads(intent.read_text())
        del old["identity"]
        later = datetime.fromisoformat(old["created_at"]) + timedelta(hours=1)
        intent.write_text(json.dumps(old | {"created_at": later.isoformat()}))

    async def story(it: Bank) -> None:
        await two_points(it)
        await it.site.storage.clone((await it.catalog.bases())[0].id, "one", quiet)
        await clear(it.site)
        assert [clone.name for clone in await it.site.storage.clones()] == ["one"]
        assert not intent.exists()

    run(tmp_path, story)


def test_a_name_that_is_given_away_amid_our_taking_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, theirs = os.link, CloneRecord("one", "theirs", 1, EPOCH)

    def link_late(draft: Path, place: Path) -> None:
        monkeypatch.undo()
        with clone_records.intent(tmp_path, theirs):
            clone_records.finish(tmp_path, theirs)
        link(draft, place)

    monkeypatch.setattr(os, "link", link_late)
    with (
        pytest.raises(RestoreError, match="there is a clone one already"),
        clone_records.intent(tmp_path, replace(theirs, target="ours")),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
    assert clone_records.written(tmp_path)["one"].record == theirs


def kill_one(tmp_path: Path, place: str) -> None:
    """Kill the process that holds the intent for good; its world lives on in a test, as a storage does."""
    words = "import sys; from tests.trigger.restore import test_clones; test_clones.restore_one(sys.argv[1])"
    killed = subprocess.run(
        [sys.executable, "-c", words, str(tmp_path)],
        env=os.environ | {"TRIGPOINT_FAILPOINT": f"{place}:kill"},
        cwd=Path(__file__).parents[3],
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL


def restore_one(folder: str) -> None:
    """What the process does that is killed on the way."""

    async def story(it: Bank) -> None:
        await restore(await two_points(it), it.site, progress=quiet, name="one")

    run(Path(folder), story)


@pytest.mark.parametrize("name", ["", "-a", "A", "a/b", "..", "a" * 41, "ä", "a b", "a\n"])
def test_a_clone_gets_no_name_that_could_mean_something_else(name: str) -> None:
    with pytest.raises(RestoreError, match="cannot be called"):
        clone_name(name)


def test_a_torn_record_is_no_record(tmp_path: Path) -> None:
    record = CloneRecord("one", "commit 1", 1, EPOCH, notes=("slots gone",))
    with clone_records.intent(tmp_path, record):
        clone_records.finish(tmp_path, record)
    assert clone_records.written(tmp_path)["one"].record == record
    text = (tmp_path / "one.json").read_text()
    for cut in range(len(text) - 1):
        (tmp_path / "one.json").write_text(text[:cut])
        assert not clone_records.written(tmp_path)
    (tmp_path / "one.json").write_text(json.dumps({"name": "one"}))
    assert not clone_records.written(tmp_path)
