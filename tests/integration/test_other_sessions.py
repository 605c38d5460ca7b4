"""Other sessions: who blocks is seen, ended only by policy, and told; standby, copies, backends of earlier runs."""

from __future__ import annotations

import threading
import time

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _work
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._pending import pending_plan
from ansible_collections.settler.runbook.plugins.module_utils._run import BlockerPolicy, Options, Outcome
from ansible_collections.settler.runbook.plugins.module_utils._watch import why_not
from ansible_collections.settler.runbook.plugins.module_utils._work import pause
from psycopg import sql

from tests.support import Background, as_migrator, call_module, migration, refused, wait_until, write_migrations

pytestmark = pytest.mark.every_major

TABLE = migration("CREATE TABLE a (i int); INSERT INTO a SELECT generate_series(1, 100);")
ALTER = migration("ALTER TABLE a ADD COLUMN j int;", "002_step.sql")


@pytest.fixture
def busy(new_database, connect, roles, apply):
    """A database with a table, and a session of the application that holds it in an open transaction."""
    database = new_database()
    apply(database, [TABLE])
    blocker = connect(database, user=roles.app)
    blocker.execute("SET application_name = 'billing'; BEGIN; SELECT * FROM a")
    return database, blocker


def test_blocker_is_ended_by_policy_and_recorded(busy, apply, ask):
    database, blocker = busy
    policy = BlockerPolicy("terminate", 0.2, match=("bill*",), never=("payroll",))
    done = apply(database, [TABLE, ALTER], lock_timeout=0.5, blockers=policy)
    assert [one.file for one in done.applied] == ["002_step.sql"]
    assert [(row["pid"], row["action"]) for row in done.ended] == [(blocker.info.backend_pid, "terminate")]
    with pytest.raises(psycopg.OperationalError):
        blocker.execute("SELECT 1")
    detail = ask(database, "SELECT detail FROM runbook.events WHERE event = 'blocker_ended'")
    assert (detail["application_name"], detail["action"]) == ("billing", "terminate")


