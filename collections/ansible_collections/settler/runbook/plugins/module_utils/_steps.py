# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files that cannot be one transaction: a journal entry a statement, probes around it, resumed where they stopped.

A statement that can run in a transaction runs in one, together with its journal entry: that is exact. For the others
the catalogue is asked what became of them.
"""

from __future__ import annotations

import time
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import reset, set_role
from ansible_collections.settler.runbook.plugins.module_utils._effects import ACCESS_SHARE, ROW_SHARE
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._ledger import text_checksum
from ansible_collections.settler.runbook.plugins.module_utils._probes import (
    Invalid,
    invalid_objects,
    invalid_target,
    is_partitioned,
    pending_detach,
    present,
    repair,
)
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._run import RETRYABLE, Applied, one_of
from ansible_collections.settler.runbook.plugins.module_utils._work import (
    StatementError,
    VerifyError,
    Work,
    give_up_transaction,
    record_failure,
    verify,
)

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Script, Statement

RUNNING, DONE, FAILED = "running", "done", "failed"


def begin(work: Work, script: Script) -> str:
    """Write the C(running) row of a file before it changes anything; returns the position in the log.

    One that is there already keeps its position and its restore point: they are of before the file.
    """
    restore_point = work.restore_point_of(script)
    if restore_point:
        work.close()
        reset(work.connection)  # the right to make one is the login's
        work.connection.execute("SELECT pg_create_restore_point(%s)", [restore_point])
    work.as_owner()
    if not work.ledger.is_known_current:
        work.ledger.create()
        work.ledger.is_known_current = True
    lsn: str = one_of(work.connection, "SELECT pg_current_wal_insert_lsn()::text")
    work.ledger.record(
        script.file,
        "",
        state=RUNNING,
        run_id=work.options.run_id,
        job_id=work.options.job_id,
        statements=len(script.statements),
        lsn_before=lsn,
        restore_point=restore_point,
    )
    return lsn


def finish(work: Work, script: Script, lsn: str, started: float, attempts: int, rows: int | None = None) -> Applied:
    """Ask the file's questions; turn its row to C(applied).

    Raises:
        RunbookError: a question has an answer; the statements stay done, and the next run asks again.
    """
    duration = int((time.monotonic() - started) * 1000)
    state = f"all statements of {script.file.file} are done and stay so; the file does not count as applied"
    work.settle(script)
    try:
        work.connection.execute("BEGIN")
        verify(work, script)
        work.connection.execute("COMMIT")
    except VerifyError as failure:
        give_up_transaction(work.connection)
        record_failure(work, script, {"line": failure.question.line, "message": failure.text})
        raise failure.explain(work.outcome, state) from failure
    work.as_owner()
    with work.connection.transaction():
        work.ledger.record(
            script.file,
            "applied",
            run_id=work.options.run_id,
            job_id=work.options.job_id,
            duration_ms=duration,
            statements=len(script.statements),
            attempts=attempts,
            lsn_before=lsn,
            detail={} if rows is None else {"rows": rows},
        )
    file, count = script.file, len(script.statements)
    return Applied(
        file.file, file.version, file.checksum, count, duration, attempts, file.kind, rows, file.directives.changes
    )


def apply(work: Work, script: Script) -> Applied:
    """Apply a file statement by statement, from the first one that is not done.

    Raises:
        RunbookError: a statement failed, what ran before was changed, or nobody can know whether one was done.
    """
    started = time.monotonic()
    work.outcome.blockers = []
    lsn = begin(work, script)
    journal = work.ledger.journal(script.file.file)
    _refuse_rewritten_past(script, journal)
    attempts = 1
    for number, statement in enumerate(script.statements, 1):
        entry = journal.get(number, {})
        if statement.session:
            continue  # each statement after it has it set anew
        if entry.get("state") == DONE or (entry.get("state") == RUNNING and _was_done(work, script, number, entry)):
            continue
        attempts = max(attempts, _run(work, script, number, entry))
    _refuse_invalid(work, script)
    applied = finish(work, script, lsn, started, attempts)
    work.touched.update(touched_by(work, script))
    return applied


def _refuse_rewritten_past(script: Script, journal: t.Mapping[int, t.Mapping[str, t.Any]]) -> None:
    """Raise if a statement that was done is no longer what it was."""
    for number, entry in journal.items():
        text = script.statements[number - 1].text if number <= len(script.statements) else ""
        if entry["state"] == DONE and entry["checksum"] != text_checksum(text):
            raise _is_rewritten(script, number, "done", entry)


def _is_rewritten(script: Script, number: int, state: str, entry: t.Mapping[str, t.Any]) -> RunbookError:
    return RunbookError(
        f"{script.file.path}: statement {number} was {state} by run {entry['run_id']} and has been changed since",
        hint="Bring it back as it was; correct only the statement that failed and those after it. To begin anew: "
        f"playbooks/repair.yml -e repair_file={script.file.file} -e repair_action=forget -e repair_reason=…",
    )


def _was_done(work: Work, script: Script, number: int, entry: t.Mapping[str, t.Any]) -> bool:
    """Find out what became of a statement that an earlier run has begun; tidy what it has left half made.

    Raises:
        RunbookError: the catalogue cannot tell.
    """
    statement = script.statements[number - 1]
    probe = statement.probe
    if not _autocommits(work, statement):
        return False  # its journal entry would be done if it were
    if entry["checksum"] != text_checksum(statement.text):
        raise _is_rewritten(script, number, "begun", entry)
    work.settle(script)
    if probe is None:
        raise RunbookError(
            f"{script.file.path}:{statement.line}: run {entry['run_id']} has begun this statement at "
            f"{entry['started_at']:%Y-%m-%d %H:%M:%S} and was stopped; nobody can know whether it was done\n"
            f"  statement: {statement.first_line}",
            hint=f"Look, then say it: playbooks/repair.yml -e repair_file={script.file.file} -e repair_reason=… with "
            "-e repair_action=done if it was, or -e repair_action=again if it was not.",
        )
    _tidy(work, script, statement, _noted(entry))
    if probe.kind == "detach" and pending_detach(work.connection, probe):
        return False
    there, wanted = present(work.connection, probe), probe.kind == "create index"
    if there is None or there is not wanted or entry["detail"].get("present") is wanted:
        return False
    _note(work, script, number, DONE)
    work.watch.note(f"statement {number}, line {statement.line}, was done by run {entry['run_id']}")
    return True


def _autocommits(work: Work, statement: Statement) -> bool:
    """Tell whether a statement has to run outside a transaction: REINDEX and CLUSTER of partitions have to, too."""
    may_run_again = statement.probe is not None and statement.probe.kind == "again"
    return (
        bool(statement.refuses) or statement.commits or (may_run_again and is_partitioned(work.connection, statement))
    )


def _noted(entry: t.Mapping[str, t.Any]) -> set[Invalid]:
    """Return what was half made before the first attempt at a statement."""
    return {Invalid(*one) for one in entry["detail"].get("invalid", [])}


def _run(work: Work, script: Script, number: int, entry: t.Mapping[str, t.Any]) -> int:
    """Run one statement, again if another session's lock stood in the way; returns the attempts."""
    statement = script.statements[number - 1]
    alone = _autocommits(work, statement)
    for attempt in range(1, work.options.lock_attempts + 1):
        before = _before(work, script, number, entry) if alone else set()
        try:
            _execute(work, script, number, alone=alone)
        except StatementError as failure:
            give_up_transaction(work.connection)
            blocked = failure.error.sqlstate in RETRYABLE
            if blocked:
                work.outcome.blockers = work.watch.blockers
            if work.connection.closed:
                raise _stopped(work, script, number, failure) from failure.error
            if alone:
                _tidy(work, script, statement, before)
            if not blocked or attempt == work.options.lock_attempts:
                _note(work, script, number, FAILED, {**failure.as_event(), "invalid": _listing(before)})
                record_failure(work, script, failure.as_event())
                raise _stopped(work, script, number, failure) from failure.error
            entry = {**entry, "detail": {"invalid": _listing(before)}}
            work.give_way(attempt, f"line {statement.line}: ")
        else:
            if alone:
                _refuse_leftovers(work, script, number, before)
                _note(work, script, number, DONE)
            return attempt
    raise AssertionError("unreachable: lock_attempts is at least 1")


