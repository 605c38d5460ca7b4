# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The engine: applies pending files, each in one transaction, under an advisory lock, into the ledger."""

from __future__ import annotations

import contextlib
import random
import time
import typing as t
from dataclasses import dataclass, field

from ansible_collections.settler.runbook.plugins.module_utils._connection import reset, set_role
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, describe, hint_for
from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile, line_at
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger, lock_key
from ansible_collections.settler.runbook.plugins.module_utils._plan import Plan, plan
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import dict_row, pq, psycopg
from ansible_collections.settler.runbook.plugins.module_utils._statements import Script, Statement, parse

#: Another session stood in the way: the file was rolled back and may be tried again.
RETRYABLE = frozenset({"55P03", "40P01"})

_BLOCKERS = """
SELECT blocker.pid, blocker.usename, blocker.application_name, blocker.state,
       extract(epoch FROM clock_timestamp() - blocker.xact_start)::int AS seconds, left(blocker.query, 120) AS query
FROM pg_catalog.pg_locks held
JOIN pg_catalog.pg_stat_activity blocker ON blocker.pid = held.pid
WHERE held.granted AND held.pid <> pg_backend_pid() AND held.locktype = 'relation'
  AND held.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND held.relation >= 16384
GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 5 DESC NULLS LAST LIMIT 5
"""

_LOCK_HOLDERS = """
SELECT a.pid, a.usename, a.application_name, a.client_addr::text,
       extract(epoch FROM clock_timestamp() - a.backend_start)::int AS seconds, a.state, left(a.query, 120) AS query
FROM pg_catalog.pg_locks l
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND l.classid = ((%(key)s::bigint >> 32) & 4294967295)::oid AND l.objid = (%(key)s::bigint & 4294967295)::oid
"""


@dataclass(frozen=True)
class Options:
    """How to run. Times are in seconds."""

    run_id: str
    project: str = "settler"
    schema: str = "runbook"
    role: str | None = None
    lock_wait: float = 60.0
    lock_timeout: float = 2.0
    lock_attempts: int = 10
    out_of_order: bool = False


@dataclass
class Applied:
    """One file that was applied."""

    file: str
    version: str
    checksum: str
    statements: int
    duration_ms: int
    attempts: int


@dataclass
class Outcome:
    """What a run did; filled while it goes, so that a failure can say how far it came."""

    applied: list[Applied] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    blockers: list[dict[str, t.Any]] = field(default_factory=list)


def migrate(
    connection: psycopg.Connection[t.Any],
    files: t.Sequence[MigrationFile],
    options: Options,
    outcome: Outcome,
) -> None:
    """Apply what is pending.

    Raises:
        RunbookError: the plan is refused, another run holds the lock, or a file failed; what was applied before
            is in C(outcome).
    """
    ledger = Ledger(connection, options.schema)
    with run_lock(connection, options) as held:
        set_role(connection, options.role)
        todo = plan(files, ledger.rows(), out_of_order=options.out_of_order)
        scripts = [parse(file) for file in todo.pending]  # all of them, before the first one changes anything
        for script in scripts:
            if script.warning:
                outcome.warnings.append(script.warning)
        for script in scripts:
            held()
            outcome.applied.append(_apply_with_retries(connection, ledger, script, options, outcome))


def pending_plan(
    connection: psycopg.Connection[t.Any] | None, files: t.Sequence[MigrationFile], options: Options
) -> Plan:
    """Return the plan without a lock and without a write; no connection means no database: everything is pending."""
    rows = Ledger(connection, options.schema).rows() if connection else []
    return plan(files, rows, out_of_order=options.out_of_order)


