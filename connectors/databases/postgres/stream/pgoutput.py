"""Decode a pgoutput stream without I/O: the messages of COPY_BOTH in, committed transactions out.

Protocol versions 1 to 4, with streamed and two-phase transactions. A transaction is given when its Commit, Stream
Commit or Commit Prepared is read and never before: what was begun, streamed or prepared only is nobody's commit yet.

Rows are counted, not read. A row message costs one dictionary entry at most; its columns are never looked at. All
that the protocol says twice is compared (start of the commit record in Begin and Commit, end of it in Commit and in
the frame around it, time, transaction ids, order of commits), and anything that does not fit is one `SourceError`
that no retry heals.

Formats: PostgreSQL's documentation, "Logical Replication Message Formats" and "Streaming Replication Protocol"; where
those leave a question open (who is named by a streamed message's xid, what the frame of a Commit carries) the answer
was read off PostgreSQL 15, 16 and 18 and is held by tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from struct import Struct
from struct import error as StructError  # noqa: N812 - the module's own name for it says nothing here
from typing import NamedTuple

from connectors.databases.postgres.encoding import Decode, decoding
from connectors.databases.postgres.stream.transactions import Counts, Transaction
from trigger.errors import SourceError
from trigger.model import Changes

MARKER_PREFIX = "trigpoint"
_MARKER_NAME = MARKER_PREFIX.encode() + b"\0"
MARKERS_LIMIT = 1_000
"""Markers kept of one transaction, so that no application can fill our memory; that there are more is told."""
MARKER_BYTES_LIMIT = 1_024
"""Bytes kept of one marker; likewise."""
HELD_BYTES_LIMIT = 64 << 20
"""What is kept of all transactions that are being streamed; with more they are read again, one after the other."""
RELATIONS_LIMIT = 100_000
"""How many tables may be described on one connection: they take 18 MB, and what makes and drops tables never ends."""

_NAMED_TABLES_LIMIT = 20_000
"""Tables in all the changes that are kept named, because the next commit often changes the same."""
_CHANGES_LIMIT = 1_024
_POSTGRES_EPOCH_US = 946_684_800_000_000
_XLOG_DATA, _KEEPALIVE = ord("w"), ord("k")
_HEADER = 25  # of XLogData: kind, start, end, clock of the server
_BODY = _HEADER + 1  # behind pgoutput's own kind of message

_FRAME = Struct("!QQ").unpack_from
_ALIVE = Struct("!cQqB")
_RELATION = Struct("!I").unpack_from
_XID_RELATION = Struct("!II").unpack_from
_BEGIN = Struct("!QqI")
_COMMIT = Struct("!BQQq")
_STREAM_START = Struct("!IB")
_STREAM_COMMIT = Struct("!IBQQq")
_STREAM_ABORT = Struct("!II")
_STREAM_ABORT_PARALLEL = Struct("!IIQq")
_BEGIN_PREPARE = Struct("!QQqI")
_PREPARE = Struct("!BQQqI")
_ROLLBACK_PREPARED = Struct("!BQQqqI")
_TRUNCATE = Struct("!IB").unpack_from
_MESSAGE = Struct("!BQ").unpack_from
_ORIGIN_LSN_BYTES = 8
_USUAL_NAME_BYTES = 256

_INSERT, _UPDATE, _DELETE, _TRUNCATED = range(4)
_ROWS = {ord("I"): _INSERT, ord("U"): _UPDATE, ord("D"): _DELETE}

_UTF8 = decoding("UTF8")


class Committed(NamedTuple):
    """One committed transaction as the stream tells it."""

    xid: int
    """The low 32 bits of the transaction id."""
    start: int
    """Where its commit record begins."""
    end: int
    """Where its commit record ends."""
    time_us: int
    """Commit time in microseconds since 1970."""
    tables: Mapping[str, Changes]
    markers: tuple[str, ...]
    origin: str
    markers_cut: bool
    """Whether there are more markers, or longer ones, than are kept."""


class UnstreamableError(SourceError):
    """A transaction cannot be told exactly while it is streamed; read again without streaming, it can."""


class Decoder:
    """Turns the messages of one replication connection into committed transactions; a new connection, a new one.

    Args:
        parallel: whether the stream was asked for with `streaming 'parallel'`, in which a Stream Abort is longer.
        decode: gives the text of names and markers, which come in the server's own encoding.
        held_bytes_limit: what may be kept of all transactions that are being streamed.

    Attributes:
        commits: what was committed, in log order; the caller takes them out.
        through: every commit that ends at or before here has been put into `commits`.
        reply_wanted: the server asked for a sign of life; the caller answers and clears it.
        relations_seen: how many Relation messages were read; moves when a table is new or was altered.
    """

    def __init__(
        self, *, parallel: bool = False, decode: Decode = _UTF8, held_bytes_limit: int = HELD_BYTES_LIMIT
    ) -> None:
        self._decode = decode
        self._held_bytes_limit = held_bytes_limit
        self.commits: list[Committed] = []
        self.through = 0
        self.reply_wanted = False
        self.relations_seen = 0
        self._abort = _STREAM_ABORT_PARALLEL if parallel else _STREAM_ABORT
        self._relations: dict[int, str] = {}
        self._named: dict[tuple[tuple[int, int], ...], dict[str, Changes]] = {}
        self._named_tables = 0
        self._streams: dict[int, Transaction] = {}
        self._prepared: dict[bytes, Transaction] = {}
        self._open: Transaction | None = None
        self._ends_with = ""  # the kind of message that ends what is open
        self._in_stream = False
        self._counts: Counts | None = None  # of the (sub)transaction that rows belong to now, since they do
        self._subxid = 0
        self._last_end = 0
        self._origin_name = b"", ""
        self._handlers: dict[int, Callable[[memoryview], None]] = {
            ord("B"): self._begin,
            ord("C"): self._commit,
            ord("R"): self._relation,
            ord("Y"): self._inside,
            ord("O"): self._origin,
            ord("T"): self._truncate,
            ord("M"): self._message,
            ord("S"): self._stream_start,
            ord("E"): self._stream_stop,
            ord("c"): self._stream_commit,
            ord("A"): self._stream_abort,
            ord("b"): self._begin_prepare,
            ord("P"): self._prepare,
            ord("K"): self._commit_prepared,
            ord("r"): self._rollback_prepared,
            ord("p"): self._stream_prepare,
        }

    def feed(self, message: memoryview) -> None:
        """Take in one CopyData message: XLogData with one pgoutput message in it, or a keepalive.

        Raises:
            SourceError: it cannot be understood (not retryable); the decoder must not be used any further.
            UnstreamableError: all is well, but the stream must be opened anew with `streaming` off (retryable).
        """
        try:
            if message[0] != _XLOG_DATA:
                self._keepalive(message)
                return
            kind = message[_HEADER]
            operation = _ROWS.get(kind)
            if operation is None:
                self._handlers[kind](message)
                return
            if self._in_stream:
                xid, relation = _XID_RELATION(message, _BODY)
                counts = self._counts if xid == self._subxid else self._switch(xid)
            else:
                (relation,) = _RELATION(message, _BODY)
                counts = self._counts
            key = relation << 2 | operation
            counts[key] = counts.get(key, 0) + 1  # type: ignore[index,union-attr]  # None: a row outside, see below
        except SourceError:
            raise
        except (LookupError, StructError, ValueError, TypeError, AttributeError) as error:
            raise _damaged(f"message {bytes(message[:64])!r}: {error!r}") from error

    # ---- frames and helpers of all messages

    def _keepalive(self, message: memoryview) -> None:
        if message[0] != _KEEPALIVE or len(message) != _ALIVE.size:
            raise _damaged(f"a frame of kind {message[0]} and {len(message)} bytes")
        _, end, _, reply = _ALIVE.unpack(message)
        self.reply_wanted |= bool(reply)
        if self._open is None or self._in_stream:  # between Begin and Commit a commit is on its way
            self.through = max(self.through, end)

    def _inside(self, _message: memoryview) -> None:
        """For messages that say nothing we need, but may only stand inside a transaction."""
        self._transaction()

    def _transaction(self) -> Transaction:
        if self._open is None:
            raise _damaged("a message that belongs into a transaction stands outside")
        return self._open

    def _idle(self) -> None:
        if self._open is not None:
            raise _damaged(f"transaction {self._open.xid} was not ended")

    def _enter(self, transaction: Transaction, ends_with: str) -> None:
        self._open, self._ends_with, self._in_stream = transaction, ends_with, ends_with == "E"
        self._subxid, self._counts = transaction.xid, transaction.counts

    def _leave(self, kind: str) -> Transaction:
        transaction = self._transaction()
        if kind != self._ends_with:
            raise _damaged(f"transaction {transaction.xid} ends with {kind} instead of {self._ends_with}")
        self._put_down(transaction)
        self._open, self._ends_with, self._in_stream, self._counts, self._subxid = None, "", False, None, 0
        return transaction

    def _switch(self, xid: int) -> Counts:
        """Count for another (sub)transaction of the streamed transaction from now on."""
        transaction = self._transaction()
        self._put_down(transaction)
        self._subxid = xid
        self._counts = counts = transaction.counts if xid == transaction.xid else {}
        return counts

    def _put_down(self, transaction: Transaction) -> None:
        """Add what was counted for a subtransaction to the whole."""
        if self._subxid != transaction.xid and self._counts:
            transaction.add(self._subxid, self._counts)

    def _bear(self) -> None:
        """Raise where more is held of streamed transactions than our memory is to bear."""
        streams = self._streams.values()
        if sum(one.held_bytes for one in streams) <= self._held_bytes_limit:
            return
        for one in streams:
            one.subtransactions.shrink()
        if (held := sum(one.held_bytes for one in streams)) > self._held_bytes_limit:
            raise UnstreamableError(f"{len(self._streams)} streamed transactions would take {held} bytes of memory")

    def _body_at(self, message: memoryview) -> int:
        """Where the content of a message begins that carries a transaction id if it is streamed."""
        if not self._in_stream:
            return _BODY
        (xid,) = _RELATION(message, _BODY)
        if xid != self._subxid:
            self._switch(xid)
        return _BODY + 4

    def _give(self, transaction: Transaction, message: memoryview, start: int, end: int, time: int) -> None:
        """Put a transaction into `commits`, now that its commit record was read."""
        framed, _ = _FRAME(message, 1)
        if not (start < end == framed and end > self._last_end and start >= self._last_end):
            raise _damaged(f"a commit record from {start:X} to {end:X}, framed {framed:X}, after {self._last_end:X}")
        self._last_end = end
        self.through = max(self.through, end)
        self.commits.append(
            Committed(
                transaction.xid,
                start,
                end,
                time + _POSTGRES_EPOCH_US,
                self._name(transaction.counts),
                tuple(transaction.markers),
                transaction.origin,
                transaction.markers_cut,
            )
        )

    def _name(self, counts: Counts) -> dict[str, Changes]:
        """Give the changes by the tables' names; commits that changed the same share one (nobody changes it)."""
        alike = tuple(counts.items())
        named = self._named.get(alike)
        if named is None:
            if self._named_tables + len(alike) > _NAMED_TABLES_LIMIT:
                self._forget_named()
            named = self._named[alike] = self._sum(counts)
            self._named_tables += len(alike)
        return named

    @property
    def is_full(self) -> bool:
        """Whether so many tables were described that the stream should be opened anew, which forgets them.

        The server describes a table once on a connection: none can be forgotten on its own. Not while a transaction is
        being streamed, all of which would come again.
        """
        return len(self._relations) > RELATIONS_LIMIT and not self._streams

    def _forget_named(self) -> None:
        self._named.clear()
        self._named_tables = 0

    def _sum(self, counts: Counts) -> dict[str, Changes]:
        sums: dict[str, list[int]] = {}
        relations = self._relations
        for key, count in counts.items():
            name = relations.get(key >> 2)
            if name is None:
                raise _damaged(f"changes of relation {key >> 2}, which was never described")
            if name not in sums:
                sums[name] = [0, 0, 0, 0]
            sums[name][key & 3] += count
        return {name: _changes(*four) for name, four in sums.items()}

    # ---- messages inside a transaction

    def _relation(self, message: memoryview) -> None:
        self._transaction()
        at = self._body_at(message)
        (relation,) = _RELATION(message, at)
        schema, at = _name(message, at + 4)
        table, at = _name(message, at)
        if not table or len(message) < at + 3:  # replica identity and number of columns follow
            raise _damaged(f"a description of relation {relation} that ends early")
        self._relations[relation] = f"{self._decode(schema or b'pg_catalog')}.{self._decode(table)}"
        self.relations_seen += 1
        self._forget_named()

    def _origin(self, message: memoryview) -> None:
        name, end = _name(message, _BODY + _ORIGIN_LSN_BYTES)
        _ends(message, end)
        if name != self._origin_name[0]:  # commits of one origin share its name, which may be long
            self._origin_name = name, self._decode(name)
        self._transaction().origin = self._origin_name[1]

    def _truncate(self, message: memoryview) -> None:
        self._transaction()
        at = self._body_at(message)
        number, _options = _TRUNCATE(message, at)
        _ends(message, at + 5 + 4 * number)
        counts = self._counts
        assert counts is not None
        for (relation,) in Struct("!I").iter_unpack(message[at + 5 :]):
            key = relation << 2 | _TRUNCATED
            counts[key] = counts.get(key, 0) + 1

    def _message(self, message: memoryview) -> None:
        """Keep a marker; of a message that is not one nothing is looked at, since anybody may write any."""
        at = _BODY + 4 if self._in_stream else _BODY
        transactional, _lsn = _MESSAGE(message, at)
        if transactional not in {0, 1}:
            raise _damaged(f"a logical message with flags {transactional}")
        if not transactional:
            return
        transaction, at = self._transaction(), at + 9
        if message[at : at + len(_MARKER_NAME)] != _MARKER_NAME:
            return
        at += len(_MARKER_NAME)
        (length,) = _RELATION(message, at)
        _ends(message, at + 4 + length)
        is_kept, is_cut = len(transaction.markers) < MARKERS_LIMIT, length > MARKER_BYTES_LIMIT
        transaction.markers_cut |= is_cut or not is_kept
        if is_kept:
            content = bytes(message[at + 4 : at + 4 + MARKER_BYTES_LIMIT])
            transaction.mark(self._decode(content, cut=is_cut))

    # ---- whole transactions

    def _begin(self, message: memoryview) -> None:
        self._idle()
        start, time, xid = _fixed(_BEGIN, message)
        self._enter(Transaction(xid, start, time), "C")

    def _commit(self, message: memoryview) -> None:
        flags, start, end, time = _fixed(_COMMIT, message)
        transaction = self._leave("C")
        if flags or (start, time) != (transaction.start, transaction.time):
            raise _damaged(f"the commit of transaction {transaction.xid} does not fit its begin")
        self._give(transaction, message, start, end, time)

    # ---- transactions streamed while they run

    def _stream_start(self, message: memoryview) -> None:
        self._idle()
        xid, first = _fixed(_STREAM_START, message)
        if first not in {0, 1} or bool(first) == (xid in self._streams):
            raise _damaged(f"a part of streamed transaction {xid} out of order")
        transaction = self._streams.setdefault(xid, Transaction(xid))
        self._enter(transaction, "E")

    def _stream_stop(self, message: memoryview) -> None:
        _ends(message, _BODY)
        self._leave("E")
        self._bear()

    def _stream_commit(self, message: memoryview) -> None:
        self._idle()
        xid, flags, start, end, time = _fixed(_STREAM_COMMIT, message)
        if flags:
            raise _damaged(f"a stream commit with flags {flags}")
        self._give(self._streams.pop(xid), message, start, end, time)

    def _stream_abort(self, message: memoryview) -> None:
        self._idle()
        xid, subxid, *_when = _fixed(self._abort, message)
        transaction = self._streams[xid]
        if subxid == xid:
            del self._streams[xid]
            return
        transaction.abort(subxid)
        if transaction.markers:  # a streamed message names the whole transaction, never its subtransaction
            raise UnstreamableError(f"a savepoint of streamed transaction {xid}, which has markers, was rolled back")

    # ---- transactions in two phases

    def _begin_prepare(self, message: memoryview) -> None:
        self._idle()
        (start, _end, time, xid), _gid = _with_gid(_BEGIN_PREPARE, message)
        self._enter(Transaction(xid, start, time), "P")

    def _prepare(self, message: memoryview) -> None:
        (flags, start, _end, time, xid), gid = _with_gid(_PREPARE, message)
        transaction = self._leave("P")
        if flags or (start, time, xid) != (transaction.start, transaction.time, transaction.xid):
            raise _damaged(f"the prepare of transaction {transaction.xid} does not fit its begin")
        self._prepared[gid] = transaction

    def _stream_prepare(self, message: memoryview) -> None:
        self._idle()
        (flags, _start, _end, _time, xid), gid = _with_gid(_PREPARE, message)
        if flags:
            raise _damaged(f"a stream prepare with flags {flags}")
        self._prepared[gid] = transaction = self._streams.pop(xid)
        transaction.finish()

    def _commit_prepared(self, message: memoryview) -> None:
        """Its rows came with the prepare; where that was before this connection, they are not known."""
        self._idle()
        (flags, start, end, time, xid), gid = _with_gid(_PREPARE, message)
        transaction = self._prepared.pop(gid, None) or Transaction(xid)
        if flags or transaction.xid != xid:
            raise _damaged(f"commit prepared of {gid!r} names transaction {xid}, not {transaction.xid}")
        self._give(transaction, message, start, end, time)

    def _rollback_prepared(self, message: memoryview) -> None:
        self._idle()
        (flags, *_rest), gid = _with_gid(_ROLLBACK_PREPARED, message)
        if flags:
            raise _damaged(f"a rollback prepared with flags {flags}")
        self._prepared.pop(gid, None)


