"""The socket between the command line and the service: one request, one answer, whatever comes in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from trigger.errors import ConfigError, StorageError, TrigpointError
from trigger.service import service
from trigger.service.control import NotRunningError, ask, holder, only_one, serve, socket_path


async def echo(request: dict[str, Any]) -> dict[str, Any]:
    match request.get("do"):
        case "refuse":
            raise StorageError("no room", hint="make some")
        case "sleep":
            await asyncio.sleep(60)
    return {"got": request}


@contextlib.asynccontextmanager
async def serving(
    folder: Path, answer: Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]] = echo
) -> AsyncIterator[None]:
    task = asyncio.ensure_future(serve(folder, answer))
    try:
        async with asyncio.timeout(5):
            while not socket_path(folder).exists():  # noqa: ASYNC110 - a file that a task makes
                await asyncio.sleep(0.005)
        yield
        assert not task.done(), "the server has ended"
    finally:
        task.cancel()
        await asyncio.wait([task])


def test_a_request_gets_its_answer_and_many_at_once_get_theirs(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path):
            answers = await asyncio.gather(*(ask(tmp_path, {"do": "echo", "n": n}, 5) for n in range(20)))
            assert [answer["got"]["n"] for answer in answers] == list(range(20))

    asyncio.run(main())


def test_a_refusal_keeps_its_words_its_hint_and_its_exit_code(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path):
            with pytest.raises(TrigpointError, match="no room") as refusal:
                await ask(tmp_path, {"do": "refuse"}, 5)
            assert (refusal.value.hint, refusal.value.exit_code) == ("make some", StorageError.exit_code)

    asyncio.run(main())


async def broken_disk(request: dict[str, Any]) -> dict[str, Any]:
    match request.get("do"):
        case "expire":
            raise PermissionError(errno.EPERM, "Operation not permitted", "/journal/000000010000000000000007")
        case "wait":
            raise TimeoutError
    return {"got": request}


def test_an_error_of_the_operating_system_is_an_answer_with_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(tmp_path, broken_disk):
            for do, words in (("expire", "Operation not permitted: '/journal/0"), ("wait", "TimeoutError")):
                with pytest.raises(TrigpointError, match=words) as refusal:
                    await ask(tmp_path, {"do": do}, 5)
                assert refusal.value.exit_code == 1
                assert not isinstance(refusal.value, NotRunningError)
            assert (await ask(tmp_path, {"do": "echo"}, 5))["got"] == {"do": "echo"}

    with caplog.at_level(logging.WARNING, "trigger.service.control"):
        asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "expire was asked for and not done: [Errno 1] Operation not permitted" in caplog.messages[0]


def test_a_caller_whose_connection_breaks_before_it_asked_does_no_harm(tmp_path: Path) -> None:
    broken: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
        async with serving(tmp_path):
            with patch.object(asyncio.StreamReader, "readline", side_effect=ConnectionResetError):
                _, writer = await asyncio.open_unix_connection(socket_path(tmp_path))
                writer.write(b"half")
                await asyncio.sleep(0.1)
                writer.close()
            assert (await ask(tmp_path, {"do": "echo"}, 5))["got"] == {"do": "echo"}

    asyncio.run(main())
    assert broken == []


def test_only_our_own_user_may_open_the_socket(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path):
            assert stat.S_IMODE(socket_path(tmp_path).stat().st_mode) == 0o600

    before = os.umask(0)
    try:
        asyncio.run(main())
    finally:
        os.umask(before)


def test_the_umask_of_the_process_is_left_alone_since_others_make_files_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path):
            pass

    with patch.object(os, "umask") as changed:
        asyncio.run(main())
    assert not changed.called


def test_where_no_service_runs_the_answer_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError):
        asyncio.run(ask(tmp_path, {}, 5))
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(socket_path(tmp_path)))
    stale.close()  # as after SIGKILL: the name is there, nobody listens
    with pytest.raises(NotRunningError):
        asyncio.run(ask(tmp_path, {}, 5))


def test_a_socket_that_a_killed_service_left_is_replaced_and_a_clean_end_leaves_none(tmp_path: Path) -> None:
    socket_path(tmp_path).touch()
    socket_path(tmp_path).unlink()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(socket_path(tmp_path)))
    stale.close()

    async def main() -> None:
        async with serving(tmp_path):
            async with asyncio.timeout(5):
                while True:
                    with contextlib.suppress(NotRunningError):
                        assert (await ask(tmp_path, {"do": "echo"}, 5))["got"] == {"do": "echo"}
                        break
                    await asyncio.sleep(0.005)
        assert not socket_path(tmp_path).exists()

    asyncio.run(main())


def test_an_answer_that_does_not_come_in_time_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path):
            with pytest.raises(TrigpointError, match=r"did not answer within 0\.1 s"):
                await ask(tmp_path, {"do": "sleep"}, 0.1)

    asyncio.run(main())


NOT_REQUESTS = {
    "nothing": b"",
    "half a line": b'{"do": ',
    "no JSON": b"GET / HTTP/1.1\r\n\r\n",
    "not UTF-8": b"\xff\xfe\n",
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "too long": b'{"do": "' + b"x" * (2 << 20) + b'"}\n',
    "too deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("sent", NOT_REQUESTS.values(), ids=NOT_REQUESTS)
def test_what_is_no_request_never_ends_the_server_and_never_hangs_the_caller(tmp_path: Path, sent: bytes) -> None:
    broken: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
        async with serving(tmp_path):
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_unix_connection(socket_path(tmp_path), limit=1 << 22)
                with contextlib.suppress(ConnectionError):
                    writer.write(sent)
                    writer.write_eof()
                    await writer.drain()
                with contextlib.suppress(ConnectionError):
                    answer = await reader.read()
                    assert not answer or "error" in json.loads(answer)
                writer.close()
            assert (await ask(tmp_path, {"do": "echo"}, 5))["got"] == {"do": "echo"}

    asyncio.run(main())
    assert broken == []


def test_a_caller_that_goes_away_does_no_harm(tmp_path: Path) -> None:
    broken: list[dict[str, Any]] = []

    async def slowly(request: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"big": "x" * 500_000, "got": request}

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
        async with serving(tmp_path, slowly):
            for _ in range(5):
                _, writer = await asyncio.open_unix_connection(socket_path(tmp_path))
                writer.write(b'{"do": "echo"}\n')
                writer.close()
            await asyncio.sleep(0.2)
            assert (await ask(tmp_path, {"do": "echo"}, 5))["got"] == {"do": "echo"}

    asyncio.run(main())
    assert broken == []


def test_a_service_that_ends_in_the_middle_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path):
            asking = asyncio.ensure_future(ask(tmp_path, {"do": "sleep"}, 0.5))
            await asyncio.sleep(0.1)
            assert not asking.done()
        with pytest.raises(TrigpointError, match=r"ended|did not answer"):
            await asking

    asyncio.run(main())


def test_one_state_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    before = os.umask(0o077)
    with only_one(folder):
        os.umask(before)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o711, "clones' servers pass through; nobody else may list it"
        assert stat.S_IMODE((folder / "lock").stat().st_mode) == 0o600
        with pytest.raises(ConfigError, match="another trigpoint works"), only_one(folder):
            pass
    with only_one(folder):
        pass


def test_who_holds_a_state_folder_is_the_service_where_it_listens_there(tmp_path: Path) -> None:
    async def main() -> None:
        with only_one(tmp_path):
            assert holder(tmp_path)[0] == f"another trigpoint works in {tmp_path}"
            async with serving(tmp_path):
                words, remedy = await asyncio.to_thread(holder, tmp_path)
                assert words == f"the service works in {tmp_path} (process {os.getpid()})"
                assert "stop it first" in remedy

    asyncio.run(main())


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        lock = only_one(tmp_path)
        lock.__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    with only_one(tmp_path):
        pass


def test_a_note_is_cut_alike_with_and_without_a_service() -> None:
    notes: list[str] = []

    async def noted(_: object, note: str) -> str:
        notes.append(note)
        return note

    async def act() -> None:
        @contextlib.asynccontextmanager
        async def alone(_: object, **_more: object) -> AsyncIterator[object]:
            yield None

        options: Any = None
        running: Any = SimpleNamespace(point=lambda note: noted(None, note))
        request = {"do": "point", "note": "x" * 2000}
        with patch.object(service, "alone", alone), patch.object(service, "_take_one", noted):
            await service.answer_alone(options, request)
        await service.Service.answer(running, request)

    asyncio.run(act())
    assert notes == ["x" * service.NOTE_CHARACTERS] * 2
