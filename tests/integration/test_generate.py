"""The generator on a real server: any shape, every rule kept, values that hurt come back as they went in."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._catalog import snapshot
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    Fingerprint,
    Limits,
    describe,
    fingerprints,
)
from ansible_collections.settler.runbook.plugins.module_utils._verify import orphans
from psycopg import errors

from tests.support import PROJECT
from tools import generate, legacy
from tools.project import ToolError
from tools.values import AMOUNTS, LONGEST_NAME, NASTY

if TYPE_CHECKING:
    import psycopg

    from tests.conftest import Connect, NewDatabase
    from tools.cluster import Cluster

MIGRATIONS = sorted((PROJECT / "sql/migrations").glob("[0-9]*.sql"))
EVERY_SHAPE = [*legacy.SHAPES, legacy.CURRENT]

#: A reference that is not as it should be: from the children's tenant to the parents'.
STRANGERS = """
SELECT 'jobs' FROM jobs c JOIN users p ON p.id = c.user_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'api_keys' FROM api_keys c JOIN users p ON p.id = c.user_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'webhooks' FROM webhooks c JOIN users p ON p.id = c.user_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'keys' FROM idempotency_keys c JOIN users p ON p.id = c.user_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'executions' FROM executions c JOIN jobs p ON p.id = c.job_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'matches' FROM matches c JOIN jobs p ON p.id = c.job_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'matches' FROM matches c JOIN executions p ON p.id = c.execution_id
  WHERE (c.tenant_id, c.job_id) <> (p.tenant_id, p.job_id)
UNION ALL SELECT 'unmatched' FROM unmatched c JOIN executions p ON p.id = c.execution_id
  WHERE (c.tenant_id, c.job_id) <> (p.tenant_id, p.job_id)
UNION ALL SELECT 'reports' FROM reports c JOIN executions p ON p.id = c.execution_id
  WHERE (c.tenant_id, c.job_id) <> (p.tenant_id, p.job_id)
UNION ALL SELECT 'audit_logs' FROM audit_logs c JOIN users p ON p.id = c.user_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'audit_logs' FROM audit_logs c JOIN api_keys p ON p.id = c.api_key_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'flags' FROM feature_flags c JOIN users p ON p.id = c.user_id
  WHERE c.tenant_id IS DISTINCT FROM p.tenant_id
UNION ALL SELECT 'flag changes' FROM feature_flag_changes c JOIN feature_flags f ON f.id = c.feature_flag_id
  JOIN users p ON p.id = c.changed_by WHERE f.tenant_id IS DISTINCT FROM p.tenant_id
"""
LATER_STRANGERS = """
SELECT 'events' FROM event_store c JOIN executions p ON p.id = c.aggregate_id WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'snapshots' FROM snapshots c JOIN event_store p USING (event_id)
  WHERE c.tenant_id <> p.tenant_id OR c.aggregate_id <> p.aggregate_id
UNION ALL SELECT 'dead letters' FROM dead_letter_queue c JOIN event_store p USING (event_id)
  WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'summaries' FROM reconciliation_summary c JOIN jobs p ON p.id = c.job_id
  WHERE c.tenant_id <> p.tenant_id
