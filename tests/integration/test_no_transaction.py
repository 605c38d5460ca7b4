"""Files that cannot be one transaction: journal, resume, probes and repair, on a real server."""

from __future__ import annotations

import threading

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._run import Outcome
from ansible_collections.settler.runbook.plugins.module_utils._statements import parse

from tests.support import (
    Background,
    as_migrator,
    migration,
    refused,
    run_module,
    start_module,
    wait_until,
    write_migrations,
)

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


# Whose index it is


def test_index_that_another_session_builds_is_left_alone(new_database, connect, apply, ask):
    """Ours is over while theirs is half made: it is invalid, and none of what our statement could have left."""
    database = new_database()
    apply(database, [TABLE, migration("CREATE TABLE other (v int); INSERT INTO other VALUES (1);", "002_other.sql")])
    holder, theirs = connect(database), connect(database)
    holder.execute("BEGIN; UPDATE other SET v = 2")
    building = Background(theirs.execute, "CREATE INDEX CONCURRENTLY theirs ON other (v)")
    wait_until(lambda: ask(database, INVALID) == ["theirs"])
    files = [TABLE, migration("CREATE TABLE other (v int); INSERT INTO other VALUES (1);", "002_other.sql")]
    vacuum = step("REINDEX TABLE CONCURRENTLY t;\nVACUUM t;", 3)
    done = apply(database, [*files, vacuum])
    assert (len(done.applied), done.repaired) == (1, [])
    holder.execute("COMMIT")
    building.value()
    assert ask(database, INVALID) is None
    assert ask(database, "SELECT to_regclass('theirs') IS NOT NULL")


