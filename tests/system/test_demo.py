"""The demo as a stranger runs it: it proves what it says, and leaves nothing behind however it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from connectors.databases.postgres.programs import as_owner, copy_programs, find_programs, server_owner
from tests.fixtures.volumes import plain_folder
from trigger.cli import json_reference

pytestmark = [pytest.mark.server, pytest.mark.slow]

COMMAND = [sys.executable, "-m", "trigger", "demo", "--seconds=3"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with plain_folder() as outer:
        yield outer / "demo"


def demo(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `trigpoint demo` to its end."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def left_behind(folder: Path) -> list[str]:
    """Give what is still there of a demo: files, mounts, processes that work in its folder or were started for it."""
    found = [str(folder)] if folder.exists() else []
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = f"{(process / 'cwd').readlink()} {(process / 'cmdline').read_bytes().decode(errors='replace')}"
        except OSError:
            continue
        if str(folder) in words:
            found.append(f"{process.name}: {words}")
    return found


@pytest.mark.volume
def test_the_demo_proves_its_restore_and_leaves_nothing_behind(folder: Path) -> None:
    told = json.loads(demo("--json", "--storage", "btrfs", "--folder", folder).stdout)
    assert list(told) == list(json_reference.DEMO)
    assert told["proven"]
    assert len(told["checks"]) == 8
    assert all(check["held"] for check in told["checks"])
    assert told["storage"] == "btrfs"
    assert told["points"] >= 2
    assert told["commits"] > 50
    assert left_behind(folder) == []


def test_what_people_read_tells_the_whole_way(folder: Path) -> None:
    words = demo("--plain", "--storage", "directory", "--folder", folder).stdout
    for part in (
        "Trigpoint protects it",
        "point 1 for the start",
        "The accident",
        "--before-xid",
        "✔ every balance is back",
    ):
        assert part in words
    assert re.search(
        r"point \d+ for xid \d+, holds \d+.*: wait [\d.]+, flush [\d.]+, snapshot [\d.]+, tag [\d.]+ = ", words
    )
    assert re.search(r"commit to seal +p50 [\d.]+ ms, p99 [\d.]+ ms", words)
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    ("storage", "number", "code"),
    [
        pytest.param("btrfs", signal.SIGINT, 130, marks=pytest.mark.volume),
        ("directory", signal.SIGTERM, 143),
    ],
)
def test_an_interrupted_demo_leaves_nothing_behind(
    storage: str, number: signal.Signals, code: int, folder: Path
) -> None:
    arguments = [*COMMAND, "--plain", f"--storage={storage}", f"--folder={folder}"]
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509 - whoever runs us may ignore it
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "A bank at work" in line:
                process.send_signal(number)
        assert process.wait(100) == code
    assert left_behind(folder) == []


def test_a_kept_demo_can_be_played_with_and_ended(folder: Path) -> None:
    told = json.loads(demo("--json", "--keep", "--folder", folder).stdout)
    try:
        assert trigpoint(told, "status", "--json")["last_point"] >= 1
        assert len(trigpoint(told, "list", "--json")) >= 1
        assert trigpoint(told, "point", "--json")["state"] == "sealed"
        again = trigpoint(told, "restore", f"--before-xid={told['accident']['xid']}", "--json")
        assert again["target"] == told["restore"]["target"]
        assert len(trigpoint(told, "clones", "list", "--json")) == 2
    finally:
        demo("--stop", "--folder", folder)
    assert left_behind(folder) == []


@pytest.mark.parametrize("name", ["de mo", "d'é & 50%"])
def test_a_demo_runs_in_a_folder_of_any_name(name: str, folder: Path) -> None:
    folder = folder.parent / name
    told = json.loads(demo("--json", "--keep", "--seconds", "3", "--storage", "directory", "--folder", folder).stdout)
    try:
        assert told["proven"]
        assert trigpoint(told, "status", "--json")["last_point"] >= 1
    finally:
        demo("--stop", "--folder", folder)
    assert left_behind(folder) == []


@pytest.mark.parametrize("sign", [",", "$", '"', "`", "\\"])
def test_a_folder_in_which_postgresql_cannot_be_started_is_refused(sign: str, folder: Path) -> None:
    folder = folder.parent / f"de{sign}mo"
    done = demo("--folder", folder, check=False)
    assert (done.returncode, folder.exists()) == (2, False)
    assert f"PostgreSQL cannot be started in {folder}" in done.stderr.replace("\\\\", "\\")


def trigpoint(told: dict[str, Any], *arguments: str) -> Any:
    """Give the answer of one command on the configuration that a kept demo left."""
    done = subprocess.run(
        [sys.executable, "-m", "trigger", "--config", told["config"], *arguments],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("major", [16, 18])
def test_programs_run_where_they_were_copied_to(major: int, folder: Path) -> None:
    """As root the server's own user may not reach the environment in which the wheel is installed."""
    copy = copy_programs(find_programs(major), folder)
    assert copy.folder.is_relative_to(folder)
    for program in ("postgres", "initdb", "pg_ctl", "psql"):  # of which some need the wheel's own libpq
        done = subprocess.run(
            [copy.path(program), "--version"], capture_output=True, text=True, **as_owner(server_owner())
        )
        assert f"(PostgreSQL) {major}" in done.stdout, done.stderr


def test_a_folder_that_is_no_demo_is_neither_taken_nor_removed(folder: Path) -> None:
    folder.mkdir()
    (folder / "trigpoint.toml").write_text("mine")
    for arguments in (["--folder", str(folder)], ["--stop", "--folder", str(folder)], ["--stop"]):
        began = time.monotonic()
        assert demo(*arguments, check=False).returncode == 2
        assert time.monotonic() - began < 20
    assert (folder / "trigpoint.toml").read_text() == "mine"
