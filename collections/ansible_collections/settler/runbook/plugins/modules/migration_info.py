#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read what is applied, pending and connected."""

from __future__ import annotations

DOCUMENTATION = r"""
module: migration_info
short_description: Read the state of a database that the runbook migrates
version_added: 0.1.0
description:
  - Returns what is applied and what is pending, the newest events of the ledger, and the sessions of the database.
  - A database that does not exist is no error; everything is pending then.
  - Files that do not agree with the ledger are returned as RV(problem) instead of failing, so that the rest can still
    be seen.
options:
  directory:
    description: Folder of the migrations, on the host where the module runs.
    type: path
    required: true
  optional:
    description: Optional folders that are switched on, as for M(settler.runbook.migrate).
    type: list
    elements: str
    default: []
  run_id:
    description: Return in RV(run_applied) what this run has applied.
    type: str
    default: ''
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
  out_of_order:
    description: Count files that are older than the newest applied one as pending, not as a problem.
    type: bool
    default: false
  set_role:
    description: Role that a run would work as; sizes and row security are seen with its eyes.
    type: str
  hazards_allowed:
    description: Names of hazards that would not stop a run.
    type: list
    elements: str
    default: []
  hazard_min_bytes:
    description: Size in bytes from which on work on a relation is a hazard.
    type: int
    default: 10485760
  application_roles:
    description: Roles that a maintenance window keeps out, to tell whether one is open.
    type: list
    elements: str
    default: []
  events:
    description: How many of the newest events to return.
    type: int
    default: 20
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes.info
  - settler.runbook.scripts
seealso:
  - module: settler.runbook.migrate
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: See what is applied and what is pending
  settler.runbook.migration_info:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    directory: "{{ playbook_dir }}/../sql/migrations"
  register: status
"""

RETURN = r"""
exists:
  description: Whether the database exists.
  returned: always
  type: bool
head:
  description: Version of the database; null when nothing is applied.
  returned: always
  type: str
  sample: "001"
applied:
  description: Rows of the ledger, oldest first.
  returned: always
  type: list
  elements: dict
pending:
  description: Names of the files that a run would apply, in order.
  returned: always
  type: list
  elements: str
  sample: [002_add_index.sql]
plan:
  description:
    - What each pending file would do in this database, as RV(settler.runbook.migrate#module:applied) has it in check
      mode; hazards that nobody allows have an empty C(allowed).
    - Empty where a run would refuse to start.
  returned: always
  type: list
  elements: dict
digest:
  description:
    - SHA-256 of the plan, which O(settler.runbook.migrate#module:expected_plan) approves.
    - Empty where a run would refuse to start.
  returned: always
  type: str
problem:
  description: Why a run would refuse to start; empty if it would not.
  returned: always
  type: str
tables:
  description: How many tables the database has outside the ledger.
  returned: always
  type: int
run_applied:
  description: Names of the files that the run O(run_id) has applied.
  returned: always
  type: list
  elements: str
events:
  description: Newest events of the ledger, newest first.
  returned: always
  type: list
  elements: dict
sessions:
  description: Client sessions of the database, grouped by role and application.
  returned: always
  type: list
  elements: dict
  contains:
    role:
      description: Role that is connected.
      type: str
      returned: always
    application:
      description: Its application_name.
      type: str
      returned: always
    count:
      description: How many sessions.
      type: int
      returned: always
    active:
      description: How many of them run a statement now.
      type: int
      returned: always
    longest_transaction_s:
      description: Age of their oldest open transaction in seconds; null if none is open.
      type: int
      returned: always
server_version:
  description: Version of the server; empty if the database does not exist.
  returned: always
  type: str
  sample: "15.18"
size_bytes:
  description: Size of the database in bytes.
  returned: always
  type: int
kept_out:
  description: Those of O(application_roles) that may not connect; empty if no maintenance window is open.
  returned: always
  type: list
  elements: str
"""

import contextlib
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._advice import with_advice
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect_if_exists
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._maintenance import kept_out
from ansible_collections.settler.runbook.plugins.module_utils._migrate import file_plans
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._plan import newest, plan
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import dict_row
from ansible_collections.settler.runbook.plugins.module_utils._run import Options
from ansible_collections.settler.runbook.plugins.module_utils._scripts import parser_for

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile
    from ansible_collections.settler.runbook.plugins.module_utils._plan import LedgerRow
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

