# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The engine: applies pending files under the run's lock into the ledger, each in the way that it needs."""

from __future__ import annotations

import contextlib
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils import _batch, _steps, _transaction
from ansible_collections.settler.runbook.plugins.module_utils._aftercare import maintain
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    may_become,
    prove_primary,
    reset,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import BATCH, MigrationFile
from ansible_collections.settler.runbook.plugins.module_utils._hazards import FilePlan, assess, refuse_hazards
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._lock import key_of, run_lock
from ansible_collections.settler.runbook.plugins.module_utils._maintenance import refuse_broken_window
from ansible_collections.settler.runbook.plugins.module_utils._pending import refuse_copy, refuse_unexpected
from ansible_collections.settler.runbook.plugins.module_utils._plan import plan
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
from ansible_collections.settler.runbook.plugins.module_utils._run import (
    Applied,
    Options,
    Outcome,
    describe_session,
    one_of,
    rows_of,
)
from ansible_collections.settler.runbook.plugins.module_utils._statements import Parser, Script, parse_all
from ansible_collections.settler.runbook.plugins.module_utils._watch import Watch
from ansible_collections.settler.runbook.plugins.module_utils._work import Work, record_failure

_MAY_MAKE_RESTORE_POINTS = (
    "SELECT current_setting('wal_level') <> 'minimal' "
    "AND has_function_privilege('pg_catalog.pg_create_restore_point(text)', 'EXECUTE')"
)

#: Sessions of which the login may see no more than that they are there.
_HIDDEN = """
SELECT count(*) FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND usename IS NOT NULL AND backend_type IS NULL
"""

_OLD_TRANSACTIONS = """
SELECT pid, usename, application_name, state, extract(epoch FROM clock_timestamp() - xact_start)::int AS seconds,
       left(query, 120) AS query
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
  AND xact_start < clock_timestamp() - make_interval(secs => %(seconds)s)
UNION ALL
SELECT 0, owner, gid, 'prepared', extract(epoch FROM clock_timestamp() - prepared)::int,
       'COMMIT PREPARED or ROLLBACK PREPARED ends it'
FROM pg_catalog.pg_prepared_xacts
WHERE database = current_database() AND prepared < clock_timestamp() - make_interval(secs => %(seconds)s)
ORDER BY seconds DESC
"""


def migrate(
    connection: psycopg.Connection[t.Any],
    files: t.Sequence[MigrationFile],
    options: Options,
    outcome: Outcome,
    *,
    say: t.Callable[[str], None] | None = None,
    parser: Parser = parse_all,
) -> None:
    """Apply what is pending.

    Args:
        connection: a direct session of its own, in autocommit.
        files: all migrations, in order.
        options: how to run.
        outcome: filled while the run goes.
        say: takes lines of progress.
        parser: makes scripts of files; another one where they are parsed elsewhere.

    Raises:
        RunbookError: the plan is refused, another run holds the lock, or a file failed; what was applied before
            is in C(outcome).
    """
    prove_primary(connection)
    ledger = Ledger(connection, options.schema)
    with run_lock(connection, options, say) as held:
        restore_points = bool(one_of(connection, _MAY_MAKE_RESTORE_POINTS))
        set_role(connection, options.role)
        ledger.is_known_current = ledger.is_current()
        _know_the_copy(ledger, options)
        refuse_broken_window(connection, options.window)
        todo = plan(files, ledger.rows(), out_of_order=options.out_of_order, phase=options.phase)
        refuse_unexpected(todo, options)
        scripts = parser(todo.pending)  # all of them, before the first one changes anything
        outcome.warnings += [warning for script in scripts for warning in script.warnings]
        if scripts:
            refuse_hazards(assess(connection, scripts, options))
            outcome.warnings += _old_transactions(connection, options)
        with Watch(connection, options, outcome, say, _shortest_wait(scripts, options)) as watch:
            key = key_of(connection, options)
            work = Work(connection, ledger, options, outcome, watch, key, restore_points)
            try:
                _apply_all(work, scripts, held)
            except RunbookError:
                work.flush()
                if not options.window:  # a run in a window is taken back, and its time is the application's
                    with contextlib.suppress(psycopg.Error, RunbookError):
                        _take_care(work)
                raise
            _take_care(work)


