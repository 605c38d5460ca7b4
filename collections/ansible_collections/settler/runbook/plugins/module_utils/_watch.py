# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The watch: a second session that sees what the first one waits for, ends it by policy, and says how far it is.

A session that waits for a lock cannot look around. The watch connects when a statement takes longer than a moment,
so that a run of quick files never pays for it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import threading
import time
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import beside
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
from ansible_collections.settler.runbook.plugins.module_utils._run import (
    BlockerPolicy,
    Options,
    Outcome,
    describe_session,
    rows_of,
)

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Statement

_BLOCKERS = """
WITH blocker (pid) AS MATERIALIZED (SELECT unnest(pg_blocking_pids(%(pid)s)))
SELECT DISTINCT a.pid, a.usename, a.application_name, a.state, a.backend_type,
       extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, a.backend_start))::int AS seconds,
       left(a.query, 120) AS query, coalesce(a.xact_start, a.backend_start)::text AS since
FROM blocker JOIN pg_catalog.pg_stat_activity a USING (pid)
UNION ALL
SELECT DISTINCT 0, p.owner, p.gid, 'prepared', 'prepared transaction',
       extract(epoch FROM clock_timestamp() - p.prepared)::int, 'COMMIT PREPARED or ROLLBACK PREPARED ends it',
       p.prepared::text
FROM blocker JOIN pg_catalog.pg_locks w ON w.pid = %(pid)s AND NOT w.granted
JOIN pg_catalog.pg_locks h ON h.granted AND h.pid IS NULL
    AND (h.database, h.relation) IS NOT DISTINCT FROM (w.database, w.relation)
    AND h.transactionid IS NOT DISTINCT FROM w.transactionid
JOIN pg_catalog.pg_locks own ON own.pid IS NULL AND own.locktype = 'transactionid'
    AND own.virtualtransaction = h.virtualtransaction
JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = own.transactionid
WHERE blocker.pid = 0
ORDER BY 6 DESC NULLS LAST
"""

#: One row for the session's long command, whichever it is.
_PROGRESS = """
SELECT command || ': ' || phase, CASE WHEN blocks_total > 0 THEN 100.0 * blocks_done / blocks_total
    WHEN tuples_total > 0 THEN 100.0 * tuples_done / tuples_total END
FROM pg_catalog.pg_stat_progress_create_index WHERE pid = %(pid)s
UNION ALL
SELECT 'VACUUM: ' || phase, CASE WHEN heap_blks_total > 0 THEN 100.0 * heap_blks_scanned / heap_blks_total END
FROM pg_catalog.pg_stat_progress_vacuum WHERE pid = %(pid)s
UNION ALL
SELECT 'ANALYZE: ' || phase,
    CASE WHEN sample_blks_total > 0 THEN 100.0 * sample_blks_scanned / sample_blks_total END
FROM pg_catalog.pg_stat_progress_analyze WHERE pid = %(pid)s
UNION ALL
SELECT command || ': ' || phase, CASE WHEN heap_blks_total > 0 THEN 100.0 * heap_blks_scanned / heap_blks_total END
FROM pg_catalog.pg_stat_progress_cluster WHERE pid = %(pid)s
UNION ALL
SELECT command, CASE WHEN bytes_total > 0 THEN 100.0 * bytes_processed / bytes_total END
FROM pg_catalog.pg_stat_progress_copy WHERE pid = %(pid)s
"""

_END: dict[str, t.LiteralString] = {
    "cancel": "SELECT pg_cancel_backend(%s)",
    "terminate": "SELECT pg_terminate_backend(%s)",
}


