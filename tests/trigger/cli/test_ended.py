"""What is said of a command that a signal ends: what became of what it began, and no more than is known."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from trigger.cli.connected import in_order
from trigger.restore.clones import to_its_end
from trigger.service.control import ask, serve, socket_path

Work = Coroutine[object, object, None]


def ended(capsys: pytest.CaptureFixture[str], work: Callable[[], Work]) -> str:
    """Give what is said of work that SIGTERM ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as raised:
            in_order(work())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert raised.value.code == 128 + signal.SIGTERM
    return capsys.readouterr().err.strip().removeprefix("error: ")


async def ending() -> None:
    """Send the signal, and wait for what it does."""
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(10)


def test_what_began_nothing_that_had_to_be_tidied_up_says_so_by_saying_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(capsys, ending) == "ended by SIGTERM"


def test_an_error_while_tidying_up_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    async def failing() -> None:
        try:
            await ending()
        finally:
            raise OSError(28, "No space left on device", "/clone")

    assert ended(capsys, failing) == "ended by SIGTERM; [Errno 28] No space left on device: '/clone'"


@pytest.mark.parametrize("fails", [False, True])
def test_what_came_to_its_end_is_told_however_often_it_was_signalled(
    capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    async def removal() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.01)
        if fails:
            raise OSError(5, "Input/output error")

    async def working() -> None:
        try:
            await ending()
        except asyncio.CancelledError as error:
            error.add_note("the first is undone")
            await to_its_end(removal(), "the second is removed")
            raise

    told = "[Errno 5] Input/output error" if fails else "the second is removed"
    assert ended(capsys, working) == f"ended by SIGTERM; the first is undone; {told}"


def test_what_the_service_was_asked_for_goes_on_there_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    async def answer(request: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        done.append(request["do"])
        return {}

    async def asking() -> None:
        serving = asyncio.create_task(serve(tmp_path, answer))
        try:
            while not socket_path(tmp_path).exists():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.001)
            await ask(tmp_path, {"do": "point"}, 10)
        finally:
            await asyncio.sleep(0.1)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    said = ended(capsys, asking)
    assert said.startswith("ended by SIGTERM; the service goes on with what it was asked for: see trigpoint")
    assert done == ["point"]
