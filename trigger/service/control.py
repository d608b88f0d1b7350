"""How the command line talks to the running service: one JSON object each way over a socket in the state folder.

Whoever may open the socket (the service's own user, and root) may ask for a point; there is no other authority here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from trigger.errors import ConfigError, TrigpointError
from trigger.host import make_passage
from trigger.lock import lock
from trigger.trusted import NotOursError, naming

log = logging.getLogger(__name__)

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

LOCK = "lock"
"""The file in the state folder that whoever works there alone holds."""
_LINE_LIMIT = 1 << 20
_ANSWER_LIMIT = 64 << 20
_REQUEST_SECONDS = 10.0
_CONNECT_SECONDS = 1.0
_PEER = struct.Struct("3i")
"""Process, user and group of who listens (`struct ucred`, unix(7))."""


class NotRunningError(TrigpointError):
    """No service answers in this state folder."""

    exit_code = 1


def socket_path(state_folder: Path) -> Path:
    """Where the service of `state_folder` listens."""
    return state_folder / "control.sock"


@contextlib.contextmanager
def if_free(state_folder: Path) -> Iterator[bool]:
    """Hold the state folder if no other process does, and it is there and ours; gives whether it is held."""
    try:
        held = lock(state_folder / LOCK) if state_folder.is_dir() else None
    except (NotOursError, OSError):
        held = None
    try:
        yield held is not None
    finally:
        if held is not None:
            os.close(held)


@contextlib.contextmanager
def only_one(state_folder: Path, *, passing: str = "") -> Iterator[None]:
    """Hold the state folder for one process; raises `ConfigError` where another holds it, or could change it.

    `passing` is what works there, if nothing does for good. The lock is the kernel's own and ends with the process,
    however it ends.
    """
    make_passage(state_folder)
    try:
        held = lock(state_folder / LOCK)
    except NotOursError as error:
        raise ConfigError(f"state_folder: {error.message}", hint=error.remedy) from error
    if held is None:
        wait = (f"{passing} works in {state_folder}", "wait until it has ended")
        words, remedy = wait if passing else holder(state_folder)
        raise ConfigError(words, hint=remedy)
    try:
        yield
    finally:
        os.close(held)


def holder(state_folder: Path) -> tuple[str, str]:
    """Give who holds a state folder, in words, and what to do: the service where it listens there, else a command."""
    try:
        with socket.socket(socket.AF_UNIX) as asking, _short(socket_path(state_folder)) as short:
            asking.settimeout(_CONNECT_SECONDS)
            asking.connect(short)
            (pid, _, _) = _PEER.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    except OSError:
        return f"another trigpoint works in {state_folder}", "wait until it has ended"
    return (
        f"the service works in {state_folder} (process {pid})",
        "stop it first, and start it again afterwards: one service protects one cluster",
    )


async def serve(state_folder: Path, answer: Answer) -> None:
    """Answer requests until cancelled; the socket is for our own user alone."""
    path = socket_path(state_folder)
    path.unlink(missing_ok=True)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            reply = json.dumps(await _reply(reader, answer)).encode() + b"\n"
            with contextlib.suppress(OSError):  # the caller has gone
                writer.write(reply)
                await writer.drain()
        finally:
            writer.close()

    try:
        async with await asyncio.start_unix_server(talk, sock=_ours_alone(path), limit=_LINE_LIMIT) as server:
            await server.serve_forever()
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Give another name of a socket, by its folder's descriptor: one that the kernel takes has 107 bytes at most."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _ours_alone(path: Path) -> socket.socket:
    """Give a socket that is bound at `path` and that nobody else may open, from its first moment on.

    The umask is the whole process's, and other tasks make files meanwhile; the mode that a socket has before it is
    bound is the one that its file gets (`unix_bind_bsd` in the kernel's net/unix/af_unix.c).
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(made.fileno(), 0o600)
        with naming(path), _short(path) as short:
            made.bind(short)
    except BaseException:
        made.close()
        raise
    return made


async def _reply(reader: asyncio.StreamReader, answer: Answer) -> dict[str, Any]:
    """Give the answer to what comes from a caller; what is no request, or cannot be done, gets an error."""
    try:
        async with asyncio.timeout(_REQUEST_SECONDS):
            request = json.loads(await reader.readline())
    except (ValueError, RecursionError, OSError):
        request = None
    if not isinstance(request, dict):
        return {"error": "not a request", "hint": f"one JSON object on one line of at most {_LINE_LIMIT} bytes"}
    try:
        return await answer(request)
    except TrigpointError as error:
        return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    except OSError as error:
        words = str(error) or type(error).__name__
        log.warning("%s was asked for and not done: %s", request.get("do"), words)
        return {"error": words, "hint": "", "exit_code": TrigpointError.exit_code}


async def ask(state_folder: Path, request: dict[str, Any], deadline_seconds: float) -> dict[str, Any]:
    """Give the service's answer to `request`.

    Raises:
        NotRunningError: no service answers in `state_folder`.
        TrigpointError: the service refused, or did not answer in time.
    """
    path = socket_path(state_folder)
    try:
        async with asyncio.timeout(deadline_seconds):
            with _short(path) as short:
                reader, writer = await asyncio.open_unix_connection(short, limit=_ANSWER_LIMIT)
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                line = await reader.readline()
            except asyncio.CancelledError as error:
                error.add_note("the service goes on with what it was asked for: see trigpoint list")
                raise
            finally:
                writer.close()
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunningError(f"no service answers at {path}", hint="start it with `trigpoint run`") from None
    except PermissionError:
        raise ConfigError(f"not allowed to talk to the service at {path}", hint="run this as its user") from None
    except TimeoutError:
        raise TrigpointError(f"the service at {path} did not answer within {deadline_seconds:g} s") from None
    reply: dict[str, Any] = json.loads(line or b'{"error": "the service ended while it was asked"}')
    if "error" in reply:
        failure = TrigpointError(reply["error"], hint=reply.get("hint", ""))
        failure.exit_code = reply.get("exit_code", 1)  # type: ignore[misc]
        raise failure
    return reply
