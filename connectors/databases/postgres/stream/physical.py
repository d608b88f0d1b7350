"""A few bytes of the log as the server has them, by physical replication, which needs no more than REPLICATION."""

from __future__ import annotations

import asyncio

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.stream.copyboth import CopyBoth, StreamRefusedError
from trigger.errors import SourceError

_DATA = ord("w")
_HEADER_BYTES = 25  # the type, then where the data begin, where the log ends, and the time, 8 bytes each
_GONE = ("58P01", "XX000")
"""What a server says of a segment that it has removed (undefined file), and of a place that a timeline never had (which
has no code of its own). Its words are in the language of the server."""


async def read_log(dsn: str, timeline: int, at: int, count: int, deadline_seconds: float) -> bytes | None:
    """Give `count` bytes of a timeline's log from `at` on, all flushed; None where the server has not got them.

    Raises:
        SourceError: no connection, refused, or no answer in time.
    """
    stream = await CopyBoth.connect(dsn, deadline_seconds)
    found = bytearray()

    def take(message: memoryview) -> None:
        if message[0] == _DATA:
            found.extend(message[_HEADER_BYTES:])

    try:
        async with asyncio.timeout(deadline_seconds):
            await stream.require_primary()
        await stream.start(f"START_REPLICATION PHYSICAL {Lsn(at)} TIMELINE {timeline:d}", deadline_seconds)
        deadline = asyncio.get_running_loop().time() + deadline_seconds
        while len(found) < count and (left := deadline - asyncio.get_running_loop().time()) > 0:
            if not stream.drain(take, 100) and not await stream.readable(left):
                break
    except StreamRefusedError as error:
        if error.sqlstate in _GONE:
            return None
        if len(found) < count:  # a timeline that was left is sent up to its end, and then the server hangs up
            raise
    except TimeoutError:
        raise SourceError(f"the server did not answer within {deadline_seconds:g} s") from None
    finally:
        await stream.close()
    return bytes(found[:count]) if len(found) >= count else None
