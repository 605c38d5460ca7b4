# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Statements of a migration: split, located and judged by PostgreSQL's own parser (pglast)."""

from __future__ import annotations

import functools
import itertools
import re
import traceback
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._directives import Directives
from ansible_collections.settler.runbook.plugins.module_utils._effects import Effect, effects, lock_class, nodes
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import BATCH, REPEATABLE, MigrationFile, line_at
from ansible_collections.settler.runbook.plugins.module_utils._probes import Probe, probe_of
from ansible_collections.settler.runbook.plugins.module_utils._risks import Risk, risks

PGLAST_IMPORT_ERROR: str | None = None
try:
    import pglast
    from pglast import ast, enums
    from pglast.parser import ParseError

    _NEVER: tuple[type, ...] = (ast.CreatedbStmt, ast.DropdbStmt)
except ImportError:
    PGLAST_IMPORT_ERROR = traceback.format_exc()

#: A psql command, and one at the start of a line, where no SQL statement can begin.
_BACKSLASH = re.compile(r"(\\[a-z!?]+)", re.IGNORECASE)
_META_COMMAND = re.compile(rf"^\s*{_BACKSLASH.pattern}", re.IGNORECASE | re.MULTILINE)
#: What other tools' files mark their way back with; the engine would run it right after the way forward.
_DOWN_SECTION = re.compile(r"^--\s*(migrate:down|\+goose Down|//@UNDO)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Statement:
    """One statement: its text without comments around it, and the line (from 1) where it begins.

    C(refuses) names the command if PostgreSQL refuses it in a transaction block, C(commits) is set where it may end
    transactions itself, C(session) where it only sets something for the statements after it. C(probe) says how to
    find out in the catalogue whether it was done. C(effects) are the relations that it locks and changes, C(risks) what
    may be a hazard in a database where they have rows.
    """

    text: str
    line: int
    refuses: str = ""
    commits: bool = False
    session: bool = False
    waits: str = "A"
    probe: Probe | None = None
    effects: tuple[Effect, ...] = ()
    risks: tuple[Risk, ...] = ()

    @property
    def first_line(self) -> str:
        """The statement's first line, for messages."""
        return self.text.splitlines()[0].rstrip()


@dataclass(frozen=True)
class Script:
    """A parsed file: its statements, those of its C(.verify.sql), and what an operator should know of it.

    Of a batch file the one statement has $1 and $2 for the ends of the key range.
    """

    file: MigrationFile
    statements: tuple[Statement, ...]
    verify: tuple[Statement, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def allows(self) -> tuple[tuple[str, str], ...]:
        """Hazards that the file allows, with the reasons."""
        return self.file.directives.allows

    @property
    def transactional(self) -> bool:
        """Whether the file is one transaction."""
        return self.file.kind != BATCH and self.file.directives.transaction


#: Makes scripts of files, all or none.
Parser = t.Callable[[t.Sequence[MigrationFile]], list[Script]]


def parse_all(files: t.Sequence[MigrationFile]) -> list[Script]:
    """Parse files; the errors are those of M(parse)."""
    return [parse(file) for file in files]


def parse(file: MigrationFile) -> Script:
    """Split a file into statements and refuse what the engine cannot keep its promises for.

    Raises:
        RunbookError: a psql command, transaction control, COPY from standard input, a statement that cannot run
            in a transaction in a file that is one, an unknown directive; with file and line.
    """
    _check_directives(file)
    down = _DOWN_SECTION.search(file.text)
    if down:
        raise RunbookError(
            f"{file.path}:{line_at(file.text, down.start())}: {down[0].strip()}: a way back beside the way forward",
            hint="Another tool's marker: this engine would run both. Remove it and what follows; the way back is "
            "playbooks/rollback.yml or a new migration.",
        )
    text = _with_parameters(file) if file.kind == BATCH else file.text
    warnings: list[str] = []
    statements = tuple(_statements(file, text, warnings))
    if file.kind == BATCH:
        _refuse_batch(file, statements)
    checks = tuple(_statements(file.verify, file.verify.text, warnings)) if file.verify else ()
    if file.verify and not checks:
        raise RunbookError(
            f"{file.verify.path}:1: it asks nothing",
            hint="Write queries that return no row when all is well, or remove it.",
        )
    for check in checks:
        if check.refuses or check.session:
            raise RunbookError(
                f"{file.verify.path if file.verify else ''}:{check.line}: no question: {check.first_line}",
                hint="A .verify.sql has queries that return no row when all is well.",
            )
    return Script(file, statements, checks, tuple(warnings))


def _check_directives(file: MigrationFile) -> None:
    """Refuse directives that do not belong to this kind of file, and a batch file that lacks its own."""
    wanted = file.directives
    if file.kind == BATCH and not (wanted.batch_table and wanted.batch_key):
        raise RunbookError(
            f"{file.path}:1: a batch file must name its table and key",
            hint="Write: -- runbook: batch-table=public.jobs batch-key=id",
        )
    if file.kind != BATCH and (wanted.batch_table or wanted.batch_key):
        raise RunbookError(
            f"{file.path}:1: batch-table and batch-key belong to a file NNN_name.batch.sql", hint="Rename it."
        )
    if file.kind == REPEATABLE and wanted.phase:
        raise RunbookError(f"{file.path}:1: a repeatable file belongs to no phase", hint="Remove phase=….")
    if file.verify and file.verify.directives != Directives():
        raise RunbookError(
            f"{file.verify.path}:1: a directive in what only asks", hint=f"Directives stand at the head of {file.file}."
        )


def _statements(file: MigrationFile, text: str, warnings: list[str]) -> t.Iterator[Statement]:
    """Yield the statements of a text, each judged."""
    line, counted = 1, 0
    for start, end, node, unknown in _split(file, text):
        line, counted = line + text.count("\n", counted, start), start
        body = text[start:end].rstrip()
        if node is None:
            warnings.append(
                f"{file.file}:{line}: {unknown}: unknown to the parser's grammar "
                f"(PostgreSQL {pglast.parser.get_postgresql_version()[0]}); the statement is sent unchecked"
            )
            yield Statement(body, line, commits=True)  # nobody knows what it does
            continue
        statement = Statement(
            body,
            line,
            refuses=refuses_transaction(node),
            commits=isinstance(node, ast.CallStmt | ast.DoStmt),
            session=isinstance(node, ast.VariableSetStmt),
            waits=lock_class(node),
            probe=probe_of(node),
            effects=effects(node),
            risks=risks(node),
        )
        _refuse(file, statement, node)
        yield statement


def _split(file: MigrationFile, text: str) -> t.Iterator[tuple[int, int, t.Any, str]]:
    """Yield start, end, parse tree and, where there is none, the parser's complaint, for each statement."""
    try:
        tree = pglast.parse_sql(text)
    except ParseError as error:
        _refuse_meta_command(file, text, _offset(error), error)
        yield from _split_unknown(file, text, error)
        return
    for raw in tree:
        start = raw.stmt_location or 0
        yield start, start + raw.stmt_len if raw.stmt_len else len(text), raw.stmt, ""


def _split_unknown(file: MigrationFile, text: str, error: ParseError) -> t.Iterator[tuple[int, int, t.Any, str]]:
    """Isolate the statements that the grammar knows not: cut at semicolons, join again what only parses as one.

    The scanner knows strings, comments and quotes of any version; a body in BEGIN ATOMIC … END has semicolons too.
    """
    try:
        pieces = _pieces(text)
    except ParseError:  # not even the scanner can read it: the server has to judge the whole
        yield len(text) - len(text.lstrip()), len(text), None, error.args[0]
        return
    while pieces:
        start = pieces[0][0]
        parsed = ((end, _one_statement(text[start:end])) for _start, end in pieces)
        taken, (end, node) = next(
            ((number, found) for number, found in enumerate(parsed, 1) if found[1]), (1, (pieces[0][1], None))
        )
        if node is None:
            failure = _complaint(text[start:end])
            _refuse_meta_command(file, text, start + _offset(failure), failure)
            yield start, end, None, failure.args[0]
        else:
            yield start, end, node, ""
        del pieces[:taken]


def _pieces(text: str) -> list[tuple[int, int]]:
    """Return start and end of what stands between semicolons that are in no string, comment or parenthesis."""
    pieces: list[tuple[int, int]] = []
    begin, depth = -1, 0
    for token in pglast.parser.scan(text):
        depth += {"ASCII_40": 1, "ASCII_41": -1}.get(token.name, 0)
        if token.name == "ASCII_59" and depth <= 0:
            pieces += [(begin, token.start)] * (begin >= 0)
            begin, depth = -1, 0
        elif begin < 0 and not token.name.endswith("COMMENT"):
            begin = token.start
    return pieces + [(begin, len(text))] * (begin >= 0)


def _one_statement(text: str) -> t.Any:
    """Return the parse tree of a text that is one statement, or None."""
    try:
        tree = pglast.parse_sql(text)
    except ParseError:
        return None
    return tree[0].stmt if len(tree) == 1 else None


def _complaint(text: str) -> ParseError:
    """Return what the parser says of a text that it cannot parse."""
    try:
        pglast.parse_sql(text)
    except ParseError as error:
        return error
    return ParseError("several statements where one should be")


def _offset(error: ParseError) -> int:
    """Return where an error is; at the end of the input the parser gives no place."""
    return (error.args[1] or 0) if len(error.args) > 1 else 0


def _refuse_meta_command(file: MigrationFile, text: str, offset: int, error: ParseError) -> None:
    """Refuse a psql command on the line that the parser complains about; anything else is the server's to judge."""
    line = line_at(text, offset)
    # the parser's place counts characters of what it has read; a backslash there, or first on the line, is psql's
    here = _BACKSLASH.match(text, offset)
    for match in [*([here] if here else []), *_META_COMMAND.finditer(text)]:
        if line_at(text, match.start(1)) == line:
            raise RunbookError(
                f"{file.path}:{line}: psql command {match[1]}",
                hint="A migration is SQL for the server; commands of psql run in a shell of whoever runs it.",
            ) from error


def _with_parameters(file: MigrationFile) -> str:
    """Return a batch file's text with $1 for :from and $2 for :to."""
    text = file.text
    try:
        tokens = pglast.parser.scan(text)
    except ParseError as error:
        raise RunbookError(f"{file.path}:{line_at(text, _offset(error))}: {error.args[0]}") from error
    for colon, word in reversed(list(itertools.pairwise(tokens))):
        if colon.name == "ASCII_58" and word.name in _PARAMETERS and word.start == colon.end + 1:
            text = text[: colon.start] + _PARAMETERS[word.name] + text[word.end + 1 :]
    return text


_PARAMETERS = {"FROM": "$1", "TO": "$2"}


def _refuse_batch(file: MigrationFile, statements: t.Sequence[Statement]) -> None:
    """Refuse a batch file that is not one changing statement over a key range."""
    if len(statements) != 1 or not all(f"${number}" in statements[0].text for number in (1, 2)):
        raise RunbookError(
            f"{file.path}: a batch file is one statement that takes the key range :from to :to",
            hint="For instance: UPDATE jobs SET state = 'new' WHERE id BETWEEN :from AND :to AND state IS NULL;",
        )
    if re.match(r"(insert|update|delete|merge|with)\b", statements[0].text, re.IGNORECASE) is None:
        raise RunbookError(
            f"{file.path}:{statements[0].line}: neither INSERT, UPDATE, DELETE nor MERGE: {statements[0].first_line}"
        )


def _lets_backslashes_escape(node: t.Any) -> bool:
    """Tell whether a statement makes the server read strings otherwise than the parser has read them."""
    if not isinstance(node, ast.VariableSetStmt) or node.name != "standard_conforming_strings" or not node.args:
        return False
    value = node.args[0].val
    return str(getattr(value, "sval", None) or value.ival).lower() not in ("on", "true", "yes", "1")


def _refuse(file: MigrationFile, statement: Statement, node: t.Any) -> None:
    """Raise if a statement cannot be part of what the engine owns: its transactions, its session, its connection."""
    where = f"{file.path}:{statement.line}"
    if isinstance(node, ast.TransactionStmt):
        raise RunbookError(
            f"{where}: transaction control: {statement.first_line}",
            hint="The engine runs each file in one transaction of its own: remove the statement. What cannot run in "
            "one goes into a file that begins with -- runbook: no-transaction.",
        )
    if isinstance(node, ast.CopyStmt) and node.filename is None:
        raise RunbookError(
            f"{where}: COPY {'FROM STDIN' if node.is_from else 'TO STDOUT'}: {statement.first_line}",
            hint="A migration has no client to copy from or to: write INSERT … VALUES.",
        )
    if isinstance(node, _NEVER):
        raise RunbookError(
            f"{where}: {statement.refuses}: {statement.first_line}",
            hint="A migration changes the database that it runs in: databases are made by playbooks/setup.yml.",
        )
    if isinstance(node, ast.DiscardStmt) and statement.refuses:
        raise RunbookError(
            f"{where}: DISCARD ALL: {statement.first_line}",
            hint="It would give the run's lock away. The engine resets the session after each file.",
        )
    if _lets_backslashes_escape(node):
        raise RunbookError(
            f"{where}: with this nobody knows where the next statement ends: {statement.first_line}",
            hint="Write E'…' for a string in which a backslash escapes.",
        )
    if file.directives.transaction and file.kind != BATCH and statement.refuses:
        raise RunbookError(
            f"{where}: {statement.refuses} cannot run inside a transaction block: {statement.first_line}",
            hint="Put it into a file of its own that begins with the line: -- runbook: no-transaction",
        )
    if not file.directives.transaction and (what := _needs_the_session(node)):
        raise RunbookError(
            f"{where}: {what} is gone before the next statement: {statement.first_line}",
            hint="In a file without a transaction each statement has a new session. Write SET for a setting; "
            "put what belongs together into a file that is one transaction.",
        )
    if isinstance(node, ast.IndexStmt) and node.concurrent and not node.idxname:
        raise RunbookError(
            f"{where}: an index that is built CONCURRENTLY needs a name: {statement.first_line}",
            hint="Without one nobody can know after a kill whether it was built, and it would be built twice.",
        )
    if not file.directives.transaction and isinstance(node, ast.VariableSetStmt) and node.is_local:
        raise RunbookError(
            f"{where}: SET LOCAL outside a transaction does nothing: {statement.first_line}",
            hint="Write SET: the engine resets the session after the file.",
        )


def _needs_the_session(node: t.Any) -> str:
    """Name what a statement leaves in the session for the next one; empty if nothing, or if it is a SET."""
    if isinstance(node, ast.CreateStmt | ast.CreateTableAsStmt):
        made: t.Any = node.relation if isinstance(node, ast.CreateStmt) else node.into and node.into.rel
        return "a temporary table" if made.relpersistence == "t" else ""
    if isinstance(node, ast.SelectStmt):
        calls = [call for call in nodes(node.targetList, ast.FuncCall) if call.funcname[-1].sval == "set_config"]
        return "a setting by set_config" if calls else ""
    kinds: dict[type, str] = {
        ast.PrepareStmt: "a prepared statement",
        ast.DeclareCursorStmt: "a cursor",
        ast.ListenStmt: "LISTEN",
        ast.LockStmt: "a lock",
    }
    return kinds.get(type(node), "")


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
    subscribing = enums.AlterSubscriptionType
    refreshing = {
        subscribing.ALTER_SUBSCRIPTION_REFRESH,
        subscribing.ALTER_SUBSCRIPTION_SET_PUBLICATION,
        subscribing.ALTER_SUBSCRIPTION_ADD_PUBLICATION,
        subscribing.ALTER_SUBSCRIPTION_DROP_PUBLICATION,
    }
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
        ast.AlterSubscriptionStmt: (
            "ALTER SUBSCRIPTION that refreshes",
            lambda node: node.kind in refreshing and _option(node.options, "refresh", True),
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
