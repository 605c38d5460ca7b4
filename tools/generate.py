"""Fill a database with rows that hurt, in any shape of the schema that ever was, always the same for the same seed.

    ./runbook generate --shape oldest --rows 40000 --tenants 5 --skew 1 --seed 7 -h HOST -p PORT -U USER -d DATABASE

The rows of a tenant refer to each other and to nobody else's; every rule of the shape holds. A password comes from
PGPASSWORD or a password file, and what is not said from libpq's other variables.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

import psycopg
from psycopg import conninfo, sql

from tools import console
from tools.legacy import CURRENT, SHAPES, create
from tools.project import ToolError
from tools.rows import TABLES, Table, World
from tools.values import NULL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.rows import TupleRow

    Connection = psycopg.Connection[TupleRow]

_PIECE = 2000


def stream(
    shape: str, rows: int, tenants: int = 5, seed: int = 1, skew: float = 1.0
) -> Iterator[tuple[str, list[str], Iterator[bytes]]]:
    """Yield each table of a shape, parents first: its name, its columns, and its rows as pieces of COPY text.

    The pieces of a table must be taken before the next table: its rows refer to them.
    """
    if tenants < 1 or rows < 0 or not 0 <= skew <= 10:
        raise ToolError("there must be one tenant at least, no fewer than 0 rows, and a skew from 0 to 10")
    tables = _tables(shape)
    world = World(Random(seed), legacy=shape != CURRENT, skew=skew)  # noqa: S311 - repeatable on purpose
    world.settle([NULL])  # until there is a table of tenants
    for name, count in _counts(tables, rows, tenants).items():
        columns = tables[name].columns.split()
        made = tables[name].rows(world, count)
        if shape == SHAPES[0] and "tenant_id" in columns:
            position = columns.index("tenant_id")
            made = (row[:position] + row[position + 1 :] for row in made)
            columns.remove("tenant_id")
        yield name, columns, _pieces("\t".join(row) for row in made)


def _tables(shape: str) -> dict[str, Table]:
    """Return the tables that a shape has."""
    there = SHAPES if shape == CURRENT else SHAPES[: SHAPES.index(shape) + 1]
    return {name: table for name, table in TABLES.items() if table.since in there}


def _counts(tables: dict[str, Table], rows: int, tenants: int) -> dict[str, int]:
    """Share the rows out among the tables: at least two each, about that many in all."""
    shares = sum(table.share for table in tables.values())
    return {name: max(2, rows * table.share // shares) if table.share else tenants for name, table in tables.items()}


def _pieces(lines: Iterator[str]) -> Iterator[bytes]:
    """Put lines together, to send many at once."""
    while piece := list(islice(lines, _PIECE)):
        yield ("\n".join(piece) + "\n").encode()


def fill(
    connection: Connection, *, shape: str, rows: int, tenants: int = 5, seed: int = 1, skew: float = 1.0
) -> dict[str, int]:
    """Load about that many rows into the empty tables of a shape, in one transaction; return how many each got.

    Triggers rest meanwhile: the rows are as old as the tables, and some lack a tenant that a trigger would fill in.
    Foreign keys go while the rows come and are made again behind them, which checks every row. The share of the kth
    tenant is one in k to the power of ``skew``.
    """
    tables = list(_tables(shape))
    counts = {}
    with connection.transaction():
        _refuse_rows(connection, tables)
        connection.execute("SET LOCAL maintenance_work_mem = '256MB'")
        _set_triggers(connection, tables, "DISABLE")
        make_again = _put_aside(connection, tables)
        for name, columns, pieces in stream(shape, rows, tenants, seed, skew):
            counts[name] = _copy(connection, name, columns, pieces)
        for statement in make_again:
            connection.execute(statement)
        _set_triggers(connection, tables, "ENABLE")
        _finish(connection, tables)
    return counts


def _refuse_rows(connection: Connection, tables: list[str]) -> None:
    """Stop before a table that is missing, or that has rows: they might be somebody's."""
    for name in tables:
        if connection.execute("SELECT to_regclass(%s) IS NULL", (name,)).fetchone() == (True,):
            raise ToolError(f"there is no table {name}; nothing was changed. Apply sql/migrations first.")
        if connection.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(sql.Identifier(name))).fetchone() is not None:
            raise ToolError(f"table {name} has rows; nothing was changed. Name a database whose tables are empty.")


