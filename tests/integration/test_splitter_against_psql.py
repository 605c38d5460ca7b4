"""The splitter against psql: over hard cases both send the same statements and leave the same database."""

from __future__ import annotations

import re
import subprocess

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._statements import parse
from hypothesis import given
from hypothesis import strategies as st

from tests.support import migration, refused

CASES = {
    "plain": "SELECT 1; SELECT 2;\nSELECT 3",
    "no semicolon at the end": "SELECT 1",
    "empty statements": ";;; SELECT 1;; ;\n;",
    "comment at the end without a line end": "SELECT 1; -- the end",
    "semicolon in a line comment": "SELECT 1 -- not; here\n; SELECT 2;",
    "semicolon in a block comment": "SELECT /* ; */ 1; SELECT 2;",
    "nested comments": "SELECT 1 /* a /* b; */ c; */ ; SELECT 2;",
    "comment that looks like a string": "SELECT 1 /* it's; */; SELECT 'x';",
    "semicolon in a string": "SELECT 'a;b'; SELECT 'c';",
    "backslash that escapes a backslash": "SELECT set_config('standard_conforming_strings', 'off', false); "
    r"SELECT 'a\\;b'; SELECT 2;",
    "backslashes that do not escape": r"SET standard_conforming_strings = on; SELECT '\'; SELECT ';\';",
    "doubled quotes": "SELECT 'it''s; fine'; SELECT 2;",
    "escape string": r"SELECT E'it\'s; fine'; SELECT 2;",
    "escape string with a backslash at its end": r"SELECT E'a\\'; SELECT 2;",
    "plain string with a backslash at its end": r"SELECT 'a\'; SELECT 2;",
    "unicode string": r"SELECT U&'d\0061t\+000061;'; SELECT 2;",
    "unicode string with its own escape": "SELECT U&'d!0061;' UESCAPE '!'; SELECT 2;",
    "bit strings": "SELECT B'101', X'1F'; SELECT 2;",
    "string over two lines": "SELECT 'a;'\n'b;'; SELECT 2;",
    "quoted identifier": 'SELECT 1 AS "a;b""c;"; SELECT 2;',
    "unicode identifier": r'SELECT 1 AS U&"d\0061;"; SELECT 2;',
    "dollar quotes": "SELECT $$a;b$$; SELECT 2;",
    "tagged dollar quotes": "SELECT $tag$a;$$b;$tag$; SELECT 2;",
    "nested tags": "SELECT $a$ $b$ ; $b$ ; $a$; SELECT 2;",
    "tag that is nearly the end": "SELECT $a$ $a ; $a$; SELECT 2;",
    "tag with unicode": "SELECT $ä$;$ä$; SELECT 2;",
    "identifier with a dollar": "SELECT 1 AS a$b$c; SELECT 2;",
    "quotes of the other kind in dollar quotes": "SELECT $$it's \" ; fine$$; SELECT 2;",
    "function": "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS $$ SELECT 1; SELECT 2; $$; SELECT f();",
    "parameter in a body": "CREATE FUNCTION g(int) RETURNS int LANGUAGE sql AS 'SELECT $1; SELECT $1'; SELECT g(2);",
    "plpgsql": "CREATE FUNCTION h() RETURNS int LANGUAGE plpgsql AS $f$ BEGIN RETURN 1; END; $f$; SELECT h();",
    "begin atomic": "CREATE FUNCTION b() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT 2; END; SELECT b();",
    "begin atomic with case": "CREATE FUNCTION c(x int) RETURNS int LANGUAGE sql BEGIN ATOMIC "
    "SELECT CASE WHEN x > 0 THEN 1 ELSE 2 END; SELECT 3; END; SELECT c(1);",
    "procedure with begin atomic": "CREATE TABLE p (i int); CREATE PROCEDURE ins() LANGUAGE sql BEGIN ATOMIC "
    "INSERT INTO p VALUES (1); INSERT INTO p VALUES (2); END; CALL ins();",
    "rule with two actions": "CREATE TABLE r (i int); CREATE TABLE l (i int); CREATE RULE two AS ON INSERT TO r "
    "DO ALSO (INSERT INTO l VALUES (1); INSERT INTO l VALUES (2)); INSERT INTO r VALUES (1);",
    "do": "DO $$ BEGIN PERFORM 1; PERFORM 2; END $$; SELECT 1;",
    "schema with elements": "CREATE SCHEMA s CREATE TABLE t (i int) CREATE VIEW v AS SELECT i FROM t; SELECT 1;",
    "parentheses": "SELECT (1); SELECT ((2) + (3));",
    "casts and operators": "SELECT '1'::int, ARRAY[1, 2] @> ARRAY[1], 5 - -1; SELECT 2;",
    "operator that looks like a comment": "SELECT 5 *-1, 4 /2; SELECT 2;",
    "many lines": "\n\n\nSELECT\n1\n;\n\n-- between\n\nSELECT\n2;\n",
    "tabs and form feeds": "SELECT\t1;\f\tSELECT\f2;",
    "unicode": "SELECT 'größer; 東京 🐘'; SELECT 2;",
    "percent": "SELECT 5 % 2, '%s %(a)s; %%'; SELECT 2;",
    "question mark": "SELECT '{\"a\": 1}'::jsonb ? 'a'; SELECT 2;",
    "braces": "SELECT '{};'; SELECT '{0}';",
    "long": "SELECT '" + "x;" * 50_000 + "'; SELECT 2;",
    "many": "".join(f"SELECT {number};\n" for number in range(500)),
    "prepare and execute": "PREPARE q AS SELECT 1; EXECUTE q; DEALLOCATE q;",
    "table and data": "CREATE TABLE d (i int, t text); INSERT INTO d VALUES (1, 'a;b'), (2, NULL); "
    "UPDATE d SET i = i + 1;",
    "trigger": "CREATE TABLE tt (i int); CREATE FUNCTION tf() RETURNS trigger LANGUAGE plpgsql AS "
    "'BEGIN NEW.i := 5; RETURN NEW; END'; CREATE TRIGGER tg BEFORE INSERT ON tt FOR EACH ROW EXECUTE FUNCTION tf(); "
    "INSERT INTO tt VALUES (1);",
}
_TABLES = "SELECT string_agg(query_to_xml(format('SELECT * FROM %s', oid::regclass), true, true, '')::text, '' ORDER BY relname) FROM pg_class WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, to_regnamespace('s'))"  # noqa: E501
_FUNCTIONS = "SELECT string_agg(pg_get_functiondef(oid), '' ORDER BY proname) FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prokind IN ('f', 'p') AND proname NOT LIKE 'uuid%' AND prolang <> 13"  # noqa: E501


