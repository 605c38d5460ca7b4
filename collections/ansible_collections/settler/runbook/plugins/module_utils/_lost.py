# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The rows that a rollback would lose: those of the present database that the other one has not, new and changed ones.

The two databases stand beside each other then. Rows are compared as wholes, by the columns that both tables have; so a
table needs no key, and of rows that are alike as many are lost as there are more of. A row is lost as well if it has a
value in a column that the other table has not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import Table, content, declared, describe
from ansible_collections.settler.runbook.plugins.module_utils._manifest import sync
from ansible_collections.settler.runbook.plugins.module_utils._private import make_folder
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql

if t.TYPE_CHECKING:
    from pathlib import Path

Key = tuple[str, str]

#: What makes the text of a value depend on the session: a database may have settings of its own.
_SETTINGS = """
SELECT set_config(name, value, false) FROM (VALUES ('timezone', 'UTC'), ('datestyle', 'ISO, YMD'),
    ('intervalstyle', 'postgres'), ('extra_float_digits', '1'), ('bytea_output', 'hex'), ('lc_monetary', 'C'),
    ('search_path', ''), ('xmloption', 'content')) AS s (name, value)
"""

#: Tables with rows of their own, the table that they are partitions of, or they themselves, whether they have a primary
#: key, and their columns with types, whether they are generated, and their defaults.
_TABLES = """
SELECT n.nspname, c.relname, (SELECT ARRAY[rn.nspname, r.relname]::text[] FROM pg_catalog.pg_class r
                              JOIN pg_catalog.pg_namespace rn ON rn.oid = r.relnamespace
                              WHERE r.oid = coalesce(pg_partition_root(c.oid), c.oid)),
    EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary),
    coalesce((SELECT jsonb_object_agg(a.attname, jsonb_build_array(format_type(a.atttypid, NULL), a.attgenerated <> '',
                  '(' || pg_get_expr(d.adbin, d.adrelid) || ')::' || format_type(a.atttypid, a.atttypmod)))
              FROM pg_catalog.pg_attribute a
              LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '{}')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND n.nspname <> %s
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = c.oid AND e.classid = 'pg_class'::regclass
                  AND e.deptype = 'e')
ORDER BY 1, 2
"""


#: A default that is a constant: a row with it needs nobody to have written it.
_CONSTANT = re.compile(r"""\(('([^']|'')*'|-?[0-9.]+|true|false)(::[\w ".\[\]]+(\([0-9, ]+\))?)*\)::[^:]+""")


class _Column(t.NamedTuple):
    """A column: its type, whether it is generated, and its default as a value of the column's own type."""

    kind: str
    generated: bool
    default: str | None


class _Relation(t.NamedTuple):
    """A relation with rows: the table that it belongs to, whether it has a primary key, its columns."""

    root: Key
    keyed: bool
    columns: t.Mapping[str, _Column]


class Others(t.NamedTuple):
    """Whose rows are looked for inside the window of a run: those of all others.

    C(since) is the oldest transaction that was not over when the backup was made, C(own) are those of the run, and
    C(changes) the tables and columns that its files say they change.
    """

    since: str
    own: t.Collection[str]
    changes: t.Collection[str]


@dataclass(frozen=True)
class Lost:
    """How many rows of a table would be lost, and the file that they were written to, if they were.

    Where C(keyed) is false rows of the table cannot be told apart by a key.
    """

    table: str
    rows: int
    keyed: bool
    file: str = ""


class Since(t.NamedTuple):
    """A moment: the oldest transaction that was not over, and how many rows each relation had just after it."""

    transaction: str
    counts: t.Mapping[Key, int]


def moment(connection: psycopg.Connection[t.Any], *, ledger_schema: str) -> Since:
    """Return this moment, for M(untouched); whatever is read after it may be compared with it."""
    row = connection.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::xid::text").fetchone()
    assert row is not None
    return Since(row[0], {key: count for key, (count, _new) in _counts(connection, row[0], ledger_schema).items()})


