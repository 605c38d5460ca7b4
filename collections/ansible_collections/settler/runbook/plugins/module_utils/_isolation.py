# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tenant isolation, proved as the application role, with rows of two probe tenants, in a transaction rolled back.

The proof needs no knowledge of the schema but three names: the tenant table, the tenant column, and the setting that
carries the context. A probe row for every isolated table is made from the catalogue: columns that must be given get
a value of their type, foreign keys point to the probe's own parent rows.
"""

from __future__ import annotations

import typing as t
import uuid
from dataclasses import dataclass, field

from ansible_collections.settler.runbook.plugins.module_utils._errors import describe
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._verify import Check

_TABLES = """
SELECT c.oid::int, n.nspname, c.relname,
    (SELECT array_agg(k.confrelid::int) FROM pg_catalog.pg_constraint k
     WHERE k.conrelid = c.oid AND k.contype = 'f' AND k.confrelid <> c.oid) AS parents
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = %(column)s AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = %(schema)s
ORDER BY c.relname
"""

_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, NULL), a.attnotnull, a.atthasdef, a.attgenerated <> '',
    a.attidentity <> '' OR coalesce(pg_get_expr(d.adbin, d.adrelid) LIKE 'nextval(%%', false),
    parent.oid::int, parent.key
FROM pg_catalog.pg_attribute a
LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN LATERAL (
    SELECT k.confrelid AS oid, f.attname AS key FROM pg_catalog.pg_constraint k
    JOIN pg_catalog.pg_attribute f
        ON f.attrelid = k.confrelid AND f.attnum = k.confkey[array_position(k.conkey, a.attnum)]
    WHERE k.conrelid = a.attrelid AND k.contype = 'f' AND a.attnum = ANY (k.conkey) LIMIT 1
) parent ON true
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

_ROLE = """
SELECT rolsuper, rolbypassrls,
    EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = %(schema)s AND c.relkind IN ('r', 'p') AND pg_has_role(r.oid, c.relowner, 'MEMBER')),
    EXISTS (SELECT FROM pg_catalog.pg_roles x
            WHERE (x.rolsuper OR x.rolbypassrls) AND pg_has_role(r.oid, x.oid, 'MEMBER'))
FROM pg_catalog.pg_roles r WHERE rolname = %(role)s
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


@dataclass(frozen=True)
class Settings:
    """What is isolated, and how the application says whose session it is."""

    role: str
    tenant_table: str = "tenants"
    tenant_column: str = "tenant_id"
    setting: str = "app.current_tenant_id"
    schema: str = "public"
    exclude: tuple[str, ...] = ()
    values: t.Mapping[str, t.Any] = field(default_factory=dict)  # "table.column" -> value of a probe row


class _ProofError(Exception):
    """The proof cannot be made; the text says why."""


def prove(connection: psycopg.Connection[t.Any], settings: Settings) -> list[Check]:
    """Prove that one tenant's session neither sees nor changes another's rows.

    Args:
        connection: autocommit; its role must be able to write the tables (as their owner) and to become the
            application role.

    Returns:
        a row a table and kind of trespass. Everything is rolled back, and no sequence is drawn from.
    """
    row = connection.execute(_ROLE, {"role": settings.role, "schema": settings.schema}).fetchone()
    if row is None:
        return [Check("application role", settings.role, "failed", "present", "missing")]
    rows = [
        Check(
            "application role",
            settings.role,
            "failed" if wrong else "ok",
            f"not {what}",
            what if wrong else f"not {what}",
        )
        for what, wrong in zip(
            ("superuser", "BYPASSRLS", "owner of the tables", "member of a superuser"), row, strict=True
        )
    ]
    if any(check.status != "ok" for check in rows):
        return rows
    connection.execute("BEGIN")
    try:
        rows += _prove(connection, settings)
    except (_ProofError, psycopg.Error) as error:
        text = describe(error) if isinstance(error, psycopg.Error) else str(error)
        rows.append(Check("tenant isolation", settings.schema, "failed", "provable", text))
    finally:
        connection.execute("ROLLBACK")
    return rows


