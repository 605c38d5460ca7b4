"""Hints: each one is provoked on a server by what an author of migrations writes, and says what helps."""

from __future__ import annotations

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._errors import HINTS, from_postgres
from psycopg import sql

from tests.support import Background, as_migrator, migration, refused, wait_until

pytestmark = pytest.mark.every_major

#: SQLSTATE, statements of which the last one fails, a word of the hint that helps.
CASES: list[tuple[str, str, str]] = [
    ("0A000", "CREATE TABLE a (i int); CREATE VIEW v AS SELECT i FROM a; ALTER TABLE a ALTER i TYPE text", "drop it"),
    ("0A000", "CREATE TABLE a (i int, CHECK (i > (SELECT 1)))", "what it refuses"),
    ("0A000", "CREATE TABLE a (i int, j int) PARTITION BY LIST (i); ALTER TABLE a ADD UNIQUE (j)", "what it refuses"),
    ("22001", "CREATE TABLE a (t varchar(2)); INSERT INTO a VALUES ('abc')", "widen the column"),
    ("22001", "CREATE TABLE a AS SELECT 'abc'::text AS t; ALTER TABLE a ALTER t TYPE varchar(2)", "shorten"),
    ("22003", "CREATE TABLE a (i int); INSERT INTO a VALUES (3000000000)", "bigint"),
    (
        "22P02",
        "SET app.current_tenant_id = ''; SELECT current_setting('app.current_tenant_id')::uuid",
        "SET app.current",
    ),
    ("23502", "CREATE TABLE a AS SELECT NULL::int AS i; ALTER TABLE a ALTER i SET NOT NULL", "Fill them"),
    (
        "23503",
        (
            "CREATE TABLE a (i int PRIMARY KEY); CREATE TABLE b AS SELECT 1 AS i; ALTER TABLE b ADD FOREIGN KEY (i) "
            "REFERENCES a"
        ),
        "repair them",
    ),
    ("23505", "CREATE TABLE a AS SELECT 1 AS i FROM generate_series(1, 2); CREATE UNIQUE INDEX ON a (i)", "merge them"),
    ("23514", "CREATE TABLE a AS SELECT 1 AS i; ALTER TABLE a ADD CHECK (i > 1)", "Repair them"),
    ("25001", "VACUUM", "cannot run inside a transaction"),
    ("25006", "SET TRANSACTION READ ONLY; CREATE TABLE a (i int)", "connect to the primary"),
    ("2BP01", "CREATE TABLE a (i int); CREATE VIEW v AS SELECT i FROM a; DROP TABLE a", "change them first"),
    ("3D000", "ALTER DATABASE never_made SET work_mem = '1MB'", "setup.yml"),
    ("3F000", "CREATE TABLE nowhere.a (i int)", "search_path"),
    ("42501", "CREATE EXTENSION pg_stat_statements", "CREATE on the database for extensions"),
    ("42501", "ALTER TABLE pg_catalog.pg_class ADD i int", "must own"),
    ("42601", "CREATE POLICY IF NOT EXISTS p ON a USING (true)", "has no IF NOT EXISTS"),
    ("42701", "CREATE TABLE a (i int); ALTER TABLE a ADD i int", "ADD COLUMN IF NOT EXISTS"),
    ("42703", "CREATE TABLE a (i int); CREATE INDEX ON a (j)", "ADD COLUMN IF NOT EXISTS first"),
    ("42704", "SELECT current_setting('app.current_tenant_id')", "SET app.current_tenant_id"),
    ("42704", "CREATE TABLE a (t text); CREATE INDEX ON a USING gin (t gin_trgm_ops)", "pg_trgm"),
    ("42704", "CREATE TABLE a (i int); CREATE INDEX ON a USING gist (i)", "btree_gist"),
    ("42704", "CREATE TABLE a (t citext)", "CREATE EXTENSION"),
    ("42704", "CREATE TABLE a (i int); CREATE POLICY p ON a TO nobody USING (true)", "create_database.yml"),
    ("42704", "DROP INDEX never_made", "IF EXISTS"),
    ("42710", "CREATE TABLE a (i int); CREATE POLICY p ON a; CREATE POLICY p ON a", "test pg_policy"),
    ("42804", "CREATE TABLE a (t text); ALTER TABLE a ALTER t TYPE int", "USING column::type"),
    ("42804", "CREATE TABLE a (t text DEFAULT 'x'); ALTER TABLE a ALTER t TYPE int USING 1", "DROP DEFAULT"),
    ("42804", "CREATE TABLE a (i int PRIMARY KEY); CREATE TABLE b (t text REFERENCES a)", "must have the type"),
    ("42830", "CREATE TABLE a (i int); CREATE TABLE b (i int REFERENCES a (i))", "unique constraint"),
    ("42883", "CREATE TABLE a (i uuid DEFAULT gen_uuid_v9())", "its extension is not there"),
    ("42P01", "ALTER TABLE never_made ADD i int", "search_path"),
    ("42P07", "CREATE TABLE a (i int); CREATE TABLE a (i int)", "IF NOT EXISTS"),
    (
        "42P13",
        (
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'; "
            "CREATE OR REPLACE FUNCTION f() RETURNS text LANGUAGE sql AS 'SELECT NULL::text'"
        ),
        "DROP FUNCTION first",
    ),
    (
        "42P13",
        (
            "CREATE FUNCTION f(i int) RETURNS int LANGUAGE sql AS 'SELECT 1'; "
            "CREATE OR REPLACE FUNCTION f(j int) RETURNS int LANGUAGE sql AS 'SELECT 1'"
        ),
        "DROP FUNCTION first",
    ),
    ("42P13", "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT NULL::text'", "do not agree"),
    ("42P16", "CREATE TABLE a (i int PRIMARY KEY); ALTER TABLE a ADD PRIMARY KEY (i)", "DROP CONSTRAINT"),
    ("42P16", "CREATE VIEW v AS SELECT 1 AS a; CREATE OR REPLACE VIEW v AS SELECT 1 AS b", "DROP VIEW first"),
    ("42P16", "CREATE TABLE a (i int); CREATE TABLE b () INHERITS (a); ALTER TABLE b DROP i", "contradicts"),
    (
        "42P17",
        (
            "CREATE TABLE a (i int) PARTITION BY RANGE (i); CREATE TABLE b PARTITION OF a FOR VALUES FROM (0) TO (10);"
            "CREATE TABLE c PARTITION OF a FOR VALUES FROM (5) TO (15)"
        ),
        "DETACH",
    ),
    ("42P17", "CREATE TABLE a (t timestamptz); CREATE INDEX ON a ((t::date))", "AT TIME ZONE"),
    (
        "42P17",
        "CREATE TABLE a (t timestamptz, d date GENERATED ALWAYS AS (t::date) STORED)",
        "AT TIME ZONE",
    ),
    (
        "42P17",
        (
            "CREATE TABLE a (i int); ALTER TABLE a ENABLE ROW LEVEL SECURITY; ALTER TABLE a FORCE ROW LEVEL SECURITY;"
            "CREATE POLICY p ON a USING (EXISTS (SELECT FROM a AS other)); SELECT * FROM a"
        ),
        "SECURITY DEFINER",
    ),
    ("42P17", "CREATE TABLE a (i int) PARTITION BY RANGE ((1))", "say why"),
    (
        "55006",
        (
            "CREATE TABLE a (i int PRIMARY KEY); CREATE TABLE b (i int REFERENCES a DEFERRABLE INITIALLY DEFERRED);"
            "INSERT INTO b VALUES (1); ALTER TABLE b ADD j int"
        ),
        "SET CONSTRAINTS ALL IMMEDIATE",
    ),
    ("55P04", "CREATE TYPE e AS ENUM ('a'); COMMIT; BEGIN; ALTER TYPE e ADD VALUE 'b'; SELECT 'b'::e", "next file"),
    ("57014", "SET LOCAL statement_timeout = '10ms'; SELECT pg_sleep(60)", "statement_timeout"),
    ("57P01", "RESET ROLE; SELECT pg_terminate_backend(pg_backend_pid())", "safe to repeat"),
    ("58P01", "RESET ROLE; COPY pg_class TO '/nowhere/a.csv'", "its own host"),
]


