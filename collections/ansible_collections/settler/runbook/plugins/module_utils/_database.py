# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What belongs to a database but not into its dump (owner, locale, rights, settings, roles), and its row counts."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import may_become, set_role
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, describe
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import dict_row, psycopg, sql

#: By which a template is known, with its owner's name behind it.
TEMPLATE_MARK = "settler.runbook: template for databases of "

_PROPERTIES = """
SELECT pg_get_userbyid(d.datdba) AS owner, pg_encoding_to_char(d.encoding) AS encoding,
    d.datcollate AS collate, d.datctype AS ctype, d.datconnlimit AS connection_limit,
    shobj_description(d.oid, 'pg_database') AS comment, d.datacl IS NULL AS default_grants,
    to_jsonb(d) ->> 'datlocprovider' AS locale_provider,
    coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') AS locale,
    to_jsonb(d) ->> 'daticurules' AS icu_rules, to_jsonb(d) ->> 'datcollversion' AS collation_version,
    (SELECT spcname FROM pg_catalog.pg_tablespace s WHERE s.oid = d.dattablespace) AS tablespace,
    (SELECT pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace WHERE nspname = 'public') AS public_owner,
    (SELECT coalesce(jsonb_agg(jsonb_build_object('grantee', CASE WHEN a.grantee = 0 THEN NULL
            ELSE pg_get_userbyid(a.grantee) END, 'privilege', a.privilege_type, 'grantable', a.is_grantable)
            ORDER BY a.grantee::regrole::text, a.privilege_type), '[]') FROM aclexplode(d.datacl) a) AS grants,
    (SELECT coalesce(jsonb_agg(jsonb_build_object('role', r.rolname, 'settings', s.setconfig)
            ORDER BY r.rolname NULLS FIRST), '[]')
     FROM pg_catalog.pg_db_role_setting s LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole
     WHERE s.setdatabase = d.oid) AS settings
FROM pg_catalog.pg_database d WHERE d.datname = current_database()
"""

_ROLES = """
WITH RECURSIVE wanted AS (
    SELECT s.refobjid AS oid FROM pg_catalog.pg_shdepend s, pg_catalog.pg_database d
    WHERE d.datname = current_database() AND s.refclassid = 'pg_authid'::regclass
      AND (s.dbid = d.oid OR (s.dbid = 0 AND s.classid = 'pg_database'::regclass AND s.objid = d.oid))
    UNION SELECT datdba FROM pg_catalog.pg_database WHERE datname = current_database()
    UNION SELECT s.setrole FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase
    WHERE d.datname = current_database()
    UNION SELECT m.roleid FROM wanted w JOIN pg_catalog.pg_auth_members m ON m.member = w.oid)
SELECT r.rolname AS name, r.rolcanlogin AS login, r.rolsuper AS superuser, r.rolcreatedb AS createdb,
    r.rolcreaterole AS createrole, r.rolinherit AS inherit, r.rolbypassrls AS bypassrls,
    r.rolreplication AS replication, r.rolconnlimit AS connection_limit, r.rolvaliduntil::text AS valid_until,
    shobj_description(r.oid, 'pg_authid') AS comment, coalesce(to_jsonb(r.rolconfig), '[]') AS settings,
    (SELECT coalesce(jsonb_object_agg(m.name, m.options), '{}') FROM (
        SELECT g.rolname AS name, array_remove(ARRAY[CASE WHEN bool_or(m.admin_option) THEN 'admin' END,
            CASE WHEN NOT bool_or((to_jsonb(m) ->> 'inherit_option')::boolean) THEN 'noinherit' END,
            CASE WHEN NOT bool_or((to_jsonb(m) ->> 'set_option')::boolean) THEN 'noset' END], NULL) AS options
        FROM pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles g ON g.oid = m.roleid
        WHERE m.member = r.oid GROUP BY g.rolname) m) AS member_of
FROM pg_catalog.pg_roles r WHERE r.oid IN (SELECT oid FROM wanted)
ORDER BY 1
"""

_NEEDS = """
SELECT
    (SELECT coalesce(jsonb_object_agg(extname, extversion), '{}') FROM pg_catalog.pg_extension) AS extensions,
    (SELECT coalesce(jsonb_agg(spcname ORDER BY spcname), '[]') FROM pg_catalog.pg_tablespace
     WHERE oid IN (SELECT reltablespace FROM pg_catalog.pg_class WHERE relnamespace <> 'pg_catalog'::regnamespace
                   UNION SELECT dattablespace FROM pg_catalog.pg_database WHERE datname = current_database())
       AND spcname NOT IN ('pg_default', 'pg_global')) AS tablespaces,
    (SELECT coalesce(jsonb_agg(pubname ORDER BY pubname), '[]') FROM pg_catalog.pg_publication) AS publications,
    (SELECT coalesce(jsonb_agg(evtname ORDER BY evtname), '[]') FROM pg_catalog.pg_event_trigger) AS event_triggers,
    (SELECT count(*) FROM pg_catalog.pg_largeobject_metadata) AS large_objects
"""

