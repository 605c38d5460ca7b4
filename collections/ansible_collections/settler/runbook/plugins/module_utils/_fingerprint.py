# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fingerprints of data: exact row counts, and a content hash of each column that does not depend on the order of rows.

The hash of a value is seeded with that of its row's key and summed over all rows. So a value that moved to another row
shows, each column can be compared by itself (a migration adds and drops some), and parts of a table can be read by
several sessions and added up. PostgreSQL's own extended hash functions are used where equal hashes mean equal texts;
they are the same on 14 to 18. A change that is no accident could be made to pass: this is no signature.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import json
import typing as t
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._manifest import KEYS, read_manifest
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import sql
from ansible_collections.settler.runbook.plugins.module_utils._verify import Check

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

#: What makes the text of a value depend on the session.
_SETTINGS: t.LiteralString = (
    "SELECT set_config(name, value, true) FROM (VALUES ('timezone', 'UTC'), ('datestyle', 'ISO, YMD'), "
    "('intervalstyle', 'postgres'), ('extra_float_digits', '1'), ('bytea_output', 'hex'), ('lc_monetary', 'C'), "
    "('max_parallel_workers_per_gather', '0'), ('quote_all_identifiers', 'off')) AS s (name, value)"
)

#: Tables, each with its columns and the columns of a key; partitions belong to their root. A partitioned table may have
#: no unique index of its own: then the primary key that all its partitions have tells rows apart well enough.
_TABLES = """
SELECT n.nspname, c.relname, c.relkind = 'p', array_agg(a.attname::text ORDER BY a.attnum),
    array_agg(CASE WHEN y.typnamespace <> 'pg_catalog'::regnamespace THEN 'text'
              WHEN y.typname IN ('int2', 'int4', 'int8') THEN 'int'
              WHEN y.typname IN ('text', 'varchar') THEN 'string'
              WHEN y.typname IN ('uuid', 'timestamp', 'timestamptz', 'bool', 'bpchar') THEN y.typname
              ELSE 'text' END ORDER BY a.attnum),
    coalesce((SELECT array_agg(k.attname::text ORDER BY position)
              FROM (SELECT i.indrelid, i.indkey FROM pg_catalog.pg_index i
                    WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate
                      AND i.indpred IS NULL AND i.indexprs IS NULL AND NOT EXISTS (
                          SELECT FROM pg_catalog.pg_attribute x WHERE x.attrelid = c.oid
                            AND x.attnum = ANY (i.indkey) AND NOT x.attnotnull)
                    ORDER BY i.indisprimary DESC, i.indexrelid LIMIT 1) i,
                   unnest(i.indkey) WITH ORDINALITY AS u (number, position)
              JOIN pg_catalog.pg_attribute k ON k.attrelid = c.oid AND k.attnum = u.number),
             (SELECT min(leaf.key) FROM (
                  SELECT (SELECT array_agg(k.attname::text ORDER BY position)
                          FROM pg_catalog.pg_index i, unnest(i.indkey) WITH ORDINALITY AS u (number, position)
                          JOIN pg_catalog.pg_attribute k ON k.attrelid = relid AND k.attnum = u.number
                          WHERE i.indrelid = relid AND i.indisprimary) AS key
                  FROM pg_partition_tree(c.oid) WHERE isleaf) leaf
              HAVING count(*) = count(leaf.key) AND count(DISTINCT leaf.key) = 1), '{}')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_type y ON y.oid = a.atttypid
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND n.nspname <> ALL (%s)
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = c.oid AND e.classid = 'pg_class'::regclass
                  AND e.deptype = 'e')
GROUP BY c.oid, n.nspname, c.relname, c.relkind ORDER BY 1, 2
"""

#: The relations that hold the rows of tables, with their size in blocks and in bytes, values out of line included, and
#: about how many rows they have: what ANALYZE has seen, but not less than a full table has of wide rows.
_LEAVES = """
SELECT n.nspname, c.relname, ln.nspname, l.relname, b.blocks, pg_table_size(l.oid),
    greatest(l.reltuples::bigint, b.blocks * 20)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace,
    LATERAL (SELECT c.oid AS oid WHERE c.relkind = 'r'
             UNION ALL SELECT relid::oid FROM pg_partition_tree(c.oid) WHERE isleaf) r
JOIN pg_catalog.pg_class l ON l.oid = r.oid JOIN pg_catalog.pg_namespace ln ON ln.oid = l.relnamespace,
    LATERAL (SELECT pg_relation_size(l.oid) / current_setting('block_size')::int AS blocks) b
WHERE (n.nspname, c.relname) IN (SELECT * FROM unnest(%s::text[], %s::text[])) AND l.relkind IN ('r', 'f')
"""

