"""The text of a server, whatever its encoding: never refused for what it holds.

What cannot be decoded is written as `\\xf6`, so that names that differ stay different; that is so of every byte beyond
ASCII where Python has no such codec (EUC_TW, MULE_INTERNAL).

What the whole cluster shares (names of databases and roles) has no encoding: each name is the bytes of whichever
session made it. So these are told and taken as UTF-8 wherever they are read, and what is none of it is written so too;
a name that holds such an escape itself has its backslash written as `\\x5c`, so that every name leads back to its
bytes. Paths are what the filesystem has (`os.fsdecode`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from functools import lru_cache

_CODECS = {
    "UTF8": "utf-8",
    "SQL_ASCII": "utf-8",  # it says nothing of its bytes; most of them are this
    "EUC_CN": "gb2312",
    "EUC_JP": "euc_jp",
    "EUC_JIS_2004": "euc_jis_2004",
    "EUC_KR": "euc_kr",
    "KOI8R": "koi8-r",
    "KOI8U": "koi8-u",
    "WIN866": "cp866",
    "WIN874": "cp874",
    **{f"WIN{page}": f"cp{page}" for page in range(1250, 1259)},
    **{f"ISO_8859_{part}": f"iso8859-{part}" for part in range(5, 9)},
    **{f"LATIN{number}": f"iso8859-{part}" for number, part in enumerate((1, 2, 3, 4, 9, 10, 13, 14, 15, 16), 1)},
}
"""Python's codec by the name of a server's encoding (PostgreSQL's documentation, "Character Set Support")."""
_WITHOUT_CODEC = "ascii"
_LIKE_ESCAPES = re.compile(rb"\\(?=x(?:[89a-f][0-9a-f]|5c))")
_ESCAPES = re.compile(rb"\\x([89a-f][0-9a-f]|5c)")

Decode = Callable[..., str]
"""From bytes of a server to text; with `cut=True` they may end amid a character, which is then left out."""


@lru_cache(64)
def decoding(server_encoding: str) -> Decode:
    """Give what decodes text of a server with this encoding; it never raises."""
    codec = _CODECS.get(server_encoding, _WITHOUT_CODEC)
    incremental = codecs.getincrementaldecoder(codec)

    def decode(content: bytes, *, cut: bool = False) -> str:
        if cut:
            return incremental("backslashreplace").decode(content, False)
        return content.decode(codec, "backslashreplace")

    return decode


def encoded(text: str, server_encoding: str) -> bytes:
    """Give text as a server with this encoding keeps it; raises `UnicodeEncodeError` for what it has no way to say."""
    return text.encode(_CODECS.get(server_encoding, _WITHOUT_CODEC))


def readable(server_encoding: str) -> bool:
    """Whether text beyond ASCII of a server with this encoding can be read as the characters that it means."""
    return server_encoding in _CODECS


def shared_text(name: bytes) -> str:
    """Give the name of a database or role as we say it, from the server's bytes; never refused."""
    return _LIKE_ESCAPES.sub(rb"\\x5c", name).decode(errors="backslashreplace")


def shared_bytes(name: str) -> bytes:
    """Give the server's bytes of the name of a database or role as we say it."""
    return _ESCAPES.sub(lambda escape: bytes.fromhex(escape[1].decode()), name.encode(errors="surrogateescape"))