def _copy(connection: Connection, name: str, columns: list[str], pieces: Iterator[bytes]) -> int:
    """Load the rows of a table, and return how many it were."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    statement = sql.SQL("COPY {} ({}) FROM STDIN (ENCODING 'UTF8')").format(sql.Identifier(name), names)
    with connection.cursor() as cursor:
        with cursor.copy(statement) as copy:
            for piece in pieces:
                copy.write(piece)
        return cursor.rowcount


def _set_triggers(connection: Connection, tables: list[str], state: str) -> None:
    """Switch the tables' own triggers off or on; foreign keys are always checked."""
    for name in tables:
        connection.execute(sql.SQL("ALTER TABLE {} {} TRIGGER USER").format(sql.Identifier(name), sql.SQL(state)))


def _put_aside(connection: Connection, tables: list[str]) -> list[bytes]:
    """Drop foreign keys and plain indexes, and return what makes them again: pg_restore is fast for the same reason."""
    found = connection.execute(
        """
        SELECT 'ALTER TABLE ' || conrelid::regclass || ' DROP CONSTRAINT ' || quote_ident(conname),
            'ALTER TABLE ' || conrelid::regclass || ' ADD CONSTRAINT ' || quote_ident(conname) || ' '
              || pg_get_constraintdef(oid)
          FROM pg_constraint WHERE contype = 'f' AND conrelid = ANY (%(tables)s::text[]::regclass[])
        UNION ALL
        SELECT 'DROP INDEX ' || indexrelid::regclass, pg_get_indexdef(indexrelid)
          FROM pg_index WHERE NOT indisunique AND indrelid = ANY (%(tables)s::text[]::regclass[])
        ORDER BY 1
        """,
        {"tables": tables},
    ).fetchall()
    for drop, _ in found:
        connection.execute(drop.encode())
    return [make.encode() for _, make in found]


def _finish(connection: Connection, tables: list[str]) -> None:
    """Leave sequences and materialized views as in a database in use."""
    for name in {"event_store", "snapshots"} & set(tables):
        connection.execute(
            sql.SQL("SELECT setval(pg_get_serial_sequence({0}, 'id'), max(id)) FROM {1}").format(
                name, sql.Identifier(name)
            )
        )
    views = connection.execute("SELECT schemaname, matviewname FROM pg_matviews WHERE ispopulated").fetchall()
    for schema, view in views:
        connection.execute(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(sql.Identifier(schema, view)))


def main() -> int:
    """Fill a database, as the command line says."""
    arguments = _parser().parse_args()
    watch = console.Stopwatch()
    try:
        with psycopg.connect(_address(arguments)) as connection:
            if arguments.shape != CURRENT and _is_empty(connection):
                create(connection, arguments.shape)
            counts = fill(
                connection,
                shape=arguments.shape,
                rows=arguments.rows,
                tenants=arguments.tenants,
                seed=arguments.seed,
                skew=arguments.skew,
            )
    except (ToolError, psycopg.Error) as error:
        console.error(str(error).strip())
        return 1
    total, seconds = sum(counts.values()), watch.seconds
    console.good(f"{total:,} rows in {len(counts)} tables ({total / seconds:,.0f} rows/s)", seconds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./runbook generate", description=__doc__.partition("\n")[0], add_help=False,
        epilog="The password comes from PGPASSWORD or a password file; libpq's other variables count, too.",
    )  # fmt: skip
    parser.add_argument("--help", action="help", help="show this and exit")
    parser.add_argument(
        "--shape",
        required=True,
        choices=[*SHAPES, CURRENT],
        help=f"an old one is made if the database is empty; {CURRENT}: apply sql/migrations first",
    )
    parser.add_argument("--rows", type=int, default=40_000, help="about that many in all (%(default)s)")
    parser.add_argument("--tenants", type=int, default=5, help="(%(default)s)")
    parser.add_argument(
        "--skew",
        type=float,
        default=1.0,
        help="the share of the kth tenant is 1/k^SKEW: 0 is the same for all (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same rows (%(default)s)")
    server = parser.add_argument_group("server")
    server.add_argument("-h", "--host")
    server.add_argument("-p", "--port")
    server.add_argument("-U", "--username", dest="user")
    server.add_argument("-d", "--dbname", help="a name, or a connection string without a password")
    return parser  # fmt: skip


def _address(arguments: argparse.Namespace) -> str:
    """Return the connection string that the options make."""
    dbname = arguments.dbname or ""
    said = conninfo.conninfo_to_dict(dbname) if "=" in dbname or "://" in dbname else {"dbname": dbname or None}
    if "password" in said:
        raise ToolError("a password on a command line is read by everybody; give it by PGPASSWORD or a password file")
    options = {name: getattr(arguments, name) for name in ("host", "port", "user") if getattr(arguments, name)}
    return conninfo.make_conninfo(**(said | options))


def _is_empty(connection: Connection) -> bool:
    """Tell whether the database has none of our tables."""
    return connection.execute("SELECT to_regclass('users') IS NULL").fetchone() == (True,)


if __name__ == "__main__":
    sys.exit(main())