_LARGE_OBJECTS = """
SELECT count(*), coalesce(sum(hashtextextended(encode(sha256(lo_get(oid)), 'hex'), oid::bigint)), 0)::text
FROM pg_catalog.pg_largeobject_metadata WHERE pg_has_role(lomowner, 'USAGE')
"""

#: How a value is hashed, by its family: one hash for all widths of integers, so that widening a column keeps it.
#: PostgreSQL's hash of numeric is the same for 5 and -5 and for 1 and 1.00, in jsonb too: there the text counts.
_HASHES: dict[str, t.LiteralString] = {
    "int": "hashint8extended({column}::int8, {seed})",
    "uuid": "uuid_hash_extended({column}, {seed})",
    "timestamp": "timestamp_hash_extended({column}, {seed})",
    "timestamptz": "timestamp_hash_extended(timezone(interval '0', {column}), {seed})",
    "bpchar": 'hashbpcharextended({column} COLLATE "C", {seed})',
    "bool": "hashint8extended({column}::int::int8, {seed})",
    "string": 'hashtextextended({column} COLLATE "C", {seed})',
    "text": 'hashtextextended({column}::text COLLATE "C", {seed})',
}

#: Stands for all columns of a table without a key, and for the content of large objects.
ROW = "(row)"
#: How many times more keys than wanted are kept, if that has them compared with those of before.
_GROWTH = 20
_SEED: t.LiteralString = "_runbook_seed"
LARGE_OBJECTS = "large objects"


@dataclass(frozen=True)
class Table:
    """A table as it is to be read.

    C(columns) maps names to families of types, C(key) are columns that identify a row, if there are any.
    """

    schema: str
    name: str
    columns: t.Mapping[str, str]
    key: tuple[str, ...]
    partitioned: bool = False

    @property
    def qualified(self) -> str:
        """Its name in results, such as C(public.jobs)."""
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True)
class Limits:
    """What a fingerprint may cost.

    Of a table larger than C(sample_above) bytes only so large a part of the rows is hashed, chosen by the hash of the
    key: the same rows each time. All are counted. C(keys) is of how many rows of a table key and hash are kept, so
    that a difference can be traced. C(jobs) sessions work at a time.
    """

    sample_above: int = 4 * 2**30
    keys: int = 20_000
    jobs: int = 2
    part_blocks: int = 8192


def limits_spec() -> dict[str, t.Any]:
    """Return the options of C(settler.runbook.fingerprints)."""
    return {
        "fingerprint_sample_above": {"type": "int", "default": Limits.sample_above},
        "fingerprint_keys": {"type": "int", "default": Limits.keys},
    }


def limits_of(params: t.Mapping[str, t.Any]) -> Limits:
    """Return what a module that has these options, and C(jobs), may spend."""
    return Limits(params["fingerprint_sample_above"], params["fingerprint_keys"], max(1, params["jobs"]))


@dataclass(frozen=True)
class Fingerprint:
    """A table's fingerprint: C(columns) maps names to C(family:sum), C(sample) is n where each n-th row was hashed.

    C(keys) maps the keys of some rows, as text, to hashes of these rows; of each C(keys_sample)-th row.
    """

    rows: int
    columns: t.Mapping[str, str]
    key: tuple[str, ...] = ()
    sample: int = 1
    keys_sample: int = 1
    keys: t.Mapping[str, str] | None = None

    def as_data(self) -> dict[str, t.Any]:
        """Return it for a manifest; keys are kept elsewhere, because they are data of the table."""
        return {"rows": self.rows, "key": list(self.key), "sample": self.sample, "columns": dict(self.columns)}


class _Part(t.NamedTuple):
    """Blocks of a relation that one query reads; the last part of a relation has no end.

    Each C(sample)-th row is hashed, of each C(keys_sample)-th the key is kept, if it is not 0.
    """

    table: Table
    relation: sql.Identifier
    sample: int
    keys_sample: int
    first: int
    end: int | None


