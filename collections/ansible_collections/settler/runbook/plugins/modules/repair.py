#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Correct the ledger, with a reason."""

from __future__ import annotations

DOCUMENTATION = r"""
module: repair
short_description: Correct what the ledger says of one migration
version_added: 0.1.0
description:
  - Changes one row of the ledger, never the schema, under the lock that runs take.
  - Each repair is kept as an event with its reason, with what the ledger said before and after.
options:
  directory:
    description: Folder of the migrations, on the host where the module runs.
    type: path
    required: true
  optional:
    description: Optional folders that are switched on.
    type: list
    elements: str
    default: []
  file:
    description: The file, as the ledger names it.
    type: str
    required: true
  action:
    description:
      - V(accept) takes the file as it is now for what was applied.
      - V(forget) deletes its row and its journal. A file that is still there is applied again by the next run.
      - V(done) and V(again) settle a statement that a run was stopped in where the catalogue cannot tell whether it was
        carried out.
    type: str
    choices: [accept, forget, done, again]
    default: accept
  reason:
    description: Why; kept in the ledger.
    type: str
    required: true
  run_id:
    description: Name of this run.
    type: str
    required: true
  set_role:
    description: Role that owns the ledger.
    type: str
  project:
    description: Part of the lock's key, as for M(settler.runbook.migrate).
    type: str
    default: settler
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
  lock_wait:
    description: Seconds to wait for a run of the same database.
    type: float
    default: 60.0
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
seealso:
  - module: settler.runbook.migrate
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Accept a comment that was added after the file was applied
  settler.runbook.repair:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    directory: "{{ playbook_dir }}/../sql/migrations"
    file: 004_comments.sql
    reason: only a comment was changed
    set_role: settler_owner
    run_id: "{{ runbook_run_id }}"
"""

RETURN = r"""
before:
  description: What the ledger said.
  returned: success
  type: str
after:
  description: What it says now, or would say.
  returned: success
  type: str
"""

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, set_role
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._lock import run_lock
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._repair import ACTIONS, repair
from ansible_collections.settler.runbook.plugins.module_utils._run import Options

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

ARGUMENTS: dict[str, t.Any] = {
    "directory": {"type": "path", "required": True},
    "optional": {"type": "list", "elements": "str", "default": []},
    "file": {"type": "str", "required": True},
    "action": {"type": "str", "choices": list(ACTIONS), "default": "accept"},
    "reason": {"type": "str", "required": True},
    "run_id": {"type": "str", "required": True},
    "set_role": {"type": "str"},
    "project": {"type": "str", "default": "settler"},
    "ledger_schema": {"type": "str", "default": "runbook"},
    "lock_wait": {"type": "float", "default": 60.0},
}


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Repair under the run's lock."""
    params = module.params
    files = read_migrations(params["directory"], params["optional"])
    options = Options(
        run_id=params["run_id"],
        project=params["project"],
        schema=params["ledger_schema"],
        role=params["set_role"],
        lock_wait=params["lock_wait"],
    )
    with connect(params, application=f"runbook:{params['run_id']}:repair") as connection, run_lock(connection, options):
        set_role(connection, options.role)
        before, after = repair(
            Ledger(connection, options.schema),
            files,
            params["file"],
            params["action"],
            reason=params["reason"],
            run_id=options.run_id,
            check=module.check_mode,
        )
    return {
        "changed": before != after,
        "before": before,
        "after": after,
        "diff": {"before": f"{params['file']}: {before}\n", "after": f"{params['file']}: {after}\n"},
    }


def main() -> None:
    """Run the module."""
    run_postgres_module(work, ARGUMENTS)


if __name__ == "__main__":
    main()
