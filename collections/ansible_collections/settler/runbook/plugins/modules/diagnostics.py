#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep what an investigation of a failed run needs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: diagnostics
short_description: Keep what an investigation of a failed run needs
version_added: 0.1.0
description:
  - Writes a folder with mode 0700 - what O(notes) has, the ledger, the sessions with who blocks whom, the server's log
    since the run began, settings that are not the default, sizes, versions.
  - What the role may not read is named in C(left_out.json) with the reason and stops nothing. The server's log needs
    the right to call C(pg_current_logfile), C(pg_read_file) and C(pg_stat_file) in the database C(postgres), and
    C(pg_ls_logdir) for files that were rotated since. What is missing of it is said in its first line.
  - Passwords, and what looks like one, are taken out of all that is written.
options:
  directory:
    description: The folder of this run.
    type: path
    required: true
  run_id:
    description: Name of this run.
    type: str
    required: true
  since:
    description: When the run began, as ISO 8601 with a time zone.
    type: str
    required: true
  notes:
    description: Further files by name without their ending; a text, or data that is written as JSON.
    type: dict
    default: {}
  set_role:
    description: Role that may read the ledger.
    type: str
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
attributes:
  idempotent:
    description: Each call writes what is to be seen then.
    support: none
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Keep what an investigation needs
  settler.runbook.diagnostics:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler_failed_20261123t031500_4f2a
    directory: /var/backups/settler/.diagnostics/settler/20261123t031500-4f2a
    set_role: settler_owner
    since: "2026-11-23T03:15:00+00:00"
    notes:
      error: "{{ ansible_failed_result.msg }}"
    run_id: "{{ runbook_run_id }}"
"""

RETURN = r"""
directory:
  description: The folder.
  returned: always
  type: str
files:
  description: Names of the files that were written.
  returned: outside check mode
  type: list
  elements: str
left_out:
  description: What could not be read, each with the reason.
  returned: outside check mode
  type: dict
"""

import datetime as dt
import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._diagnostics import Options, keep
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Write the folder."""
    params = module.params
    result = {"changed": True, "directory": params["directory"]}
    try:
        since = dt.datetime.fromisoformat(params["since"])
    except ValueError as error:
        raise RunbookError(f"since: {error}") from error
    if module.check_mode:
        return result
    options = Options(
        folder=Path(params["directory"]),
        run_id=params["run_id"],
        role=params["set_role"],
        ledger_schema=params["ledger_schema"],
        since=since,
        notes=params["notes"],
        secrets=[params["login_password"] or ""],
    )
    return {**result, **keep(params, options)}


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "directory": {"type": "path", "required": True},
            "run_id": {"type": "str", "required": True},
            "since": {"type": "str", "required": True},
            "notes": {"type": "dict", "default": {}},
            "set_role": {"type": "str"},
            "ledger_schema": {"type": "str", "default": "runbook"},
        },
    )


if __name__ == "__main__":
    main()
