"""The mistakes of the field, made again in a good Settler database: verification names what each has left behind.

Those that leave nothing in a database (15: dropdb first, 17: a lock that stops all readers) have tests of their own;
tests/unit/test_known_mistakes.py lists all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    Limits,
    compare,
    read_again,
    read_now,
)
from ansible_collections.settler.runbook.plugins.module_utils._isolation import prove
from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import Settings
from ansible_collections.settler.runbook.plugins.module_utils._verify import database as rights
from psycopg import sql

from tests.support import as_migrator
from tests.verification import EXPECTED, problems
from tools.schema import build, files_of

if TYPE_CHECKING:
    from collections.abc import Callable

OPEN = (
    "tenants", "feature_flags", "feature_flag_changes", "security_events", "webhook_deliveries", "webhook_configs",
    "revoked_tokens",
)  # fmt: skip

#: What a mistake leaves, as the SQL that comes to the same, and what the report must name.
LEFT_BEHIND: dict[str, tuple[str, tuple[str, ...]]] = {
    "01 UNIQUE … WHERE in a table is no SQL: the table is missing": (
        "DROP TABLE blocked_ips CASCADE", ("table public.blocked_ips: present | missing",)),
    "01 now() in an index predicate is no SQL: the index is missing": (
        "DROP INDEX blocked_ips_active_key", ("index public.blocked_ips: blocked_ips_active_key",)),
    "02 CREATE POLICY IF NOT EXISTS is no SQL: a second run ends before policies and triggers": (
        "DROP POLICY tenant_isolation_jobs ON jobs; DROP TRIGGER set_job_tenant_id ON jobs",
        ("policy public.jobs: tenant_isolation_jobs", "trigger public.jobs: set_job_tenant_id")),
    "03 an old table lacks the column, its index and its policy": (
        "ALTER TABLE audit_logs DROP COLUMN tenant_id CASCADE",
        ("column public.audit_logs: tenant_id", "index public.audit_logs: idx_audit_logs_tenant_timestamp",
         "policy public.audit_logs: tenant_isolation_audit_logs")),
    "04 the tenant is cast without a look at it": (
        ("CREATE OR REPLACE FUNCTION current_tenant_id() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE "
         "SET search_path = pg_catalog, pg_temp AS $$ SELECT current_setting('app.current_tenant_id', true)::uuid $$"),
        ("function body public.current_tenant_id()",)),
    "06 GRANT ALL ON DATABASE gives no right on a table": (
        "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM settler_app; REVOKE ALL ON SCHEMA public FROM settler_app",
        ("grant public: $app", "grant public.jobs: $app")),
    "07 tables without a policy": (
        "; ".join(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY" for table in OPEN),
        tuple(f"table row security public.{table}: " for table in OPEN)),
    "08 UNIQUE lets NULL in twice": (
        "DROP INDEX feature_flags_name_scope_key", ("index public.feature_flags: feature_flags_name_scope_key",)),
    "09 event_id is a column and an output": (
        ("DO $$ BEGIN EXECUTE replace(replace(replace(pg_get_functiondef('get_events_after_snapshot'::regproc), "
         "'LANGUAGE sql', 'LANGUAGE plpgsql'), 'select e.event_id', 'begin return query select event_id'), "
         "'order by e.id', 'order by e.id; end'); END $$"),
        ("function body public.get_events_after_snapshot",)),
    "10 the first increment is lost": (
        ("CREATE OR REPLACE FUNCTION increment_tenant_quota_usage(p_tenant_id uuid, p_quota_type text, "
         "p_value bigint DEFAULT 1) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN "
         "UPDATE public.tenant_quota_usage SET current_storage_bytes = current_storage_bytes + p_value "
         "WHERE tenant_id = p_tenant_id; END $$"),
        ("function body public.increment_tenant_quota_usage",)),
    "13 a truncated dump has fewer policies and indexes": (
        "DROP POLICY tenant_isolation_matches ON matches; DROP INDEX idx_matches_job_confidence",
        ("policy public.matches: tenant_isolation_matches", "index public.matches: idx_matches_job_confidence")),
    "18 a materialized view that 001 never makes": (
        "DROP MATERIALIZED VIEW private.mv_job_performance CASCADE",
        ("materialized view private.mv_job_performance: present | missing",)),
    "18 one without a unique index": (
        "DROP INDEX private.mv_job_performance_key", ("index private.mv_job_performance: private.mv_job_performance",)),
    "18 one that was never filled": (
        "REFRESH MATERIALIZED VIEW private.mv_job_performance WITH NO DATA",
        ("materialized view filled private.mv_job_performance",)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", LEFT_BEHIND)
def test_what_a_mistake_leaves_is_named(session, mistake) -> None:
    spoil, named = LEFT_BEHIND[mistake]
    session.execute(spoil)
    found = problems(session)
    for text in named:
        assert any(line.startswith(text) for line in found), found


@pytest.fixture
def isolation(good, new_database, cluster, roles, connect) -> Callable[[str], set[tuple[str, str]]]:
    """Spoil a copy of the good database, prove isolation, and return what failed: object and what it was."""

    def look(spoil: str) -> set[tuple[str, str]]:
        name = new_database(template=good)
        connect(name).execute(spoil.encode())
        with engine_connect(as_migrator(cluster, roles, name)) as session:
            session.execute("SET ROLE settler_owner")
            rows = prove(session, Settings("settler_app")).rows
        return {(row.object, row.check.removeprefix("tenant isolation: ")) for row in rows if row.status == "failed"}

    return look


def test_04_a_cast_of_the_empty_setting_fails_the_proof_of_isolation(isolation) -> None:
    assert isolation("") == set()
    failed = isolation(LEFT_BEHIND["04 the tenant is cast without a look at it"][0])
    assert {("jobs", f"select with {what}") for what in ("empty context", "a context after RESET")} <= failed


def test_05_an_application_that_owns_the_table_is_no_proof_of_isolation(isolation) -> None:
    failed = isolation("ALTER TABLE jobs OWNER TO settler_app")
    assert failed == {("settler_app", "application role")}


def test_07_what_a_tenant_reads_without_a_policy_fails_the_proof_of_isolation(isolation) -> None:
    failed = isolation(LEFT_BEHIND["07 tables without a policy"][0])
    of_tenants = {*OPEN} - {"webhook_configs", "revoked_tokens"}  # which belong to no tenant: the catalogue is compared
    assert {(table, "select") for table in of_tenants} <= failed


def test_11_a_role_without_any_right_sees_what_is_wrong(session) -> None:
    session.execute("CREATE ROLE stranger; SET LOCAL ROLE stranger")
    assert problems(session, rows_too=False) == []
    functions = EXPECTED["functions"]
    assert not [name for name in functions if "uuid_generate" in name or "digest" in name], "of an extension"
    session.execute("RESET ROLE; DROP INDEX private.mv_job_performance_key; SET LOCAL ROLE stranger")
    assert any("mv_job_performance" in line for line in problems(session, rows_too=False))


DATA = {
    "12 a dump under the policies has one tenant's rows": (
        "DELETE FROM audit_logs WHERE tenant_id IS DISTINCT FROM (SELECT min(id::text)::uuid FROM tenants)",
        "public.audit_logs"),
    "13 a truncated dump has fewer rows": ("TRUNCATE security_events", "public.security_events"),
    "one row is gone": ("DELETE FROM matches WHERE id = (SELECT id FROM matches LIMIT 1)", "public.matches"),
    "one row is there twice": (
        ("INSERT INTO security_events SELECT (jsonb_populate_record(s, jsonb_build_object('id', gen_random_uuid()))).* "
         "FROM security_events s LIMIT 1"), "public.security_events"),
    "one byte of one row is another": (
        ("UPDATE jobs SET source_config_encrypted = overlay(source_config_encrypted PLACING 'x' FROM 9) "
         "WHERE id = (SELECT id FROM jobs LIMIT 1)"), "public.jobs.source_config_encrypted"),
    "two rows have each other's values": (
        ("UPDATE unmatched SET amount = CASE amount WHEN 1.99 THEN 2.99 ELSE 1.99 END WHERE amount IN (1.99, 2.99)"),
        "public.unmatched.amount"),
}  # fmt: skip


@pytest.mark.parametrize("what", DATA)
def test_data_that_is_not_what_it_was_is_named(good, new_database, connect, what) -> None:
    change, named = DATA[what]
    name = new_database(template=good)
    session: Any = connect(name)
    before = read_now(session, lambda: connect(name), Limits())
    assert not _unlike(session, lambda: connect(name), before)
    session.execute("SET session_replication_role = replica")  # nothing but the rows themselves
    assert session.execute(change.encode()).rowcount != 0
    assert _unlike(session, lambda: connect(name), before) == [named]


def _unlike(session: Any, sessions: Any, before: Any) -> list[str]:
    after, now = read_again(session, sessions, before, Limits())
    return [row.object for row in compare(before, after, now) if row.status != "ok"]


def test_14_rights_on_the_database_that_a_plain_dump_does_not_carry_are_missed(
    good, new_database, connect, cluster
) -> None:
    name = new_database(template=good)
    session = connect(name)
    assert {row.status for row in rights(session, "settler_owner", "settler_app")} == {"ok"}
    session.execute(
        sql.SQL("ALTER DATABASE {0} OWNER TO postgres; REVOKE CONNECT ON DATABASE {0} FROM settler_app").format(
            sql.Identifier(name)
        )
    )
    wrong = [row.check for row in rights(session, "settler_owner", "settler_app") if row.status == "failed"]
    assert wrong == ["database owner", "application may connect"]


def test_16_of_two_runs_that_half_succeeded_all_that_is_missing_is_named(new_database, connect) -> None:
    session = connect(new_database(), role="settler_owner")
    build(session, [file for file in files_of() if file.version and file.version < "004"])
    found = problems(session)
    for text in (
        "constraint public.jobs: jobs_user_id_tenant_id_fkey: ", "function public.check_tenant_quota(",
        "policy public.jobs: tenant_isolation_jobs: ", "trigger public.jobs: set_job_tenant_id: ",
        "view public.job_performance: ",
    ):  # fmt: skip
        assert any(line.startswith(text) and line.endswith("missing") for line in found), text
