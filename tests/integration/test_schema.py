"""Settler's schema on a real server: built twice, reached from every old shape, its functions, and its isolation."""

# ruff: noqa: S608 - the names in the queries are this file's own

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pglast
import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._statements import parse
from psycopg import errors

from tests.support import PROJECT, Background, refused
from tools import generate, legacy
from tools.schema import build, files_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MIGRATIONS = PROJECT / "sql" / "migrations"
REPEATABLE = sorted(MIGRATIONS.glob("R__*.sql"))
DEFAULT_TENANT = uuid.UUID("00000000-0000-4000-8000-000000000001")

#: What the runbook's facts say: name, type, ! for NOT NULL.
FACTS = """
tenants: id uuid !, name varchar(255) !, slug varchar(255) !, parent_tenant_id uuid, tier varchar(50) !, status varchar(50) !, quotas jsonb !, config jsonb !, metadata jsonb, created_at timestamp, updated_at timestamp, deleted_at timestamp
users: id uuid !, tenant_id uuid, email varchar(255) !, password_hash varchar(255) !, name varchar(255), role varchar(50), data_residency_region varchar(10), data_retention_days integer, deleted_at timestamp, deletion_scheduled_at timestamp, created_at timestamp, updated_at timestamp
api_keys: id uuid !, user_id uuid !, tenant_id uuid, key_prefix varchar(20) !, key_hash varchar(255) !, name varchar(255), scopes text[], rate_limit integer, ip_whitelist text[], revoked_at timestamp, expires_at timestamp, last_used_at timestamp, created_at timestamp, updated_at timestamp
jobs: id uuid !, user_id uuid !, tenant_id uuid, name varchar(255) !, source_adapter varchar(100) !, source_config_encrypted text !, target_adapter varchar(100) !, target_config_encrypted text !, rules jsonb !, schedule varchar(100), status varchar(50), version integer, created_at timestamp, updated_at timestamp
executions: id uuid !, job_id uuid !, tenant_id uuid, status varchar(50), started_at timestamp, completed_at timestamp, error text, summary jsonb, duration_ms bigint, created_at timestamp
matches: id uuid !, execution_id uuid !, job_id uuid !, tenant_id uuid, source_id varchar(255) !, target_id varchar(255) !, amount numeric(10,2), currency varchar(10), confidence numeric(3,2), matched_at timestamp, created_at timestamp
unmatched: id uuid !, execution_id uuid !, job_id uuid !, tenant_id uuid, source_id varchar(255), target_id varchar(255), amount numeric(10,2), currency varchar(10), reason text, created_at timestamp
reports: id uuid !, job_id uuid !, execution_id uuid !, tenant_id uuid, date_range_start timestamp, date_range_end timestamp, summary jsonb !, generated_at timestamp, created_at timestamp
webhooks: id uuid !, user_id uuid !, tenant_id uuid, url varchar(2048) !, events text[] !, secret varchar(255) !, status varchar(50), created_at timestamp, updated_at timestamp
webhook_payloads: id uuid !, adapter varchar(100) !, tenant_id uuid, payload jsonb !, signature varchar(255), received_at timestamp, processed boolean, processed_at timestamp, error text, created_at timestamp
webhook_deliveries: id uuid !, webhook_id uuid !, url varchar(2048) !, payload jsonb !, status varchar(50), status_code integer, response_body text, attempts integer, next_retry_at timestamp, delivered_at timestamp, created_at timestamp
webhook_configs: adapter varchar(100) !, secret varchar(255) !, signature_algorithm varchar(50), created_at timestamp, updated_at timestamp
audit_logs: id uuid !, tenant_id uuid, event varchar(100) !, user_id uuid, api_key_id uuid, ip varchar(45), user_agent text, method varchar(10), path varchar(500), status_code integer, metadata jsonb, timestamp timestamp
idempotency_keys: id uuid !, user_id uuid !, tenant_id uuid, key varchar(255) !, response jsonb !, created_at timestamp, expires_at timestamp !
revoked_tokens: jti varchar(255) !, revoked_at timestamp, reason text, expires_at timestamp !, created_at timestamp
blocked_ips: id uuid !, ip varchar(45) !, reason text !, tenant_id uuid, blocked_at timestamp, unblocked_at timestamp, created_at timestamp
security_events: id uuid !, event_type varchar(100) !, severity varchar(20) !, tenant_id uuid, user_id uuid, api_key_id uuid, ip varchar(45), user_agent text, details jsonb, resolved boolean, resolved_at timestamp, resolved_by uuid, created_at timestamp
tenant_usage: id uuid !, tenant_id uuid !, metric_type varchar(50) !, metric_value bigint !, period_start timestamp !, period_end timestamp !, created_at timestamp
tenant_quota_usage: tenant_id uuid !, current_storage_bytes bigint, current_concurrent_jobs integer, current_monthly_reconciliations integer, last_reset_at timestamp, updated_at timestamp
feature_flags: id uuid !, name varchar(255) !, description text, enabled boolean, rollout_percentage integer, tenant_id uuid, user_id uuid, conditions jsonb, created_at timestamp, updated_at timestamp, deleted_at timestamp
feature_flag_changes: id uuid !, feature_flag_id uuid !, changed_by uuid, old_value jsonb, new_value jsonb, reason text, created_at timestamp
event_store: id bigint !, event_id uuid !, aggregate_id uuid !, aggregate_type varchar(100) !, event_type varchar(100) !, event_version integer !, data jsonb !, metadata jsonb !, tenant_id uuid, created_at timestamp !
snapshots: id bigint !, aggregate_id uuid !, aggregate_type varchar(100) !, snapshot_data jsonb !, snapshot_version integer !, event_id uuid !, tenant_id uuid, created_at timestamp !
saga_state: id uuid !, saga_id varchar(255) !, saga_type varchar(100) !, aggregate_id uuid !, current_step varchar(100) !, state jsonb !, status varchar(50) !, error_message text, retry_count integer, max_retries integer, next_retry_at timestamp, timeout_at timestamp, tenant_id uuid, correlation_id uuid, created_at timestamp !, updated_at timestamp !, completed_at timestamp
dead_letter_queue: id uuid !, saga_id varchar(255), event_id uuid, error_type varchar(100) !, error_message text !, error_stack text, payload jsonb !, retry_count integer, max_retries integer, tenant_id uuid, correlation_id uuid, created_at timestamp !, resolved_at timestamp, resolution_notes text
reconciliation_summary: reconciliation_id uuid !, job_id uuid !, status varchar(50) !, total_source_records integer, total_target_records integer, matched_count integer, unmatched_source_count integer, unmatched_target_count integer, errors_count integer, started_at timestamp !, completed_at timestamp, duration_ms bigint, accuracy_percentage numeric(5,2), tenant_id uuid, updated_at timestamp !
tenant_usage_view: tenant_id uuid !, date date !, reconciliation_count integer, total_duration_ms bigint, success_count integer, failure_count integer
error_hotspots_view: reconciliation_id uuid !, job_id uuid !, error_type varchar(100) !, error_count integer, step varchar(100) !, first_occurred_at timestamp !, last_occurred_at timestamp !, tenant_id uuid
"""  # noqa: E501 - the facts are one line a table

#: Tables whose rows the policy gives to the tenant named in tenant_id, and to nobody else.
ISOLATED = (
    "users", "jobs", "executions", "matches", "unmatched", "reports", "webhooks", "api_keys", "webhook_payloads",
    "audit_logs", "idempotency_keys", "tenant_usage", "tenant_quota_usage", "event_store", "snapshots", "saga_state",
    "dead_letter_queue", "reconciliation_summary", "tenant_usage_view", "error_hotspots_view",
)  # fmt: skip
MIXED = ("feature_flags", "blocked_ips", "security_events")  # NULL in tenant_id means everyone
BY_PARENT = ("webhook_deliveries", "feature_flag_changes")
CLOSED = ("webhook_configs", "revoked_tokens")
VIEWS = ("reconciliation_summary_daily", "job_performance", "tenant_usage_hourly", "match_accuracy_by_job")

