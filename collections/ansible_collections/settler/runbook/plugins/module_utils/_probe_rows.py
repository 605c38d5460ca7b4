# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rows of a probe tenant: one in every table that belongs to tenants, made from what the catalogue says of it.

Columns that must be given get a value of their type, foreign keys point to the probe's own parent rows.
"""

from __future__ import annotations

import typing as t
import uuid
from dataclasses import dataclass, field

from ansible_collections.settler.runbook.plugins.module_utils._errors import describe
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql

#: The table of tenants, all with the tenant column, and those without it whose foreign keys lead to one of these.
_TABLES = """
WITH RECURSIVE tables AS (
    SELECT c.oid, c.relname FROM pg_catalog.pg_class c
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relnamespace = to_regnamespace(quote_ident(%(schema)s))
), links AS (
    SELECT k.conrelid AS child, k.confrelid AS parent,
        (SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = k.conrelid AND attnum = k.conkey[1]) AS link
    FROM pg_catalog.pg_constraint k WHERE k.contype = 'f' AND k.confrelid <> k.conrelid
        AND k.conparentid = 0 -- what partitions have is the same key again
), direct AS (
    SELECT oid, CASE WHEN relname = %(root)s THEN 'id' ELSE %(column)s::text END AS tenant
    FROM tables WHERE relname = %(root)s OR EXISTS (SELECT FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = tables.oid AND a.attname = %(column)s AND NOT a.attisdropped)
), found AS (
    SELECT oid, tenant FROM direct
    UNION SELECT l.child, NULL::text FROM found JOIN links l ON l.parent = found.oid
    WHERE l.child IN (SELECT oid FROM tables) AND l.child NOT IN (SELECT oid FROM direct)
)
SELECT oid::bigint, %(schema)s AS schema, relname, found.tenant,
    ARRAY(SELECT parent::bigint FROM links WHERE child = oid),
    (SELECT min(link::text) FROM links WHERE child = oid AND parent IN (SELECT oid FROM found)),
    ARRAY(SELECT a.attname::text FROM pg_catalog.pg_index i
          JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
          WHERE i.indrelid = oid AND i.indisprimary)
FROM found JOIN tables USING (oid)
ORDER BY relname
"""

_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, NULL), a.attnotnull, a.atthasdef, a.attgenerated <> '',
    a.attidentity <> '' OR coalesce(pg_get_expr(d.adbin, d.adrelid) LIKE 'nextval(%%', false),
    parent.oid::bigint, parent.key
FROM pg_catalog.pg_attribute a
LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN LATERAL (
    SELECT k.confrelid AS oid, f.attname AS key FROM pg_catalog.pg_constraint k
    JOIN pg_catalog.pg_attribute f
        ON f.attrelid = k.confrelid AND f.attnum = k.confkey[array_position(k.conkey, a.attnum)]
    WHERE k.conrelid = a.attrelid AND k.contype = 'f' AND k.conparentid = 0 AND a.attnum = ANY (k.conkey) LIMIT 1
) parent ON true
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

#: Values by type for columns that must be given; numbers get 0, texts the tenant, so that unique rules hold.
_VALUES: dict[str, t.Any] = {
    "boolean": False,
    "jsonb": "{}",
    "json": "{}",
    "text[]": [],
    "character varying[]": [],
    "timestamp without time zone": "2000-01-01",
    "timestamp with time zone": "2000-01-01",
    "date": "2000-01-01",
}


class ProofError(Exception):
    """The proof cannot be made; the text says why."""


@dataclass(frozen=True)
class Settings:
    """What is isolated, and how the application says whose session it is."""

    role: str
    tenant_table: str = "tenants"
    tenant_column: str = "tenant_id"
    setting: str = "app.current_tenant_id"
    schema: str = "public"
    exclude: t.Sequence[str] = ()
    read_by_all: t.Sequence[str] = ("feature_flags", "blocked_ips")  # every tenant reads their rows without a tenant
    inserted_by_all: t.Sequence[str] = ("security_events",)  # every session may insert rows without a tenant
    values: t.Mapping[str, t.Any] = field(default_factory=dict)  # "table.column" -> value of a probe row


class Table(t.NamedTuple):
    """A table whose rows belong to tenants: by a column, or (C(tenant) is None) through the row that they refer to."""

    oid: int
    schema: str
    name: str
    tenant: str | None
    parents: list[int]
    link: str | None
    key: list[str]

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


class Probe(t.NamedTuple):
    """A row that was made: the values that made it, all that it came to, and the table or partition that it is in."""

    given: dict[str, t.Any]
    row: dict[str, t.Any]
    place: int


def isolated_tables(connection: psycopg.Connection[t.Any], settings: Settings) -> list[Table]:
    """Return the tables of tenants, parents before those that refer to them."""
    found = connection.execute(
        _TABLES,
        {"schema": settings.schema, "root": settings.tenant_table, "column": settings.tenant_column},
    ).fetchall()
    tables = [table for table in (Table(*row) for row in found) if table.name not in settings.exclude]
    if not any(table.tenant == settings.tenant_column for table in tables):
        raise ProofError(f"no table of {settings.schema} has a column {settings.tenant_column}")
    return _in_order(tables)


def _in_order(tables: list[Table]) -> list[Table]:
    ordered: list[Table] = []
    left = {table.oid: table for table in tables}
    probed = set(left)
    while left:
        ready = [table for table in left.values() if not set(table.parents) & set(left)]
        if not ready:
            raise ProofError("foreign keys in a circle: " + ", ".join(table.name for table in left.values()))
        # A parent that is not probed may get its row from a trigger on any other table: its children come late.
        ready = [table for table in ready if set(table.parents) <= probed] or ready
        ordered += ready
        for table in ready:
            del left[table.oid]
    return ordered


def insert_probes(
    connection: psycopg.Connection[t.Any], settings: Settings, tables: t.Sequence[Table], tenant: str
) -> dict[int, Probe]:
    """Insert a tenant and one row of it into every table, as the owner; return them by the table's OID."""
    probes: dict[int, Probe] = {}
    root = next((table for table in tables if table.name == settings.tenant_table), None)
    if root is None:  # it is excluded, or there is none
        root = _root(connection, settings)
        tables = [root, *tables]
    for table in tables:
        for parent in set(table.parents) - set(probes):
            if found := _outside(connection, settings, parent, tenant):
                probes[parent] = found
        given = _values(connection, settings, table, tenant, probes)
        query = insert(table, given) + sql.SQL(" RETURNING to_jsonb({}.*), tableoid::bigint").format(
            sql.Identifier(table.name)
        )
        try:
            row = connection.execute(query, list(given.values())).fetchone()
        except psycopg.errors.LockNotAvailable:
            raise
        except psycopg.Error as error:
            raise ProofError(f"no probe row for {table.name}: {describe(error)}") from error
        if row is None:
            raise ProofError(f"no probe row for {table.name}: a trigger or rule let none in")
        probes[table.oid] = Probe(given, *row)
    return probes


