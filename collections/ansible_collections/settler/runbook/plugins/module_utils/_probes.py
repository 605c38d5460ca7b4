# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Probes: what the catalogue says of statements that no transaction protects, before, after and instead of them."""

from __future__ import annotations

import contextlib
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql

with contextlib.suppress(ImportError):
    from pglast import ast, enums

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Statement

#: What is half made of some relations: of the tables among them, of the tables of the indexes among them, of their
#: partitions, and of the tables beside them that hold long values. Plain indexes only: CREATE INDEX ON ONLY leaves one
#: of a partitioned table invalid on purpose. What another session is at work on is that one's: CONCURRENTLY holds its
#: lock on the table from the first phase to the last.
_INVALID = """
WITH named AS (SELECT to_regclass(name)::oid AS oid FROM unnest(%(names)s::text[]) AS name),
tree AS (SELECT oid FROM named UNION SELECT t.relid::oid FROM named, pg_partition_tree(named.oid) t),
mine AS (SELECT oid FROM tree UNION SELECT i.indrelid FROM pg_catalog.pg_index i JOIN tree ON tree.oid = i.indexrelid),
tables AS (SELECT oid FROM mine UNION SELECT c.reltoastrelid FROM pg_catalog.pg_class c JOIN mine USING (oid)),
busy AS (SELECT l.relation FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
         WHERE l.locktype = 'relation' AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted
           AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
           AND l.pid <> pg_backend_pid() AND a.usename IS NOT NULL)
SELECT CASE WHEN n.nspname = 'pg_toast' THEN 'toast index' ELSE 'index' END, n.nspname, c.relname
FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'i' AND NOT (i.indisvalid AND i.indisready AND i.indislive)
  AND (%(all)s OR i.indrelid IN (SELECT oid FROM tables)) AND i.indrelid NOT IN (SELECT relation FROM busy)
UNION ALL
SELECT 'partition', n.nspname, c.relname FROM pg_catalog.pg_inherits h
JOIN pg_catalog.pg_class c ON c.oid = h.inhrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE h.inhdetachpending AND h.inhparent IN (SELECT oid FROM tables)
ORDER BY 1, 2, 3
"""


@dataclass(frozen=True)
class Probe:
    """How to see a statement's outcome: C(kind) of command, the names that it is about, as the file writes them.

    Of C(create index) the name is empty where PostgreSQL chooses it. Of C(detach) there are parent and partition.
    C(again) is a statement that may simply run once more.
    """

    kind: str
    names: tuple[tuple[str, str], ...] = ()  # schema, which may be empty, and name


@dataclass(frozen=True, order=True)
class Invalid:
    """Something that a statement outside a transaction has left half made."""

    kind: str
    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.schema}.{self.name}"


def probe_of(tree: t.Any) -> Probe | None:
    """Return how to see a statement's outcome, or None where the catalogue cannot tell."""
    node: t.Any = tree  # isinstance() would narrow it to classes whose members may all be None
    kind = type(node)
    if kind is ast.IndexStmt and node.concurrent:
        # an index is made in the schema of its table
        return Probe("create index", ((node.relation.schemaname or "", node.idxname or ""),))
    if kind is ast.DropStmt and node.concurrent:
        return Probe("drop index", tuple(_qualified(name) for name in node.objects))
    if kind is ast.AlterTableStmt:
        for command in node.cmds:
            if command.subtype == enums.AlterTableType.AT_DetachPartition and command.def_.concurrent:
                names = (node.relation, command.def_.name)
                return Probe("detach", tuple((name.schemaname or "", name.relname) for name in names))
        return Probe("again")
    if isinstance(
        node, ast.VacuumStmt | ast.ReindexStmt | ast.ClusterStmt | ast.AlterSystemStmt | ast.DropTableSpaceStmt
    ):
        return Probe("again")
    return None


def _qualified(name: t.Any) -> tuple[str, str]:
    parts = [part.sval for part in name]
    return (parts[-2] if len(parts) > 1 else "", parts[-1])


