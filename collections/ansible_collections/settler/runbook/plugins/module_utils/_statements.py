# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Statements of a migration: split, located and judged by PostgreSQL's own parser (pglast)."""

from __future__ import annotations

import functools
import re
import traceback
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile, line_at

PGLAST_IMPORT_ERROR: str | None = None
try:
    import pglast
    from pglast import ast, enums
    from pglast.parser import ParseError
except ImportError:
    PGLAST_IMPORT_ERROR = traceback.format_exc()

#: A psql command at the start of a line, where no SQL statement can begin.
_META_COMMAND = re.compile(r"^\s*(\\[a-z!?]+)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Statement:
    """One statement: its text without comments around it, and the line (from 1) where it begins."""

    text: str
    line: int

    @property
    def first_line(self) -> str:
        """The statement's first line, for messages."""
        return self.text.splitlines()[0].rstrip()


@dataclass(frozen=True)
class Script:
    """A parsed file. C(warning) is set where the grammar knew a statement not, and the file goes as one."""

    file: MigrationFile
    statements: tuple[Statement, ...]
    warning: str = ""


def parse(file: MigrationFile) -> Script:
    """Split a file into statements and refuse what the engine cannot keep its promises for.

    Raises:
        RunbookError: a psql command, transaction control, COPY from standard input, a statement that cannot run
            in a transaction; with file and line.
    """
    try:
        tree = pglast.parse_sql(file.text)
    except ParseError as error:
        return _unknown_grammar(file, error)
    statements = []
    line, counted = 1, 0
    for raw in tree:
        start = raw.stmt_location or 0
        line, counted = line + file.text.count("\n", counted, start), start
        text = file.text[start : start + raw.stmt_len if raw.stmt_len else None].rstrip()
        statement = Statement(text, line)
        _refuse(file, statement, raw.stmt)
        statements.append(statement)
    return Script(file, tuple(statements))


def _unknown_grammar(file: MigrationFile, error: ParseError) -> Script:
    """Judge a file that pglast cannot parse: a psql command is refused, anything else is the server's to judge."""
    location = error.args[1] if len(error.args) > 1 else 0
    line = line_at(file.text, location)
    for match in _META_COMMAND.finditer(file.text):
        if line_at(file.text, match.start(1)) == line:
            raise RunbookError(
                f"{file.path}:{line}: psql command {match[1]}",
                hint="A migration is SQL for the server; commands of psql run in a shell of whoever runs it.",
            ) from error
    warning = (
        f"{file.file}:{line}: {error.args[0]}: unknown to the parser's grammar "
        f"(PostgreSQL {pglast.parser.get_postgresql_version()[0]}); the file is sent whole, unchecked"
    )
    whole = Statement(file.text.strip(), line_at(file.text, len(file.text) - len(file.text.lstrip())))
    return Script(file, (whole,), warning)


def _refuse(file: MigrationFile, statement: Statement, node: t.Any) -> None:
    """Raise if a statement cannot be part of a transaction that the engine owns."""
    where = f"{file.path}:{statement.line}"
    if isinstance(node, ast.TransactionStmt):
        raise RunbookError(
            f"{where}: transaction control: {statement.first_line}",
            hint="The engine runs each file in one transaction of its own: remove the statement.",
        )
    if isinstance(node, ast.CopyStmt) and node.filename is None:
        raise RunbookError(
            f"{where}: COPY {'FROM STDIN' if node.is_from else 'TO STDOUT'}: {statement.first_line}",
            hint="A migration has no client to copy from or to: write INSERT … VALUES.",
        )
    reason = refuses_transaction(node)
    if reason:
        raise RunbookError(
            f"{where}: {reason} cannot run inside a transaction block: {statement.first_line}",
            hint="Each file is one transaction, so that a failure leaves nothing behind. "
            "Write the form that can run in one, for instance CREATE INDEX without CONCURRENTLY.",
        )


def refuses_transaction(node: t.Any) -> str:
    """Return the name of a command that PostgreSQL refuses in a transaction block, or an empty string.

    REINDEX and CLUSTER of a partitioned table are refused too, but only the catalogue knows that: the server says so.
    """
    name, applies = _refusals().get(type(node), ("", None))
    return name if applies is None or applies(node) else ""


@functools.cache
def _refusals() -> dict[type, tuple[str, t.Callable[[t.Any], bool] | None]]:
    """Return, by kind of statement, its name and when it is refused; None is always."""
    wide = {
        enums.ReindexObjectType.REINDEX_OBJECT_SCHEMA,
        enums.ReindexObjectType.REINDEX_OBJECT_SYSTEM,
        enums.ReindexObjectType.REINDEX_OBJECT_DATABASE,
    }
    detach = enums.AlterTableType.AT_DetachPartition
    return {
        ast.CreatedbStmt: ("CREATE DATABASE", None),
        ast.DropdbStmt: ("DROP DATABASE", None),
        ast.CreateTableSpaceStmt: ("CREATE TABLESPACE", None),
        ast.DropTableSpaceStmt: ("DROP TABLESPACE", None),
        ast.AlterSystemStmt: ("ALTER SYSTEM", None),
        ast.DropSubscriptionStmt: ("DROP SUBSCRIPTION", None),
        ast.VacuumStmt: ("VACUUM", lambda node: node.is_vacuumcmd),
        ast.IndexStmt: ("CREATE INDEX CONCURRENTLY", lambda node: node.concurrent),
        ast.DropStmt: ("DROP INDEX CONCURRENTLY", lambda node: node.concurrent),
        ast.ReindexStmt: (
            "REINDEX CONCURRENTLY, or of a schema, database or system,",
            lambda node: node.kind in wide or _option(node.params, "concurrently"),
        ),
        ast.ClusterStmt: ("CLUSTER without a table", lambda node: not node.relation),
        ast.AlterTableStmt: (
            "DETACH PARTITION CONCURRENTLY",
            lambda node: any(command.subtype == detach and command.def_.concurrent for command in node.cmds),
        ),
        ast.AlterDatabaseStmt: ("ALTER DATABASE SET TABLESPACE", lambda node: _option(node.options, "tablespace")),
        ast.CreateSubscriptionStmt: (
            "CREATE SUBSCRIPTION that makes a slot",
            lambda node: _option(node.options, "connect", True) and _option(node.options, "create_slot", True),
        ),
        ast.DiscardStmt: ("DISCARD ALL", lambda node: node.target == enums.DiscardMode.DISCARD_ALL),
    }


def _option(options: t.Iterable[t.Any] | None, name: str, default: bool = False) -> bool:
    """Tell whether an option is on: written without a value, or with any but false, off and 0."""
    for option in options or ():
        if option.defname == name:
            # a word that is not reserved, such as off, comes as the name of a type
            value: t.Any = option.arg
            if isinstance(value, ast.TypeName) and value.names:
                value = value.names[-1]
            written = [getattr(value, kind) for kind in ("sval", "ival", "boolval") if hasattr(value, kind)]
            return not written or str(written[0]).lower() not in ("false", "off", "0")
    return default
