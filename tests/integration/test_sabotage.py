"""Verification proves: each single sabotage of a good Settler database is caught and named, a good one is let pass."""

from __future__ import annotations

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._catalog import snapshot
from ansible_collections.settler.runbook.plugins.module_utils._verify import compare, health, orphans, sequences
from ansible_collections.settler.runbook.plugins.modules.verify import read_expectation

from tests.support import PROJECT, as_migrator, call_module
from tools import legacy
from tools.schema import build

EXPECTED = read_expectation(str(PROJECT / "sql/verify/expected.yml"))
NAMES = {"settler_owner": "$owner", "settler_migrator": "$migrator", "settler_app": "$app"}
PROTECTED = sorted(name for name, table in EXPECTED["tables"].items() if table.get("row_security", "off") != "off")

#: What is done, and what the report must name.
SABOTAGES = {
    "drop a table": ("DROP TABLE webhook_deliveries CASCADE", "public.webhook_deliveries"),
    "drop a column": ("ALTER TABLE jobs DROP COLUMN schedule CASCADE", "schedule"),
    "drop an index": ("DROP INDEX idx_api_keys_tenant_prefix", "idx_api_keys_tenant_prefix"),
    "drop a unique index": ("DROP INDEX blocked_ips_active_key", "blocked_ips_active_key"),
    "drop a primary key": ("ALTER TABLE matches DROP CONSTRAINT matches_pkey", "matches_pkey"),
    "drop a materialized view": ("DROP MATERIALIZED VIEW private.mv_job_performance CASCADE", "mv_job_performance"),
    "drop a policy": ("DROP POLICY tenant_isolation_jobs ON jobs", "tenant_isolation_jobs"),
    "drop an extension": ("DROP EXTENSION pgcrypto CASCADE", "pgcrypto"),
    "a wider policy": ("ALTER POLICY tenant_isolation_jobs ON jobs USING (true)", "tenant_isolation_jobs"),
    "a policy that lets everything in": (
        "ALTER POLICY tenant_isolation_jobs ON jobs WITH CHECK (true)", "tenant_isolation_jobs"),
    "a second policy": ("CREATE POLICY everybody ON jobs USING (true)", "everybody"),
    "a policy for another role": ("ALTER POLICY tenant_isolation_jobs ON jobs TO settler_app", "tenant_isolation_jobs"),
    "another type": ("ALTER TABLE saga_state ALTER saga_type TYPE text", "saga_type"),
    "a shorter type": ("ALTER TABLE blocked_ips ALTER ip TYPE varchar(40)", "ip"),
    "another default": ("ALTER TABLE users ALTER role SET DEFAULT 'owner'", "role"),
    "no default": ("ALTER TABLE users ALTER role DROP DEFAULT", "role"),
    "nullable": ("ALTER TABLE users ALTER email DROP NOT NULL", "email"),
    "not nullable": ("ALTER TABLE jobs ALTER version SET NOT NULL", "version"),
    "another owner of a table": ("ALTER TABLE users OWNER TO settler_app", "public.users"),
    "a view of another": ("ALTER MATERIALIZED VIEW private.mv_job_performance OWNER TO settler_app", "mv_job_perf"),
    "another owner of a schema": ("ALTER SCHEMA public OWNER TO postgres", "public"),
    "a grant to everybody": ("GRANT SELECT ON users TO PUBLIC", "public.users"),
    "a grant on a column": ("GRANT UPDATE (email) ON users TO PUBLIC", "email"),
    "a grant on the schema": ("GRANT CREATE ON SCHEMA public TO settler_app", "public"),
    "no grant": ("REVOKE INSERT ON jobs FROM settler_app", "public.jobs"),
    "a grant on a sequence": ("GRANT ALL ON SEQUENCE event_store_id_seq TO PUBLIC", "event_store_id_seq"),
    "other default privileges": (
        "ALTER DEFAULT PRIVILEGES FOR ROLE settler_owner IN SCHEMA public GRANT SELECT ON TABLES TO PUBLIC", "owner"),
    "a trigger that rests": ("ALTER TABLE jobs DISABLE TRIGGER ALL", "public.jobs"),
    "a stray table": ("CREATE TABLE stray (id int)", "public.stray"),
    "a stray column": ("ALTER TABLE jobs ADD COLUMN stray int", "stray"),
    "a stray index": ("CREATE INDEX stray ON jobs (name)", "stray"),
    "a stray view": ("CREATE VIEW stray AS SELECT 1", "public.stray"),
    "a stray function": ("CREATE FUNCTION stray() RETURNS int LANGUAGE sql AS 'SELECT 1'", "stray"),
    "a stray type": ("CREATE TYPE stray AS ENUM ('a')", "public.stray"),
    "a stray schema": ("CREATE SCHEMA stray", "stray"),
    "a stray constraint": ("ALTER TABLE jobs ADD CONSTRAINT stray CHECK (version > -5)", "stray"),
    "a stray trigger": (
        "CREATE TRIGGER stray BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "stray"),
    "a constraint that was never validated": (
        "ALTER TABLE jobs ADD CONSTRAINT later CHECK (version > 0) NOT VALID", "later"),
    "an unlogged table": ("ALTER TABLE idempotency_keys SET UNLOGGED", "public.idempotency_keys"),
    "an index that is invalid": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_api_keys_tenant_prefix'::regclass",
        "idx_api_keys_tenant_prefix"),
    "an index that is not ready": (
        "UPDATE pg_index SET indisready = false WHERE indexrelid = 'idx_api_keys_tenant_prefix'::regclass",
        "idx_api_keys_tenant_prefix"),
    "a sequence that is behind": (
        ("SELECT setval('event_store_id_seq', 7000); INSERT INTO event_store SELECT (jsonb_populate_record(e, "
        "jsonb_build_object('id', 9000, 'event_id', gen_random_uuid(), 'event_version', 4711))).* "
        "FROM event_store e LIMIT 1"),
        "event_store_id_seq"),
    "an orphan": (
        ("SET LOCAL session_replication_role = replica; "
        "UPDATE executions SET job_id = gen_random_uuid() WHERE id = (SELECT id FROM executions LIMIT 1)"),
        "executions_job_id_fkey"),
}  # fmt: skip