_TABLES = """
SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = c.oid AND e.classid = 'pg_class'::regclass
                  AND e.deptype = 'e')
ORDER BY 1, 2
"""

_BLIND = """
SELECT c.oid::regclass::text FROM pg_catalog.pg_class c WHERE c.relkind IN ('r', 'p') AND row_security_active(c.oid)
ORDER BY 1
"""


def properties(connection: psycopg.Connection[t.Any]) -> dict[str, t.Any]:
    """Return owner, encoding, locale, tablespace, rights, settings, limit and comment of the connected database.

    And the owner of its schema public, by which its template is chosen before PostgreSQL 15.
    """
    return _one_row(connection, _PROPERTIES)


def needs(connection: psycopg.Connection[t.Any]) -> dict[str, t.Any]:
    """Return what a server must have before the dump can be restored, and what no list of tables shows.

    That is extensions with their versions, names of tablespaces, publications and event triggers, and how many large
    objects there are.
    """
    return _one_row(connection, _NEEDS)


def _one_row(connection: psycopg.Connection[t.Any], query: t.LiteralString) -> dict[str, t.Any]:
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(query).fetchone()
    assert row is not None
    return row


def referenced_roles(connection: psycopg.Connection[t.Any]) -> list[dict[str, t.Any]]:
    """Return the roles that the database refers to, and those that they are members of, without passwords."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_ROLES).fetchall()


def role_statements(roles: t.Iterable[t.Mapping[str, t.Any]], wanted: t.Collection[str]) -> str:
    """Return the SQL by which a superuser makes roles as they were, without passwords.

    Left out are settings of the application's own, with a dot in their names: their values may be secrets.
    """
    known = {role["name"]: role for role in roles}
    statements = [_creation(name, known.get(name, {})) for name in wanted]
    statements += [statement for name in wanted for statement in _additions(name, known.get(name, {}))]
    return " ".join(f"{statement.as_string(None)};" for statement in statements)


def _creation(name: str, role: t.Mapping[str, t.Any]) -> sql.Composable:
    parts: list[sql.Composable] = [sql.SQL("CREATE ROLE {}").format(sql.Identifier(name))]
    parts += [sql.SQL(word) for key, word in _ATTRIBUTES.items() if role.get(key)]
    if role.get("inherit") is False:
        parts.append(sql.SQL("NOINHERIT"))
    if role.get("connection_limit", -1) >= 0:
        parts.append(sql.SQL("CONNECTION LIMIT {}").format(sql.Literal(role["connection_limit"])))
    if role.get("valid_until"):
        parts.append(sql.SQL("VALID UNTIL {}").format(sql.Literal(role["valid_until"])))
    return sql.SQL(" ").join(parts)


def _additions(name: str, role: t.Mapping[str, t.Any]) -> t.Iterator[sql.Composable]:
    """Yield memberships, settings and comment of a role."""
    target = sql.SQL("ROLE {}").format(sql.Identifier(name))
    members = role.get("member_of", ())
    for group in members:
        options = members[group] if isinstance(members, t.Mapping) else ()  # older backups have only names
        told = [word for key, word in _MEMBERSHIP.items() if key in options]
        grant = sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(name))
        yield sql.SQL(" WITH ").join([grant, *([sql.SQL(", ").join(map(sql.SQL, told))] if told else [])])
    for setting in role.get("settings", ()):
        parameter, _equals, value = setting.partition("=")
        if "." not in parameter:
            yield _setting(target, parameter, value)
    if role.get("comment"):
        yield sql.SQL("COMMENT ON {} IS {}").format(target, sql.Literal(role["comment"]))


_ATTRIBUTES: dict[str, t.LiteralString] = {
    "login": "LOGIN",
    "superuser": "SUPERUSER",
    "createdb": "CREATEDB",
    "createrole": "CREATEROLE",
    "bypassrls": "BYPASSRLS",
    "replication": "REPLICATION",
}
_MEMBERSHIP: dict[str, t.LiteralString] = {"admin": "ADMIN OPTION", "noinherit": "INHERIT FALSE", "noset": "SET FALSE"}


def row_counts(connection: psycopg.Connection[t.Any], known: t.Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the exact number of rows of every table, in the transaction's snapshot.

    Args:
        connection: a role that sees all rows.
        known: numbers of rows that were counted in this snapshot already, by C(schema.table).
    """
    known = known or {}
    tables = {f"{schema}.{name}": sql.Identifier(schema, name) for schema, name in connection.execute(_TABLES)}
    counts = [
        sql.SQL("SELECT {}, count(*) FROM {}").format(sql.Literal(name), table)
        for name, table in tables.items()
        if name not in known
    ]
    found = dict(connection.execute(sql.SQL(" UNION ALL ").join(counts)).fetchall()) if counts else {}
    return {name: known[name] if name in known else found[name] for name in tables}


