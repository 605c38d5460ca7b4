#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Take over a database whose schema is there already."""

from __future__ import annotations

DOCUMENTATION = r"""
module: adopt
short_description: Give a database that has its schema already a ledger that says so
version_added: 0.1.0
description:
  - Writes rows of the ledger for files that are applied already, under the lock that runs take. Never changes the
    schema.
  - V(baseline) takes the files up to O(version), after it has made them in a scratch database beside this one and has
    found everything that they make here, too. The login must be allowed to create databases.
  - V(flyway) and V(dbmate) take what these tools' ledgers say. Flyway's checksums must be those of the files.
options:
  directory:
    description: Folder of the migrations, on the host where the module runs.
    type: path
    required: true
  optional:
    description: Optional folders that are switched on.
    type: list
    elements: str
    default: []
  source:
    description: Who says what is applied.
    type: str
    choices: [baseline, flyway, dbmate]
    default: baseline
  version:
    description: Newest version that the database has; needed for V(baseline).
    type: str
    default: ''
  table:
    description: The other tool's ledger as SQL writes it; by default the tool's own name for it.
    type: str
    default: ''
  accept_changed:
    description: Take files although their checksums are not Flyway's.
    type: bool
    default: false
  run_id:
    description: Name of this run.
    type: str
    required: true
  set_role:
    description: Role that owns the ledger and the schema.
    type: str
  project:
    description: Part of the lock's key, as for M(settler.runbook.migrate).
    type: str
    default: settler
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
  lock_wait:
    description: Seconds to wait for a run of the same database.
    type: float
    default: 60.0
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
  - settler.runbook.scripts
seealso:
  - module: settler.runbook.migrate
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: The schema of 003 is there
  settler.runbook.adopt:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    directory: "{{ playbook_dir }}/../sql/migrations"
    version: "003"
    set_role: settler_owner
    run_id: "{{ runbook_run_id }}"

- name: Flyway has applied some
  settler.runbook.adopt:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    directory: sql/migrations
    source: flyway
    run_id: "{{ runbook_run_id }}"
"""

RETURN = r"""
adopted:
  description: Files that the ledger has now, or would have, and had not before.
  returned: success
  type: list
  elements: str
unexpected:
  description: Objects that the database has beyond the baseline.
  returned: success
  type: list
  elements: str
"""

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils import _adopt
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, set_role
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._lock import run_lock
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._run import Options
from ansible_collections.settler.runbook.plugins.module_utils._scripts import parser_for

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

ARGUMENTS: dict[str, t.Any] = {
    "directory": {"type": "path", "required": True},
    "optional": {"type": "list", "elements": "str", "default": []},
    "source": {"type": "str", "choices": list(_adopt.SOURCES), "default": _adopt.BASELINE},
    "version": {"type": "str", "default": ""},
    "table": {"type": "str", "default": ""},
    "accept_changed": {"type": "bool", "default": False},
    "run_id": {"type": "str", "required": True},
    "set_role": {"type": "str"},
    "project": {"type": "str", "default": "settler"},
    "ledger_schema": {"type": "str", "default": "runbook"},
    "lock_wait": {"type": "float", "default": 60.0},
    "scripts_file": {"type": "path"},
}


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Adopt under the run's lock."""
    params = module.params
    files = read_migrations(params["directory"], params["optional"])
    options = Options(
        run_id=params["run_id"],
        project=params["project"],
        schema=params["ledger_schema"],
        role=params["set_role"],
        lock_wait=params["lock_wait"],
        analyze=False,
        refresh=False,
    )
    with connect(params, application=f"runbook:{params['run_id']}:adopt") as connection, run_lock(connection, options):
        set_role(connection, options.role)
        ledger = Ledger(connection, options.schema)
        known = {row.file for row in ledger.rows()}
        unexpected: list[str] = []
        if params["source"] == _adopt.BASELINE:
            chosen = _adopt.up_to(files, params["version"])
            if any(file.file not in known for file in chosen):
                if known:
                    raise RunbookError(
                        "baseline: the ledger has rows already: " + ", ".join(sorted(known)),
                        hint="A baseline is for a database without a ledger; after it, playbooks/migrate.yml goes on.",
                    )
                parser = parser_for(params["scripts_file"])
                unexpected = _adopt.prove_baseline(connection, params, chosen, options, parser)
        else:
            chosen = _told_by(connection, params, files)
        new = [file for file in chosen if file.file not in known]
        _adopt.adopt(ledger, new, params["source"], run_id=options.run_id, check=module.check_mode)
    names = [file.file for file in new]
    return {
        "changed": bool(new),
        "adopted": names,
        "unexpected": unexpected,
        "diff": {"before": "", "after": "".join(f"{name}: adopted from {params['source']}\n" for name in names)},
    }


def _told_by(
    connection: psycopg.Connection[t.Any], params: t.Mapping[str, t.Any], files: list[MigrationFile]
) -> list[MigrationFile]:
    """Return the files that another tool's ledger has."""
    if params["source"] == _adopt.FLYWAY:
        table = params["table"] or "flyway_schema_history"
        return _adopt.from_flyway(connection, table, files, changed=params["accept_changed"])
    return _adopt.from_dbmate(connection, params["table"] or "schema_migrations", files)


def main() -> None:
    """Run the module."""
    run_postgres_module(work, ARGUMENTS)


if __name__ == "__main__":
    main()