def _refuse_leftovers(work: Work, script: Script, number: int, before: set[Invalid]) -> None:
    """Take away what a statement that succeeded, or an attempt before it, has left half made.

    Raises:
        RunbookError: it cannot be taken away, or it is what the statement was to make.
    """
    statement = script.statements[number - 1]
    work.settle(script)
    made = invalid_target(work.connection, statement.probe) if statement.probe else None
    left = set(invalid_objects(work.connection, statement)) - before
    if left:
        _tidy(work, script, statement, before)
        stays = set(invalid_objects(work.connection, statement)) - before
        if made or stays:
            _note(work, script, number, FAILED, {"invalid": _listing(before)})
            raise RunbookError(
                f"{script.file.path}:{statement.line}: succeeded, but left invalid: {_listed(stays or left)}",
                hint="Run again. If it stays so, another session drops or builds the same object.",
            )


def _before(work: Work, script: Script, number: int, entry: t.Mapping[str, t.Any]) -> set[Invalid]:
    """Look at the catalogue before a statement, make way for it, and journal both; returns what is invalid already."""
    statement = script.statements[number - 1]
    work.settle(script)
    probe = statement.probe
    if probe and (target := invalid_target(work.connection, probe)):
        # IF NOT EXISTS would find it, call that a success, and leave it as invalid as it is
        if not work.options.repair_invalid:
            raise RunbookError(
                f"{script.file.path}:{statement.line}: there is an {target} already, and it is invalid",
                hint="Drop it, or allow the engine to: migrate_repair_invalid=true.",
            )
        _repair(work, script, target)
    there = present(work.connection, probe) if probe else None
    if entry.get("state") == FAILED and probe and probe.kind == "create index":
        there = False  # what a failed attempt has left is tidied
    # what an attempt before this one has left, of this run or an earlier one, is still this statement's
    before = _noted(entry) if "invalid" in entry.get("detail", {}) else set(invalid_objects(work.connection, statement))
    detail = {"present": there, "invalid": _listing(before)}
    _note(work, script, number, RUNNING, detail)
    return before


