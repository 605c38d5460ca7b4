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
SELECT c.oid::int, c.relname,
    (SELECT array_agg(k.confrelid::int) FROM pg_catalog.pg_constraint k
     WHERE k.conrelid = c.oid AND k.contype = 'f' AND k.confrelid <> c.oid) AS parents
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = %(column)s AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = %(schema)s
ORDER BY c.relname
"""

_ROOT = """
SELECT c.oid::int FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s
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


def _refusals() -> tuple[type[Exception], ...]:
    """Return how a trespass may be refused. A key is no refusal: it only hides that the policy let the row through."""
    return (
        psycopg.errors.InsufficientPrivilege,
        psycopg.errors.CheckViolation,
        psycopg.errors.RaiseException,
    )


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
    tables = _in_order([row for row in found if row[1] not in settings.exclude])
    if not tables:
        raise _ProofError(f"no table of {settings.schema} has a column {settings.tenant_column}")
    mine, other, third = (str(uuid.uuid4()) for _tenant in range(3))
    _insert_probe_rows(connection, settings, tables, mine)
    probes = _insert_probe_rows(connection, settings, tables, other)
    _insert_probe_rows(connection, settings, [], third)  # no rows: no unique key hides what the policy lets through
    for oid, name, _parents in tables:
        _point_at_probe_rows(connection, settings, oid, name, (mine, other))
    connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(settings.role)))
    rows: list[Check] = []
    for oid, name, _parents in tables:
        if _may_touch(connection, oid, settings.role):
            rows += _trespass(connection, settings, oid, name, (mine, other, third), probes[oid])
        else:
            rows.append(Check("tenant isolation", name, "ok", "no access", "no access"))
    return rows


def _in_order(tables: list[t.Any]) -> list[t.Any]:
    """Sort tables so that parents come before the tables that refer to them."""
    ordered: list[t.Any] = []
    left = {row[0]: row for row in tables}
    while left:
        ready = [row for row in left.values() if not set(row[2] or ()) & set(left)]
        if not ready:
            raise _ProofError("foreign keys in a circle: " + ", ".join(row[1] for row in left.values()))
        ordered += ready
        for row in ready:
            del left[row[0]]
    return ordered


def _insert_probe_rows(
    connection: psycopg.Connection[t.Any], settings: Settings, tables: list[t.Any], tenant: str
) -> dict[int, dict[str, t.Any]]:
    """Insert a tenant and one row of it into every table; return the values that made them, by the table's OID."""
    made: dict[int, dict[str, t.Any]] = {}
    probes: dict[int, dict[str, t.Any]] = {}
    root = connection.execute(_ROOT, [settings.schema, settings.tenant_table]).fetchone()
    if root is None:
        raise _ProofError(f"there is no table {settings.schema}.{settings.tenant_table}")
    for oid, name in [(root[0], settings.tenant_table), *((row[0], row[1]) for row in tables)]:
        values = _probe_values(connection, settings, oid, name, tenant, made)
        if oid == root[0]:
            values["id"] = tenant
        returning = sql.SQL(" RETURNING to_jsonb({}.*)").format(sql.Identifier(name))
        try:
            row = connection.execute(_insert(settings, name, values) + returning, list(values.values())).fetchone()
        except psycopg.Error as error:
            raise _ProofError(f"no probe row for {name}: {describe(error)}") from error
        assert row is not None
        made[oid], probes[oid] = row[0], values
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


def _point_at_probe_rows(
    connection: psycopg.Connection[t.Any], settings: Settings, oid: int, name: str, tenants: tuple[str, str]
) -> None:
    """Open, as the owner, a cursor on either tenant's probe row of a table.

    PostgreSQL asks the policies for SELECT too where a statement reads a column, so a condition would hide that the
    policies for UPDATE or DELETE are too wide. WHERE CURRENT OF reads none, and reaches one row and no other.
    """
    for owner, tenant in zip(("mine", "other"), tenants, strict=True):
        cursor = sql.Identifier(f"{owner}_{oid}")
        connection.execute(
            sql.SQL("DECLARE {} CURSOR FOR SELECT FROM {} WHERE {} = {} FOR UPDATE").format(
                cursor,
                sql.Identifier(settings.schema, name),
                sql.Identifier(settings.tenant_column),
                sql.Literal(tenant),
            )
        )
        connection.execute(sql.SQL("FETCH {}").format(cursor))


