"""Files that cannot be one transaction: journal, resume, probes and repair, on a real server."""

from __future__ import annotations

import threading

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._run import Outcome
from ansible_collections.settler.runbook.plugins.module_utils._statements import parse

from tests.support import as_migrator, migration, refused, run_module, start_module, wait_until, write_migrations

pytestmark = pytest.mark.every_major

HEAD = "-- runbook: no-transaction\n"
TABLE = migration(
    "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT g, g FROM generate_series(1, 100) g;"
)
INVALID = "SELECT array_agg(indexrelid::regclass::text ORDER BY 1) FROM pg_index WHERE NOT indisvalid"
JOURNAL = "SELECT array_agg(statement || ' ' || state ORDER BY statement) FROM runbook.journal"


def step(text, number=2, name="step"):
    return migration(HEAD + text, f"{number:03d}_{name}.sql")


def test_index_is_built_concurrently_and_journaled(new_database, apply, ask):
    database = new_database()
    files = [TABLE, step("CREATE INDEX CONCURRENTLY i ON t (v);\nINSERT INTO t VALUES (0, 0);\nVACUUM t;")]
    done = apply(database, files)
    assert [(one.file, one.statements) for one in done.applied] == [("001_test.sql", 2), ("002_step.sql", 3)]
    assert ask(database, JOURNAL) == ["1 done", "2 done", "3 done"]
    assert ask(database, "SELECT array_agg(state) FROM runbook.migrations") == ["applied", "applied"]
    assert ask(database, "SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE relname = 'i'") == "settler_owner"
    assert apply(database, files).applied == []


def test_statement_that_refuses_a_transaction_needs_the_directive():
    with pytest.raises(RunbookError) as caught:
        parse(migration("SELECT 1;\nCREATE INDEX CONCURRENTLY i ON t (v);", "002_x.sql"))
    assert "002_x.sql:2: CREATE INDEX CONCURRENTLY" in caught.value.message
    assert "-- runbook: no-transaction" in caught.value.hint


def test_set_local_outside_a_transaction_is_refused(new_database, apply):
    error = refused(apply, new_database(), [TABLE, step("SET LOCAL work_mem = '1MB';\nVACUUM t;")])
    assert "002_step.sql:2: SET LOCAL outside a transaction does nothing" in error.message


def test_failure_resumes_at_the_statement_that_failed(new_database, apply, ask):
    database = new_database()
    text = "INSERT INTO t VALUES (1000, 1);\nSET search_path = other, public;\nSELECT 1/0;\nCREATE TABLE late (i int);"
    error = refused(apply, database, [TABLE, step(text)])
    assert "002_step.sql:4: division by zero" in error.message
    assert "2 of 4 statements of 002_step.sql are done; the next run goes on at this one" in error.message
    assert ask(database, "SELECT state FROM runbook.migrations WHERE file = '002_step.sql'") == "running"
    done = apply(database, [TABLE, step(text.replace("1/0", "1"))], run_id="run-2")
    assert [one.file for one in done.applied] == ["002_step.sql"]
    assert ask(database, "SELECT count(*) FROM t WHERE id = 1000") == 1
    assert ask(database, "SELECT array_agg(event ORDER BY id) FROM runbook.events") == ["applied", "failed", "applied"]


def test_session_settings_hold_for_the_statements_after_a_resume(new_database, connect, apply, ask):
    database = new_database()
    with connect(database) as session:
        session.execute("CREATE SCHEMA other AUTHORIZATION settler_owner")
    text = "SET search_path = other;\nSELECT {};\nCREATE TABLE made (i int);"
    refused(apply, database, [TABLE, step(text.format("1/0"))])
    apply(database, [TABLE, step(text.format("1"))])
    assert ask(database, "SELECT to_regclass('other.made') IS NOT NULL")


def test_statement_that_is_done_must_not_be_rewritten(new_database, apply):
    database = new_database()
    refused(apply, database, [TABLE, step("INSERT INTO t VALUES (1000, 1);\nSELECT 1/0;")])
    error = refused(apply, database, [TABLE, step("INSERT INTO t VALUES (1001, 1);\nSELECT 1;")])
    assert "statement 1 was done by run run-1 and has been changed since" in error.message


def test_failed_unique_index_leaves_nothing_invalid(new_database, apply, ask):
    database = new_database()
    files = [TABLE, step("CREATE UNIQUE INDEX CONCURRENTLY u ON t ((v % 10));")]
    outcome = Outcome()
    error = refused(apply, database, files, outcome)
    assert "(SQLSTATE 23505)" in error.message
    assert ask(database, INVALID) is None
    assert outcome.repaired == ["index public.u"]
    assert ask(database, "SELECT count(*) FROM runbook.events WHERE event = 'repaired'") == 1


@pytest.mark.parametrize("clause", ["", "IF NOT EXISTS"])
def test_invalid_index_of_somebody_else_is_built_anew(new_database, connect, apply, ask, clause):
    database = new_database()
    apply(database, [TABLE])
    with connect(database, role="settler_owner") as session, pytest.raises(psycopg.errors.UniqueViolation):
        session.execute("CREATE UNIQUE INDEX CONCURRENTLY i ON t ((v % 10))")
    assert ask(database, INVALID) == ["i"]
    files = [TABLE, step(f"CREATE INDEX CONCURRENTLY {clause} i ON t (v);")]
    error = refused(apply, database, files, repair_invalid=False)
    assert "002_step.sql:2: there is an index public.i already, and it is invalid" in error.message
    apply(database, files)
    assert ask(database, INVALID) is None
    assert ask(database, "SELECT pg_get_indexdef('i'::regclass)").endswith("(v)")


