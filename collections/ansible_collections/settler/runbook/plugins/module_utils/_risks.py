# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Risks: what of a statement may be dangerous, read from its parse tree; what it means here, the catalogue decides."""

from __future__ import annotations

import contextlib
import functools
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._effects import (
    column_kept_from_null,
    has_option,
    listed_name,
    nodes,
    quoted,
    relation_name,
)

with contextlib.suppress(ImportError):
    from pglast import ast, enums


@dataclass(frozen=True)
class Rule:
    """What a hazard means, what to write instead, and whether it grows with the table or costs its rows."""

    meaning: str
    instead: str
    loses_data: bool = False
    needs_rows: bool = True


#: Every hazard that a policy may name. Names stay: they stand in files and inventories.
RULES: t.Final[dict[str, Rule]] = {
    "table-rewrite": Rule(
        "writes the whole table anew while nobody can read it",
        "add a nullable column, fill it with a file NNN_name.batch.sql, then set the default",
    ),
    "type-change": Rule(
        "writes the whole table anew, with its indexes, while nobody can read it",
        "add a column of the new type, fill it in batches, then exchange the two",
    ),
    "not-null-without-check": Rule(
        "reads the whole table while nobody can use it",
        "add CHECK (column IS NOT NULL) NOT VALID, validate it in a file of its own, then SET NOT NULL",
    ),
    "check-without-not-valid": Rule(
        "reads the whole table while nobody can use it",
        "add it NOT VALID, and VALIDATE CONSTRAINT in a file of its own",
    ),
    "foreign-key-without-not-valid": Rule(
        "reads the whole table while nobody can write to it or to the one that it refers to",
        "add it NOT VALID, and VALIDATE CONSTRAINT in a file of its own",
    ),
    "validate-under-lock": Rule(
        "reads the whole table under the lock that an earlier statement of the same transaction took",
        "put VALIDATE CONSTRAINT into a file of its own",
    ),
    "index-without-concurrently": Rule(
        "builds the index while nobody can write to the table",
        "CREATE INDEX CONCURRENTLY in a file that begins with -- runbook: no-transaction; a constraint then takes it "
        "with USING INDEX",
    ),
    "refresh-without-concurrently": Rule(
        "computes the view anew while nobody can read it",
        "REFRESH MATERIALIZED VIEW CONCURRENTLY, which needs a unique index",
    ),
    "attach-without-check": Rule(
        "reads the whole partition, the new one or the default one beside it, while nobody can use it",
        "first give it a validated CHECK constraint that says the same as the new bounds, or the opposite in the "
        "default partition",
    ),
    "change-without-where": Rule(
        "changes every row in one transaction and keeps all of them locked until it ends",
        "write a file NNN_name.batch.sql, or say which rows are meant",
    ),
    "drop-column": Rule("destroys the column's data", "stop using it, and drop it in a later release", loses_data=True),
    "drop-table": Rule("destroys the table's data", "rename it, and drop it in a later release", loses_data=True),
    "truncate": Rule("destroys the table's data", "DELETE with a WHERE, or keep a copy", loses_data=True),
    "rename": Rule(
        "breaks whatever still uses the old name",
        "add the new one beside it, or leave a view under the old name",
        needs_rows=False,
    ),
    "row-security-hides-rows": Rule(
        "is silently limited to the rows that the role may see",
        "run the file as a role that bypasses row security: -- runbook: role=…",
        needs_rows=False,
    ),
}


#: Relations that a statement reaches without naming them: what goes with the object that it drops, or many.
OF_SCHEMA, OF_TYPE, OF_EXTENSION, OF_ROLE, DEFAULT_PARTITION, IN_SCHEMA, CLUSTERED, ALL_TABLES = (
    "schema", "type", "extension", "role", "default partition", "in schema", "clustered", "all"
)  # fmt: skip


@dataclass(frozen=True)
class Risk:
    """A hazard that a statement may be, on a relation; it is none where the catalogue answers otherwise.

    C(column) must be there, or if C(absent) is set must not be. C(index) must not be there. C(functions) has the names
    of those in a default: only a volatile one is dangerous. C(type) is the new one of a column, as SQL writes it.
    C(domain) is the type of a new column: only a domain with constraints is dangerous. C(partition_of) is the table
    that the relation becomes a partition of. C(reach) says which other relations are meant, and of what.
    """

    hazard: str
    relation: str = ""
    column: str = ""
    absent: bool = False
    index: str = ""
    functions: tuple[str, ...] | None = None
    type: str = ""
    domain: str = ""
    partition_of: str = ""
    reach: str = ""


