#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fetch a copy of a backup back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_fetch
short_description: Fetch a copy of a backup from off the host
version_added: 0.1.0
description:
  - Fetches a copy that M(settler.runbook.backup_copy) has made into a folder of backups, on this host or another one,
    compares every file with the manifest, and only then gives it its name.
  - A backup that is there already is compared and kept.
options:
  place:
    description: Where the copies are, as in O(settler.runbook.backup_copy#module:places).
    type: str
    required: true
  database:
    description: Name of the database.
    type: str
    required: true
  environment:
    description: Name of the environment that the newest copy is taken of.
    type: str
    required: true
  run_id:
    description: Run whose backup is wanted; without it the newest.
    type: str
    default: ''
  directory:
    description: Folder of all backups; this one goes to C(<directory>/<database>/<run id>).
    type: path
    required: true
  rclone_config:
    description: Path of rclone's configuration, with mode 0600. Only folders of the host can do without.
    type: path
attributes:
  check_mode:
    description: In check mode the module looks for the copy, says where it would go, and writes nothing.
    support: full
  diff_mode:
    description: Returns what it changes as C(before) and C(after).
    support: full
  idempotent:
    description: A second run changes nothing, unless there is a newer copy.
    support: full
requirements:
  - rclone on the host where the module runs
seealso:
  - module: settler.runbook.backup_copy
  - module: settler.runbook.restore
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Fetch the newest copy
  settler.runbook.backup_fetch:
    place: offsite:settler-backups/prod
    database: settler
    environment: prod
    directory: /var/backups/settler
    rclone_config: /etc/settler/rclone.conf
"""

RETURN = r"""
path:
  description: Folder of the backup.
  returned: always
  type: str
  sample: /var/backups/settler/settler/20261123t031500-4f2a
"""

import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._manifest import home_of
from ansible_collections.settler.runbook.plugins.module_utils._module import run_module
from ansible_collections.settler.runbook.plugins.module_utils._offsite import Wanted, fetch, find_copy
from ansible_collections.settler.runbook.plugins.module_utils._rclone import Place

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

ARGUMENTS: dict[str, t.Any] = {
    "place": {"type": "str", "required": True},
    "database": {"type": "str", "required": True},
    "environment": {"type": "str", "required": True},
    "run_id": {"type": "str", "default": ""},
    "directory": {"type": "path", "required": True},
    "rclone_config": {"type": "path"},
}


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Fetch the copy, or in check mode only look for it."""
    params = module.params
    wanted = Wanted(params["database"], params["environment"], params["run_id"], Path(params["directory"]))
    place = Place.of(params["place"], Path(params["rclone_config"]) if params["rclone_config"] else None)
    run_id = find_copy(place, wanted)
    path = home_of(wanted.directory, wanted.database) / run_id
    changed = not path.exists() if module.check_mode else fetch(place, wanted, run_id)
    return {
        "changed": changed,
        "path": str(path),
        "diff": {"before": "", "after": f"{path}\n" if changed else ""},
    }


def main() -> None:
    """Run the module."""
    run_module(work, ARGUMENTS)


if __name__ == "__main__":
    main()
