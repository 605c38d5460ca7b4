#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Verify a database against an expectation."""

from __future__ import annotations

DOCUMENTATION = r"""
module: verify
short_description: Verify a database's schema, health and tenant isolation
version_added: 0.1.0
description:
  - Compares the catalogue with an expectation in YAML - tables, columns, constraints, indexes, row level security,
    policies, triggers, functions, views, extensions, grants - reading pg_catalog only.
  - Looks for what is there but does not work - invalid indexes, constraints never validated, disabled triggers.
  - Looks at what no dump carries - owner of the database, rights of PUBLIC on it, and whether the application may
    connect.
  - Proves tenant isolation as the application role, with rows of two probe tenants in a transaction that is rolled
    back.
  - Compares the data with that of a backup made before a migration - row counts, and the content of each column that
    is there before and after.
  - Changes nothing; with O(record) it notes the outcome in the ledger. A failed check fails the module.
  - Works in check mode, and where nothing can be written, such as on a standby. What cannot be proved there is told
    in RV(unproved).
options:
  expected:
    description:
      - YAML file of the expectation, on the host where the module runs, in the shape of RV(catalogue). One that lacks
        a kind of objects is refused, because nothing of it would be compared.
      - Without it the catalogue is only read.
    type: path
  role_names:
    description: Names that stand for roles in the expectation, because roles differ by environment.
    type: dict
    default: {}
  exclude_schemas:
    description: Schemas that the expectation does not speak of, such as the ledger's.
    type: list
    elements: str
    default: [runbook]
  unexpected:
    description:
      - What to do about objects that the expectation does not have and that only stand beside what is there.
      - What opens or changes what is there fails whatever this says - grants, default privileges, policies, triggers,
        rules, event triggers, SECURITY DEFINER functions, views with their owner's rights that are granted,
        tables that inherit from expected ones.
    type: str
    choices: [warn, fail, ignore]
    default: warn
  set_role:
    description: Role to become, the owner of the tables, so that probe rows can be made.
    type: str
  allow:
    description: Exceptions, each until a day. What they cover is told, but does not fail.
    type: list
    elements: dict
    default: []
    suboptions:
      check:
        description: Pattern of the check.
        type: str
        default: '*'
      object:
        description: Pattern of the object.
        type: str
        required: true
      reason:
        description: Why it is no danger until then.
        type: str
        required: true
      until:
        description: Last day, as C(2027-01-31).
        type: str
        required: true
  junit:
    description:
      - File to write all checks to as JUnit XML, on the host where the module runs; not in check mode.
      - An older file is removed first, so that there is none if the verification cannot be made.
    type: path
  json:
    description:
      - File to write all checks to as JSON, on the host where the module runs; not in check mode. RV(checks) has only
        those that are not ok.
    type: path
  record:
    description:
      - Note in the ledger that the database was verified, with RV(digest) and RV(counts). Not in check mode, and not
        where nothing can be written or there is no ledger of this version.
    type: bool
    default: false
  ledger_schema:
    description: Schema of the ledger.
    type: str
    default: runbook
  orphans_max_bytes:
    description:
      - Size in bytes of a table up to which its rows are read to find those whose foreign key refers to nothing, also
        for keys that are NOT VALID. Larger ones are named in RV(orphans_unread).
      - Those of which O(set_role) does not see all rows are named there, too.
    type: int
    default: 1073741824
  before:
    description: Folder of a backup, on the host where the module runs, that the data is compared with.
    type: path
  changes:
    description:
      - What was to change since O(before), C(schema.table) for the rows and all columns, C(schema.table.column) for the
        values of one; the schema C(public) may be left out.
    type: list
    elements: str
    default: []
  jobs:
    description: Sessions that read data at a time.
    type: int
    default: 2
  isolation:
    description: What to prove about tenants. Without it nothing is proved.
    type: dict
    suboptions:
      role:
        description: The application role. It must not be superuser, BYPASSRLS, or owner of the tables.
        type: str
        required: true
      schema:
        description: Schema of the tables.
        type: str
        default: public
      tenant_table:
        description: Table of the tenants, with a key C(id).
        type: str
        default: tenants
      tenant_column:
        description: Column that names a row's tenant.
        type: str
        default: tenant_id
      setting:
        description: Setting that carries a session's tenant.
        type: str
        default: app.current_tenant_id
      exclude:
        description:
          - Names of tables with the tenant column that are not isolated by it. Nothing is proved of them or their
            partitions, nor of views and materialized views of these names.
        type: list
        elements: str
        default: []
      read_by_all:
        description: Tables whose rows without a tenant every tenant may read. Those of others nobody may.
        type: list
        elements: str
        default: [feature_flags, blocked_ips]
      inserted_by_all:
        description: Tables into which every session may insert rows without a tenant. Nobody changes or deletes them.
        type: list
        elements: str
        default: [security_events]
      values:
        description: Values for probe rows where a type's own value breaks a rule, by C(table.column).
        type: dict
        default: {}
  kept_out:
    description:
      - Whether a maintenance window keeps the role of O(isolation) out on purpose. Otherwise it must have the right to
        connect, which no dump of a database carries.
    type: bool
    default: false
  run_id:
    description: Name of this run.
    type: str
    default: ''
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes.info
author:
  - The Settler database team (@settler)
requirements:
  - PyYAML on the host where the module runs
"""

