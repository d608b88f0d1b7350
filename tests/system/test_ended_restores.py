"""A restore that is ended from outside leaves nothing behind: no server, no clone, no log; under any umask of ours."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]

RESTORE = (sys.executable, "-m", "trigger", "restore", "--to-latest", "--name", "ended")


@pytest.fixture(scope="module")
def here() -> Iterator[Deployment]:
    with deployment(15, "directory") as made:
        made.cluster.sql("CREATE TABLE account AS SELECT n FROM generate_series(1, 100000) n")
        made.start()
        yield made


def wait_for_server(here: Deployment, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server of a clone has been started."""
    deadline = time.monotonic() + 60
    while not list((here.root / "snapshots" / "clones").glob("*/data/postmaster.pid")):
        assert process.poll() is None, "the restore ended before its server was seen"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def require_nothing_left(here: Deployment) -> None:
    assert here.ask("clones", "list") == []
    assert not list((here.root / "snapshots" / "clones").glob("*"))
    assert not list((here.state / "staging").glob("*"))
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert not (process / "cwd").readlink().is_relative_to(here.root / "snapshots")


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM,), 143),
        ((signal.SIGHUP,), 129),
        ((signal.SIGINT, signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT), 143),
    ],
)
def test_a_restore_that_is_ended_by_a_signal_leaves_nothing_behind(
    here: Deployment, signals: tuple[signal.Signals, ...], code: int
) -> None:
    process = subprocess.Popen(RESTORE, env=here._environment({}), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_server(here, process)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"ended by {signals[0].name}; what was begun of clone ended is removed" in said.decode()
    require_nothing_left(here)


def test_a_restore_whose_terminal_is_lost_leaves_nothing_behind(here: Deployment) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", *RESTORE], env=here._environment({}), stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    wait_for_server(here, process)
    os.close(master)
    assert process.wait(60) == 128 + signal.SIGHUP
    require_nothing_left(here)


def test_a_restore_that_was_told_to_outlive_its_terminal_does(here: Deployment) -> None:
    process = subprocess.Popen(
        ["nohup", *RESTORE], env=here._environment({}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_server(here, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert [clone["state"] for clone in here.ask("clones", "list")] == ["running"]
    here.trigpoint("clones", "drop", "--yes", "ended")
    require_nothing_left(here)


@pytest.mark.parametrize(
    ("storage", "mask"), [pytest.param("btrfs", "027", marks=pytest.mark.volume), ("directory", "077")]
)
def test_under_a_strict_umask_a_state_comes_back_and_a_point_is_verified(storage: str, mask: str) -> None:
    with deployment(15, storage) as made:
        made.state = made.state.parent / "deep" / "state"  # folders of ours above it, too
        made.configure()
        made.before = ("sh", "-c", f'umask {mask}; exec "$@"', "sh")
        made.cluster.sql("CREATE TABLE account AS SELECT n FROM generate_series(1, 1000) n")
        made.start()
        number = made.ask("point")["number"]
        assert made.ask("verify", str(number))["passed"]
        made.trigpoint("restore", "--to-point", str(number), "--name", "strict")
        assert [clone["state"] for clone in made.ask("clones", "list")] == ["running"]