PARENTS = (
    ("jobs", "users", "user_id"), ("api_keys", "users", "user_id"), ("webhooks", "users", "user_id"),
    ("idempotency_keys", "users", "user_id"), ("executions", "jobs", "job_id"), ("matches", "jobs", "job_id"),
    ("matches", "executions", "execution_id"), ("unmatched", "executions", "execution_id"),
    ("reports", "jobs", "job_id"), ("audit_logs", "users", "user_id"), ("audit_logs", "api_keys", "api_key_id"),
    ("event_store", "executions", "aggregate_id"), ("snapshots", "executions", "aggregate_id"),
    ("saga_state", "executions", "aggregate_id"), ("reconciliation_summary", "jobs", "job_id"),
)  # fmt: skip
#: One row of each table for a tenant; {t} is its number. Ids are (table's letter, tenant's number).
ROWS = """
insert into tenants (id, name, slug) values ('{T}', 'Tenant {t}', 't{t}');
insert into users (id, tenant_id, email, password_hash) values ('{U}', '{T}', 'same@example.com', 'x');
insert into api_keys (id, user_id, key_prefix, key_hash) values ('{K}', '{U}', 'rk_{t}', 'x');
insert into jobs (id, user_id, name, source_adapter, source_config_encrypted, target_adapter, target_config_encrypted,
    rules) values ('{J}', '{U}', 'job', 'a', 'x', 'b', 'x', '[]');
insert into executions (id, job_id, status, started_at, duration_ms)
  values ('{E}', '{J}', 'completed', '2025-01-01 10:20', 40);
insert into matches (id, execution_id, job_id, source_id, target_id, confidence, matched_at)
  values ('{M}', '{E}', '{J}', 's', 't', 0.9, '2025-01-01 10:21');
insert into unmatched (id, execution_id, job_id) values ('{N}', '{E}', '{J}');
insert into reports (id, job_id, execution_id, summary) values ('{R}', '{J}', '{E}', '{{}}');
insert into webhooks (id, user_id, url, events, secret) values ('{W}', '{U}', 'https://x', '{{}}', 's');
insert into webhook_payloads (id, tenant_id, adapter, payload) values ('{P}', '{T}', 'a', '{{}}');
insert into webhook_deliveries (id, webhook_id, url, payload) values ('{D}', '{W}', 'https://x', '{{}}');
insert into audit_logs (id, tenant_id, user_id, api_key_id, event) values ('{A}', '{T}', '{U}', '{K}', 'login');
insert into idempotency_keys (id, user_id, key, response, expires_at) values ('{I}', '{U}', 'k', '{{}}', now());
insert into blocked_ips (id, ip, reason, tenant_id) values ('{B}', '192.0.2.{t}', 'r', '{T}');
insert into security_events (id, event_type, severity, tenant_id, user_id) values ('{S}', 'e', 'low', '{T}', '{U}');
insert into tenant_usage (tenant_id, metric_type, period_start, period_end) values ('{T}', 'api_call', now(), now());
insert into tenant_quota_usage (tenant_id) values ('{T}');
insert into feature_flags (id, name, tenant_id) values ('{F}', 'flag', '{T}');
insert into feature_flag_changes (id, feature_flag_id, changed_by) values ('{C}', '{F}', '{U}');
insert into event_store (event_id, aggregate_id, aggregate_type, event_type, data, tenant_id)
  values ('{V}', '{E}', 'reconciliation', 'started', '{{}}', '{T}');
insert into snapshots (aggregate_id, aggregate_type, snapshot_data, snapshot_version, event_id, tenant_id)
  values ('{E}', 'reconciliation', '{{}}', 1, '{V}', '{T}');
insert into saga_state (saga_id, saga_type, aggregate_id, current_step, tenant_id)
  values ('saga{t}', 'x', '{E}', 'fetch', '{T}');
insert into dead_letter_queue (event_id, error_type, error_message, payload, tenant_id)
  values ('{V}', 'x', 'y', '{{}}', '{T}');
insert into reconciliation_summary (reconciliation_id, job_id, tenant_id) values ('{E}', '{J}', '{T}');
insert into tenant_usage_view (tenant_id, date) values ('{T}', '2025-01-01');
insert into error_hotspots_view (reconciliation_id, job_id, error_type, step, tenant_id)
  values ('{E}', '{J}', 'x', 'fetch', '{T}');
"""
SHARED_ROWS = """
insert into webhook_configs (adapter, secret) values ('stripe', 'whsec');
insert into revoked_tokens (jti, expires_at)
  values ('old', now() - interval '1 day'), ('new', now() + interval '1 day');
insert into feature_flags (id, name) values ('00000000-0000-4000-8000-0000000000f0', 'for everyone');
insert into feature_flag_changes (feature_flag_id) values ('00000000-0000-4000-8000-0000000000f0');
insert into blocked_ips (ip, reason) values ('198.51.100.1', 'everyone');
insert into security_events (event_type, severity) values ('before login', 'low');
"""


def id_of(letter: str, tenant: int) -> str:
    """Return the id of a tenant's row in ROWS."""
    return f"{ord(letter):08x}-0000-4000-8000-{tenant:012d}"


TENANT_A, TENANT_B = id_of("T", 1), id_of("T", 2)


class Session:
    """Somebody's session inside the test's transaction, which is rolled back: tests share one database."""

    def __init__(self, connection: psycopg.Connection[Any], become: str) -> None:
        self.connection = connection
        self.become = become

    def execute(self, query: str, values: Any = None) -> psycopg.Cursor[Any]:
        """Run a statement in a savepoint, so that the test goes on after one that is refused."""
        with self.connection.transaction():
            self.connection.execute(self.become.encode())
            return self.connection.execute(query.encode(), values)

    def scalar(self, query: str, *values: object) -> Any:
        """Return the first column of the first row."""
        row = self.execute(query, values or None).fetchone()
        assert row is not None
        return row[0]

    def of(self, tenant: str) -> Session:
        """Set the tenant of the session, as the API does."""
        self.execute("select set_config('app.current_tenant_id', %s, false)", (tenant,))
        return self


def scalar(connection: psycopg.Connection[Any], query: str) -> Any:
    """Return the first column of the first row."""
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def repeat(connection: psycopg.Connection[Any]) -> None:
    """Run the repeatable files once more, in the caller's transaction."""
    with connection.transaction():
        connection.execute("set local role settler_owner")
        for path in REPEATABLE:
            connection.execute(path.read_bytes())


@pytest.fixture(scope="module")
def shared(cluster, roles, _template) -> Iterator[str]:
    """Make the database that tests share, with rows of two tenants and of none. Nobody commits anything there."""
    name = "settler_test_schema"
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
        server.execute(f"create database {name} owner settler_owner template {_template}".encode())
        with psycopg.connect(cluster.conninfo(name), autocommit=True) as connection:
            connection.execute("set role settler_owner")
            build(connection)
            for t in (1, 2):
                ids = {letter: id_of(letter, t) for letter in "TUKJEMNRWPDAIBSFCV"}
                connection.execute(ROWS.format(t=t, **ids).encode())
            connection.execute(SHARED_ROWS.encode())
        yield name
        server.execute(f"drop database {name} with (force)".encode())


@pytest.fixture
def transaction(shared, connect) -> Iterator[psycopg.Connection[Any]]:
    """Open the test's transaction, as the superuser."""
    connection = connect(shared)
    with connection.transaction(force_rollback=True):
        yield connection


