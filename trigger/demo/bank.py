"""A small bank on PostgreSQL: accounts, a ledger of transfers, clerks that all work at once, and the accident.

The bank keeps its own books, so that what a restore brings back is judged by the bank and not by us.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.errors import CheckViolation, DeadlockDetected, NoDataFound

DATABASE = "bank"
ACCOUNTS = 5_000
OPENING_CENTS = 100_000
CLERKS = 4
PAYROLL_EVERY_SECONDS = 1.5
PAYROLL_SIZE = 25
PAUSE_SECONDS = (0.002, 0.02)
"""How long a clerk rests between two transfers."""
CONNECT_SECONDS = 10

_SCHEMA = """
CREATE TABLE account (
    id      integer PRIMARY KEY,
    opening bigint  NOT NULL,
    balance bigint  NOT NULL CHECK (balance >= 0)
);
CREATE TABLE transfer (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payer  integer NOT NULL,
    payee  integer NOT NULL,
    amount bigint  NOT NULL,
    xid    xid8    NOT NULL DEFAULT pg_current_xact_id()
);
CREATE TABLE complaint (
    id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    about integer NOT NULL,
    words text    NOT NULL
);
CREATE FUNCTION change(whose integer, cents bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE account SET balance = balance + cents WHERE id = whose;
    IF NOT FOUND THEN RAISE no_data_found; END IF;
END $$;
CREATE FUNCTION pay(payer integer, payee integer, cents bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- the smaller number first, so that two transfers never wait for each other in a circle
    PERFORM change(least(payer, payee), CASE WHEN payer < payee THEN -cents ELSE cents END);
    PERFORM change(greatest(payer, payee), CASE WHEN payer < payee THEN cents ELSE -cents END);
    INSERT INTO transfer (payer, payee, amount) VALUES (payer, payee, cents);
END $$;
"""

_BY_LEDGER = """
SELECT id, (opening - coalesce(paid, 0) + coalesce(received, 0))::bigint
FROM account
LEFT JOIN (SELECT payer, sum(amount) AS paid FROM transfer GROUP BY payer) AS payers ON payer = id
LEFT JOIN (SELECT payee, sum(amount) AS received FROM transfer GROUP BY payee) AS payees ON payee = id
"""


@dataclass(frozen=True, slots=True)
class Books:
    """What the bank says it has, as one instant of it."""

    balances: Mapping[int, int]
    """Cents by account."""
    by_ledger: Mapping[int, int]
    """What the balances must be by the opening balances and the ledger; no balance was looked at for it."""
    ledger: frozenset[tuple[int, int]]
    """(number, transaction id) of every transfer."""
    complaints: int
    taken_at: datetime

    @property
    def total(self) -> int:
        """All money of the bank, in cents."""
        return sum(self.balances.values())


@dataclass(frozen=True, slots=True)
class Accident:
    """A DELETE without a WHERE that was committed, and the books as they were right before."""

    xid: int
    rows: int
    books_before: Books
    last_transfer_xid: int
    """The transaction of the transfer that was committed last before it."""


class Bank:
    """The bank at `conninfo`; counts what it was told is committed."""

    def __init__(self, conninfo: str) -> None:
        self.conninfo = make_conninfo(conninfo, dbname=DATABASE, connect_timeout=CONNECT_SECONDS)
        self._maintenance = make_conninfo(conninfo, dbname="postgres", connect_timeout=CONNECT_SECONDS)
        self._random = random.Random()  # noqa: S311 - who pays whom is no secret
        self._closing = False
        self.commits = 0
        self.payrolls = 0

    async def open(self) -> None:
        """Create the database and its accounts."""
        async with await psycopg.AsyncConnection.connect(self._maintenance, autocommit=True) as connection:
            await connection.execute(f"CREATE DATABASE {DATABASE}")
        async with await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True) as connection:
            await connection.execute(_SCHEMA)
            await connection.execute(
                "INSERT INTO account SELECT n, %s, %s FROM generate_series(1, %s) n",
                (OPENING_CENTS, OPENING_CENTS, ACCOUNTS),
            )

    async def work(self) -> None:
        """Let the clerks and the payroll work until `close` was called; every commit made is counted then."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLERKS):
                tasks.create_task(self._clerk())
            tasks.create_task(self._pay_wages())

    def close(self) -> None:
        """Tell everybody to go home after the transaction at hand."""
        self._closing = True

    async def _clerk(self) -> None:
        async with await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True) as connection:
            while not self._closing:
                payer, payee = self._random.sample(range(1, ACCOUNTS + 1), 2)
                try:
                    await connection.execute("SELECT pay(%s, %s, %s)", (payer, payee, self._random.randint(1, 500)))
                except NoDataFound:
                    await self._complain(connection, payer)
                except (CheckViolation, DeadlockDetected):
                    continue  # not enough money, or the accident stood in the way: nothing was committed
                self.commits += 1
                await asyncio.sleep(self._random.uniform(*PAUSE_SECONDS))

    async def _complain(self, connection: psycopg.AsyncConnection, about: int) -> None:
        """Write down that an account is gone: what goes on after the accident, and must not come back with it."""
        await connection.execute("INSERT INTO complaint (about, words) VALUES (%s, 'my account is gone')", (about,))

    async def _pay_wages(self) -> None:
        """Pay many in one transaction now and then, and mark it for the recovery points."""
        async with await psycopg.AsyncConnection.connect(self.conninfo) as connection:
            while not self._closing:
                await asyncio.sleep(PAYROLL_EVERY_SECONDS)
                employer, *paid = self._random.sample(range(1, ACCOUNTS + 1), PAYROLL_SIZE + 1)
                try:
                    async with connection.transaction():
                        marker = f"payroll-{self.payrolls + 1}"
                        await connection.execute("SELECT pg_logical_emit_message(true, 'trigpoint', %s)", (marker,))
                        await connection.execute(
                            "SELECT pay(%s, payee, 100) FROM unnest(%s::integer[]) payee ORDER BY payee",
                            (employer, paid),
                        )
                except (NoDataFound, CheckViolation, DeadlockDetected):
                    continue
                self.payrolls += 1
                self.commits += 1

    async def accident(self) -> Accident:
        """Delete all accounts and commit it; gives the books as they were right before the commit.

        While the DELETE is not committed it holds every account's row: a transfer that had begun was waited for, any
        other waits. So what another session sees then is exactly what was committed before the accident.
        """
        async with await psycopg.AsyncConnection.connect(self.conninfo) as culprit:
            while True:
                try:
                    async with culprit.transaction():
                        deleted = await culprit.execute("DELETE FROM account")  # and no WHERE
                        row = await (await culprit.execute("SELECT pg_current_xact_id()::text")).fetchone()
                        books = await read_books(self.conninfo)
                        last = await self._last_transfer()
                except DeadlockDetected:
                    continue
                assert row is not None
                self.commits += 1
                return Accident(int(row[0]), deleted.rowcount, books, last)

    async def _last_transfer(self) -> int:
        """Give the transaction of the transfer committed last; the server keeps the times of commits."""
        async with await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True) as connection:
            found = await connection.execute(
                "SELECT xid::text FROM transfer ORDER BY pg_xact_commit_timestamp(xid::xid) DESC, id DESC LIMIT 1"
            )
            row = await found.fetchone()
            assert row is not None, "the accident happened before the first transfer"
            return int(row[0])


