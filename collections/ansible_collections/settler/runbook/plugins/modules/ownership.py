#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Give the objects of a database to one owner."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ownership
short_description: Give the objects of a database to one owner
version_added: 0.1.0
description:
  - Makes O(owner) the owner of the schemas, tables, views, sequences, functions and types that belong to one of
    O(adopt_from).
  - Fails, and names them, if objects belong to any other role. Taking them unasked could break another application.
  - Objects of extensions and of PostgreSQL itself are left alone.
  - C(REASSIGN OWNED) cannot do this for the role that PostgreSQL was installed with.
options:
  owner:
    description: Role that shall own everything.
    type: str
    required: true
  adopt_from:
    description: Roles whose objects may be taken.
    type: list
    elements: str
    default: []
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Take over what the installation script made
  settler.runbook.ownership:
    login_host: db.example.org
    login_user: postgres
    login_password: "{{ runbook_admin_password }}"
    login_db: settler
    owner: settler_owner
    adopt_from: [postgres]
"""

RETURN = r"""
adopted:
  description: The objects that got, or in check mode would get, another owner.
  returned: success
  type: list
  elements: str
  sample: ["TABLE public.jobs"]
"""

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, connect_if_exists
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import sql

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

# Sequences of identity and serial columns follow their table; indexes and row types too.
OBJECTS = """
SELECT kind, name, pg_get_userbyid(owner) FROM (
    SELECT 'SCHEMA' AS kind, quote_ident(nspname) AS name, nspowner AS owner, oid,
        'pg_namespace'::regclass AS catalogue, nspname AS schema
    FROM pg_catalog.pg_namespace WHERE nspname <> 'public'
    UNION ALL
    SELECT CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'S' THEN 'SEQUENCE'
        WHEN 'f' THEN 'FOREIGN TABLE' ELSE 'TABLE' END,
        quote_ident(n.nspname) || '.' || quote_ident(c.relname), c.relowner, c.oid, 'pg_class'::regclass, n.nspname
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND NOT (c.relkind = 'S' AND EXISTS (
        SELECT FROM pg_catalog.pg_depend d WHERE d.objid = c.oid AND d.classid = 'pg_class'::regclass
        AND d.deptype IN ('a', 'i')))
    UNION ALL
    SELECT CASE p.prokind WHEN 'p' THEN 'PROCEDURE' WHEN 'a' THEN 'AGGREGATE' ELSE 'FUNCTION' END,
        p.oid::regprocedure::text, p.proowner, p.oid, 'pg_proc'::regclass, n.nspname
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    UNION ALL
    SELECT CASE y.typtype WHEN 'd' THEN 'DOMAIN' ELSE 'TYPE' END, y.oid::regtype::text, y.typowner, y.oid,
        'pg_type'::regclass, n.nspname
    FROM pg_catalog.pg_type y JOIN pg_catalog.pg_namespace n ON n.oid = y.typnamespace
    LEFT JOIN pg_catalog.pg_class c ON c.oid = y.typrelid
    WHERE y.typtype IN ('e', 'd', 'r') OR (y.typtype = 'c' AND c.relkind = 'c')
) o
WHERE schema !~ '^pg_' AND schema <> 'information_schema' AND pg_get_userbyid(owner) <> %(owner)s
  AND pg_get_userbyid(owner) <> 'pg_database_owner'
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = o.oid AND e.classid = o.catalogue
                  AND e.deptype = 'e')
ORDER BY kind, name
"""


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Find objects of other owners; refuse strangers'; take the rest in one transaction."""
    params = module.params
    owner, adopt_from = params["owner"], params["adopt_from"]
    connection = (connect_if_exists if module.check_mode else connect)(params, application="runbook:ownership")
    if connection is None:
        return {"changed": False, "adopted": []}
    with connection:
        found = connection.execute(t.cast("t.LiteralString", OBJECTS), {"owner": owner}).fetchall()
        strangers = [f"{kind} {name} of {role}" for kind, name, role in found if role not in adopt_from]
        if strangers:
            listed = "\n".join(f"  {line}" for line in strangers[:20])
            raise RunbookError(
                f"{len(strangers)} objects of {params['login_db']} belong to other roles than {owner}; "
                f"nothing was changed\n{listed}",
                hint="If they shall belong to it, name those roles: -e create_database_adopt_from=<role>,<role>",
                objects=strangers,
            )
        adopted = [f"{kind} {name}" for kind, name, _role in found]
        if adopted and not module.check_mode:
            with connection.transaction():
                connection.execute("SET LOCAL lock_timeout = '5s'")
                for kind, name, _role in found:  # names come quoted from the catalogue
                    command = sql.SQL(t.cast("t.LiteralString", f"ALTER {kind} {name} OWNER TO "))
                    connection.execute(command + sql.Identifier(owner))
    before = "".join(f"{kind} {name}: {role}\n" for kind, name, role in found)
    after = "".join(f"{kind} {name}: {owner}\n" for kind, name, role in found)
    return {"changed": bool(adopted), "adopted": adopted, "diff": {"before": before, "after": after}}


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "owner": {"type": "str", "required": True},
            "adopt_from": {"type": "list", "elements": "str", "default": []},
        },
    )


if __name__ == "__main__":
    main()