@pytest.fixture
def provoke(new_database, connect, roles):
    """Run statements in a transaction of a role in a database of its own; return what PostgreSQL says in the end."""

    def run(statements, role=roles.owner):
        session = connect(new_database(), role=role)
        session.execute("BEGIN")
        *before, last = statements.split("; ")
        for statement in before:
            session.execute(statement.encode())
        with pytest.raises(psycopg.Error) as caught:
            session.execute(last.encode())
        return caught.value

    return run


@pytest.mark.parametrize(("state", "statements", "helps"), CASES, ids=[case[1][-50:] for case in CASES])
def test_hint_says_what_helps(provoke, state, statements, helps):
    error = provoke(statements)
    assert error.sqlstate == state, error
    assert helps in from_postgres(error, "x").hint


def test_extension_whose_files_are_not_on_the_server(provoke):
    """The state that PostgreSQL has for it differs from major to major."""
    error = provoke("CREATE EXTENSION not_there")
    assert error.sqlstate in ("0A000", "58P01")
    assert "install the contrib package" in from_postgres(error, "x").hint


def test_full_disk(provoke):
    error = provoke("RESET ROLE; COPY (SELECT repeat('x', 1000000)) TO '/dev/full'")
    assert error.sqlstate == "53100"
    assert "Free space" in from_postgres(error, "x").hint


