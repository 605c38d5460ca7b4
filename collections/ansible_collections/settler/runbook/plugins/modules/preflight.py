#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find out whether a run can succeed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight
short_description: Find out whether a migration run can succeed, before it changes anything
version_added: 0.1.0
description:
  - Makes all checks, and then fails with all that failed, so that an operator mends them at once.
  - In check mode what failed is a warning, so that a read-only role can see the rest of a plan.
  - Looks at the server's version, whether it is the primary, extensions, roles, ownership of the tables, whether all
    rows can be seen, what the login could not restore, client programs, the backup folder and its space, long
    transactions and sessions of earlier runs.
options:
  owner:
    description: Role that must own all tables, and that the login must be able to become.
    type: str
  application:
    description: Role of the application. It must be bound by row level security.
    type: str
  extensions:
    description: Extensions that the server must offer.
    type: list
    elements: str
    default: []
  backup_directory:
    description: Folder that backups go to. Without it nothing is checked that only a backup needs.
    type: path
  client_bin:
    description: Folder of the client programs. Without it the oldest that fits the server is looked for.
    type: path
  database_required:
    description: Whether the database must exist already.
    type: bool
    default: true
  encryption:
    description: How backups are encrypted. That it can be done is tried with a word.
    type: str
    choices: [none, age, gpg]
    default: none
  recipients:
    description: Public keys that backups are encrypted for.
    type: list
    elements: str
    default: []
  identity:
    description: File of the private key that a rollback of this run would decrypt its own backup with.
    type: path
  way_back:
    description:
      - What the run may have to take its change back by, without anybody's help. With V(dump) what O(owner) could not
        restore is refused, and encryption without O(identity); with V(snapshot) what no snapshot has.
      - With V(none), or where a snapshot has it, what a restore of the backup would fail on is a warning.
    type: str
    choices: [none, snapshot, dump]
    default: none
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes.info
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Find out whether the run can succeed
  settler.runbook.preflight:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    owner: settler_owner
    application: settler_app
    extensions: [uuid-ossp, pgcrypto]
    backup_directory: /var/backups/settler
"""

RETURN = r"""
checks:
  description: All checks as rows.
  returned: always
  type: list
  elements: dict
  contains:
    check:
      description: What was looked at.
      type: str
      returned: always
    status:
      description: V(ok), V(warning) or V(failed).
      type: str
      returned: always
    detail:
      description: What was found.
      type: str
      returned: always
    hint:
      description: What to do.
      type: str
      returned: always
exists:
  description: Whether the database exists.
  returned: always
  type: bool
server_version:
  description: Version of the server.
  returned: always
  type: str
  sample: "15.18"
server_major:
  description: Its major version.
  returned: always
  type: int
  sample: 15
identity:
  description: Names server and database, whatever the host names and addresses that lead to them.
  returned: always
  type: str
size_bytes:
  description: Size of the database in bytes.
  returned: always
  type: int
"""

import dataclasses
import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._encryption import METHODS, Encryption
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._preflight import Wanted, preflight

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Make all checks; raise if one failed, warn of the warnings."""
    params = module.params
    directory = params["backup_directory"]
    wanted = Wanted(
        owner=params["owner"],
        application=params["application"],
        extensions=tuple(params["extensions"]),
        backup_directory=Path(directory) if directory else None,
        client_bin=params["client_bin"],
        database_required=params["database_required"],
        encryption=Encryption(params["encryption"], tuple(params["recipients"])),
        identity=Path(params["identity"]) if params["identity"] else None,
        way_back=params["way_back"],
    )
    rows, facts = preflight(params, wanted)
    for row in rows:
        if row.status == "warning" or (row.status == "failed" and module.check_mode):
            module.warn(f"{row.check}: {row.detail}. {row.hint}")
    checks = [dataclasses.asdict(row) for row in rows]
    failed = [row for row in rows if row.status == "failed"]
    if failed and not module.check_mode:
        lines = [f"  {row.check}: {row.detail}\n    {row.hint}" for row in failed]
        raise RunbookError(
            f"{len(failed)} of {len(rows)} preflight checks failed; nothing was changed\n" + "\n".join(lines),
            checks=checks,
            **facts,
        )
    return {"changed": False, "checks": checks, **facts}


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "owner": {"type": "str"},
            "application": {"type": "str"},
            "extensions": {"type": "list", "elements": "str", "default": []},
            "backup_directory": {"type": "path"},
            "client_bin": {"type": "path"},
            "database_required": {"type": "bool", "default": True},
            "encryption": {"type": "str", "default": "none", "choices": list(METHODS)},
            "recipients": {"type": "list", "elements": "str", "default": []},
            "identity": {"type": "path"},
            "way_back": {"type": "str", "default": "none", "choices": ["none", "snapshot", "dump"]},
        },
    )


if __name__ == "__main__":
    main()
