# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The template of new databases before PostgreSQL 15: one whose schema public is the owner's, not the installer's."""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import sql

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

#: By which a template is known, with its owner's name behind it.
_MARK = "settler.runbook: template for databases of "


def template_for(connection: psycopg.Connection[t.Any], wanted: t.Mapping[str, t.Any]) -> str:
    """Return the template that was made for databases with this owner, encoding and locale; empty if there is none.

    And none fits a database whose schema public is still the installer's; older backups do not tell.

    Args:
        connection: a session in any database.
        wanted: what M(_database.properties) returned of the original.
    """
    if wanted.get("public_owner") != wanted["owner"]:
        return ""
    row = connection.execute(
        "SELECT datname FROM pg_catalog.pg_database WHERE datistemplate AND shobj_description(oid, 'pg_database') = %s "
        "AND pg_encoding_to_char(encoding) = %s AND datcollate = %s AND datctype = %s ORDER BY datname LIMIT 1",
        [_MARK + wanted["owner"], *(wanted[key] for key in ("encoding", "collate", "ctype"))],
    ).fetchone()
    return str(row[0]) if row else ""


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
    server.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(database))
    create = "CREATE DATABASE {} TEMPLATE template0 OWNER {} ENCODING {} LC_COLLATE {} LC_CTYPE {} CONNECTION LIMIT 0"
    locale = (sql.Literal(wanted[key]) for key in ("encoding", "collate", "ctype"))
    server.execute(sql.SQL(create).format(database, owner, *locale))
    with connect() as session:
        session.execute(
            sql.SQL("ALTER SCHEMA public OWNER TO {}; REVOKE ALL ON SCHEMA public FROM PUBLIC").format(owner)
        )
    with server.transaction():
        server.execute(
            sql.SQL("ALTER DATABASE {} IS_TEMPLATE true ALLOW_CONNECTIONS false CONNECTION LIMIT -1").format(database)
        )
        server.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(database, sql.Literal(_MARK + wanted["owner"])))
