"""The API's queries on a million rows, as the application's role under the policies: each finds its rows by an index.

The generator makes the database once for all tests, with fifty tenants of very different size. Expected is no time but
work: which relations a plan reads and how, how many rows each node meets, and how many blocks it takes.
"""

# ruff: noqa: S608 - the only value in the queries is this file's own page size

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.support import PROJECT
from tools import generate, legacy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

MIGRATIONS = sorted((PROJECT / "sql/migrations").glob("[0-9]*.sql"))
ROWS, TENANTS = 1_000_000, 50
PAGE = 20
#: So few rows may be sorted or read without an index's order: it costs nothing to speak of.
FEW = 1000


@dataclass(frozen=True)
class Query:
    """What the API asks, without a word of tenants: the policy adds them.

    ``indexes`` has the index that must be used, several if either may serve. ``needed`` counts, as a superuser, the
    rows that any plan may look at: those of the tenant that satisfy the conditions. ``page`` says that the index gives
    the order, so that of many rows no more than a page may be read.
    """

    text: str
    indexes: tuple[str, ...]
    needed: str
    page: bool = False


QUERIES = {
    "a tenant's jobs by time": Query(
        f"SELECT * FROM jobs ORDER BY created_at DESC LIMIT {PAGE}",
        ("idx_jobs_tenant_created_at",),
        "SELECT count(*) FROM jobs WHERE tenant_id = %(tenant)s",
        page=True,
    ),
    "running executions": Query(
        f"SELECT * FROM executions WHERE status = 'running' ORDER BY started_at DESC LIMIT {PAGE}",
        ("idx_executions_running_tenant_started",),
        "SELECT count(*) FROM executions WHERE tenant_id = %(tenant)s AND status = 'running'",
        page=True,
    ),
    "a job's matches by confidence": Query(
        f"SELECT * FROM matches WHERE job_id = %(job)s ORDER BY confidence DESC LIMIT {PAGE}",
        ("idx_matches_job_confidence",),
        "SELECT count(*) FROM matches WHERE tenant_id = %(tenant)s AND job_id = %(job)s",
        page=True,
    ),
    "an active key by its prefix": Query(
        "SELECT * FROM api_keys WHERE key_prefix = %(prefix)s AND revoked_at IS NULL",
        ("idx_api_keys_tenant_prefix",),
        "SELECT count(*) FROM api_keys WHERE tenant_id = %(tenant)s AND key_prefix = %(prefix)s",
    ),
    "unresolved dead letters": Query(
        f"SELECT * FROM dead_letter_queue WHERE resolved_at IS NULL ORDER BY created_at LIMIT {PAGE}",
        ("idx_dlq_unresolved_tenant",),
        "SELECT count(*) FROM dead_letter_queue WHERE tenant_id = %(tenant)s AND resolved_at IS NULL",
        page=True,
    ),
    "an aggregate's events in order": Query(
        "SELECT * FROM event_store WHERE aggregate_id = %(aggregate)s AND aggregate_type = 'reconciliation' "
        "ORDER BY id",
        ("idx_event_store_aggregate_replay",),
        "SELECT count(*) FROM event_store WHERE aggregate_id = %(aggregate)s",
    ),
    "an aggregate's latest snapshot": Query(
        "SELECT * FROM snapshots WHERE aggregate_id = %(snapshot)s AND aggregate_type = 'reconciliation' "
        "ORDER BY snapshot_version DESC LIMIT 1",
        ("idx_snapshots_tenant", "snapshots_aggregate_id_aggregate_type_snapshot_version_key"),
        "SELECT 1",
    ),
    "the audit log by time": Query(
        f"SELECT * FROM audit_logs ORDER BY timestamp DESC LIMIT {PAGE}",
        ("idx_audit_logs_tenant_timestamp",),
        "SELECT count(*) FROM audit_logs WHERE tenant_id = %(tenant)s",
        page=True,
    ),
    "unprocessed webhook payloads": Query(
        f"SELECT * FROM webhook_payloads WHERE processed = false ORDER BY received_at LIMIT {PAGE}",
        ("idx_webhook_payloads_unprocessed",),
        "SELECT count(*) FROM webhook_payloads WHERE tenant_id = %(tenant)s AND processed = false",
        page=True,
    ),
    "an idempotency key": Query(
        "SELECT * FROM idempotency_keys WHERE user_id = %(user)s AND key = %(key)s",
        ("idempotency_keys_user_id_key_key",),
        "SELECT 1",
    ),
    "clearing expired idempotency keys": Query(
        "DELETE FROM idempotency_keys WHERE expires_at < '2023-02-01'",
        ("idx_idempotency_tenant_expires",),
        "SELECT count(*) FROM idempotency_keys WHERE tenant_id = %(tenant)s AND expires_at < '2023-02-01'",
    ),
    # The time is one without a time zone, like the column: now() would be compared by a function that is not LEAKPROOF,
    # and such a condition must wait until the policy has been asked.
    "webhook deliveries to retry": Query(
        f"SELECT * FROM webhook_deliveries WHERE status = 'failed' AND next_retry_at <= localtimestamp "
        f"ORDER BY next_retry_at LIMIT {PAGE}",
        ("idx_webhook_deliveries_webhook_retry",),
        "SELECT count(*) + (SELECT count(*) FROM webhooks WHERE tenant_id = %(tenant)s) "
        "FROM webhook_deliveries JOIN webhooks ON webhooks.id = webhook_id "
        "WHERE tenant_id = %(tenant)s AND webhook_deliveries.status = 'failed' AND next_retry_at <= localtimestamp",
    ),
    "a webhook's deliveries by time": Query(
        f"SELECT * FROM webhook_deliveries WHERE webhook_id = %(webhook)s ORDER BY created_at DESC LIMIT {PAGE}",
        ("idx_webhook_deliveries_webhook_created",),
        "SELECT count(*) + (SELECT count(*) FROM webhooks WHERE tenant_id = %(tenant)s) "
        "FROM webhook_deliveries WHERE webhook_id = %(webhook)s",
    ),
}