def _execute(work: Work, script: Script, number: int, *, alone: bool) -> None:
    """Run one statement: alone, or in a transaction together with its journal entry."""
    statement = script.statements[number - 1]
    connection = work.connection
    work.settle(script, statement.waits)
    for setting in script.statements[: number - 1]:
        if setting.session:
            try:
                connection.execute(setting.text.encode())
            except psycopg.Error as error:
                raise StatementError(error, setting) from error
    text: sql.Composed | bytes = statement.text.encode()
    if statement.probe and statement.probe.kind == "detach" and pending_detach(connection, statement.probe):
        parent, child = (sql.Identifier(*filter(None, name)) for name in statement.probe.names)
        text = sql.SQL("ALTER TABLE {} DETACH PARTITION {} FINALIZE").format(parent, child)
    try:
        if alone and statement.waits == "B":
            # what blocks nobody had better be finished when its runner dies
            connection.execute("SET client_connection_check_interval = 0")
        if not alone:
            connection.execute("BEGIN")
        with work.watch.statement(statement, number, len(script.statements)):
            connection.execute(text)
        if not alone:
            connection.execute("RESET SESSION AUTHORIZATION; RESET ROLE")
            set_role(connection, work.options.role)
            work.ledger.note(
                script.file.file, number, DONE, line=statement.line, text=statement.text, run_id=work.options.run_id
            )
            connection.execute("COMMIT")
    except psycopg.Error as error:
        raise StatementError(error, statement) from error


def _note(work: Work, script: Script, number: int, state: str, detail: t.Any = None) -> None:
    """Write a journal entry, as the ledger's owner."""
    statement = script.statements[number - 1]
    work.as_owner()
    work.ledger.note(
        script.file.file,
        number,
        state,
        line=statement.line,
        text=statement.text,
        run_id=work.options.run_id,
        detail=detail,
    )


def _tidy(work: Work, script: Script, statement: Statement, before: set[Invalid]) -> None:
    """Take away what a statement has left half made."""
    work.settle(script, "B")
    for leftover in sorted(set(invalid_objects(work.connection, statement)) - before):
        if leftover.kind != "partition":  # a half detached partition is finished by the statement itself
            _repair(work, script, leftover)


def _repair(work: Work, script: Script, leftover: Invalid) -> None:
    work.settle(script, "B")
    try:
        with work.watch.statement(None, 0, 0, f"dropping the invalid {leftover}"):
            repair(work.connection, leftover)
    except psycopg.Error as error:
        work.outcome.warnings.append(f"invalid {leftover} could not be dropped: {error.diag.message_primary}")
        return
    work.outcome.repaired.append(str(leftover))
    work.as_owner()
    work.ledger.record_event("repaired", run_id=work.options.run_id, file=script.file.file, dropped=str(leftover))


def _stopped(work: Work, script: Script, number: int, failure: StatementError) -> RunbookError:
    """Say how far the file came."""
    total = len(script.statements)
    if work.connection.closed:
        state = f"the connection broke in statement {number} of {total}; the next run finds out what became of it"
    else:
        state = f"{number - 1} of {total} statements of {script.file.file} are done; the next run goes on at this one"
    return failure.explain(script, work.outcome, state)


def _refuse_invalid(work: Work, script: Script) -> None:
    """Raise if an index that the file has made is invalid now."""
    work.settle(script)
    for number, statement in enumerate(script.statements, 1):
        if statement.probe and (target := invalid_target(work.connection, statement.probe)):
            _note(work, script, number, FAILED)
            raise RunbookError(
                f"{script.file.path}:{statement.line}: {target} is invalid; the file does not count as applied",
                hint="Run again: the engine builds it anew.",
            )


def touched_by(work: Work, script: Script) -> list[int]:
    """Return the OIDs of the relations that the statements name and do not only read, for the care after the run."""
    reading = (ACCESS_SHARE, ROW_SHARE)
    effects = [effect for one in script.statements for effect in one.effects if effect.lock not in reading]
    names = sorted({effect.relation for effect in effects})
    work.settle(script)
    query = "SELECT to_regclass(name)::oid::bigint FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NOT NULL"
    return [row[0] for row in work.connection.execute(query, [names])]


def _listed(objects: t.Iterable[Invalid]) -> str:
    return ", ".join(str(one) for one in sorted(objects))


def _listing(objects: t.Iterable[Invalid]) -> list[list[str]]:
    """Return objects as the journal has them."""
    return [[one.kind, one.schema, one.name] for one in sorted(objects)]