def describe(connection: psycopg.Connection[t.Any], *, exclude: t.Sequence[str] = ()) -> list[Table]:
    """Return the tables of a database.

    Args:
        connection: any role.
        exclude: schemas to leave out, such as the ledger's.
    """
    return [
        Table(schema, name, {c: f for c, f in zip(columns, families, strict=True) if c}, tuple(key), parted)
        for schema, name, parted, columns, families, key in connection.execute(_TABLES, [list(exclude)])
    ]


def as_before(now: t.Iterable[Table], before: t.Mapping[str, Fingerprint]) -> list[Table]:
    """Return tables as they have to be read to be compared: with the columns and the key that they had before."""
    result = []
    for table in now:
        then = before.get(table.qualified)
        if then is None:
            continue
        families = {name: text.partition(":")[0] for name, text in then.columns.items()}
        columns = {name: family for name, family in table.columns.items() if families.get(name) == family}
        key = then.key if all(name in columns for name in then.key) else ()
        result.append(replace(table, columns=columns, key=key))
    return result


def fingerprints(
    sessions: t.Callable[[], psycopg.Connection[t.Any]],
    snapshot: str,
    tables: t.Sequence[Table],
    limits: Limits,
    *,
    samples: t.Mapping[str, Fingerprint] | None = None,
) -> dict[str, Fingerprint]:
    """Read tables in one snapshot, in parallel.

    Args:
        sessions: opens a session in autocommit as a role that sees all rows; it is closed at the end.
        snapshot: the name of an exported snapshot whose transaction stays open meanwhile.
        tables: what to read.
        limits: what it may cost.
        samples: fingerprints to compare with, which say what part of each table to read.

    Returns:
        a fingerprint for each table, and one for large objects if there are any.
    """
    samples = samples or {}
    begin = functools.partial(_begin, sessions, snapshot)
    with begin() as connection:
        parts = _parts(connection, tables, limits, samples)
        large_objects = _large_objects(connection)
    read = _read(begin, parts, max(1, limits.jobs))
    result = {}
    for table in tables:
        name = table.qualified
        sample, keys_sample, total = read.get(name, (1, 1, _Total(0, [0] * len(_names(table)), {})))
        result[name] = Fingerprint(
            total.rows,
            {
                column: f"{table.columns.get(column, 'text')}:{hashes}"
                for column, hashes in zip(_names(table), total.sums, strict=True)
            },
            table.key,
            sample,
            max(keys_sample, 1),
            total.keys if table.key and keys_sample else None,
        )
    return result | large_objects


def read_now(
    connection: psycopg.Connection[t.Any],
    sessions: t.Callable[[], psycopg.Connection[t.Any]],
    limits: Limits,
    *,
    exclude: t.Sequence[str] = (),
) -> dict[str, Fingerprint]:
    """Return the fingerprints of a database as it is; for the arguments see M(read_again)."""
    with _exported(connection) as snapshot:
        return fingerprints(sessions, snapshot, describe(connection, exclude=exclude), limits)


def read_again(
    connection: psycopg.Connection[t.Any],
    sessions: t.Callable[[], psycopg.Connection[t.Any]],
    before: t.Mapping[str, Fingerprint],
    limits: Limits,
    *,
    exclude: t.Sequence[str] = (),
) -> tuple[dict[str, Fingerprint], list[Table]]:
    """Return the fingerprints of a database, read as those of before were, and its tables.

    Args:
        connection: a session of the database, in autocommit, whose snapshot all others take.
        sessions: opens the others, see M(fingerprints).
        before: what the result is to be compared with.
        limits: what it may cost.
        exclude: schemas to leave out.
    """
    with _exported(connection) as snapshot:
        now = describe(connection, exclude=exclude)
        return fingerprints(sessions, snapshot, as_before(now, before), limits, samples=before), now


