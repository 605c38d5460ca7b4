"""The engine on a real server: one transaction a file, one run at a time, nothing left behind, nothing unsaid."""

from __future__ import annotations

import getpass
import threading
import time

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _statements, _transaction
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._migrate import Options, Outcome, migrate, run_lock
from ansible_collections.settler.runbook.plugins.module_utils._pending import pending_plan
from psycopg import sql

from tests.support import (
    Background,
    as_migrator,
    files,
    migration,
    refused,
    run_module,
    start_module,
    wait_until,
    write_migrations,
)

pytestmark = pytest.mark.every_major

TABLES = """
SELECT array_agg(relname::text ORDER BY relname) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""


#: What holds a database's contents, and its rows without what vacuum, ANALYZE and CREATE INDEX write in passing.
HOLDERS = """
SELECT oid::regclass::text, CASE
    WHEN relkind = 'S' THEN 'ARRAY[last_value::text, is_called::text]'
    WHEN relname = 'pg_class' THEN 'to_jsonb(t) - ''{relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,'
                                   'relminmxid}''::text[]'
    ELSE 'to_jsonb(t)' END
FROM pg_class
WHERE relkind IN ('r', 'm', 'S') AND NOT relisshared AND relname NOT IN ('pg_statistic', 'pg_statistic_ext_data')
"""


@pytest.fixture
def contents(connect):
    """Tell all that a database holds: a sum of the rows of each of its tables, PostgreSQL's own ones included.

    pg_dump would tell less, and it refuses servers that are newer than itself.
    """
    sums_up = "SELECT md5(string_agg(r, ' ' ORDER BY r)) FROM (SELECT ({row})::text AS r FROM {table} AS t) AS rows"

    def sums(dbname, but=()):
        found = {}
        with connect(dbname) as session:
            for table, row in session.execute(HOLDERS).fetchall():
                if table not in but:
                    query = sql.SQL(sums_up).format(row=sql.SQL(row), table=sql.SQL(table))
                    (found[table],) = session.execute(query).fetchone()
        return found

    return sums


# One transaction a file


def test_files_are_applied_in_order_and_once(new_database, apply, ask):
    database = new_database()
    steps = files("CREATE TABLE a (i int);", "INSERT INTO a VALUES (1); INSERT INTO a VALUES (2);", "")
    done = apply(database, steps)
    assert [(step.file, step.statements, step.attempts) for step in done.applied] == [
        ("001_step.sql", 1, 1), ("002_step.sql", 2, 1), ("003_step.sql", 0, 1),
    ]  # fmt: skip
    assert apply(database, steps).applied == []
    assert ask(database, "SELECT count(*) FROM a") == 2
    assert ask(
        database, "SELECT array_agg(DISTINCT pg_get_userbyid(relowner)::text) FROM pg_class WHERE relname = 'a'"
    ) == ["settler_owner"]


def test_failed_file_keeps_what_files_before_it_have_done(new_database, apply, ask):
    database, outcome = new_database(), Outcome()
    steps = files("CREATE TABLE a (i int);", "CREATE TABLE b (i int); SELECT 1/0;", "CREATE TABLE c (i int);")
    error = refused(apply, database, steps, outcome)
    assert "002_step.sql was rolled back and left nothing; this run had applied 001_step.sql before it" in error.message
    assert [step.file for step in outcome.applied] == ["001_step.sql"]
    assert ask(database, TABLES) == ["a"]
    assert ask(database, "SELECT array_agg(file) FROM runbook.migrations") == ["001_step.sql"]
    steps[1] = migration("CREATE TABLE b (i int);", "002_step.sql")
    assert [step.file for step in apply(database, steps).applied] == ["002_step.sql", "003_step.sql"]


WRECKER = """
ALTER TABLE kept ADD COLUMN more int NOT NULL DEFAULT 7;
UPDATE kept SET name = 'changed';
CREATE TABLE other (i int);
CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE INDEX ON kept (more);
CREATE POLICY p ON kept USING (true);
ALTER TABLE kept ENABLE ROW LEVEL SECURITY;
CREATE TYPE mood AS ENUM ('ok');
GRANT ALL ON kept TO PUBLIC;
COMMENT ON TABLE kept IS 'changed';
ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM settler_app;
DROP EXTENSION pgcrypto;
TRUNCATE kept;
INSERT INTO nowhere VALUES (1);
"""


def test_error_in_the_last_statement_of_the_first_run_leaves_everything_as_it_was(
    new_database, connect, roles, apply, contents
):
    database = new_database()
    connect(database, role=roles.owner).execute(
        "CREATE TABLE kept (id serial PRIMARY KEY, name text); INSERT INTO kept (name) VALUES ('one'), ('two')"
    )
    before = contents(database)
    error = refused(apply, database, files(WRECKER))
    assert error.message.startswith("/migrations/001_step.sql:15: ")
    assert error.facts["sqlstate"] == "42P01"
    assert contents(database) == before
    assert not [name for name in before if name.startswith("runbook.")]


def test_error_in_a_later_run_leaves_everything_but_the_event_as_it_was(new_database, apply, ask, contents):
    database = new_database()
    good = files("CREATE TABLE kept (id serial PRIMARY KEY, name text); INSERT INTO kept (name) VALUES ('row');")
    apply(database, good)
    events = ("runbook.events", "runbook.events_id_seq")
    before = contents(database, but=events)
    refused(apply, database, [*good, migration(WRECKER, "002_step.sql")], run_id="run-2")
    assert contents(database, but=events) == before
    event, file, run, detail = ask(
        database,
        "SELECT ARRAY[event, file, run_id, detail::text] FROM runbook.events ORDER BY id DESC LIMIT 1",
    )
    assert (event, file, run) == ("failed", "002_step.sql", "run-2")
    assert '"line": 15' in detail
    assert '"42P01"' in detail


def test_everything_is_parsed_before_anything_is_applied(new_database, apply, ask):
    database = new_database()
    error = refused(apply, database, files("CREATE TABLE a (i int);", "SELECT 1;\nCOMMIT;"))
    assert "002_step.sql:2: transaction control" in error.message
    assert ask(database, TABLES) is None
    assert ask(database, "SELECT to_regnamespace('runbook')") is None


@pytest.mark.parametrize(
    ("text", "line", "sqlstate", "first_line"),
    [
        ("SELECT 1;\n\n-- é\nSELECT\n  'ü',\n  none\nFROM pg_class;", 6, "42703", "SELECT"),
        ("SELECT 'é';\n\n\nSELECT 1/0;", 4, "22012", "SELECT 1/0"),
        ("CREATE TABLE a (i int UNIQUE);\nINSERT INTO a VALUES (1);\n/* two\n lines */\nINSERT INTO a\nVALUES (1);",
         5, "23505", "INSERT INTO a"),
        ("SELECT 1;\nDO $$\nBEGIN\n  RAISE 'no';\nEND $$;", 2, "P0001", "DO $$"),
        ("SELECT 1;\nDO $$\nBEGIN\n  COMMIT;\nEND $$;", 2, "2D000", "DO $$"),
        ("CREATE TABLE a (i int) PARTITION BY LIST (i);\n\nREINDEX TABLE a;", 3, "25001", "REINDEX TABLE a"),
        ("\n\nSELECT 1 FROM 2;", 3, "42601", "SELECT 1 FROM 2"),
    ],
)  # fmt: skip
def test_runtime_error_has_its_line(new_database, apply, text, line, sqlstate, first_line):
    error = refused(apply, new_database(), files(text))
    assert error.message.startswith(f"/migrations/001_step.sql:{line}: ")
    assert error.facts == {
        "file": "/migrations/001_step.sql", "line": line, "sqlstate": sqlstate, "statement": first_line,
        "detail": error.facts["detail"],
    }  # fmt: skip
    assert f"statement: {first_line}" in error.message
    assert error.hint


def test_detail_and_hint_of_postgres_are_told(new_database, apply):
    error = refused(apply, new_database(), files("CREATE TABLE a (i int UNIQUE); INSERT INTO a VALUES (1), (1);"))
    assert "DETAIL: Key (i)=(1) already exists." in error.message
    assert error.facts["detail"] == "Key (i)=(1) already exists."


def test_deferred_constraint_fails_the_file_at_commit(new_database, apply, ask):
    database = new_database()
    text = """CREATE TABLE a (i int PRIMARY KEY);
        CREATE TABLE b (i int REFERENCES a DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO b VALUES (1);"""
    error = refused(apply, database, files(text))
    assert error.message.startswith("/migrations/001_step.sql: COMMIT failed")
    assert (error.facts["sqlstate"], error.facts["statement"]) == ("23503", "COMMIT")
    assert ask(database, TABLES) is None
    assert ask(database, "SELECT to_regnamespace('runbook')") is None


def test_text_is_sent_as_it_is(new_database, apply, ask):
    database = new_database()
    apply(database, files(r"CREATE TABLE a AS SELECT '%s %(x)s {} $1 \' AS t, E'\'' AS q, 5 % 3 AS m, 'ü漢😀' AS u;"))
    assert ask(database, "SELECT ARRAY[t, q, m::text, u] FROM a") == ["%s %(x)s {} $1 \\", "'", "2", "ü漢😀"]


# Session state

LEAVES = """
CREATE TABLE public.leaves (i int);
SET search_path = pg_catalog;
SET lock_timeout = '1ms';
SET statement_timeout = '1h';
SELECT set_config('standard_conforming_strings', 'off', false);
SET default_transaction_read_only = on;
SET row_security = off;
SET app.current_tenant_id = 'x';
CREATE TEMP TABLE temporary (i int);
PREPARE prepared AS SELECT 1;
DECLARE held CURSOR WITH HOLD FOR SELECT 1;
LISTEN channel;
SELECT pg_advisory_lock(1);
SET ROLE settler_app;
"""
FINDS = """
CREATE TABLE finds (i int);
DO $$
BEGIN
  ASSERT current_user = 'settler_owner', current_user;
  ASSERT current_setting('search_path') = 'public', current_setting('search_path');
  ASSERT current_setting('lock_timeout') = '2s', current_setting('lock_timeout');
  ASSERT current_setting('statement_timeout') = '0', current_setting('statement_timeout');
  ASSERT current_setting('standard_conforming_strings') = 'on';
  ASSERT current_setting('transaction_read_only') = 'off';
  ASSERT current_setting('row_security') = 'on';
  ASSERT coalesce(current_setting('app.current_tenant_id', true), '') = '', 'tenant';
  ASSERT to_regclass('pg_temp.temporary') IS NULL, 'temporary table';
  ASSERT NOT EXISTS (SELECT FROM pg_prepared_statements WHERE name = 'prepared'), 'prepared statement';
  ASSERT NOT EXISTS (SELECT FROM pg_cursors WHERE name = 'held'), 'cursor';
  ASSERT NOT EXISTS (SELECT FROM pg_listening_channels()), 'channel';
  ASSERT (SELECT relowner::regrole::text FROM pg_class WHERE relname = 'finds') = 'settler_owner';
END
$$;
"""


def test_no_state_of_a_session_reaches_the_next_file_or_the_ledger(new_database, apply, ask):
    database = new_database()
    apply(database, files(LEAVES, FINDS))
    assert ask(database, TABLES) == ["finds", "leaves"]
    assert ask(database, "SELECT array_agg(file ORDER BY file) FROM runbook.migrations") == [
        "001_step.sql",
        "002_step.sql",
    ]
    assert ask(database, "SELECT array_agg(DISTINCT applied_as) FROM runbook.migrations") == ["settler_owner"]


@pytest.mark.parametrize(
    "command", ["SET ROLE settler_app", "SET LOCAL ROLE settler_app", "RESET ROLE", "SET ROLE NONE"]
)
def test_file_may_change_its_role_and_the_ledger_is_still_the_owners(new_database, apply, ask, command):
    database = new_database()
    before, after = "CREATE TABLE a (who text); GRANT INSERT ON a TO PUBLIC;", "INSERT INTO a VALUES (current_user);"
    apply(database, files(f"{before} {command}; {after}"))
    assert ask(database, "SELECT who FROM a") in ("settler_app", "settler_migrator")
    assert ask(database, "SELECT applied_as FROM runbook.migrations") == "settler_owner"
    assert ask(
        database, "SELECT array_agg(DISTINCT relowner::regrole::text) FROM pg_class WHERE relname = 'migrations'"
    ) == ["settler_owner"]


def test_ledger_is_the_logins_own_where_no_role_is_set(new_database, connect, roles, apply, ask):
    database = new_database()
    connect(database).execute(
        sql.SQL("GRANT CREATE ON DATABASE {} TO settler_migrator").format(sql.Identifier(database))
    )
    apply(database, files("SET ROLE settler_app;"), role=None)
    assert ask(database, "SELECT applied_as FROM runbook.migrations") == "settler_migrator"


def test_settings_of_role_and_database_do_not_cut_a_run_short(new_database, connect, apply):
    database = new_database()
    with connect(database) as admin:
        for setting in ("statement_timeout = '50ms'", "lock_timeout = '1ms'", "search_path = pg_catalog"):
            admin.execute(sql.SQL("ALTER DATABASE {} SET " + setting).format(sql.Identifier(database)))
    assert len(apply(database, files("CREATE TABLE a (i int); SELECT pg_sleep(0.2);")).applied) == 1


def test_lock_that_a_file_gives_away_stops_the_run_before_the_next_file(new_database, apply, ask):
    database = new_database()
    error = refused(apply, database, files("SELECT pg_advisory_unlock_all();", "CREATE TABLE a (i int);"))
    assert "lock is gone" in error.message
    assert ask(database, TABLES) is None


def test_ledger_that_cannot_be_written_fails_the_file_by_its_name(new_database, apply, ask):
    database = new_database()
    error = refused(apply, database, files("SET TRANSACTION READ ONLY;"))
    assert "001_step.sql" in error.message
    assert error.facts["sqlstate"] == "25006"


def test_next_file_that_cannot_be_opened_is_no_failure_of_the_one_before(new_database, apply, ask):
    """The transaction of the next file is opened in the round trip of the COMMIT."""
    database, done = new_database(), Outcome()
    steps = files("CREATE TABLE a (i int);", "-- runbook: role=nobody_of_this_name\nCREATE TABLE b (i int);")
    assert refused(apply, database, steps, outcome=done).message.startswith(
        "/migrations/002_step.sql: the transaction could not be opened"
    )
    assert [step.file for step in done.applied] == ["001_step.sql"]
    assert ask(database, "SELECT array_agg(file || ' ' || state) FROM runbook.migrations") == ["001_step.sql applied"]
    assert ask(database, TABLES) == ["a"]
    assert ask(database, "SELECT event || ' ' || file FROM runbook.events ORDER BY id DESC LIMIT 1") == (
        "failed 002_step.sql"
    )


def test_file_costs_one_round_trip_more_than_its_statements(new_database, apply, monkeypatch):
    sent, counts, execute = [], [], psycopg.Cursor.execute

    def counting(self, query, *rest, **more):
        sent.append(query)
        return execute(self, query, *rest, **more)

    monkeypatch.setattr(psycopg.Cursor, "execute", counting)
    for number in (10, 20):
        database, before = new_database(), len(sent)
        tables = [f"CREATE TABLE t{i} (i int); CREATE INDEX ON t{i} (i);" for i in range(number)]
        apply(database, files(*tables), analyze=False, refresh=False)
        counts.append(len(sent) - before)
    assert counts[1] - counts[0] == 10 * (2 + 1)


def test_percent_signs_are_no_parameters(new_database, apply, ask):
    database = new_database()
    apply(database, files("CREATE TABLE a (i int);"), run_id="100%s", schema="run%b")
    assert ask(database, 'SELECT run_id FROM "run%b".migrations') == "100%s"
    steps = migration("-- runbook: no-transaction\nINSERT INTO a VALUES (1);\nSELECT 1 / 0;", "002_steps.sql")
    refused(apply, database, [*files("CREATE TABLE a (i int);"), steps], schema="run%b")
    assert ask(database, 'SELECT event FROM "run%b".events ORDER BY id DESC LIMIT 1') == "failed"


# What the parser cannot see


@pytest.fixture
def blind_parser(monkeypatch):
    """A parser that is older than the server: it knows no statement."""

    def fail(_text):
        raise _statements.ParseError("syntax error", 0)

    monkeypatch.setattr(_statements.pglast, "parse_sql", fail)


def test_unknown_grammar_is_applied_with_a_warning_for_each_statement(blind_parser, new_database, apply, ask):
    database = new_database()
    done = apply(database, files("CREATE TABLE a (i int);\nINSERT INTO a VALUES (1);"))
    assert [step.statements for step in done.applied] == [2]
    assert [warning.split(": ")[0] for warning in done.warnings] == ["001_step.sql:1", "001_step.sql:2"]
    assert "sent unchecked" in done.warnings[0]
    assert ask(database, "SELECT count(*) FROM a") == 1


def test_error_in_unknown_grammar_has_its_line_where_postgres_gives_one(blind_parser, new_database, apply, ask):
    database = new_database()
    error = refused(apply, database, files("\n-- ü\nCREATE TABLE a (i int);\nSELECT none;"))
    assert error.message.startswith("/migrations/001_step.sql:4: ")
    assert ask(database, TABLES) is None


@pytest.mark.parametrize(
    "ending",
    [
        "COMMIT;",
        "ROLLBACK;",
        "COMMIT; CREATE TABLE b (i int);",
        "COMMIT; BEGIN; CREATE TABLE b (i int);",
        "ROLLBACK; BEGIN; CREATE TABLE b (i int);",
    ],
)
def test_hidden_end_of_the_transaction_is_caught(blind_parser, new_database, apply, ask, ending):
    database = new_database()
    error = refused(apply, database, files(f"CREATE TABLE a (i int); {ending}", "CREATE TABLE c (i int);"))
    assert "/migrations/001_step.sql: the file ended its transaction" in error.message
    assert "c" not in (ask(database, TABLES) or [])
    assert ask(database, "SELECT to_regnamespace('runbook')") is None


@pytest.mark.parametrize("ending", ["COMMIT; SELECT 1/0;", "COMMIT; BEGIN; SELECT 1/0;"])
def test_error_after_a_hidden_commit_does_not_claim_that_nothing_is_left(
    blind_parser, new_database, apply, ask, ending
):
    database = new_database()
    error = refused(apply, database, files(f"CREATE TABLE a (i int); {ending}"))
    assert ask(database, TABLES) == ["a"]
    assert "/migrations/001_step.sql" in error.message
    assert "left nothing" not in error.message
    assert "ended its transaction" in error.message


def test_hidden_copy_from_stdin_fails_with_the_files_name_and_leaves_nothing(blind_parser, new_database, apply, ask):
    database = new_database()
    error = refused(apply, database, files("CREATE TABLE a (i int); COPY a FROM STDIN;"))
    assert "/migrations/001_step.sql" in error.message
    wait_until(lambda: ask(database, TABLES) is None)


# One run at a time


@pytest.mark.parametrize("number", range(4))
def test_two_runs_at_once_on_a_fresh_database_apply_everything_once(new_database, apply, ask, number):
    database = new_database()
    steps = files(
        "CREATE TABLE a (i int); SELECT pg_sleep(0.02);", "INSERT INTO a VALUES (1);", "CREATE TABLE b (i int);"
    )
    barrier = threading.Barrier(2)

    def run(run_id):
        barrier.wait()
        return len(apply(database, steps, run_id=run_id).applied)

    runs = [Background(run, "one"), Background(run, "two")]
    assert sorted(run.value() for run in runs) == [0, 3]
    assert ask(database, "SELECT count(*) FROM a") == 1
    assert ask(database, "SELECT count(DISTINCT run_id) FROM runbook.migrations") == 1


def test_lock_held_elsewhere_names_its_holder_and_gives_up_after_the_wait(cluster, roles, new_database, apply, ask):
    database = new_database()
    other = Options(run_id="other", role=roles.owner)
    with (
        engine_connect(as_migrator(cluster, roles, database), application="runbook:other:migrate") as session,
        run_lock(session, other) as held,
    ):
        held()
        began = time.monotonic()
        error = refused(apply, database, files("CREATE TABLE a (i int);"), lock_wait=0.3)
        assert time.monotonic() - began >= 0.3
        assert f"pid {session.info.backend_pid}" in error.message
        assert "settler_migrator" in error.message
        assert "runbook:other:migrate" in error.message
        assert apply(database, [], project="another").applied == []
    assert ask(database, TABLES) is None
    assert len(apply(database, files("CREATE TABLE a (i int);")).applied) == 1


def test_lock_is_free_after_a_run_that_failed_on_the_same_connection(cluster, roles, new_database):
    database, options = new_database(), Options(run_id="r", role=roles.owner, lock_wait=0)
    params = as_migrator(cluster, roles, database)
    with engine_connect(params) as session, engine_connect(params) as other:
        refused(migrate, session, files("SELECT 1/0;"), options, Outcome())
        migrate(other, files("CREATE TABLE a (i int);"), options, Outcome())


# Other sessions in the way


@pytest.fixture
def busy(new_database, connect, roles, apply):
    """A database with a table, and a session of the application that holds it in an open transaction."""
    database = new_database()
    apply(database, files("CREATE TABLE a (i int);"))
    blocker = connect(database, user=roles.app)
    blocker.execute("SET application_name = 'billing'; BEGIN; SELECT * FROM a")
    return database, blocker


STEP = [*files("CREATE TABLE a (i int);"), migration("ALTER TABLE a ADD COLUMN j int;", "002_step.sql")]


def test_ddl_behind_an_open_transaction_lands_when_that_ends(busy, apply, ask):
    database, blocker = busy
    outcome = Outcome()
    run = Background(lambda: apply(database, STEP, outcome, lock_timeout=0.5, lock_attempts=50))
    wait_until(lambda: outcome.blockers)
    assert outcome.blockers[0]["pid"] == blocker.info.backend_pid
    blocker.execute("COMMIT")
    (applied,) = run.value().applied
    assert applied.attempts > 1
    assert ask(database, "SELECT attempts FROM runbook.migrations WHERE file = '002_step.sql'") == applied.attempts


def test_ddl_gives_up_after_its_attempts_and_says_who_was_in_the_way(busy, apply, ask):
    database, blocker = busy
    error = refused(apply, database, STEP, lock_timeout=1, lock_attempts=2)
    assert error.facts["sqlstate"] == "55P03"
    assert error.message.startswith("/migrations/002_step.sql:1: ")
    told = next(line for line in error.message.splitlines() if "blocked by" in line)
    assert f"pid {blocker.info.backend_pid} (settler_app" in told
    assert ask(database, "SELECT array_agg(file) FROM runbook.migrations") == ["001_step.sql"]
    assert ask(database, "SELECT count(*) FROM runbook.events WHERE event = 'failed'") == 1


def test_blocker_is_told_with_its_application_and_query(busy, apply):
    database, _blocker = busy
    error = refused(apply, database, STEP, lock_timeout=2, lock_attempts=1)
    told = next(line for line in error.message.splitlines() if "blocked by" in line)
    assert "billing" in told
    assert "idle in transaction" in told
    assert "SELECT * FROM a" in told


def test_readers_wait_no_longer_than_the_lock_timeout(busy, connect, roles, apply):
    database, _blocker = busy
    reader = connect(database, user=roles.app)
    run = Background(lambda: refused(apply, database, STEP, lock_timeout=0.2, lock_attempts=2))
    slowest = 0.0
    while run.is_alive():
        began = time.monotonic()
        reader.execute("SELECT * FROM a")
        slowest = max(slowest, time.monotonic() - began)
    assert run.value().facts["sqlstate"] == "55P03"
    assert slowest < 0.2 + 5  # the blocker has no end of its own; how near it is to the timeout, the bench measures


# The ledger


def test_ledger_tells_who_applied_what_when_and_where(cluster, new_database, apply, connect, ask):
    database = new_database()
    (step,) = steps = files("CREATE TABLE a (i int); SELECT pg_sleep(0.05);")
    apply(database, steps, run_id="20261123t031500-4f2a")
    with connect(database) as session, session.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute(
            "SELECT *, lsn_after > lsn_before AS moved, clock_timestamp() - applied_at < interval '1 minute' AS new, "
            "(SELECT system_identifier::text FROM pg_control_system()) AS here FROM runbook.migrations"
        ).fetchone()
    assert found["file"] == "001_step.sql"
    assert (found["version"], found["name"]) == ("001", "step")
    assert (found["checksum"], found["checksum_algorithm"]) == (step.checksum, "sha256-lf")
    assert (found["applied_by"], found["applied_as"]) == ("settler_migrator", "settler_owner")
    assert found["os_user"] == getpass.getuser()
    assert found["run_id"] == "20261123t031500-4f2a"
    assert found["database_name"] == database
    assert found["system_identifier"] == found["here"]
    assert found["server_version"].startswith(str(cluster.state.major))
    assert 50 <= found["duration_ms"] < 5000
    assert (found["statements"], found["attempts"]) == (2, 1)
    assert found["moved"]
    assert found["new"]
    assert ask(database, "SELECT ARRAY[event, file, run_id, by_user] FROM runbook.events") == [
        "applied", "001_step.sql", "20261123t031500-4f2a", "settler_migrator",
    ]  # fmt: skip


@pytest.mark.parametrize("schema", ["runbook", 'led"ger % x'])
@pytest.mark.parametrize("change", ["DELETE FROM {}", "TRUNCATE {}", "UPDATE {} SET event = 'failed'"])
def test_events_are_only_added_to(new_database, apply, ask, connect, schema, change):
    database = new_database()
    apply(database, files("SELECT 1;"), schema=schema)
    events = sql.Identifier(schema, "events")
    with connect(database, role="settler_owner") as owner, pytest.raises(psycopg.errors.RestrictViolation) as caught:
        owner.execute(sql.SQL(change).format(events))
    assert caught.value.diag.message_primary == f"{schema}.events is history: it is only added to"
    assert ask(database, sql.SQL("SELECT array_agg(event) FROM {}").format(events)) == ["applied"]


def test_ledger_may_live_in_any_schema(new_database, apply, ask):
    database = new_database()
    apply(database, files("SELECT 1;"), schema='led"ger x')
    assert ask(database, 'SELECT count(*) FROM "led""ger x".migrations') == 1
    assert apply(database, files("SELECT 1;"), schema='led"ger x').applied == []


def test_changed_missing_and_older_files_stop_the_run_before_anything_is_applied(new_database, apply, ask):
    database = new_database()
    first, third = files("SELECT 1;", "SELECT 2;", "SELECT 3;")[::2]
    apply(database, [first, third])
    fourth = migration("CREATE TABLE a (i int);", "004_step.sql")
    changed = migration("SELECT 11;", "001_step.sql")
    second = migration("CREATE TABLE b (i int);", "002_step.sql")
    assert "001_step.sql: changed" in refused(apply, database, [changed, third, fourth]).message
    assert "001_step.sql: applied at" in refused(apply, database, [third, fourth]).message
    assert "older" in refused(apply, database, [first, second, third, fourth]).message
    assert ask(database, TABLES) is None
    assert len(apply(database, [first, second, third, fourth], out_of_order=True).applied) == 2


# Check mode


def test_without_a_database_everything_is_pending():
    steps = files("SELECT 1;", "SELECT 2;")
    assert list(pending_plan(None, steps, Options(run_id="r")).pending) == steps


def test_plan_needs_no_right_to_write_and_writes_nothing(cluster, roles, new_database, apply, contents):
    database = new_database()
    steps = files("SELECT 1;", "SELECT 2;")
    apply(database, steps[:1])
    before = contents(database)
    with engine_connect(as_migrator(cluster, roles, database)) as session:
        session.execute("SET default_transaction_read_only = on")
        todo = pending_plan(session, steps, Options(run_id="r"))
    assert [file.file for file in todo.pending] == ["002_step.sql"]
    assert contents(database) == before


def test_module_plans_for_a_database_that_does_not_exist(cluster, roles, tmp_path, ask):
    write_migrations(tmp_path, {"001_a.sql": "SELECT 1;"})
    arguments = {**as_migrator(cluster, roles, "not_there_yet"), "directory": str(tmp_path), "run_id": "r"}
    planned = run_module("migrate", arguments, check=True)
    assert (planned["changed"], planned["head"]) == (True, "001")
    assert [step["file"] for step in planned["applied"]] == ["001_a.sql"]
    assert "001_a.sql" in planned["diff"]["after"]
    failed = run_module("migrate", arguments)
    assert failed["failed"]
    assert failed["sqlstate"] == "3D000"
    assert ask("postgres", "SELECT count(*) FROM pg_database WHERE datname = 'not_there_yet'") == 0


# Killed


def test_backend_that_is_killed_in_mid_file_leaves_nothing_and_the_next_run_succeeds(new_database, apply, ask):
    database = new_database()
    slow = "CREATE TABLE a (i int);\nINSERT INTO a VALUES (1);\nSELECT pg_sleep(60);"
    run = Background(lambda: refused(apply, database, files(slow)))
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'runbook:run-1:migrate' AND query = %s"
    )
    wait_until(lambda: ask(database, kill, "SELECT pg_sleep(60)"))
    error = run.value()
    assert error.message.startswith("/migrations/001_step.sql:3: ")
    assert "terminating connection" in error.message
    assert error.facts["sqlstate"] == "57P01"
    assert ask(database, TABLES) is None
    assert len(apply(database, files(slow.replace("60", "0"))).applied) == 1


EVENTS = "SELECT array_agg(concat_ws(' ', event, file, detail->>'sqlstate') ORDER BY id) FROM runbook.events"


@pytest.mark.parametrize(
    ("text", "sqlstate"),
    [
        ("RESET ROLE; SELECT pg_terminate_backend(pg_backend_pid());", "57P01"),
        ("-- runbook: role=nobody_of_this_name\nSELECT 1;", "22023"),
        ("-- runbook: no-transaction role=nobody_of_this_name\nVACUUM a;", "22023"),
        ("-- runbook: no-transaction\nRESET ROLE; SELECT pg_terminate_backend(pg_backend_pid());", "57P01"),
    ],
)
def test_each_failure_is_in_the_events_with_its_sqlstate(new_database, apply, ask, text, sqlstate):
    database = new_database()
    refused(apply, database, files("CREATE TABLE a (i int);", text))
    assert ask(database, EVENTS) == ["applied 001_step.sql", f"failed 002_step.sql {sqlstate}"]


def test_connection_that_breaks_at_commit_is_followed_by_the_truth(new_database, apply, ask, connect):
    database = new_database()
    connect(database).execute(
        """CREATE FUNCTION ends() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
           'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(1); RETURN NULL; END'"""
    )
    deferred = """CREATE TABLE b (i int);
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON b DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
            EXECUTE FUNCTION ends();
        INSERT INTO b VALUES (1);"""
    error = refused(apply, database, files("CREATE TABLE a (i int);", deferred))
    assert "002_step.sql: the connection broke at COMMIT: the file was rolled back and left nothing" in error.message
    assert error.facts["ambiguous"] is False
    assert ask(database, TABLES) == ["a"]


def test_connection_that_breaks_after_the_commit_is_followed_by_the_truth(new_database, apply, ask, monkeypatch):
    database, real = new_database(), _transaction._commit

    def breaks(work, *arguments):
        real(work, *arguments)
        ask(database, "SELECT pg_terminate_backend(%s)", work.connection.info.backend_pid)
        work.connection.execute("SELECT 1")

    monkeypatch.setattr(_transaction, "_commit", breaks)
    error = refused(apply, database, files("CREATE TABLE a (i int);"))
    assert "001_step.sql: the connection broke at COMMIT: the file is applied" in error.message
    assert ask(database, "SELECT state FROM runbook.migrations") == "applied"


def test_runner_that_is_killed_in_mid_file_leaves_nothing_and_the_next_run_succeeds(
    cluster, roles, tmp_path, new_database, apply, ask
):
    """The backend sees within a second that its runner is gone; its statement would take ten minutes."""
    database = new_database()
    slow = """CREATE TABLE b (i int);
        SELECT pg_sleep(CASE current_setting('application_name') WHEN 'runbook:dies:migrate' THEN 600 ELSE 0 END);"""
    steps = write_migrations(tmp_path, {"001_a.sql": "CREATE TABLE a (i int);", "002_b.sql": slow})
    arguments = {
        **as_migrator(cluster, roles, database),
        "directory": str(tmp_path),
        "run_id": "dies",
        "set_role": roles.owner,
    }
    runner = start_module("migrate", arguments)
    busy = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE application_name = 'runbook:dies:migrate' AND wait_event = 'PgSleep'"
    )
    wait_until(lambda: ask(database, busy))
    runner.kill()
    runner.wait()
    assert [step.file for step in apply(database, steps).applied] == ["002_b.sql"]
    assert ask(database, "SELECT array_agg(run_id ORDER BY file) FROM runbook.migrations") == ["dies", "run-1"]
    assert ask(database, busy) == 0


# Bytes


def test_bytes_reach_the_server_as_they_are_meant(tmp_path, new_database, apply, ask):
    database = new_database()
    body = "CREATE FUNCTION f() RETURNS text LANGUAGE plpgsql AS $$\nBEGIN\n  RETURN 'ü';\nEND $$;\n"
    write_migrations(
        tmp_path,
        {"001_mark.sql": b"\xef\xbb\xbfCREATE TABLE a (i int);", "002_crlf.sql": body.replace("\n", "\r\n").encode()},
    )
    apply(database, read_migrations(tmp_path))
    assert ask(database, "SELECT f()") == "ü"
    assert "\r" not in ask(database, "SELECT prosrc FROM pg_proc WHERE proname = 'f'")
    write_migrations(tmp_path, {"001_mark.sql": "CREATE TABLE a (i int);", "002_crlf.sql": body})
    assert apply(database, read_migrations(tmp_path)).applied == []


def test_nul_byte_stops_the_module_before_anything_is_applied(cluster, roles, tmp_path, new_database, ask):
    database = new_database()
    write_migrations(tmp_path, {"001_a.sql": "CREATE TABLE a (i int);"})
    (tmp_path / "002_b.sql").write_bytes(b"SELECT 1;\nCREATE TABLE b (i int);\0 SELECT 1/0;")
    result = run_module(
        "migrate",
        {**as_migrator(cluster, roles, database), "directory": str(tmp_path), "run_id": "r", "set_role": roles.owner},
    )
    assert result["failed"]
    assert f"{tmp_path}/002_b.sql:2: NUL byte" in result["msg"]
    assert ask(database, TABLES) is None
