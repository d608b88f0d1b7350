"""Whoever asks for the status gets it in time, whatever of the service's world does not answer."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from connectors.threads import Threads
from trigger.config.options import PointOptions
from trigger.protect.agenda import Agenda
from trigger.protect.qualify import Rules
from trigger.protect.window import Window
from trigger.service import service as module
from trigger.service.connect import SystemClock
from trigger.service.service import Service
from trigger.service.upkeep import Upkeep

PROMPT_SECONDS = 10.0


class Silent:
    """A part of the world whose disk does not answer: each call hangs in a thread, as drivers make them."""

    def __init__(self, dead: threading.Event) -> None:
        self._threads = Threads("silent")
        self._dead = dead

    async def _hang(self) -> None:
        await self._threads.run(lambda: self._dead.wait(60))

    totals = space = retained = durable = _hang


@pytest.mark.parametrize("silent", ["catalog", "storage", "database"])
def test_a_part_that_hangs_is_said_in_the_status_and_keeps_nobody_waiting(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASKING_SECONDS", 0.2)
    mended = threading.Event()

    async def answer() -> None:
        return None

    async def ask() -> dict[str, Any]:
        well = SimpleNamespace(totals=answer, space=answer, retained=answer, durable=answer)
        named: dict[str, Any] = dict.fromkeys(("catalog", "storage", "database"), well) | {silent: Silent(mended)}
        parts: Any = SimpleNamespace(options=SimpleNamespace(name="test"), **named)
        window, agenda = Window((), {}, Rules(()).judge), Agenda(PointOptions(), None)
        upkeep = Upkeep(parts, window, agenda, cast("Any", None))
        cluster: Any = SimpleNamespace(clock=SystemClock())
        return await Service(parts, cluster, window, agenda, upkeep, SystemClock().now()).status()

    began = time.monotonic()
    try:
        status = asyncio.run(ask())
    finally:
        mended.set()
    assert time.monotonic() - began < PROMPT_SECONDS
    assert f"the {silent} did not answer within 0.2 s" in status["troubles"]
