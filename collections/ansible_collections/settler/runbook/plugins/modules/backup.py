#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Dump a database with the proof of the dump."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup
short_description: Dump a PostgreSQL database, with a manifest that proves the dump
version_added: 0.1.0
description:
  - Runs C(pg_dump) in directory format, in parallel, in a snapshot that also gives the row count of every table and
    the digest of the catalogue.
  - Writes C(manifest.json) with these, with the checksum of every file, and with what a dump of one database leaves
    out - owner, grants and settings of the database, and the roles it refers to, without passwords.
  - The backup is written under a temporary name and renamed when it is whole and on the disk. Folders have mode 0700,
    files 0600. What a killed run has left is removed by the next one, its C(pg_dump) is ended.
  - Refuses a folder that others can write to, or that has a symbolic link in its path, and a disk on which the dump
    will hardly fit, by the size of the database and the ratio of its last backup.
  - Refuses a role that does not see all rows. Such a dump would be partial.
  - A run that has its backup already changes nothing.
options:
  directory:
    description: Folder of all backups; this one goes to C(<directory>/<database>/<run id>).
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
    description: Name of the environment. A backup is only restored where it was made.
    type: str
    required: true
  set_role:
    description: Role to dump as, usually the owner of the tables.
    type: str
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
  client_bin:
    description: Folder of C(pg_dump). Without it the oldest that fits the server is looked for.
    type: path
  jobs:
    description: Parallel connections of C(pg_dump).
    type: int
    default: 2
  compression:
    description:
      - V(auto) takes the best that this C(pg_dump) can - V(zstd:1) or V(lz4) from version 16 on, else V(gzip:1).
      - Otherwise as C(pg_dump --compress) of version 16, for instance V(zstd:3), V(gzip:6), or V(none).
    type: str
    default: auto
  lock_timeout:
    description: Seconds to wait for tables that another session holds.
    type: float
    default: 10.0
  keep:
    description:
      - So many of the newest whole backups of this database, environment and server stay.
      - V(0) is no rule. Without O(keep) and O(keep_days) all stay; with both, what one of them keeps stays.
      - The last backup that was proven by a restore drill always stays.
    type: int
    default: 7
  keep_days:
    description: Backups that are younger than so many days stay; V(0) is no rule.
    type: float
    default: 0.0
  encryption:
    description:
      - How to encrypt all of the backup but its manifest, with the program C(age) or C(gpg).
      - A backup that could not be encrypted does not appear; nothing plain ever has its name.
    type: str
    choices: [none, age, gpg]
    default: none
  recipients:
    description:
      - Public keys of those who can read the backup - for C(age) C(age1…) or C(ssh-ed25519 …), for C(gpg) the text of
        C(gpg --armor --export) - or absolute paths of files with such keys.
    type: list
    elements: str
    default: []
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.fingerprints
  - settler.runbook.attributes
seealso:
  - module: settler.runbook.restore
  - module: settler.runbook.backup_info
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Back up before the migration
  settler.runbook.backup:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    directory: /var/backups/settler
    environment: prod
    set_role: settler_owner
    run_id: "{{ runbook_run_id }}"
"""

RETURN = r"""
path:
  description: Folder of the backup; empty in check mode.
  returned: always
  type: str
  sample: /var/backups/settler/settler/20261123t031500-4f2a
rows:
  description: Rows of all tables.
  returned: always
  type: int
tables:
  description: How many tables.
  returned: always
  type: int
bytes:
  description: Size of the backup in bytes.
  returned: always
  type: int
compression:
  description: The compression that was taken.
  returned: always
  type: str
  sample: zstd:1
duration_s:
  description: How long it took, in seconds.
  returned: always
  type: float
pruned:
  description: Paths of older backups that were removed.
  returned: always
  type: list
  elements: str
"""

import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._backup import Options, backup, rehearse
from ansible_collections.settler.runbook.plugins.module_utils._encryption import METHODS, Encryption
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import limits_of, limits_spec
from ansible_collections.settler.runbook.plugins.module_utils._manifest import home_of
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


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
        client_bin=params["client_bin"],
        jobs=max(1, params["jobs"]),
        compression=params["compression"],
        lock_timeout=params["lock_timeout"],
        keep=params["keep"],
        keep_days=params["keep_days"],
        encryption=Encryption(params["encryption"], tuple(params["recipients"])),
        limits=limits_of(params),
    )
    path = home_of(options.directory, params["login_db"]) / options.run_id
    changed = not path.exists()
    manifest = rehearse(params, options) if module.check_mode and changed else backup(params, options)
    return {
        "changed": changed,
        "path": manifest["path"],
        "rows": manifest["rows"],
        "tables": len(manifest["tables"]),
        "bytes": manifest["bytes"],
        "compression": manifest["compression"],
        "duration_s": manifest["duration_s"],
        "pruned": manifest["pruned"],
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
            "client_bin": {"type": "path"},
            "jobs": {"type": "int", "default": 2},
            "compression": {"type": "str", "default": "auto"},
            "lock_timeout": {"type": "float", "default": 10.0},
            "keep": {"type": "int", "default": 7},
            "keep_days": {"type": "float", "default": 0.0},
            **limits_spec(),
            "encryption": {"type": "str", "default": "none", "choices": list(METHODS)},
            "recipients": {"type": "list", "elements": "str", "default": []},
        },
    )


if __name__ == "__main__":
    main()
