# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The maintenance window: the application is kept out of one database by its right to connect.

Nothing is stored: the window is open exactly while an application role lacks CONNECT. So a run that was killed
inside the window leaves the application out, which is the safe side, and anyone can see it in the catalogue.

Nor is it stored whose window it is. Who opens one, or lets the application in, writes the database's row in the
catalogue anew, so the row's version tells a run whether anybody has done either since it opened its own.
"""

from __future__ import annotations

import time
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import set_role
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._run import describe_session, one_of, rows_of

_ROLES = """
SELECT r.rolname, r.rolsuper OR pg_has_role(r.oid, d.datdba, 'USAGE') AS unstoppable,
       has_database_privilege(r.oid, d.oid, 'CONNECT') AS may_connect,
       EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
               WHERE a.grantee = 0 AND a.privilege_type = 'CONNECT') AS public
FROM pg_catalog.pg_roles r, pg_catalog.pg_database d
WHERE d.datname = current_database() AND r.rolname = ANY (%s)
"""

_SESSIONS = """
SELECT pid, usename, application_name, state, xact_start IS NOT NULL AS in_transaction
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND usename = ANY (%s)
"""


#: Sessions of other runs that are changing something, or proving it, at this moment.
_AT_WORK = """
SELECT pid, usename, application_name, state, extract(epoch FROM clock_timestamp() - backend_start)::int AS seconds,
    left(query, 120) AS query
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
  AND application_name ~ '^runbook:.*:(maintenance|backup|migrate|verify|restore|adopt|repair)$'
  AND NOT starts_with(application_name, %s)
"""

#: Roles that have rights on something in this database, maybe by way of other roles, and may not connect to it.
_KEPT_FROM_WORK = """
SELECT r.rolname FROM pg_catalog.pg_roles r, pg_catalog.pg_database d
WHERE d.datname = current_database() AND r.rolname = ANY (%s) AND NOT has_database_privilege(r.oid, d.oid, 'CONNECT')
  AND EXISTS (SELECT FROM pg_catalog.pg_shdepend s WHERE s.dbid = d.oid AND s.refclassid = 'pg_authid'::regclass
              AND pg_has_role(r.oid, s.refobjid, 'USAGE'))