@pytest.fixture
def owner(transaction) -> Session:
    """Be the migrator, who became the owner."""
    return Session(transaction, "set local session authorization settler_migrator; set local role settler_owner")


@pytest.fixture
def app(transaction) -> Session:
    """Be the application, with no tenant set."""
    return Session(transaction, "set local session authorization settler_app")


def schema_of(cluster: Any, dbname: str) -> list[str]:
    """Return the schema of a database as pg_dump writes it."""
    state = cluster.state
    text = subprocess.run(
        [Path(state.bin, "pg_dump"), "-s", "-h", state.host, "-p", str(state.port), "-U", state.user, dbname],
        check=True, capture_output=True, text=True, env={**os.environ, "PGPASSWORD": state.password},
    ).stdout  # fmt: skip
    return [line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]


@pytest.fixture(scope="module")
def reference(cluster, shared) -> list[str]:
    """Return the schema of a database that was new when it was migrated."""
    return schema_of(cluster, shared)


def contents(
    connection: psycopg.Connection[Any] | Session, *, without_tenant: bool = False
) -> dict[str, tuple[int, int]]:
    """Return the number of rows of each table, and a sum that changes with any of their values."""
    found = {}
    for (table,) in connection.execute("select tablename from pg_tables where schemaname = 'public'").fetchall():
        row = "to_jsonb(t) - 'tenant_id'" if without_tenant else "to_jsonb(t)"
        query = f"select count(*), coalesce(sum(hashtextextended(({row})::text, 0)), 0) from {table} as t"
        found[table] = tuple(connection.execute(query).fetchone() or ())
    return found


# The file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((PROJECT / "sql").glob("[mo]*/**/*.sql")), ids=lambda path: path.name)
def test_the_files_are_plain_sql_that_name_no_environment(path) -> None:
    text = path.read_text()
    kinds = {type(statement.stmt).__name__ for statement in pglast.parse_sql(text)}
    assert not kinds & {"TransactionStmt", "CopyStmt", "GrantStmt", "AlterOwnerStmt"}
    assert "settler_" not in text


def test_what_takes_time_takes_no_lock_that_a_writer_waits_for() -> None:
    """002 fills, 003 builds, 005 reads; 004 only adds what is built or not proved yet."""
    for file in files_of():
        if file.version in ("002", "003", "005"):
            assert not file.directives.transaction
            for statement in parse(file).statements:
                locks = {effect.lock for effect in statement.effects if effect.lock}
                assert statement.effects, f"{file.file}:{statement.line}: the plan cannot tell"
                assert locks <= {"ACCESS SHARE", "ROW SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE"}, statement.line


@pytest.mark.every_major
def test_tables_are_what_the_facts_say(owner) -> None:
    expected = [
        (table, *column.replace(" !", "").split(" ", 1), column.endswith("!"))
        for line in FACTS.strip().splitlines()
        for table, _, columns in [line.partition(": ")]
        for column in columns.split(", ")
    ]
    found = owner.execute(
        """
        select relname, attname,
            replace(replace(format_type(atttypid, atttypmod), 'character varying', 'varchar'),
                    'timestamp without time zone', 'timestamp'),
            attnotnull
          from pg_attribute join pg_class on pg_class.oid = attrelid
          where relnamespace = 'public'::regnamespace and relkind = 'r' and attnum > 0 and not attisdropped
          order by relname, attnum
        """
    )
    assert len({table for table, *_ in expected}) == 28
    assert found.fetchall() == sorted(expected, key=lambda column: column[0])


def test_a_second_run_changes_nothing_and_its_repeatable_files_lock_no_table(new_database, connect, cluster) -> None:
    connection = connect(new_database(), role="settler_owner")
    build(connection)
    generate.fill(connection, shape=legacy.CURRENT, rows=1000, seed=7)
    schema, rows = schema_of(cluster, connection.info.dbname), contents(connection)
    build(connection)
    with connection.transaction():
        repeat(connection)
        locks = connection.execute(
            """
            select relation::regclass::text, mode from pg_locks join pg_class on pg_class.oid = relation
              where pid = pg_backend_pid() and relkind in ('r', 'm') and relnamespace::regnamespace::text !~ '^pg_'
                and mode not in ('AccessShareLock', 'RowShareLock')
            """
        ).fetchall()
    assert locks == []
    assert schema_of(cluster, connection.info.dbname) == schema
    assert contents(connection) == rows


@pytest.mark.every_major
def test_the_runbooks_next_steps_work_on_a_fresh_database(new_database, connect) -> None:
    connection = connect(new_database(), role="settler_owner")
    build(connection)
    connection.execute("insert into tenants (name, slug, tier) values ('Default Tenant', 'default', 'free')")
    connection.execute(
        """
        insert into users (tenant_id, email, password_hash, role)
          select id, 'admin@example.com', 'bcrypt-hashed-password', 'admin' from tenants
        """
    )
    build(connection)
    assert connection.execute("select name, tier from tenants").fetchall() == [("Default Tenant", "free")]


# Old databases -------------------------------------------------------------------------------------------------------


def old_database(new_database, connect, shape: str) -> psycopg.Connection[Any]:
    connection: psycopg.Connection[Any] = connect(new_database(), role="settler_owner")
    legacy.create(connection, shape)
    return connection


@pytest.mark.parametrize("shape", legacy.SHAPES)
def test_every_old_shape_becomes_the_same_schema_and_keeps_every_row(
    shape, new_database, connect, cluster, reference
) -> None:
    connection = old_database(new_database, connect, shape)
    loaded = generate.fill(connection, shape=shape, rows=1500, seed=7)
    before = contents(connection, without_tenant=True)
    assert {table: count for table, (count, _) in before.items()} == loaded
    assert sum(loaded.values()) > 1400

    build(connection)

    after = contents(connection, without_tenant=True)
    assert after.pop("tenants")[0] == before.pop("tenants", (0, 0))[0] + 1  # the default tenant
    assert {table: after[table] for table in before} == before
    assert scalar(connection, f"select count(*) from users where tenant_id = '{DEFAULT_TENANT}'") > 0
    for table in ISOLATED:
        assert scalar(connection, f"select count(*) from {table} where tenant_id is null") == 0, table
    for child, parent, link in PARENTS:
        query = f"select count(*) from {child} c join {parent} p on p.id = c.{link} where c.tenant_id <> p.tenant_id"
        assert scalar(connection, query) == 0, child
    schema, rows = schema_of(cluster, connection.info.dbname), contents(connection)
    assert sorted(line.rstrip(",") for line in schema) == sorted(line.rstrip(",") for line in reference)  # in any order

    build(connection)

    assert schema_of(cluster, connection.info.dbname) == schema
    assert contents(connection) == rows


@pytest.mark.every_major
def test_an_old_row_takes_its_parents_tenant_or_the_default_one(new_database, connect) -> None:
    connection = old_database(new_database, connect, "materialized_views")
    connection.execute(
        f"""
        alter table users force row level security;
        insert into tenants (id, name, slug) values ('{TENANT_A}', 'A', 'a'), ('{TENANT_B}', 'Ours', 'default');
        alter table users no force row level security;
        insert into users (id, tenant_id, email, password_hash)
          values ('{id_of("U", 1)}', '{TENANT_A}', 'a', 'x'), ('{id_of("U", 2)}', null, 'b', 'x');
        alter table users force row level security;
        insert into audit_logs (event, user_id) values ('of a', '{id_of("U", 1)}'), ('of nobody', null);
        insert into feature_flags (name) values ('everyone');
        insert into blocked_ips (ip, reason) values ('192.0.2.1', 'everyone');
        insert into security_events (event_type, severity) values ('nobody', 'low');
        """.encode()
    )
    build(connection)
    assert scalar(connection, "select tenant_id from users where email = 'b'") == uuid.UUID(TENANT_B)
    assert connection.execute("select event, tenant_id::text from audit_logs order by 1").fetchall() == [
        ("of a", TENANT_A),
        ("of nobody", TENANT_B),
    ]
    assert scalar(connection, "select count(*) from tenants") == 2
    for table in MIXED:
        assert scalar(connection, f"select count(*) from {table} where tenant_id is null") == 1


