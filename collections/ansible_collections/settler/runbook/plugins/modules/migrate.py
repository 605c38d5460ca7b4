#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Apply pending migrations."""

from __future__ import annotations

DOCUMENTATION = r"""
module: migrate
short_description: Apply pending SQL migrations to a PostgreSQL database
version_added: 0.1.0
description:
  - Applies the files C(NNN_name.sql) of a folder that the database's ledger does not have yet, in the order of their
    numbers.
  - Each file is one transaction together with its row in the ledger. A file that fails leaves nothing behind.
  - A run holds an advisory lock of the database; a second one waits for O(lock_wait) seconds and then fails.
  - A file that was applied must stay as it is; a changed or missing one, and one that is older than what the database
    has, stops the run before anything is applied.
  - In check mode, and with C(--diff), shows what would be applied; this needs no right to write, and not even the
    database.
options:
  directory:
    description: Folder of the migrations, on the host where the module runs.
    type: path
    required: true
  run_id:
    description: Name of this run; everything that the run leaves carries it.
    type: str
    required: true
  set_role:
    description: Role to become before each file, so that it owns what the file makes.
    type: str
  project:
    description: Part of the lock's key, for databases that several projects migrate.
    type: str
    default: settler
  ledger_schema:
    description: Schema of the ledger. It is made in the transaction of the first file.
    type: str
    default: runbook
  lock_wait:
    description: Seconds to wait for another run of the same database.
    type: float
    default: 60.0
  lock_timeout:
    description:
      - Seconds that a statement may wait for a lock. Other sessions queue behind it for as long.
      - When it is reached the whole file is rolled back and tried again.
    type: float
    default: 2.0
  lock_attempts:
    description: How often a file is tried, with growing pauses, when other sessions hold its locks.
    type: int
    default: 10
  out_of_order:
    description: Apply files that are older than the newest applied one.
    type: bool
    default: false
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
seealso:
  - module: settler.runbook.migration_info
author:
  - The Settler database team (@settler)
requirements:
  - pglast >= 7 on the host where the module runs
"""

EXAMPLES = r"""
- name: Apply what is pending
  settler.runbook.migrate:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    ssl_mode: verify-full
    login_db: settler
    directory: "{{ playbook_dir }}/../sql/migrations"
    set_role: settler_owner
    run_id: "{{ runbook_run_id }}"

- name: Show what would be applied
  settler.runbook.migrate:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    directory: sql/migrations
    run_id: rehearsal
  check_mode: true
  diff: true
"""

RETURN = r"""
applied:
  description: The files that this run applied, in order; in check mode those that it would apply.
  returned: always
  type: list
  elements: dict
  contains:
    file:
      description: Name of the file.
      type: str
      returned: always
      sample: 001_initial_schema.sql
    version:
      description: Its number, with zeros.
      type: str
      returned: always
      sample: "001"
    checksum:
      description: SHA-256 of its text with LF line ends.
      type: str
      returned: always
    statements:
      description: How many statements it has.
      type: int
      returned: always
    duration_ms:
      description: How long it took, in milliseconds.
      type: int
      returned: when applied
    attempts:
      description: How often it was tried because of locks.
      type: int
      returned: when applied
head:
  description: Version of the database after the run (in check mode as it would be); null when nothing is applied.
  returned: success
  type: str
  sample: "001"
blockers:
  description: Sessions that held locks when a file had to be tried again.
  returned: always
  type: list
  elements: dict
file:
  description: Path of the file that failed.
  returned: when a statement failed
  type: str
line:
  description: Line of the error, from 1; 0 when the COMMIT failed.
  returned: when a statement failed
  type: int
statement:
  description: First line of the statement that failed.
  returned: when a statement failed
  type: str
sqlstate:
  description: PostgreSQL's error code.
  returned: when a statement failed
  type: str
hint:
  description: What to do next.
  returned: on failure
  type: str
"""

import contextlib
import dataclasses
import typing as t

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, connect_if_exists
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._migrate import (
    Options,
    Outcome,
    migrate,
    pending_plan,
)
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._statements import PGLAST_IMPORT_ERROR, parse


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Plan; then, unless in check mode, apply."""
    params = module.params
    if PGLAST_IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("pglast"), exception=PGLAST_IMPORT_ERROR)
    options = Options(
        run_id=params["run_id"],
        project=params["project"],
        schema=params["ledger_schema"],
        role=params["set_role"],
        lock_wait=params["lock_wait"],
        lock_timeout=params["lock_timeout"],
        lock_attempts=max(1, params["lock_attempts"]),
        out_of_order=params["out_of_order"],
    )
    files = read_migrations(params["directory"])
    application = f"runbook:{params['run_id']}:migrate"
    open_connection = connect_if_exists if module.check_mode else connect
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        connection = open_connection(params, application=application)
        if connection is not None:
            stack.enter_context(connection)
        todo = pending_plan(connection, files, options)
        result = {"changed": bool(todo.pending), "diff": todo.as_diff(), "head": todo.target, "blockers": []}
        if module.check_mode or not todo.pending or connection is None:
            planned = [
                {
                    "file": script.file.file,
                    "version": script.file.version,
                    "checksum": script.file.checksum,
                    "statements": len(script.statements),
                }
                for script in map(parse, todo.pending)
            ]
            return {**result, "applied": planned}
        try:
            migrate(connection, files, options, outcome)
        except RunbookError as error:
            error.facts.update(applied=_applied(outcome), blockers=outcome.blockers)
            raise
        finally:
            for warning in outcome.warnings:
                module.warn(warning)
    return {
        **result,
        "changed": bool(outcome.applied),
        "applied": _applied(outcome),
        "blockers": outcome.blockers,
    }


def _applied(outcome: Outcome) -> list[dict[str, t.Any]]:
    return [dataclasses.asdict(applied) for applied in outcome.applied]


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "directory": {"type": "path", "required": True},
            "run_id": {"type": "str", "required": True},
            "set_role": {"type": "str"},
            "project": {"type": "str", "default": "settler"},
            "ledger_schema": {"type": "str", "default": "runbook"},
            "lock_wait": {"type": "float", "default": 60.0},
            "lock_timeout": {"type": "float", "default": 2.0},
            "lock_attempts": {"type": "int", "default": 10},
            "out_of_order": {"type": "bool", "default": False},
        },
    )


if __name__ == "__main__":
    main()
