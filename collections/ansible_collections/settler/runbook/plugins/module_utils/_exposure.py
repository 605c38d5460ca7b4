# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the catalogue says is open to the application, and no attempt would show: past the policies, or never tried."""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._verify import Check

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import Settings, Table
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

#: What must be closed to the application, because no policy stands before it: materialized views, views that write the
#: tables of tenants with their owner's rights, partitions without row security or without a policy.
_CLOSED = """
SELECT 'materialized view closed', c.oid::regclass::text,
    has_schema_privilege(%(role)s, n.oid, 'USAGE') AND has_any_column_privilege(%(role)s, c.oid, 'SELECT'),
    'no right to read', 'the application may read it',
    'It knows no policies: REVOKE, and grant a view that shows a tenant its own rows.'
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'm' AND c.relname <> ALL (%(exclude)s)
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = c.oid AND e.deptype = 'e'
                  AND e.classid = 'pg_catalog.pg_class'::regclass)
UNION ALL
SELECT 'view does not write past policies', v.oid::regclass::text,
    has_schema_privilege(%(role)s, v.relnamespace, 'USAGE') AND pg_relation_is_updatable(v.oid, false) & 28 <> 0
    AND (has_any_column_privilege(%(role)s, v.oid, 'INSERT, UPDATE') OR has_table_privilege(%(role)s, v.oid, 'DELETE'))
    AND coalesce(v.reloptions && ARRAY['security_invoker=true', 'security_invoker=on', 'security_invoker=1'], false)
        IS FALSE,
    'read-only, or security_invoker', 'writes with the rights of its owner',
    'REVOKE INSERT, UPDATE, DELETE from the application, or ALTER VIEW … SET (security_invoker = true) from 15 on.'
FROM pg_catalog.pg_class v WHERE v.relkind = 'v' AND v.relname <> ALL (%(exclude)s) AND EXISTS (
    WITH RECURSIVE reads AS (
        SELECT v.oid UNION
        SELECT d.refobjid FROM reads JOIN pg_catalog.pg_rewrite w ON w.ev_class = reads.oid
        JOIN pg_catalog.pg_depend d ON d.objid = w.oid AND d.classid = 'pg_catalog.pg_rewrite'::regclass
            AND d.refclassid = 'pg_catalog.pg_class'::regclass
    ) SELECT FROM reads WHERE reads.oid = ANY (%(tables)s::oid[]))
UNION ALL
SELECT 'no right to empty a table', x.relid::regclass::text, has_table_privilege(%(role)s, x.relid, 'TRUNCATE'),
    'no TRUNCATE', 'the application may TRUNCATE it', 'No policy stands before TRUNCATE: REVOKE it.'
FROM unnest(%(tables)s::oid[]) p (root), LATERAL (
    SELECT p.root AS relid UNION SELECT relid FROM pg_partition_tree(p.root)) x
UNION ALL
SELECT 'row security of a partition', c.oid::regclass::text,
    NOT (c.relrowsecurity AND EXISTS (SELECT FROM pg_catalog.pg_policy WHERE polrelid = c.oid))
    AND has_schema_privilege(%(role)s, c.relnamespace, 'USAGE')
    AND (has_any_column_privilege(%(role)s, c.oid, 'SELECT, INSERT, UPDATE')
         OR has_table_privilege(%(role)s, c.oid, 'DELETE')),
    'on, with a policy, or no right on it',
    CASE WHEN c.relrowsecurity THEN 'no policy' ELSE 'off' END || ', and the application may name it',
    'The policies of the whole do not hold where a partition is named itself: REVOKE ALL on it.'
FROM unnest(%(tables)s::oid[]) p (root), pg_partition_tree(p.root) x JOIN pg_catalog.pg_class c ON c.oid = x.relid
WHERE x.level > 0
ORDER BY 1, 2
"""

#: Tables that belong to tenants and are open to the application without being among those that are tried: the ones of
#: other schemas, and the ones whose only way to a tenant leads through such a table.
_UNTRIED = """
WITH RECURSIVE tables AS (
    SELECT c.oid, c.relnamespace, n.nspname <> %(schema)s AS elsewhere, EXISTS (
        SELECT FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = c.oid AND a.attname = %(column)s AND NOT a.attisdropped) AS direct
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname !~ '^pg_' AND c.relname <> ALL (%(exclude)s)
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = c.oid AND e.deptype = 'e'
                      AND e.classid = 'pg_catalog.pg_class'::regclass)
), found AS (
    SELECT oid, NULL::oid AS through FROM tables WHERE direct OR oid = ANY (%(tables)s::oid[])
    UNION SELECT k.conrelid, k.confrelid FROM found JOIN pg_catalog.pg_constraint k ON k.confrelid = found.oid
    WHERE k.contype = 'f' AND k.conparentid = 0 AND k.conrelid <> k.confrelid
)
SELECT t.oid::regclass::text, t.elsewhere, string_agg(DISTINCT f.through::regclass::text, ', ')
FROM tables t JOIN found f USING (oid)
WHERE t.oid <> ALL (%(tables)s::oid[]) AND has_schema_privilege(%(role)s, t.relnamespace, 'USAGE')
  AND (has_table_privilege(%(role)s, t.oid, 'DELETE')
       OR has_any_column_privilege(%(role)s, t.oid, 'SELECT, INSERT, UPDATE'))
GROUP BY 1, 2 ORDER BY 1
"""


def look(connection: psycopg.Connection[t.Any], settings: Settings, tables: t.Sequence[Table]) -> list[Check]:
    """Look at what must not be open to the application at all, and for what is open and was not tried.

    Args:
        connection: any role.
        settings: of the proof.
        tables: those that are tried.
    """
    arguments = {
        "role": settings.role,
        "schema": settings.schema,
        "column": settings.tenant_column,
        "exclude": list(settings.exclude),
        "tables": [table.oid for table in tables],
    }
    return _closed(connection, arguments) + _untried(connection, settings, arguments)


def _closed(connection: psycopg.Connection[t.Any], arguments: t.Mapping[str, t.Any]) -> list[Check]:
    return [
        Check(check, name, "failed", expected, actual, hint) if is_open else Check(check, name)
        for check, name, is_open, expected, actual, hint in connection.execute(_CLOSED, arguments)
    ]


def _untried(
    connection: psycopg.Connection[t.Any], settings: Settings, arguments: t.Mapping[str, t.Any]
) -> list[Check]:
    hint = (
        f"REVOKE what the application may do with it, or give it a column {settings.tenant_column} in schema "
        f"{settings.schema}; or name it among the exclusions, and look at its policies yourself."
    )
    return [
        Check(
            "tenant isolation",
            name,
            "failed",
            "provable",
            f"not tried: it is not in schema {settings.schema}"
            if elsewhere
            else f"not tried: it leads to a tenant only through {through}, which has no probe row",
            hint,
        )
        for name, elsewhere, through in connection.execute(_UNTRIED, arguments)
    ]
