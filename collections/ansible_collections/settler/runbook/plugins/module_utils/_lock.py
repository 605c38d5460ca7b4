# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The run's lock: one run a database at a time, on the session that does the work."""

from __future__ import annotations

import contextlib
import random
import time
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import reset
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._ledger import lock_key
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import pq, psycopg
from ansible_collections.settler.runbook.plugins.module_utils._run import Options, describe_session, one_of, rows_of

#: A condition on pg_locks that finds the holder of an advisory lock with a key of 64 bits.
_IS_KEY = (
    "l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 "
    "AND l.classid = ((%(key)s::bigint >> 32) & 4294967295)::oid AND l.objid = (%(key)s::bigint & 4294967295)::oid"
)
#: Whether this session holds it: the lock is taken twice, and one of the two can be given back and taken again without
#: anybody else coming between. To look for it in pg_locks costs ten times as much.
HOLDS_KEY = "CASE WHEN pg_advisory_unlock(%(key)s) THEN pg_try_advisory_lock(%(key)s) ELSE false END"

_TAKE = "SELECT CASE WHEN pg_try_advisory_lock(%s) THEN pg_try_advisory_lock(%s) ELSE false END"

_IN_THE_WAY: t.LiteralString = f"""
SELECT a.pid, a.usename, a.application_name, a.client_addr::text,
       extract(epoch FROM clock_timestamp() - a.backend_start)::int AS seconds, a.state, left(a.query, 120) AS query
FROM pg_catalog.pg_stat_activity a
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
  AND (a.pid IN (SELECT l.pid FROM pg_catalog.pg_locks l WHERE {_IS_KEY}
                 AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))
       OR (a.application_name LIKE 'runbook:%%:migrate' AND a.xact_start < clock_timestamp() - interval '1 second'))
"""  # noqa: S608 - two constants


def key_of(connection: psycopg.Connection[t.Any], options: Options) -> int:
    """Return the key of the lock of this database and project."""
    return lock_key(
        one_of(connection, "SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()"), options.project
    )


@contextlib.contextmanager
def run_lock(
    connection: psycopg.Connection[t.Any], options: Options, say: t.Callable[[str], None] | None = None
) -> t.Iterator[t.Callable[[], None]]:
    """Hold the run's advisory lock; yields a function that asserts that it is still held. C(say) takes progress.

    The lock is polled: waiting inside pg_advisory_lock would deadlock with the holder's CREATE INDEX CONCURRENTLY.
    A backend that an earlier run has left, still at work in a transaction, is waited for as well.
    """
    key = key_of(connection, options)
    begun = time.monotonic()
    deadline, said_at = begun + options.lock_wait, begun
    locked = False
    try:
        while True:
            locked = locked or one_of(connection, _TAKE, key, key)
            others = rows_of(connection, _IN_THE_WAY, {"key": key})
            if locked and not others:
                break
            now = time.monotonic()
            if say and now - said_at >= options.progress_interval:
                said_at = now
                say(f"{_obstacle(locked)}; waits for it, {now - begun:.0f} s: {_listed(others)}")
            if now > deadline:
                raise _in_the_way(others, locked, options)
            time.sleep(random.uniform(0.05, 0.25))  # noqa: S311 - jitter, no secret

        def held() -> None:
            if not is_held(connection, key):
                raise lock_is_gone()

        yield held
    finally:
        if locked and not connection.closed and connection.info.transaction_status == pq.TransactionStatus.IDLE:
            reset(connection)
            connection.execute("SELECT pg_advisory_unlock_all()")


def is_held(connection: psycopg.Connection[t.Any], key: int) -> bool:
    """Tell whether this session holds the lock."""
    return bool(rows_of(connection, f"SELECT {HOLDS_KEY} AS held", {"key": key})[0]["held"])


def lock_is_gone() -> RunbookError:
    """Return the error of a run that no longer is the only one."""
    return RunbookError("the run's advisory lock is gone; stopped before the next file", hint="Run again.")


def _in_the_way(others: t.Sequence[t.Mapping[str, t.Any]], locked: bool, options: Options) -> RunbookError:
    return RunbookError(
        f"{_obstacle(locked)}; waited {options.lock_wait:g} s: {_listed(others)}",
        hint="Wait for it. If its runner is dead, its last statement still works: "
        "SELECT pg_terminate_backend(<pid>) ends it and rolls its file back.",
    )


def _obstacle(locked: bool) -> str:
    if locked:
        return "a backend of an earlier run still works in this database"
    return "another run holds this database's lock"


def _listed(sessions: t.Sequence[t.Mapping[str, t.Any]]) -> str:
    return "; ".join(describe_session(row) for row in sessions)
