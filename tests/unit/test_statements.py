"""Statements: split as PostgreSQL splits them, located by line, refused where no transaction holds them."""

from __future__ import annotations

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._statements import parse

from tests.support import migration

RULE = "CREATE RULE r AS ON INSERT TO t DO ALSO (INSERT INTO l VALUES (1); INSERT INTO l VALUES (2))"
ATOMIC = "CREATE FUNCTION f() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 2 END; END"
PLPGSQL = "CREATE PROCEDURE p() LANGUAGE plpgsql AS $fn$ BEGIN COMMIT; EXECUTE $q$ROLLBACK;$q$; END; $fn$"

WHOLE = {
    "dollar quotes": "SELECT $$a;b$$",
    "dollar quotes with a tag": "SELECT $tag$ a; $other$ ; $$ ; $tag$",
    "tag with digits and letters beyond ASCII": "SELECT $ä1$ a; $ä1$",
    "escaped quote": r"SELECT E'\'; SELECT 2', E'\\'",
    "backslash in a standard string": r"SELECT 'a\'",
    "doubled quote": "SELECT 'it''s; here'",
    "unicode string": r"SELECT U&'\0061;' UESCAPE '\', U&'d!0061;' UESCAPE '!'",
    "quoted identifier": 'SELECT 1 AS "a;""b;"',
    "nested comments": "SELECT /* ; /* ; */ ; */ 1",
    "comment to the line's end": "SELECT -- ;'\n 1",
    "parameter-like": "PREPARE p AS SELECT $1::int, $2::text",
    "identifier with dollars": "SELECT 1 AS a$b$c, 2 AS d$b$e",
    "rule with several actions": RULE,
    "body of SQL": ATOMIC,
    "body of plpgsql": PLPGSQL,
    "per cent and braces": "SELECT '%s %(a)s {}', 5 % 2",
    "string over lines": "SELECT 'a;\n'\n'b;'",
    "bit and hex strings": "SELECT B'01', X'1F'",
}


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE.keys())
def test_statement_is_not_cut_inside(text):
    script = parse(migration(f"SELECT 'ä';\n{text};\nSELECT 3"))
    assert [statement.text for statement in script.statements] == ["SELECT 'ä'", text, "SELECT 3"]
    assert not script.warnings


def test_lines_are_those_of_the_file():
    text = (
        "-- Füße\n\nSELECT 1; SELECT 2;\n"  # 3 and 3
        "/* 漢字\n /* ; */\n*/ SELECT $$\n\n$$;\n\n"  # 6
        "  ;;\n"
        "-- last ü\nSELECT\n  4\n"  # 12
    )
    script = parse(migration(text))
    assert [(statement.line, statement.first_line) for statement in script.statements] == [
        (3, "SELECT 1"), (3, "SELECT 2"), (6, "SELECT $$"), (12, "SELECT"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "\n\n", "-- nothing yet\n", "/* nothing */", ";;\n;"])
def test_file_without_a_statement_has_none(text):
    script = parse(migration(text))
    assert script.statements == ()
    assert not script.warnings


REFUSED = {
    "BEGIN": "transaction control",
    "BEGIN ISOLATION LEVEL SERIALIZABLE": "transaction control",
    "START TRANSACTION": "transaction control",
    "COMMIT": "transaction control",
    "COMMIT AND CHAIN": "transaction control",
    "END": "transaction control",
    "ROLLBACK": "transaction control",
    "ABORT": "transaction control",
    "SAVEPOINT s": "transaction control",
    "RELEASE SAVEPOINT s": "transaction control",
    "ROLLBACK TO SAVEPOINT s": "transaction control",
    "PREPARE TRANSACTION 'x'": "transaction control",
    "COMMIT PREPARED 'x'": "transaction control",
    "ROLLBACK PREPARED 'x'": "transaction control",
    "COPY t FROM STDIN": "COPY FROM STDIN",
    "COPY t (a) FROM STDIN WITH (FORMAT csv)": "COPY FROM STDIN",
    "COPY t TO STDOUT": "COPY TO STDOUT",
    "COPY (SELECT 1) TO STDOUT": "COPY TO STDOUT",
    "CREATE DATABASE d": "CREATE DATABASE",
    "DROP DATABASE d": "DROP DATABASE",
    "DROP DATABASE IF EXISTS d WITH (FORCE)": "DROP DATABASE",
    "CREATE TABLESPACE s LOCATION '/s'": "CREATE TABLESPACE",
    "DROP TABLESPACE s": "DROP TABLESPACE",
    "ALTER SYSTEM SET work_mem = '1MB'": "ALTER SYSTEM",
    "ALTER SYSTEM RESET ALL": "ALTER SYSTEM",
    "ALTER DATABASE d SET TABLESPACE s": "ALTER DATABASE SET TABLESPACE",
    "VACUUM": "VACUUM",
    "VACUUM (ANALYZE, FULL) t": "VACUUM",
    "CREATE INDEX CONCURRENTLY i ON t (a)": "CREATE INDEX CONCURRENTLY",
    "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS i ON t (a)": "CREATE INDEX CONCURRENTLY",
    "DROP INDEX CONCURRENTLY IF EXISTS i": "DROP INDEX CONCURRENTLY",
    "REINDEX INDEX CONCURRENTLY i": "REINDEX CONCURRENTLY",
    "REINDEX (CONCURRENTLY) TABLE t": "REINDEX CONCURRENTLY",
    "REINDEX (VERBOSE, CONCURRENTLY true) TABLE t": "REINDEX CONCURRENTLY",
    "REINDEX SCHEMA s": "REINDEX",
    "REINDEX DATABASE d": "REINDEX",
    "REINDEX SYSTEM d": "REINDEX",
    "CLUSTER": "CLUSTER without a table",
    "CLUSTER VERBOSE": "CLUSTER without a table",
    "ALTER TABLE t DETACH PARTITION p CONCURRENTLY": "DETACH PARTITION CONCURRENTLY",
    "CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p": "CREATE SUBSCRIPTION",
    "CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (create_slot = true)": "CREATE SUBSCRIPTION",
    "DROP SUBSCRIPTION s": "DROP SUBSCRIPTION",
    "DISCARD ALL": "DISCARD ALL",
}


