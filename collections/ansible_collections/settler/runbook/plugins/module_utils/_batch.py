# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Batched backfill: one statement over key ranges, each in a short transaction together with how far it came.

The greatest key at the start bounds the work: rows with a greater one are new. A batch aims at a time; the next one is
made larger or smaller. Between batches the run makes room for standbys that lag and for transactions that hold the
horizon back.
"""

from __future__ import annotations

import math
import time
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import reset, set_role
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._ledger import text_checksum
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._run import (
    RETRYABLE,
    Applied,
    describe_session,
    one_of,
    rows_of,
)
from ansible_collections.settler.runbook.plugins.module_utils._steps import (
    DONE,
    FAILED,
    RUNNING,
    begin,
    finish,
    touched_by,
)
from ansible_collections.settler.runbook.plugins.module_utils._work import (
    StatementError,
    Work,
    give_up_transaction,
    record_failure,
)

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Script

_SMALLEST, _LARGEST = 1, 1_000_000
_THROTTLE_SECONDS = 1.0

_KEY = """
SELECT format_type(a.atttypid, a.atttypmod), k.typcategory IN ('N', 'D'), a.attnotnull,
    c.relforcerowsecurity OR (c.relrowsecurity AND NOT pg_has_role(current_user, c.relowner, 'MEMBER')),
    (SELECT rolsuper OR rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = current_user),
    EXISTS (SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
            JOIN pg_catalog.pg_am m ON m.oid = x.relam WHERE i.indrelid = c.oid AND i.indkey[0] = a.attnum
            AND i.indisvalid AND i.indpred IS NULL AND m.amname = 'btree')
FROM pg_catalog.pg_class c
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = %s AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_type k ON k.oid = a.atttypid
WHERE c.oid = to_regclass(%s)::oid
"""

#: The standby that lags most, if it lags too far.
_LAGGING = """
SELECT pid, application_name, coalesce(host(client_addr), 'local') AS address,
       extract(epoch FROM replay_lag)::int AS seconds
FROM pg_catalog.pg_stat_replication WHERE replay_lag > make_interval(secs => %s) ORDER BY replay_lag DESC LIMIT 1
"""

#: The oldest transaction of a session that is none of the run's, if it is too old.
_OLDEST = """
SELECT pid, usename, application_name, state, extract(epoch FROM clock_timestamp() - xact_start)::int AS seconds,
       left(query, 120) AS query
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
  AND application_name !~ '^runbook:' AND xact_start < clock_timestamp() - make_interval(secs => %s)
