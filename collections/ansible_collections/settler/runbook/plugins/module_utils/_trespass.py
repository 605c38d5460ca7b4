# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a tenant's session must not be able to do, each tried as the application role in a savepoint.

A try is one round trip: a database has dozens of tables, and the proof holds its transaction open for all of them.
"""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._errors import describe
from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import Probe, Settings, Table, insert
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._verify import Check

#: Views that the application can read, with the tenant column if they have it; those of extensions are not ours.
_VIEWS = """
SELECT c.oid::bigint, n.nspname, c.relname,
    (SELECT a.attname FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attname = %(column)s)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'v' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND c.relname <> ALL (%(exclude)s)
  AND has_schema_privilege(%(role)s, n.oid, 'USAGE') AND has_any_column_privilege(%(role)s, c.oid, 'SELECT')
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = c.oid AND e.deptype = 'e'
                  AND e.classid = 'pg_catalog.pg_class'::regclass)
ORDER BY 2, 3
"""

_TOO_WIDE = "The policy is missing, too wide or lacks WITH CHECK."


class Party(t.NamedTuple):
    """The probe tenants: whose session it is, whose rows are beside its own, and one that has none."""

    mine: str
    other: str
    third: str


class Tried(t.NamedTuple):
    """A table or a partition of it, with the probe rows that it holds, and the name of the whole table."""

    table: Table
    whole: str
    mine: Probe | None = None
    other: Probe | None = None
    nobodys: Probe | None = None

    @property
    def column(self) -> str:
        """Return the column that leads to the tenant."""
        column = self.table.tenant or self.table.link
        assert column is not None
        return column


class View(t.NamedTuple):
    """A view that the application can read."""

    oid: int
    schema: str
    name: str
    tenant: str | None

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


def views(connection: psycopg.Connection[t.Any], settings: Settings) -> list[View]:
    """Return the views that the application can read."""
    arguments = {"role": settings.role, "column": settings.tenant_column, "exclude": list(settings.exclude)}
    return [View(*row) for row in connection.execute(_VIEWS, arguments)]


class Session:
    """The application's session; whatever is tried is undone."""

    def __init__(self, connection: psycopg.Connection[t.Any], settings: Settings) -> None:
        self.connection = connection
        self.settings = settings
        self.cursor = psycopg.ClientCursor(connection)  # binds here, so that several statements go as one

    def __enter__(self) -> t.Self:
        self.connection.execute(
            sql.SQL("SAVEPOINT session; SET LOCAL ROLE {}; SAVEPOINT trespass").format(
                sql.Identifier(self.settings.role)
            )
        )
        return self

    def __exit__(self, *_error: object) -> None:
        self.connection.execute("ROLLBACK TO SAVEPOINT session; RELEASE SAVEPOINT session")

    def may_touch(self, oid: int) -> bool:
        """Tell whether the application has any right on a table."""
        row = self.connection.execute(
            "SELECT has_schema_privilege(relnamespace, 'USAGE') AND (has_table_privilege(oid, 'DELETE') "
            "OR has_any_column_privilege(oid, 'SELECT, INSERT, UPDATE')) FROM pg_catalog.pg_class WHERE oid = %s",
            [oid],
        ).fetchone()
        return bool(row and row[0])

    def context(self, tenant: str | None) -> sql.Composable:
        """Return how the session gets its context; none leaves it as it was when it began."""
        if tenant is None:
            return sql.SQL("")
        return sql.SQL("SELECT set_config({}, {}, true); ").format(
            sql.Literal(self.settings.setting), sql.Literal(tenant)
        )

    def after_reset(self, tenant: str) -> sql.Composable:
        """Return how the session loses a context that it had: the setting is empty then, not unset."""
        return sql.SQL("SELECT set_config({}, {}, false); RESET {}; ").format(
            sql.Literal(self.settings.setting),
            sql.Literal(tenant),
            sql.Identifier(*self.settings.setting.split(".")),
        )

    def ask(self, context: sql.Composable, query: sql.Composable, values: t.Sequence[t.Any] = ()) -> t.Any:
        """Run a query in a context; return its first value, or the number of rows where it returns none."""
        text = sql.SQL("ROLLBACK TO SAVEPOINT trespass; ") + context + query
        cursor = self.cursor
        cursor.execute(text, list(values) or None)
        while cursor.nextset():
            pass
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else cursor.rowcount

    def attempt(self, context: sql.Composable, query: sql.Composable, values: t.Sequence[t.Any] = ()) -> str:
        """Try something; return how many rows it reached, or that it was refused."""
        try:
            count = self.ask(context, query, values)
        except psycopg.errors.LockNotAvailable:
            raise
        except (
            # A key is no refusal: it only hides that the policy let the row through.
            psycopg.errors.InsufficientPrivilege,
            psycopg.errors.CheckViolation,
            psycopg.errors.RaiseException,
        ):
            return "refused"
        except psycopg.Error as error:
            return describe(error)
        return f"{count} row" + ("" if count == 1 else "s")