def test_other_sessions_that_use_a_database(new_database, connect, server):
    name = new_database()
    connect(name)
    with pytest.raises(psycopg.errors.ObjectInUse) as caught:
        server.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))
    assert "Other sessions" in from_postgres(caught.value, "x").hint


def test_lock_that_another_session_holds(new_database, connect):
    name = new_database()
    one, other = connect(name), connect(name)
    one.execute("BEGIN; CREATE TABLE a (i int); COMMIT; BEGIN; LOCK a")
    with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
        other.execute("SET lock_timeout = '10ms'; LOCK a")
    assert "end the blocker" in from_postgres(caught.value, "x").hint


def test_two_sessions_that_wait_for_each_other(new_database, connect, ask):
    name = new_database()
    one, other = connect(name), connect(name)
    one.execute("SET deadlock_timeout = '10ms'; CREATE TABLE a (i int); CREATE TABLE b (i int)")
    one.execute("BEGIN; LOCK a")
    other.execute("SET deadlock_timeout = '100s'; BEGIN; LOCK b")
    waits = Background(other.execute, "LOCK a")
    wait_until(lambda: ask(name, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"))
    with pytest.raises(psycopg.errors.DeadlockDetected) as caught:
        one.execute("LOCK b")
    one.execute("ROLLBACK")
    waits.value()
    assert "safe to repeat" in from_postgres(caught.value, "x").hint


def test_no_slot_is_left_and_no_such_database(new_database, cluster, roles, server):
    name = new_database()
    limit = sql.SQL("ALTER DATABASE {} CONNECTION LIMIT {}")
    server.execute(limit.format(sql.Identifier(name), sql.Literal(0)))
    full = refused(engine_connect, as_migrator(cluster, roles, name))
    assert (full.facts["sqlstate"], "CONNECTION LIMIT" in full.hint) == ("53300", True)
    missing = refused(engine_connect, as_migrator(cluster, roles, "never_made"))
    assert (missing.facts["sqlstate"], "setup.yml" in missing.hint) == ("3D000", True)


def test_file_that_fails_comes_with_the_hint_of_its_cause(new_database, apply):
    text = "CREATE TABLE a (i int);\nCREATE VIEW v AS SELECT i FROM a;\nALTER TABLE a ALTER i TYPE text;"
    for head in ("", "-- runbook: no-transaction\n"):
        error = refused(apply, new_database(), [migration(head + text)])
        assert error.hint.startswith("Something is built on the column: drop it")


#: Words of the hints that the tests below the table provoke.
ELSEWHERE = {
    ("0A000", "contrib package"),
    ("58P01", "contrib package"),
    ("53100", "Free space"),
    ("53300", "CONNECTION LIMIT"),
    ("55006", "Other sessions"),
    ("55P03", "end the blocker"),
    ("40P01", "safe to repeat"),
}


def test_each_hint_is_provoked():
    provoked = {(state, helps) for state, _statements, helps in CASES} | ELSEWHERE
    hints = [
        (state, text) for state, hint in HINTS.items() for text in (hint.values() if isinstance(hint, dict) else [hint])
    ]
    assert [hint for hint in hints if not any(hint[0] == state and helps in hint[1] for state, helps in provoked)] == []
