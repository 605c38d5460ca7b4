# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Adopting: a database whose schema is there already, by hand or by another tool, gets a ledger that says so."""

from __future__ import annotations

import contextlib
import typing as t
import zlib
from dataclasses import dataclass, replace

from ansible_collections.settler.runbook.plugins.module_utils._catalog import snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, set_role
from ansible_collections.settler.runbook.plugins.module_utils._database import properties
from ansible_collections.settler.runbook.plugins.module_utils._effects import quoted
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._files import REPEATABLE, VERSIONED
from ansible_collections.settler.runbook.plugins.module_utils._hazards import ALL
from ansible_collections.settler.runbook.plugins.module_utils._migrate import migrate
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._run import Options, Outcome, one_of, rows_of
from ansible_collections.settler.runbook.plugins.module_utils._swap import SCRATCH, drop, mark, set_mark
from ansible_collections.settler.runbook.plugins.module_utils._verify import compare

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile
    from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Parser

FLYWAY, DBMATE, BASELINE = "flyway", "dbmate", "baseline"
SOURCES = (BASELINE, FLYWAY, DBMATE)


class _Tool(t.NamedTuple):
    """A tool's ledger: its table, columns that tell it from another's, and SQL for the newest entry."""

    name: str
    table: str
    columns: frozenset[str]
    newest: t.LiteralString


_TOOLS = (
    _Tool(
        "Flyway",
        "flyway_schema_history",
        frozenset({"installed_rank", "script", "checksum"}),
        "SELECT script FROM {} ORDER BY installed_rank DESC LIMIT 1",
    ),
    _Tool(
        "Liquibase",
        "databasechangelog",
        frozenset({"id", "author", "orderexecuted"}),
        "SELECT id FROM {} ORDER BY orderexecuted DESC LIMIT 1",
    ),
    _Tool(
        "Sqitch",
        "changes",
        frozenset({"change_id", "change", "project"}),
        "SELECT change FROM {} ORDER BY committed_at DESC LIMIT 1",
    ),
    _Tool(
        "golang-migrate",
        "schema_migrations",
        frozenset({"version", "dirty"}),
        "SELECT version || CASE WHEN dirty THEN ', which failed there' ELSE '' END FROM {} LIMIT 1",
    ),
    _Tool("dbmate or Rails", "schema_migrations", frozenset({"version"}), "SELECT max(version::text) FROM {}"),
    _Tool("Alembic", "alembic_version", frozenset({"version_num"}), "SELECT version_num FROM {} LIMIT 1"),
    _Tool(
        "Prisma",
        "_prisma_migrations",
        frozenset({"migration_name", "finished_at"}),
        "SELECT migration_name FROM {} ORDER BY started_at DESC LIMIT 1",
    ),
    _Tool(
        "node-pg-migrate",
        "pgmigrations",
        frozenset({"name", "run_on"}),
        "SELECT name FROM {} ORDER BY run_on DESC, id DESC LIMIT 1",
    ),
    _Tool(
        "Knex",
        "knex_migrations",
        frozenset({"name", "batch", "migration_time"}),
        "SELECT name FROM {} ORDER BY id DESC LIMIT 1",
    ),
)

_CANDIDATES = """
SELECT n.nspname, c.relname, has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE'),
       (SELECT array_agg(a.attname::text) FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relname = ANY (%s) ORDER BY 1, 2
"""


@dataclass(frozen=True)
class ForeignLedger:
    """Another tool's ledger: where it is, and its newest entry if the role may read it."""

    tool: str
    table: str
    newest: str = ""

    def __str__(self) -> str:
        newest = f", newest entry {self.newest}" if self.newest else ""
        return f"{self.tool} ({self.table}{newest})"


