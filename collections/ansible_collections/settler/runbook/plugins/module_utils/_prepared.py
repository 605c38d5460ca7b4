# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Prepared transactions: they hold locks and keep a database from being renamed or copied, and no session has them."""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

#: What only people can decide.
HINT = "In that database, as its owner or a superuser: COMMIT PREPARED '<name>' or ROLLBACK PREPARED '<name>'."


def prepared(connection: psycopg.Connection[t.Any], database: str, older_than: float = 0) -> str:
    """Return the prepared transactions of a database, described; empty if there are none.

    Args:
        connection: a session in any database.
        database: whose they are.
        older_than: seconds; a transaction manager leaves each for a moment.
    """
    found = connection.execute(
        "SELECT gid, owner, extract(epoch FROM clock_timestamp() - prepared)::int FROM pg_catalog.pg_prepared_xacts "
        "WHERE database = %s AND prepared <= clock_timestamp() - make_interval(secs => %s) ORDER BY prepared",
        [database, older_than],
    )
    return ", ".join(f"{gid} ({owner}, {seconds} s)" for gid, owner, seconds in found)


def refuse_prepared(connection: psycopg.Connection[t.Any], database: str) -> None:
    """Raise if a prepared transaction keeps a database from being renamed or copied."""
    if held := prepared(connection, database):
        raise RunbookError(f"prepared transactions hold {database}: {held}; the database is as it was", hint=HINT)
