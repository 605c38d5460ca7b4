# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a statement does to relations and their locks, read from its parse tree."""

from __future__ import annotations

import contextlib
import typing as t
from dataclasses import dataclass

with contextlib.suppress(ImportError):
    from pglast import ast, enums
    from pglast.visitors import Visitor


@dataclass(frozen=True)
class Effect:
    """A relation that a statement names, as the file writes it."""

    relation: str


def effects(node: t.Any) -> tuple[Effect, ...]:
    """Return the relations that a statement names, each once."""
    found: dict[str, None] = {}

    class Relations(Visitor):
        def visit_RangeVar(self, _ancestors: t.Any, name: t.Any) -> None:  # noqa: N802 - pglast calls it so
            found[".".join(part for part in (name.schemaname, name.relname) if part)] = None

    Relations()(node)
    return tuple(Effect(name) for name in found)


def lock_class(node: t.Any) -> str:
    """Return V(B) for a command that blocks no reader and no writer while it waits or works, else V(A).

    Whoever comes after a waiting command of class A queues behind it: it must give up soon. One of class B had better
    wait, because what it leaves half done is invalid.
    """
    kind = type(node)
    if kind in (ast.IndexStmt, ast.DropStmt):
        return "B" if node.concurrent else "A"
    if kind is ast.VacuumStmt:
        return "A" if any(option.defname == "full" for option in node.options or ()) else "B"
    if kind is ast.ReindexStmt:
        return "B" if any(option.defname == "concurrently" for option in node.params or ()) else "A"
    if kind is ast.RefreshMatViewStmt:
        return "B" if node.concurrent else "A"
    if kind is ast.AlterTableStmt:
        return "B" if all(_is_gentle(command) for command in node.cmds) else "A"
    return "A"


def _is_gentle(command: t.Any) -> bool:
    """Tell whether a part of ALTER TABLE takes SHARE UPDATE EXCLUSIVE and may take long."""
    validate, detach = enums.AlterTableType.AT_ValidateConstraint, enums.AlterTableType.AT_DetachPartition
    return bool(command.subtype == validate or (command.subtype == detach and command.def_.concurrent))