def test_the_default_tenant_is_made_with_its_known_id_only_for_rows_that_need_it(new_database, connect) -> None:
    connection = old_database(new_database, connect, "oldest")
    build(connection)
    assert scalar(connection, "select count(*) from tenants") == 0

    connection = old_database(new_database, connect, "oldest")
    connection.execute("insert into webhook_payloads (adapter, payload) values ('a', '{}')")
    build(connection)
    assert scalar(connection, "select tenant_id from webhook_payloads") == DEFAULT_TENANT
    assert connection.execute("select id, name, slug from tenants").fetchall() == [
        (DEFAULT_TENANT, "Default Tenant", "default")
    ]


def test_a_deleted_tenants_audit_log_is_given_to_nobody(new_database, connect) -> None:
    connection = connect(new_database(), role="settler_owner")
    build(connection)
    connection.execute(
        f"""
        insert into tenants (id, name, slug) values ('{TENANT_A}', 'A', 'a'), ('{TENANT_B}', 'Ours', 'default');
        insert into audit_logs (event, tenant_id) values ('login', '{TENANT_A}');
        delete from tenants where slug = 'a'
        """.encode()
    )
    build(connection)
    assert scalar(connection, "select count(*) from audit_logs where tenant_id is null") == 1


BAD_ROWS = {
    "a flag twice": (
        "insert into feature_flags (name) values ('twice'), ('twice'), ('once')",
        "relation=feature_flags, name=twice, tenant=all, of_user=all, times=2",
        "delete from feature_flags where ctid = (select min(ctid) from feature_flags)",
    ),
    "a job of another tenant's user": (
        f"""insert into tenants (id, name, slug) values ('{TENANT_A}', 'A', 'a'), ('{TENANT_B}', 'B', 'b');
        set row_security = off;
        insert into users (id, tenant_id, email, password_hash) values ('{id_of("U", 1)}', '{TENANT_A}', 'a', 'x');
        insert into jobs (user_id, tenant_id, name, source_adapter, source_config_encrypted, target_adapter,
            target_config_encrypted, rules) values ('{id_of("U", 1)}', '{TENANT_B}', 'n', 'a', 'x', 'b', 'x', '[]')""",
        f"tenant={TENANT_B}, refers_to=users, of_tenant={TENANT_A}",
        f"update jobs set tenant_id = '{TENANT_A}'",
    ),
    "a flag that breaks a check": (
        "insert into feature_flags (name, rollout_percentage) values ('odd', 150)",
        "feature_flags_rollout_percentage_check",
        "update feature_flags set rollout_percentage = 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ROWS)
def test_old_rows_against_a_rule_are_kept_and_named_and_the_next_run_goes_on(
    what, new_database, connect, apply
) -> None:
    bad, named, mended = BAD_ROWS[what]
    connection = old_database(new_database, connect, "multi_tenancy")
    connection.execute(bad.encode())
    files = files_of()
    assert named in refused(apply, connection.info.dbname, files).message
    connection.execute(mended.encode())
    apply(connection.info.dbname, files)
    assert scalar(connection, "select bool_and(convalidated) from pg_constraint")
    with pytest.raises(errors.CheckViolation):
        connection.execute("insert into feature_flags (name, rollout_percentage) values ('more', 101)")


def test_writers_go_on_while_indexes_are_built_and_rules_are_proved(new_database, connect, apply) -> None:
    connection = old_database(new_database, connect, "multi_tenancy")
    generate.fill(connection, shape="multi_tenancy", rows=20_000, seed=7)
    name = connection.info.dbname
    files = files_of()
    apply(name, files[:2], hazards_allowed=(), hazard_min_bytes=0)
    done = False

    def write() -> int:
        """Insert into the largest tables, again and again; waiting for long for a lock would be an error."""
        writer, count = connect(name, role="settler_owner"), 0
        writer.execute("set lock_timeout = '2s'")
        while not done:
            for query in (
                """insert into matches (execution_id, job_id, tenant_id, source_id, target_id)
                   select id, job_id, tenant_id, 's', 't' from executions limit 1""",
                "insert into executions (job_id, tenant_id) select id, tenant_id from jobs limit 1",
                "insert into audit_logs (event, tenant_id) select 'x', id from tenants limit 1",
            ):
                writer.execute(query.encode())
                count += 1
        return count

    writing = Background(write)
    try:
        for version in ("003", "004", "005"):
            known = [file for file in files if file.kind == "versioned" and file.version <= version]
            apply(name, known, hazards_allowed=(), hazard_min_bytes=0)
    finally:
        done = True
    apply(name, files, hazards_allowed=(), hazard_min_bytes=0)
    assert writing.value() > 0
    assert scalar(connection, "select bool_and(convalidated) from pg_constraint")
    assert scalar(connection, "select bool_and(indisvalid and indisready) from pg_index")


# Rules between rows --------------------------------------------------------------------------------------------------


DUPLICATES = """
insert into users (email, password_hash) values ('n', 'x'), ('n', 'x')
insert into users (tenant_id, email, password_hash) select tenant_id, email, 'x' from users
insert into feature_flags (name) values ('for everyone')
insert into feature_flags (name, tenant_id) select name, tenant_id from feature_flags where tenant_id is not null
insert into feature_flags (name, user_id) select 'u', id from users, generate_series(1, 2)
insert into feature_flags (name, tenant_id, user_id) select 'u', tenant_id, id from users, generate_series(1, 2)
insert into blocked_ips (ip, reason) values ('198.51.100.1', 'again')
insert into blocked_ips (ip, reason, tenant_id) select ip, 'again', tenant_id from blocked_ips
insert into idempotency_keys (user_id, key, response, expires_at) select user_id, key, '{}', now() from idempotency_keys
insert into tenant_usage (tenant_id, metric_type, period_start, period_end) \
    select tenant_id, metric_type, period_start, period_end from tenant_usage
insert into event_store (event_id, aggregate_id, aggregate_type, event_type, data) \
    select event_id, aggregate_id, 'x', 'x', '{}' from event_store
insert into snapshots (aggregate_id, aggregate_type, snapshot_data, snapshot_version, event_id) \
    select aggregate_id, aggregate_type, '{}', snapshot_version, event_id from snapshots
insert into saga_state (saga_id, saga_type, aggregate_id, current_step) \
    select saga_id, saga_type, aggregate_id, 'x' from saga_state
insert into tenants (name, slug) select name, slug from tenants
"""


@pytest.mark.parametrize("statement", DUPLICATES.strip().splitlines())
def test_duplicates_are_refused_with_null_too(owner, statement) -> None:
    with pytest.raises(errors.UniqueViolation):
        owner.execute(statement)


def test_an_ip_is_blocked_again_after_the_block_was_lifted(owner) -> None:
    owner.execute("update blocked_ips set unblocked_at = now()")
    owner.execute("insert into blocked_ips (ip, reason) values ('198.51.100.1', 'again')")
    assert owner.scalar("select count(*) from blocked_ips where ip = '198.51.100.1'") == 2


INSERTS = {
    "jobs": "insert into jobs (user_id, tenant_id, name, source_adapter, source_config_encrypted, target_adapter, "
    "target_config_encrypted, rules) values ('{U}', {tenant}, 'n', 'a', 'x', 'b', 'x', '[]') returning tenant_id::text",
    "executions": "insert into executions (job_id, tenant_id) values ('{J}', {tenant}) returning tenant_id::text",
    "matches": "insert into matches (execution_id, job_id, tenant_id, source_id, target_id) "
    "values ('{E}', '{J}', {tenant}, 's', 't') returning tenant_id::text",
    "unmatched": "insert into unmatched (execution_id, job_id, tenant_id) values ('{E}', '{J}', {tenant}) "
    "returning tenant_id::text",
    "reports": "insert into reports (execution_id, job_id, tenant_id, summary) values ('{E}', '{J}', {tenant}, '[]') "
    "returning tenant_id::text",
    "webhooks": "insert into webhooks (user_id, tenant_id, url, events, secret) "
    "values ('{U}', {tenant}, 'u', '{{}}', 's') returning tenant_id::text",
    "api_keys": "insert into api_keys (user_id, tenant_id, key_prefix, key_hash) values ('{U}', {tenant}, 'p', 'h') "
    "returning tenant_id::text",
    "idempotency_keys": "insert into idempotency_keys (user_id, tenant_id, key, response, expires_at) "
    "values ('{U}', {tenant}, 'new', '[]', now()) returning tenant_id::text",
}


def inserting(table: str, parents_of: int, tenant: str) -> str:
    return INSERTS[table].format(tenant=tenant, **{letter: id_of(letter, parents_of) for letter in "UJE"})


@pytest.mark.parametrize("table", INSERTS)
def test_a_row_takes_its_tenant_from_its_parent_and_cannot_reach_another_ones(owner, app, table) -> None:
    app.of(TENANT_A)
    for session in (owner, app):
        for said in ("null", f"'{TENANT_A}'"):
            with session.connection.transaction(force_rollback=True):
                assert session.scalar(inserting(table, 1, said)) == TENANT_A
        with pytest.raises(errors.CheckViolation, match=table):
            session.execute(inserting(table, 1, f"'{TENANT_B}'"))
    for tenant in ("null", f"'{TENANT_A}'", f"'{TENANT_B}'"):
        with pytest.raises(errors.CheckViolation, match="does not exist or belongs to another tenant"):
            app.execute(inserting(table, 2, tenant))
    link = "job_id" if "job_id" in INSERTS[table] else "user_id"
    other = id_of("J" if link == "job_id" else "U", 2)
    for session in (owner, app):
        for change in (f"{link} = '{other}'", f"tenant_id = '{TENANT_B}'"):
            with pytest.raises(errors.CheckViolation):
                session.execute(f"update {table} set {change} where tenant_id = '{TENANT_A}'")


@pytest.mark.every_major
@pytest.mark.parametrize("table", INSERTS)
def test_the_keys_themselves_keep_a_row_in_its_parents_tenant(owner, table) -> None:
    """No trigger, no policy: as after a mistake of the owner."""
    owner.execute(f"alter table {table} disable trigger user")
    with pytest.raises(errors.ForeignKeyViolation, match="tenant_id_fkey"):
        owner.execute(inserting(table, 1, f"'{TENANT_B}'"))
    with pytest.raises(errors.ForeignKeyViolation, match="tenant_id_fkey"):
        owner.execute(f"update {table} set tenant_id = '{TENANT_B}' where tenant_id = '{TENANT_A}'")
    owner.execute(inserting(table, 1, f"'{TENANT_A}'"))


def test_a_parent_cannot_leave_its_rows_behind_in_another_tenant(owner) -> None:
    for table in ("users", "jobs", "executions", "event_store"):
        with owner.connection.transaction(force_rollback=True):
            owner.execute(f"alter table {table} disable trigger user")
            change = f"tenant_id = '{TENANT_B}'" + (", email = 'new'" if table == "users" else "")
            with pytest.raises(errors.ForeignKeyViolation, match="tenant_id_fkey"):
                owner.execute(f"update {table} set {change} where tenant_id = '{TENANT_A}'")


OTHER_REFERENCES = (
    "update audit_logs set user_id = '{U}' where tenant_id = '{T}'",
    "update audit_logs set api_key_id = '{K}' where tenant_id = '{T}'",
    "update security_events set user_id = '{U}' where tenant_id = '{T}'",
    "update security_events set api_key_id = '{K}' where tenant_id = '{T}'",
    "update security_events set resolved_by = '{U}' where tenant_id = '{T}'",
    "update feature_flag_changes set changed_by = '{U}' where id = '{C}'",
    "update dead_letter_queue set event_id = '{V}' where tenant_id = '{T}'",
    "update feature_flags set user_id = '{U}' where tenant_id = '{T}'",
    "update snapshots set event_id = '{V}' where tenant_id = '{T}'",
)


@pytest.mark.parametrize("statement", OTHER_REFERENCES)
def test_the_owner_cannot_refer_across_tenants_either(owner, statement) -> None:
    own = {"T": TENANT_A, "C": id_of("C", 1)}
    assert owner.execute(statement.format(**own, **{letter: id_of(letter, 1) for letter in "UKV"})).rowcount == 1
    with pytest.raises((errors.CheckViolation, errors.ForeignKeyViolation)):
        owner.execute(statement.format(**own, **{letter: id_of(letter, 2) for letter in "UKV"}))


def test_a_session_without_a_tenant_is_told_why_its_write_is_refused(app) -> None:
    with pytest.raises(errors.CheckViolation) as caught:
        app.execute(inserting("jobs", 1, "null"))
    assert caught.value.diag.message_hint == "The session sees the rows of app.current_tenant_id: none is set."


def test_an_event_without_a_tenant_names_nobody(app) -> None:
    app.of(TENANT_A)
    with pytest.raises(errors.InsufficientPrivilege, match="row-level security"):
        app.execute(
            "insert into security_events (event_type, severity, user_id) values ('x', 'low', %s)", (id_of("U", 2),)
        )


def test_parents_of_two_tenants_are_refused(owner) -> None:
    values = f"('{id_of('E', 1)}', '{id_of('J', 2)}', 's', 't')"
    with pytest.raises(errors.CheckViolation, match=r"matches has tenant_id .* but its row of jobs"):
        owner.execute(f"insert into matches (execution_id, job_id, source_id, target_id) values {values}")


@pytest.mark.parametrize(
    "statement",
    [
        "update audit_logs set user_id = '{U}'",
        "update audit_logs set api_key_id = '{K}'",
        "update security_events set user_id = '{U}'",
        "update security_events set resolved_by = '{U}'",
        "update feature_flags set user_id = '{U}' where name = 'flag'",
        "update feature_flag_changes set changed_by = '{U}'",
        "update feature_flag_changes set feature_flag_id = '{F}'",
        "update webhook_deliveries set webhook_id = '{W}'",
        "update snapshots set event_id = '{V}'",
        "update dead_letter_queue set event_id = '{V}'",
    ],
)
def test_other_references_stay_in_the_tenant(owner, app, statement) -> None:
    app.of(TENANT_A)
    own, others = (statement.format(**{letter: id_of(letter, t) for letter in "UKFWV"}) for t in (1, 2))
    assert app.execute(own).rowcount == 1
    with pytest.raises((errors.InsufficientPrivilege, errors.CheckViolation)):
        app.execute(others)


def test_a_tenant_does_not_place_itself_below_another_one(owner, app) -> None:
    """The foreign key alone would find any tenant, and tell whether there is one."""
    app.of(TENANT_A)
    for parent in (TENANT_B, "00000000-0000-4000-8000-00000000dead"):
        with pytest.raises(errors.InsufficientPrivilege, match="parent_tenant_id is not for settler_app to set"):
            app.execute("update tenants set parent_tenant_id = %s", (parent,))
    with pytest.raises(errors.InsufficientPrivilege):
        app.execute("insert into tenants (name, slug, parent_tenant_id) values ('c', 'c', %s)", (TENANT_B,))
    assert app.execute("update tenants set parent_tenant_id = null, name = 'own name'").rowcount == 1
    owner.execute("update tenants set parent_tenant_id = %s where id = %s", (TENANT_B, TENANT_A))
    assert app.execute("update tenants set parent_tenant_id = parent_tenant_id, name = 'again'").rowcount == 1


def test_deleting_a_tenant_takes_its_rows_and_leaves_the_logs(owner) -> None:
    owner.execute("delete from tenants where id = %s", (TENANT_A,))
    for table in ISOLATED:
        expected = 1 if table == "audit_logs" else 0
        assert owner.scalar(f"select count(*) from {table} where tenant_id is distinct from '{TENANT_B}'") == expected
    assert owner.scalar("select count(*) from security_events where tenant_id is null") == 2
    assert owner.scalar("select count(*) from webhook_deliveries") == 1


# Isolation -----------------------------------------------------------------------------------------------------------

EVERY_TABLE = [line.partition(":")[0] for line in FACTS.strip().splitlines()]


@pytest.mark.parametrize("context", ["never set", "", "reset", "garbage", "' or 1=1 --", TENANT_A[:-1]])
def test_a_session_without_a_tenant_sees_and_writes_nothing(app, context) -> None:
    if context == "reset":
        app.of(TENANT_A).execute("reset app.current_tenant_id")
    elif context != "never set":
        app.of(context)
    assert app.scalar("select current_tenant_id()") is None
    for relation in [*EVERY_TABLE, *VIEWS]:
        assert app.scalar(f"select count(*) from {relation}") == 0, relation
    for table in EVERY_TABLE:
        assert app.execute(f"delete from {table}").rowcount == 0, table
    with pytest.raises(errors.InsufficientPrivilege, match="row-level security"):
        app.execute("insert into users (tenant_id, email, password_hash) values (%s, 'new', 'x')", (TENANT_A,))


@pytest.mark.every_major
@pytest.mark.parametrize("tenant", [TENANT_A, TENANT_A.upper(), TENANT_B])
def test_a_tenant_sees_its_own_rows_and_no_others(owner, app, tenant) -> None:
    owner.execute("select refresh_all_materialized_views()")
    app.of(tenant)
    for relation in [*ISOLATED, *VIEWS]:
        seen = app.execute(f"select tenant_id::text from {relation}").fetchall()
        assert seen == [(tenant.lower(),)], relation
    assert app.scalar("select id::text from tenants") == tenant.lower()
    for table in ("feature_flags", "blocked_ips"):
        seen = app.execute(f"select tenant_id::text from {table} order by 1").fetchall()
        assert seen == [(tenant.lower(),), (None,)], table
    assert app.scalar("select tenant_id::text from security_events") == tenant.lower()
    for table in BY_PARENT:
        assert app.scalar(f"select count(*) from {table}") == 1, table
    for table in CLOSED:
        assert app.scalar(f"select count(*) from {table}") == 0, table


@pytest.mark.parametrize("table", [*ISOLATED, *MIXED, "tenants"])
def test_a_tenant_cannot_touch_or_make_another_ones_rows(owner, app, table) -> None:
    key = "id" if table == "tenants" else "tenant_id"
    before = contents(owner)[table]
    app.of(TENANT_A)
    with app.connection.transaction(force_rollback=True):
        assert app.execute(f"update {table} set {key} = {key} where {key} = '{TENANT_A}'").rowcount == 1
    assert app.execute(f"update {table} set {key} = {key} where {key} = '{TENANT_B}'").rowcount == 0
    assert app.execute(f"delete from {table} where {key} is distinct from '{TENANT_A}'").rowcount == 0
    with pytest.raises((errors.InsufficientPrivilege, errors.CheckViolation)):
        app.execute(f"update {table} set {key} = '{TENANT_B}' where {key} = '{TENANT_A}'")
    assert contents(owner)[table] == before


def test_rows_for_everyone_are_read_and_not_written(app) -> None:
    app.of(TENANT_A)
    for table in ("feature_flags", "blocked_ips"):
        assert app.execute(f"update {table} set created_at = now() where tenant_id is null").rowcount == 0
    for statement in (
        "insert into feature_flags (name) values ('mine for everyone')",
        "insert into blocked_ips (ip, reason) values ('203.0.113.1', 'mine for everyone')",
        "update feature_flags set tenant_id = null",
    ):
        with pytest.raises(errors.InsufficientPrivilege, match="row-level security"):
            app.execute(statement)


def test_a_flag_of_one_user_is_for_nobody_else(owner, app) -> None:
    owner.execute("insert into feature_flags (name, user_id) values ('of one user', %s)", (id_of("U", 2),))
    assert app.of(TENANT_A).scalar("select count(*) from feature_flags where name = 'of one user'") == 0


def test_every_session_reports_security_events_without_a_tenant(owner, app) -> None:
    app.execute("insert into security_events (event_type, severity) values ('anonymous', 'high')")
    app.of(TENANT_A).execute("insert into security_events (event_type, severity) values ('tenant', 'high')")
    assert owner.scalar("select count(*) from security_events where tenant_id is null and severity = 'high'") == 2
    with pytest.raises(errors.InsufficientPrivilege):
        app.execute(
            "insert into security_events (event_type, severity, tenant_id) values ('x', 'low', %s)", (TENANT_B,)
        )


def test_the_application_cannot_go_around_the_policies(app) -> None:
    app.of(TENANT_A)
    for statement in (
        "select * from private.mv_job_performance",
        "select private.require_privilege('public.users', 'select')",
        "refresh materialized view private.mv_job_performance",
        "select refresh_all_materialized_views()",
        "truncate jobs",
        "alter table jobs disable row level security",
        "create table public.mine ()",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute(statement)


@pytest.mark.every_major
def test_every_table_has_its_policies_and_every_policy_both_sides(owner) -> None:
    assert owner.scalar("select count(*) from pg_class where relrowsecurity and not relforcerowsecurity") == 28
    policies = owner.execute(
        "select tablename, policyname, cmd, qual is not null, with_check is not null from pg_policies order by 1, 2"
    ).fetchall()
    expected = [
        (table, f"tenant_isolation_{'dlq' if table == 'dead_letter_queue' else table}", "ALL", True, True)
        for table in EVERY_TABLE
        if table not in CLOSED
    ]
    expected += [
        ("feature_flags", "global_rows_feature_flags", "SELECT", True, False),
        ("blocked_ips", "global_rows_blocked_ips", "SELECT", True, False),
        ("security_events", "global_rows_security_events", "INSERT", False, True),
    ]
    assert policies == sorted(expected)
    barriers = "select count(*) from pg_class where reloptions = '{security_barrier=true}' and relname = any (%s)"
    assert owner.scalar(barriers, list(VIEWS)) == len(VIEWS)
    assert not owner.scalar(
        """select count(*) from pg_policies where concat(qual, with_check) ~ 'current_tenant_id'
             and concat(qual, with_check) !~ 'SELECT current_tenant_id\\(\\) AS current_tenant_id'""",
    )


def test_a_weakened_policy_of_an_old_database_is_replaced(owner) -> None:
    owner.execute("drop policy tenant_isolation_jobs on jobs")
    owner.execute("create policy tenant_isolation_jobs on jobs using (true)")
    repeat(owner.connection)
    found = owner.scalar("select qual || with_check from pg_policies where policyname = 'tenant_isolation_jobs'")
    assert found.count("current_tenant_id()") == 2


# Functions -----------------------------------------------------------------------------------------------------------


@pytest.mark.every_major
def test_functions_are_the_listed_ones_with_a_fixed_search_path(owner) -> None:
    found = owner.execute(
        """
        select proname, prosecdef, proconfig @> array['search_path=pg_catalog, pg_temp']
          from pg_proc
          where pronamespace in ('public'::regnamespace, 'private'::regnamespace)
            and not exists (select from pg_depend where objid = pg_proc.oid and deptype = 'e')
        """
    ).fetchall()
    invoker = {
        "current_tenant_id", "inherit_tenant_id", "check_tenant_quota", "increment_tenant_quota_usage",
        "get_latest_snapshot", "get_events_after_snapshot", "get_all_events_for_aggregate",
        "refresh_all_materialized_views", "require_privilege", "keep_parent_of_tenant",
        *(f"propagate_tenant_id_to_{table}" for table in INSERTS),
    }  # fmt: skip
    definer = {
        "is_ip_blocked", "is_token_revoked", "revoke_token", "cleanup_expired_revoked_tokens", "get_webhook_config",
        "keep_references_in_tenant",
    }  # fmt: skip
    assert {name: (secdef, fixed) for name, secdef, fixed in found} == {
        **dict.fromkeys(invoker, (False, True)),
        **dict.fromkeys(definer, (True, True)),
    }


@pytest.fixture(params=["owner", "app"])
def caller(request, owner, app) -> Session:
    """Be the owner, and the application for tenant A."""
    return owner if request.param == "owner" else app.of(TENANT_A)


def quota(session: Session, kind: str, requested: int = 1, tenant: str = TENANT_A) -> bool | None:
    answer: bool | None = session.scalar("select check_tenant_quota(%s, %s, %s)", tenant, kind, requested)
    return answer


def test_quotas_count_from_the_first_increment(owner, caller) -> None:
    owner.execute("delete from tenant_quota_usage")
    assert quota(caller, "concurrentJobs", 5)  # no usage row yet
    assert not quota(caller, "concurrentJobs", 6)
    for _ in range(5):
        assert quota(caller, "concurrentJobs")
        caller.execute("select increment_tenant_quota_usage(%s, 'concurrentJobs')", (TENANT_A,))
    assert not quota(caller, "concurrentJobs")
    caller.execute("select increment_tenant_quota_usage(%s, 'concurrentJobs', -1)", (TENANT_A,))
    assert quota(caller, "concurrentJobs")
    caller.execute("select increment_tenant_quota_usage(%s, 'concurrentJobs', -9)", (TENANT_A,))
    caller.execute("select increment_tenant_quota_usage(%s, 'storageBytes', 1073741824)", (TENANT_A,))
    caller.execute("select increment_tenant_quota_usage(%s, 'storageBytes', null)", (TENANT_A,))
    assert quota(caller, "storageBytes", 0)
    assert not quota(caller, "storageBytes")
    assert owner.execute(
        "select current_storage_bytes, current_concurrent_jobs, current_monthly_reconciliations from tenant_quota_usage"
    ).fetchall() == [(1073741824, 0, 0)]


def test_reconciliations_are_counted_by_the_month(owner, caller) -> None:
    owner.execute("update tenant_quota_usage set current_monthly_reconciliations = 999, last_reset_at = '2020-01-31'")
    assert quota(caller, "monthlyReconciliations", 1000)
    caller.execute("select increment_tenant_quota_usage(%s, 'monthlyReconciliations', 998)", (TENANT_A,))
    caller.execute("select increment_tenant_quota_usage(%s, 'reconciliation')", (TENANT_A,))
    assert quota(caller, "monthlyReconciliations")
    assert not quota(caller, "monthlyReconciliations", 2)
    assert owner.execute(
        """
        select current_monthly_reconciliations, last_reset_at >= date_trunc('month', now()), metric_value,
            period_start = date_trunc('month', now()), period_end = period_start + interval '1 month'
          from tenant_quota_usage join tenant_usage using (tenant_id)
          where tenant_id = %s and metric_type = 'reconciliation'
        """,
        (TENANT_A,),
    ).fetchall() == [(999, True, 999, True, True)]
    owner.execute("update tenant_usage set period_start = period_start - interval '1 month'")
    owner.execute("update tenant_quota_usage set last_reset_at = '2020-01-31'")
    assert quota(caller, "monthlyReconciliations", 1000)  # a new month
    caller.execute("select increment_tenant_quota_usage(%s, 'storageBytes')", (TENANT_A,))
    counter = "select current_monthly_reconciliations from tenant_quota_usage where tenant_id = %s"
    assert owner.scalar(counter, TENANT_A) == 0


def test_quotas_without_counter_and_unknown_ones(owner, caller) -> None:
    assert quota(caller, "rateLimitRpm", 1000)
    assert not quota(caller, "rateLimitRpm", 1001)
    assert not quota(caller, "customDomains")
    owner.execute("""update tenants set quotas = quotas || '{"customDomains": 2, "storageBytes": "lots"}'""")
    assert quota(caller, "customDomains", 2)
    owner.execute("""update tenants set config = '{"customDomain": "a.example"}'""")
    assert quota(caller, "customDomains", 1)
    assert not quota(caller, "customDomains", 2)
    owner.execute("""update tenants set config = '{"customDomains": ["a.example", "b.example"]}'""")
    assert not quota(caller, "customDomains", 1)
    for kind in ("storageBytes", "unheardOf"):
        assert quota(caller, kind) is False
    assert quota(caller, "concurrentJobs", tenant=str(uuid.uuid4())) is False
    with pytest.raises(errors.InvalidParameterValue, match="unheardOf"):
        caller.execute("select increment_tenant_quota_usage(%s, 'unheardOf')", (TENANT_A,))
    owner.execute("update tenants set deleted_at = now()")
    assert quota(caller, "concurrentJobs") is False


def test_quotas_of_another_tenant_are_out_of_reach(owner, app) -> None:
    app.of(TENANT_A)
    assert quota(app, "concurrentJobs", tenant=TENANT_B) is False
    with pytest.raises(errors.InsufficientPrivilege):
        app.execute("select increment_tenant_quota_usage(%s, 'storageBytes')", (TENANT_B,))


def test_events_and_snapshots_of_an_aggregate(owner, caller) -> None:
    aggregate = id_of("E", 1)
    for number in (2, 3, 4):
        owner.execute(
            "insert into event_store (event_id, aggregate_id, aggregate_type, event_type, data, tenant_id) "
            "values (%s, %s, 'reconciliation', %s, '{}', %s)",
            (id_of("V", number * 10), aggregate, f"e{number}", TENANT_A),
        )
    owner.execute(
        "insert into snapshots (aggregate_id, aggregate_type, snapshot_data, snapshot_version, event_id, tenant_id) "
        "values (%s, 'reconciliation', '[3]', 2, %s, %s)",
        (aggregate, id_of("V", 30), TENANT_A),
    )

    def types(query: str) -> list[str]:
        return [kind for (kind,) in caller.execute(query, (aggregate,)).fetchall()]

    assert caller.execute("select * from get_latest_snapshot(%s, 'reconciliation')", (aggregate,)).fetchall() == [
        ([3], 2, uuid.UUID(id_of("V", 30)))
    ]
    everything = ["started", "e2", "e3", "e4"]
    assert types("select event_type from get_all_events_for_aggregate(%s, 'reconciliation')") == everything
    assert types("select event_type from get_all_events_for_aggregate(%s, 'other')") == []
    assert types("select event_type from get_events_after_snapshot(%s, 'reconciliation', 1)") == ["e2", "e3", "e4"]
    assert types("select event_type from get_events_after_snapshot(%s, 'reconciliation', 2)") == ["e4"]
    assert types("select event_type from get_events_after_snapshot(%s, 'reconciliation', 77)") == everything


def test_blocked_ips_are_known_before_the_login_too(owner, app) -> None:
    def blocked(ip: str, *tenant: str) -> bool:
        answer: bool = app.scalar(f"select is_ip_blocked({', '.join(['%s'] * (1 + len(tenant)))})", ip, *tenant)
        return answer

    assert blocked("198.51.100.1")
    assert blocked("198.51.100.1", TENANT_A)
    assert blocked("192.0.2.1", TENANT_A)
    assert not blocked("192.0.2.1", TENANT_B)
    assert not blocked("192.0.2.1")
    app.of(TENANT_B)
    assert blocked("198.51.100.1", TENANT_B)
    assert not blocked("192.0.2.1", TENANT_A)  # what another tenant blocks is not this one's to know
    owner.execute("update blocked_ips set unblocked_at = now()")
    assert not blocked("198.51.100.1")


def test_tokens_are_revoked_asked_for_and_cleaned_up(owner, app) -> None:
    assert app.scalar("select is_token_revoked('new')")
    assert not app.scalar("select is_token_revoked('mine')")
    app.execute("select revoke_token('mine', timezone('UTC', now()) + interval '1 hour', 'logout')")
    app.execute("select revoke_token('mine', timezone('UTC', now()) + interval '2 hours', 'again')")
    assert app.scalar("select is_token_revoked('mine')")
    assert owner.execute(
        "select reason, expires_at > timezone('UTC', now()) + interval '90 minutes' "
        "from revoked_tokens where jti = 'mine'"
    ).fetchall() == [("logout", True)]
    for zone in ("Asia/Tokyo", "America/Los_Angeles"):  # a token's time is in UTC, whatever the session's zone
        app.execute(f"set timezone = '{zone}'; select cleanup_expired_revoked_tokens()")
    assert owner.execute("select jti from revoked_tokens order by 1").fetchall() == [("mine",), ("new",)]


def test_a_webhooks_secret_is_looked_up_by_adapter(app) -> None:
    assert app.execute("select * from get_webhook_config('stripe')").fetchall() == [("whsec", "hmac-sha256")]
    assert app.execute("select * from get_webhook_config('unknown')").fetchall() == []


@pytest.mark.parametrize(
    "call",
    [
        "is_ip_blocked('192.0.2.1')",
        "is_token_revoked('x')",
        "revoke_token('x', now()::timestamp)",
        "cleanup_expired_revoked_tokens()",
        "get_webhook_config('stripe')",
    ],
)
def test_definer_functions_give_a_stranger_nothing(transaction, call) -> None:
    transaction.execute("create role stranger; grant usage on schema public to stranger")
    stranger = Session(transaction, "set local session authorization stranger")
    with pytest.raises(errors.InsufficientPrivilege, match=r"role stranger has no .* right on"):
        stranger.execute(f"select {call}")


def test_statistics_are_right_and_refreshed_while_they_are_read(owner, app, connect, shared) -> None:
    reader = connect(shared, role="settler_owner")
    with reader.transaction():
        assert scalar(reader, "select count(*) from private.mv_job_performance") == 0
        owner.execute("set local lock_timeout = '2s'")
        owner.execute("select refresh_all_materialized_views()")
    app.of(TENANT_A)
    assert app.execute("select day::text, executions, matched, unmatched, average_duration_ms "
                       "from reconciliation_summary_daily").fetchall() == [("2025-01-01", 1, 1, 1, 40)]  # fmt: skip
    assert app.execute("select runs, completed, failed, success_rate, average_duration_ms, longest_duration_ms "
                       "from job_performance").fetchall() == [(1, 1, 0, 1, 40, 40)]  # fmt: skip
    assert app.execute("select hour::text, executions, matches from tenant_usage_hourly").fetchall() == [
        ("2025-01-01 10:00:00", 1, 1)
    ]
    assert [tuple(map(float, row)) for row in app.execute(
        "select matches, average_confidence from match_accuracy_by_job")] == [(1, 0.9)]  # fmt: skip
    owner.execute("refresh materialized view private.mv_job_performance with no data")
    owner.execute("select refresh_all_materialized_views()")
    assert owner.scalar("select bool_and(ispopulated) from pg_matviews")


@pytest.mark.every_major
def test_a_statistic_with_another_definition_is_made_anew_and_the_others_are_left(owner) -> None:
    oids = "select relname, oid from pg_class where relkind = 'm' order by 1"
    before = dict(owner.execute(oids).fetchall())
    text = REPEATABLE[-1].read_text()
    owner.execute(text.replace("round(avg(confidence), 4)", "round(avg(confidence), 1)"))
    after = dict(owner.execute(oids).fetchall())
    assert {name for name in before if before[name] != after[name]} == {"mv_match_accuracy_by_job"}
    assert owner.scalar("select bool_and(ispopulated) from pg_matviews")
    assert owner.scalar("select count(*) from pg_class where relkind = 'v' and relname = any (%s)", list(VIEWS)) == 4
    owner.execute("select refresh_all_materialized_views()")
    owner.execute(text)
    assert "4" in owner.scalar("select definition from pg_matviews where matviewname = 'mv_match_accuracy_by_job'")


# Indexes -------------------------------------------------------------------------------------------------------------


def test_every_foreign_key_has_an_index_and_none_is_redundant(owner) -> None:
    assert (
        owner.execute(
            """
        select conrelid::regclass::text, conname from pg_constraint
          where contype = 'f' and not exists (
            select from pg_index where indrelid = conrelid and indkey[0] = conkey[1]
              and (indpred is null or pg_get_expr(indpred, indrelid) like '% IS NOT NULL)'))
        """
        ).fetchall()
        == []
    )
    redundant = owner.execute(
        """
        select a.indexrelid::regclass::text, b.indexrelid::regclass::text from pg_index a join pg_index b
          on a.indrelid = b.indrelid and a.indexrelid <> b.indexrelid and a.indexprs is null
            and pg_get_expr(a.indpred, a.indrelid) is not distinct from pg_get_expr(b.indpred, b.indrelid)
            and (b.indkey::text || ' ') like (a.indkey::text || ' %')
            and (not a.indisunique or a.indisunique = b.indisunique and a.indkey::text = b.indkey::text)
          where a.indrelid in (select oid from pg_class where relnamespace::regnamespace::text in ('public', 'private'))
        """
    )
    assert redundant.fetchall() == []


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("select * from jobs order by created_at desc limit 20", "idx_jobs_tenant_created_at"),
        ("select * from executions where status = 'running' order by started_at desc",
         "idx_executions_running_tenant_started"),
        ("select * from matches where job_id = '{J}' order by confidence desc limit 20", "idx_matches_job_confidence"),
        ("select * from api_keys where key_prefix = 'rk_1' and revoked_at is null", "idx_api_keys_tenant_prefix"),
        ("select * from dead_letter_queue where resolved_at is null order by created_at", "idx_dlq_unresolved_tenant"),
        ("select * from event_store where aggregate_id = '{E}' and aggregate_type = 'reconciliation' order by id",
         "idx_event_store_aggregate_replay"),
    ],
)  # fmt: skip
def test_the_apis_queries_find_an_index_under_the_policy(owner, app, query, index) -> None:
    owner.execute(
        """
        insert into dead_letter_queue (error_type, error_message, payload, tenant_id, resolved_at)
          select 'x', 'y', '{}', tenant_id, now() from dead_letter_queue, generate_series(1, 1000);
        insert into executions (job_id, status) select job_id, 'completed' from executions, generate_series(1, 1000);
        analyze dead_letter_queue, executions
        """
    )
    app.of(TENANT_A).execute("set local enable_seqscan = off")
    lines = app.execute(f"explain {query.format(J=id_of('J', 1), E=id_of('E', 1))}").fetchall()
    plan = "\n".join(line for (line,) in lines)
    assert index in plan
    assert "InitPlan" in plan, "the tenant is asked for once, not for every row"