def _bare(statement: str) -> str:
    """Return a statement without comments and blank lines around it; psql keeps some of those in front."""
    text = statement.strip().rstrip(";").strip()
    while match := re.match(r"\s*(--[^\n]*(\n|$)|/\*([^*/]|\*(?!/)|/(?!\*))*\*/)", text):
        text = text[match.end() :].strip()
    return re.sub(r"\s*--[^\n]*$", "", text).strip()


#: What psql's log has of each query that it sends.
_SENT = re.compile(r"^/?\*+ QUERY \*+/?\n(.*?)\n/?\*+/?\n\n", re.DOTALL | re.MULTILINE)


@pytest.mark.every_major
def test_psql_sends_the_same_statements_and_leaves_the_same_database(new_database, connect, cluster, roles, tmp_path):
    wrong = []
    for name, text in CASES.items():
        by_psql, by_us = new_database(), new_database()
        file, log = tmp_path / "case.sql", tmp_path / "log"
        file.write_text(text, encoding="utf-8")
        log.unlink(missing_ok=True)
        run = subprocess.run(
            [f"{cluster.state.bin}/psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=terse",
             "-P", "pager=off", "-o", "/dev/null", "-L", log, "-d", cluster.conninfo(by_psql), "-f", str(file)],
            capture_output=True, text=True, check=False,
            env={"PGOPTIONS": "-c client_min_messages=error", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        assert run.returncode == 0, f"{name}: {run.stderr}"
        sent = [_bare(query) for query in _SENT.findall(log.read_text(encoding="utf-8"))]
        sent = [query for query in sent if query]  # psql sends empty ones, too
        statements = [statement.text for statement in parse(migration(text)).statements]
        if sent != [_bare(statement) for statement in statements]:
            wrong.append(f"{name}: psql sent {sent[:9]}, we {statements[:9]}")
        with connect(by_us) as session, connect(by_psql) as other:
            for statement in statements:
                session.execute(statement.encode())
            left = [[one.execute(query).fetchone() for query in (_TABLES, _FUNCTIONS)] for one in (other, session)]
        if left[0] != left[1]:
            wrong.append(f"{name}: the databases differ")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("value", ["off", "false", "'off'", "0", "no"])
def test_what_the_parser_would_read_otherwise_than_the_server_is_refused(value):
    text = rf"SELECT 1; SET LOCAL standard_conforming_strings = {value}; SELECT '\'||';DROP TABLE a; --';"
    error = refused(parse, migration(text))
    assert "nobody knows where the next statement ends" in error.message
    assert "E'…'" in error.hint


FRAGMENTS = st.sampled_from(
    [_bare(text) for name, text in CASES.items() if name in {
        "no semicolon at the end", "dollar quotes"} and ";" not in text] + [
        "SELECT 1", "SELECT 'a;b'", "SELECT $x$;$x$", 'SELECT 1 AS ";"', "SELECT /* ; */ 2", "SELECT E'\\';'",
        "CREATE TABLE t (a int,\n b text)", "UPDATE t\nSET a = 1", "SELECT 1 -- c;\n+ 2",
    ]
)  # fmt: skip


@given(st.lists(FRAGMENTS, min_size=1, max_size=8), st.sampled_from([";", " ; ", ";\n\n", "; -- c\n", ";\n/* ; */\n"]))
def test_fragments_that_are_joined_come_apart_again_at_the_right_lines(fragments, separator):
    text = separator.join(fragments)
    found = parse(migration(text)).statements
    assert [_bare(one.text) for one in found] == fragments
    for statement in found:
        assert text.split("\n")[statement.line - 1].strip(), "the line of a statement is not empty"
