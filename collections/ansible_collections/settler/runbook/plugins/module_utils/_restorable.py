# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What of a database its own way back could not bring back: else only a failed rollback would find that out."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._database import (
    properties,
    refused_settings,
    template_for,
)
from ansible_collections.settler.runbook.plugins.module_utils._prepared import HINT, prepared
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import sql

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

#: How many objects of a kind are named.
_NAMED = 5
#: Seconds that a transaction manager may leave a transaction prepared.
_MOMENT = 5


@dataclass(frozen=True)
class Obstacle:
    """What cannot be brought back, and what to do; C(copied) tells whether a snapshot has it."""

    detail: str
    hint: str
    copied: bool


#: Everything that has an owner, a dump names by itself, and belongs to no extension and no other object.
_OBJECTS = """
WITH objects AS (
    SELECT o.* FROM (
        SELECT 'pg_class'::regclass AS catalogue, oid, relowner AS owner, relacl AS acl FROM pg_catalog.pg_class
            WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
        UNION ALL SELECT 'pg_proc'::regclass, oid, proowner, proacl FROM pg_catalog.pg_proc
        UNION ALL SELECT 'pg_type'::regclass, oid, typowner, typacl FROM pg_catalog.pg_type
        UNION ALL SELECT 'pg_namespace'::regclass, oid, nspowner, nspacl FROM pg_catalog.pg_namespace
            WHERE nspname !~ '^pg_'
        UNION ALL SELECT 'pg_operator'::regclass, oid, oprowner, NULL FROM pg_catalog.pg_operator
        UNION ALL SELECT 'pg_opclass'::regclass, oid, opcowner, NULL FROM pg_catalog.pg_opclass
        UNION ALL SELECT 'pg_opfamily'::regclass, oid, opfowner, NULL FROM pg_catalog.pg_opfamily
        UNION ALL SELECT 'pg_collation'::regclass, oid, collowner, NULL FROM pg_catalog.pg_collation
        UNION ALL SELECT 'pg_conversion'::regclass, oid, conowner, NULL FROM pg_catalog.pg_conversion
        UNION ALL SELECT 'pg_ts_dict'::regclass, oid, dictowner, NULL FROM pg_catalog.pg_ts_dict
        UNION ALL SELECT 'pg_ts_config'::regclass, oid, cfgowner, NULL FROM pg_catalog.pg_ts_config
        UNION ALL SELECT 'pg_statistic_ext'::regclass, oid, stxowner, NULL FROM pg_catalog.pg_statistic_ext
        UNION ALL SELECT 'pg_foreign_server'::regclass, oid, srvowner, srvacl FROM pg_catalog.pg_foreign_server
        UNION ALL SELECT 'pg_publication'::regclass, oid, pubowner, NULL FROM pg_catalog.pg_publication
            WHERE NOT puballtables
        UNION ALL SELECT 'pg_largeobject'::regclass, oid, lomowner, lomacl FROM pg_catalog.pg_largeobject_metadata
    ) o
    WHERE (o.oid >= 16384 OR o.catalogue = 'pg_largeobject'::regclass OR (o.catalogue = 'pg_namespace'::regclass
           AND o.oid = to_regnamespace('public') AND current_setting('server_version_num')::int >= 150000))
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                      WHERE d.classid = o.catalogue AND d.objid = o.oid AND d.deptype IN ('e', 'i'))
)"""

_OWNED = (
    _OBJECTS
    + """
SELECT pg_describe_object(catalogue, oid, 0) || ' of ' || pg_get_userbyid(owner) FROM objects
WHERE NOT pg_has_role(%(role)s, owner, CASE WHEN current_setting('server_version_num')::int >= 160000
    THEN 'SET' ELSE 'MEMBER' END) ORDER BY catalogue, oid
"""
)

_GRANTED = (
    _OBJECTS
    + """
SELECT DISTINCT pg_describe_object(catalogue, oid, 0) || ' by ' || pg_get_userbyid(grantor)
FROM objects, aclexplode(acl) WHERE grantor <> owner ORDER BY 1
"""
)

_OF_SUPERUSERS = """
WITH found AS (
    SELECT 'pg_event_trigger'::regclass AS catalogue, oid FROM pg_catalog.pg_event_trigger
    UNION ALL SELECT 'pg_publication'::regclass, oid FROM pg_catalog.pg_publication
        WHERE puballtables {of_schemas}
    UNION ALL SELECT 'pg_extension'::regclass, x.oid FROM pg_catalog.pg_extension x
        JOIN pg_catalog.pg_available_extensions a ON a.name = x.extname
        JOIN pg_catalog.pg_available_extension_versions v ON v.name = a.name AND v.version = a.default_version
        WHERE v.superuser AND NOT v.trusted
    UNION ALL SELECT 'pg_language'::regclass, oid FROM pg_catalog.pg_language
    UNION ALL SELECT 'pg_proc'::regclass, p.oid FROM pg_catalog.pg_proc p
        JOIN pg_catalog.pg_language l ON l.oid = p.prolang WHERE NOT l.lanpltrusted OR p.proleakproof
    UNION ALL SELECT 'pg_type'::regclass, oid FROM pg_catalog.pg_type WHERE typtype = 'b'
    UNION ALL SELECT 'pg_opclass'::regclass, oid FROM pg_catalog.pg_opclass
    UNION ALL SELECT 'pg_opfamily'::regclass, oid FROM pg_catalog.pg_opfamily
    UNION ALL SELECT 'pg_am'::regclass, oid FROM pg_catalog.pg_am
    UNION ALL SELECT 'pg_cast'::regclass, oid FROM pg_catalog.pg_cast WHERE castmethod = 'b'
    UNION ALL SELECT 'pg_ts_parser'::regclass, oid FROM pg_catalog.pg_ts_parser
    UNION ALL SELECT 'pg_ts_template'::regclass, oid FROM pg_catalog.pg_ts_template
    UNION ALL SELECT 'pg_foreign_data_wrapper'::regclass, oid FROM pg_catalog.pg_foreign_data_wrapper
)
SELECT pg_describe_object(catalogue, oid, 0) FROM found f
WHERE oid >= 16384 AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
    WHERE d.classid = f.catalogue AND d.objid = f.oid AND d.deptype IN ('e', 'i')) ORDER BY catalogue, oid
"""
_OF_SCHEMAS = "OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace WHERE pnpubid = pg_publication.oid)"

