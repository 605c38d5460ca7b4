#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copy a database on its own server, as the fast way back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot
short_description: Copy a database on its own server, as the way back that takes seconds
version_added: 0.1.0
description:
  - With O(state=present) makes C(<database>_snapshot_<run>) with the server's fastest strategy - file_copy from 15 on,
    on 18 by clones where the file system can. Snapshots of the database whose time has passed are dropped before.
  - Nobody may be connected to the database, so it is for a maintenance window.
  - Before that the size is checked against O(max_bytes), and against the free space of the server's disk where the
    server runs on the same host and the login may read C(data_directory).
  - With O(state=absent) drops the snapshots whose time has passed, also one that this run has made.
  - Only what has the runbook's mark in its comment is ever dropped, or has a name of the runbook's, no comment and a
    connection limit of 0, as a run leaves it that was killed before it could set the mark. The mark also keeps owner,
    grants, settings and comment of the database, which M(settler.runbook.restore) gives back.
  - The connecting role needs CREATEDB and membership in the owner.
options:
  state:
    description: Whether to make one, or to drop old ones.
    type: str
    choices: [present, absent]
    default: present
  run_id:
    description: Name of this run.
    type: str
    required: true
  fresh:
    description:
      - Fail if an earlier run of the same O(run_id) has left a copy, instead of returning that one.
      - A change needs it, because what was written since is not in an older copy.
    type: bool
    default: false
  environment:
    description: Name of the environment.
    type: str
    required: true
  keep_hours:
    description: So long it stays; V(0) lets the end of its own run drop it.
    type: float
    default: 24.0
  max_bytes:
    description: Size in bytes of the largest database that is copied.
    type: int
    default: 107374182400
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
seealso:
  - module: settler.runbook.restore
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Copy the database beside its backup
  settler.runbook.snapshot:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    environment: prod
    run_id: "{{ runbook_run_id }}"
"""

RETURN = r"""
name:
  description: Name of the snapshot.
  returned: when O(state=present)
  type: str
  sample: settler_snapshot_20261123t031500_4f2a
bytes:
  description: Size of the database.
  returned: when O(state=present)
  type: int
space:
  description: What was checked of the space for it.
  returned: when O(state=present)
  type: str
strategy:
  description: How it was copied, V(file_copy) or V(clone).
  returned: when one was made
  type: str
duration_s:
  description: How long it took, in seconds.
  returned: when one was made
  type: float
dropped:
  description: Snapshots that were dropped, or in check mode would be.
  returned: always
  type: list
  elements: str
"""

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._snapshot import Options, expire, look, take

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Drop what is old; make one if that is wanted."""
    params = module.params
    options = Options(
        run_id=params["run_id"],
        fresh=params["fresh"],
        environment=params["environment"],
        ledger_schema=params["ledger_schema"],
        max_bytes=params["max_bytes"],
        keep_hours=params["keep_hours"],
    )
    wanted = params["state"] == "present"
    dropped = expire(params, options.run_id, own=not wanted, check=module.check_mode)
    if not wanted:
        return {"changed": bool(dropped), "dropped": dropped}
    if module.check_mode:
        looked = look(params, options)
        del looked["content"]
        return {**looked, "changed": True, "dropped": dropped}
    taken = take(params, options)
    return {**taken, "changed": taken["changed"] or bool(dropped), "dropped": dropped}


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "run_id": {"type": "str", "required": True},
            "fresh": {"type": "bool", "default": False},
            "environment": {"type": "str", "required": True},
            "keep_hours": {"type": "float", "default": 24.0},
            "max_bytes": {"type": "int", "default": 107374182400},
            "ledger_schema": {"type": "str", "default": "runbook"},
        },
    )


if __name__ == "__main__":
    main()