def _check(what: str, name: str, seen: str) -> Check:
    good = seen in ("refused", "0 rows")
    return Check(
        f"tenant isolation: {what}",
        name,
        "ok" if good else "failed",
        "no row of others",
        seen,
        "" if good else _TOO_WIDE,
    )


def _any(relation: Table | View, condition: sql.Composable) -> sql.Composed:
    """Return a query that counts to one: a leak in a large table is found at its first row."""
    return sql.SQL("SELECT count(*) FROM (SELECT FROM {} WHERE {} LIMIT 1) x").format(relation.identifier, condition)


def _is(table: Table, *probes: Probe | None) -> sql.Composable:
    """Return the condition for the rows of probes, by their primary keys."""
    rows = [
        sql.SQL("({})").format(
            sql.SQL(" AND ").join(
                sql.SQL("{} = {}").format(sql.Identifier(column), sql.Literal(probe.row[column]))
                for column in table.key
            )
        )
        for probe in probes
        if probe and table.key
    ]
    return sql.SQL(" OR ").join(rows) if rows else sql.SQL("false")


def _anybodys(tried: Tried) -> sql.Composable:
    if tried.table.tenant:
        return sql.SQL("{} IS NOT NULL").format(sql.Identifier(tried.table.tenant))
    return _is(tried.table, tried.mine, tried.other)


def point_at_rows(connection: psycopg.Connection[t.Any], tried: Tried) -> None:
    """Open, as the owner, a cursor on each probe row of a table.

    PostgreSQL asks the policies for SELECT too where a statement reads a column, so a condition would hide that the
    policies for UPDATE or DELETE are too wide. WHERE CURRENT OF reads none, and reaches one row and no other.
    """
    column = sql.Identifier(tried.column)
    for owner, probe in (("mine", tried.mine), ("other", tried.other), ("nobodys", tried.nobodys)):
        if probe is None:
            continue
        condition = _is(tried.table, probe)
        if probe is not tried.nobodys:
            condition = sql.SQL("{} = {}").format(column, sql.Literal(probe.row[tried.column]))
        connection.execute(
            sql.SQL("DECLARE {0} CURSOR FOR SELECT FROM {1} WHERE {2} FOR UPDATE; FETCH {0}").format(
                sql.Identifier(f"{owner}_{tried.table.oid}"), tried.table.identifier, condition
            )
        )


def _write(
    session: Session, tried: Tried, what: str, context: sql.Composable, text: t.LiteralString, *values: t.Any
) -> Check:
    """Try a statement on the probe rows."""
    names = {
        "table": tried.table.identifier,
        "column": sql.Identifier(tried.column),
        **{f"{owner}_row": sql.Identifier(f"{owner}_{tried.table.oid}") for owner in ("mine", "other", "nobodys")},
    }
    return _check(what, tried.table.name, session.attempt(context, sql.SQL(text).format(**names), values))


def _insert(session: Session, tried: Tried, what: str, context: sql.Composable, probe: Probe) -> Check:
    query = insert(tried.table, probe.given)
    return _check(what, tried.table.name, session.attempt(context, query, list(probe.given.values())))


def _blind(session: Session, party: Party) -> dict[str, sql.Composable]:
    """Return the contexts of nobody, but for that of a session that never had one."""
    return {
        "empty context": session.context(""),
        "a context after RESET": session.after_reset(party.mine),
        "malformed context": session.context("no uuid'"),
    }


def try_unset(session: Session, tried: Tried) -> list[Check]:
    """Read and write a table in a session that never had a context: before all others, for it cannot be unset again."""
    return _try_blind(session, tried, "no context", session.context(None))


def _try_blind(session: Session, tried: Tried, name: str, context: sql.Composable) -> list[Check]:
    """Read and write the rows of tenants, and of none, in a context that is nobody's."""
    table, other, suffix = tried.table, tried.other, f" with {name}"
    rows = [_check(f"select{suffix}", table.name, session.attempt(context, _any(table, _anybodys(tried))))]
    if other:
        update = "UPDATE {table} SET {column} = %s WHERE CURRENT OF {other_row}"
        rows += [
            _insert(session, tried, f"insert{suffix}", context, other),
            _write(session, tried, f"update{suffix}", context, update, other.row[tried.column]),
            _write(session, tried, f"delete{suffix}", context, "DELETE FROM {table} WHERE CURRENT OF {other_row}"),
        ]
    return rows + _read_nobodys(session, tried, suffix, context) + _write_nobodys(session, tried, suffix, context)


def _read_nobodys(session: Session, tried: Tried, suffix: str, context: sql.Composable) -> list[Check]:
    """Read rows that have no tenant: the probe row, or where none can be made those that are there."""
    if not tried.table.tenant or (tried.mine and not tried.nobodys):
        return []
    condition = sql.SQL("{} IS NULL").format(sql.Identifier(tried.table.tenant))
    if tried.nobodys:
        condition = sql.SQL("{} AND ({})").format(condition, _is(tried.table, tried.nobodys))
    seen = session.attempt(context, _any(tried.table, condition))
    return [_check(f"select nobody's row{suffix}", tried.table.name, seen)]