EXAMPLES = r"""
- name: Verify the database
  settler.runbook.verify:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    expected: "{{ playbook_dir }}/../sql/verify/expected.yml"
    set_role: settler_owner
    role_names:
      settler_owner: $owner
      settler_app: $app
    isolation:
      role: settler_app
"""

RETURN = r"""
checks:
  description: Checks that are not ok, as rows.
  returned: always
  type: list
  elements: dict
  contains:
    check:
      description: What was looked at.
      type: str
      returned: always
      sample: policy
    object:
      description: Of which object.
      type: str
      returned: always
      sample: "public.jobs: tenant_isolation_jobs"
    status:
      description: V(failed), or V(unexpected) for what is there but not expected.
      type: str
      returned: always
    expected:
      description: What the expectation says.
      type: str
      returned: always
    actual:
      description: What the database has.
      type: str
      returned: always
    hint:
      description: What to do.
      type: str
      returned: always
counts:
  description: How many checks were made, by status.
  returned: always
  type: dict
  sample: {ok: 1204, failed: 0, unexpected: 0}
compared_tables:
  description: Of how many tables the data was compared with O(before).
  returned: always
  type: int
isolated_tables:
  description: How many tables and partitions were tried across the tenants' border.
  returned: always
  type: int
digest:
  description: SHA-256 of the catalogue, the same for the same schema on any server.
  returned: always
  type: str
expected_digest:
  description: SHA-256 of the expectation. It is RV(digest) if the catalogue is exactly what was expected.
  returned: when O(expected) is given
  type: str
orphans_unread:
  description:
    - Foreign keys of tables that are too large to look for orphans in, or of which O(set_role) does not see all rows.
  returned: always
  type: list
  elements: str
unproved:
  description: What could not be proved here, and why.
  returned: always
  type: list
  elements: str
sequences_drawn:
  description: Sequences from which the proof of isolation has drawn numbers, which does not roll back.
  returned: always
  type: list
  elements: str
isolation_seconds:
  description: How long the proof of isolation took, and so how long its transaction was open.
  returned: always
  type: float
recorded:
  description: Whether the outcome was noted in the ledger.
  returned: always
  type: bool
catalogue:
  description: The catalogue in the shape of an expectation; only when O(expected) is not given.
  returned: when O(expected) is not given
  type: dict
"""

import dataclasses
import datetime as dt
import functools
import time
import typing as t
from collections import Counter
from pathlib import Path