async def read_books(conninfo: str) -> Books:
    """Give the books as one instant of the bank at `conninfo`, which may be a clone of it."""
    async with await psycopg.AsyncConnection.connect(
        make_conninfo(conninfo, dbname=DATABASE, connect_timeout=CONNECT_SECONDS)
    ) as connection:
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        balances = await (await connection.execute("SELECT id, balance FROM account")).fetchall()
        by_ledger = await (await connection.execute(_BY_LEDGER)).fetchall()
        ledger = await (await connection.execute("SELECT id, xid::text::bigint FROM transfer")).fetchall()
        row = await (await connection.execute("SELECT count(*), now() FROM complaint")).fetchone()
        assert row is not None
        return Books(dict(balances), dict(by_ledger), frozenset(map(tuple, ledger)), row[0], row[1])


async def transaction_status(conninfo: str, xid: int) -> str:
    """Give what the server at `conninfo` knows of a transaction: `committed`, `aborted`, or `unknown` to it."""
    async with await psycopg.AsyncConnection.connect(
        make_conninfo(conninfo, dbname=DATABASE, connect_timeout=CONNECT_SECONDS), autocommit=True
    ) as connection:
        try:
            found = await connection.execute("SELECT pg_xact_status(%s::text::xid8)", (str(xid),))
        except psycopg.errors.InvalidParameterValue:  # "transaction ID … is in the future"
            return "unknown"
        row = await found.fetchone()
        return str(row[0]) if row and row[0] else "unknown"