def _write_nobodys(session: Session, tried: Tried, suffix: str, context: sql.Composable) -> list[Check]:
    """Write a row that has no tenant."""
    if not tried.nobodys:
        return []
    update = "UPDATE {table} SET {column} = NULL WHERE CURRENT OF {nobodys_row}"
    delete = "DELETE FROM {table} WHERE CURRENT OF {nobodys_row}"
    rows = [
        _write(session, tried, f"update nobody's row{suffix}", context, update),
        _write(session, tried, f"delete nobody's row{suffix}", context, delete),
    ]
    if tried.whole not in session.settings.inserted_by_all:
        rows.append(_insert(session, tried, f"insert nobody's row{suffix}", context, tried.nobodys))
    return rows


def try_table(session: Session, tried: Tried, party: Party) -> list[Check]:
    """Make all attempts on one table but those without a context, and look whether a tenant sees its own row.

    Where there are no probe rows, as on a standby, it is only read.
    """
    table, mine, other = tried.table, tried.mine, tried.other
    me = session.context(party.mine)
    others = _is(table, other)
    if table.tenant:
        others = sql.SQL("{} <> {}").format(sql.Identifier(table.tenant), sql.Literal(party.mine))
    rows = [_check("select", table.name, session.attempt(me, _any(table, others)))]
    for name, context in _blind(session, party).items():
        rows += _try_blind(session, tried, name, context)
    if tried.whole not in session.settings.read_by_all:
        rows += _read_nobodys(session, tried, "", me)
    rows += _write_nobodys(session, tried, "", me)
    take = "UPDATE {table} SET {column} = %s WHERE CURRENT OF "
    if tried.nobodys:
        rows.append(_write(session, tried, "take over nobody's row", me, take + "{nobodys_row}", party.mine))
    if other:
        theirs = other.row[tried.column]
        update = "UPDATE {table} SET {column} = {column} WHERE {column} = %s"
        own = party.mine if table.tenant else (mine or other).row[tried.column]
        rows += [
            _insert(session, tried, "insert", me, other),
            _write(session, tried, "update", me, update, theirs),
            _write(session, tried, "take over", me, take + "{other_row}", own),
            _write(session, tried, "delete", me, "DELETE FROM {table} WHERE CURRENT OF {other_row}"),
        ]
    if mine and other:
        to = party.third if table.tenant else other.row[tried.column]
        rows.append(_write(session, tried, "hand over", me, take + "{mine_row}", to))
    if mine:
        condition = sql.SQL("{} = {}").format(sql.Identifier(tried.column), sql.Literal(mine.row[tried.column]))
        seen = session.attempt(me, _any(table, condition))
        # A table may be closed to the application; one that is not must show a tenant its own row.
        status = "ok" if seen in ("1 row", "refused") else "unexpected"
        rows.append(Check("tenant isolation: own row", table.name, status, "1 row", seen))
    return rows


def read_view_unset(session: Session, view: View) -> list[Check]:
    """Read a view with a tenant column in a session that never had a context."""
    if not view.tenant:
        return []
    anyone = _any(view, sql.SQL("{} IS NOT NULL").format(sql.Identifier(view.tenant)))
    return [_check("select with no context", view.name, session.attempt(session.context(None), anyone))]


def try_view(session: Session, view: View, party: Party) -> list[Check]:
    """Read others' rows through a view with a tenant column, also those that its materialized view has already."""
    if not view.tenant:
        return []
    column = sql.Identifier(view.tenant)
    others = _any(view, sql.SQL("{} <> {}").format(column, sql.Literal(party.mine)))
    anyone = _any(view, sql.SQL("{} IS NOT NULL").format(column))
    rows = [_check("read through a view", view.name, session.attempt(session.context(party.mine), others))]
    for name, context in _blind(session, party).items():
        rows.append(_check(f"select with {name}", view.name, session.attempt(context, anyone)))
    return rows


def contents(session: Session, view: View, tenant: str | None) -> str:
    """Return what a view shows, as one text that is another one if any value is."""
    query = sql.SQL("SELECT count(*) || ' rows, hash ' || coalesce(sum(hashtextextended(v::text, 0)), 0) FROM {} v")
    try:
        return str(session.ask(session.context(tenant), query.format(view.identifier)))
    except psycopg.errors.LockNotAvailable:
        raise
    except psycopg.errors.InsufficientPrivilege:
        return "refused"
    except psycopg.Error as error:
        return describe(error)


def compare_contents(view: View, alone: str, crowded: str, without: str, with_other: str) -> list[Check]:
    """Tell whether another tenant's rows make a difference in what a view shows, even in a sum."""
    found = []
    for what, before, after in (
        ("read through a view with no context", alone, crowded),
        ("view shows the same beside another's rows", without, with_other),
    ):
        good = before == after and (before == "refused" or ", hash " in before)
        status = "ok" if good else "failed"
        hint = "" if good else "It reads past the policies: WHERE … = current tenant, or security_invoker."
        found.append(Check(f"tenant isolation: {what}", view.name, status, before, after, hint))
    return found