from ansible.module_utils.common.yaml import HAS_YAML, yaml_load
from ansible_collections.settler.runbook.plugins.module_utils._catalog import Snapshot, digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    connect,
    connect_as,
    may_become,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import (
    Limits,
    read_again,
    read_fingerprints,
)
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import compare as compare_data
from ansible_collections.settler.runbook.plugins.module_utils._isolation import Proof, prove
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import Settings
from ansible_collections.settler.runbook.plugins.module_utils._verify import (
    KINDS,
    Check,
    allow,
    compare,
    database,
    health,
    json_of,
    junit_of,
    orphans,
    read_allowances,
    sequences,
    table_of,
)

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Compare, look for what is broken, prove isolation; raise if a check failed."""
    params = module.params
    if not module.check_mode:
        _remove_files(params)
    expected = read_expectation(params["expected"]) if params["expected"] else None
    allowances = read_allowances(params["allow"])
    began = time.monotonic()
    with connect(params, application=f"runbook:{params['run_id']}:verify") as connection:
        catalogue, rows, facts = _look(module, connection, expected)
        rows = allow(rows, allowances, dt.datetime.now(dt.UTC).date())
        if params["unexpected"] == "ignore":
            rows = [row for row in rows if row.status != "unexpected"]
        counts = {"ok": 0, "failed": 0, "unexpected": 0, "allowed": 0} | Counter(row.status for row in rows)
        facts |= {"counts": counts, "digest": digest(catalogue)}
        if expected is not None:
            facts["expected_digest"] = digest(expected)
        facts["recorded"] = bool(params["record"]) and not module.check_mode and _record(connection, params, facts)
    if not module.check_mode:
        _write_files(params, rows, facts, time.monotonic() - began)
    result: dict[str, t.Any] = {
        "changed": facts["recorded"],
        "checks": [dataclasses.asdict(row) for row in rows if row.status != "ok"],
        **facts,
    }
    if expected is None:
        result["catalogue"] = catalogue
    if counts["failed"] or (counts["unexpected"] and params["unexpected"] == "fail"):
        raise RunbookError(
            f"{counts['failed']} of {len(rows)} checks failed, {counts['unexpected']} unexpected\n{table_of(rows)}",
            hint="Nothing was changed by the verification.",
            **result,
        )
    if counts["unexpected"]:
        module.warn(f"{counts['unexpected']} objects are not in the expectation:\n{table_of(rows)}")
    for text in facts["unproved"]:
        module.warn(f"not proved: {text}")
    return result


def data(connection: psycopg.Connection[t.Any], params: t.Mapping[str, t.Any]) -> list[Check]:
    """Compare the data with that of a backup."""
    before = read_fingerprints(Path(params["before"]))
    application = f"runbook:{params['run_id']}:verify"
    sessions = functools.partial(connect_as, params, params["set_role"], application=application)
    limits = Limits(jobs=max(1, params["jobs"]))
    after, now = read_again(connection, sessions, before, limits, exclude=params["exclude_schemas"])
    return compare_data(before, after, now, params["changes"])


def _look(
    module: AnsibleModule, connection: psycopg.Connection[t.Any], expected: Snapshot | None
) -> tuple[Snapshot, list[Check], dict[str, t.Any]]:
    """Make all checks; return the catalogue, a row for each check, and what else there is to tell."""
    params = module.params
    isolation, unproved = params["isolation"], []
    if module.check_mode and not may_become(connection, params["set_role"]):
        if isolation:
            unproved = [f"tenant isolation: {params['login_user']} may not become {params['set_role']}"]
        isolation = None
    else:
        set_role(connection, params["set_role"])
    catalogue = snapshot(connection, exclude=params["exclude_schemas"], role_names=params["role_names"])
    rows = compare(expected, catalogue) if expected is not None else []
    rows += health(connection)
    application = params["isolation"]["role"] if params["isolation"] else None
    rows += database(
        connection, params["set_role"], application, roles=params["role_names"], kept_out=params["kept_out"]
    )
    found, unread_sequences = sequences(connection)
    rows += found
    if unread_sequences:
        unproved.append(
            f"sequences ahead of their columns, of which not all can be read: {', '.join(unread_sequences)}"
        )
    found, unread = orphans(connection, params["orphans_max_bytes"])
    rows += found
    if params["before"]:
        rows += data(connection, params)
    proof = Proof()
    if isolation:
        proof = prove(connection, Settings(**isolation))
        rows += proof.rows
    return (
        catalogue,
        rows,
        {
            "compared_tables": sum(row.check == "data" for row in rows),
            "isolated_tables": proof.tables,
            "isolation_seconds": proof.seconds,
            "orphans_unread": unread,
            "unproved": unproved + proof.unproved,
            "sequences_drawn": proof.drawn,
        },
    )


def _record(connection: psycopg.Connection[t.Any], params: t.Mapping[str, t.Any], facts: t.Mapping[str, t.Any]) -> bool:
    """Note the outcome in the ledger where that can be done."""
    ledger = Ledger(connection, params["ledger_schema"])
    row = connection.execute("SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'").fetchone()
    if not row or row[0] or not ledger.is_current():
        return False
    names = ("digest", "expected_digest", "counts", "isolated_tables", "isolation_seconds", "unproved")
    ledger.record_event("verified", run_id=params["run_id"], **{name: facts[name] for name in names if name in facts})
    return True


def _remove_files(params: t.Mapping[str, t.Any]) -> None:
    """Remove the files of an earlier run, which would be taken for this one's if it fails early."""
    for path in (params["junit"], params["json"]):
        if path:
            Path(path).unlink(missing_ok=True)