def _functions(session):
    """Return the functions of the schema as SQL names them."""
    rows = session.execute(
        "SELECT p.oid::regprocedure::text, p.prosecdef, p.prorettype = 'trigger'::regtype FROM pg_proc p "
        "WHERE pronamespace = 'public'::regnamespace AND NOT EXISTS "
        "(SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e') ORDER BY 1"
    )
    return rows.fetchall()


@pytest.fixture(scope="module")
def good(cluster, roles, _template):
    """Make a good database with rows, which every test leaves as it was."""
    name = "settler_test_good"
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} OWNER settler_owner TEMPLATE {_template}".encode())
        server.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC".encode())
        with psycopg.connect(cluster.conninfo(name), autocommit=True) as session:
            session.execute("GRANT USAGE ON SCHEMA public TO PUBLIC; SET ROLE settler_owner")
            build(session)
            session.execute("RESET ROLE")
            legacy.fill(session, legacy.CURRENT, 2000, 7)
        yield name
        server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def session(good, cluster):
    """Open a transaction of the superuser that is rolled back."""
    with psycopg.connect(cluster.conninfo(good), autocommit=True) as connection:
        connection.execute("SET search_path = public")
        with connection.transaction(force_rollback=True):
            yield connection


def problems(session):
    """Return what is wrong, a line each."""
    rows = compare(EXPECTED, snapshot(session, exclude=["runbook"], role_names=NAMES))
    rows += health(session) + sequences(session) + orphans(session, 1 << 30)[0]
    return [f"{row.check} {row.object}: {row.expected} | {row.actual}" for row in rows if row.status != "ok"]


def test_a_good_database_raises_no_alarm(session):
    assert problems(session) == []
    assert len(orphans(session, 1 << 30)[0]) > 10
    assert len(sequences(session)) >= 1