def test_index_that_another_session_builds_on_the_same_table_is_its_own(new_database, connect, apply, ask):
    """The lock that CONCURRENTLY holds from its first phase to its last tells whose it is."""
    database = new_database()
    apply(database, [TABLE])
    holder, theirs = connect(database), connect(database)
    holder.execute("BEGIN; UPDATE t SET v = 2 WHERE id = 1")
    building = Background(theirs.execute, "CREATE INDEX CONCURRENTLY theirs ON t (v)")
    wait_until(lambda: ask(database, INVALID) == ["theirs"])
    done = Outcome()
    refused(apply, database, [TABLE, step("ALTER TYPE nothing ADD VALUE 'x';\nVACUUM t;")], done)
    error = refused(apply, database, [TABLE, step("CREATE INDEX CONCURRENTLY ours ON t (id);", 2, "ours")], done,
                    long_lock_timeout=0.3, lock_attempts=2)  # fmt: skip
    assert "002_step.sql" in error.message or error.facts["sqlstate"] == "55P03"
    assert done.repaired == []
    holder.execute("COMMIT")
    building.value()
    assert ask(database, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'theirs'::regclass")


def test_statement_that_was_begun_and_rewritten_is_not_taken_for_done(new_database, connect, apply, ask, roles):
    """The catalogue has the index of before: that the file asks for another one now nobody could see."""
    database = new_database()
    apply(database, [TABLE])
    first = step("CREATE INDEX CONCURRENTLY i ON t (v);")
    apply(database, [TABLE, first])
    with connect(database) as admin:  # as a run leaves it that was killed while the backend went on
        admin.execute("UPDATE runbook.journal SET state = 'running', detail = '{\"present\": false, \"invalid\": []}'")
        admin.execute("UPDATE runbook.migrations SET state = 'running' WHERE file = '002_step.sql'")
    error = refused(apply, database, [TABLE, step("CREATE UNIQUE INDEX CONCURRENTLY i ON t (id, v);")])
    assert "statement 1 was begun by run run-1 and has been changed since" in error.message
    assert [one.file for one in apply(database, [TABLE, first]).applied] == ["002_step.sql"]


def test_leftover_that_could_not_be_dropped_is_the_next_attempts_too(new_database, connect, apply, ask):
    """It is no longer invalid «before»: a file must not count as applied beside it."""
    database = new_database()
    apply(database, [TABLE])
    reindex = step("REINDEX TABLE CONCURRENTLY t;")
    with connect(database) as blocker:
        blocker.execute("BEGIN; SELECT count(*) FROM t")
        refused(apply, database, [TABLE, reindex], long_lock_timeout=0.5, lock_attempts=1)
        (left,) = ask(database, INVALID)
        assert left.startswith("t_pkey_cc")
        blocker.execute("ROLLBACK")
    done = apply(database, [TABLE, reindex])
    assert (len(done.applied), done.repaired) == (1, [f"index public.{left}"])
    assert ask(database, INVALID) is None


def test_leftover_that_could_not_be_dropped_is_the_next_tries_of_the_same_run(new_database, connect, apply, ask):
    database = new_database()
    apply(database, [TABLE])
    blocker = connect(database)
    blocker.execute("BEGIN; SELECT count(*) FROM t")
    left = []

    def say(line):
        if "attempt 1 of 5 gave way" in line:
            left.extend(ask(database, INVALID))
            blocker.execute("ROLLBACK")

    files = [TABLE, step("REINDEX TABLE CONCURRENTLY t;")]
    done = apply(database, files, say=say, long_lock_timeout=0.5, lock_attempts=5)
    assert (len(done.applied), done.repaired) == (1, [f"index public.{name}" for name in left])
    assert len(left) == 1
    assert ask(database, INVALID) is None


@pytest.mark.parametrize(
    "command", ["REINDEX TABLE parted", "REINDEX INDEX parted_id", "CLUSTER parted USING parted_id"]
)
def test_command_that_refuses_a_transaction_only_of_partitions_runs_alone(new_database, cluster, apply, ask, command):
    made = migration(
        "CREATE TABLE parted (id int NOT NULL) PARTITION BY RANGE (id); CREATE INDEX parted_id ON parted (id);"
        "CREATE TABLE part_1 PARTITION OF parted FOR VALUES FROM (0) TO (10);"
    )
    database = new_database()
    if command.startswith("CLUSTER") and cluster.state.major < 15:
        assert "cannot cluster a partitioned table" in refused(apply, database, [made, step(f"{command};")]).message
        return
    assert len(apply(database, [made, step(f"{command};")]).applied) == 2
    assert ask(database, JOURNAL) == ["1 done"]


def test_setting_that_fails_is_told_with_its_line(new_database, apply, ask):
    database = new_database()
    error = refused(apply, database, [TABLE, step("VACUUM t;\nSET work_mem = 'much';\nVACUUM t;")])
    assert '002_step.sql:3: invalid value for parameter "work_mem": "much"' in error.message
    assert ask(database, "SELECT detail ->> 'line' FROM runbook.events WHERE event = 'failed'") == "3"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("CREATE TEMP TABLE x (i int);", "a temporary table"),
        ("CREATE TEMP TABLE x AS SELECT 1;", "a temporary table"),
        ("SELECT set_config('search_path', 's', false);", "a setting by set_config"),
        ("PREPARE p AS SELECT 1;", "a prepared statement"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1;", "a cursor"),
        ("LOCK TABLE t;", "a lock"),
        ("LISTEN x;", "LISTEN"),
    ],
)
def test_what_is_gone_before_the_next_statement_is_refused(text, what):
    with pytest.raises(RunbookError) as caught:
        parse(step("VACUUM t;\n" + text))
    assert f"002_step.sql:3: {what} is gone before the next statement" in caught.value.message


def test_index_without_a_name_is_refused():
    with pytest.raises(RunbookError, match=r"002_step\.sql:2: an index that is built CONCURRENTLY needs a name"):
        parse(step("CREATE INDEX CONCURRENTLY ON t (v);"))


def test_file_whose_statements_block_nobody_waits_for_long(new_database, connect, apply):
    """VALIDATE queues nobody behind it: it may wait as CREATE INDEX CONCURRENTLY does."""
    database = new_database()
    apply(database, [migration("CREATE TABLE t (id int, CONSTRAINT c CHECK (id > 0) NOT VALID);")])
    blocker = connect(database)
    blocker.execute("BEGIN; LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE")
    validate = migration("ALTER TABLE t VALIDATE CONSTRAINT c;", "002_validate.sql")
    files = [migration("CREATE TABLE t (id int, CONSTRAINT c CHECK (id > 0) NOT VALID);"), validate]

    def say(line: str) -> None:
        if "waits for pid" in line:
            blocker.execute("COMMIT")

    done = apply(
        database, files, say=say, lock_timeout=0.1, long_lock_timeout=60, lock_attempts=1, progress_interval=0.5
    )
    assert [one.attempts for one in done.applied] == [1]
