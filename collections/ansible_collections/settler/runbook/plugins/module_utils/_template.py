# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The template of new databases before PostgreSQL 15: one whose schema public is the owner's, not the installer's."""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._database import TEMPLATE_MARK, create_as
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import sql
from ansible_collections.settler.runbook.plugins.module_utils._swap import drop

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg


def make(
    server: psycopg.Connection[t.Any],
    name: str,
    wanted: t.Mapping[str, t.Any],
    connect: t.Callable[[], psycopg.Connection[t.Any]],
) -> None:
    """Make the template; one that a killed run has left half made is made anew.

    Half made it has a connection limit of 0 and no mark.

    Args:
        server: a superuser's session in another database.
        name: of the template.
        wanted: owner, encoding and locale, as M(_database.properties) returns them.
        connect: opens a superuser's session in the template.

    Raises:
        RunbookError: somebody else's database has the name.
    """
    database, owner = sql.Identifier(name), sql.Identifier(wanted["owner"])
    there = server.execute(
        "SELECT datconnlimit = 0 AND shobj_description(oid, 'pg_database') IS NULL FROM pg_catalog.pg_database "
        "WHERE datname = %s",
        [name],
    ).fetchone()
    if there and not there[0]:
        raise RunbookError(
            f"there is a database {name}, and it is no template of {wanted['owner']}; nothing was changed",
            hint="Rename or drop it: restores on PostgreSQL 14 need a template of this name.",
        )
    drop(server, name, force=False)
    create_as(server, name, {**wanted, "tablespace": None})
    with connect() as session:
        session.execute(
            sql.SQL("ALTER SCHEMA public OWNER TO {}; REVOKE ALL ON SCHEMA public FROM PUBLIC").format(owner)
        )
    with server.transaction():
        server.execute(
            sql.SQL("ALTER DATABASE {} IS_TEMPLATE true ALLOW_CONNECTIONS false CONNECTION LIMIT -1").format(database)
        )
        server.execute(
            sql.SQL("COMMENT ON DATABASE {} IS {}").format(database, sql.Literal(TEMPLATE_MARK + wanted["owner"]))
        )