#: Of one tenant, what the queries ask for: that which most rows belong to.
VALUES = """
SELECT %(tenant)s::uuid AS tenant,
  (SELECT job_id FROM matches WHERE tenant_id = %(tenant)s GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1) AS job,
  (SELECT min(key_prefix) FROM api_keys WHERE tenant_id = %(tenant)s) AS prefix,
  (SELECT aggregate_id FROM event_store WHERE tenant_id = %(tenant)s
    GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1) AS aggregate,
  (SELECT aggregate_id FROM snapshots WHERE tenant_id = %(tenant)s
    GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1) AS snapshot,
  (SELECT webhook_id FROM webhook_deliveries JOIN webhooks ON webhooks.id = webhook_id WHERE tenant_id = %(tenant)s
    GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1) AS webhook,
  user_id AS user, key
  FROM idempotency_keys WHERE tenant_id = %(tenant)s ORDER BY id LIMIT 1
"""


@dataclass(frozen=True)
class Filled:
    """The database, and its tenants by size, the largest first."""

    name: str
    tenants: list[Any]


@pytest.fixture(scope="module")
def filled(cluster, roles, _template) -> Iterator[Filled]:
    name = "settler_test_plans"
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} OWNER settler_owner TEMPLATE {_template}".encode())
        with psycopg.connect(cluster.conninfo(name), autocommit=True) as session:
            session.execute("SET ROLE settler_owner")
            for path in MIGRATIONS:
                session.execute(path.read_bytes())
            counts = generate.fill(session, shape=legacy.CURRENT, rows=ROWS, tenants=TENANTS, seed=7, skew=1.0)
            assert sum(counts.values()) >= ROWS
            session.execute("VACUUM ANALYZE")
            sizes = "SELECT tenant_id FROM matches GROUP BY 1 ORDER BY count(*) DESC"
            tenants = [tenant for (tenant,) in session.execute(sizes).fetchall()]
        yield Filled(name, tenants)
        server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@dataclass(frozen=True)
class Work:
    """What a plan did: all of its nodes, and the blocks that the whole of it took."""

    nodes: list[dict[str, Any]]
    blocks: int

    def __str__(self) -> str:
        return f"{self.blocks} blocks; " + "; ".join(
            " ".join(str(node.get(key, "")) for key in ("Node Type", "Relation Name", "Index Name", "Index Cond"))
            + f" {met(node):.0f} rows"
            for node in self.nodes
        )


def met(node: dict[str, Any]) -> float:
    """Return how many rows a node met: those that it gave on and those that it threw away."""
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return float((node["Actual Rows"] + removed) * node["Actual Loops"])


def work(app: psycopg.Connection[Any], query: str, values: dict[str, Any]) -> Work:
    """Run a query as it will be and take it back; the first of two runs only warms up the session."""
    for _ in range(2):
        with app.transaction(force_rollback=True):
            row = app.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}".encode(), values).fetchone()
    assert row is not None
    top = row[0][0]["Plan"]
    nodes: list[dict[str, Any]] = []
    waiting = [top]
    while waiting:
        nodes.append(node := waiting.pop())
        waiting += node.get("Plans", [])
    return Work(nodes, top["Shared Hit Blocks"] + top["Shared Read Blocks"])


@pytest.mark.parametrize("rank", [0, TENANTS - 1], ids=["the largest tenant", "the smallest tenant"])
@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_query_of_the_api_reads_by_an_index_about_what_it_returns(filled, connect, query, rank) -> None:
    tenant = filled.tenants[rank]
    session = connect(filled.name)
    with session.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        values = cursor.execute(VALUES.encode(), {"tenant": tenant}).fetchone()
    row = session.execute(query.needed.encode(), values).fetchone()
    assert values is not None
    assert row is not None
    needed = row[0]
    app = connect(filled.name, user="settler_app")
    app.execute("SELECT set_config('app.current_tenant_id', %s, false)", (str(tenant),))

    done = work(app, query.text, values)

    assert not [node for node in done.nodes if node["Node Type"] == "Seq Scan"], done
    assert {node.get("Index Name") for node in done.nodes} & {*query.indexes}, done
    assert all(met(node) <= FEW for node in done.nodes if "Sort" in node["Node Type"]), done
    may_read = PAGE if query.page and needed > FEW else needed
    assert all(met(node) <= may_read + 5 for node in done.nodes if "Relation Name" in node or "Index Name" in node), (
        done
    )
    assert done.blocks <= 5 * may_read + 30, done


def test_the_tenants_differ_enough_to_try_both_ways(filled, connect) -> None:
    session = connect(filled.name)
    counts = [
        session.execute("SELECT count(*) FROM matches WHERE tenant_id = %s", (tenant,)).fetchone()
        for tenant in (filled.tenants[0], filled.tenants[-1])
    ]
    largest, smallest = (row[0] for row in counts if row)
    assert len(filled.tenants) == TENANTS
    assert largest > 40 * smallest > 1000