def _write_files(
    params: t.Mapping[str, t.Any], rows: t.Sequence[Check], facts: t.Mapping[str, t.Any], seconds: float
) -> None:
    """Write all checks for those who read them later."""
    if params["junit"]:
        suite, fails = f"verify {params['login_db']}", params["unexpected"] == "fail"
        unread = [
            Check("orphans", name, "unproved", hint="the table is too large to look")
            for name in facts["orphans_unread"]
        ]
        unproved = [Check("proof", text.partition(":")[0], "unproved", hint=text) for text in facts["unproved"]]
        every = [*rows, *unread, *unproved]
        write_private(Path(params["junit"]), junit_of(every, suite=suite, seconds=seconds, unexpected_fails=fails))
    if params["json"]:
        facts_of_run = {"database": params["login_db"], "run_id": params["run_id"], "seconds": round(seconds, 3)}
        write_private(Path(params["json"]), json_of(rows, **facts_of_run, **facts))


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_bytes(content)
    new.replace(path)


def read_expectation(path: str) -> Snapshot:
    """Read a YAML file that maps each kind to its objects.

    Raises:
        RunbookError: it cannot be read, or a kind is missing.
    """
    if not HAS_YAML:
        raise RunbookError("PyYAML is missing on this host", hint="pip install PyYAML")
    try:
        content = yaml_load(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML's classes are not importable where it is missing
        raise RunbookError(f"{path}: {error}", hint="tools/expect.py writes this file.") from error
    if not isinstance(content, dict):
        raise RunbookError(f"{path}: not a mapping of kinds to objects", hint="tools/expect.py writes this file.")
    if missing := [kind for kind in KINDS if kind not in content]:
        raise RunbookError(
            f"{path}: it says nothing of {', '.join(missing)}",
            hint="Nothing of what is missing would be compared. A kind of which nothing is expected is written as {}.",
        )
    return content


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "expected": {"type": "path"},
            "role_names": {"type": "dict", "default": {}},
            "exclude_schemas": {"type": "list", "elements": "str", "default": ["runbook"]},
            "unexpected": {"type": "str", "choices": ["warn", "fail", "ignore"], "default": "warn"},
            "set_role": {"type": "str"},
            "allow": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "check": {"type": "str", "default": "*"},
                    "object": {"type": "str", "required": True},
                    "reason": {"type": "str", "required": True},
                    "until": {"type": "str", "required": True},
                },
            },
            "junit": {"type": "path"},
            "json": {"type": "path"},
            "record": {"type": "bool", "default": False},
            "ledger_schema": {"type": "str", "default": "runbook"},
            "orphans_max_bytes": {"type": "int", "default": 1073741824},
            "before": {"type": "path"},
            "changes": {"type": "list", "elements": "str", "default": []},
            "jobs": {"type": "int", "default": 2},
            "isolation": {
                "type": "dict",
                "options": {
                    "role": {"type": "str", "required": True},
                    "schema": {"type": "str", "default": "public"},
                    "tenant_table": {"type": "str", "default": "tenants"},
                    "tenant_column": {"type": "str", "default": "tenant_id"},
                    "setting": {"type": "str", "default": "app.current_tenant_id"},
                    "exclude": {"type": "list", "elements": "str", "default": []},
                    "read_by_all": {"type": "list", "elements": "str", "default": ["feature_flags", "blocked_ips"]},
                    "inserted_by_all": {"type": "list", "elements": "str", "default": ["security_events"]},
                    "values": {"type": "dict", "default": {}},
                },
            },
            "kept_out": {"type": "bool", "default": False},
            "run_id": {"type": "str", "default": ""},
        },
    )


if __name__ == "__main__":
    main()