ORDER BY xact_start LIMIT 1
"""


def apply(work: Work, script: Script) -> Applied:
    """Apply a batch file from the first key that no run has done.

    Raises:
        RunbookError: the table or key cannot be used, the statement was changed half way, or it failed.
    """
    started = time.monotonic()
    work.outcome.blockers = []
    work.settle(script)
    warning = _check(work, script)
    lsn = begin(work, script)
    progress = _resume(work, script)
    if warning and progress["end"] is not None:
        work.outcome.warnings.append(warning)
    size = int(progress.get("size", script.file.directives.batch_size))
    before, began = dict(progress), time.monotonic()

    def tell() -> str:
        return told(progress, before, time.monotonic() - began)

    attempts = 1
    while progress["end"] is not None:
        seconds, tries = _batch(work, script, progress, size, tell)
        attempts = max(attempts, tries)
        if progress["finished"]:
            break
        size = resize(size, seconds, script.file.directives.batch_target)
        progress["size"] = size
        _make_room(work)
    _note(work, script, DONE, progress)
    applied = finish(work, script, lsn, started, attempts, rows=progress["rows"])
    work.touched.update(touched_by(work, script))
    return applied


def resize(size: int, seconds: float, target: float) -> int:
    """Return the size of the next batch: what would have met the target, at most twice, at least half as many."""
    wanted = size * target / max(seconds, 0.001)
    return int(min(max(wanted, size / 2, _SMALLEST), size * 2, _LARGEST))


def told(progress: t.Mapping[str, t.Any], before: t.Mapping[str, t.Any], seconds: float) -> str:
    """Say how many rows are changed, how fast, and how long the rest takes, as long as the estimate of it holds.

    Args:
        progress: C(rows) that were changed, C(keys) that were walked, C(total) of keys that there seem to be.
        before: the same, as earlier runs have left it.
        seconds: since then.
    """
    seconds = max(seconds, 0.001)
    keys, left = progress["keys"] - before["keys"], progress.get("total", 0) - progress["keys"]
    parts = [f"{progress['rows']:,} rows changed", f"{(progress['rows'] - before['rows']) / seconds:,.0f} a second"]
    if keys > 0 and left > 0:
        parts.append(f"about {left / keys * seconds:,.0f} s left")
    return ", ".join(parts)


def _check(work: Work, script: Script) -> str:
    """Refuse a table that batches cannot walk; return a warning if its keys, other than numbers and times, do not grow.

    Raises:
        RunbookError: no such table or key, a key that may be null or has no index, rows that the role cannot see.
    """
    wanted = script.file.directives
    row = work.connection.execute(_KEY, [wanted.batch_key, wanted.batch_table]).fetchone()
    where = f"{script.file.path}:1"
    if row is None:
        raise RunbookError(f"{where}: there is no table {wanted.batch_table}", hint="Name it with its schema.")
    kind, grows, not_null, hidden, bypasses, indexed = row
    if kind is None:
        raise RunbookError(f"{where}: {wanted.batch_table} has no column {wanted.batch_key}")
    if not not_null or not indexed:
        raise RunbookError(
            f"{where}: {wanted.batch_table}.{wanted.batch_key} {'has no index' if not_null else 'may be null'}",
            hint="Batches walk along a btree index of all rows beginning with a NOT NULL column: a primary key's.",
        )
    if hidden and not bypasses:
        raise RunbookError(
            f"{where}: row level security hides rows of {wanted.batch_table} from this role: "
            "the batches would change nothing and say nothing",
            hint="Work as a role with BYPASSRLS (-- runbook: role=…), or take FORCE off in a file before.",
        )
    if grows:
        return ""
    return (
        f"{script.file.file}: keys of type {kind} do not grow: rows that are inserted while the batches run are "
        "changed as well, if their key is still to come"
    )


def _resume(work: Work, script: Script) -> dict[str, t.Any]:
    """Return how far earlier runs came; a first run looks up where the keys end now, and about how many there are."""
    entry = work.ledger.journal(script.file.file).get(1)
    statement = script.statements[0]
    if entry and entry["detail"].get("end") is not None:
        if entry["checksum"] != text_checksum(statement.text):
            raise RunbookError(
                f"{script.file.path}:{statement.line}: run {entry['run_id']} has changed "
                f"{entry['detail']['rows']:,} rows with this file, and its statement has been changed since",
                hint="Bring it back as it was, or begin anew: playbooks/repair.yml "
                f"-e repair_file={script.file.file} -e repair_action=forget -e repair_reason=…",
            )
        work.watch.note(f"goes on after {entry['detail']['last']}: {entry['detail']['rows']:,} rows are done")
        return dict(entry["detail"])
    work.settle(script)
    table, key = _names(work, script)
    row = work.connection.execute(
        sql.SQL("SELECT {key}::text AS last FROM {table} ORDER BY {key} DESC LIMIT 1").format(key=key, table=table)
    ).fetchone()
    end = row[0] if row else None
    # of a table without statistics, and of its partitions, the planner judges by their size
    explained = work.connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(table)).fetchone()
    total = int(explained[0][0]["Plan"]["Plan Rows"]) if explained else 0
    progress = {
        "last": None, "end": end, "rows": 0, "keys": 0, "batches": 0, "total": total, "finished": end is None
    }  # fmt: skip
    _note(work, script, RUNNING, progress)
    return progress


def _names(work: Work, script: Script) -> tuple[sql.Composable, sql.Composable]:
    """Return the table, as the catalogue writes it, and the key."""
    wanted = script.file.directives
    row = work.connection.execute(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n "
        "ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)::oid",
        [wanted.batch_table],
    ).fetchone()
    assert row is not None
    return sql.Identifier(*row), sql.Identifier(wanted.batch_key)


def _batch(
    work: Work, script: Script, progress: dict[str, t.Any], size: int, tell: t.Callable[[], str]
) -> tuple[float, int]:
    """Do one batch and note it in the same transaction; returns its seconds and the attempts.

    C(tell) says how far the file is while the batch runs.
    """
    work.settle(script)
    table, key = _names(work, script)
    kind = one_of(
        work.connection,
        "SELECT format_type(atttypid, atttypmod) FROM pg_catalog.pg_attribute "
        "WHERE attrelid = to_regclass(%s)::oid AND attname = %s",
        script.file.directives.batch_table,
        script.file.directives.batch_key,
    )
    after: sql.Composable = sql.SQL("")
    if progress["last"] is not None:
        after = sql.SQL(" AND {} > {}").format(key, _typed(progress["last"], kind))
    # min() and max() know no uuid before 18: the ends of the sorted keys do as well
    bounds = sql.SQL(
        "WITH batch AS MATERIALIZED "
        "(SELECT {key} AS k FROM {table} WHERE {key} <= {end}{after} ORDER BY {key} LIMIT {size}) "
        "SELECT (SELECT k::text AS low FROM batch ORDER BY k LIMIT 1), "
        "(SELECT k::text AS high FROM batch ORDER BY k DESC LIMIT 1), "
        "(SELECT count(*) FROM batch)"
    ).format(
        key=key,
        table=table,
        end=_typed(progress["end"], kind),
        after=after,
        size=sql.Literal(size),
    )
    statement = script.statements[0]
    for attempt in range(1, work.options.lock_attempts + 1):
        begun = time.monotonic()
        work.settle(script)
        try:
            with work.watch.statement(statement, 1, 1, f"batch {progress['batches'] + 1}"):
                work.watch.counting(tell)
                work.connection.execute("BEGIN")
                low, high, keys = work.connection.execute(bounds).fetchone() or (None, None, 0)
                changed = 0
                if keys:
                    with psycopg.RawCursor(work.connection) as cursor:
                        cursor.execute(statement.text.encode(), [low, high])
                        changed = max(cursor.rowcount, 0)
                done = {
                    **progress,
                    "last": high if keys else progress["last"],
                    "rows": progress["rows"] + changed,
                    "keys": progress["keys"] + keys,
                    "batches": progress["batches"] + bool(keys),
                    "finished": keys < size,
                }
                _note(work, script, RUNNING, done, reset=False)
                work.connection.execute("COMMIT")
        except psycopg.Error as error:
            failure = StatementError(error, statement)
            give_up_transaction(work.connection)
            blocked = error.sqlstate in RETRYABLE
            if blocked:
                work.outcome.blockers = work.watch.blockers
            state = f"{progress['rows']:,} rows are done and stay so; the next run goes on after key {progress['last']}"
            if work.connection.closed or not blocked or attempt == work.options.lock_attempts:
                if not work.connection.closed:
                    _note(work, script, FAILED, {**progress, **failure.as_event()})
                record_failure(work, script, failure.as_event())
                raise failure.explain(script, work.outcome, state) from error
            work.give_way(attempt, f"batch {progress['batches'] + 1}: ")
        else:
            progress.update(done)
            return time.monotonic() - begun, attempt
    raise AssertionError("unreachable: lock_attempts is at least 1")


def _typed(value: str, kind: str) -> sql.Composed:
    """Return a key as a literal of its type."""
    return sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(kind))


def _note(work: Work, script: Script, state: str, detail: t.Mapping[str, t.Any], *, reset: bool = True) -> None:
    """Write the journal entry, as the ledger's owner; inside a batch's transaction without a reset."""
    statement = script.statements[0]
    if reset:
        work.as_owner()
    else:
        work.connection.execute("RESET ROLE")
        set_role(work.connection, work.options.role)
    work.ledger.note(
        script.file.file,
        1,
        state,
        line=statement.line,
        text=statement.text,
        run_id=work.options.run_id,
        detail=dict(detail),
    )


def _make_room(work: Work) -> None:
    """Wait while a standby lags too far, or while an old transaction keeps dead rows from being removed."""
    reset(work.connection)  # as the login: it may see the sessions of more roles than the owner
    said_at = -math.inf
    while who := _in_need_of_room(work):
        if time.monotonic() - said_at >= work.options.progress_interval:
            said_at = time.monotonic()
            work.watch.note(f"batches wait for {who}")
        time.sleep(_THROTTLE_SECONDS)


def _in_need_of_room(work: Work) -> str:
    """Return for whom batches have to wait; an empty string if for nobody."""
    for row in rows_of(work.connection, _LAGGING, [work.options.batch_max_lag]):
        return (
            f"standby {row['application_name']} ({row['address']}, pid {row['pid']}), "
            f"which is {row['seconds']} s behind"
        )
    for row in rows_of(work.connection, _OLDEST, [work.options.batch_max_transaction]):
        return f"a transaction: {describe_session(row)}"
    return ""