@contextlib.contextmanager
def _exported(connection: psycopg.Connection[t.Any]) -> t.Iterator[str]:
    """Yield the name of a snapshot that others can take meanwhile; the session sees the same."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        row = connection.execute("SELECT pg_export_snapshot()").fetchone()
        assert row is not None
        yield row[0]


def _begin(sessions: t.Callable[[], psycopg.Connection[t.Any]], snapshot: str) -> psycopg.Connection[t.Any]:
    """Return a session that sees a snapshot, and writes values as every other one does."""
    connection = sessions()
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
    connection.execute(_SETTINGS)
    return connection


def _large_objects(connection: psycopg.Connection[t.Any]) -> dict[str, Fingerprint]:
    row = connection.execute(_LARGE_OBJECTS).fetchone()
    return {LARGE_OBJECTS: Fingerprint(row[0], {ROW: f"text:{row[1]}"})} if row and row[0] else {}


class _Total(t.NamedTuple):
    """What was read: how many rows, the sum of each column's hashes, hashes of rows by the text of their keys."""

    rows: int
    sums: list[int]
    keys: dict[str, str]

    def plus(self, other: _Total) -> _Total:
        """Return the total of both."""
        sums = [one + another for one, another in zip(self.sums, other.sums, strict=True)]
        return _Total(self.rows + other.rows, sums, self.keys | other.keys)


def _read(
    begin: t.Callable[[], psycopg.Connection[t.Any]], parts: t.Sequence[_Part], jobs: int
) -> dict[str, tuple[int, int, _Total]]:
    """Read all parts, several sessions at a time; return by table the samples of rows and keys, and the total."""
    queue: SimpleQueue[_Part] = SimpleQueue()
    for part in parts:
        queue.put(part)

    def read() -> list[tuple[_Part, _Total]]:
        done = []
        with begin() as connection, contextlib.suppress(Empty):
            while part := queue.get_nowait():
                row = connection.execute(_query(part)).fetchone()
                assert row is not None
                done.append((part, _Total(row[0], [int(value) for value in row[2:]], row[1] or {})))
        return done

    totals: dict[str, tuple[int, int, _Total]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(read) for _worker in range(min(jobs, len(parts)))]:
            for part, total in future.result():
                name = part.table.qualified
                whole = totals[name][2].plus(total) if name in totals else total
                totals[name] = (part.sample, part.keys_sample, whole)
    return totals