class Watch:
    """Watches one session, from a thread of its own, between C(start) and C(stop).

    Args:
        connection: the session that does the work.
        options: the policy for blockers, the pace of progress lines.
        outcome: gets the sessions that were ended.
        say: takes a line of progress; None is silent.
        shortest_wait: the shortest lock_timeout that a file has, in seconds; 0 waits without end. Who blocks has to
            be seen within it.
    """

    def __init__(
        self,
        connection: psycopg.Connection[t.Any],
        options: Options,
        outcome: Outcome,
        say: t.Callable[[str], None] | None = None,
        shortest_wait: float = 0.0,
    ) -> None:
        self._pause = min(max(shortest_wait / 4, 0.02), 0.5) if shortest_wait else 0.5
        self._target = connection
        self._pid = connection.info.backend_pid
        self._options = options
        self._outcome = outcome
        self._say = say
        self._own: psycopg.Connection[t.Any] | None = None
        self._stopped = threading.Event()
        self._looking = threading.Lock()
        self._thread: threading.Thread | None = None
        self._since: float | None = None  # when the statement that runs now began
        self._title = ""
        self._detail: t.Callable[[], str] = str
        self._file = ""
        self._file_since = time.monotonic()
        self._blocked_since: dict[tuple[int, str], float] = {}  # by session and transaction
        self._said_at = time.monotonic()
        self._settled: set[tuple[int, str]] = set()  # transactions for which nothing more is done
        self._left: set[tuple[int, str]] = set()  # and those of which was said why
        self.blockers: list[dict[str, t.Any]] = []  # seen since the statement began

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopped.set()
        if self._thread:
            self._thread.join()
        if self._own:
            self._own.close()

    def file(self, name: str, number: int, total: int) -> None:
        """Say which file is at work; its time and its wait for locks are counted from here."""
        self._file = f"{name} ({number} of {total})"
        self._file_since = time.monotonic()
        self._blocked_since = {}

    @contextlib.contextmanager
    def statement(self, statement: Statement | None, number: int, total: int, title: str = "") -> t.Iterator[None]:
        """Watch while a statement runs."""
        self._title = title or (f"statement {number} of {total}, line {statement.line}" if statement else "")
        self.blockers = []
        self._since = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            with self._looking:  # what a look has just ended is recorded before the statement counts as over
                self._since = None
                self._detail = str

    def counting(self, detail: t.Callable[[], str]) -> None:
        """Ask C(detail) for the rest of the progress line of the statement that runs now."""
        self._detail = detail

    def note(self, line: str) -> None:
        """Say something at once."""
        if self._say:
            self._said_at = time.monotonic()
            self._say(f"{self._file}: {line}")

    def _work(self) -> None:
        while not self._stopped.wait(self._pause):
            with self._looking:
                now = time.monotonic()
                if self._since is None:
                    continue
                try:
                    if now - self._since >= self._pause:
                        self._look()
                    else:
                        self._tell([], now)  # many quick statements are a long run, too
                except psycopg.Error:
                    if self._own:
                        self._own.close()
                    self._own = None  # the next look connects again
                    self._tell([], now)

    def _look(self) -> None:
        if self._own is None:
            self._own = beside(self._target, f"runbook:{self._options.run_id}:watch")
        waits_for = rows_of(self._own, _BLOCKERS, {"pid": self._pid})
        now = time.monotonic()
        if waits_for and self._since is not None:
            self.blockers = waits_for
            for row in waits_for:
                # a transaction keeps its locks to its end: it is counted over several attempts of a file
                if now - self._blocked_since.setdefault(_transaction(row), now) >= self._options.blockers.after:
                    self._end(row)
        self._tell(waits_for, now)

    def _tell(self, waits_for: t.Sequence[t.Mapping[str, t.Any]], now: float) -> None:
        """Say a line of progress, if it is time for one."""
        if self._say and now - self._said_at >= self._options.progress_interval:
            self._said_at = now
            self._say(self._line(waits_for, now))

    def _line(self, waits_for: t.Sequence[t.Mapping[str, t.Any]], now: float) -> str:
        """Return a line of progress."""
        parts = [self._title, f"{now - self._file_since:.0f} s"]
        if waits_for:
            parts.append("waits for " + describe_session(waits_for[0]))
        elif detail := self._detail():
            parts.append(detail)
        elif self._own:
            row = self._own.execute(_PROGRESS, {"pid": self._pid}).fetchone()
            if row:
                parts.append(row[0] + (f" {row[1]:.0f} %" if row[1] is not None else ""))
        return f"{self._file}: {', '.join(parts)}"

    def _end(self, row: dict[str, t.Any]) -> None:
        """Cancel or terminate a blocker, if the policy names it."""
        action = self._options.blockers.action
        if not is_named(self._options.blockers, row) or self._own is None or _transaction(row) in self._settled:
            return
        if reason := why_not(action, row):
            self._leave(row, reason)
            return
        try:
            done = self._own.execute(_END[action], [row["pid"]]).fetchone()
        except psycopg.errors.InsufficientPrivilege as error:
            self._settled.add(_transaction(row))
            self._leave(row, error.diag.message_primary or "")
            return
        if done and done[0]:
            self._outcome.ended.append({**row, "action": action})
            self.note(f"{action}: {describe_session(row)}")
            if action == "cancel":
                self._settled.add(_transaction(row))  # once: what goes on after that was not cancelled by it

    def _leave(self, row: dict[str, t.Any], reason: str) -> None:
        """Say once why a blocker that the policy names is not ended."""
        if _transaction(row) in self._left:
            return
        self._left.add(_transaction(row))
        self._outcome.warnings.append(f"blocker not ended: {describe_session(row)}: {reason}")


def _transaction(row: t.Mapping[str, t.Any]) -> tuple[int, str]:
    return row["pid"], row["since"]


def is_named(policy: BlockerPolicy, row: t.Mapping[str, t.Any]) -> bool:
    """Tell whether a policy ends a session: one of its patterns names it and none of the others does."""
    if policy.action == "wait":
        return False
    names = [name for name in (row["application_name"], row["usename"]) if name]

    def matches(patterns: t.Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)

    return matches(policy.match) and not matches(policy.never)


def why_not(action: str, row: t.Mapping[str, t.Any]) -> str:
    """Return why a session that a policy names can not be ended by C(action); empty if it can."""
    if row["backend_type"] is None:
        return "the login may not see what kind of session it is; GRANT pg_read_all_stats lets it"
    if row["backend_type"] != "client backend":
        return f"it is no client but the {row['backend_type']}"
    if action == "cancel" and row["state"].startswith("idle"):
        return f"it is {row['state']}: there is no query to cancel; only blocker_action=terminate ends it"
    return ""
