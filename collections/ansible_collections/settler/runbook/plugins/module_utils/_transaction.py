# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files that are one transaction: applied whole with their ledger row, or not at all, and tried again."""

from __future__ import annotations

import functools
import time
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import literal, reset_call
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import REPEATABLE, MigrationFile
from ansible_collections.settler.runbook.plugins.module_utils._lock import HOLDS_KEY, lock_is_gone
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import pq, psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._run import RETRYABLE, Applied, one_of
from ansible_collections.settler.runbook.plugins.module_utils._work import (
    Opened,
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

#: Opens a file's transaction in one round trip: the row has what the engine must know.
#: The role is taken last, because what stands before it is for the login.
_OPEN: t.LiteralString = (
    "BEGIN; SELECT pg_current_xact_id()::text, "
    + HOLDS_KEY.replace("%(key)s", "{key}")
    + ", pg_current_wal_insert_lsn()::text, set_config('lock_timeout', {lock_timeout}, false), "
    "set_config('statement_timeout', {statement_timeout}, false)"
)

#: Goes first: fails, with words that come from nowhere else, in any other transaction than the file's own.
_ENDED = "runbook: this is another transaction: "
_SAME = (
    "SELECT CASE pg_catalog.pg_current_xact_id()::text WHEN '%d' THEN true "
    f"ELSE ('{_ENDED}' || pg_catalog.pg_current_xact_id()::text)::boolean END"
).encode()
#: The server writes its log in order. So only the last commit of a row of files waits for the disk: a crash before it
#: takes away the last files together with their ledger rows, and the next run applies them.
_COMMIT_LATER = b"SET LOCAL synchronous_commit = off"
_COMMIT_NOW = b"SET LOCAL synchronous_commit TO DEFAULT"


def apply(work: Work, script: Script, following: Script | None = None) -> Applied:
    """Apply one file; where another session holds a lock, give way, wait and try the whole file again.

    The transaction of the C(following) file, which must be one as well, is opened in the round trip of the COMMIT.

    Raises:
        RunbookError: the file failed and left nothing; or it has ended the engine's transaction.
    """
    work.outcome.blockers = []
    for attempt in range(1, work.options.lock_attempts + 1):
        try:
            return _attempt(work, script, attempt, following)
        except StatementError as failure:
            give_up_transaction(work.connection)
            _assert_not_committed(work.connection, failure.transaction, script.file)
            blocked = failure.error.sqlstate in RETRYABLE
            if blocked:
                work.outcome.blockers = work.watch.blockers
            if not blocked or attempt == work.options.lock_attempts:
                record_failure(work, script, failure.as_event())
                raise failure.explain(script, work.outcome, _state(work, script)) from failure.error
            work.give_way(attempt)
        except VerifyError as failure:
            give_up_transaction(work.connection)
            if failure.sqlstate in RETRYABLE and attempt < work.options.lock_attempts:
                work.give_way(attempt, f"verifying, line {failure.question.line}: ")
                continue
            work.outcome.blockers = list(failure.blockers)
            record_failure(work, script, {"line": failure.question.line, "message": failure.text})
            raise failure.explain(work.outcome, f"{script.file.file} was rolled back and left nothing") from failure
    raise AssertionError("unreachable: lock_attempts is at least 1")


def _state(work: Work, script: Script) -> str:
    """Say what has become of the file, and of those before it where nobody is left to make their commits last."""
    if work.connection.closed and work.unflushed:
        return (
            f"the connection is gone and the server rolls {script.file.file} back; if it has crashed, the files right "
            "before it may be gone together with their ledger rows, and the next run applies them"
        )
    return f"{script.file.file} was rolled back and left nothing"


def _attempt(work: Work, script: Script, attempt: int, following: Script | None) -> Applied:
    """Apply one file with its ledger row in one transaction."""
    started = time.monotonic()
    file, connection, ledger = script.file, work.connection, work.ledger
    opened = _open(work, script)
    transaction, cursor = opened.transaction, connection.cursor()
    for number, statement in enumerate(script.statements, 1):
        try:
            with work.watch.statement(statement, number, len(script.statements)):
                cursor.execute(statement.text.encode())
        except psycopg.Error as error:
            raise StatementError(error, statement, transaction) from error
    if connection.info.transaction_status != pq.TransactionStatus.INTRANS:
        give_up_transaction(connection)
        raise _ended_its_transaction(file)
    verify(work, script)
    duration = int((time.monotonic() - started) * 1000)
    try:
        if not ledger.is_known_current:
            connection.execute(_as_owner(connection, work.options.role))
            ledger.create()
        record = ledger.recording(
            file,
            "applied",
            run_id=work.options.run_id,
            job_id=work.options.job_id,
            duration_ms=duration,
            statements=len(script.statements),
            attempts=attempt,
            lsn_before=opened.lsn,
            restore_point=opened.restore_point,
            detail={"again": True} if file.kind == REPEATABLE else None,
            touched=work.options.analyze or work.options.refresh,
        )
        _commit(work, record, transaction, following)
    except psycopg.OperationalError as error:
        if connection.closed:
            raise broke_at_commit(work, script, transaction) from error
        raise StatementError(error, None, transaction) from error
    except psycopg.Error as error:
        if _is_other(error):
            give_up_transaction(connection)
            raise _ended_its_transaction(file) from error
        # a deferred constraint
        raise StatementError(error, None, transaction) from error
    ledger.is_known_current = True
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


def _open(work: Work, script: Script) -> Opened:
    """Return the transaction of a file: the one that the COMMIT before it has opened, or one that is opened now."""
    opened, work.opened = work.opened, None
    if opened is None:
        query, restore_point = _opening(work, script)
        try:
            work.connection.execute(
                reset_call(work.connection)
            )  # a transaction takes its defaults from before it begins
            opened = _opened(work.connection.execute(query), script, restore_point)
        except psycopg.Error as error:
            raise RunbookError(f"{script.file.path}: the transaction could not be opened: {error}") from error
    assert opened.file == script.file.file
    if not opened.held:
        give_up_transaction(work.connection)
        raise lock_is_gone()
    return opened


def _opening(work: Work, script: Script) -> tuple[bytes, str | None]:
    """Return the statements that begin the transaction of a file, and the name of the restore point."""
    gentle = bool(script.statements) and all(one.waits == "B" for one in script.statements)
    begin = _begin(work.connection, work.key, work.timeouts(script, "B" if gentle else "A"))
    role = _role(work.connection, work.role_of(script))
    name = work.restore_point_of(script)
    if name is None:
        return b"; ".join([begin, role]), None
    point = b", pg_create_restore_point(%b)" % literal(work.connection, name)
    return b"; ".join([begin + point, role]), name


@functools.lru_cache(maxsize=8)
def _begin(connection: psycopg.Connection[t.Any], key: int, timeouts: tuple[str, str]) -> bytes:
    """Compose what begins a transaction: the same for most files."""
    lock_timeout, statement_timeout = map(sql.Literal, timeouts)
    query = sql.SQL(_OPEN).format(key=sql.Literal(key), lock_timeout=lock_timeout, statement_timeout=statement_timeout)
    return query.as_bytes(connection)


def _opened(cursor: psycopg.Cursor[t.Any], script: Script, restore_point: str | None) -> Opened:
    """Return what M(_opening) has answered: its last result but one."""
    row = cursor.set_result(-2).fetchone()
    assert row is not None
    return Opened(script.file.file, row[0], row[2], restore_point, row[1])


def _commit(work: Work, record: bytes, transaction: str, following: Script | None) -> None:
    """Record the file and commit.

    In the same round trip the session is reset and the transaction of the file that is C(following) is opened. The
    reset has a transaction of its own: what follows takes its defaults from before it begins.
    """
    connection = work.connection
    how = _COMMIT_LATER if following else _COMMIT_NOW
    parts = [_SAME % int(transaction), _as_owner(connection, work.options.role), how, record, b"COMMIT"]
    restore_point = None
    if following:
        query, restore_point = _opening(work, following)
        parts += [b"BEGIN", _reset(connection), b"COMMIT", query]
    try:
        cursor = connection.execute(b"; ".join(parts))
        if following:
            work.opened = _opened(cursor, following, restore_point)
    except psycopg.Error as error:
        # What failed after the COMMIT is no failure of this file: the next one tries on its own, and says so.
        if connection.closed or _is_other(error) or not _is_committed(connection, transaction):
            raise
    work.unflushed = following is not None


def _is_other(error: psycopg.Error) -> bool:
    """Tell whether M(_SAME) failed."""
    return _ENDED in (error.diag.message_primary or "")


def _as_owner(connection: psycopg.Connection[t.Any], role: str | None) -> bytes:
    """Return the two statements that turn back to the ledger's owner inside the file's transaction."""
    return b"RESET SESSION AUTHORIZATION; " + _role(connection, role)


@functools.lru_cache(maxsize=8)
def _reset(connection: psycopg.Connection[t.Any]) -> bytes:
    return reset_call(connection).as_bytes(connection)


@functools.lru_cache(maxsize=8)
def _role(connection: psycopg.Connection[t.Any], role: str | None) -> bytes:
    """Return the command that takes a role: one in any case, so that what it stands among can be counted."""
    return sql.SQL("SET ROLE {}").format(sql.Identifier(role)).as_bytes(connection) if role else b"RESET ROLE"


def _assert_not_committed(connection: psycopg.Connection[t.Any], transaction: str, file: MigrationFile) -> None:
    """Make sure that a file that failed has not committed a part of itself where the parser could not see it."""
    if _is_committed(connection, transaction):
        raise _ended_its_transaction(file)


def _is_committed(connection: psycopg.Connection[t.Any], transaction: str) -> bool:
    """Tell whether a transaction is committed; gives up the one that is open."""
    give_up_transaction(connection)
    return not connection.closed and one_of(connection, "SELECT pg_xact_status(%s::xid8)", transaction) == "committed"


def _ended_its_transaction(file: MigrationFile) -> RunbookError:
    return RunbookError(
        f"{file.path}: the file ended its transaction; what stood before that is committed, "
        "and the ledger has no row for it",
        hint="Remove COMMIT and ROLLBACK from the file, see what it left, then run again.",
    )
