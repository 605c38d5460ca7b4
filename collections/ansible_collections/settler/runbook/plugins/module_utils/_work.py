# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all ways to apply a file share: the work at hand, a statement's failure, the questions of a C(.verify.sql)."""

from __future__ import annotations

import contextlib
import random
import time
import typing as t
from dataclasses import dataclass, field

from ansible_collections.settler.runbook.plugins.module_utils._connection import beside, reset, set_role
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, describe, hint_of
from ansible_collections.settler.runbook.plugins.module_utils._files import line_at
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
from ansible_collections.settler.runbook.plugins.module_utils._run import (
    RETRYABLE,
    Options,
    Outcome,
    describe_session,
    one_of,
)

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Script, Statement
    from ansible_collections.settler.runbook.plugins.module_utils._watch import Watch

_SHOWN_ROWS = 5


@dataclass(frozen=True)
class Opened:
    """The transaction of a file: its id, the position in the log, the name of the restore point.

    C(held) says whether the session held the run's lock when it was opened.
    """

    file: str
    transaction: str
    lsn: str
    restore_point: str | None
    held: bool


@dataclass
class Work:
    """What applying needs: the session, the ledger, the watch, the options, and what is known so far.

    C(key) is the run's lock, C(touched) has the OIDs of relations that a file has touched which is not one transaction
    (of others the ledger's row has them), C(restore_points) says whether the login may make them. C(opened) is the
    transaction of the file that comes next, if it is open, C(unflushed) says that the last commit has not waited for
    the disk. C(failed) says that a failure was recorded.
    """

    connection: psycopg.Connection[t.Any]
    ledger: Ledger
    options: Options
    outcome: Outcome
    watch: Watch
    key: int
    restore_points: bool = False
    touched: set[int] = field(default_factory=set)
    opened: Opened | None = None
    unflushed: bool = False
    failed: bool = False

    def role_of(self, script: Script) -> str | None:
        """Return the role that a file works as."""
        return script.file.directives.role or self.options.role

    def restore_point_of(self, script: Script) -> str | None:
        """Return the name of the restore point before a file, if the login may make one."""
        return f"runbook:{self.options.run_id}:{script.file.file}"[:63] if self.restore_points else None

    def settle(self, script: Script, waits: str = "A") -> None:
        """Give the session the settings of a file, with the lock timeout of a class of statements."""
        self.close()
        reset(self.connection)
        set_role(self.connection, self.role_of(script))
        timeouts = self.timeouts(script, waits)
        self.connection.execute(
            "SELECT set_config('lock_timeout', %s, false), set_config('statement_timeout', %s, false)", list(timeouts)
        )

    def timeouts(self, script: Script, waits: str = "A") -> tuple[str, str]:
        """Return lock_timeout and statement_timeout for a file, as PostgreSQL reads them."""
        wanted, options = script.file.directives, self.options
        default = options.lock_timeout if waits == "A" else options.long_lock_timeout
        lock = default if wanted.lock_timeout is None else wanted.lock_timeout
        whole = options.statement_timeout if wanted.statement_timeout is None else wanted.statement_timeout
        return f"{lock * 1000:.0f}ms", f"{whole * 1000:.0f}ms"

    def as_owner(self) -> None:
        """Forget the file's settings and work as the ledger's owner."""
        self.close()
        reset(self.connection)
        set_role(self.connection, self.options.role)

    def close(self) -> None:
        """Give up a transaction that was opened for a file which has not begun."""
        if self.opened:
            self.opened = None
            self.connection.execute("ROLLBACK")

    def flush(self) -> None:
        """Wait until all that was committed lasts."""
        if self.unflushed and not self.connection.closed:
            give_up_transaction(self.connection)
            # a commit waits for the disk if its transaction has written something to the log
            self.connection.execute("SELECT pg_logical_emit_message(true, 'runbook', 'flush')")
            self.unflushed = False

    def give_way(self, attempt: int, what: str = "") -> None:
        """Say to whom an attempt gave way, and wait before the next one."""
        who = "; ".join(describe_session(row) for row in self.watch.blockers) or "another session's lock"
        self.watch.note(f"{what}attempt {attempt} of {self.options.lock_attempts} gave way to {who}")
        time.sleep(pause(attempt))


def pause(attempt: int) -> float:
    """Return seconds to wait after an attempt, from 1 on: longer each time, at most 5, never in step with others."""
    return min(0.2 * 2.0 ** (attempt - 1), 5.0) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