def _prove(connection: psycopg.Connection[t.Any], settings: Settings) -> list[Check]:
    found = connection.execute(_TABLES, {"schema": settings.schema, "column": settings.tenant_column}).fetchall()
    tables = _in_order([row for row in found if row[2] not in settings.exclude])
    if not tables:
        raise _ProofError(f"no table of {settings.schema} has a column {settings.tenant_column}")
    mine, other = str(uuid.uuid4()), str(uuid.uuid4())
    _insert_probe_rows(connection, settings, tables, mine)
    probes = _insert_probe_rows(connection, settings, tables, other)
    connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(settings.role)))
    rows: list[Check] = []
    for oid, _schema, name, _parents in tables:
        if _may_touch(connection, f"{settings.schema}.{name}", settings.role):
            rows += _trespass(connection, settings, name, mine, other, probes[oid])
        else:
            rows.append(Check("tenant isolation", name, "ok", "no access", "no access"))
    return rows


def _in_order(tables: list[t.Any]) -> list[t.Any]:
    """Sort tables so that parents come before the tables that refer to them."""
    ordered: list[t.Any] = []
    left = {row[0]: row for row in tables}
    while left:
        ready = [row for row in left.values() if not set(row[3] or ()) & set(left)]
        if not ready:
            raise _ProofError("foreign keys in a circle: " + ", ".join(row[2] for row in left.values()))
        ordered += ready
        for row in ready:
            del left[row[0]]
    return ordered


@dataclass(frozen=True)
class _Probe:
    """A probe row: where it lies, and the values that made it."""

    address: str
    values: dict[str, t.Any]


def _insert_probe_rows(
    connection: psycopg.Connection[t.Any], settings: Settings, tables: list[t.Any], tenant: str
) -> dict[int, _Probe]:
    """Insert one row of a tenant into every table; return the rows by the table's OID."""
    made: dict[int, dict[str, t.Any]] = {}
    probes: dict[int, _Probe] = {}
    root = connection.execute(
        "SELECT %s::regclass::oid::int", [f"{settings.schema}.{settings.tenant_table}"]
    ).fetchone()
    assert root is not None
    for oid, name in [(root[0], settings.tenant_table), *((row[0], row[2]) for row in tables)]:
        values = _probe_values(connection, settings, oid, name, tenant, made)
        if oid == root[0]:
            values["id"] = tenant
        returning = sql.SQL(" RETURNING ctid::text, to_jsonb({}.*)").format(sql.Identifier(name))
        try:
            row = connection.execute(_insert(settings, name, values) + returning, list(values.values())).fetchone()
        except psycopg.Error as error:
            raise _ProofError(f"no probe row for {name}: {describe(error)}") from error
        assert row is not None
        made[oid] = row[1]
        probes[oid] = _Probe(row[0], values)
    return probes


def _insert(settings: Settings, name: str, values: t.Mapping[str, t.Any]) -> sql.Composed:
    return sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})").format(
        sql.Identifier(settings.schema, name),
        sql.SQL(", ").join(map(sql.Identifier, values)),
        sql.SQL(", ").join(sql.Placeholder() * len(values)),
    )


def _probe_values(
    connection: psycopg.Connection[t.Any],
    settings: Settings,
    oid: int,
    name: str,
    tenant: str,
    made: t.Mapping[int, t.Mapping[str, t.Any]],
) -> dict[str, t.Any]:
    """Return values for the columns of a probe row that must be given."""
    values: dict[str, t.Any] = {}
    for column, kind, required, has_default, generated, numbered, parent, key in connection.execute(
        _COLUMNS, [oid]
    ).fetchall():
        if generated:
            continue
        if f"{name}.{column}" in settings.values:
            values[column] = settings.values[f"{name}.{column}"]
        elif column == settings.tenant_column:
            values[column] = tenant
        elif parent in made:
            values[column] = made[parent][key]
        elif numbered:  # below what a sequence gives, so that none is drawn: sequences do not roll back
            values[column] = -1 - uuid.UUID(tenant).int % 2**30
        elif required and not has_default:
            values[column] = _probe_value(kind, tenant)
    return values


