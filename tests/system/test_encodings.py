"""A cluster in whatever encoding: its names in rules, its markers in questions, a commit back, a verification."""

from __future__ import annotations

import json
import secrets

import psycopg
import pytest

from tests.fixtures.service import deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]

RULES = '[[rules]]\nname = "sizes"\ntables = [{table}]\n'
ASSERTION = '[[verify.assertions]]\ndatabase = "shop"\nsql = {sql}\nexpect = {expect}\n'
CASES = [
    (15, "LATIN1", "größe", "Lösung", "public.größe", "Lösung"),
    (15, "SQL_ASCII", "größe", "Lösung", "public.größe", "Lösung"),
    (18, "SQL_ASCII", b"gr\xf6\xdfe", b"L\xf6sung", "public.gr\\xf6\\xdfe", "L\\xf6sung"),
    (18, "EUC_JP", "表", "解決", "public.表", "解決"),
    (16, "EUC_TW", b"\xc4\xe3", b"\xc4\xe3", "public.\\xc4\\xe3", "\\xc4\\xe3"),
]


@pytest.mark.parametrize(("major", "encoding", "table", "marker", "in_rules", "asked"), CASES)
def test_a_commit_in_a_database_of_any_encoding_is_ruled_found_and_brought_back(
    major: int, encoding: str, table: str | bytes, marker: str | bytes, in_rules: str, asked: str
) -> None:
    initdb = ("--encoding", encoding)
    with deployment(major, "directory", databases=("shop",), initdb=initdb) as here:
        client = "SQL_ASCII" if isinstance(table, bytes) or encoding == "SQL_ASCII" else "UTF8"
        name, mark = (one if isinstance(one, bytes) else one.encode() for one in (table, marker))
        with here.cluster.connect("shop", client_encoding=client) as connection:
            connection.execute(b'CREATE TABLE "%s" (n int PRIMARY KEY)' % name)
            text = asked if isinstance(table, str) else "plain"
            assertion = ASSERTION.format(sql=json.dumps(f"SELECT '{text}'"), expect=json.dumps(text))
            here.configure(RULES.format(table=json.dumps(in_rules)) + assertion)
            here.trigpoint("check")
            here.start()
            for number in range(3):
                connection.execute(
                    b'BEGIN; INSERT INTO "%s" VALUES (%d);'
                    b" SELECT pg_logical_emit_message(true, 'trigpoint', '%s-%d'); COMMIT"
                    % (name, number, mark, number)
                )
        here.settle()
        assert here.status()["commits_by_rule"]["sizes"] == 3
        report = here.ask("restore", "--to-marker", f"{asked}-1", "--name", f"r{secrets.token_hex(2)}")
        assert all(held for _, held, _ in report["checks"])
        with psycopg.connect(f"{report['conninfo']} dbname=shop client_encoding={client}") as clone:
            assert clone.execute(b'SELECT count(*) FROM "%s"' % name).fetchone() == (2,)
        assert here.ask("verify")["passed"]
        assert here.stop() == 0