def _may_touch(connection: psycopg.Connection[t.Any], oid: int, role: str) -> bool:
    row = connection.execute(
        "SELECT bool_or(has_table_privilege(%s, %s::oid, kind)) "
        "FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) kind",
        [role, oid],
    ).fetchone()
    return bool(row and row[0])


class _Attempt(t.NamedTuple):
    """One trespass: whose session tries what."""

    what: str
    tenant: str | None
    query: sql.Composed
    values: list[t.Any]


def _attempts(
    settings: Settings, oid: int, name: str, tenants: tuple[str, str, str], probe: dict[str, t.Any]
) -> t.Iterator[_Attempt]:
    """Yield what a tenant must not be able to do."""
    mine = tenants[0]
    names = {
        "table": sql.Identifier(settings.schema, name),
        "column": sql.Identifier(settings.tenant_column),
        "my_row": sql.Identifier(f"mine_{oid}"),
        "other_row": sql.Identifier(f"other_{oid}"),
    }
    literals = dict(zip(("mine", "other", "third"), map(sql.Literal, tenants), strict=True))

    def query(text: t.LiteralString) -> sql.Composed:
        return sql.SQL(text).format(**names, **literals)

    anyone = query("SELECT count(*) FROM {table} WHERE {column} IS NOT NULL")
    yield _Attempt("select", mine, query("SELECT count(*) FROM {table} WHERE {column} <> {mine}"), [])
    yield _Attempt("select with no context", None, anyone, [])
    yield _Attempt("select with empty context", "", anyone, [])
    yield _Attempt("select with malformed context", "no uuid'", anyone, [])
    yield _Attempt("insert", mine, _insert(settings, name, probe), list(probe.values()))
    yield _Attempt("update", mine, query("UPDATE {table} SET {column} = {column} WHERE {column} = {other}"), [])
    yield _Attempt("take over", mine, query("UPDATE {table} SET {column} = {mine} WHERE CURRENT OF {other_row}"), [])
    yield _Attempt("hand over", mine, query("UPDATE {table} SET {column} = {third} WHERE CURRENT OF {my_row}"), [])
    yield _Attempt("delete", mine, query("DELETE FROM {table} WHERE CURRENT OF {other_row}"), [])


def _trespass(
    connection: psycopg.Connection[t.Any],
    settings: Settings,
    oid: int,
    name: str,
    tenants: tuple[str, str, str],
    probe: dict[str, t.Any],
) -> list[Check]:
    """Make all attempts on one table, and look whether a tenant sees its own row."""
    rows = []
    for attempt in _attempts(settings, oid, name, tenants, probe):
        seen = _make(connection, settings, attempt)
        good = seen in ("refused", "0 rows")
        hint = "" if good else "The policy is missing, too wide or lacks WITH CHECK."
        status = "ok" if good else "failed"
        rows.append(Check(f"tenant isolation: {attempt.what}", name, status, "no row of others", seen, hint))
    own = sql.SQL("SELECT count(*) FROM {} WHERE {} = {}").format(
        sql.Identifier(settings.schema, name), sql.Identifier(settings.tenant_column), sql.Literal(tenants[0])
    )
    seen = _make(connection, settings, _Attempt("own row", tenants[0], own, []))
    # A table may be closed to the application; one that is not must show a tenant its own row.
    status = "ok" if seen in ("1 row", "refused") else "unexpected"
    rows.append(Check("tenant isolation: own row", name, status, "1 row", seen))
    return rows


def _make(connection: psycopg.Connection[t.Any], settings: Settings, attempt: _Attempt) -> str:
    """Make one attempt in a savepoint; return how many rows it reached, or that it was refused."""
    connection.execute("SAVEPOINT trespass")
    try:
        if attempt.tenant is None:
            connection.execute(sql.SQL("RESET {}").format(sql.Identifier(*settings.setting.split("."))))
        else:
            connection.execute("SELECT set_config(%s, %s, true)", [settings.setting, attempt.tenant])
        cursor = connection.execute(attempt.query, attempt.values or None)
        row = cursor.fetchone() if cursor.description else None
        count = row[0] if row else cursor.rowcount
        return f"{count} row" + ("" if count == 1 else "s")
    except _refusals():
        return "refused"
    except psycopg.Error as error:
        return describe(error)
    finally:
        connection.execute("ROLLBACK TO SAVEPOINT trespass; RELEASE SAVEPOINT trespass")