@lru_cache(_CHANGES_LIMIT)
def _changes(inserted: int, updated: int, deleted: int, truncated: int) -> Changes:
    """Give these counts; equal ones are one object as long as they are usual, since many commits may have to wait."""
    return Changes(inserted, updated, deleted, truncated)


def _damaged(what: str) -> SourceError:
    return SourceError(
        f"the replication stream cannot be understood: {what}",
        hint="another program may answer at that address, or the connection garbles data; report it with the message",
        retryable=False,
    )


def _fixed(layout: Struct, message: memoryview) -> tuple[int, ...]:
    """Unpack a message that consists of `layout` and nothing else."""
    _ends(message, _BODY + layout.size)
    return layout.unpack_from(message, _BODY)


def _with_gid(layout: Struct, message: memoryview) -> tuple[tuple[int, ...], bytes]:
    """Unpack a message that consists of `layout` and the name of a prepared transaction."""
    gid, end = _name(message, _BODY + layout.size)
    _ends(message, end)
    return layout.unpack_from(message, _BODY), gid


def _name(message: memoryview, at: int) -> tuple[bytes, int]:
    """Read a name, which ends with a zero byte, however long it is; gives it and where the next field begins."""
    tail = bytes(message[at : at + _USUAL_NAME_BYTES])
    length = tail.find(0)
    if length < 0:
        tail = bytes(message[at:])
        length = tail.find(0)
    if length < 0:
        raise _damaged("a name without an end")
    return tail[:length], at + length + 1


def _ends(message: memoryview, at: int) -> None:
    if len(message) != at:
        raise _damaged(f"a message of {len(message)} bytes that should have {at}")
