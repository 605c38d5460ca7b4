# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a statement does to relations: the locks that it takes and what it makes, read from its parse tree.

The lock levels are those of PostgreSQL's manual («Explicit Locking») and of tablecmds.c, AlterTableGetLockLevel();
a test compares them with pg_locks of real servers.
"""

from __future__ import annotations

import contextlib
import functools
import re
import typing as t
from dataclasses import dataclass

with contextlib.suppress(ImportError):
    from pglast import ast, enums

#: PostgreSQL's table locks, weakest first.
LOCKS = (
    "ACCESS SHARE",
    "ROW SHARE",
    "ROW EXCLUSIVE",
    "SHARE UPDATE EXCLUSIVE",
    "SHARE",
    "SHARE ROW EXCLUSIVE",
    "EXCLUSIVE",
    "ACCESS EXCLUSIVE",
)
(
    ACCESS_SHARE,
    ROW_SHARE,
    ROW_EXCLUSIVE,
    SHARE_UPDATE_EXCLUSIVE,
    SHARE,
    SHARE_ROW_EXCLUSIVE,
    EXCLUSIVE,
    ACCESS_EXCLUSIVE,
) = LOCKS

MADE, DROPPED, RENAMED, CHECKED, VALIDATED = "made", "dropped", "renamed", "checked", "validated"


@dataclass(frozen=True)
class Effect:
    """A relation that a statement names, as SQL writes it, and the lock that it takes on it; empty if it has none yet.

    C(change) is what becomes of it: V(made), V(dropped), V(renamed) to C(name), V(checked) by a constraint C(name)
    that C(column) is not null, or the constraint C(name) V(validated). SET SCHEMA is a new name with the schema.
    """

    relation: str
    lock: str = ""
    change: str = ""
    name: str = ""
    column: str = ""


def quoted(*parts: str | None) -> str:
    """Return a name as SQL writes it, with quotes where it needs them; parts that are empty are left out."""
    return ".".join(part if _PLAIN.fullmatch(part) else '"' + part.replace('"', '""') + '"' for part in parts if part)


_PLAIN = re.compile(r"[a-z_][a-z0-9_$]*")
_QUALIFIED = re.compile(r'("(""|[^"])*"|[^".]+)\.')


def relation_name(node: t.Any) -> str:
    """Return the name of a RangeVar."""
    return quoted(node.schemaname, node.relname)


def schema_of(name: str) -> str:
    """Return the schema of a name, as SQL writes it; empty if it has none."""
    found = _QUALIFIED.match(name)
    return found[1] if found else ""


def listed_name(names: t.Iterable[t.Any]) -> str:
    """Return a name that the parse tree has as a list of strings."""
    return quoted(*(name.sval for name in names))


def stronger(one: str, other: str) -> str:
    """Return the stronger of two locks, either of which may be empty."""
    return max(one, other, key=lambda lock: LOCKS.index(lock) if lock else -1)


def effects(node: t.Any) -> tuple[Effect, ...]:
    """Return what a statement does to the relations that it names, one effect a relation and change."""
    locks = _locks_of_queries(node)
    changes: list[Effect] = []
    handler = _handlers().get(type(node))
    for effect in handler(node) if handler else ():
        if effect.lock:
            _take(locks, effect.relation, effect.lock)
        elif effect.change == MADE:
            locks[effect.relation] = ""
        if effect.change:
            changes.append(effect)
    return (*(Effect(relation, lock) for relation, lock in locks.items()), *changes)


def _locks_of_queries(node: t.Any) -> dict[str, str]:
    """Return all relations that a statement names, with the locks of queries that read and change rows."""
    found: dict[type, list[t.Any]] = {}
    for part in nodes(node, ast.RangeVar, ast.CommonTableExpr, ast.SelectStmt, *_changing()):  # one walk for all
        found.setdefault(type(part), []).append(part)
    locks = {relation_name(name): ACCESS_SHARE for name in found.get(ast.RangeVar, ()) if not _is_local(name)}
    for cte in found.get(ast.CommonTableExpr, ()):
        locks.pop(quoted(cte.ctename), None)  # a name of the query, not of the database
    for kind in _changing():
        for part in found.get(kind, ()):
            _take(locks, relation_name(part.relation), ROW_EXCLUSIVE)
    for select in found.get(ast.SelectStmt, ()):
        for name in nodes(select.fromClause, ast.RangeVar) if select.lockingClause else ():
            _take(locks, relation_name(name), ROW_SHARE)
    return locks


def _changing() -> tuple[type, ...]:
    return (ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt, ast.MergeStmt)


def nodes(tree: t.Any, *kinds: type) -> t.Iterator[t.Any]:
    """Yield all nodes of these kinds in a part of a parse tree, itself included, in the order of the text."""
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if isinstance(part, tuple):
            waiting.extend(reversed(part))
        elif isinstance(part, ast.Node):
            if isinstance(part, kinds):
                yield part
            kind: t.Any = type(part)
            for attribute in _branches(kind):
                value = getattr(part, attribute)
                if value is not None:
                    waiting.append(value)


@functools.cache
def _branches(kind: type) -> tuple[str, ...]:
    """Return the attributes of a kind of node that can hold others, last first: most hold words and numbers."""
    slots: dict[str, t.Any] = kind.__slots__  # type: ignore[attr-defined]
    return tuple(
        name
        for name, (_c_type, types, _adaptor) in reversed(slots.items())
        if any(issubclass(one, (tuple, ast.Node)) for one in (types if isinstance(types, tuple) else (types,)))
    )


def lock_class(node: t.Any) -> str:
    """Return V(B) for a command that blocks no reader and no writer while it waits or works, else V(A).

    Whoever comes after a waiting command of class A queues behind it: it must give up soon. One of class B had better
    wait, because what it leaves half done is invalid.
    """
    kind = type(node)
    if kind in (ast.IndexStmt, ast.DropStmt):
        return "B" if node.concurrent else "A"
    if kind is ast.VacuumStmt:
        return "A" if has_option(node.options, "full") else "B"
    if kind is ast.ReindexStmt:
        return "B" if has_option(node.params, "concurrently") else "A"
    if kind is ast.RefreshMatViewStmt:
        return "B" if node.concurrent else "A"
    if kind is ast.AlterTableStmt:
        return "B" if all(_is_gentle(command) for command in node.cmds) else "A"
    return "A"


def has_option(options: t.Iterable[t.Any] | None, name: str) -> bool:
    """Tell whether an option is written."""
    return any(option.defname == name for option in options or ())


def _is_gentle(command: t.Any) -> bool:
    """Tell whether a part of ALTER TABLE takes SHARE UPDATE EXCLUSIVE and may take long."""
    validate, detach = enums.AlterTableType.AT_ValidateConstraint, enums.AlterTableType.AT_DetachPartition
    return bool(command.subtype == validate or (command.subtype == detach and command.def_.concurrent))


def _is_local(name: t.Any) -> bool:
    """Tell whether a name is one of the session: temporary relations concern nobody else."""
    return bool(name.relpersistence == "t" or name.schemaname == "pg_temp")


def _take(locks: dict[str, str], relation: str, lock: str) -> None:
    locks[relation] = stronger(locks.get(relation, ""), lock)


def _index(node: t.Any) -> t.Iterator[Effect]:
    yield Effect(relation_name(node.relation), SHARE_UPDATE_EXCLUSIVE if node.concurrent else SHARE)


def _make(node: t.Any) -> t.Iterator[Effect]:
    """CREATE TABLE and its kin, with the tables that it refers to."""
    table: t.Any = node.base if isinstance(node, ast.CreateForeignTableStmt) else node
    yield Effect(relation_name(table.relation), change=MADE)
    for parent in getattr(node, "inhRelations", None) or ():
        yield Effect(relation_name(parent), ACCESS_EXCLUSIVE if node.partbound else SHARE_UPDATE_EXCLUSIVE)
    yield from _referenced(node)


def _referenced(node: t.Any) -> t.Iterator[Effect]:
    """Yield the tables that new foreign keys point to."""
    for constraint in nodes(node, ast.Constraint):
        if constraint.pktable:
            yield Effect(relation_name(constraint.pktable), SHARE_ROW_EXCLUSIVE)


def _select_into(node: t.Any) -> t.Iterator[Effect]:
    into = node.into if isinstance(node, ast.CreateTableAsStmt) else node.intoClause
    if into and not _is_local(into.rel):
        yield Effect(relation_name(into.rel), change=MADE)


def _view(node: t.Any) -> t.Iterator[Effect]:
    name = relation_name(node.view)
    yield Effect(name, ACCESS_EXCLUSIVE) if node.replace else Effect(name, change=MADE)


def _sequence(node: t.Any) -> t.Iterator[Effect]:
    yield Effect(relation_name(node.sequence), change=MADE)


def _alter_table(node: t.Any) -> t.Iterator[Effect]:
    relation = relation_name(node.relation)
    for command in node.cmds:
        yield Effect(relation, _alter_lock(command))
        kind, definition = command.subtype, command.def_
        if kind == enums.AlterTableType.AT_AttachPartition:
            yield Effect(relation_name(definition.name), ACCESS_EXCLUSIVE)
        if kind == enums.AlterTableType.AT_DetachPartition:
            lock = SHARE_UPDATE_EXCLUSIVE if definition.concurrent else ACCESS_EXCLUSIVE
            yield Effect(relation_name(definition.name), lock)
        if kind in (enums.AlterTableType.AT_AddInherit, enums.AlterTableType.AT_DropInherit):
            yield Effect(relation_name(definition), SHARE_UPDATE_EXCLUSIVE)
        if kind == enums.AlterTableType.AT_ValidateConstraint:
            yield Effect(relation, change=VALIDATED, name=command.name)
        if kind == enums.AlterTableType.AT_AddConstraint and (column := column_kept_from_null(definition)):
            yield Effect(relation, change=CHECKED, name=definition.conname or "", column=column)
        yield from _referenced(definition)


def column_kept_from_null(constraint: t.Any) -> str:
    """Return the column of a constraint CHECK (column IS NOT NULL), or an empty string."""
    test = constraint.raw_expr
    if type(test) is not ast.NullTest or test.nulltesttype != enums.NullTestType.IS_NOT_NULL:
        return ""
    column: t.Any = test.arg  # the class says of each of its members that it may be None
    return column.fields[-1].sval if type(column).__name__ == "ColumnRef" else ""


def _alter_lock(command: t.Any) -> str:
    """Return the lock of one part of ALTER TABLE on the table that is altered."""
    kind, definition = command.subtype, command.def_
    if kind == enums.AlterTableType.AT_AddConstraint and definition.contype == enums.ConstrType.CONSTR_FOREIGN:
        return SHARE_ROW_EXCLUSIVE
    if kind == enums.AlterTableType.AT_DetachPartition:
        return SHARE_UPDATE_EXCLUSIVE if definition.concurrent else ACCESS_EXCLUSIVE
    if kind == enums.AlterTableType.AT_SetRelOptions and has_option(definition, "user_catalog_table"):
        return ACCESS_EXCLUSIVE
    return _alter_locks().get(kind, ACCESS_EXCLUSIVE)


@functools.cache
def _alter_locks() -> dict[t.Any, str]:
    """Return the parts of ALTER TABLE that do with less than ACCESS EXCLUSIVE."""
    kinds = enums.AlterTableType
    gentle = (
        kinds.AT_SetStatistics,
        kinds.AT_ClusterOn,
        kinds.AT_DropCluster,
        kinds.AT_SetOptions,
        kinds.AT_ResetOptions,
        kinds.AT_SetRelOptions,
        kinds.AT_ResetRelOptions,
        kinds.AT_ValidateConstraint,
        kinds.AT_AttachPartition,
        kinds.AT_DetachPartitionFinalize,
    )
    triggers = (kind for kind in kinds if re.fullmatch("AT_(Enable|Disable).*Trig(All|User)?", kind.name))
    return dict.fromkeys(gentle, SHARE_UPDATE_EXCLUSIVE) | dict.fromkeys(triggers, SHARE_ROW_EXCLUSIVE)


def _rename(node: t.Any) -> t.Iterator[Effect]:
    if not node.relation:
        return
    relation = relation_name(node.relation)
    is_index = node.renameType == enums.ObjectType.OBJECT_INDEX
    yield Effect(relation, SHARE_UPDATE_EXCLUSIVE if is_index else ACCESS_EXCLUSIVE)
    if node.renameType in _relation_kinds():
        yield Effect(relation, change=RENAMED, name=quoted(node.relation.schemaname, node.newname))


def _set_schema(node: t.Any) -> t.Iterator[Effect]:
    if node.relation:
        yield Effect(relation_name(node.relation), ACCESS_EXCLUSIVE)
        yield Effect(relation_name(node.relation), change=RENAMED, name=quoted(node.newschema, node.relation.relname))


@functools.cache
def _relation_kinds() -> frozenset[t.Any]:
    kinds = enums.ObjectType
    return frozenset({
        kinds.OBJECT_TABLE, kinds.OBJECT_VIEW, kinds.OBJECT_MATVIEW, kinds.OBJECT_SEQUENCE, kinds.OBJECT_FOREIGN_TABLE
    })  # fmt: skip


def _drop(node: t.Any) -> t.Iterator[Effect]:
    kinds = enums.ObjectType
    for name in node.objects or ():
        if node.removeType in _relation_kinds():
            yield Effect(listed_name(name), ACCESS_EXCLUSIVE, change=DROPPED)
        elif node.removeType == kinds.OBJECT_INDEX:
            lock = SHARE_UPDATE_EXCLUSIVE if node.concurrent else ACCESS_EXCLUSIVE
            yield Effect(listed_name(name), lock, change=DROPPED)
        elif node.removeType in (kinds.OBJECT_TRIGGER, kinds.OBJECT_POLICY, kinds.OBJECT_RULE):
            yield Effect(listed_name(name[:-1]), ACCESS_EXCLUSIVE)


def _each(lock: str, attribute: str) -> t.Callable[[t.Any], t.Iterator[Effect]]:
    """Return a handler that takes a lock on the relation or relations that an attribute has."""

    def handler(node: t.Any) -> t.Iterator[Effect]:
        for name in nodes(getattr(node, attribute), ast.RangeVar):
            yield Effect(relation_name(name), lock)

    return handler


def _lock(node: t.Any) -> t.Iterator[Effect]:
    yield from _each(LOCKS[node.mode - 1], "relations")(node)


def _vacuum(node: t.Any) -> t.Iterator[Effect]:
    yield from _each(ACCESS_EXCLUSIVE if has_option(node.options, "full") else SHARE_UPDATE_EXCLUSIVE, "rels")(node)


def _reindex(node: t.Any) -> t.Iterator[Effect]:
    is_index = node.kind == enums.ReindexObjectType.REINDEX_OBJECT_INDEX
    concurrent = has_option(node.params, "concurrently")
    yield from _each(
        SHARE_UPDATE_EXCLUSIVE if concurrent else ACCESS_EXCLUSIVE if is_index else SHARE, "relation"
    )(node)  # fmt: skip


def _refresh(node: t.Any) -> t.Iterator[Effect]:
    yield from _each(EXCLUSIVE if node.concurrent else ACCESS_EXCLUSIVE, "relation")(node)


def _copy(node: t.Any) -> t.Iterator[Effect]:
    if node.relation and node.is_from:
        yield Effect(relation_name(node.relation), ROW_EXCLUSIVE)


def _comment(node: t.Any) -> t.Iterator[Effect]:
    kinds = enums.ObjectType
    if node.objtype in _relation_kinds():
        yield Effect(listed_name(node.object), SHARE_UPDATE_EXCLUSIVE)
    elif node.objtype == kinds.OBJECT_COLUMN:
        yield Effect(listed_name(node.object[:-1]), SHARE_UPDATE_EXCLUSIVE)


@functools.cache
def _handlers() -> dict[type, t.Callable[[t.Any], t.Iterator[Effect]]]:
    return {
        ast.IndexStmt: _index,
        ast.CreateStmt: _make,
        ast.CreateForeignTableStmt: _make,
        ast.CreateTableAsStmt: _select_into,
        ast.SelectStmt: _select_into,
        ast.ViewStmt: _view,
        ast.CreateSeqStmt: _sequence,
        ast.AlterSeqStmt: _each(SHARE_ROW_EXCLUSIVE, "sequence"),
        ast.AlterTableStmt: _alter_table,
        ast.AlterObjectSchemaStmt: _set_schema,
        ast.RenameStmt: _rename,
        ast.DropStmt: _drop,
        ast.TruncateStmt: _each(ACCESS_EXCLUSIVE, "relations"),
        ast.LockStmt: _lock,
        ast.VacuumStmt: _vacuum,
        ast.ClusterStmt: _each(ACCESS_EXCLUSIVE, "relation"),
        ast.ReindexStmt: _reindex,
        ast.RefreshMatViewStmt: _refresh,
        ast.CreateTrigStmt: _each(SHARE_ROW_EXCLUSIVE, "relation"),
        ast.CreatePolicyStmt: _each(ACCESS_EXCLUSIVE, "table"),
        ast.AlterPolicyStmt: _each(ACCESS_EXCLUSIVE, "table"),
        ast.RuleStmt: _each(ACCESS_EXCLUSIVE, "relation"),
        ast.CreateStatsStmt: _each(SHARE_UPDATE_EXCLUSIVE, "relations"),
        ast.CopyStmt: _copy,
        ast.CommentStmt: _comment,
    }
