#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Restore a backup in a database's place."""

from __future__ import annotations

DOCUMENTATION = r"""
module: restore
short_description: Take a database back, by its snapshot or by a backup, and keep what it was
version_added: 0.1.0
description:
  - Finds the way back, says which it is, how long it takes and what was written since, and goes it if it is confirmed.
  - A snapshot of M(settler.runbook.snapshot) is swapped in. A backup is compared with its manifest file by file,
    restored into a new database, and compared with the manifest again - row counts, content and catalogue. Then it is
    given owner, grants and settings of the original, and the two are swapped by rename.
  - The database that was there is kept under a name with the run's id. Nothing is dropped but what an earlier, killed
    restore has left half made.
  - Refuses without O(confirm), and where rows would be lost without O(accept_data_loss). Rows that are lost are written
    into O(lost_directory) before.
  - The connecting role needs CREATEDB, and membership in the owner and in the roles whose sessions it must end.
options:
  method:
    description:
      - How to go back. With V(auto) a run's snapshot, if there is one, else a backup.
      - Of a pgBackRest backup only the command is returned. It takes back the whole server, so an operator runs it.
    type: str
    choices: [auto, snapshot, dump]
    default: auto
  src:
    description: Folder of the backup, as RV(settler.runbook.backup#module:path). Without it the newest whole one of
      O(directory) and O(environment).
    type: path
  directory:
    description: Folder of all backups, where the newest is looked for.
    type: path
  run_id:
    description: Name of this run.
    type: str
    required: true
  only_run:
    description:
      - Do nothing unless this run has committed something. For a rollback inside the run's own window, where the
        application could not write.
      - Rows that others have written meanwhile are written into O(lost_directory) and never stop the rollback.
    type: str
    default: ''
  changes:
    description: Tables and columns that the files of O(only_run) say they change. What is in them is not taken for the
      work of others.
    type: list
    elements: str
    default: []
  environment:
    description: Name of the environment. A backup of another one is refused.
    type: str
    required: true
  allow_foreign:
    description:
      - Run id of a backup of another server, database or environment that is restored all the same.
      - Production, see O(production), never takes another environment's data.
    type: str
    default: ''
  production:
    description:
      - Regular expression for the names of environments that are production, in capitals or not.
      - Found are, anywhere in the name, words that begin with C(prod), C(prd) or C(live), and C(main).
    type: str
    default: (?<![a-z])(prod|prd|live|main(?![a-z]))
  confirm:
    description: Name of the database that is to be replaced.
    type: str
    default: ''
  accept_data_loss:
    description: Go on although the database was written to since.
    type: bool
    default: false
  lost_directory:
    description: Folder for the rows that are lost, a CSV file a table. Without it they are only counted.
    type: path
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
  maintenance_work_mem:
    description: Memory for each session of C(pg_restore) to build indexes in, unless the server gives more.
    type: str
    default: 256MB
  identity:
    description:
      - File of the private key, with mode 0600, for a backup that is encrypted. Without a passphrase.
      - The backup is decrypted into a private folder, which is removed in every case. Check mode does so, too.
    type: path
  progress_file:
    description:
      - File to which lines of progress are appended.
      - Given by the action plugin of this name, which shows them while the module works, where both share their files.
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
  - module: settler.runbook.snapshot
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
method:
  description: How it went back, or would - V(none) where there was nothing to take back.
  returned: always
  type: str
  sample: dump
way:
  description: What that is, how long it takes, and what was written since, in lines.
  returned: always
  type: str
minutes:
  description: How long it takes - measured by the drill of this backup, estimated by that of another one for its size,
    or as twice the dump.
  returned: unless RV(method) is V(none)
  type: float
failed_database:
  description: Name under which the replaced database is kept; empty if there was none.
  returned: always
  type: str
  sample: settler_failed_20261123t031500_4f2a
difference:
  description: By table, for a backup rows now minus rows in it, for a snapshot the number of new and changed rows.
  returned: always
  type: dict
changed_tables:
  description: Tables with as many rows as in the backup and other values, also in columns that the backup has not.
  returned: always
  type: list
  elements: str
lost:
  description: The rows that were lost, exactly.
  returned: when restored
  type: list
  elements: dict
  contains:
    table:
      description: The table.
      type: str
      returned: always
    rows:
      description: How many of its rows were new or changed.
      type: int
      returned: always
    keyed:
      description: Whether it has a primary key. Rows are compared as wholes in any case.
      type: bool
      returned: always
    file:
      description: CSV file with these rows; empty without O(lost_directory).
      type: str
      returned: always
rows:
  description: Rows that were restored; 0 of a snapshot, which is not counted.
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
verified:
  description: Whether the catalogue was compared with a backup's again, under the real name. Not where a snapshot has
    no backup of its run beside it.
  returned: when restored
  type: bool
duration_s:
  description: How long it took, in seconds.
  returned: when restored
  type: float
restored_s:
  description: How long until the new database was proven, before the swap.
  returned: when restored
  type: float
swap_s:
  description: How long nobody could connect, in seconds.
  returned: when restored
  type: float
"""