def foreign_ledgers(connection: psycopg.Connection[t.Any]) -> list[ForeignLedger]:
    """Return the ledgers of other tools that the database has."""
    found = []
    for schema, table, may_read, columns in connection.execute(_CANDIDATES, [[tool.table for tool in _TOOLS]]):
        tool = next((one for one in _TOOLS if one.table == table and one.columns <= set(columns or ())), None)
        if tool is None:
            continue
        row = None
        if may_read:
            query = sql.SQL(tool.newest).format(sql.Identifier(schema, table))
            row = connection.execute(query).fetchone()
        found.append(ForeignLedger(tool.name, quoted(schema, table), str(row[0]) if row and row[0] else ""))
    return found


def shape_of(connection: psycopg.Connection[t.Any], shapes: t.Mapping[str, t.Mapping[str, t.Sequence[str]]]) -> str:
    """Return the first shape whose relations the database all has and whose C(without) it lacks; empty if none is.

    Args:
        connection: any role.
        shapes: name -> C({"with": [relation…], "without": [relation…]}), most particular first.
    """
    names = sorted({name for shape in shapes.values() for part in shape.values() for name in part})
    query = "SELECT name FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NOT NULL"
    there = {row[0] for row in connection.execute(query, [names])}
    return next(
        (
            name
            for name, shape in shapes.items()
            if set(shape.get("with", ())) <= there and not set(shape.get("without", ())) & there
        ),
        "",
    )


def adopt(ledger: Ledger, files: t.Sequence[MigrationFile], source: str, *, run_id: str, check: bool = False) -> None:
    """Write a row and an event for each file, in one transaction, and nothing else.

    Args:
        ledger: the database's ledger, on a session that may write it and holds the run's lock.
        files: what is applied already.
        source: who says so.
        run_id: of this adoption.
        check: change nothing.
    """
    if check or not files:
        return
    with ledger.connection.transaction():
        if not ledger.is_current():
            ledger.create()
        for file in files:
            if source == BASELINE:
                ledger.record(file, "baselined", run_id=run_id)
            else:
                ledger.record_adopted(file, run_id=run_id, source=source, detail={})


def from_flyway(
    connection: psycopg.Connection[t.Any], table: str, files: t.Sequence[MigrationFile], *, changed: bool = False
) -> list[MigrationFile]:
    """Return the files that Flyway's ledger says are applied, with the text that it says.

    Args:
        connection: a session that may read the table.
        table: name of Flyway's table, as SQL writes it.
        files: all migrations.
        changed: take files whose checksum is not Flyway's.

    Raises:
        RunbookError: a failed entry, one that no file has, or a file that is not what Flyway applied.
    """
    versioned = {file.order: file for file in files if file.version and not file.folder}
    repeatable = {file.name: file for file in files if file.kind == REPEATABLE and not file.folder}
    taken: dict[str, MigrationFile] = {}
    problems: list[str] = []
    for entry in _flyway_entries(connection, table):
        script, version = entry["script"], entry["version"]
        if not entry["success"]:
            problems.append(f"{script}: it failed there")
        elif entry["type"] == "BASELINE":
            problems += [f"{script}: a baseline of {version}, which no file's number is"] * (_number(version) < 0)
            taken |= {file.file: file for order, file in versioned.items() if order <= _number(version)}
        elif entry["type"] == "SQL" and version is None:
            file = repeatable.get(script.removeprefix("R__").removesuffix(".sql").lower())
            if file and flyway_checksum(file.text) == entry["checksum"]:
                taken[file.file] = file
        elif entry["type"] == "SQL":
            file = versioned.get(_number(version))
            if file is None:
                problems.append(f"{script}: there is no file with the number {version}")
            elif flyway_checksum(file.text) != entry["checksum"] and not changed:
                problems.append(f"{script}: {file.path} is not what Flyway applied")
            else:
                taken[file.file] = file
        elif entry["type"] != "SCHEMA":
            problems.append(f"{script}: an entry of the type {entry['type']}")
    _refuse(problems, "Flyway", table)
    return [file for file in files if file.file in taken]