def _take_care(work: Work) -> None:
    """Analyse and refresh what the files have touched; note who was ended for that."""
    ended = len(work.outcome.ended)
    try:
        maintain(work)
    finally:
        _record_ended(work, ended)


def _shortest_wait(scripts: t.Sequence[Script], options: Options) -> float:
    """Return the shortest lock_timeout of a run, in seconds; 0 where none ends."""
    own = [script.file.directives.lock_timeout for script in scripts]
    return min((wait for wait in [options.lock_timeout, *own] if wait), default=0.0)


def _old_transactions(connection: psycopg.Connection[t.Any], options: Options) -> list[str]:
    """Tell which transactions are so old that files are likely to wait for them; asked as the login, who sees more."""
    reset(connection)
    found = rows_of(connection, _OLD_TRANSACTIONS, {"seconds": options.long_transaction})
    hidden = one_of(connection, _HIDDEN)
    set_role(connection, options.role)
    told = [f"an open transaction may hold locks that a file waits for: {describe_session(row)}" for row in found]
    if hidden:
        told.append(
            f"{hidden} sessions in this database belong to roles that {connection.info.user} may not look at: long "
            "transactions of theirs are not told and no blocker policy ends them; GRANT pg_read_all_stats lets it"
        )
    return told


def _apply_all(work: Work, scripts: t.Sequence[Script], held: t.Callable[[], None]) -> None:
    """Apply one file after the other; C(held) asserts the run's lock before those that do not do so themselves."""
    for number, script in enumerate(scripts, 1):
        work.watch.file(script.file.file, number, len(scripts))
        ended = len(work.outcome.ended)
        try:
            if not script.transactional:
                held()
            work.outcome.applied.append(_apply(work, script, scripts[number] if number < len(scripts) else None))
            if work.touched:
                work.as_owner()
                work.ledger.record_touched(script.file.file, work.touched)
                work.touched.clear()
        except RunbookError as error:
            if not work.failed:
                with contextlib.suppress(psycopg.Error):
                    first, *_more = error.message.splitlines()
                    record_failure(work, script, {"sqlstate": _sqlstate_of(error), "message": first})
            raise
        finally:
            _record_ended(work, ended, script.file.file)


def _sqlstate_of(error: RunbookError) -> str:
    """Return the SQLSTATE of what a message was made of; empty where the engine itself refused."""
    cause = error.__cause__
    return (cause.sqlstate if isinstance(cause, psycopg.Error) else None) or ""


def _apply(work: Work, script: Script, following: Script | None) -> Applied:
    """Apply a file in the way that it needs; C(following) is the next one."""
    if script.transactional:
        return _transaction.apply(work, script, following if following and following.transactional else None)
    return _batch.apply(work, script) if script.file.kind == BATCH else _steps.apply(work, script)


def file_plans(
    connection: psycopg.Connection[t.Any] | None, scripts: t.Sequence[Script], options: Options
) -> tuple[FilePlan, ...]:
    """Return what pending files would do in this database, seen as the role that would do it where that may be."""
    if connection and scripts and may_become(connection, options.role):
        set_role(connection, options.role)
    return assess(connection, scripts, options)


def _know_the_copy(ledger: Ledger, options: Options) -> None:
    """Note that the ledger came along from elsewhere, where that is accepted."""
    origin = refuse_copy(ledger, options)
    if origin:
        if not ledger.is_known_current:
            ledger.create()
        ledger.adopt_copy(origin, run_id=options.run_id)


def _record_ended(work: Work, since: int, file: str | None = None) -> None:
    """Write down which sessions were ended for a file, or for the care after all of them."""
    ended = work.outcome.ended[since:]
    if not ended or work.connection.closed:
        return
    work.as_owner()
    if work.ledger.exists():
        for row in ended:
            work.ledger.record_event("blocker_ended", run_id=work.options.run_id, file=file, **row)