TABLES = """
SELECT count(*)::int FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', %s)
"""
SESSIONS = """
SELECT usename AS role, application_name AS application, count(*)::int AS count,
       count(*) FILTER (WHERE state = 'active')::int AS active,
       max(extract(epoch FROM clock_timestamp() - xact_start))::int AS longest_transaction_s
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND usename IS NOT NULL AND pid <> pg_backend_pid()
GROUP BY 1, 2 ORDER BY 1, 2
"""


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Read the ledger, the folder and the sessions."""
    params = module.params
    files = read_migrations(params["directory"], params["optional"])
    result: dict[str, t.Any] = {
        "exists": False,
        "applied": [],
        "events": [],
        "sessions": [],
        "server_version": "",
        "size_bytes": 0,
        "tables": 0,
        "kept_out": [],
    }
    rows: list[t.Any] = []
    with contextlib.ExitStack() as stack:
        connection = connect_if_exists(params, application=f"runbook:{params['run_id']}:info")
        if connection is not None:
            stack.enter_context(connection)
            ledger = Ledger(connection, params["ledger_schema"])
            rows = ledger.rows()
            size = connection.execute("SELECT pg_database_size(current_database())").fetchone()
            tables = connection.execute(TABLES, [params["ledger_schema"]]).fetchone()
            with connection.cursor(row_factory=dict_row) as cursor:
                sessions = cursor.execute(SESSIONS).fetchall()
            result |= {
                "exists": True,
                "applied": ledger.applied(),
                "events": ledger.events(params["events"]),
                "sessions": sessions,
                "server_version": connection.info.parameter_status("server_version") or "",
                "size_bytes": size[0] if size else 0,
                "tables": tables[0] if tables else 0,
                "kept_out": kept_out(connection, params["application_roles"]),
            }
            result |= _outlook(connection, files, rows, params)
    if not result["exists"]:
        result |= _outlook(None, files, rows, params)
    result["run_applied"] = [row.file for row in rows if row.run_id == params["run_id"]]
    return result


def _outlook(
    connection: psycopg.Connection[t.Any] | None,
    files: t.Sequence[MigrationFile],
    rows: t.Sequence[LedgerRow],
    params: t.Mapping[str, t.Any],
) -> dict[str, t.Any]:
    """Return what a run would do: C(problem), C(pending), C(head), C(plan) and its C(digest)."""
    try:
        todo = plan(files, rows, out_of_order=params["out_of_order"])
        scripts = parser_for(params["scripts_file"])(todo.pending)
        options = Options(
            run_id=params["run_id"],
            role=params["set_role"],
            hazards_allowed=tuple(params["hazards_allowed"]),
            hazard_min_bytes=params["hazard_min_bytes"],
        )
        plans = [one.as_dict() for one in with_advice(file_plans(connection, scripts, options), todo.pending)]
    except RunbookError as error:
        known = {row.file for row in rows if row.state == "applied"}
        pending = [file.file for file in files if file.file not in known]
        head = newest([row for row in rows if row.file in known and not row.folder])
        return {"problem": error.message, "pending": pending, "head": head, "plan": [], "digest": ""}
    return {
        "problem": "",
        "pending": [file.file for file in todo.pending],
        "head": todo.head,
        "plan": plans,
        "digest": todo.digest,
    }


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "directory": {"type": "path", "required": True},
            "optional": {"type": "list", "elements": "str", "default": []},
            "run_id": {"type": "str", "default": ""},
            "ledger_schema": {"type": "str", "default": "runbook"},
            "out_of_order": {"type": "bool", "default": False},
            "set_role": {"type": "str"},
            "hazards_allowed": {"type": "list", "elements": "str", "default": []},
            "hazard_min_bytes": {"type": "int", "default": 10485760},
            "application_roles": {"type": "list", "elements": "str", "default": []},
            "events": {"type": "int", "default": 20},
            "scripts_file": {"type": "path"},
        },
    )


if __name__ == "__main__":
    main()