@contextlib.contextmanager
def run_lock(connection: psycopg.Connection[t.Any], options: Options) -> t.Iterator[t.Callable[[], None]]:
    """Hold the run's advisory lock; yields a function that asserts that it is still held.

    The lock is polled: waiting inside pg_advisory_lock would deadlock with the holder's CREATE INDEX CONCURRENTLY.
    """
    oid = _one(connection, "SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()")
    key = lock_key(oid, options.project)
    deadline = time.monotonic() + options.lock_wait
    while not _one(connection, "SELECT pg_try_advisory_lock(%s)", key):
        if time.monotonic() > deadline:
            raise RunbookError(
                f"another run holds this database's lock; waited {options.lock_wait:g} s: "
                + "; ".join(_holder(row) for row in _rows(connection, _LOCK_HOLDERS, {"key": key})),
                hint="Wait for it. If its runner is dead, its last statement still works: "
                "SELECT pg_terminate_backend(<pid>) ends it and rolls its file back.",
            )
        time.sleep(random.uniform(0.05, 0.25))  # noqa: S311 - jitter, no secret

    def held() -> None:
        me = connection.info.backend_pid
        if not any(row["pid"] == me for row in _rows(connection, _LOCK_HOLDERS, {"key": key})):
            raise RunbookError("the run's advisory lock is gone; stopped before the next file", hint="Run again.")

    try:
        yield held
    finally:
        if not connection.closed and connection.info.transaction_status == pq.TransactionStatus.IDLE:
            reset(connection)
            connection.execute("SELECT pg_advisory_unlock(%s)", [key])