_DEFAULTS = """
SELECT DISTINCT pg_get_userbyid(defaclrole) FROM pg_catalog.pg_default_acl
WHERE NOT pg_has_role(%(role)s, defaclrole, CASE WHEN current_setting('server_version_num')::int >= 160000
    THEN 'USAGE' ELSE 'MEMBER' END) ORDER BY 1
"""

_TABLESPACES = """
SELECT spcname FROM pg_catalog.pg_tablespace s WHERE NOT has_tablespace_privilege(%(role)s, oid, 'CREATE')
  AND EXISTS (SELECT FROM pg_catalog.pg_class WHERE reltablespace = s.oid AND oid >= 16384) ORDER BY 1
"""

#: Until 15 the schema public of a new database belongs to whom PostgreSQL was installed with, and not to the database's
#: owner.
_PUBLIC = """
SELECT pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace
WHERE nspname = 'public' AND nspowner <> 10 AND current_setting('server_version_num')::int < 150000
"""

_SUBSCRIPTIONS = """
SELECT subname FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid
WHERE d.datname = current_database() ORDER BY 1
"""

_SLOTS = "SELECT slot_name FROM pg_catalog.pg_replication_slots WHERE database = current_database() ORDER BY 1"


def obstacles(connection: psycopg.Connection[t.Any], role: str) -> list[Obstacle]:
    """Return what a rollback of the connected database could not bring back.

    Args:
        connection: the login that restores; nothing is changed.
        role: who it restores as.
    """
    about = properties(connection)
    found = _of_dump(connection, role, about) if not _is_superuser(connection, role) else []
    if names := _names(connection, sql.SQL(_SUBSCRIPTIONS), role):
        hint = "DROP SUBSCRIPTION before the run and make it again afterwards: no dump and no snapshot has one."
        found.append(Obstacle(f"a subscription stays with the failed database: {names}", hint, copied=False))
    if names := prepared(connection, connection.info.dbname, older_than=_MOMENT):
        found.append(Obstacle(f"prepared transactions let nobody rename the database: {names}", HINT, copied=False))
    found += [
        Obstacle(error.message, f"{error.hint} No snapshot has it either.", copied=False)
        for error in refused_settings(connection, about)
    ]
    return found


def slots(connection: psycopg.Connection[t.Any]) -> str:
    """Return the names of the replication slots of the connected database, which stay with the failed one."""
    return _names(connection, sql.SQL(_SLOTS), "")


def _of_dump(connection: psycopg.Connection[t.Any], role: str, about: t.Mapping[str, t.Any]) -> list[Obstacle]:
    """Return what a dump has and this role could not restore, because it is no superuser."""
    of_schemas = _OF_SCHEMAS if connection.info.server_version >= 150000 else ""
    snapshot = "or let a snapshot be the way back (backup_snapshot: true)."
    kinds: list[tuple[sql.Composable, str, str]] = [
        (
            sql.SQL(_OF_SUPERUSERS).format(of_schemas=sql.SQL(of_schemas)),
            "only a superuser can make",
            f"Drop what is not needed, {snapshot}",
        ),
        (
            sql.SQL(_OWNED),
            f"{role} may not give to its owner",
            f"ALTER … OWNER TO {role}, as create_database_adopt_from of playbooks/create_database.yml does, {snapshot}",
        ),
        (
            sql.SQL(_GRANTED),
            "rights that another role than the owner has granted, of",
            f"Revoke them and grant them as the owner, {snapshot}",
        ),
        (
            sql.SQL(_DEFAULTS),
            "default privileges of",
            f"ALTER DEFAULT PRIVILEGES FOR ROLE … REVOKE …, or for role {role} instead, {snapshot}",
        ),
        (
            sql.SQL(_TABLESPACES),
            f"{role} may create nothing in tablespace",
            f"GRANT CREATE ON TABLESPACE … TO {role}, {snapshot}",
        ),
    ]
    if not template_for(connection, about):
        what = "before PostgreSQL 15 only a superuser can give the schema public of a new database to"
        hint = f"playbooks/create_database.yml makes a template for that; run it again, {snapshot}"
        kinds.append((sql.SQL(_PUBLIC), what, hint))
    return [
        Obstacle(f"{what}: {names}", hint, copied=True)
        for query, what, hint in kinds
        if (names := _names(connection, query, role))
    ]


def _is_superuser(connection: psycopg.Connection[t.Any], role: str) -> bool:
    row = connection.execute("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = %s", [role]).fetchone()
    return bool(row and row[0])


def _names(connection: psycopg.Connection[t.Any], query: sql.Composable, role: str) -> str:
    names = [name for (name,) in connection.execute(sql.SQL("{}").format(query), {"role": role})]
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