def untouched(connection: psycopg.Connection[t.Any], since: Since, *, ledger_schema: str) -> dict[Key, Key]:
    """Return the relations whose rows are those of a moment, each with the table that it is a partition of, or itself.

    They have as many rows as then, and none of a later transaction. An update makes a new row, so this needs no look at
    values; a row in doubt counts as new.
    """
    now = _counts(connection, since.transaction, ledger_schema)
    still = {key for key, (count, new) in now.items() if not new and count == since.counts.get(key)}
    return {key: one.root for key, one in _tables(connection, ledger_schema).items() if key in still}


def _counts(connection: psycopg.Connection[t.Any], transaction: str, ledger_schema: str) -> dict[Key, tuple[int, int]]:
    """Return how many rows each relation has, and how many of them no older transaction has written."""
    relations = list(_tables(connection, ledger_schema))
    counts = [
        sql.SQL("SELECT {}, {}, count(*), count(*) FILTER (WHERE age(xmin) <= age({}::xid)) FROM ONLY {}").format(
            sql.Literal(schema), sql.Literal(name), sql.Literal(transaction), sql.Identifier(schema, name)
        )
        for schema, name in relations
    ]
    found = connection.execute(sql.SQL(" UNION ALL ").join(counts)).fetchall() if counts else []
    return {(schema, name): (count, new) for schema, name, count, new in found}


def transactions_of(connection: psycopg.Connection[t.Any], run_id: str, *, ledger_schema: str) -> set[str]:
    """Return the transactions of a run, as far as they have written into the ledger.

    The event of a file is written in its transaction and never again; its row may be.
    """
    query = sql.SQL(
        "SELECT xmin::text FROM {schema}.events WHERE run_id = %(run)s "
        "UNION SELECT xmin::text FROM {schema}.journal WHERE run_id = %(run)s"
    ).format(schema=sql.Identifier(ledger_schema))
    return {xmin for (xmin,) in connection.execute(query, {"run": run_id})}


def with_own_values(
    connection: psycopg.Connection[t.Any], columns: t.Mapping[str, t.Collection[str]], *, ledger_schema: str
) -> set[Key]:
    """Return the tables that have values in other columns than these, by C(schema.table)."""
    found = set()
    for (schema, name), relation in _tables(connection, ledger_schema).items():
        known = columns.get(".".join(relation.root))
        if known is not None and _has_own_values(connection, schema, name, _own(relation, known)):
            found.add(relation.root)
    return found


def lost_rows(
    present: psycopg.Connection[t.Any],
    other: psycopg.Connection[t.Any],
    *,
    ledger_schema: str,
    same: t.Collection[Key] = (),
    others: Others | None = None,
    folder: Path | None = None,
) -> list[Lost]:
    """Return what the present database has and the other one has not; write it into a folder if one is given.

    Args:
        present: a session in autocommit in the present database, of a role that sees all rows and may make
            temporary tables.
        other: a session in the other one, likewise.
        ledger_schema: schema of the ledger, whose rows are no loss.
        same: relations of which it is known that they have the same rows.
        others: look only for rows that others than a run have written in its window, in what both databases have.
        folder: for a CSV file a table, with a header, for its owner only; it is made for the first one.
    """
    for session in (present, other):
        session.execute(_SETTINGS)
    there = _tables(other, ledger_schema)
    whole = {(table.schema, table.name): table for table in describe(present, exclude=[ledger_schema])}
    result = []
    for (schema, name), relation in _tables(present, ledger_schema).items():
        known = (schema, name) in there
        if (schema, name) in same or (others and not (known and _has_rows_of(present, schema, name, relation, others))):
            continue
        columns = there[schema, name].columns if known else {}
        shared = [one for one in relation.columns if one in columns and not _is_declared(relation, others, one)]
        own = {} if others or not known else _own(relation, columns)
        table = whole.get(relation.root)
        typed = all(relation.columns[one].kind == columns[one].kind for one in shared)
        by_hash = _only(table, shared) if table and known and typed and not others else None
        if (
            by_hash
            and not _has_own_values(present, schema, name, own)
            and _alike((present, other), by_hash, schema, name)
        ):
            continue
        _note(present, other if known else None, schema, name, shared)
        missing = _missing(schema, name, shared, own, others)
        row = present.execute(sql.SQL("SELECT count(*) FROM ({}) r").format(missing)).fetchone()
        assert row is not None
        if row[0]:
            file = _write(present, missing, folder, _file_name(schema, name)) if folder else ""
            result.append(Lost(f"{schema}.{name}", row[0], relation.keyed, file))
    return result