def _apply_with_retries(
    connection: psycopg.Connection[t.Any], ledger: Ledger, script: Script, options: Options, outcome: Outcome
) -> Applied:
    """Apply one file; where another session holds a lock, give way, wait and try the whole file again."""
    for attempt in range(1, options.lock_attempts + 1):
        try:
            return _apply(connection, ledger, script, options, attempt)
        except _StatementError as failure:
            _give_up_transaction(connection)
            _assert_not_committed(connection, failure.transaction, script.file)
            blocked = failure.error.sqlstate in RETRYABLE
            if blocked:
                reset(connection)  # as the login: it may see the sessions of more roles than the owner
                outcome.blockers = _rows(connection, _BLOCKERS)
            if not blocked or attempt == options.lock_attempts:
                _record_failure(connection, ledger, script, failure, options)
                raise failure.explain(script, outcome) from failure.error
            time.sleep(min(0.2 * 2 ** (attempt - 1), 5.0) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
    raise AssertionError("unreachable: lock_attempts is at least 1")


class _StatementError(Exception):
    """PostgreSQL refused a statement, or the COMMIT after the last one."""

    def __init__(self, error: psycopg.Error, statement: Statement | None, transaction: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.statement = statement
        self.transaction = transaction

    def explain(self, script: Script, outcome: Outcome) -> RunbookError:
        """Say it for the operator: file, line, statement, PostgreSQL's words, the state of the database."""
        path = script.file.path
        if self.statement:
            line = self.line
            head = f"{path}:{line}: {describe(self.error)}\n  statement: {self.statement.first_line}"
        else:
            line = 0
            head = f"{path}: COMMIT failed, all statements had succeeded: {describe(self.error)}"
        done = ", ".join(applied.file for applied in outcome.applied) or "no file"
        blockers = [f"  blocked by: {_holder(row)}" for row in outcome.blockers]
        state = f"  state: {script.file.file} was rolled back and left nothing; this run had applied {done} before it"
        return RunbookError(
            "\n".join([head, *blockers, state]),
            hint=hint_for(self.error.sqlstate) or "Correct the file and run again.",
            file=str(path),
            line=line,
            statement=self.statement.first_line if self.statement else "COMMIT",
            sqlstate=self.error.sqlstate or "",
            detail=self.error.diag.message_detail or "",
        )

    @property
    def line(self) -> int:
        """Line of the error in the file: PostgreSQL's position where it gives one, else the statement's first."""
        assert self.statement is not None
        position = self.error.diag.statement_position
        inside = line_at(self.statement.text, int(position) - 1) - 1 if position else 0
        return self.statement.line + inside


def _apply(
    connection: psycopg.Connection[t.Any], ledger: Ledger, script: Script, options: Options, attempt: int
) -> Applied:
    """Apply one file with its ledger row in one transaction."""
    started = time.monotonic()
    file = script.file
    reset(connection)
    set_role(connection, options.role)
    connection.execute("SELECT set_config('lock_timeout', %s, false)", [f"{options.lock_timeout * 1000:.0f}ms"])
    connection.execute("BEGIN")
    transaction, lsn = _rows(
        connection, "SELECT pg_current_xact_id()::text AS xid, pg_current_wal_insert_lsn()::text AS lsn"
    )[0].values()
    for statement in script.statements:
        try:
            connection.execute(statement.text.encode())
        except psycopg.Error as error:
            raise _StatementError(error, statement, transaction) from error
    _assert_same_transaction(connection, transaction, file)
    duration = int((time.monotonic() - started) * 1000)
    try:
        # The file may have changed role or search_path for itself; the ledger is written as its owner.
        connection.execute("RESET SESSION AUTHORIZATION; RESET ROLE")
        set_role(connection, options.role)
        ledger.create()
        ledger.record_applied(
            file,
            run_id=options.run_id,
            duration_ms=duration,
            statements=len(script.statements),
            attempts=attempt,
            lsn_before=lsn,
        )
        connection.execute("COMMIT")
    except psycopg.OperationalError as error:
        if connection.closed:
            raise RunbookError(
                f"{file.path}: the connection broke at COMMIT: whether the file was applied is for the ledger to say",
                hint="Run again: what was committed is in the ledger and will not be repeated.",
                ambiguous=True,
            ) from error
        raise _StatementError(error, None, transaction) from error
    except psycopg.Error as error:  # a deferred constraint
        raise _StatementError(error, None, transaction) from error
    return Applied(file.file, file.version, file.checksum, len(script.statements), duration, attempt)


def _assert_same_transaction(connection: psycopg.Connection[t.Any], transaction: str, file: MigrationFile) -> None:
    """Make sure that the file has not ended the engine's transaction behind its back."""
    in_transaction = connection.info.transaction_status == pq.TransactionStatus.INTRANS
    if not in_transaction or _one(connection, "SELECT pg_current_xact_id()::text") != transaction:
        _give_up_transaction(connection)
        raise _ended_its_transaction(file)


def _assert_not_committed(connection: psycopg.Connection[t.Any], transaction: str, file: MigrationFile) -> None:
    """Make sure that a file that failed has not committed a part of itself where the parser could not see it."""
    if not connection.closed and _one(connection, "SELECT pg_xact_status(%s::xid8)", transaction) == "committed":
        raise _ended_its_transaction(file)


def _ended_its_transaction(file: MigrationFile) -> RunbookError:
    return RunbookError(
        f"{file.path}: the file ended its transaction; what stood before that is committed, "
        "and the ledger has no row for it",
        hint="Remove COMMIT and ROLLBACK from the file, see what it left, then run again.",
    )


def _give_up_transaction(connection: psycopg.Connection[t.Any]) -> None:
    """Roll back; a connection on which that is not possible is closed, and the server rolls back."""
    if not connection.closed:
        try:
            connection.execute("ROLLBACK")
        except psycopg.Error:
            connection.close()


def _record_failure(
    connection: psycopg.Connection[t.Any],
    ledger: Ledger,
    script: Script,
    failure: _StatementError,
    options: Options,
) -> None:
    """Write the failed event. A first run that fails leaves the database without a ledger, as it was."""
    if connection.closed:
        return
    reset(connection)
    set_role(connection, options.role)
    if ledger.exists():
        ledger.record_event(
            "failed",
            run_id=options.run_id,
            file=script.file.file,
            line=failure.line if failure.statement else 0,
            sqlstate=failure.error.sqlstate or "",
            message=failure.error.diag.message_primary or str(failure.error),
        )


def _rows(
    connection: psycopg.Connection[t.Any], query: t.LiteralString, parameters: t.Any = None
) -> list[dict[str, t.Any]]:
    """Return all rows as dictionaries."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()


def _one(connection: psycopg.Connection[t.Any], query: str, *parameters: t.Any) -> t.Any:
    """Return the one value of a query."""
    arguments = parameters[0] if parameters and isinstance(parameters[0], dict) else list(parameters)
    row = connection.execute(query, arguments or None).fetchone()
    assert row is not None
    return row[0]


def _holder(row: t.Mapping[str, t.Any]) -> str:
    """Describe a session that stands in the way."""
    return (
        f"pid {row['pid']} ({row['usename']}, {row['application_name'] or 'no application name'}, {row['state']}, "
        f"{row['seconds']} s): {' '.join((row['query'] or '').split())}"
    )