def _flyway_entries(connection: psycopg.Connection[t.Any], table: str) -> list[dict[str, t.Any]]:
    """Return what counts of Flyway's ledger: of a repeatable script the newest entry, and nothing that was undone."""
    query = """
        SELECT version, type, script, checksum, success, description FROM {table} h
        WHERE type NOT IN ('DELETE', 'UNDO_SQL') AND NOT EXISTS (
          SELECT FROM {table} later WHERE later.installed_rank > h.installed_rank
          AND (later.version = h.version AND later.type IN ('DELETE', 'UNDO_SQL')
               OR h.version IS NULL AND later.script = h.script))
        ORDER BY installed_rank
    """
    try:
        return rows_of(connection, sql.SQL(query).format(table=sql.SQL(table)))  # type: ignore[arg-type]
    except psycopg.Error as error:
        raise from_postgres(error, f"cannot read Flyway's ledger {table}") from error


def from_dbmate(
    connection: psycopg.Connection[t.Any], table: str, files: t.Sequence[MigrationFile]
) -> list[MigrationFile]:
    """Return the files that dbmate's ledger says are applied; it knows no checksums.

    Raises:
        RunbookError: an entry that no file has; or golang-migrate's table, which has no row of earlier versions.
    """
    dirty = "FROM pg_catalog.pg_attribute WHERE attrelid = to_regclass(%s) AND attname = 'dirty' AND NOT attisdropped"
    if one_of(connection, f"SELECT EXISTS (SELECT {dirty})", table):
        raise RunbookError(
            f"{table} is golang-migrate's ledger, which names only the newest version; nothing was changed",
            hint="Take that version as a baseline: playbooks/adopt.yml -e migrate_baseline=NNN.",
        )
    versioned = {file.order: file for file in files if file.version and not file.folder}
    try:
        found = connection.execute(sql.SQL("SELECT version::text FROM {} ORDER BY 1").format(sql.SQL(table)))
        versions = [row[0] for row in found]
    except psycopg.Error as error:
        raise from_postgres(error, f"cannot read dbmate's ledger {table}") from error
    _refuse([f"{one}: there is no file with this number" for one in versions if _number(one) not in versioned],
            "dbmate", table)  # fmt: skip
    numbers = {_number(one) for one in versions}
    return [file for order, file in versioned.items() if order in numbers]


def _refuse(problems: t.Sequence[str], tool: str, table: str) -> None:
    if problems:
        raise RunbookError(
            f"{tool}'s ledger {table} cannot be taken over; nothing was changed\n"
            + "\n".join(f"  {problem}" for problem in problems),
            hint="Bring each file over as NNN_name.sql with the number and the text that it was applied with.",
            problems=list(problems),
        )


def _number(version: str) -> int:
    """Return a version as a number; one with dots has no equal here."""
    return int(version) if version.isdigit() else -1


def flyway_checksum(text: str) -> int:
    """Return the checksum that Flyway keeps: CRC-32 of the lines without their ends, as a signed number."""
    total = 0
    for line in text.split("\n"):
        total = zlib.crc32(line.encode(), total)
    return total - (1 << 32) if total >= 1 << 31 else total


def up_to(files: t.Sequence[MigrationFile], version: str) -> list[MigrationFile]:
    """Return the files of the main folder up to a version.

    Raises:
        RunbookError: no file has this version.
    """
    versions = {file.order: file.version for file in files if file.version and not file.folder}
    if not version.isdigit() or int(version) not in versions:
        raise RunbookError(
            f"baseline: there is no migration {version}", hint=f"There are {', '.join(versions.values())}."
        )
    return [file for file in files if file.version and not file.folder and file.order <= int(version)]