def blind_tables(connection: psycopg.Connection[t.Any]) -> list[str]:
    """Return the tables of which the current role sees only what policies let it see: a dump by it would be partial."""
    return [row[0] for row in connection.execute(_BLIND)]


def check_sight(connection: psycopg.Connection[t.Any]) -> None:
    """Refuse a role that does not see all rows."""
    blind = blind_tables(connection)
    if blind:
        raise RunbookError(
            f"the role sees only a part of the rows of {', '.join(blind)}: the backup would be partial",
            hint="Back up as the tables' owner without FORCE ROW LEVEL SECURITY, or as a role with BYPASSRLS.",
            tables=blind,
        )


def template_for(connection: psycopg.Connection[t.Any], wanted: t.Mapping[str, t.Any]) -> str:
    """Return the template that was made for databases with this owner, encoding and locale; empty if there is none.

    And none fits a database whose schema public is still the installer's; older backups do not tell.

    Args:
        connection: a session in any database.
        wanted: what M(properties) returned of the original.
    """
    if wanted.get("public_owner") != wanted["owner"]:
        return ""
    row = connection.execute(
        "SELECT datname FROM pg_catalog.pg_database WHERE datistemplate AND shobj_description(oid, 'pg_database') = %s "
        "AND pg_encoding_to_char(encoding) = %s AND datcollate = %s AND datctype = %s ORDER BY datname LIMIT 1",
        [TEMPLATE_MARK + wanted["owner"], *(wanted[key] for key in ("encoding", "collate", "ctype"))],
    ).fetchone()
    return str(row[0]) if row else ""


def create_as(connection: psycopg.Connection[t.Any], name: str, wanted: t.Mapping[str, t.Any]) -> None:
    """Make an empty database with the owner, encoding, locale and tablespace that another one had.

    Its connection limit is 0 until the caller has marked it, by which one that a killed run has left is known.

    Args:
        connection: a session in another database.
        name: of the new one.
        wanted: what M(properties) returned of the original; backups of format 1 know no tablespace.
    """
    parts: list[sql.Composable] = [
        sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {} ENCODING {} LC_COLLATE {} LC_CTYPE {}").format(
            sql.Identifier(name),
            sql.Identifier(template_for(connection, wanted) or "template0"),
            sql.Identifier(wanted["owner"]),
            *(sql.Literal(wanted[key]) for key in ("encoding", "collate", "ctype")),
        )
    ]
    if wanted["locale_provider"] == "i":
        parts.append(sql.SQL("LOCALE_PROVIDER icu ICU_LOCALE {}").format(sql.Literal(wanted["locale"])))
        if wanted.get("icu_rules"):
            parts.append(sql.SQL("ICU_RULES {}").format(sql.Literal(wanted["icu_rules"])))
    elif wanted["locale_provider"] == "b":
        parts.append(sql.SQL("LOCALE_PROVIDER builtin BUILTIN_LOCALE {}").format(sql.Literal(wanted["locale"])))
    elif connection.info.server_version >= 150000:
        # V(c), or what 14 does not tell; template0 may have another one
        parts.append(sql.SQL("LOCALE_PROVIDER libc"))
    if wanted.get("tablespace") not in (None, "pg_default"):  # which takes a right that nobody needs without naming it
        parts.append(sql.SQL("TABLESPACE {}").format(sql.Identifier(wanted["tablespace"])))
    parts.append(sql.SQL("CONNECTION LIMIT 0"))
    connection.execute(sql.SQL(" ").join(parts))


def prepare_for_dump(connection: psycopg.Connection[t.Any], client_major: int) -> None:
    """Have a new database before 15 be what a dump by pg_dump 15 or newer takes for granted.

    Since 15 nobody but its owner may create in the schema public, and such a pg_dump tells only what differs from that.

    Args:
        connection: a session in the new database, before the dump is restored.
        client_major: version of the pg_dump.
    """
    if connection.info.server_version < 150000 <= client_major * 10000:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")