UNION ALL SELECT 'security' FROM security_events c JOIN users p ON p.id = c.user_id WHERE c.tenant_id <> p.tenant_id
"""


def empty_database(new_database: NewDatabase, connect: Connect, shape: str) -> psycopg.Connection[Any]:
    connection = connect(new_database(), role="settler_owner")
    if shape == legacy.CURRENT:
        for path in MIGRATIONS:
            connection.execute(path.read_bytes())
    else:
        legacy.create(connection, shape)
    return connection


def contents(connection: psycopg.Connection[Any], connect: Connect) -> dict[str, Fingerprint]:
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        row = connection.execute("SELECT pg_export_snapshot()").fetchone()
        assert row is not None
        name = connection.info.dbname
        return fingerprints(lambda: connect(name), row[0], describe(connection), Limits(keys=0))


def column(connection: psycopg.Connection[Any], query: str) -> set[Any]:
    return {value for (value,) in connection.execute(query.encode()).fetchall()}


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_each_shape_is_filled_alike_each_time_and_keeps_every_rule(new_database, connect, shape) -> None:
    first, second = (empty_database(new_database, connect, shape) for _ in range(2))
    counts = [generate.fill(session, shape=shape, rows=3000, tenants=20, seed=7) for session in (first, second)]

    found = contents(first, connect)
    assert found == contents(second, connect)
    assert {name.removeprefix("public."): one.rows for name, one in found.items()} == counts[0] == counts[1]
    assert 2900 < sum(counts[0].values()) < 3200
    checks, large = orphans(first, 1 << 30)
    assert checks
    assert not large
    assert [check for check in checks if check.status != "ok"] == []
    if "tenants" in counts[0]:
        assert first.execute(STRANGERS).fetchall() == []
    if "security_events" in counts[0]:
        assert first.execute(LATER_STRANGERS).fetchall() == []


@pytest.mark.parametrize("shape", [legacy.SHAPES[-1], legacy.CURRENT])
def test_filling_leaves_the_schema_as_it_was(new_database, connect, shape) -> None:
    connection = empty_database(new_database, connect, shape)
    before = snapshot(connection)
    generate.fill(connection, shape=shape, rows=500)
    assert snapshot(connection) == before


@pytest.mark.every_major
def test_what_hurts_comes_back_as_it_went_in(new_database, connect) -> None:
    connection = empty_database(new_database, connect, legacy.CURRENT)
    generate.fill(connection, shape=legacy.CURRENT, rows=20_000, tenants=30)

    assert column(connection, "SELECT user_agent FROM audit_logs") == {*NASTY, None}
    assert {*NASTY, None} <= column(connection, "SELECT payload ->> 'text' FROM webhook_payloads")
    found = connection.execute("SELECT scopes FROM api_keys WHERE scopes IS NOT NULL").fetchall()
    assert {tuple(value) for (value,) in found} == {
        (),
        (None,),
        ("jobs:read", "jobs:write"),
        (None, "NULL", "null", '"', "\\", "{}", ",", ""),
        tuple(NASTY),
    }
    assert LONGEST_NAME in column(connection, "SELECT name FROM tenants")
    amounts = {str(value) for value in column(connection, "SELECT amount FROM matches")}
    assert {*AMOUNTS} <= amounts
    assert column(connection, "SELECT min(duration_ms) FROM executions") == {-(2**63)}
    assert column(connection, "SELECT max(duration_ms) FROM executions") == {2**63 - 1}
    times = column(connection, "SELECT matched_at::text FROM matches")
    assert {"-infinity", "4713-01-01 00:00:00 BC", "1969-12-31 23:59:59.5", "294276-12-31 23:59:59.999999",
            "infinity"} <= times  # fmt: skip
    sizes = "SELECT octet_length(payload::text) FROM webhook_payloads ORDER BY 1 DESC LIMIT 2"
    assert min(column(connection, sizes)) > 1_000_000
    assert column(connection, "SELECT max(octet_length(data::text)) > 1000000 FROM event_store") == {True}
    assert column(connection, "SELECT data #>> '{huge}' FROM event_store WHERE data ? 'huge'") == {str(10**400)}
    one_email = "SELECT count(*) FROM users WHERE email = 'admin@example.com'"
    assert column(connection, one_email) == {30}


def test_a_database_in_use_goes_on_after_the_filling(new_database, connect) -> None:
    connection = empty_database(new_database, connect, legacy.CURRENT)
    generate.fill(connection, shape=legacy.CURRENT, rows=500)
    connection.execute("INSERT INTO event_store (event_id, aggregate_id, aggregate_type, event_type, data) "
                       "VALUES (gen_random_uuid(), gen_random_uuid(), 'x', 'x', '{}')")  # fmt: skip
    connection.execute("SELECT refresh_all_materialized_views()")
    with pytest.raises(errors.CheckViolation, match="does not exist or belongs to another tenant"):
        connection.execute("UPDATE jobs SET user_id = gen_random_uuid()")


def test_rows_that_are_there_are_let_alone(new_database, connect) -> None:
    connection = empty_database(new_database, connect, "oldest")
    with pytest.raises(ToolError, match="there is no table tenants"):
        generate.fill(connection, shape="security", rows=500)
    generate.fill(connection, shape="oldest", rows=500)
    before = contents(connection, connect)
    with pytest.raises(ToolError, match="table users has rows; nothing was changed"):
        generate.fill(connection, shape="oldest", rows=500, seed=2)
    assert contents(connection, connect) == before


def command(cluster: Cluster, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    state = cluster.state
    env = {**os.environ, "PGPASSWORD": state.password, "PGOPTIONS": "-c role=settler_owner", **variables}
    return subprocess.run(
        [sys.executable, "-m", "tools.generate", "-h", state.host, "-p", str(state.port), "-U", state.user, *arguments],
        capture_output=True, text=True, check=False, cwd=PROJECT, env=env,
    )  # fmt: skip


def test_the_command_makes_an_old_database_and_fills_a_new_one(new_database, connect, cluster) -> None:
    old = new_database()
    options = ["--rows", "1000", "--seed", "3", "--tenants", "2", "--skew", "0"]
    done = command(cluster, "--shape", "security", "-d", old, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rows/s" in done.stdout
    assert column(connect(old), "SELECT count(*) FROM tenants") == {2}
    assert column(connect(old), "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'") == {
        "settler_owner"
    }
    again = command(cluster, "--shape", "security", "-d", old)
    assert (again.returncode, again.stdout) == (1, "")
    assert "has rows; nothing was changed" in again.stderr

    nothing = command(cluster, "--shape", "current", "-d", new_database())
    assert nothing.returncode == 1
    assert "Apply sql/migrations first" in nothing.stderr


def test_the_command_takes_no_password_and_says_what_it_takes(cluster) -> None:
    refused = command(cluster, "--shape", "oldest", "-d", "dbname=x password=secret-of-mine")
    assert refused.returncode == 1
    assert "PGPASSWORD" in refused.stderr
    assert "secret-of-mine" not in refused.stdout + refused.stderr
    told = subprocess.run(
        [PROJECT / "runbook", "generate", "--help"], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    for word in ("--shape", "--tenants", "--rows", "--skew", "--seed", "--host", "PGPASSWORD"):
        assert word in told