def _parts(
    connection: psycopg.Connection[t.Any],
    tables: t.Sequence[Table],
    limits: Limits,
    samples: t.Mapping[str, Fingerprint],
) -> list[_Part]:
    """Cut tables into parts, those of the largest first, so that all sessions end at about the same time."""
    by_name = {(table.schema, table.name): table for table in tables}
    names = [[schema for schema, _name in by_name], [name for _schema, name in by_name]]
    leaves = connection.execute(_LEAVES, names).fetchall()
    size: dict[tuple[str, str], int] = defaultdict(int)
    count: dict[tuple[str, str], int] = defaultdict(int)
    for schema, name, _schema, _leaf, _blocks, bytes_, rows in leaves:
        size[schema, name] += bytes_
        count[schema, name] += rows
    parts = []
    for schema, name, leaf_schema, leaf, blocks, *_size in sorted(leaves, key=lambda row: -size[row[0], row[1]]):
        table = by_name[schema, name]
        then = samples.get(table.qualified)
        sample = then.sample if then else max(1, -(-size[schema, name] // limits.sample_above))
        keys_sample = _keys_sample(count[schema, name], limits, then)
        chosen = (sample, keys_sample) if table.key else (1, 0)
        edges = [*range(0, max(blocks, 1), limits.part_blocks), None]
        for first, end in itertools.pairwise(edges):
            parts.append(_Part(table, sql.Identifier(leaf_schema, leaf), *chosen, first or 0, end))
    return parts


def _keys_sample(count: int, limits: Limits, then: Fingerprint | None) -> int:
    """Return which part of the keys is kept: that of before, unless the table has grown to many times what it was."""
    if not limits.keys or (then and then.keys is None):
        return 0
    wanted = max(1, count // limits.keys)
    return then.keys_sample if then and wanted <= then.keys_sample * _GROWTH else wanted


def _names(table: Table) -> list[str]:
    """Name the sums of a table: its columns, and the row as a whole where no key ties its values together."""
    return [*table.columns, *([] if table.key else [ROW])]


def _hash(table: Table, column: str, seed: sql.Composable) -> sql.Composable:
    return sql.SQL(_HASHES[table.columns[column]]).format(column=sql.Identifier(column), seed=seed)


def _seed(table: Table) -> sql.Composable:
    """Return the hash of a row's key."""
    seed: sql.Composable = sql.SQL("0::bigint")
    for column in table.key:
        seed = _hash(table, column, seed)
    return seed


def _row(table: Table) -> sql.Composable:
    columns = sql.SQL(", ").join(map(sql.Identifier, table.columns))
    return sql.SQL('ROW({})::text COLLATE "C"').format(columns)


def _query(part: _Part) -> sql.Composed:
    """Return the query for one part: the number of rows, keys with hashes, the sum of each column's hashes."""
    table, seed = part.table, sql.SQL(_SEED)
    chosen = _each(part.sample) if part.sample > 1 else sql.SQL("")
    hashes = [_hash(table, column, seed) for column in table.columns]
    hashes += [] if table.key else [sql.SQL("hashtextextended({}, 0)").format(_row(table))]
    blocks = [sql.SQL("ctid >= {}::tid").format(sql.Literal(f"({part.first},0)"))] if part.first else []
    blocks += [sql.SQL("ctid < {}::tid").format(sql.Literal(f"({part.end},0)"))] if part.end else []
    # OFFSET 0 has the seed computed once a row and not once a column
    return sql.SQL("SELECT count(*), {}{} FROM (SELECT *, {} AS _runbook_seed FROM ONLY {}{} OFFSET 0) r").format(
        _keys(table, part.keys_sample),
        sql.SQL("").join(sql.SQL(", coalesce(sum({}){}, 0)::text").format(one, chosen) for one in hashes),
        _seed(table),
        part.relation,
        sql.SQL(" WHERE {}").format(sql.SQL(" AND ").join(blocks)) if blocks else sql.SQL(""),
    )


def _each(every: int) -> sql.Composable:
    """Return the filter of an aggregate for some rows, always the same ones."""
    return sql.SQL(" FILTER (WHERE _runbook_seed % {} = 0)").format(sql.Literal(every))


def _keys(table: Table, every: int) -> sql.Composable:
    """Return the aggregate of keys and hashes of some rows, or NULL for none."""
    if not every:
        return sql.SQL("NULL")
    key = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(column)) for column in table.key)
    row = sql.SQL("hashtextextended({}, {})::text").format(_row(table), sql.SQL(_SEED))
    return sql.SQL("json_object_agg(concat_ws(', ', {}), {}){}").format(key, row, _each(every))


def keys_file(found: t.Mapping[str, Fingerprint]) -> bytes:
    """Return the keys of all fingerprints as a file's content: gzip of JSON, the same for the same keys."""
    content = {
        name: {"sample": one.keys_sample, "keys": dict(sorted(one.keys.items()))}
        for name, one in sorted(found.items())
        if one.keys is not None
    }
    return gzip.compress(json.dumps(content, ensure_ascii=False).encode(), compresslevel=1, mtime=0)


def from_data(manifest: t.Mapping[str, t.Any], keys: bytes | None = None) -> dict[str, Fingerprint]:
    """Return fingerprints of what M(Fingerprint.as_data) has told of each, and of the content of their file of keys."""
    kept = json.loads(gzip.decompress(keys)) if keys else {}
    return {
        name: Fingerprint(
            one["rows"],
            one["columns"],
            tuple(one["key"]),
            one["sample"],
            kept.get(name, {}).get("sample", 1),
            kept.get(name, {}).get("keys"),
        )
        for name, one in manifest.items()
    }


def write_fingerprints(folder: Path, found: t.Mapping[str, Fingerprint]) -> dict[str, t.Any]:
    """Write the file of keys into the folder of a backup; return what its manifest says of the data."""
    path = folder / KEYS
    path.touch(mode=0o600)
    path.write_bytes(keys_file(found))
    return {"fingerprints": {name: one.as_data() for name, one in found.items()}}


def read_fingerprints(folder: Path) -> dict[str, Fingerprint]:
    """Return what the data was when the backup was made, keys of rows included.

    Raises:
        RunbookError: there is no whole backup.
    """
    manifest, keys = read_manifest(folder), folder / KEYS
    if "fingerprints" not in manifest:
        raise RunbookError(f"{folder}: without fingerprints of the data (of an older version, or they were not wanted)")
    return from_data(manifest["fingerprints"], keys.read_bytes() if keys.exists() else None)


def compare(
    before: t.Mapping[str, Fingerprint],
    after: t.Mapping[str, Fingerprint],
    now: t.Iterable[Table],
    changes: t.Collection[str] = (),
) -> list[Check]:
    """Compare data before and after.

    Args:
        before: what it was.
        after: what it is, read M(as_before).
        now: the tables as they are.
        changes: what was to change: C(schema.table) for rows and all columns, C(schema.table.column) for values; the
            schema public may be left out.

    Returns:
        a check for each table and for each column that is there before and after.
    """
    there = {table.qualified: table for table in now}
    rows: list[Check] = []
    for name, then in sorted(before.items()):
        if declared(name, changes):
            rows.append(Check("data", name, expected="declared to change", actual="not compared"))
            continue
        have = after.get(name)
        if have is None:
            rows.append(Check("data", name, "failed", _rows(then.rows), "the table is gone", _hint(name)))
            continue
        traced = _traced(then, have)
        if then.rows != have.rows:
            rows.append(Check("data", name, "failed", _rows(then.rows), _rows(have.rows), traced + _hint(name)))
        else:
            rows.append(Check("data", name, expected=_rows(then.rows), actual=_rows(have.rows)))
        if then.rows == have.rows and then.key != have.key:
            key = ", ".join(then.key)
            rows.append(Check("data", f"{name} by {key}", "failed", "a key", "none: no value compared", _hint(name)))
        for column, text in then.columns.items():
            label = f"{name}.{column}"
            if declared(label, changes) or (column == ROW and then.columns.keys() != have.columns.keys()):
                continue
            family = there[name].columns.get(column) if name in there else None
            if family and family != text.partition(":")[0]:
                was = text.partition(":")[0]
                rows.append(Check("data column", label, "failed", f"a type of the family {was}", family, _hint(label)))
            elif column in have.columns and then.key == have.key and then.rows == have.rows:
                same = have.columns[column] == text
                what = ("the values of before", "other values")
                rows.append(
                    Check("data column", label, expected=what[0], actual=what[0])
                    if same
                    else Check("data column", label, "failed", *what, traced + _hint(label))
                )
    return rows


def unchanged(
    before: t.Mapping[str, Fingerprint], after: t.Mapping[str, Fingerprint], now: t.Iterable[Table]
) -> set[tuple[str, str]]:
    """Return schema and name of the tables that were read whole and have the same rows."""
    found = set()
    for table in now:
        name = table.qualified
        then, have = before.get(name), after.get(name)
        if then and have and then.key == have.key and then.sample == have.sample == 1:
            checks = compare({name: then}, {name: have}, [table])
            if all(check.status == "ok" for check in checks):
                found.add((table.schema, table.name))
    return found


def content(connection: psycopg.Connection[t.Any], table: Table, schema: str, name: str) -> t.Any:
    """Return what stands for all rows of a relation, read as those of C(table): equal only where they are the same."""
    part = _Part(table, sql.Identifier(schema, name), 1, 0, 0, None)
    return connection.execute(_query(part)).fetchone()


def declared(name: str, changes: t.Collection[str]) -> bool:
    """Tell whether a table or column is among those that are declared to change; public may be left out."""
    return name in changes or name.removeprefix("public.") in changes


def _rows(number: int) -> str:
    return f"{number:,} rows"


def _hint(name: str) -> str:
    return f"If that was meant, the migration says so: -- runbook: changes={name.removeprefix('public.')}"


def _traced(then: Fingerprint, have: Fingerprint, limit: int = 5) -> str:
    """Name some rows that are not what they were."""
    if then.keys is None or have.keys is None or (then.key, then.keys_sample) != (have.key, have.keys_sample):
        return ""
    same_columns = set(then.columns) == set(have.columns)
    told = []
    for what, found in (
        ("gone", [key for key in then.keys if key not in have.keys]),
        ("new", [key for key in have.keys if key not in then.keys]),
        ("changed", [k for k, hash_ in then.keys.items() if same_columns and have.keys.get(k, hash_) != hash_]),
    ):
        if found:
            told.append(f"{what}: {'; '.join(sorted(found)[:limit])}{' …' if len(found) > limit else ''}")
    if not told:
        return ""
    one_in = f", of one row in {then.keys_sample}" if then.keys_sample > 1 else ""
    return f"By {', '.join(then.key)}{one_in}: {', '.join(told)}. "
