# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files that are one transaction: applied whole with their ledger row, or not at all, and tried again."""

from __future__ import annotations

import time
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import reset
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import REPEATABLE, MigrationFile
from ansible_collections.settler.runbook.plugins.module_utils._lock import HOLDS_KEY, lock_is_gone
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import pq, psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._run import RETRYABLE, Applied, one_of
from ansible_collections.settler.runbook.plugins.module_utils._work import (
    StatementError,
    VerifyError,
    Work,
    broke_at_commit,
    give_up_transaction,
    record_failure,
    verify,
)

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Script

#: Opens a file's transaction in one round trip: the last row has what the engine must know.
#: The role is taken last, because what stands before it is for the login.
_OPEN: t.LiteralString = (
    "BEGIN; SELECT pg_current_xact_id()::text, "  # noqa: S608 - constants
    "EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = pg_backend_pid() AND "
    + HOLDS_KEY.replace("%(key)s", "{key}")
    + "), pg_current_wal_insert_lsn()::text{restore_point}; "
    "SET lock_timeout = {lock_timeout}; SET statement_timeout = {statement_timeout}{role}"
)  # fmt: skip


def apply(work: Work, script: Script) -> Applied:
    """Apply one file; where another session holds a lock, give way, wait and try the whole file again.

    Raises:
        RunbookError: the file failed and left nothing; or it has ended the engine's transaction.
    """
    work.outcome.blockers = []
    for attempt in range(1, work.options.lock_attempts + 1):
        try:
            return _attempt(work, script, attempt)
        except StatementError as failure:
            give_up_transaction(work.connection)
            _assert_not_committed(work.connection, failure.transaction, script.file)
            blocked = failure.error.sqlstate in RETRYABLE
            if blocked:
                work.outcome.blockers = work.watch.blockers
            if not blocked or attempt == work.options.lock_attempts:
                record_failure(work, script, failure.as_event())
                raise failure.explain(script, work.outcome) from failure.error
            work.watch.note(f"attempt {attempt} of {work.options.lock_attempts} gave way to another session's lock")
            work.pause(attempt)
        except VerifyError as failure:
            give_up_transaction(work.connection)
            record_failure(work, script, {"line": failure.question.line, "message": failure.text})
            raise failure.explain(work.outcome, f"{script.file.file} was rolled back and left nothing") from failure
    raise AssertionError("unreachable: lock_attempts is at least 1")


def _attempt(work: Work, script: Script, attempt: int) -> Applied:
    """Apply one file with its ledger row in one transaction."""
    started = time.monotonic()
    file, connection, ledger = script.file, work.connection, work.ledger
    transaction, lsn, restore_point = _open(work, script)
    for number, statement in enumerate(script.statements, 1):
        try:
            with work.watch.statement(statement, number, len(script.statements)):
                connection.execute(statement.text.encode())
        except psycopg.Error as error:
            raise StatementError(error, statement, transaction) from error
    if connection.info.transaction_status != pq.TransactionStatus.INTRANS:
        give_up_transaction(connection)
        raise _ended_its_transaction(file)
    verify(work, script)
    duration = int((time.monotonic() - started) * 1000)
    try:
        # The file may have changed role or search_path for itself; the ledger is written as its owner.
        connection.execute(_as_owner(work))
        if not ledger.is_known_current:
            ledger.create()
        now, touched = ledger.record(
            file,
            "applied",
            run_id=work.options.run_id,
            job_id=work.options.job_id,
            duration_ms=duration,
            statements=len(script.statements),
            attempts=attempt,
            lsn_before=lsn,
            restore_point=restore_point,
            detail={"again": True} if file.kind == REPEATABLE else None,
        )
        if now != transaction:
            give_up_transaction(connection)
            raise _ended_its_transaction(file)
        connection.execute("COMMIT")
    except psycopg.OperationalError as error:
        if connection.closed:
            raise broke_at_commit(script) from error
        raise StatementError(error, None, transaction) from error
    except psycopg.Error as error:  # a deferred constraint
        raise StatementError(error, None, transaction) from error
    ledger.is_known_current = True
    work.touched.update(touched)
    return Applied(
        file.file,
        file.version,
        file.checksum,
        len(script.statements),
        duration,
        attempt,
        file.kind,
        changes=file.directives.changes,
    )


def _open(work: Work, script: Script) -> tuple[str, str, str | None]:
    """Begin the transaction of a file; returns its id, the position in the log, the name of the restore point."""
    connection = work.connection
    name = f"runbook:{work.options.run_id}:{script.file.file}"[:63] if work.restore_points else None
    lock_timeout, statement_timeout = work.timeouts(script)
    role = work.role_of(script)
    query = sql.SQL(_OPEN).format(
        key=sql.Literal(work.key),
        restore_point=sql.SQL(", pg_create_restore_point({})").format(sql.Literal(name)) if name else sql.SQL(""),
        lock_timeout=sql.Literal(lock_timeout),
        statement_timeout=sql.Literal(statement_timeout),
        role=sql.SQL("; SET ROLE {}").format(sql.Identifier(role)) if role else sql.SQL(""),
    )
    try:
        reset(connection)  # on its own: a transaction takes its defaults from before it begins
        cursor = connection.execute(query)
    except psycopg.Error as error:
        raise RunbookError(f"{script.file.path}: the transaction could not be opened: {error}") from error
    row: tuple[t.Any, ...] = ()
    for result in cursor.results():
        if result.description:
            row = result.fetchone() or row
    if not row[1]:
        give_up_transaction(connection)
        raise lock_is_gone()
    return row[0], row[2], name


def _as_owner(work: Work) -> sql.Composed:
    """Return the statements that turn back to the ledger's owner inside the file's transaction."""
    role = work.options.role
    return sql.SQL("RESET SESSION AUTHORIZATION; RESET ROLE{}").format(
        sql.SQL("; SET ROLE {}").format(sql.Identifier(role)) if role else sql.SQL("")
    )


def _assert_not_committed(connection: psycopg.Connection[t.Any], transaction: str, file: MigrationFile) -> None:
    """Make sure that a file that failed has not committed a part of itself where the parser could not see it."""
    if not connection.closed and one_of(connection, "SELECT pg_xact_status(%s::xid8)", transaction) == "committed":
        raise _ended_its_transaction(file)


def _ended_its_transaction(file: MigrationFile) -> RunbookError:
    return RunbookError(
        f"{file.path}: the file ended its transaction; what stood before that is committed, "
        "and the ledger has no row for it",
        hint="Remove COMMIT and ROLLBACK from the file, see what it left, then run again.",
    )