def prove_baseline(
    connection: psycopg.Connection[t.Any],
    params: t.Mapping[str, t.Any],
    files: t.Sequence[MigrationFile],
    options: Options,
    parser: Parser,
) -> list[str]:
    """Prove that the database has what files make, by making it in a scratch database beside it.

    Args:
        connection: a session in the database.
        params: the module's options for connections.
        files: the files of the baseline.
        options: run, role and schema of the ledger.
        parser: makes scripts of the files.

    Returns:
        Names of what the database has beyond that.

    Raises:
        RunbookError: it lacks something, or has it otherwise; or the scratch database cannot be made.
    """
    actual = _structure(snapshot(connection, exclude=[options.schema]))
    everything = replace(options, hazards_allowed=(ALL,))
    with _scratch(connection, params, options) as session:
        # a batch changes rows, of which there are none
        migrate(session, [file for file in files if file.kind == VERSIONED], everything, Outcome(), parser=parser)
        session.execute("RESET ROLE; SET search_path = public")
        expected = _structure(snapshot(session, exclude=[options.schema]))
    rows = compare(expected, actual)
    # repeatable files follow, and a database may have more of its own
    beyond = [row for row in rows if row.expected == "absent"]
    wrong = [row for row in rows if row.status == "failed" and row not in beyond]
    if wrong:
        raise RunbookError(
            f"the database does not have what {files[-1].file} and those before it make; nothing was changed\n"
            + "\n".join(
                f"  {row.check} {row.object}: expected {row.expected or '–'}, is {row.actual or 'missing'}"
                for row in wrong[:20]
            )
            + (f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""),
            hint="Choose an older version as the baseline, or bring the database to it first.",
            problems=[f"{row.check} {row.object}" for row in wrong],
        )
    return [f"{row.check} {row.object}" for row in beyond]


def _structure(catalogue: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return what files make of a catalogue: owners, grants and versions of extensions belong to the environment."""
    kinds = ("schemas", "types", "tables", "sequences", "functions", "views", "materialized_views")
    found = {kind: _without_rights(catalogue[kind]) for kind in kinds if kind in catalogue}
    return {**found, "extensions": dict.fromkeys(catalogue.get("extensions", ()), "0")}


def _without_rights(value: t.Any) -> t.Any:
    if not isinstance(value, dict):
        return value
    return {
        key: _without_rights(inner) for key, inner in value.items() if key not in ("owner", "grants", "column_grants")
    }


@contextlib.contextmanager
def _scratch(
    connection: psycopg.Connection[t.Any], params: t.Mapping[str, t.Any], options: Options
) -> t.Iterator[psycopg.Connection[t.Any]]:
    """Yield a session in an empty database with the same locale and extensions; it is dropped at the end."""
    name = f"{connection.info.dbname[:30]}_baseline_{options.run_id[:20]}"
    like = properties(connection)
    extensions = [row[0] for row in connection.execute("SELECT extname FROM pg_extension WHERE extname <> 'plpgsql'")]
    application = f"runbook:{options.run_id}:baseline"
    with connect(params, dbname="postgres", application=application) as server:
        try:
            server.execute(
                sql.SQL(
                    "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {} "
                    "CONNECTION LIMIT 0"
                ).format(
                    sql.Identifier(name),
                    sql.Identifier(options.role or server.info.user),
                    *(sql.Literal(like[key]) for key in ("encoding", "collate", "ctype")),
                )
            )
        except psycopg.Error as error:
            raise from_postgres(error, f"cannot make the scratch database {name} to compare with") from error
        try:
            set_mark(server, name, mark(SCRATCH, connection.info.dbname) + options.run_id)
            with connect(params, dbname=name, application=application) as session:
                set_role(session, options.role)
                for extension in extensions:
                    session.execute(sql.SQL("CREATE EXTENSION IF NOT EXISTS {}").format(sql.Identifier(extension)))
                yield session
        except psycopg.Error as error:
            raise from_postgres(error, f"cannot prepare the scratch database {name}") from error
        finally:
            drop(server, name)
