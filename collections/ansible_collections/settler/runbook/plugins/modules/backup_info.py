#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""List the backups of a database."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_info
short_description: List the backups of a database from their manifests
version_added: 0.1.0
description:
  - Reads the manifests below a folder. No server is asked.
  - A damaged backup is listed with its C(error). Manifests, names and sizes are always looked at, what is in the files
    only with O(checksums).
options:
  directory:
    description: Folder of all backups.
    type: path
    required: true
  database:
    description: Name of the database.
    type: str
    required: true
  checksums:
    description: Whether every file is read and compared with its checksum.
    type: bool
    default: false
attributes:
  check_mode:
    description: Reads only, so check mode makes no difference.
    support: full
  diff_mode:
    description: Changes nothing, so there is nothing to show.
    support: N/A
seealso:
  - module: settler.runbook.backup
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Find the newest backup
  settler.runbook.backup_info:
    directory: /var/backups/settler
    database: settler
  register: backups
"""

RETURN = r"""
backups:
  description: The backups, newest first.
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: Folder of the backup.
      type: str
      returned: always
    run_id:
      description: Run that made it.
      type: str
      returned: always
    finished_at:
      description: When it was finished (UTC); empty for a damaged one.
      type: str
      returned: always
    environment:
      description: Environment of the database.
      type: str
      returned: when whole
    ledger_head:
      description: Version of the database then; null if nothing was applied.
      type: str
      returned: when whole
    rows:
      description: Rows of all tables.
      type: int
      returned: when whole
    bytes:
      description: Size in bytes.
      type: int
      returned: when whole
    age_s:
      description: Seconds since it was finished.
      type: float
      returned: when whole
    compression:
      description: How it is compressed.
      type: str
      returned: when whole
    proof:
      description: What the last restore drill has seen, with C(at) and C(minutes); null if it is not proven.
      type: dict
      returned: always
    method:
      description: V(dump), or V(pgbackrest) for one that M(settler.runbook.restore) cannot restore.
      type: str
      returned: when whole
    encryption:
      description: V(none), V(age) or V(gpg).
      type: str
      returned: when whole
    label:
      description: Label of pgBackRest's backup.
      type: str
      returned: when made by pgBackRest
    error:
      description: What is damaged; empty if nothing is.
      type: str
      returned: always
"""

import datetime as dt
import typing as t
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.settler.runbook.plugins.module_utils._encryption import method_of
from ansible_collections.settler.runbook.plugins.module_utils._manifest import list_backups

FACTS = (
    "path",
    "run_id",
    "finished_at",
    "age_s",
    "environment",
    "ledger_head",
    "rows",
    "bytes",
    "compression",
    "method",
    "label",
    "encryption",
    "proof",
    "error",
)


def told(row: dict[str, t.Any], now: dt.datetime) -> dict[str, t.Any]:
    """Return what is said of a backup."""
    if row["finished_at"]:
        age = round((now - dt.datetime.fromisoformat(row["finished_at"])).total_seconds(), 1)
        row = {"method": "dump", **row, "age_s": age, "encryption": method_of(row)}
    return {key: row[key] for key in FACTS if key in row}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "database": {"type": "str", "required": True},
            "checksums": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        found = list_backups(
            Path(module.params["directory"]), module.params["database"], checksums=module.params["checksums"]
        )
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")
    now = dt.datetime.now(dt.UTC)
    module.exit_json(changed=False, backups=[told(row, now) for row in found])


if __name__ == "__main__":
    main()