def apply_properties(connection: psycopg.Connection[t.Any], name: str, wanted: t.Mapping[str, t.Any]) -> None:
    """Give a restored database the rights, settings and limit that its dump does not carry.

    Args:
        connection: a session in another database, of a role that owns C(name).
        name: the restored database.
        wanted: what M(properties) returned of the original.
    """
    database = sql.Identifier(name)
    owner = sql.Identifier(wanted["owner"])
    connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
    if not wanted["default_grants"]:  # an owner can have taken rights from itself
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM {}").format(database, owner))
    for grant in _DEFAULT_GRANTS if wanted["default_grants"] else wanted["grants"]:
        connection.execute(
            sql.SQL("GRANT {} ON DATABASE {} TO {}{}").format(
                sql.SQL(grant["privilege"]),
                database,
                sql.Identifier(grant["grantee"]) if grant["grantee"] else sql.SQL("PUBLIC"),
                sql.SQL(" WITH GRANT OPTION" if grant["grantable"] else ""),
            )
        )
    for target, role, setting in _settings(name, wanted):
        _set(connection, target, role, *setting.split("=", 1))
    limit = sql.Literal(wanted["connection_limit"])
    connection.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT {}").format(database, limit))


def refused_settings(connection: psycopg.Connection[t.Any], wanted: t.Mapping[str, t.Any]) -> list[RunbookError]:
    """Return why settings of the connected database could not be given to another one; tried, and taken back each time.

    Args:
        connection: of a role that owns the database.
        wanted: what M(properties) returned of it.
    """
    errors = []
    for target, role, setting in _settings(connection.info.dbname, wanted):
        try:
            with connection.transaction(force_rollback=True):
                _set(connection, target, role, *setting.split("=", 1))
        except RunbookError as error:
            errors.append(error)
    return errors


def _settings(name: str, wanted: t.Mapping[str, t.Any]) -> t.Iterator[tuple[sql.Composable, str | None, str]]:
    """Yield for each setting of a database what gets it, the role that it is for, and the setting as it is stored."""
    database = sql.Identifier(name)
    for entry in wanted["settings"]:
        target = sql.SQL("DATABASE {}").format(database)
        if entry["role"] is not None:
            target = sql.SQL("ROLE {} IN DATABASE {}").format(sql.Identifier(entry["role"]), database)
        for setting in entry["settings"]:
            yield target, entry["role"], setting


#: What a database has whose rights were never changed.
_DEFAULT_GRANTS: list[dict[str, t.Any]] = [
    {"grantee": None, "privilege": privilege, "grantable": False} for privilege in ("CONNECT", "TEMPORARY")
]


def _set(
    connection: psycopg.Connection[t.Any], target: sql.Composable, role: str | None, parameter: str, value: str
) -> None:
    """Give a database, or a role in it, one setting.

    Raises:
        RunbookError: this role may not, or the server does not take it; named, because a setting must not be lost in
            silence. Its value is not told: it may be a secret.
    """
    superuser = connection.info.parameter_status("is_superuser") == "on"
    try:
        if role is not None and not superuser and may_become(connection, role):
            set_role(connection, role)  # without CREATEROLE a role's settings are its own to change
        connection.execute(_setting(target, parameter, value))
        connection.execute("RESET ROLE")
    except psycopg.errors.InsufficientPrivilege as error:
        raise RunbookError(
            f"the database has the setting {parameter}, which this role may not give: {describe(error)}",
            hint=f"Let a superuser GRANT SET ON PARAMETER {parameter} to it (15 and newer), or reset the setting.",
            sqlstate=error.sqlstate,
        ) from None
    except psycopg.Error as error:  # its text has the value
        raise RunbookError(
            f"the database has the setting {parameter}, whose value this server does not take ({error.sqlstate})",
            hint=f"The manifest's properties have it. ALTER DATABASE … RESET {parameter} in the original, or a server "
            "that knows it.",
            sqlstate=error.sqlstate,
        ) from None


#: Settings that are lists of names: quoted as one string they would become one name.
_LISTS = frozenset(
    {"search_path", "datestyle", "session_preload_libraries", "local_preload_libraries", "temp_tablespaces"}
)


def _setting(target: sql.Composable, parameter: str, value: str) -> sql.Composed:
    """Return the statement that gives a role or a database a setting as it is stored."""
    name = sql.Identifier(*parameter.split("."))
    return sql.SQL("ALTER {} SET {} = {}").format(target, name, _value(parameter, value))


def _value(parameter: str, value: str) -> sql.Composable:
    """Return a setting's stored value as SQL."""
    if parameter.lower() not in _LISTS:
        return sql.Literal(value)
    names = re.findall(r'"((?:[^"]|"")*)"|([^,\s]+)', value)
    return sql.SQL(", ").join(sql.Literal(quoted.replace('""', '"') or plain) for quoted, plain in names)