def risks(node: t.Any) -> tuple[Risk, ...]:
    """Return what of a statement may be a hazard."""
    handler = _handlers().get(type(node))
    found = [*handler(node)] if handler else []
    if isinstance(node, ast.InsertStmt | ast.UpdateStmt | ast.DeleteStmt | ast.MergeStmt | ast.CreateTableAsStmt):
        # what an INSERT adds, its policy refuses aloud; what a query reads, it hides
        made = node.relation if isinstance(node, ast.InsertStmt) else None
        names = {relation_name(name) for name in nodes(node, ast.RangeVar) if name is not made}
        found += [Risk("row-security-hides-rows", name) for name in sorted(names)]
    return tuple(found)


def _alter_table(node: t.Any) -> t.Iterator[Risk]:
    relation = relation_name(node.relation)
    for command in node.cmds:
        handler = _alterations().get(command.subtype)
        if handler:
            yield from handler(relation, command)


def _add_column(relation: str, command: t.Any) -> t.Iterator[Risk]:
    column = command.def_
    name = column.colname
    kind_of_column = listed_name(column.typeName.names)
    if kind_of_column.rpartition(".")[2] in _SERIAL:
        yield Risk("table-rewrite", relation, name, absent=True)
    elif not kind_of_column.startswith("pg_catalog."):
        yield Risk("table-rewrite", relation, name, absent=True, domain=kind_of_column)
    for constraint in column.constraints or ():
        kind = constraint.contype
        if kind == enums.ConstrType.CONSTR_DEFAULT:
            calls = (call.funcname[-1].sval for call in nodes(constraint.raw_expr, ast.FuncCall))
            yield Risk("table-rewrite", relation, name, absent=True, functions=tuple(calls))
        elif kind == enums.ConstrType.CONSTR_IDENTITY or (
            kind == enums.ConstrType.CONSTR_GENERATED and constraint.generated_kind != "v"
        ):
            yield Risk("table-rewrite", relation, name, absent=True)
        elif kind in _constraints() and kind != enums.ConstrType.CONSTR_NOTNULL:
            yield Risk(_constraints()[kind], relation, name, absent=True)


def _add_constraint(relation: str, command: t.Any) -> t.Iterator[Risk]:
    constraint = command.def_
    kind = constraint.contype
    if kind in _constraints() and not constraint.skip_validation and not constraint.indexname:
        column = constraint.keys[0].sval if kind == enums.ConstrType.CONSTR_NOTNULL else ""
        column = column or column_kept_from_null(constraint)
        yield Risk(_constraints()[kind], relation, column)


def _plain(hazard: str) -> t.Callable[[str, t.Any], t.Iterator[Risk]]:
    """Return a handler of a part of ALTER TABLE that concerns the column that it names, if it names one."""

    def handler(relation: str, command: t.Any) -> t.Iterator[Risk]:
        is_column = hazard in ("drop-column", "not-null-without-check", "table-rewrite")
        yield Risk(hazard, relation, (command.name or "") if is_column else "")

    return handler


def _alter_type(relation: str, command: t.Any) -> t.Iterator[Risk]:
    from pglast.stream import RawStream  # noqa: PLC0415 - it loads a printer for each kind of node

    yield Risk("type-change", relation, command.name, type=RawStream()(command.def_.typeName))


def _attach(relation: str, command: t.Any) -> t.Iterator[Risk]:
    yield Risk("attach-without-check", relation_name(command.def_.name), partition_of=relation)
    if not command.def_.bound.is_default:
        yield Risk("attach-without-check", relation, reach=DEFAULT_PARTITION)


def _create(node: t.Any) -> t.Iterator[Risk]:
    if node.partbound and not node.partbound.is_default:
        yield Risk("attach-without-check", relation_name(node.inhRelations[0]), reach=DEFAULT_PARTITION)


def _index(node: t.Any) -> t.Iterator[Risk]:
    if not node.concurrent:
        index = quoted(node.relation.schemaname, node.idxname) if node.idxname else ""
        yield Risk("index-without-concurrently", relation_name(node.relation), index=index)


def _drop(node: t.Any) -> t.Iterator[Risk]:
    kinds = enums.ObjectType
    for name in node.objects:
        if node.removeType in (kinds.OBJECT_TABLE, kinds.OBJECT_FOREIGN_TABLE):
            yield Risk("drop-table", listed_name(name))
        elif node.removeType == kinds.OBJECT_EXTENSION:
            yield Risk("drop-table", quoted(name.sval), reach=OF_EXTENSION)
        elif node.behavior == enums.DropBehavior.DROP_CASCADE and node.removeType == kinds.OBJECT_SCHEMA:
            yield Risk("drop-table", quoted(name.sval), reach=OF_SCHEMA)
        elif node.behavior == enums.DropBehavior.DROP_CASCADE and node.removeType in _types():
            yield Risk("drop-table", listed_name(name.names), reach=OF_TYPE)


@functools.cache
def _types() -> frozenset[t.Any]:
    return frozenset({enums.ObjectType.OBJECT_TYPE, enums.ObjectType.OBJECT_DOMAIN})


def _drop_owned(node: t.Any) -> t.Iterator[Risk]:
    for role in node.roles:
        yield Risk("drop-table", quoted(role.rolename), reach=OF_ROLE)


