# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""After the files: fresh statistics for the tables that they touched, fresh rows for the views that are stored."""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._readers import wait_no_longer
from ansible_collections.settler.runbook.plugins.module_utils._run import one_of, rows_of

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._work import Work

#: A partition's rows are its parents', too.
_WITH_PARENTS = """
WITH RECURSIVE touched (oid) AS (
    SELECT unnest(%s::oid[])
    UNION
    SELECT i.inhparent FROM touched JOIN pg_catalog.pg_inherits i ON i.inhrelid = touched.oid
)
SELECT coalesce(array_agg(oid::bigint), '{}') FROM touched
"""

#: ANALYZE of a partitioned table reaches its partitions as well, where the server knows no ANALYZE ONLY.
_TABLES = """
SELECT n.nspname AS schema, c.relname AS name, CASE WHEN %(only)s AND c.relkind = 'p' THEN 'ONLY ' ELSE '' END AS only
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = ANY (%(touched)s::oid[]) AND c.relkind IN ('r', 'p') AND (%(only)s OR NOT c.relispartition)
  AND n.nspname !~ '^pg_' AND n.nspname <> %(ledger)s
ORDER BY 1, 2
"""

#: Materialized views that read a touched relation, directly or through views; what others read comes first.
_VIEWS = """
WITH RECURSIVE reads AS (
    SELECT DISTINCT r.ev_class AS reader, d.refobjid AS source
    FROM pg_catalog.pg_rewrite r
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
        AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class
    JOIN pg_catalog.pg_class c ON c.oid = r.ev_class AND c.relkind IN ('v', 'm')
), stale (oid, depth) AS (
    SELECT reader, 1 FROM reads WHERE source = ANY (%(touched)s::oid[])
    UNION
    SELECT reader, depth + 1 FROM reads JOIN stale ON stale.oid = reads.source WHERE depth < 50
)
SELECT n.nspname AS schema, c.relname AS name, c.relispopulated AS populated,
    EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid
            AND i.indpred IS NULL AND i.indexprs IS NULL) AS unique
FROM stale JOIN pg_catalog.pg_class c ON c.oid = stale.oid AND c.relkind = 'm'
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
GROUP BY 1, 2, 3, 4, c.oid ORDER BY max(depth), 1, 2
"""


def maintain(work: Work) -> None:
    """Analyse the tables that files have touched and refresh the materialized views that depend on them.

    What earlier runs have left is in the ledger as well. The files stay applied: what fails here is a warning.
    """
    connection, ledger, options, outcome = work.connection, work.ledger, work.options, work.outcome
    if connection.closed or not ledger.is_known_current or not (options.analyze or options.refresh):
        return
    work.as_owner()
    touched = ledger.touched()
    if not touched:
        return
    work.watch.file("after the files", len(outcome.applied), len(outcome.applied))
    wait_no_longer(connection, options.lock_timeout)
    parameters = {
        "touched": one_of(connection, _WITH_PARENTS, touched),
        "ledger": options.schema,
        "only": connection.info.server_version >= 180000,
    }
    if options.refresh:
        for row in rows_of(connection, _VIEWS, parameters):
            concurrently = sql.SQL("CONCURRENTLY " if row["populated"] and row["unique"] else "")
            name = sql.Identifier(row["schema"], row["name"])
            query = sql.SQL("REFRESH MATERIALIZED VIEW {}{}").format(concurrently, name)
            if _run(work, query, f"refreshing {row['schema']}.{row['name']}"):
                outcome.refreshed.append(f"{row['schema']}.{row['name']}")
    if options.analyze:
        for row in rows_of(connection, _TABLES, parameters):
            query = sql.SQL("ANALYZE {}{}").format(sql.SQL(row["only"]), sql.Identifier(row["schema"], row["name"]))
            if _run(work, query, f"analysing {row['schema']}.{row['name']}"):
                outcome.analyzed.append(f"{row['schema']}.{row['name']}")
    ledger.forget_touched(touched)


def _run(work: Work, query: sql.Composed, title: str) -> bool:
    """Run one command; say whether it succeeded."""
    try:
        with work.watch.statement(None, 0, 0, title):
            work.connection.execute(query)
    except psycopg.Error as error:
        if work.connection.closed:
            raise
        work.outcome.warnings.append(f"{title} failed: {error.diag.message_primary}")
        return False
    return True
