"""Repeatable files, optional folders, .verify.sql, directives, batches: on a real server."""

from __future__ import annotations

import re
import signal

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _batch
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._pending import pending_plan
from ansible_collections.settler.runbook.plugins.module_utils._run import Options

from tests.support import (
    PROJECT,
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

TABLE = migration(
    "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT g, 0 FROM generate_series(1, 1000) g;"
)
VIEW = "CREATE OR REPLACE VIEW w AS SELECT count(*) AS n FROM t WHERE v = {};"


# Repeatable files and optional folders


def test_repeatable_file_is_applied_after_the_versioned_ones_and_again_when_it_changes(new_database, apply, ask):
    database = new_database()
    view = migration(VIEW.format(0), "R__view.sql")
    done = apply(database, [TABLE, view])
    assert [one.file for one in done.applied] == ["001_test.sql", "R__view.sql"]
    assert apply(database, [TABLE, view]).applied == []
    changed = migration(VIEW.format(1), "R__view.sql")
    before = ask(database, "SELECT pg_current_wal_insert_lsn()::text")
    assert [one.file for one in apply(database, [TABLE, changed], run_id="run-2").applied] == ["R__view.sql"]
    assert ask(database, "SELECT lsn_before >= %s::pg_lsn FROM runbook.migrations WHERE file = 'R__view.sql'", before)
    documented = (PROJECT / "docs/ledger.md").read_text(encoding="utf-8").split("## Reading it")[1]
    for query in re.findall(r"^ {4}(SELECT .*)$", documented, re.MULTILINE):
        assert ask(database, query)
    assert ask(database, "SELECT n FROM w") == 0
    assert ask(database, "SELECT checksum FROM runbook.migrations WHERE kind = 'repeatable'") == changed.checksum
    assert ask(database, "SELECT array_agg(event || ' ' || run_id ORDER BY id) FROM runbook.events") == [
        "applied run-1", "applied run-1", "applied run-2",
    ]  # fmt: skip


def test_repeatable_file_that_is_gone_is_an_error_that_names_it(new_database, apply):
    database = new_database()
    apply(database, [TABLE, migration(VIEW.format(0), "R__view.sql")])
    assert "R__view.sql: applied at" in refused(apply, database, [TABLE]).message


def test_optional_folder_has_a_sequence_of_its_own(tmp_path, new_database, apply, ask):
    database = new_database()
    (tmp_path / "optional/parts").mkdir(parents=True)
    write_migrations(tmp_path / "migrations", {"001_a.sql": "CREATE TABLE a (i int);", "R__v.sql": "SELECT 1;"})
    write_migrations(tmp_path / "optional/parts", {"001_p.sql": "CREATE TABLE p (i int);"})
    folder = tmp_path / "migrations"
    apply(database, read_migrations(folder))
    done = apply(database, read_migrations(folder, ["parts"]))
    assert [one.file for one in done.applied] == ["parts/001_p.sql"]
    error = refused(apply, database, read_migrations(folder))
    assert "the optional folder parts is not switched on (migrate_optional)" in error.message
    write_migrations(folder, {"002_b.sql": "CREATE TABLE b (i int);"})
    assert [one.file for one in apply(database, read_migrations(folder, ["parts"])).applied] == ["002_b.sql"]
    error = refused(read_migrations, folder, ["prats"])
    assert f"{tmp_path}/optional/prats: no such optional folder" in error.message
    assert "parts" in error.hint


# Questions after a file


def test_question_with_an_answer_fails_the_file_and_shows_the_rows(new_database, apply, ask):
    database = new_database()
    file = migration("CREATE TABLE q (i int, n text); INSERT INTO q VALUES (1, 'x');", "001_q.sql",
                     verify="SELECT 1 WHERE false;\nSELECT i, n FROM q;")  # fmt: skip
    error = refused(apply, database, [file])
    assert "/migrations/001_q.verify.sql:2: 1 rows where none should be\n  i=1, n=x" in error.message
    assert "001_q.sql was rolled back and left nothing" in error.message
    assert ask(database, "SELECT to_regclass('q')") is None


@pytest.mark.parametrize(
    ("verify", "told"),
    [("-- nothing yet\n", "it asks nothing"), ("-- runbook: role=x\nSELECT 1;", "a directive in what only asks")],
)
def test_what_is_no_question_is_refused_by_its_own_name(new_database, apply, ask, verify, told):
    database = new_database()
    error = refused(apply, database, [migration("CREATE TABLE q (i int);", "001_q.sql", verify=verify)])
    assert error.message == f"/migrations/001_q.verify.sql:1: {told}"
    assert ask(database, "SELECT to_regclass('q')") is None


def test_question_leaves_no_trace_and_cannot_write(new_database, apply, ask):
    database = new_database()
    good = migration(
        "CREATE TABLE q (i int);", "001_q.sql", verify="SELECT set_config('search_path', 'x', false) LIMIT 0;"
    )
    assert len(apply(database, [good]).applied) == 1
    writes = migration("SELECT 1;", "002_w.sql", verify="INSERT INTO q VALUES (1);")
    assert "read-only" in refused(apply, database, [good, writes]).message
    assert ask(database, "SELECT count(*) FROM q") == 0


def test_question_after_a_file_without_a_transaction_is_asked_again_by_the_next_run(new_database, apply, ask):
    database = new_database()
    text = "-- runbook: no-transaction\nINSERT INTO t VALUES (2000, 5);"
    bad = migration(text, "002_n.sql", verify="SELECT id FROM t WHERE v = 5;")
    error = refused(apply, database, [TABLE, bad])
    assert "all statements of 002_n.sql are done and stay so; the file does not count as applied" in error.message
    good = migration(text, "002_n.sql", verify="SELECT id FROM t WHERE v = 6;")
    assert [one.file for one in apply(database, [TABLE, good]).applied] == ["002_n.sql"]
    assert ask(database, "SELECT count(*) FROM t WHERE v = 5") == 1


# Directives


def test_role_and_timeouts_of_a_file(new_database, connect, roles, apply, ask):
    database = new_database()
    with connect(database) as session:
        session.execute(f"GRANT CREATE ON SCHEMA public TO {roles.migrator}")
    text = (
        f"-- runbook: role={roles.migrator} lock-timeout=7s\n-- runbook: statement-timeout=3min\n"
        "CREATE TABLE mine AS SELECT current_setting('lock_timeout') AS l, current_setting('statement_timeout') AS s;"
    )
    apply(database, [migration(text)])
    assert ask(database, "SELECT l || ' ' || s FROM mine") == "7s 3min"
    assert ask(database, "SELECT relowner::regrole::text FROM pg_class WHERE relname = 'mine'") == roles.migrator
    assert ask(database, "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'runbook'") == roles.owner


def test_statement_timeout_of_the_run_ends_a_statement(new_database, apply):
    error = refused(apply, new_database(), [migration("SELECT pg_sleep(5);")], statement_timeout=0.1)
    assert error.facts["sqlstate"] == "57014"


def test_required_version_must_be_there(new_database, apply):
    database = new_database()
    needs = migration("-- runbook: requires=7\nSELECT 1;", "002_n.sql")
    error = refused(apply, database, [TABLE, needs])
    assert "/migrations/002_n.sql: requires 7, which is neither applied nor pending before it" in error.message
    needs = migration("-- runbook: requires=001\nSELECT 1;", "002_n.sql")
    assert len(apply(database, [TABLE, needs]).applied) == 2


def test_expand_phase_stops_before_the_first_contract(new_database, apply):
    database = new_database()
    files = [
        TABLE,
        migration("-- runbook: phase=contract\nDROP TABLE t;", "002_c.sql"),
        migration("SELECT 1;", "003_x.sql"),
    ]
    assert [one.file for one in apply(database, files, phase="expand").applied] == ["001_test.sql"]
    assert [one.file for one in apply(database, files).applied] == ["002_c.sql", "003_x.sql"]


def test_only_the_approved_plan_is_applied(new_database, apply, cluster, roles, ask):
    database = new_database()
    with engine_connect(as_migrator(cluster, roles, database)) as session:
        todo = pending_plan(session, [TABLE], Options(run_id="r"))
    other = migration("SELECT 1;", "002_x.sql")
    error = refused(apply, database, [TABLE, other], expected_plan=todo.digest)
    assert f"expected {todo.digest}" in error.message
    assert ask(database, "SELECT to_regclass('t')") is None
    assert len(apply(database, [TABLE], expected_plan=todo.digest).applied) == 1
    assert apply(database, [TABLE], expected_plan=todo.digest).applied == []


# Batches

BATCH = (
    "-- runbook: batch-table=public.t batch-key=id batch-size={size} batch-target={target}\n"
    "UPDATE t SET v = v + 1 WHERE id BETWEEN :from AND :to;"
)


def batch(size=10, target="500ms", text=BATCH, name="002_fill.batch.sql"):
    return migration(text.format(size=size, target=target), name)


def test_batches_change_each_row_once(new_database, apply, ask):
    database = new_database()
    done = apply(database, [TABLE, batch(size=7)])
    assert (done.applied[1].kind, done.applied[1].rows) == ("batch", 1000)
    assert ask(database, "SELECT array_agg(DISTINCT v) FROM t") == [1]
    assert ask(database, "SELECT (detail->>'batches')::int > 3 FROM runbook.journal") is True
    assert apply(database, [TABLE, batch(size=7)]).applied == []


def test_batch_that_fails_keeps_the_ones_before_and_resumes_after_them(new_database, connect, apply, ask):
    database = new_database()
    apply(database, [TABLE])
    with connect(database, role="settler_owner") as session:
        session.execute("ALTER TABLE t ADD CONSTRAINT c CHECK (id <> 500 OR v = 0)")
    error = refused(apply, database, [TABLE, batch(size=10, target="1ms")])
    assert "(SQLSTATE 23514)" in error.message
    assert "rows are done and stay so; the next run goes on after key" in error.message
    other = batch(size=10, target="1ms", text=BATCH.replace("v + 1", "v + 2"))
    error = refused(apply, database, [TABLE, other], run_id="run-2")
    assert "rows with this file, and its statement has been changed since" in error.message
    with connect(database, role="settler_owner") as session:
        session.execute("ALTER TABLE t DROP CONSTRAINT c")
    apply(database, [TABLE, batch(size=10, target="1ms")], run_id="run-2")
    assert ask(database, "SELECT array_agg(DISTINCT v) FROM t") == [1]


def test_care_is_taken_of_what_the_batches_write_to(new_database, apply):
    """Not of what they walk along."""
    database = new_database()
    before = [
        TABLE,
        migration(
            "CREATE TABLE copies (id int);"
            "CREATE MATERIALIZED VIEW of_copies AS SELECT FROM copies; CREATE MATERIALIZED VIEW of_t AS SELECT FROM t;",
            "002_copies.sql",
        ),
    ]
    apply(database, before)
    text = BATCH.replace("UPDATE t SET v = v + 1", "INSERT INTO copies SELECT id FROM t")
    done = apply(database, [*before, batch(text=text, name="003_copy.batch.sql")])
    assert (done.analyzed, done.refreshed) == (["public.copies"], ["public.of_copies"])


@pytest.mark.parametrize("kind", ["uuid", "text", "timestamp"])
def test_key_of_any_type(new_database, connect, apply, ask, kind):
    database = new_database()
    values = {"uuid": "gen_random_uuid()", "text": "md5(g::text) || ''''", "timestamp": "now() + g * interval '1 s'"}
    table = migration(
        f"CREATE TABLE t AS SELECT {values[kind]} AS id, 0 AS v FROM generate_series(1, 300) g;"  # noqa: S608
        "ALTER TABLE t ADD PRIMARY KEY (id);"
    )
    done = apply(database, [table, batch(size=20)])
    assert ask(database, "SELECT array_agg(DISTINCT v) FROM t") == [1]
    warning = (
        f"002_fill.batch.sql: keys of type {kind} do not grow: rows that are inserted while the batches run are "
        "changed as well, if their key is still to come"
    )
    assert done.warnings == [warning] * (kind != "timestamp")


def test_killed_run_resumes_at_the_next_batch(cluster, roles, tmp_path, new_database, ask):
    database = new_database()
    slow = BATCH.replace("v + 1", "v + 1 + (SELECT 0 FROM pg_sleep(0.02))").format(size=10, target="25ms")
    write_migrations(tmp_path, {"001_t.sql": TABLE.text.replace("1000", "300"), "002_fill.batch.sql": slow})
    arguments = {
        **as_migrator(cluster, roles, database),
        "directory": str(tmp_path),
        "run_id": "run-1",
        "set_role": roles.owner,
    }
    process = start_module("migrate", arguments)
    wait_until(
        lambda: (
            ask(database, "SELECT to_regclass('runbook.journal') IS NOT NULL")
            and (ask(database, "SELECT (detail->>'batches')::int FROM runbook.journal") or 0) > 2
        )
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = ask(database, "SELECT count(*) FROM t WHERE v = 1")
    assert 0 < done < 300
    write_migrations(tmp_path, {"003_x.sql": "SELECT 1;"})
    result = run_module("migrate", {**arguments, "run_id": "run-2"})
    assert not result.get("failed"), result["msg"]
    assert ask(database, "SELECT array_agg(DISTINCT v) FROM t") == [1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("CREATE TABLE x (id int PRIMARY KEY, v int);", "there is no table public.t"),
        ("CREATE TABLE t (i int, v int);", "public.t has no column id"),
        ("CREATE TABLE t (id int, v int);", "public.t.id may be null"),
        ("CREATE TABLE t (id int NOT NULL, v int);", "public.t.id has no index"),
        ("CREATE TABLE t (id int NOT NULL, v int); CREATE INDEX ON t (id) WHERE v = 0;", "public.t.id has no index"),
        ("CREATE TABLE t (id int NOT NULL, v int); CREATE INDEX ON t USING hash (id);", "public.t.id has no index"),
        ("CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;",
         "row level security hides rows of public.t"),
    ],
)  # fmt: skip
def test_table_that_batches_cannot_walk_is_refused(new_database, apply, table, message):
    error = refused(apply, new_database(), [migration(table), batch()])
    assert message in error.message
    assert "002_fill.batch.sql:1" in error.message


def test_batches_grow_and_shrink_to_the_target(new_database, apply, ask):
    database = new_database()
    apply(database, [TABLE, batch(size=1, target="1h")])
    # 1 + 2 + 4 + … + 512
    assert ask(database, "SELECT detail->>'batches' FROM runbook.journal") == "10"
    database = new_database()
    slow = BATCH.replace("v + 1", "v + (SELECT 1 FROM pg_sleep(0.01))")
    apply(database, [migration(TABLE.text.replace("1000", "100")), batch(size=8, target="1ms", text=slow)])
    assert ask(database, "SELECT detail->>'size' FROM runbook.journal") == "1"


def test_size_follows_the_target():
    assert _batch.resize(100, 1.0, 0.5) == 50
    assert _batch.resize(100, 0.001, 0.5) == 200
    assert _batch.resize(100, 0.4, 0.5) == 125
    assert _batch.resize(1, 9.0, 0.5) == 1


#: What the statement of HELD does with row 500, until somebody lets it go.
HOLD = migration(
    TABLE.text + "CREATE TABLE go (); GRANT INSERT ON go TO PUBLIC;"
    "CREATE FUNCTION hold(id int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
    " WHILE id = 500 AND NOT EXISTS (SELECT FROM go) LOOP PERFORM pg_sleep(0.01); END LOOP; RETURN 1; END $$;"
)
HELD = BATCH.replace("v + 1", "v + hold(id)")


def test_rows_inserted_beyond_the_end_while_batches_run_stay_as_they_are(new_database, connect, apply, ask):
    database = new_database()
    apply(database, [HOLD])

    def say(_line):
        with connect(database) as session:
            session.execute("INSERT INTO t SELECT g, 0 FROM generate_series(1001, 1500) g ON CONFLICT DO NOTHING")
            session.execute("INSERT INTO go DEFAULT VALUES")

    pace = {"lock_timeout": 0.1, "progress_interval": 0.05, "statement_timeout": 60}
    done = apply(database, [HOLD, batch(text=HELD)], say=say, **pace)
    assert (done.applied[0].rows, done.warnings) == (1000, [])
    assert ask(database, "SELECT count(*) FROM t WHERE v = 0 AND id > 1000") == 500


def test_progress_of_batches_says_rows_rate_and_time_left(new_database, connect, apply):
    """Nobody has ever analysed the table."""
    database, said = new_database(), []
    expected = re.compile(
        r"002_fill\.batch\.sql \(2 of 2\): batch \d+, \d+ s, [1-9]\d+ rows changed, [1-9][\d,]* a second, "
        r"about [1-9][\d,]* s left"
    )

    def say(line):
        said.append(line)
        if expected.fullmatch(line):
            with connect(database) as session:
                session.execute("INSERT INTO go DEFAULT VALUES")

    pace = {"lock_timeout": 0.1, "progress_interval": 0.05, "statement_timeout": 60}
    assert apply(database, [HOLD, batch(text=HELD)], say=say, **pace).applied[1].rows == 1000, said


def test_time_left_is_told_by_the_pace_of_this_run_and_while_the_estimate_holds():
    half = {"rows": 90, "keys": 100, "total": 200}
    none = {"rows": 0, "keys": 0, "total": 200}
    assert _batch.told(half, none, 10) == "90 rows changed, 9 a second, about 10 s left"
    assert _batch.told({**half, "keys": 120}, half, 10) == "90 rows changed, 0 a second, about 40 s left"
    assert _batch.told(half, half, 10) == "90 rows changed, 0 a second"
    assert _batch.told({**half, "keys": 201}, none, 10) == "90 rows changed, 9 a second"


def test_batches_wait_for_old_transactions(new_database, connect, roles, apply, ask):
    database = new_database()
    apply(database, [TABLE])
    said = []
    with connect(database, user=roles.app) as old:
        old.execute("SET application_name = 'report'")
        old.execute("BEGIN; SELECT 1")
        pace = {"batch_max_transaction": 0, "progress_interval": 0.1}
        run = Background(lambda: apply(database, [TABLE, batch()], say=said.append, **pace))
        who = rf"pid {old.info.backend_pid} \({roles.app}, report, idle in transaction, \d+ s\): BEGIN; SELECT 1"
        told = re.compile(rf"002_fill\.batch\.sql \(1 of 1\): batches wait for a transaction: {who}")
        # again and again, for as long as it lasts
        wait_until(lambda: len(list(filter(told.fullmatch, said))) >= 3 or not run.is_alive())
        assert ask(database, "SELECT count(*) FROM t WHERE v = 0") > 0
        old.execute("COMMIT")
        assert run.value().applied[0].rows == 1000
