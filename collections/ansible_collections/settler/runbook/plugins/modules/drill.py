#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Prove a backup by restoring it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: drill
short_description: Restore a backup into a scratch database, and call it proven
version_added: 0.1.0
description:
  - With O(state=present) compares every file of the backup with its manifest, restores it into a scratch database, and
    compares row counts, content and catalogue with the manifest. The scratch database stays, to be verified.
  - With O(state=absent) drops the scratch database of O(run_id), and those that other drills of the database have left.
    They carry a mark. Half restored ones are dropped at once, whole ones after 12 hours; one that is worked on stays.
  - With O(state=proven) writes beside the backup, and into the ledger of its database, that it is proven, and how long
    it took.
  - With O(state=present) and O(state=absent) the connection may be to another server, which needs the roles that the
    backup refers to. The database itself is never touched.
options:
  state:
    description: Which step of the drill.
    type: str
    choices: [present, absent, proven]
    default: present
  src:
    description: Folder of the backup. Without it the newest whole one by C(pg_dump) of O(directory) and O(environment).
    type: path
  directory:
    description: Folder of all backups.
    type: path
  environment:
    description: Name of the environment.
    type: str
    default: ''
  run_id:
    description: Name of this run.
    type: str
    required: true
  facts:
    description: >-
      For O(state=proven) what O(state=present) has returned, C(verified), and C(expected_schema), which tells whether
      that was against the expectation of the present schema.
    type: dict
    default: {}
  set_role:
    description: Role to restore as, usually the owner of the tables.
    type: str
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
  client_bin:
    description: Folder of C(pg_restore). Without it the oldest that fits the server is looked for.
    type: path
  jobs:
    description: Parallel connections of C(pg_restore).
    type: int
    default: 2
  maintenance_work_mem:
    description: Memory for each session of C(pg_restore) to build indexes in, unless the server gives more.
    type: str
    default: 256MB
  identity:
    description: File of the private key, with mode 0600, for a backup that is encrypted. Without a passphrase.
    type: path
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
attributes:
  idempotent:
    description: Each drill restores again.
    support: none
seealso:
  - module: settler.runbook.backup
  - module: settler.runbook.restore
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Restore the newest backup into a scratch database
  settler.runbook.drill:
    login_host: scratch.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    directory: /var/backups/settler
    environment: prod
    set_role: settler_owner
    run_id: "{{ runbook_run_id }}"
  register: drill_result
"""

RETURN = r"""
database:
  description: Name of the scratch database; empty in check mode.
  returned: with O(state=present)
  type: str
  sample: settler_drill_20261123t031500_4f2a
path:
  description: Folder of the backup.
  returned: with O(state=present)
  type: str
rows:
  description: Rows that were restored and counted.
  returned: with O(state=present)
  type: int
tables:
  description: Tables that were restored.
  returned: with O(state=present)
  type: int
fingerprints:
  description: Of how many tables the content was compared; 0 for a backup of an older version.
  returned: with O(state=present)
  type: int
catalogue_digest:
  description: Digest of the catalogue, which is the manifest's.
  returned: with O(state=present)
  type: str
server_version:
  description: Version of the server that it was restored on.
  returned: with O(state=present)
  type: str
minutes:
  description: How long it took until it was compared.
  returned: with O(state=present)
  type: float
proof:
  description: What was written beside the backup.
  returned: with O(state=proven), outside check mode
  type: dict
"""

import dataclasses
import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._drill import Options, dropped, newest, proven, restored
from ansible_collections.settler.runbook.plugins.module_utils._encryption import opened
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Do one step of a drill."""
    params = module.params
    if params["state"] == "absent":
        if not module.check_mode:
            dropped(params, params["run_id"])
        return {"changed": True}
    source = (
        Path(params["src"])
        if params["src"]
        else newest(Path(params["directory"]), params["login_db"], params["environment"])
    )
    options = Options(
        source=source,
        run_id=params["run_id"],
        role=params["set_role"],
        ledger_schema=params["ledger_schema"],
        client_bin=params["client_bin"],
        jobs=max(1, params["jobs"]),
        maintenance_work_mem=params["maintenance_work_mem"],
    )
    if params["state"] == "present":
        with opened(source, Path(params["identity"]) if params["identity"] else None, options.jobs) as plain:
            done = restored(params, dataclasses.replace(options, source=plain), check=module.check_mode)
        return {"changed": True, **done, "path": str(source)}
    if module.check_mode:
        return {"changed": True}
    return {"changed": True, "proof": proven(params, options, params["facts"])}


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "state": {"type": "str", "choices": ["present", "absent", "proven"], "default": "present"},
            "src": {"type": "path"},
            "directory": {"type": "path"},
            "environment": {"type": "str", "default": ""},
            "run_id": {"type": "str", "required": True},
            "facts": {"type": "dict", "default": {}},
            "set_role": {"type": "str"},
            "ledger_schema": {"type": "str", "default": "runbook"},
            "client_bin": {"type": "path"},
            "jobs": {"type": "int", "default": 2},
            "maintenance_work_mem": {"type": "str", "default": "256MB"},
            "identity": {"type": "path"},
        },
        required_if=[("state", "present", ("src", "directory"), True), ("state", "proven", ("src", "facts"))],
    )


if __name__ == "__main__":
    main()
