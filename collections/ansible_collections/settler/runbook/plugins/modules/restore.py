#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Restore a backup in a database's place."""

from __future__ import annotations

DOCUMENTATION = r"""
module: restore
short_description: Restore a backup beside a database, prove it, and swap the two
version_added: 0.1.0
description:
  - Checks every file of the backup against its manifest, restores into a new database, compares row counts and
    catalogue
    with the manifest, gives it owner, grants and settings of the original, and swaps the two by rename.
  - The database that was there is kept under a name with the run's id. Nothing is dropped but what an earlier, killed
    restore has left half made.
  - Refuses without O(confirm), and where rows would be lost without O(accept_data_loss).
  - The connecting role needs CREATEDB, and membership in the owner and in the roles whose sessions it must end.
options:
  src:
    description: Folder of the backup, as RV(settler.runbook.backup#module:path).
    type: path
    required: true
  run_id:
    description: Name of this run.
    type: str
    required: true
  environment:
    description: Name of the environment. A backup of another one is refused.
    type: str
    required: true
  confirm:
    description: Name of the database that is to be replaced.
    type: str
    default: ''
  accept_data_loss:
    description: Go on although tables have other row counts than in the backup.
    type: bool
    default: false
  set_role:
    description: Role to restore as, usually the owner of the tables.
    type: str
  ledger_schema:
    description: Schema of the ledger; its rows are not counted as lost.
    type: str
    default: runbook
  client_bin:
    description: Folder of C(pg_restore). Without it the oldest that fits the server is looked for.
    type: path
  jobs:
    description: Parallel connections of C(pg_restore).
    type: int
    default: 2
  identity:
    description:
      - File of the private key, with mode 0600, for a backup that is encrypted. Without a passphrase.
      - The backup is decrypted into a private folder, which is removed in every case.
    type: path
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
attributes:
  idempotent:
    description: Each run restores again, because what was written since is what is to be taken back.
    support: none
seealso:
  - module: settler.runbook.backup
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Take the database back to the backup of this run
  settler.runbook.restore:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    src: /var/backups/settler/settler/20261123t031500-4f2a
    environment: prod
    set_role: settler_owner
    confirm: settler
    run_id: "{{ runbook_run_id }}"
"""

RETURN = r"""
failed_database:
  description: Name under which the replaced database is kept; empty if there was none.
  returned: always
  type: str
  sample: settler_failed_20261123t031500_4f2a
difference:
  description: Rows now minus rows in the backup, for tables where they differ.
  returned: always
  type: dict
rows:
  description: Rows that were restored.
  returned: always
  type: int
tables:
  description: Tables that were restored.
  returned: always
  type: int
snapshot_time:
  description: The moment that the database is back at (UTC).
  returned: always
  type: str
duration_s:
  description: How long it took, in seconds.
  returned: when restored
  type: float
restored_s:
  description: How long until the restored database was proven, before the swap.
  returned: when restored
  type: float
"""

import dataclasses
import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._encryption import check_openable, opened
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._restore import Options, check, restore

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Restore, or in check mode look whether it may be done and what it would lose."""
    params = module.params
    identity = Path(params["identity"]) if params["identity"] else None
    options = Options(
        source=Path(params["src"]),
        run_id=params["run_id"],
        environment=params["environment"],
        role=params["set_role"],
        ledger_schema=params["ledger_schema"],
        client_bin=params["client_bin"],
        jobs=max(1, params["jobs"]),
        # check mode only shows, so it needs no confirmation
        confirm=params["login_db"] if module.check_mode else params["confirm"],
        accept_data_loss=module.check_mode or params["accept_data_loss"],
    )
    if not module.check_mode:
        if check_openable(options.source, identity):
            check(params, options)  # what is refused anyway is refused before anything is decrypted
        with opened(options.source, identity, options.jobs) as source:
            return {"changed": True, **restore(params, dataclasses.replace(options, source=source))}
    check_openable(options.source, identity)
    checked = check(params, options)
    manifest, names = checked["manifest"], checked["names"]
    return {
        "changed": True,
        "failed_database": names.failed,
        "difference": checked["difference"],
        "rows": manifest["rows"],
        "tables": len(manifest["tables"]),
        "snapshot_time": manifest["snapshot_time"],
        "diff": {
            "before": f"{names.real}: as it is now\n",
            "after": f"{names.real}: as of {manifest['snapshot_time']}\n{names.failed}: as it is now\n",
        },
    }


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "src": {"type": "path", "required": True},
            "run_id": {"type": "str", "required": True},
            "environment": {"type": "str", "required": True},
            "confirm": {"type": "str", "default": ""},
            "accept_data_loss": {"type": "bool", "default": False},
            "set_role": {"type": "str"},
            "ledger_schema": {"type": "str", "default": "runbook"},
            "client_bin": {"type": "path"},
            "jobs": {"type": "int", "default": 2},
            "identity": {"type": "path"},
        },
    )


if __name__ == "__main__":
    main()
