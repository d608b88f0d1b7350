"""`trigpoint verify` says no: of snapshots that were damaged, indexes that are wrong, answers that differ; all real.

What is damaged is mended after each test, so that all of them share one cluster and its points.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.service import Deployment, deployment
from trigger.errors import VerifyError

pytestmark = [pytest.mark.server, pytest.mark.slow]

AMCHECK = "tables and indexes (pg_amcheck)"
CHECKSUMS = "page checksums"
PAGE = 8192
BUILT_THEN_CHANGED = """
    CREATE TABLE {0} AS SELECT n FROM generate_series(1, 1000) n;
    CREATE FUNCTION half(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 / 2';
    CREATE INDEX {0}_half ON {0} (half(n));
    CREATE OR REPLACE FUNCTION half(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 / 3';
"""
SORTED_THEN_REVERSED = """
    CREATE TABLE {0} AS SELECT n FROM generate_series(1, 1000) n;
    CREATE FUNCTION order_of(int, int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 - $2';
    CREATE OPERATOR CLASS own_order FOR TYPE int USING btree AS
        OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 order_of(int, int);
    CREATE INDEX {0}_sorted ON {0} (n own_order);
    CREATE OR REPLACE FUNCTION order_of(int, int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $2 - $1';
"""


BTRFS = pytest.param("btrfs", marks=pytest.mark.volume)
"""Its point is restored from its own snapshot, where nobody writes; with storage `directory` from the one before."""
on_btrfs = pytest.mark.parametrize("bank", [BTRFS], indirect=True)
on_both = pytest.mark.parametrize("bank", [BTRFS, "directory"], indirect=True)


@pytest.fixture(scope="module")
def bank(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Give a cluster with checksums, whose accounts are found by a hash index too; its service runs."""
    storage = getattr(request, "param", "directory")
    with deployment(15, storage, initdb=["--data-checksums"], autovacuum="off") as here:  # which writes pages anew
        here.cluster.sql("CREATE TABLE account (id int PRIMARY KEY, balance int)")
        here.cluster.sql("CREATE INDEX account_hash ON account USING hash (id)")
        here.cluster.sql("INSERT INTO account SELECT n, 100 FROM generate_series(1, 5000) n; CHECKPOINT")
        here.start()
        yield here


@pytest.fixture
def point(bank: Deployment) -> dict[str, Any]:
    """Give a point of the accounts as they are; the cluster is idle, and no page is written again by its log."""
    bank.settle()
    bank.cluster.sql("CHECKPOINT")
    return dict(bank.ask("point"))


def verified(here: Deployment, point: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Verify a point that must not pass; give what held and what was seen by check, the sandbox being gone."""
    done = here.trigpoint("verify", str(point["number"]), "--json", check=False)
    assert done.returncode == VerifyError.exit_code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert not result["passed"]
    assert here.ask("show", str(point["number"]))["point"]["verification"] == result
    require_nothing_left(here)
    return {what: (held, seen) for what, held, seen in result["checks"]}


def require_nothing_left(here: Deployment) -> None:
    """See that no sandbox is left, nothing that was staged for one, and no process that works in one."""
    assert here.ask("clones", "list") == []
    assert not list((here.root / "snapshots" / "clones").glob("*"))
    assert not list((here.state / "staging").glob("*"))
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert not (process / "cwd").readlink().is_relative_to(here.root / "snapshots")


@contextlib.contextmanager
def damaged(here: Deployment, point: dict[str, Any], file: str, damage: Callable[[bytes], bytes]) -> Iterator[None]:
    """Let a file of a point's snapshot be what `damage` makes of it, until the block ends."""
    snapshot = here.root / "snapshots" / f"trg-{point['id']}" / "data"
    whole = (snapshot / file).read_bytes()
    assert damage(whole) != whole
    overwrite(here, snapshot, file, damage(whole))
    try:
        yield
    finally:
        overwrite(here, snapshot, file, whole)


def overwrite(here: Deployment, snapshot: Path, file: str, content: bytes) -> None:
    """Write a file of a snapshot where it lies, as a disk would; on btrfs the snapshot is writable meanwhile."""
    if here.storage == "btrfs":
        subprocess.run(["btrfs", "property", "set", "-ts", str(snapshot), "ro", "false"], check=True)
    with (snapshot / file).open("r+b") as opened:
        opened.truncate(len(content))
        opened.write(content)
    if here.storage == "btrfs":
        subprocess.run(["btrfs", "property", "set", "-ts", str(snapshot), "ro", "true"], check=True)


def flipped_at(place: int) -> Callable[[bytes], bytes]:
    """Give what flips one bit, in the byte at `place`."""
    return lambda whole: whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]


def file_of(here: Deployment, relation: str) -> str:
    return str(here.cluster.sql(f"SELECT pg_relation_filepath('{relation}')")[0][0])


@on_both
def test_pages_and_structures_are_among_the_checks_of_a_point_that_passes(
    bank: Deployment, point: dict[str, Any]
) -> None:
    result = bank.ask("verify", str(point["number"]))
    assert result["passed"], result["checks"]
    assert {AMCHECK, CHECKSUMS} <= {what for what, _, _ in result["checks"]}
    (seen,) = {seen for what, _, seen in result["checks"] if what == CHECKSUMS}
    assert "Bad checksums:  0" in seen
    require_nothing_left(bank)


@on_both
def test_of_many_damaged_files_each_is_named(bank: Deployment, point: dict[str, Any]) -> None:
    read_by_no_start = ("pg_description", "pg_depend", "pg_collation", "pg_conversion", "pg_init_privs", "pg_rewrite")
    files = [file_of(bank, relation) for relation in (*read_by_no_start, "pg_ts_config_map", "account")]
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(damaged(bank, point, file, flipped_at(5000)))
        checks = verified(bank, point)
    own = f"its own snapshot: {CHECKSUMS}"  # of a copy, which may share with the base what did not change since
    held, seen = checks[own if own in checks else CHECKSUMS]
    assert not held
    assert sorted(seen.partition("; ")[0].removeprefix("damaged: ").split(", ")) == sorted(files)


@on_both
@pytest.mark.parametrize("relation", ["account", "account_hash"])
def test_a_flipped_bit_in_a_page_of_the_snapshot_is_found_and_its_file_is_named(
    bank: Deployment, point: dict[str, Any], relation: str
) -> None:
    file = file_of(bank, relation)
    with damaged(bank, point, file, flipped_at(PAGE + 5000)):
        checks = verified(bank, point)
    held, seen = checks[CHECKSUMS]
    assert not held
    assert f"damaged: {file}; " in seen
    assert f'{file}", block 1:' in seen
    assert "Bad checksums:  1 " in seen
    structures_hold, seen = checks[AMCHECK]
    assert structures_hold == (relation == "account_hash"), "pg_amcheck reads tables and B-trees, and no hash index"
    assert structures_hold or f"invalid page in block 1 of relation {file}" in seen


@on_both
@pytest.mark.parametrize(
    ("relation", "damage"),
    [
        ("account", lambda whole: whole[: 2 * PAGE]),
        ("account", lambda whole: whole[:PAGE] + bytes(PAGE) + whole[2 * PAGE :]),
        ("account_hash", lambda whole: b""),
        ("account_pkey", lambda whole: b""),
    ],
    ids=["table cut short", "page of zeros", "hash index emptied", "primary key emptied"],
)
def test_what_a_snapshot_lost_without_a_wrong_checksum_is_found_and_its_file_is_named(
    bank: Deployment, point: dict[str, Any], relation: str, damage: Callable[[bytes], bytes]
) -> None:
    file = file_of(bank, relation)
    with damaged(bank, point, file, damage):
        checks = verified(bank, point)
    words = ("all files are there and whole", "restore and look")  # the latter where it is not even copied
    lost = [seen for what, (held, seen) in checks.items() if any(each in what for each in words) and not held]
    assert any(file in seen for seen in lost), checks


@on_both
def test_a_flipped_bit_is_found_where_only_later_restores_would_read_it(bank: Deployment) -> None:
    """The point is restored from an older base, which is whole; its own snapshot is what later commits start from."""
    bank.settle()
    bank.cluster.sql("UPDATE account SET balance = balance; CHECKPOINT")  # no older snapshot shares this file
    with writing(bank):
        point = bank.ask("point", "--note", "amid the noise")
    with damaged(bank, point, file_of(bank, "account"), flipped_at(PAGE + 5000)):
        checks = verified(bank, point)
    assert checks[AMCHECK][0]
    assert checks[CHECKSUMS][0]
    assert checks["its own snapshot comes up"][0]
    held, seen = checks[f"its own snapshot: {CHECKSUMS}"]
    assert not held
    assert f'{file_of(bank, "account")}", block 1:' in seen
    result = bank.ask("verify", str(point["number"]))
    assert result["passed"], result["checks"]


@contextlib.contextmanager
def writing(here: Deployment) -> Iterator[None]:
    """Let somebody write log that is no commit's, until the block ends."""
    over = threading.Event()

    def write() -> None:
        with here.cluster.connect() as connection:
            while not over.is_set():
                connection.execute("SELECT pg_logical_emit_message(false, 'noise', repeat('x', 20000))")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        try:
            yield
        finally:
            over.set()
        writer.result(30)


@pytest.mark.parametrize(
    ("table", "made_by", "index", "words"),
    [
        ("lacking", BUILT_THEN_CHANGED, "lacking_half", "lacks matching index tuple"),
        ("backwards", SORTED_THEN_REVERSED, "backwards_sorted", "item order invariant violated"),
    ],
    ids=["an entry is missing", "the order is wrong"],
)
def test_an_index_that_is_wrong_in_whole_pages_is_found_by_amcheck_and_named(
    bank: Deployment, table: str, made_by: str, index: str, words: str
) -> None:
    bank.cluster.sql(made_by.format(table))
    try:
        bank.settle()
        checks = verified(bank, bank.ask("point"))
    finally:
        bank.cluster.sql(f"DROP TABLE {table} CASCADE")
    held, seen = checks[AMCHECK]
    assert not held
    assert words in seen
    assert f'"{index}"' in seen
    assert checks[CHECKSUMS][0]


def test_an_assertion_is_asked_of_the_clone_and_what_it_saw_is_said(bank: Deployment, point: dict[str, Any]) -> None:
    total = "select sum(balance) from account"
    then = str(bank.cluster.sql(total)[0][0])
    bank.cluster.sql("UPDATE account SET balance = balance + 1 WHERE id = 1")
    now = str(bank.cluster.sql(total)[0][0])
    asked = ((total, then), (total, now), ("select n from nowhere", "1"))
    bank.configure(
        "".join(
            f'[[verify.assertions]]\ndatabase = "postgres"\nsql = "{sql} -- {place}"\nexpect = "{expect}"\n'
            for place, (sql, expect) in enumerate(asked)
        )
    )
    try:
        checks = verified(bank, point)
    finally:
        bank.configure("")
    answers = [checks[f"postgres: {sql} -- {place}"] for place, (sql, _) in enumerate(asked)]
    assert answers[:2] == [(True, then), (False, f"{then!r}, and not {now!r}")]
    assert not answers[2][0]
    assert answers[2][1].startswith("not run: the clone refused 'select n from nowhere")
    assert checks[CHECKSUMS][0]


@on_btrfs
@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("global/pg_control", flipped_at(40), "incorrect checksum in control file"),
        ("global/pg_control", lambda whole: b"", "pg_controldata failed"),
        ("PG_VERSION", lambda whole: b"\xff\x00", "PG_VERSION"),
        ("pg_xact/0000", lambda whole: b"", "could not access status of transaction"),
        ("global/pg_filenode.map", flipped_at(30), "contains incorrect checksum"),
    ],
    ids=["control file flipped", "control file empty", "version no number", "commit log empty", "map of files flipped"],
)
def test_a_snapshot_that_no_server_starts_from_is_a_result_and_its_reason_is_said(
    bank: Deployment, point: dict[str, Any], file: str, damage: Callable[[bytes], bytes], words: str
) -> None:
    with damaged(bank, point, file, damage):
        checks = verified(bank, point)
    held, seen = checks["restore and look"]
    assert not held
    assert seen.startswith("not run to the end: ")
    assert words in seen