@pytest.mark.parametrize("name", SABOTAGES)
def test_each_sabotage_is_caught_and_named(session, name):
    sabotage, named = SABOTAGES[name]
    session.execute(sabotage)
    found = problems(session)
    assert any(named in line for line in found), found


@pytest.mark.parametrize("table", PROTECTED)
@pytest.mark.parametrize(
    "change", ["DISABLE ROW LEVEL SECURITY", "NO FORCE ROW LEVEL SECURITY", "FORCE ROW LEVEL SECURITY"]
)
def test_row_security_that_is_changed_is_named_on_each_table(session, table, change):
    forced = EXPECTED["tables"][table]["row_security"] == "forced"
    if change == ("FORCE ROW LEVEL SECURITY" if forced else "NO FORCE ROW LEVEL SECURITY"):
        session.execute(f"ALTER TABLE {table} {change}".encode())
        assert problems(session) == []  # it is so already
        return
    session.execute(f"ALTER TABLE {table} {change}".encode())
    assert any(line.startswith("table " + table) or table in line for line in problems(session))


def test_every_function_is_watched_in_body_security_and_search_path(session, subtests):
    for name, definer, _is_trigger in _functions(session):
        for change in (
            f"ALTER FUNCTION {name} SECURITY {'INVOKER' if definer else 'DEFINER'}",
            f"ALTER FUNCTION {name} SET search_path = pg_temp",
            f"GRANT EXECUTE ON FUNCTION {name} TO pg_monitor",
            f"ALTER FUNCTION {name} OWNER TO settler_app",
            f"DROP FUNCTION {name} CASCADE",
        ):
            with subtests.test(change), session.transaction(force_rollback=True):
                session.execute(change.encode())
                assert any(name.partition("(")[0] in line for line in problems(session))


def test_a_changed_body_is_named(session):
    (name, *_rest), *_others = _functions(session)
    text = session.execute("SELECT pg_get_functiondef(%s::regprocedure)", [name]).fetchone()[0]
    body = session.execute("SELECT prosrc FROM pg_proc WHERE oid = %s::regprocedure", [name]).fetchone()[0]
    session.execute(text.replace(body, body.rstrip() + "\n-- not what was reviewed\n").encode())
    assert any(name.partition("(")[0] in line for line in problems(session))


def test_every_trigger_is_watched(session, subtests):
    rows = session.execute(
        "SELECT tgname, tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2"
    ).fetchall()
    assert rows
    for trigger, table in rows:
        for change in (f"ALTER TABLE {table} DISABLE TRIGGER {trigger}", f"DROP TRIGGER {trigger} ON {table}"):
            with subtests.test(change), session.transaction(force_rollback=True):
                session.execute(change.encode())
                assert any(trigger in line for line in problems(session))


def test_the_module_tells_of_tables_that_it_did_not_read_and_writes_junit_for_its_owner(good, cluster, roles, tmp_path):
    arguments = {
        **as_migrator(cluster, roles, good), "expected": None, "role_names": {}, "exclude_schemas": ["runbook"],
        "unexpected": "warn", "set_role": "settler_owner", "orphans_max_bytes": 0, "isolation": None, "run_id": "",
        "allow": [{"check": "*", "object": "public.x", "reason": "gone soon", "until": "2999-01-01"}],
        "junit": str(tmp_path / "verify.xml"),
    }  # fmt: skip
    result = call_module("verify", arguments)
    assert result["counts"]["failed"] == 0
    assert any("executions_job_id_fkey" in name for name in result["orphans_unread"])
    written = tmp_path / "verify.xml"
    assert written.stat().st_mode & 0o777 == 0o600
    assert written.read_text().count("<testcase ") == sum(result["counts"].values())


def test_what_is_no_sequence_is_not_asked_for_a_sequence_s_rights(session):
    session.execute("SET LOCAL enable_nestloop = off; SET LOCAL enable_mergejoin = off")
    assert [row.object for row in sequences(session)] == ["event_store_id_seq", "snapshots_id_seq"]
