#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep an empty database that restores on PostgreSQL 14 begin with."""

from __future__ import annotations

DOCUMENTATION = r"""
module: template
short_description: Keep an empty database that restores on PostgreSQL 14 begin with
version_added: 0.1.0
description:
  - Before PostgreSQL 15 the schema public of a new database belongs to the role that PostgreSQL was installed with, and
    only a superuser can give it away. A role that is none can so make a database, and restore no dump in it whose
    schema public has another owner.
  - Makes an empty template with the owner, encoding and locale of O(login_db), whose schema public belongs to O(owner)
    and is open to nobody else. A restore as a member of O(owner) takes it instead of C(template0).
  - From PostgreSQL 15 on does nothing.
options:
  owner:
    description: Role that owns the template and its schema public.
    type: str
    required: true
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
notes:
  - Needs a superuser.
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Let the migrator restore on PostgreSQL 14
  settler.runbook.template:
    login_host: db.example.org
    login_user: postgres
    login_password: "{{ runbook_admin_password }}"
    login_db: settler
    owner: settler_owner
"""

RETURN = r"""
name:
  description: Name of the template; empty where the server needs none.
  returned: success
  type: str
  sample: settler_template_owner
"""

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    MAINTENANCE_DB,
    connect,
    connect_if_exists,
)
from ansible_collections.settler.runbook.plugins.module_utils._database import properties, template_for
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._template import make

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Make the template where the server needs one and has none."""
    params, application = module.params, "runbook:template"
    connection = (connect_if_exists if module.check_mode else connect)(params, application=application)
    if connection is None:
        return {"changed": False, "name": ""}
    with connection:
        if connection.info.server_version >= 150000:
            return {"changed": False, "name": ""}
        wanted = {**properties(connection), "owner": params["owner"], "public_owner": params["owner"]}
        if found := template_for(connection, wanted):
            return {"changed": False, "name": found}
    name = f"{params['login_db'][:40]}_template_owner"
    if not module.check_mode:
        with connect(params, dbname=MAINTENANCE_DB, application=application) as server:
            make(server, name, wanted, lambda: connect(params, dbname=name, application=application))
    return {"changed": True, "name": name}


def main() -> None:
    """Run the module."""
    run_postgres_module(work, {"owner": {"type": "str", "required": True}})


if __name__ == "__main__":
    main()