import contextlib
import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._encryption import opened
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._manifest import read_manifest
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module, teller
from ansible_collections.settler.runbook.plugins.module_utils._rollback import (
    PRODUCTION,
    Options,
    choose,
    describe,
    mend_swap,
    roll_back,
    weigh,
)
from ansible_collections.settler.runbook.plugins.module_utils._swap import names_for

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Go back, or in check mode look whether it may be done and what it would lose."""
    params = module.params
    identity = Path(params["identity"]) if params["identity"] else None
    options = Options(
        source=Path(params["src"]) if params["src"] else None,
        run_id=params["run_id"],
        environment=params["environment"],
        role=params["set_role"],
        ledger_schema=params["ledger_schema"],
        client_bin=params["client_bin"],
        jobs=max(1, params["jobs"]),
        maintenance_work_mem=params["maintenance_work_mem"],
        confirm=params["confirm"],
        accept_data_loss=params["accept_data_loss"],
        directory=Path(params["directory"]) if params["directory"] else None,
        method=params["method"],
        only_run=params["only_run"],
        changes=tuple(params["changes"]),
        allow_foreign=params["allow_foreign"],
        production=params["production"],
        lost_folder=Path(params["lost_directory"]) if params["lost_directory"] else None,
    )
    mend_swap(params, options, check=module.check_mode)
    way = choose(params, options)
    result: dict[str, t.Any] = {
        "changed": way.method != "none",
        "method": way.method,
        "way": way.about,
        "failed_database": "",
        "difference": {},
        "changed_tables": [],
        "rows": way.manifest["rows"] if way.manifest else 0,
        "tables": len(way.manifest["tables"]) if way.manifest else 0,
        "snapshot_time": way.at,
    }
    if way.method == "none":
        return result
    if way.method == "pgbackrest":
        raise RunbookError(
            f"{params['login_db']} has a backup by pgBackRest, which takes back the whole server; nothing was touched\n"
            f"  {way.about}",
            hint="Stop the server, run that command on it, start it, then run playbooks/verify.yml.",
            **result,
        )
    with contextlib.ExitStack() as stack:
        if way.source:
            way.source = stack.enter_context(opened(way.source, identity, options.jobs))
            way.manifest = read_manifest(way.source)
        if module.check_mode:  # only shows, so it needs no confirmation
            weigh(params, options, way)
            names = names_for(params["login_db"], options.run_id)
            result["failed_database"] = names.failed if way.difference is not None else ""
            result["diff"] = {
                "before": f"{names.real}: as it is now\n",
                "after": f"{names.real}: as of {way.at}\n{names.failed}: as it is now\n",
            }
        else:
            say = teller(stack, params["progress_file"]) or (lambda _line: None)
            result |= roll_back(params, options, way, say)
    return result | {
        "way": describe(way),
        "minutes": way.minutes,
        "difference": way.difference or {},
        "changed_tables": way.changed or [],
    }


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "method": {"type": "str", "choices": ["auto", "snapshot", "dump"], "default": "auto"},
            "src": {"type": "path"},
            "directory": {"type": "path"},
            "run_id": {"type": "str", "required": True},
            "only_run": {"type": "str", "default": ""},
            "changes": {"type": "list", "elements": "str", "default": []},
            "environment": {"type": "str", "required": True},
            "allow_foreign": {"type": "str", "default": ""},
            "production": {"type": "str", "default": PRODUCTION},
            "confirm": {"type": "str", "default": ""},
            "accept_data_loss": {"type": "bool", "default": False},
            "lost_directory": {"type": "path"},
            "set_role": {"type": "str"},
            "ledger_schema": {"type": "str", "default": "runbook"},
            "client_bin": {"type": "path"},
            "jobs": {"type": "int", "default": 2},
            "maintenance_work_mem": {"type": "str", "default": "256MB"},
            "identity": {"type": "path"},
            "progress_file": {"type": "path"},
        },
    )


if __name__ == "__main__":
    main()