def test_index_that_a_killed_run_has_left_invalid_is_dropped_and_built(
    cluster, roles, tmp_path, new_database, connect, ask
):
    database = new_database()
    write_migrations(tmp_path, {"001_t.sql": TABLE.text})
    arguments = {
        **as_migrator(cluster, roles, database),
        "directory": str(tmp_path),
        "run_id": "run-1",
        "set_role": roles.owner,
    }
    assert run_module("migrate", arguments)["changed"]
    write_migrations(tmp_path, {"002_i.sql": HEAD + "CREATE INDEX CONCURRENTLY i ON t (v);"})
    with connect(database) as blocker:
        blocker.execute("BEGIN; UPDATE t SET v = v WHERE id = 1")
        process = start_module("migrate", arguments)
        pid = wait_until(
            lambda: ask(
                database,
                "SELECT pid FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONC%' AND wait_event_type = 'Lock'",
            )
        )
        process.kill()
        process.communicate()
        ask(database, "SELECT pg_terminate_backend(%s)", pid)
        wait_until(lambda: ask(database, "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid) == 0)
        blocker.execute("ROLLBACK")
    assert ask(database, INVALID) == ["i"]
    assert ask(database, JOURNAL) == ["1 running"]
    result = run_module("migrate", {**arguments, "run_id": "run-2"})
    assert not result.get("failed"), result["msg"]
    assert ask(database, INVALID) is None
    assert ask(database, JOURNAL) == ["1 done"]


def test_index_that_was_finished_after_its_runner_died_counts_as_done(new_database, connect, apply, ask):
    database = new_database()
    files = [TABLE, step("CREATE INDEX CONCURRENTLY i ON t (v);")]
    apply(database, files)
    with connect(database) as session:
        session.execute("UPDATE runbook.migrations SET state = 'running' WHERE file = '002_step.sql'")
        session.execute("UPDATE runbook.journal SET state = 'running'")
    assert [one.file for one in apply(database, files).applied] == ["002_step.sql"]
    assert ask(database, JOURNAL) == ["1 done"]


def test_statement_of_which_nobody_knows_stops_the_run(new_database, connect, apply, ask):
    database = new_database()
    text = "DO $$ BEGIN INSERT INTO t VALUES (1000, 1); COMMIT; PERFORM pg_sleep(0); END $$;"
    files = [TABLE, step(text)]
    apply(database, files)
    assert ask(database, "SELECT count(*) FROM t WHERE id = 1000") == 1
    with connect(database) as session:
        session.execute("UPDATE runbook.migrations SET state = 'running' WHERE file = '002_step.sql'")
        session.execute("UPDATE runbook.journal SET state = 'running'")
    error = refused(apply, database, files)
    assert "002_step.sql:2: run run-1 has begun this statement" in error.message
    assert "repair_action=done" in error.hint


def test_partition_is_detached_concurrently_and_finished_after_an_interruption(new_database, connect, apply, ask):
    database = new_database()
    parts = migration(
        "CREATE TABLE p (id int) PARTITION BY RANGE (id); CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (1) TO (10);"
    )
    files = [parts, step("ALTER TABLE p DETACH PARTITION p1 CONCURRENTLY;")]
    apply(database, [parts])
    with connect(database) as reader:
        reader.execute("BEGIN; SELECT * FROM p")
        error = refused(apply, database, files, long_lock_timeout=0.2, lock_attempts=1)
        assert "SQLSTATE 55P03" in error.message
        assert ask(database, "SELECT inhdetachpending FROM pg_inherits WHERE inhrelid = 'p1'::regclass") is True
    apply(database, files)
    assert ask(database, "SELECT count(*) FROM pg_inherits WHERE inhrelid = 'p1'::regclass") == 0


def test_long_commands_wait_longer_than_the_short_timeout(new_database, connect, apply, ask):
    database = new_database()
    apply(database, [TABLE])
    with connect(database) as writer:
        writer.execute("BEGIN; UPDATE t SET v = v WHERE id = 1")
        threading.Timer(1.0, lambda: writer.execute("COMMIT")).start()
        done = apply(
            database, [TABLE, step("CREATE INDEX CONCURRENTLY i ON t (v);")], lock_timeout=0.1, lock_attempts=1
        )
    assert done.applied[0].attempts == 1
    assert ask(database, INVALID) is None


def test_value_of_an_enum_can_be_used_by_the_next_statement(new_database, apply, ask):
    database = new_database()
    files = [
        migration("CREATE TYPE e AS ENUM ('a'); CREATE TABLE x (v e);"),
        step("ALTER TYPE e ADD VALUE 'b';\nINSERT INTO x VALUES ('b');"),
    ]
    apply(database, files)
    assert ask(database, "SELECT v::text FROM x") == "b"