@pytest.mark.parametrize("text", REFUSED, ids=REFUSED.keys())
def test_refused_with_file_line_and_command(text):
    with pytest.raises(RunbookError) as refused:
        parse(migration(f"SELECT 'ü';\n\n-- {text};\n{text};\nSELECT 1;\n", "012_bad.sql"))
    assert refused.value.message.startswith("/migrations/012_bad.sql:4: ")
    assert REFUSED[text] in refused.value.message
    assert refused.value.message.endswith(text)
    assert refused.value.hint


ALLOWED = [
    "SET LOCAL lock_timeout = '1s'",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SELECT 'COMMIT; ROLLBACK;'",
    'CREATE TABLE "commit" (a int)',
    "DO $$ BEGIN PERFORM 1; END $$",
    PLPGSQL,
    ATOMIC,
    "CALL p()",
    "COPY t FROM '/tmp/file'",
    "COPY t FROM PROGRAM 'true'",
    "COPY t TO '/tmp/file'",
    "ALTER DATABASE d SET search_path = public",
    "ALTER DATABASE d CONNECTION LIMIT 5",
    "ALTER DATABASE d OWNER TO o",
    "ANALYZE",
    "ANALYZE t",
    "CREATE INDEX i ON t (a)",
    "DROP INDEX i",
    "DROP TABLE concurrently_made",
    "REINDEX TABLE t",
    "REINDEX (CONCURRENTLY false) TABLE t",
    "REINDEX (CONCURRENTLY off) INDEX i",
    "CLUSTER t USING i",
    "CLUSTER t",
    "ALTER TABLE t DETACH PARTITION p",
    "ALTER TABLE t DETACH PARTITION p FINALIZE",
    "CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (connect = false)",
    "CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (create_slot = off)",
    "DISCARD TEMP",
    "DISCARD PLANS",
    "REFRESH MATERIALIZED VIEW CONCURRENTLY m",
    "TRUNCATE t",
    "LOCK TABLE t IN ACCESS EXCLUSIVE MODE",
    "CREATE EXTENSION IF NOT EXISTS pgcrypto",
    "ALTER TYPE e ADD VALUE 'x'",
    "SELECT pg_create_restore_point('x')",
]


@pytest.mark.parametrize("text", ALLOWED)
def test_allowed_twin_passes(text):
    script = parse(migration(f"{text};"))
    assert [statement.text for statement in script.statements] == [text]
    assert not script.warnings


@pytest.mark.parametrize(
    "command", [r"\i other.sql", r"\copy t from 'x'", r"\! rm -rf /", r"\restrict abc", r"\d", r"\?"]
)
def test_psql_command_is_refused_with_its_line(command):
    with pytest.raises(RunbookError) as refused:
        parse(migration(f"SELECT 'ü';\n\n  {command}\nSELECT 1;", "012_bad.sql"))
    assert refused.value.message == f"/migrations/012_bad.sql:3: psql command {command.split()[0]}"


def test_backslash_in_a_string_is_no_psql_command():
    script = parse(migration("SELECT '\n\\i other.sql\n';"))
    assert len(script.statements) == 1


def test_unknown_grammar_is_isolated_with_a_warning_that_names_the_line():
    body = "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END"
    rule = "CREATE RULE r AS ON INSERT TO t DO (SELECT 1; SELECT 2)"
    text = f"\n-- é\nSELECT 1;\nFROBNICATE TABLE t; -- x\n;;{body};\n{rule}"
    script = parse(migration(text, "012_new.sql"))
    assert [(one.text, one.line) for one in script.statements] == [
        ("SELECT 1", 3),
        ("FROBNICATE TABLE t", 4),
        (body, 5),
        (rule, 6),
    ]
    (warning,) = script.warnings
    assert warning.startswith("012_new.sql:4: ")
    assert "FROBNICATE" in warning
    assert "unchecked" in warning


def test_statements_beside_unknown_grammar_are_still_judged():
    with pytest.raises(RunbookError, match=r"012_new.sql:3: transaction control: COMMIT"):
        parse(migration("FROBNICATE 1;\nSELECT 1;\nCOMMIT;", "012_new.sql"))
    with pytest.raises(RunbookError, match=r"012_new.sql:2: psql command \\i"):
        parse(migration("FROBNICATE 1;\n\\i other.sql\nSELECT 1;", "012_new.sql"))


def test_text_that_ends_too_early_is_unknown_too():
    script = parse(migration("SELECT 1;\nSELECT (\n"))
    assert [one.text for one in script.statements] == ["SELECT 1", "SELECT ("]
    assert script.warnings
    script = parse(migration("SELECT 1;\nSELECT 'x\n"))
    assert len(script.statements) == 1
    assert script.warnings