def told(lost: t.Sequence[Lost]) -> str:
    """Return a line for each table."""
    return "\n".join(
        f"  {one.table}: {one.rows:,} rows are new or changed since"
        + ("" if one.keyed else " (no primary key: rows compared as wholes)")
        + (f", kept in {one.file}" if one.file else "")
        for one in lost
    )


def _tables(connection: psycopg.Connection[t.Any], ledger_schema: str) -> dict[Key, _Relation]:
    found = connection.execute(_TABLES, [ledger_schema])
    return {
        (schema, name): _Relation((root[0], root[1]), keyed, {one: _Column(*about) for one, about in columns.items()})
        for schema, name, root, keyed, columns in found
    }


def _own(relation: _Relation, columns: t.Collection[str]) -> dict[str, _Column]:
    """Return the columns that are not among these; what is generated of others is no value of its own."""
    return {name: one for name, one in relation.columns.items() if name not in columns and not one.generated}


def _has_value(own: t.Mapping[str, _Column]) -> sql.Composable:
    """Return the condition that a row has a value in one of its own columns: neither NULL nor a constant default."""
    values = []
    for name, column in own.items():
        value = sql.Identifier("t", name)
        text = sql.SQL("num_nonnulls({}) > 0").format(value)
        if column.default and _CONSTANT.fullmatch(column.default):
            text += sql.SQL(" AND {}::text IS DISTINCT FROM {}::text").format(value, sql.SQL(column.default))
        values.append(text)
    return sql.SQL(" OR ").join(values) if values else sql.SQL("false")


def _has_own_values(
    connection: psycopg.Connection[t.Any], schema: str, name: str, own: t.Mapping[str, _Column]
) -> bool:
    return bool(own) and _has_row(connection, schema, name, _has_value(own))


def _is_theirs(others: Others) -> sql.Composable:
    """Return the condition that others have written a row since."""
    return sql.SQL("age(t.xmin) <= age({}::xid8::xid) AND t.xmin::text <> ALL ({}::text[])").format(
        sql.Literal(others.since), sql.Literal(list(others.own))
    )


def _has_rows_of(
    connection: psycopg.Connection[t.Any], schema: str, name: str, relation: _Relation, others: Others
) -> bool:
    return not _is_declared(relation, others) and _has_row(connection, schema, name, _is_theirs(others))


def _has_row(connection: psycopg.Connection[t.Any], schema: str, name: str, condition: sql.Composable) -> bool:
    """Tell whether a row of a relation, called C(t), is so."""
    query = sql.SQL("SELECT EXISTS (SELECT FROM ONLY {} t WHERE {})").format(sql.Identifier(schema, name), condition)
    row = connection.execute(query).fetchone()
    return bool(row and row[0])


def _is_declared(relation: _Relation, others: Others | None, column: str = "") -> bool:
    """Tell whether a file of the run says that it changes a table, or a column of it."""
    return others is not None and declared(".".join(filter(None, [*relation.root, column])), others.changes)


def _only(table: Table, columns: t.Collection[str]) -> Table:
    """Return a table with only these columns, and its key if that is among them."""
    families = {name: family for name, family in table.columns.items() if name in columns}
    return replace(table, columns=families, key=table.key if set(table.key) <= set(columns) else ())


