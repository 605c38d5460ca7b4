# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The maintenance window: the application is kept out of one database by its right to connect.

Nothing is stored: the window is open exactly while an application role lacks CONNECT. So a run that was killed
inside the window leaves the application out, which is the safe side, and anyone can see it in the catalogue.
"""

from __future__ import annotations

import time
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import set_role
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql

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
) -> list[dict[str, t.Any]]:
    """Keep the roles out; return the sessions that were ended.

    Args:
        connection: a session whose login is a member of the roles, so that it sees and may end their sessions.
        roles: application roles.
        owner: the database's owner, which the login becomes to take the right to connect.
        drain: seconds that open transactions get to finish.

    Raises:
        RunbookError: a session does not leave.
    """
    _change(connection, "REVOKE CONNECT ON DATABASE {} FROM {}", roles, owner)
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
    return list(ended.values())


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
) -> None:
    set_role(connection, owner)
    names = sql.SQL(", ").join(map(sql.Identifier, roles))
    connection.execute(sql.SQL(command).format(sql.Identifier(connection.info.dbname), names))
    connection.execute("RESET ROLE")
