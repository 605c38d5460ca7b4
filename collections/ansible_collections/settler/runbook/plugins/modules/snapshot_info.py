#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""List the snapshots of a database."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_info
short_description: List the copies of a database that stand beside it
version_added: 0.1.0
description:
  - Lists what M(settler.runbook.snapshot) has made of a database and nobody has dropped yet. The database itself need
    not be there.
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes.info
seealso:
  - module: settler.runbook.snapshot
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: List the snapshots
  settler.runbook.snapshot_info:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
  register: snapshots
"""

RETURN = r"""
snapshots:
  description: The snapshots, newest first.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the database that the snapshot is.
      type: str
      returned: always
      sample: settler_snapshot_20261123t031500_4f2a
    run_id:
      description: Run that made it.
      type: str
      returned: always
    environment:
      description: Environment of the database.
      type: str
      returned: always
    at:
      description: When it was made (UTC).
      type: str
      returned: always
    age_hours:
      description: Hours since then.
      type: float
      returned: always
    keep_hours:
      description: So many hours it stays.
      type: float
      returned: always
    expired:
      description: Whether its time has passed.
      type: bool
      returned: always
    bytes:
      description: Its size; null where the role may not know it.
      type: int
      returned: always
"""

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import MAINTENANCE_DB, connect
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._snapshot import found

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

FACTS = ("name", "run_id", "environment", "at", "age_hours", "keep_hours", "expired", "bytes")


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """List them."""
    with connect(module.params, dbname=MAINTENANCE_DB, application="runbook:status") as connection:
        snapshots = found(connection, module.params["login_db"])
    return {"changed": False, "snapshots": [{key: getattr(one, key) for key in FACTS} for one in snapshots]}


def main() -> None:
    """Run the module."""
    run_postgres_module(work, {})


if __name__ == "__main__":
    main()