def _alike(sessions: t.Sequence[psycopg.Connection[t.Any]], table: Table, schema: str, name: str) -> bool:
    """Tell whether a relation of the same name has the same rows in each session; they read at the same time."""
    with ThreadPoolExecutor(len(sessions)) as pool:
        one, other = pool.map(lambda session: content(session, table, schema, name), sessions)
    return bool(one == other)


def _row(columns: t.Sequence[str]) -> sql.Composable:
    """Return a row's content as one text; a table may be without columns."""
    names = sql.SQL(", ").join(sql.Identifier("t", column) for column in columns)
    return sql.SQL("ROW({})::text").format(names)


def _hash(columns: t.Sequence[str]) -> sql.Composable:
    return sql.SQL("sha256(convert_to({}, 'UTF8'))").format(_row(columns))


def _note(
    present: psycopg.Connection[t.Any],
    other: psycopg.Connection[t.Any] | None,
    schema: str,
    name: str,
    columns: t.Sequence[str],
) -> None:
    """Bring the hashes of the other database's rows into a temporary table of the present one."""
    present.execute("DROP TABLE IF EXISTS pg_temp._runbook_there")
    present.execute("CREATE TEMPORARY TABLE _runbook_there (h bytea, n bigint)")
    if other is None:
        return
    query = sql.SQL(
        "SELECT h, row_number() OVER (PARTITION BY h) FROM (SELECT {hash} AS h FROM ONLY {table} t) r"
    ).format(hash=_hash(columns), table=sql.Identifier(schema, name))
    with (
        other.cursor().copy(sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(query)) as source,
        present.cursor().copy("COPY pg_temp._runbook_there FROM STDIN (FORMAT binary)") as target,
    ):
        for block in source:
            target.write(block)
    present.execute("ANALYZE pg_temp._runbook_there")


def _missing(
    schema: str, name: str, columns: t.Sequence[str], own: t.Mapping[str, _Column], others: Others | None
) -> sql.Composed:
    """Return the query for the rows that the other database has not, with all their columns.

    A join, because NOT EXISTS beside OR would be looked up for one row after the other.
    """
    return sql.SQL(
        "SELECT (p.t).* FROM (SELECT t, h, more, theirs, row_number() OVER (PARTITION BY h ORDER BY theirs) AS n "
        "FROM (SELECT t, {hash} AS h, {more} AS more, {theirs} AS theirs FROM ONLY {table} t) r) p "
        "LEFT JOIN pg_temp._runbook_there w ON w.h = p.h AND w.n = p.n WHERE theirs AND (more OR w.h IS NULL)"
    ).format(
        hash=_hash(columns),
        more=_has_value(own),
        theirs=_is_theirs(others) if others else sql.SQL("true"),
        table=sql.Identifier(schema, name),
    )


def _write(connection: psycopg.Connection[t.Any], query: sql.Composed, folder: Path, name: str) -> str:
    """Write rows into a new file, and all of it to the disk; return its path."""
    make_folder(folder)
    path, descriptor = _new_file(folder, name)
    try:
        with (
            os.fdopen(descriptor, "wb") as file,
            connection.cursor().copy(sql.SQL("COPY ({}) TO STDOUT (FORMAT csv, HEADER)").format(query)) as rows,
        ):
            for block in rows:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        sync(folder)
    except BaseException:
        path.unlink(missing_ok=True)  # a part of the rows is none
        raise
    return str(path)


def _new_file(folder: Path, name: str) -> tuple[Path, int]:
    """Make a file for its owner only, under a name that has a number if it is taken: what was kept before stays."""
    for number in itertools.count(1):
        path = folder / f"{name}{f'.{number}' if number > 1 else ''}.csv"
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    raise AssertionError  # there are always more numbers


def _file_name(schema: str, name: str) -> str:
    """Return a file's name, but for its end, for a table's name, which may have any sign; a dot stands between both."""
    text = ".".join(part.replace("%", "%25").replace("/", "%2F").replace(".", "%2E") for part in (schema, name))
    return text.encode()[:235].decode(errors="ignore")