def insert_nobodys(
    connection: psycopg.Connection[t.Any], settings: Settings, tables: t.Sequence[Table], mine: t.Mapping[int, Probe]
) -> dict[int, Probe]:
    """Insert, as the owner, a row without a tenant into each table that takes one; return them by the table's OID.

    Args:
        connection: in a transaction.
        settings: of the proof.
        tables: those that are tried.
        mine: a tenant's rows, for columns that must refer to one.
    """
    probes: dict[int, Probe] = {}
    for table in tables:
        if table.tenant != settings.tenant_column or not table.key:
            continue
        given = _values(connection, settings, table, None, mine)
        query = insert(table, given) + sql.SQL(" RETURNING to_jsonb({}.*), tableoid::bigint").format(
            sql.Identifier(table.name)
        )
        connection.execute("SAVEPOINT nobodys")
        try:
            row = connection.execute(query, list(given.values())).fetchone()
        except psycopg.errors.LockNotAvailable:
            raise
        except psycopg.Error:  # a rule or trigger wants a tenant
            row = None
        if row and row[0][table.tenant] is None:
            probes[table.oid] = Probe(given, *row)
        else:
            connection.execute("ROLLBACK TO SAVEPOINT nobodys")
        connection.execute("RELEASE SAVEPOINT nobodys")
    return probes


def _outside(connection: psycopg.Connection[t.Any], settings: Settings, parent: int, tenant: str) -> Probe | None:
    """Return the probe tenant's row of a parent that is not probed itself; a trigger may have made one."""
    name = connection.execute(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c "
        "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
        "JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped "
        "WHERE c.oid = %s AND a.attname = %s",
        [parent, settings.tenant_column],
    ).fetchone()
    if name is None:
        return None
    row = connection.execute(
        sql.SQL("SELECT to_jsonb(x.*), x.tableoid::bigint FROM {} x WHERE x.{} = %s LIMIT 1").format(
            sql.Identifier(*name), sql.Identifier(settings.tenant_column)
        ),
        [tenant],
    ).fetchone()
    return Probe({}, *row) if row else None


def _root(connection: psycopg.Connection[t.Any], settings: Settings) -> Table:
    row = connection.execute(
        "SELECT c.oid::bigint FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = %s AND c.relname = %s",
        [settings.schema, settings.tenant_table],
    ).fetchone()
    if row is None:
        raise ProofError(f"there is no table {settings.schema}.{settings.tenant_table}")
    return Table(row[0], settings.schema, settings.tenant_table, "id", [], None, ["id"])


def insert(table: Table, values: t.Mapping[str, t.Any]) -> sql.Composed:
    """Return an INSERT with a placeholder for each value."""
    if not values:
        return sql.SQL("INSERT INTO {} DEFAULT VALUES").format(table.identifier)
    return sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})").format(
        table.identifier,
        sql.SQL(", ").join(map(sql.Identifier, values)),
        sql.SQL(", ").join(sql.Placeholder() * len(values)),
    )


def _values(
    connection: psycopg.Connection[t.Any],
    settings: Settings,
    table: Table,
    tenant: str | None,
    probes: t.Mapping[int, Probe],
) -> dict[str, t.Any]:
    """Return values for the columns of a probe row that must be given; one without a tenant refers to what it must."""
    values: dict[str, t.Any] = {}
    seed = tenant or str(uuid.uuid4())
    for column, kind, required, has_default, generated, numbered, parent, key in connection.execute(
        _COLUMNS, [table.oid]
    ).fetchall():
        if generated:
            continue
        if f"{table.name}.{column}" in settings.values:
            values[column] = settings.values[f"{table.name}.{column}"]
        elif column == table.tenant:
            values[column] = tenant
        elif parent in probes and (tenant or required):
            values[column] = probes[parent].row[key]
        elif numbered:  # below what a sequence gives, so that none is drawn: sequences do not roll back
            values[column] = -1 - uuid.UUID(seed).int % 2**30
        elif required and not has_default:
            values[column] = _value(kind, seed)
    return values


def _value(kind: str, tenant: str) -> t.Any:
    if kind == "uuid":
        return str(uuid.uuid4())
    if kind in ("text", "character varying"):
        return f"probe-{tenant}"[:20]
    return _VALUES.get(kind, 0)