def _alter_domain(node: t.Any) -> t.Iterator[Risk]:
    if (node.subtype == "C" and not node.def_.skip_validation) or node.subtype == "O":
        yield Risk("check-without-not-valid", listed_name(node.typeName), reach=OF_TYPE)


def _each(hazard: str, attribute: str) -> t.Callable[[t.Any], t.Iterator[Risk]]:
    """Return a handler of a statement that is a hazard to each relation in an attribute."""

    def handler(node: t.Any) -> t.Iterator[Risk]:
        for name in nodes(getattr(node, attribute), ast.RangeVar):
            yield Risk(hazard, relation_name(name))

    return handler


def _vacuum(node: t.Any) -> t.Iterator[Risk]:
    if has_option(node.options, "full"):
        yield from _each("table-rewrite", "rels")(node) if node.rels else [Risk("table-rewrite", reach=ALL_TABLES)]


def _cluster(node: t.Any) -> t.Iterator[Risk]:
    yield from _each("table-rewrite", "relation")(node) if node.relation else [Risk("table-rewrite", reach=CLUSTERED)]


def _reindex(node: t.Any) -> t.Iterator[Risk]:
    if has_option(node.params, "concurrently"):
        return
    if node.kind == enums.ReindexObjectType.REINDEX_OBJECT_SCHEMA:
        yield Risk("index-without-concurrently", quoted(node.name), reach=IN_SCHEMA)
    elif node.kind == enums.ReindexObjectType.REINDEX_OBJECT_DATABASE:
        yield Risk("index-without-concurrently", reach=ALL_TABLES)
    else:
        yield from _each("index-without-concurrently", "relation")(node)


def _refresh(node: t.Any) -> t.Iterator[Risk]:
    if not node.concurrent and not node.skipData:
        yield Risk("refresh-without-concurrently", relation_name(node.relation))


def _change(node: t.Any) -> t.Iterator[Risk]:
    if not node.whereClause:
        yield Risk("change-without-where", relation_name(node.relation))


def _rename(node: t.Any) -> t.Iterator[Risk]:
    kinds = enums.ObjectType
    if node.renameType in (kinds.OBJECT_TABLE, kinds.OBJECT_VIEW, kinds.OBJECT_MATVIEW):
        yield Risk("rename", relation_name(node.relation))
    elif node.renameType == kinds.OBJECT_COLUMN and node.relation:
        yield Risk("rename", relation_name(node.relation), node.subname)


_SERIAL = frozenset({"smallserial", "serial", "bigserial", "serial2", "serial4", "serial8"})


@functools.cache
def _constraints() -> dict[t.Any, str]:
    kinds = enums.ConstrType
    return {
        kinds.CONSTR_FOREIGN: "foreign-key-without-not-valid",
        kinds.CONSTR_CHECK: "check-without-not-valid",
        kinds.CONSTR_NOTNULL: "not-null-without-check",
        kinds.CONSTR_UNIQUE: "index-without-concurrently",
        kinds.CONSTR_PRIMARY: "index-without-concurrently",
        kinds.CONSTR_EXCLUSION: "index-without-concurrently",
    }


@functools.cache
def _alterations() -> dict[t.Any, t.Callable[[str, t.Any], t.Iterator[Risk]]]:
    kinds = enums.AlterTableType
    return {
        kinds.AT_AddColumn: _add_column,
        kinds.AT_AddConstraint: _add_constraint,
        kinds.AT_AlterColumnType: _alter_type,
        kinds.AT_AttachPartition: _attach,
        kinds.AT_DropColumn: _plain("drop-column"),
        kinds.AT_SetNotNull: _plain("not-null-without-check"),
        kinds.AT_SetExpression: _plain("table-rewrite"),
        kinds.AT_SetLogged: _plain("table-rewrite"),
        kinds.AT_SetUnLogged: _plain("table-rewrite"),
        kinds.AT_SetAccessMethod: lambda relation, _command: iter([Risk("table-rewrite", relation)]),
        kinds.AT_SetTableSpace: lambda relation, _command: iter([Risk("table-rewrite", relation)]),
    }


@functools.cache
def _handlers() -> dict[type, t.Callable[[t.Any], t.Iterator[Risk]]]:
    return {
        ast.AlterTableStmt: _alter_table,
        ast.IndexStmt: _index,
        ast.CreateStmt: _create,
        ast.DropStmt: _drop,
        ast.DropOwnedStmt: _drop_owned,
        ast.AlterDomainStmt: _alter_domain,
        ast.TruncateStmt: _each("truncate", "relations"),
        ast.VacuumStmt: _vacuum,
        ast.ClusterStmt: _cluster,
        ast.ReindexStmt: _reindex,
        ast.RefreshMatViewStmt: _refresh,
        ast.UpdateStmt: _change,
        ast.DeleteStmt: _change,
        ast.RenameStmt: _rename,
    }