def _probe_value(kind: str, tenant: str) -> t.Any:
    if kind == "uuid":
        return str(uuid.uuid4())
    if kind in ("text", "character varying"):
        return f"probe-{tenant}"[:20]
    return _VALUES.get(kind, 0)


def _may_touch(connection: psycopg.Connection[t.Any], table: str, role: str) -> bool:
    row = connection.execute(
        "SELECT bool_or(has_table_privilege(%s, %s, kind)) "
        "FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) kind",
        [role, table],
    ).fetchone()
    return bool(row and row[0])


def _trespass(
    connection: psycopg.Connection[t.Any], settings: Settings, name: str, mine: str, other: str, probe: _Probe
) -> list[Check]:
    """Try to see, make, change, take over and delete rows of the other tenant, and to see rows without a context."""
    names = {"table": sql.Identifier(settings.schema, name), "column": sql.Identifier(settings.tenant_column)}
    tenants = {"mine": sql.Literal(mine), "other": sql.Literal(other), "address": sql.Literal(probe.address)}

    def query(text: t.LiteralString) -> sql.Composed:
        return sql.SQL(text).format(**names, **tenants)

    foreign = query("SELECT count(*) FROM {table} WHERE {column} <> {mine}")
    anyone = query("SELECT count(*) FROM {table} WHERE {column} IS NOT NULL")
    attempts: list[tuple[str, str | None, sql.Composed, list[t.Any]]] = [
        ("select", mine, foreign, []),
        ("select with no context", None, anyone, []),
        ("select with empty context", "", anyone, []),
        ("select with malformed context", "no uuid'", anyone, []),
        ("insert", mine, _insert(settings, name, probe.values), list(probe.values.values())),
        ("update", mine, query("UPDATE {table} SET {column} = {column} WHERE {column} = {other}"), []),
        ("hand over", mine, query("UPDATE {table} SET {column} = {other} WHERE {column} = {mine}"), []),
        ("delete", mine, query("DELETE FROM {table} WHERE ctid = {address}::tid"), []),
    ]
    rows = []
    for what, tenant, statement, values in attempts:
        seen = _attempt(connection, settings, tenant, statement, values)
        good = seen in ("0 rows", "refused")
        hint = "" if good else "The policy is missing, too wide or lacks WITH CHECK."
        rows.append(Check(f"tenant isolation: {what}", name, "ok" if good else "failed", "no row", seen, hint))
    own = _attempt(connection, settings, mine, query("SELECT count(*) FROM {table} WHERE {column} = {mine}"), [])
    # A table may be closed to the application; one that is not must show a tenant its own row.
    rows.append(
        Check(
            "tenant isolation: own row",
            name,
            "ok" if own in ("1 row", "refused") else "unexpected",
            "1 row",
            own,
        )
    )
    return rows


def _attempt(
    connection: psycopg.Connection[t.Any],
    settings: Settings,
    tenant: str | None,
    query: sql.Composed,
    values: list[t.Any],
) -> str:
    """Run one trespass in a savepoint with a tenant's context; return how many rows it reached, or that it was refused.

    A check constraint or a trigger may refuse before the policy does; a unique or foreign key may not: it would
    only hide that the policy let the row through.
    """
    connection.execute("SAVEPOINT trespass")
    try:
        if tenant is None:
            connection.execute(sql.SQL("RESET {}").format(sql.Identifier(*settings.setting.split("."))))
        else:
            connection.execute("SELECT set_config(%s, %s, true)", [settings.setting, tenant])
        cursor = connection.execute(query, values or None)
        row = cursor.fetchone() if cursor.description else None
        count = row[0] if row else cursor.rowcount
        return f"{count} row" + ("" if count == 1 else "s")
    except (
        psycopg.errors.InsufficientPrivilege,
        psycopg.errors.CheckViolation,
        psycopg.errors.RaiseException,
    ):
        return "refused"
    except psycopg.Error as error:
        return describe(error)
    finally:
        connection.execute("ROLLBACK TO SAVEPOINT trespass; RELEASE SAVEPOINT trespass")