class StatementError(Exception):
    """PostgreSQL refused a statement, or the COMMIT after the last one."""

    def __init__(self, error: psycopg.Error, statement: Statement | None, transaction: str = "") -> None:
        super().__init__(str(error))
        self.error = error
        self.statement = statement
        self.transaction = transaction

    def explain(self, script: Script, outcome: Outcome, state: str) -> RunbookError:
        """Say it for the operator: file, line, statement, PostgreSQL's words, the state of the database."""
        path = script.file.path
        if self.statement:
            line = self.line
            head = f"{path}:{line}: {describe(self.error)}\n  statement: {self.statement.first_line}"
        else:
            line = 0
            head = f"{path}: COMMIT failed, all statements had succeeded: {describe(self.error)}"
        done = ", ".join(applied.file for applied in outcome.applied) or "no file"
        blockers = [f"  blocked by: {describe_session(row)}" for row in outcome.blockers]
        return RunbookError(
            "\n".join([head, *blockers, f"  state: {state}; this run had applied {done} before it"]),
            hint=hint_of(self.error) or "Correct the file and run again.",
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

    def as_event(self) -> dict[str, t.Any]:
        """Return what the ledger's event says of it."""
        return {
            "line": self.line if self.statement else 0,
            "sqlstate": self.error.sqlstate or "",
            "message": self.error.diag.message_primary or str(self.error),
        }


def record_failure(work: Work, script: Script, detail: t.Mapping[str, t.Any]) -> None:
    """Write the failed event. A first run that fails leaves the database without a ledger, as it was.

    Where the session is broken, another one writes it; a server that is gone has no place for it.
    """
    work.failed = True
    with contextlib.ExitStack() as stack:
        connection = work.connection
        if connection.closed:
            stack.enter_context(contextlib.suppress(psycopg.Error, RunbookError))
            connection = stack.enter_context(_beside(work))
        else:
            give_up_transaction(connection)
            work.as_owner()
        ledger = Ledger(connection, work.options.schema)
        if ledger.exists():
            ledger.record_event("failed", run_id=work.options.run_id, file=script.file.file, **detail)


def verify(work: Work, script: Script) -> None:
    """Ask the questions of the file's C(.verify.sql), inside a transaction, without a trace.

    Raises:
        VerifyError: a question failed, or has an answer.
    """
    if not script.verify:
        return
    connection = work.connection
    connection.execute("SAVEPOINT runbook_verify; SET LOCAL transaction_read_only = on")
    for number, question in enumerate(script.verify, 1):
        try:
            with work.watch.statement(question, number, len(script.verify), f"verifying, line {question.line}"):
                cursor = connection.execute(question.text.encode())
        except psycopg.Error as error:
            blockers = work.watch.blockers if error.sqlstate in RETRYABLE else []
            raise VerifyError(
                script, question, describe(error), error.sqlstate or "", hint_of(error), blockers
            ) from error
        if cursor.description and (rows := cursor.fetchmany(_SHOWN_ROWS)):
            names = [column.name for column in cursor.description]
            shown = "\n".join(
                "  " + ", ".join(f"{name}={value}" for name, value in zip(names, row, strict=True)) for row in rows
            )
            raise VerifyError(script, question, f"{cursor.rowcount} rows where none should be\n{shown}")
    connection.execute("ROLLBACK TO SAVEPOINT runbook_verify; RELEASE SAVEPOINT runbook_verify")


class VerifyError(Exception):
    """The file did what it says, but its C(.verify.sql) is not content."""

    def __init__(
        self,
        script: Script,
        question: Statement,
        text: str,
        sqlstate: str = "",
        hint: str = "",
        blockers: t.Sequence[dict[str, t.Any]] = (),
    ) -> None:
        assert script.file.verify is not None
        super().__init__(text)
        self.path = script.file.verify.path
        self.question = question
        self.text = text
        self.sqlstate = sqlstate
        self.hint = hint
        self.blockers = blockers

    def explain(self, outcome: Outcome, state: str) -> RunbookError:
        """Say it for the operator."""
        done = ", ".join(applied.file for applied in outcome.applied) or "no file"
        blockers = [f"  blocked by: {describe_session(row)}" for row in self.blockers]
        return RunbookError(
            "\n".join(
                [
                    f"{self.path}:{self.question.line}: {self.text}",
                    f"  question: {self.question.first_line}",
                    *blockers,
                    f"  state: {state}; this run had applied {done} before it",
                ]
            ),
            hint=self.hint or "Correct the migration, or the question, and run again.",
            file=str(self.path),
            line=self.question.line,
            statement=self.question.first_line,
            sqlstate=self.sqlstate,
            detail="",
        )


def give_up_transaction(connection: psycopg.Connection[t.Any]) -> None:
    """Roll back; a connection on which that is not possible is closed, and the server rolls back."""
    if not connection.closed:
        try:
            connection.execute("ROLLBACK")
        except psycopg.Error:
            connection.close()


def broke_at_commit(work: Work, script: Script, transaction: str) -> RunbookError:
    """Return the error of a connection that broke at COMMIT; the ledger is asked, once, what became of the file."""
    state = ""
    with contextlib.suppress(psycopg.Error, RunbookError), _beside(work) as session:
        # an end first, then the row: a server that has crashed may have given the number to another transaction
        ended = one_of(session, "SELECT pg_xact_status(%s::xid8)", transaction) in ("committed", "aborted")
        rows = Ledger(session, work.options.schema).rows()
        mine = any((row.file, row.run_id) == (script.file.file, work.options.run_id) for row in rows)
        state = "the file is applied" if mine else "the file was rolled back and left nothing" if ended else ""
    return RunbookError(
        f"{script.file.path}: the connection broke at COMMIT: "
        + (state or "whether the file was applied is for the ledger to say"),
        hint="Run again: what was committed is in the ledger and will not be repeated.",
        ambiguous=not state,
    )


@contextlib.contextmanager
def _beside(work: Work) -> t.Iterator[psycopg.Connection[t.Any]]:
    """Open another session as the ledger's owner, for what is to be said of a broken one."""
    with beside(work.connection, f"runbook:{work.options.run_id}:note") as session:
        set_role(session, work.options.role)
        yield session