def test_running_query_of_a_blocker_is_cancelled(busy, apply, ask):
    database, blocker = busy
    query = Background(blocker.execute, "SELECT pg_sleep(30)")
    wait_until(lambda: ask(database, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(30)'"))
    policy = BlockerPolicy("cancel", 0.1, match=("settler_app",))
    done = apply(database, [TABLE, ALTER], lock_timeout=0.5, blockers=policy)
    with pytest.raises(psycopg.errors.QueryCanceled):
        query.value()
    assert done.ended[0]["action"] == "cancel"


@pytest.fixture
def held(new_database, connect, apply):
    """Make a database whose table a prepared transaction holds; no session has it."""
    database = new_database()
    apply(database, [TABLE])
    with connect(database) as session:
        session.execute(
            "BEGIN; LOCK TABLE a IN SHARE MODE; INSERT INTO a VALUES (1); PREPARE TRANSACTION 'of a manager'"
        )
    yield database
    with connect(database) as session:
        session.execute("ROLLBACK PREPARED 'of a manager'")


def test_prepared_transaction_is_named_and_no_policy_ends_it(held, apply, ask):
    policy = BlockerPolicy("terminate", 0.0, match=("*",))
    done = Outcome()
    error = refused(
        apply, held, [TABLE, ALTER], done, lock_timeout=1, lock_attempts=1, blockers=policy, long_transaction=0
    )
    assert "blocked by: no session (postgres, of a manager, prepared, " in error.message
    assert "ROLLBACK PREPARED ends it" in error.message
    assert (done.ended, ask("postgres", "SELECT count(*) FROM pg_prepared_xacts")) == ([], 1)
    assert any("may hold locks" in warning and "of a manager" in warning for warning in done.warnings)
    assert any("it is no client but the prepared transaction" in warning for warning in done.warnings)


def test_old_transactions_are_reported_before_the_start(busy, apply):
    database, blocker = busy
    time.sleep(1.1)
    other = migration("SELECT 1;", "002_step.sql")
    (warning,) = apply(database, [TABLE, other], long_transaction=1.0).warnings
    assert f"pid {blocker.info.backend_pid} (settler_app, billing, idle in transaction, 1 s)" in warning
    assert apply(database, [TABLE, other], long_transaction=1.0).warnings == []  # nothing pending, nothing to wait


@pytest.mark.parametrize(
    "policy",
    [
        BlockerPolicy("wait", 0.0, match=("*",)),
        BlockerPolicy("terminate", 0.0, match=("other",)),
        BlockerPolicy("terminate", 0.0, match=("*",), never=("settler_app",)),
        BlockerPolicy("terminate", 60.0, match=("*",)),
    ],
)
def test_blocker_that_the_policy_does_not_name_is_left_alone(busy, apply, policy):
    database, blocker = busy
    error = refused(apply, database, [TABLE, ALTER], lock_timeout=1, lock_attempts=1, blockers=policy)
    assert error.facts["sqlstate"] == "55P03"
    assert "blocked by: pid" in error.message
    assert blocker.execute("SELECT 1").fetchone() == (1,)


def test_only_clients_are_ended():
    row = {"backend_type": "logical replication worker", "state": "active"}
    assert why_not("terminate", row) == "it is no client but the logical replication worker"
    assert why_not("terminate", {**row, "backend_type": "client backend"}) == ""


def test_blocker_is_ended_only_after_it_has_been_in_the_way_for_as_long_as_the_policy_says(busy, apply, connect, roles):
    """Not because another one was waited for before it in the same file."""
    database, first = busy
    apply(database, [TABLE, migration("CREATE TABLE b (i int);", "002_b.sql")])
    first.execute("SET application_name = 'first'")
    second = connect(database, role=roles.owner)
    second.execute("SET application_name = 'second'; BEGIN; LOCK TABLE b")
    begun = time.monotonic()

    def say(line: str) -> None:
        if f"waits for pid {first.info.backend_pid}" in line and time.monotonic() - begun > 3:
            first.execute("COMMIT")
        if f"waits for pid {second.info.backend_pid}" in line:
            second.execute("COMMIT")

    both = migration("ALTER TABLE a ADD COLUMN j int; ALTER TABLE b ADD COLUMN j int;", "003_step.sql")
    policy = BlockerPolicy("terminate", 2.5, match=("second",))
    files = [TABLE, migration("CREATE TABLE b (i int);", "002_b.sql"), both]
    done = apply(database, files, say=say, lock_timeout=60, progress_interval=0.05, blockers=policy)
    assert [one.file for one in done.applied] == ["003_step.sql"]
    assert done.ended == []
    assert second.execute("SELECT 1").fetchone() == (1,)


def test_blocker_counts_over_all_attempts_of_a_file(busy, apply):
    """No attempt is as long as the policy waits."""
    database, blocker = busy
    policy = BlockerPolicy("terminate", 1.5, match=("bill*",))
    done = apply(database, [TABLE, ALTER], lock_timeout=0.4, lock_attempts=50, blockers=policy)
    assert [row["pid"] for row in done.ended] == [blocker.info.backend_pid]


def test_blocker_is_named_within_the_lock_timeout_of_the_file(busy, apply):
    database, blocker = busy
    alter = migration("-- runbook: lock-timeout=300ms\n" + ALTER.text, "002_step.sql")
    error = refused(apply, database, [TABLE, alter], lock_timeout=60, lock_attempts=1)
    assert f"blocked by: pid {blocker.info.backend_pid} (settler_app, billing, idle in transaction" in error.message


def test_blocker_that_the_login_may_not_look_at_is_told_and_left(cluster, new_database, connect, server, apply):
    database = new_database()
    apply(database, [TABLE])
    with connect(database) as admin:
        admin.execute("CREATE ROLE stranger LOGIN PASSWORD 'strange'; GRANT SELECT ON a TO stranger")
        admin.execute("GRANT USAGE ON SCHEMA public TO stranger")
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO stranger").format(sql.Identifier(database)))
    try:
        blocker = psycopg.connect(cluster.conninfo(database, "stranger", "strange"), autocommit=True)
        blocker.execute("BEGIN; SELECT * FROM a")
        done = Outcome()
        policy = BlockerPolicy("terminate", 0.0, match=("stranger",))
        refused(apply, database, [TABLE, ALTER], done, lock_timeout=1, lock_attempts=1, blockers=policy)
        hidden, left = done.warnings
        assert "1 sessions in this database belong to roles that settler_migrator may not look at" in hidden
        assert left.startswith(f"blocker not ended: pid {blocker.info.backend_pid} (stranger, ")
        assert left.endswith("GRANT pg_read_all_stats lets it")
        assert blocker.execute("SELECT 1").fetchone() == (1,)
        blocker.close()
    finally:
        connect(database).execute("DROP OWNED BY stranger")
        server.execute("DROP ROLE stranger")


def test_transaction_without_a_query_is_not_said_to_be_cancelled(busy, apply, ask):
    database, _blocker = busy
    done = Outcome()
    policy = BlockerPolicy("cancel", 0.0, match=("*",))
    refused(apply, database, [TABLE, ALTER], done, lock_timeout=1, lock_attempts=2, blockers=policy)
    assert done.ended == []
    (warning,) = done.warnings
    assert "it is idle in transaction: there is no query to cancel; only blocker_action=terminate ends it" in warning
    assert ask(database, "SELECT count(*) FROM runbook.events WHERE event = 'blocker_ended'") == 0


def test_blocker_that_is_ended_after_the_files_is_recorded_too(new_database, connect, roles, apply, ask):
    database = new_database()
    apply(database, [TABLE])
    blocker = connect(database, user=roles.migrator)
    blocker.execute("SET ROLE settler_owner; SET application_name = 'billing'")
    blocker.execute("BEGIN; LOCK TABLE a IN SHARE UPDATE EXCLUSIVE MODE")
    policy = BlockerPolicy("terminate", 0.1, match=("billing",))
    fill = migration("INSERT INTO a VALUES (0);", "002_fill.sql")
    done = apply(database, [TABLE, fill], lock_timeout=60, blockers=policy)
    assert done.analyzed == ["public.a"]
    detail, file = ask(database, "SELECT array[detail->>'pid', file] FROM runbook.events WHERE event = 'blocker_ended'")
    assert (int(detail), file) == (blocker.info.backend_pid, None)


def test_question_that_has_to_wait_for_a_lock_is_asked_again(busy, apply, connect, roles):
    database, _reader = busy
    blocker = connect(database, role=roles.owner)
    blocker.execute("CREATE TABLE b (i int)")
    blocker.execute("BEGIN; LOCK TABLE b")
    asking = migration("CREATE TABLE c (i int);", "002_c.sql", verify="SELECT i FROM b;")
    error = refused(apply, database, [TABLE, asking], lock_timeout=0.3, lock_attempts=1)
    assert error.facts["sqlstate"] == "55P03"
    assert "/migrations/002_c.verify.sql:1: " in error.message
    assert f"blocked by: pid {blocker.info.backend_pid} " in error.message
    assert "Another session held the lock" in error.hint

    def say(line: str) -> None:
        if "002_c.sql (1 of 1): verifying, line 1: attempt 1 of 50 gave way to pid" in line:
            blocker.execute("COMMIT")

    done = apply(database, [TABLE, asking], say=say, lock_timeout=0.3, lock_attempts=50)
    assert [one.attempts for one in done.applied] == [2]


def test_pause_between_attempts_grows_and_is_never_the_same():
    for attempt, longest in ((1, 0.2), (2, 0.4), (3, 0.8), (4, 1.6), (5, 3.2), (6, 5.0), (50, 5.0)):
        pauses = [pause(attempt) for _ in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
        assert len(set(pauses)) > 1


def test_attempts_are_paused_between(busy, apply, monkeypatch):
    database, _blocker = busy
    pauses: list[float] = []
    monkeypatch.setattr(_work, "pause", lambda attempt: pauses.append(attempt) or 0.0)
    refused(apply, database, [TABLE, ALTER], lock_timeout=0.05, lock_attempts=3)
    assert pauses == [1, 2]


def test_policy_that_names_nobody_is_refused(cluster, roles, tmp_path, new_database):
    arguments = {
        **as_migrator(cluster, roles, new_database()),
        "directory": str(tmp_path),
        "run_id": "r",
        "blocker_action": "terminate",
        "blocker_match": [],
    }
    result = call_module("migrate", arguments)
    assert "blocker_match names no application or role" in result["msg"]


def test_progress_says_what_a_file_waits_for_and_how_far_it_is(busy, apply):
    database, blocker = busy
    said: list[str] = []
    run = Background(
        lambda: apply(
            database, [TABLE, ALTER], say=said.append, lock_timeout=0.4, lock_attempts=50, progress_interval=0.1
        )
    )
    wait_until(lambda: any(f"waits for pid {blocker.info.backend_pid}" in line for line in said))
    wait_until(lambda: any(f"attempt 1 of 50 gave way to pid {blocker.info.backend_pid} (" in line for line in said))
    blocker.execute("COMMIT")
    run.value()
    assert any(line.startswith("002_step.sql (1 of 1): statement 1 of 1, line 1, ") for line in said)


def test_progress_of_a_long_statement_has_phase_and_percent(new_database, apply):
    said: list[str] = []
    big = migration(
        "CREATE TABLE b AS SELECT g, md5(g::text) FROM generate_series(1, 400000) g; CREATE INDEX ON b (md5);"
    )
    apply(new_database(), [big], say=said.append, lock_timeout=0.1, progress_interval=0.05)
    assert any("CREATE INDEX: " in line and "%" in line for line in said)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("SET vacuum_cost_delay = 20;\nSET vacuum_cost_limit = 1;\nVACUUM b;", "VACUUM: scanning heap "),
        ("SET vacuum_cost_delay = 20;\nSET vacuum_cost_limit = 1;\nANALYZE b;", "ANALYZE: acquiring sample rows "),
        ("CLUSTER b USING b_md5;", "CLUSTER: "),
        ("COPY (SELECT pg_sleep(0.01) FROM generate_series(1, 100)) TO '/dev/null';", "COPY TO"),
    ],
)
def test_progress_of_commands_that_have_a_view_of_their_own(new_database, connect, roles, apply, text, told):
    database = new_database()
    rows = "CREATE TABLE b AS SELECT g, md5(g::text) FROM generate_series(1, 5000) g; CREATE INDEX b_md5 ON b (md5);"
    big = rows.replace("5000", "300000") if "CLUSTER" in text else rows
    said: list[str] = []
    connect(database).execute("GRANT pg_write_server_files TO settler_owner")
    try:
        apply(
            database,
            [migration(big), migration("-- runbook: no-transaction\n" + text, "002_step.sql")],
            say=said.append,
            lock_timeout=0.1,
            progress_interval=0.02,
        )
    finally:
        connect(database).execute("REVOKE pg_write_server_files FROM settler_owner")
    assert any(told in line for line in said), said


def test_run_without_a_second_connection_is_not_silent(new_database, server, apply):
    database = new_database()
    server.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT 1").format(sql.Identifier(database)))
    said: list[str] = []
    apply(database, [migration("SELECT pg_sleep(1);")], say=said.append, lock_timeout=0.1, progress_interval=0.05)
    assert any(line.startswith("001_test.sql (1 of 1): statement 1 of 1, line 1, ") for line in said)


def test_run_that_waits_for_another_one_says_so(new_database, apply):
    database = new_database()
    said: list[str] = []
    begun, over = threading.Event(), threading.Event()

    def hold(line: str) -> None:
        begun.set()
        over.wait(60)

    slow = migration("SELECT pg_sleep(0.5);")
    other = Background(lambda: apply(database, [slow], say=hold, lock_timeout=0.1, progress_interval=0.01))
    assert begun.wait(60)

    def say(line: str) -> None:
        said.append(line)
        over.set()

    assert apply(database, [slow], say=say, run_id="run-2", progress_interval=0.05).applied == []
    other.value()
    assert said[0].startswith("another run holds this database's lock; waits for it, ")
    assert "runbook:run-1:migrate" in said[0]


def test_many_quick_statements_are_not_silent_either(new_database, apply):
    said: list[str] = []
    quick = migration("CREATE TABLE b (id int);\n" + "INSERT INTO b SELECT 1 FROM pg_sleep(0.01);\n" * 200)
    apply(new_database(), [quick], say=said.append, lock_timeout=0.4, progress_interval=0.05)
    assert any(line.startswith("001_test.sql (1 of 1): statement ") and " of 201, line " in line for line in said)


def test_quick_run_has_no_second_connection_and_says_nothing(new_database, apply, ask):
    said: list[str] = []
    database = new_database()
    apply(database, [TABLE], say=said.append)
    assert said == []


# After the files


def test_touched_tables_are_analysed_and_views_that_depend_on_them_refreshed(new_database, apply, ask):
    database = new_database()
    first = migration(
        "CREATE TABLE a (i int PRIMARY KEY); CREATE TABLE other (i int); INSERT INTO other VALUES (1);"
        "CREATE VIEW v AS SELECT i FROM a; CREATE MATERIALIZED VIEW m AS SELECT i FROM v; CREATE UNIQUE INDEX ON m (i);"
        "CREATE MATERIALIZED VIEW deeper AS SELECT count(*) AS n FROM m;"
        "CREATE MATERIALIZED VIEW o AS SELECT * FROM other;"
    )
    apply(database, [first])
    second = migration("INSERT INTO a SELECT generate_series(1, 500);", "002_fill.sql")
    done = apply(database, [first, second])
    assert done.refreshed == ["public.m", "public.deeper"]
    assert done.analyzed == ["public.a"]
    assert ask(database, "SELECT n FROM deeper") == 500
    assert ask(database, "SELECT reltuples FROM pg_class WHERE relname = 'a'") == 500
    assert apply(database, [first, second]).analyzed == []


def test_index_on_an_expression_and_statistics_are_filled(new_database, apply, ask):
    database = new_database()
    table = migration("CREATE TABLE a (i int, j int); INSERT INTO a SELECT g, g % 7 FROM generate_series(1, 500) g;")
    apply(database, [table], analyze=False)
    index = migration("CREATE INDEX by_sum ON a ((i + j));", "002_index.sql")
    assert apply(database, [table, index]).analyzed == ["public.a"]
    assert ask(database, "SELECT count(*) FROM pg_stats WHERE tablename = 'by_sum'") == 1
    statistics = migration("CREATE STATISTICS together ON i, j FROM a;", "003_statistics.sql")
    assert apply(database, [table, index, statistics]).analyzed == ["public.a"]
    assert ask(database, "SELECT count(*) FROM pg_stats_ext WHERE statistics_name = 'together'") == 1


def test_rows_put_into_a_partition_are_the_parents_too(new_database, apply, ask):
    database = new_database()
    first = migration(
        "CREATE TABLE a (i int) PARTITION BY RANGE (i);"
        "CREATE TABLE upper PARTITION OF a FOR VALUES FROM (0) TO (1000) PARTITION BY RANGE (i);"
        "CREATE TABLE lower PARTITION OF upper FOR VALUES FROM (0) TO (1000);"
        "CREATE TABLE old (i int); CREATE TABLE heir () INHERITS (old);"
        "CREATE MATERIALIZED VIEW m AS SELECT count(*) AS n FROM a;"
        "CREATE MATERIALIZED VIEW mold AS SELECT count(*) AS n FROM old;"
    )
    second = migration(
        "INSERT INTO lower SELECT generate_series(1, 500); INSERT INTO heir SELECT generate_series(1, 70);",
        "002_fill.sql",
    )
    apply(database, [first])
    assert apply(database, [first, second]).refreshed == ["public.m", "public.mold"]
    assert ask(database, "SELECT m.n + mold.n FROM m, mold") == 570
    with_statistics = "SELECT array_agg(tablename::text || ' ' || inherited ORDER BY tablename) FROM pg_stats"
    assert ask(database, f"{with_statistics} WHERE schemaname = 'public' AND tablename <> 'm'") == [
        "a true", "heir false", "lower false", "old true", "upper true",
    ]  # fmt: skip


KINDS = {
    "transaction": ("002_fill.sql", "INSERT INTO a SELECT generate_series(1, 500);"),
    "no transaction": ("002_fill.sql", "-- runbook: no-transaction\nINSERT INTO a SELECT generate_series(1, 500);"),
    "batch": (
        "002_fill.batch.sql",
        """-- runbook: batch-table=public.source batch-key=i batch-size=100
        INSERT INTO a SELECT i FROM source WHERE i BETWEEN :from AND :to;""",
    ),
}


@pytest.fixture
def filled(new_database, apply):
    """Files of which the first makes tables and a view and the second, of the kind that is asked for, fills them."""
    database = new_database()
    first = migration(
        "CREATE TABLE source (i int PRIMARY KEY); INSERT INTO source SELECT generate_series(1, 500);"
        "CREATE TABLE a (i int); CREATE MATERIALIZED VIEW m AS SELECT i FROM a;"
    )

    def fill(kind, then):
        name, text = KINDS[kind]
        return [first, migration(text, name), migration(then, "003_then.sql")]

    apply(database, [first])
    return database, fill


STATISTICS = "SELECT count(*) FROM pg_stats WHERE tablename = %s"


@pytest.mark.parametrize("kind", KINDS)
def test_care_is_taken_of_what_a_run_has_applied_before_it_fails(filled, apply, ask, kind):
    database, fill = filled
    outcome = Outcome()
    error = refused(apply, database, fill(kind, "SELECT 1 / 0;"), outcome)
    assert "003_then.sql:1: division by zero" in error.message
    assert (outcome.analyzed, outcome.refreshed) == (["public.a"], ["public.m"])
    assert apply(database, fill(kind, "SELECT 1;")).analyzed == []  # nothing is left to do


@pytest.mark.parametrize("kind", KINDS)
def test_next_run_takes_care_of_what_a_run_that_was_killed_has_applied(filled, apply, ask, kind):
    database, fill = filled
    outcome = Outcome()
    refused(apply, database, fill(kind, "RESET ROLE; SELECT pg_terminate_backend(pg_backend_pid());"), outcome)
    assert len(outcome.applied) == 1
    assert outcome.analyzed == []
    assert apply(database, fill(kind, "SELECT 1;")).analyzed == ["public.a"]
    assert ask(database, STATISTICS, "a") == 1
    assert ask(database, "SELECT count(touched) FROM runbook.migrations") == 0


def test_run_that_fails_in_its_window_leaves_the_care_to_the_next_one(filled, apply, ask):
    """It is taken back, while the application waits outside."""
    database, fill = filled
    window = ask(database, "SELECT oid || ':' || xmin FROM pg_database WHERE datname = current_database()")
    outcome = Outcome()
    refused(apply, database, fill("transaction", "SELECT 1 / 0;"), outcome, window=window)
    assert (len(outcome.applied), outcome.analyzed) == (1, [])
    assert apply(database, fill("transaction", "SELECT 1;")).analyzed == ["public.a"]


def test_reader_of_a_view_neither_waits_for_its_refresh_nor_stops_it(new_database, apply, connect, roles, ask):
    database = new_database()
    first = migration(
        "CREATE TABLE a (i int PRIMARY KEY); CREATE MATERIALIZED VIEW m AS SELECT i FROM a;"
        "CREATE UNIQUE INDEX ON m (i);"
    )
    apply(database, [first])
    reader = connect(database, user=roles.app)
    reader.execute("BEGIN; SELECT * FROM m")  # a refresh that is not concurrent would need its lock
    done = apply(database, [first, migration("INSERT INTO a VALUES (1);", "002_fill.sql")], lock_timeout=0.2)
    assert (done.refreshed, done.warnings) == (["public.m"], [])
    assert reader.execute("SELECT count(*) FROM m").fetchone() == (1,)


@pytest.mark.parametrize(
    "view",
    [
        "CREATE MATERIALIZED VIEW m AS SELECT i FROM a",
        "CREATE MATERIALIZED VIEW m AS SELECT i FROM a; CREATE UNIQUE INDEX ON m (i) WHERE i > 0",
        "CREATE MATERIALIZED VIEW m AS SELECT i FROM a; CREATE UNIQUE INDEX ON m ((i + 1))",
        "CREATE MATERIALIZED VIEW m AS SELECT i FROM a WITH NO DATA; CREATE UNIQUE INDEX ON m (i)",
    ],
)
def test_view_that_cannot_be_refreshed_concurrently_is_refreshed(new_database, apply, ask, view):
    database = new_database()
    first = migration(f"CREATE TABLE a (i int PRIMARY KEY); {view};")
    apply(database, [first], refresh=False)
    done = apply(database, [first, migration("INSERT INTO a VALUES (1);", "002_fill.sql")])
    assert (done.refreshed, done.warnings) == (["public.m"], [])
    assert ask(database, "SELECT count(*) FROM m") == 1


def test_care_that_fails_is_a_warning(new_database, connect, apply):
    database = new_database()
    with connect(database) as session:
        session.execute("CREATE TABLE a (i int); GRANT INSERT ON a TO settler_owner")
        session.execute("CREATE MATERIALIZED VIEW m AS SELECT * FROM a")
    done = apply(database, [migration("INSERT INTO a VALUES (1);")])
    assert len(done.applied) == 1
    assert "refreshing public.m failed: must be owner" in done.warnings[0] or "permission" in done.warnings[0]


# Where the ledger was written


def test_ledger_of_a_copy_is_recognised_and_adopted_knowingly(cluster, roles, new_database, apply, ask):
    database = new_database()
    apply(database, [TABLE])
    copy = new_database(template=database)
    error = refused(apply, copy, [TABLE, ALTER])
    assert f"the ledger was written in database {database} of another server or under another name" in error.message
    assert "migrate_accept_copy" in error.hint
    with engine_connect(as_migrator(cluster, roles, copy)) as session:
        assert "another server" in refused(pending_plan, session, [TABLE], Options(run_id="r")).message
    assert len(apply(copy, [TABLE, ALTER], accept_copy=True).applied) == 1
    assert apply(copy, [TABLE, ALTER]).applied == []
    assert ask(copy, "SELECT detail->>'from_database' FROM runbook.events WHERE event = 'adopted'") == database


def test_backend_of_an_earlier_run_is_waited_for(new_database, connect, roles, apply):
    database = new_database()
    apply(database, [TABLE])
    left = connect(database, user=roles.migrator)
    left.execute("SET application_name = 'runbook:run-0:migrate'; BEGIN; SELECT pg_sleep(1.2)")
    error = refused(apply, database, [TABLE, ALTER], lock_wait=0.3)
    assert "a backend of an earlier run still works in this database" in error.message
    assert "runbook:run-0:migrate" in error.message
    threading.Timer(0.5, lambda: left.execute("COMMIT")).start()
    assert len(apply(database, [TABLE, ALTER]).applied) == 1


def test_restore_point_is_made_where_that_is_granted(cluster, new_database, connect, roles, apply, ask):
    database = new_database()
    apply(database, [TABLE])
    assert ask(database, "SELECT restore_point FROM runbook.migrations") is None
    with connect(database) as session:
        session.execute(f"GRANT EXECUTE ON FUNCTION pg_create_restore_point TO {roles.migrator}")
        wal_level = session.execute("SHOW wal_level").fetchone()
    batch = "-- runbook: batch-table=b batch-key=i\nUPDATE b SET i = i WHERE i BETWEEN :from AND :to;"
    others = [
        migration("-- runbook: no-transaction\nVACUUM a;", "003_vacuum.sql"),
        migration(batch, "004_b.batch.sql"),
    ]
    made = migration("CREATE TABLE b (i int PRIMARY KEY);", "002_step.sql")
    apply(database, [TABLE, made, *others])
    for file in [made, *others]:
        expected = None if wal_level == ("minimal",) else f"runbook:run-1:{file.file}"
        assert ask(database, "SELECT restore_point FROM runbook.migrations WHERE file = %s", file.file) == expected


def test_ledger_of_the_first_version_is_completed(new_database, connect, apply, ask):
    database = new_database()
    apply(database, [TABLE])
    with connect(database) as session:
        session.execute(
            "ALTER TABLE runbook.migrations DROP kind, DROP state, DROP restore_point, DROP job_id, DROP backend_pid,"
            " DROP touched;"
            "DROP TABLE runbook.journal; DROP FUNCTION runbook.keep_events CASCADE"
        )
    assert [one.file for one in apply(database, [TABLE, ALTER], job_id="77").applied] == ["002_step.sql"]
    assert ask(database, "SELECT array_agg(kind || ' ' || state) FROM runbook.migrations") == ["versioned applied"] * 2
    assert ask(database, "SELECT job_id FROM runbook.migrations WHERE file = '002_step.sql'") == "77"


def test_plan_reads_a_ledger_of_the_first_version(cluster, roles, tmp_path, new_database, connect, apply):
    database = new_database()
    apply(database, [TABLE])
    with connect(database) as session:
        session.execute(
            "ALTER TABLE runbook.migrations DROP kind, DROP state; DROP TABLE runbook.journal; "
            "DROP FUNCTION runbook.keep_events CASCADE"
        )
    write_migrations(tmp_path, {"001_test.sql": TABLE.text, "002_step.sql": ALTER.text})
    info = call_module(
        "migration_info",
        {**as_migrator(cluster, roles, database), "directory": str(tmp_path), "run_id": "", "ledger_schema": "runbook",
         "out_of_order": False, "optional": [], "application_roles": [], "events": 5, "set_role": roles.owner,
         "hazards_allowed": [], "hazard_min_bytes": 1, "scripts_file": None},
    )  # fmt: skip
    assert info["pending"] == ["002_step.sql"]
    assert [plan["file"] for plan in info["plan"]] == info["pending"]
