# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sessions that read whole tables: they wait for nobody's lock for long, and tell who holds it."""

from __future__ import annotations

import contextlib
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
from ansible_collections.settler.runbook.plugins.module_utils._run import describe_session, rows_of

#: Who holds, or stands in line for, the only lock that keeps readers out.
_HOLDERS: t.LiteralString = """
SELECT DISTINCT a.pid, a.usename, a.application_name, a.state, left(a.query, 120) AS query,
    extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, a.backend_start))::int AS seconds
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND a.pid <> pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = %s)
ORDER BY 1
"""


def wait_no_longer(connection: psycopg.Connection[t.Any], seconds: float) -> None:
    """Have a session wait for a table only for so long: behind it all others would stand in line."""
    connection.execute("SELECT set_config('lock_timeout', %s, false)", [f"{seconds * 1000:.0f}ms"])


@contextlib.contextmanager
def naming_holders(connection: psycopg.Connection[t.Any], database: str) -> t.Iterator[None]:
    """Name who holds a table that could not be read in time.

    Args:
        connection: a session in autocommit, in any database.
        database: where tables are read.

    Raises:
        RunbookError: in place of PostgreSQL's error, which names nobody.
    """
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        lines = [f"  {describe_session(row)}" for row in rows_of(connection, _HOLDERS, [database])]
        raise RunbookError(
            f"a table of {database} is locked and could not be read; nothing was touched\n"
            + ("\n".join(lines) or "  whoever held it is gone"),
            hint="Wait until they are done, or end them: SELECT pg_terminate_backend(<pid>). Then run again.",
            sqlstate=error.sqlstate,
        ) from error
