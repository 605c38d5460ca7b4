#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Back a server up with pgBackRest."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_pgbackrest
short_description: Back a PostgreSQL server up with pgBackRest, and make a restore point behind it
version_added: 0.1.0
description:
  - Takes a backup of a stanza that exists, makes a named restore point, and waits until it has reached the archive.
  - Writes C(manifest.json) with the backup's label, the restore point, its LSN, and the command that goes back to it,
    so that M(settler.runbook.backup_info) lists it. Going back is for an operator - it concerns the whole server.
  - After that the rows of the database are counted and hashed, so that M(settler.runbook.verify) can compare the data
    after a migration. That reads the database once.
  - A stanza of another server is refused. A run that was killed is continued with the backup that it has taken.
  - Manifests of backups that pgBackRest's retention has removed are removed, too.
options:
  directory:
    description: Folder of all backups; the manifest goes to C(<directory>/<database>/<run id>).
    type: path
    required: true
  run_id:
    description: Name of this run.
    type: str
    required: true
  fresh:
    description:
      - Fail if an earlier run of the same O(run_id) has left a backup, instead of returning that one.
      - A change needs it, because what was written since is not in an older backup.
    type: bool
    default: false
  environment:
    description: Name of the environment.
    type: str
    required: true
  set_role:
    description: Role to read ledger and catalogue as, usually the owner of the tables.
    type: str
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
  stanza:
    description: pgBackRest's stanza of the server.
    type: str
    required: true
  type:
    description: Type of the backup. Without an earlier one pgBackRest takes a full one.
    type: str
    choices: [full, diff, incr]
    default: incr
  config:
    description: Path of pgBackRest's configuration, if it is not in the usual place.
    type: path
  account:
    description: Account of the cluster, which pgBackRest runs as. The module runs as this one or as root.
    type: str
    default: postgres
  archive_timeout:
    description: Seconds until the restore point must be in the archive.
    type: float
    default: 60.0
  fingerprints:
    description: Whether the data is counted and hashed. A role that does not see all rows is refused.
    type: bool
    default: true
  jobs:
    description: Sessions that read the data for the fingerprints at a time.
    type: int
    default: 2
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.fingerprints
  - settler.runbook.attributes
requirements:
  - pgbackrest >= 2.41 on the host where the module runs, which is the server's or one that its configuration knows
notes:
  - The login needs C(EXECUTE) on C(pg_create_restore_point(text\)) and C(pg_switch_wal(\)).
seealso:
  - module: settler.runbook.backup
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Back the server up before the migration
  settler.runbook.backup_pgbackrest:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    directory: /var/backups/settler
    environment: prod
    set_role: settler_owner
    stanza: main
    type: diff
    run_id: "{{ runbook_run_id }}"
"""

RETURN = r"""
path:
  description: Folder of the manifest; empty in check mode.
  returned: always
  type: str
label:
  description: Label of pgBackRest's backup; empty in check mode.
  returned: always
  type: str
  sample: 20261124-213748F
restore_point:
  description: Name of the restore point; empty in check mode.
  returned: always
  type: str
lsn:
  description: Where it is in the write-ahead log; empty in check mode.
  returned: always
  type: str
restore_command:
  description: The command that goes back to it, while the server is stopped; empty in check mode.
  returned: always
  type: str
bytes:
  description: What the backup has added to the repository.
  returned: always
  type: int
duration_s:
  description: How long it took, in seconds.
  returned: when backed up
  type: float
pruned:
  description: Paths of manifests that were removed.
  returned: always
  type: list
  elements: str
"""

import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import limits_of, limits_spec
from ansible_collections.settler.runbook.plugins.module_utils._manifest import home_of
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._pgbackrest import TYPES, Options, backup

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

FACTS = ("path", "label", "restore_point", "lsn", "restore_command", "bytes", "duration_s", "pruned")


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Back up, or in check mode look whether it could be done."""
    params = module.params
    options = Options(
        directory=Path(params["directory"]),
        run_id=params["run_id"],
        fresh=params["fresh"],
        environment=params["environment"],
        role=params["set_role"],
        ledger_schema=params["ledger_schema"],
        stanza=params["stanza"],
        type=params["type"],
        config=params["config"],
        account=params["account"],
        archive_timeout=params["archive_timeout"],
        limits=limits_of(params) if params["fingerprints"] else None,
    )
    path = home_of(options.directory, params["login_db"]) / options.run_id
    changed = not path.exists()
    manifest = backup(params, options, check=module.check_mode and changed)
    return {
        "changed": changed,
        **{key: manifest[key] for key in FACTS if key in manifest},
        "diff": {"before": "", "after": f"{path}\n" if changed else ""},
    }


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "directory": {"type": "path", "required": True},
            "run_id": {"type": "str", "required": True},
            "fresh": {"type": "bool", "default": False},
            "environment": {"type": "str", "required": True},
            "set_role": {"type": "str"},
            "ledger_schema": {"type": "str", "default": "runbook"},
            "stanza": {"type": "str", "required": True},
            "type": {"type": "str", "default": "incr", "choices": list(TYPES)},
            "config": {"type": "path"},
            "account": {"type": "str", "default": "postgres"},
            "archive_timeout": {"type": "float", "default": 60.0},
            "fingerprints": {"type": "bool", "default": True},
            **limits_spec(),
            "jobs": {"type": "int", "default": 2},
        },
    )


if __name__ == "__main__":
    main()
