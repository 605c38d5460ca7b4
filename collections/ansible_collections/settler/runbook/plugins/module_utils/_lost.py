# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The rows that a rollback would lose: those of the present database that the other one has not, new and changed ones.

The two databases stand beside each other then. Rows are compared as wholes, by the columns that both tables have with
the same type; so a table needs no key, and of rows that are alike as many are lost as there are more of.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import Table, content, describe
from ansible_collections.settler.runbook.plugins.module_utils._manifest import sync
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
#: key, and their columns with types.
_TABLES = """
SELECT n.nspname, c.relname, (SELECT ARRAY[rn.nspname, r.relname]::text[] FROM pg_catalog.pg_class r
                              JOIN pg_catalog.pg_namespace rn ON rn.oid = r.relnamespace
                              WHERE r.oid = coalesce(pg_partition_root(c.oid), c.oid)),
    EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary),
    coalesce((SELECT jsonb_object_agg(a.attname, format_type(a.atttypid, NULL)) FROM pg_catalog.pg_attribute a
              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '{}')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND n.nspname <> %s
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = c.oid AND e.classid = 'pg_class'::regclass
                  AND e.deptype = 'e')
ORDER BY 1, 2
"""


class _Relation(t.NamedTuple):
    """A relation with rows: the table that it belongs to, whether it has a primary key, its columns with types."""

    root: Key
    keyed: bool
    columns: t.Mapping[str, str]


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


def lost_rows(
    present: psycopg.Connection[t.Any],
    other: psycopg.Connection[t.Any],
    *,
    ledger_schema: str,
    same: t.Collection[Key] = (),
    folder: Path | None = None,
) -> list[Lost]:
    """Return what the present database has and the other one has not; write it into a folder if one is given.

    Args:
        present: a session in autocommit in the present database, of a role that sees all rows and may make
            temporary tables.
        other: a session in the other one, likewise.
        ledger_schema: schema of the ledger, whose rows are no loss.
        same: relations of which it is known that they have the same rows.
        folder: for a CSV file a table, with a header, for its owner only; it exists.
    """
    for session in (present, other):
        session.execute(_SETTINGS)
    there = _tables(other, ledger_schema)
    whole = {(table.schema, table.name): table for table in describe(present, exclude=[ledger_schema])}
    result = []
    for (schema, name), relation in _tables(present, ledger_schema).items():
        if (schema, name) in same:
            continue
        keyed, known = relation.keyed, (schema, name) in there
        others = there[schema, name].columns if known else {}
        shared = [column for column, kind in relation.columns.items() if others.get(column) == kind]
        table = whole.get(relation.root)
        if known and table and _alike((present, other), _only(table, shared), schema, name):
            continue
        _note(present, other if known else None, schema, name, shared)
        missing = _missing(schema, name, shared)
        row = present.execute(sql.SQL("SELECT count(*) FROM ({}) r").format(missing)).fetchone()
        assert row is not None
        if row[0]:
            file = _write(present, missing, folder, _file_name(schema, name)) if folder else ""
            result.append(Lost(f"{schema}.{name}", row[0], keyed, file))
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
    return {(schema, name): _Relation((root[0], root[1]), *about) for schema, name, root, *about in found}


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


def _missing(schema: str, name: str, columns: t.Sequence[str]) -> sql.Composed:
    """Return the query for the rows that the other database has not, with all their columns."""
    return sql.SQL(
        "SELECT (p.t).* FROM (SELECT t, h, row_number() OVER (PARTITION BY h) AS n "
        "FROM (SELECT t, {hash} AS h FROM ONLY {table} t) r) p "
        "WHERE NOT EXISTS (SELECT FROM pg_temp._runbook_there w WHERE w.h = p.h AND w.n = p.n)"
    ).format(hash=_hash(columns), table=sql.Identifier(schema, name))


def _write(connection: psycopg.Connection[t.Any], query: sql.Composed, folder: Path, name: str) -> str:
    """Write rows into a new file, and all of it to the disk; return its path."""
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