def invalid_objects(connection: psycopg.Connection[t.Any], statement: Statement) -> list[Invalid]:
    """Return what is half made of the relations that a statement names; all there is where it names none.

    REINDEX SCHEMA names none, for instance. DO and CALL make nothing of the kind.
    """
    probe = statement.probe
    objects = map(_regclass, probe.names if probe else ())
    names = [name for name in [*(effect.relation for effect in statement.effects), *objects] if name]
    parameters = {"names": names, "all": not names and probe is not None}
    return [Invalid(*row) for row in connection.execute(_INVALID, parameters)]


def is_partitioned(connection: psycopg.Connection[t.Any], statement: Statement) -> bool:
    """Tell whether a statement is about a partitioned table or index: some refuse a transaction then."""
    names = [effect.relation for effect in statement.effects]
    row = connection.execute(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class WHERE relkind IN ('p', 'I') "
        "AND oid = ANY (SELECT to_regclass(name)::oid FROM unnest(%s::text[]) AS name))",
        [names],
    ).fetchone()
    return bool(row and row[0])


def present(connection: psycopg.Connection[t.Any], probe: Probe) -> bool | None:
    """Tell whether the object of a C(create index), C(drop index) or C(detach) is there; None where none is named.

    A made index counts when it can be used, one to drop while anything of it is left, a partition while attached.
    """
    if probe.kind == "detach":
        parent, child = (_regclass(name) for name in probe.names)
        row = connection.execute(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = to_regclass(%s)::oid "
            "AND inhrelid = to_regclass(%s)::oid)",
            [parent, child],
        ).fetchone()
        return bool(row and row[0])
    if probe.kind not in ("create index", "drop index") or not all(name for _schema, name in probe.names):
        return None
    row = connection.execute(
        "SELECT count(*) FROM pg_catalog.pg_index WHERE indexrelid = ANY (SELECT to_regclass(name)::oid "
        "FROM unnest(%s::text[]) AS name) AND (%s OR indisvalid AND indisready)",
        [[_regclass(name) for name in probe.names], probe.kind == "drop index"],
    ).fetchone()
    return bool(row and row[0])


def pending_detach(connection: psycopg.Connection[t.Any], probe: Probe) -> bool:
    """Tell whether the partition of a C(detach) waits for its FINALIZE."""
    row = connection.execute(
        "SELECT inhdetachpending FROM pg_catalog.pg_inherits WHERE inhparent = to_regclass(%s)::oid "
        "AND inhrelid = to_regclass(%s)::oid",
        [_regclass(name) for name in probe.names],
    ).fetchone()
    return bool(row and row[0])


def invalid_target(connection: psycopg.Connection[t.Any], probe: Probe) -> Invalid | None:
    """Return the invalid index that stands where a C(create index) wants to make its own."""
    if probe.kind != "create index" or not probe.names[0][1]:
        return None
    row = connection.execute(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid "
        "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
        "WHERE i.indexrelid = to_regclass(%s)::oid AND c.relkind = 'i' AND NOT (i.indisvalid AND i.indisready)",
        [_regclass(probe.names[0])],
    ).fetchone()
    return Invalid("index", row[0], row[1]) if row else None


def repair(connection: psycopg.Connection[t.Any], leftover: Invalid) -> None:
    """Take away what a failed CONCURRENTLY has left: drop the index; a half detached partition is detached."""
    name = sql.Identifier(leftover.schema, leftover.name)
    if leftover.kind != "partition":
        connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(name))
        return
    row = connection.execute(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_inherits h JOIN pg_catalog.pg_class c ON c.oid = h.inhparent "
        "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE h.inhrelid = to_regclass(%s)::oid",
        [name.as_string(connection)],
    ).fetchone()
    if row:
        connection.execute(sql.SQL("ALTER TABLE {} DETACH PARTITION {} FINALIZE").format(sql.Identifier(*row), name))


def _regclass(name: tuple[str, str]) -> str:
    """Return a name as to_regclass reads it: quoted, found through search_path where it has no schema."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in name if part)
