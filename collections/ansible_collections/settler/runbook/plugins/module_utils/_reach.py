# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a statement reaches without naming it: the tables and columns that go with what it drops, or all of a schema."""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._effects import quoted
from ansible_collections.settler.runbook.plugins.module_utils._risks import (
    ALL_TABLES,
    CLUSTERED,
    DEFAULT_PARTITION,
    IN_SCHEMA,
    OF_EXTENSION,
    OF_ROLE,
    OF_SCHEMA,
    OF_TYPE,
)

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

#: What DROP … CASCADE takes along, as the server follows it: columns of a type, tables of a schema or of an extension.
_DEPENDENT = """
WITH RECURSIVE gone (classid, objid, objsubid) AS (
    SELECT classid::oid, objid, 0 FROM ({roots}) AS roots (classid, objid)
    UNION
    SELECT d.classid, d.objid, d.objsubid FROM pg_catalog.pg_depend d
    JOIN gone g ON d.refclassid = g.classid AND d.refobjid = g.objid AND g.objsubid IN (0, d.refobjsubid)
)
SELECT n.nspname, c.relname, a.attname FROM gone g
JOIN pg_catalog.pg_class c ON g.classid = 'pg_class'::regclass AND c.oid = g.objid AND c.relkind IN ('r', 'p')
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = g.objsubid AND g.objsubid > 0
WHERE g.objsubid = 0 OR NOT EXISTS (
    SELECT FROM gone whole WHERE whole.classid = g.classid AND whole.objid = g.objid AND whole.objsubid = 0)
ORDER BY 1, 2, 3
"""
_ROOTS = {
    OF_SCHEMA: "SELECT 'pg_namespace'::regclass, to_regnamespace(%s)::oid",
    OF_TYPE: "SELECT 'pg_type'::regclass, to_regtype(%s)::oid",
    OF_EXTENSION: "SELECT 'pg_extension'::regclass, oid FROM pg_catalog.pg_extension "
    "WHERE extname = (parse_ident(%s))[1]",
    OF_ROLE: "SELECT classid, objid FROM pg_catalog.pg_shdepend WHERE refclassid = 'pg_authid'::regclass "
    "AND deptype = 'o' AND dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) "
    "AND pg_get_userbyid(refobjid) = coalesce((parse_ident(nullif(%s, '')))[1], current_user)",
}
_TABLES = """
SELECT n.nspname, c.relname, NULL FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND {condition}
ORDER BY 1, 2
"""
_CONDITIONS = {
    ALL_TABLES: "%s::text IS NOT NULL",
    IN_SCHEMA: "n.oid = to_regnamespace(%s)",
    CLUSTERED: "%s::text IS NOT NULL "
    "AND EXISTS (SELECT FROM pg_catalog.pg_index WHERE indrelid = c.oid AND indisclustered)",
    DEFAULT_PARTITION: "c.oid = "
    "(SELECT partdefid FROM pg_catalog.pg_partitioned_table WHERE partrelid = to_regclass(%s))",
}


def reached(connection: psycopg.Connection[t.Any], reach: str, name: str) -> list[tuple[str, str]]:
    """Return tables and, where only a part of one is meant, its column; the column is empty otherwise.

    Args:
        connection: a session under the search_path that the name stands for.
        reach: one of the words of M(_risks).
        name: as SQL writes it; empty for V(role) means the current one.
    """
    roots = _ROOTS.get(reach)
    query = _DEPENDENT.format(roots=roots) if roots else _TABLES.format(condition=_CONDITIONS[reach])
    rows = connection.execute(query.encode(), [name])
    return [(quoted(schema, table), column or "") for schema, table, column in rows]