ORDER BY 1
"""

_VERSION = "SELECT oid::text || ':' || xmin::text FROM pg_catalog.pg_database WHERE datname = current_database()"


def refuse_other_runs(connection: psycopg.Connection[t.Any], run_id: str, *, wait: float) -> None:
    """Wait until no session of another run is at work in this database.

    Raises:
        RunbookError: one still is, after C(wait) seconds.
    """
    deadline = time.monotonic() + wait
    while others := rows_of(connection, _AT_WORK, [f"runbook:{run_id}:"]):
        if time.monotonic() > deadline:
            raise RunbookError(
                f"another run is at work in this database; waited {wait:g} s, nothing was changed: "
                + "; ".join(describe_session(row) for row in others),
                hint="Wait for its end, then run again. Two hosts of the inventory, or two jobs, must not share one.",
                foreign_window=True,
            )
        time.sleep(0.1)


def refuse_broken_window(connection: psycopg.Connection[t.Any], window: str) -> None:
    """Raise if anybody has opened or closed a window since ours was opened."""
    if window and window != one_of(connection, _VERSION):
        raise RunbookError(
            "another run, or someone by hand, has kept the application out or let it in since this run opened its "
            "window: its backup may lack rows; nothing was applied",
            hint="The application is left as the other one has it. When that one has ended: run again.",
            foreign_window=True,
        )


def refuse_foreign_window(connection: psycopg.Connection[t.Any], roles: t.Sequence[str]) -> None:
    """Raise if one of the roles, which works in this database, is kept out: by another run, since we have no window.

    That one has a backup, or is about to make one, that knows nothing of what we would do.
    """
    out = [row["rolname"] for row in rows_of(connection, _KEPT_FROM_WORK, [list(roles)])]
    if out:
        raise RunbookError(
            f"a maintenance window of another run is open: {', '.join(out)} may not connect; nothing was applied",
            hint="Wait for its end; if it was killed, run playbooks/migrate.yml again, which takes the window over.",
            foreign_window=True,
        )


def kept_out(connection: psycopg.Connection[t.Any], roles: t.Sequence[str]) -> list[str]:
    """Return those of the roles that may not connect."""
    return sorted(name for name, _unstoppable, may_connect, _public in _roles(connection, roles) if not may_connect)


def _roles(connection: psycopg.Connection[t.Any], roles: t.Sequence[str]) -> list[tuple[str, bool, bool, bool]]:
    return connection.execute(_ROLES, [list(roles)]).fetchall()


def check(connection: psycopg.Connection[t.Any], roles: t.Sequence[str]) -> None:
    """Refuse roles that cannot be kept out.

    Raises:
        RunbookError: a role is missing, is a superuser or owns the database, or PUBLIC may connect.
    """
    found = _roles(connection, roles)
    missing = sorted(set(roles) - {row[0] for row in found})
    if missing:
        raise RunbookError(f"no such role: {', '.join(missing)}", hint="playbooks/create_database.yml makes the roles.")
    unstoppable = [name for name, cannot_stop, _may, _public in found if cannot_stop]
    if unstoppable:
        raise RunbookError(
            f"{', '.join(unstoppable)}: superuser or owner of the database, cannot be kept out",
            hint="The application connects as a role with data rights only.",
        )
    if any(public for _name, _unstoppable, _may, public in found):
        raise RunbookError(
            "PUBLIC may connect to this database, so no role can be kept out",
            hint="playbooks/create_database.yml grants CONNECT to the runbook's roles only.",
        )


def close_to(
    connection: psycopg.Connection[t.Any], roles: t.Sequence[str], *, owner: str | None, drain: float
) -> tuple[list[dict[str, t.Any]], str]:
    """Keep the roles out; return the sessions that were ended, and the window, for M(refuse_broken_window).

    Args:
        connection: a session whose login is a member of the roles, so that it sees and may end their sessions.
        roles: application roles.
        owner: the database's owner, which the login becomes to take the right to connect.
        drain: seconds that open transactions get to finish.

    Raises:
        RunbookError: a session does not leave.
    """
    window = _change(connection, "REVOKE CONNECT ON DATABASE {} FROM {}", roles, owner)
    still = sorted(set(roles) - set(kept_out(connection, roles)))
    if still:
        _change(connection, "GRANT CONNECT ON DATABASE {} TO {}", roles, owner)
        raise RunbookError(
            f"{', '.join(still)} may still connect, through a role that it is a member of; nothing was changed",
            hint="Name that role in maintenance_roles too.",
        )
    ended: dict[int, dict[str, t.Any]] = {}
    drained, deadline = time.monotonic() + drain, time.monotonic() + drain + 10
    while sessions := connection.execute(_SESSIONS, [list(roles)]).fetchall():
        if time.monotonic() > deadline:
            raise RunbookError(
                f"sessions of the application do not leave: pid {', '.join(str(row[0]) for row in sessions)}",
                hint="End them as a superuser: SELECT pg_terminate_backend(<pid>).",
            )
        for pid, user, application, state, in_transaction in sessions:
            if pid not in ended and (not in_transaction or time.monotonic() > drained):
                _end(connection, pid, user)
                ended[pid] = {"pid": pid, "role": user, "application": application, "state": state}
        time.sleep(0.05)
    return list(ended.values()), window


def _end(connection: psycopg.Connection[t.Any], pid: int, user: str) -> None:
    try:
        connection.execute("SELECT pg_terminate_backend(%s)", [pid])
    except psycopg.errors.InsufficientPrivilege as error:
        raise RunbookError(
            f"this login may not end the sessions of {user} (pid {pid})",
            hint=f"GRANT {user} TO the migrator; playbooks/create_database.yml does it.",
        ) from error


def open_to(connection: psycopg.Connection[t.Any], roles: t.Sequence[str], *, owner: str | None) -> None:
    """Let the roles in again."""
    _change(connection, "GRANT CONNECT ON DATABASE {} TO {}", roles, owner)


def _change(
    connection: psycopg.Connection[t.Any], command: t.LiteralString, roles: t.Sequence[str], owner: str | None
) -> str:
    """Change who may connect; returns the version of the database's row that this makes, also where nothing changes."""
    set_role(connection, owner)
    names = sql.SQL(", ").join(map(sql.Identifier, roles))
    with connection.transaction():  # nobody's version but our own
        connection.execute(sql.SQL(command).format(sql.Identifier(connection.info.dbname), names))
        version: str = one_of(connection, _VERSION)
    connection.execute("RESET ROLE")
    return version
