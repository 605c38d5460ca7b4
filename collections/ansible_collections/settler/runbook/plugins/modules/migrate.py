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
  - Applies the files of a folder that the database's ledger does not have yet, C(NNN_name.sql) in the order of their
    numbers, then those of O(optional) folders, then each C(R__name.sql) that is new or was changed.
  - Each file is one transaction together with its row in the ledger. A file that fails leaves nothing behind.
  - A file that begins with the comment C(-- runbook:) C(no-transaction) runs statement by statement, with a journal
    and with probes of the catalogue around each statement; a run that was stopped goes on where it stopped.
  - C(NNN_name.batch.sql) is one statement over a range of keys, run in short transactions.
  - C(NNN_name.verify.sql) has queries that must return no row after its file.
  - A run holds an advisory lock of the database; a second one waits for O(lock_wait) seconds and then fails.
  - A file that was applied must stay as it is; a changed or missing one, and one that is older than what the database
    has, stops the run before anything is applied.
  - Afterwards the tables that were touched are analysed, and materialized views that depend on them are refreshed.
    After a failure, too, unless the run has a O(window); what an earlier run did not come to is done by the next one.
  - In check mode, and with C(--diff), shows what would be applied; this needs no right to write, and not even the
    database.
options:
  directory:
    description: Folder of the migrations, on the host where the module runs.
    type: path
    required: true
  optional:
    description: Folders beside O(directory), below C(optional), whose files are applied too, in this order.
    type: list
    elements: str
    default: []
  run_id:
    description: Name of this run; everything that the run leaves carries it.
    type: str
    required: true
  job_id:
    description: Number of the scheduler's job, for the ledger.
    type: str
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
  phase:
    description: V(expand) stops before the first file with the directive C(phase=contract).
    type: str
    choices: [all, expand]
    default: all
  expected_plan:
    description: Digest of the plan that was approved; any other is refused. A plan's digest is RV(digest).
    type: str
    default: ''
  accept_copy:
    description: Go on in a database whose ledger was written on another server or under another name, and note it.
    type: bool
    default: false
  window:
    description:
      - The maintenance window of this run, as RV(settler.runbook.maintenance#module:window) names it.
      - Nothing is applied if anybody has opened or closed one since.
    type: str
    default: ''
  shapes:
    description:
      - How to name a schema that the database has without a ledger, most particular first. The key is the name, the
        value has lists of relations, C(with) and C(without).
    type: dict
    default: {}
  hazards_allowed:
    description:
      - Names of hazards that do not stop the run, V(all) for each; a file may allow them with C(allow=), too.
      - A hazard is a statement that would keep others from a large table for long, destroy data, or miss rows.
    type: list
    elements: str
    default: []
  hazard_min_bytes:
    description: Size in bytes from which on work on a relation is a hazard. What destroys rows always is.
    type: int
    default: 10485760
  lock_wait:
    description: Seconds to wait for another run of the same database, and for backends that one has left.
    type: float
    default: 60.0
  long_transaction:
    description: Age in seconds from which on another session's open transaction is reported before the start.
    type: float
    default: 60.0
  lock_timeout:
    description:
      - Seconds that a statement may wait for a lock. Other sessions queue behind it for as long.
      - When it is reached the whole file is rolled back and tried again.
    type: float
    default: 2.0
  long_lock_timeout:
    description: Seconds that a command such as C(CREATE INDEX CONCURRENTLY), behind which nobody queues, may wait.
    type: float
    default: 3600.0
  statement_timeout:
    description: Seconds that a statement may take; 0 is for ever, whatever the role or the database have set.
    type: float
    default: 0.0
  lock_attempts:
    description: How often a file is tried, with growing pauses, when other sessions hold its locks.
    type: int
    default: 10
  blocker_action:
    description: What to do with a session that a file waits for, after O(blocker_after) seconds.
    type: str
    choices: [wait, cancel, terminate]
    default: wait
  blocker_after:
    description: Seconds that a session's transaction must have been in a file's way before O(blocker_action).
    type: float
    default: 30.0
  blocker_match:
    description: Patterns of application names and roles that may be cancelled or terminated; nothing else ever is.
    type: list
    elements: str
    default: []
  blocker_never:
    description: Patterns of application names and roles that are left alone even so.
    type: list
    elements: str
    default: []
  repair_invalid:
    description: Drop an invalid index that stands where a file makes one. Otherwise fail.
    type: bool
    default: true
  analyze:
    description: Analyse the tables that were touched.
    type: bool
    default: true
  refresh:
    description: Refresh the materialized views that depend on tables that were touched.
    type: bool
    default: true
  batch_max_lag:
    description: Seconds that a standby may lag before batches wait for it.
    type: float
    default: 10.0
  batch_max_transaction:
    description: Age in seconds of another session's transaction from which on batches wait for its end.
    type: float
    default: 300.0
  out_of_order:
    description:
      - Names of files to apply although they are older than the newest applied one.
      - V(true) allows all of them.
    type: list
    elements: str
    default: []
  databases:
    description:
      - Names and patterns of the databases of one server to migrate in one call; O(login_db) then only serves to find
        them. A run that stopped is simply repeated, what is done has nothing pending.
      - No pattern means a database that the runbook has made or put beside another one, such as a copy, or what a
        rollback has replaced; by name it is refused.
    type: list
    elements: str
    default: []
  canary:
    description: The one of O(databases) to migrate first and alone; by default the first of them.
    type: str
    default: ''
  workers:
    description: How many of O(databases) are migrated at a time. Each takes two sessions.
    type: int
    default: 4
  max_failures:
    description: After so many failures no further one of O(databases) is begun. A canary that fails ends the run.
    type: int
    default: 1
  application_roles:
    description:
      - Roles of the application. One of O(databases) in which such a role has rights, but to which it may not connect,
        is in the maintenance window of another run, and fails.
      - C({database}) in a name stands for the name of the database.
    type: list
    elements: str
    default: []
  progress_file:
    description:
      - File to which lines of progress are appended, one every few seconds at most.
      - Given by the action plugin of this name, which reads it over the connection of the task, shows the lines while
        the module works, and removes it. Only the module's user can read it.
    type: path
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
  - settler.runbook.scripts
seealso:
  - module: settler.runbook.migration_info
author:
  - The Settler database team (@settler)
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
    kind:
      description: V(versioned), V(repeatable) or V(batch).
      type: str
      returned: always
    transactional:
      description: Whether it is one transaction.
      type: bool
      returned: in check mode
    statements:
      description: How many statements it has.
      type: int
      returned: always
    irreversible:
      description: Whether the file says that only a restore leads back.
      type: bool
      returned: in check mode
    lock:
      description:
        - The strongest lock on a relation that the database has already, as C(mode), C(relation), C(bytes) and
          estimated C(rows); null if there is none.
      type: dict
      returned: in check mode
    hazards:
      description:
        - Hazards that are allowed, each with C(hazard), C(file), C(line), C(relation), C(bytes), C(rows), C(meaning),
          C(instead) and C(allowed), the reason.
      type: list
      elements: dict
      returned: in check mode
    text:
      description: The plan as an operator reads it, a line each.
      type: list
      elements: str
      returned: in check mode
    advice:
      description: What squawk says beyond the hazards, where it is installed beside the module's Python or on PATH.
      type: list
      elements: str
      returned: in check mode
    code:
      description: Lines of C(DO) and C(CALL), which no plan can look into.
      type: list
      elements: int
      returned: in check mode
    changes:
      description: Tables and columns whose data it changes on purpose, as the file says.
      type: list
      elements: str
      returned: always
    rows:
      description: Rows that a batch file has changed; null of other files.
      type: int
      returned: when applied
    duration_ms:
      description: How long it took, in milliseconds.
      type: int
      returned: when applied
    attempts:
      description: How often it was tried because of locks.
      type: int
      returned: when applied
hazards:
  description: Hazards that nobody allows.
  returned: when there are any
  type: list
  elements: dict
digest:
  description: SHA-256 of the plan, of names and checksums of the pending files and of what checks them, in order.
  returned: success
  type: str
foreign_ledgers:
  description: Ledgers of other tools, where the database has none of ours.
  returned: success
  type: list
  elements: str
shape:
  description: Name of the one of O(shapes) that a database without a ledger has; empty if it has none.
  returned: success
  type: str
later:
  description: Files that O(phase) leaves for a later run.
  returned: success
  type: list
  elements: str
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
ended:
  description: Sessions that were cancelled or terminated.
  returned: when files were tried
  type: list
  elements: dict
repaired:
  description: Invalid indexes that were dropped.
  returned: when files were tried
  type: list
  elements: str
analyzed:
  description: Tables that were analysed.
  returned: when files were tried
  type: list
  elements: str
refreshed:
  description: Materialized views that were refreshed.
  returned: when files were tried
  type: list
  elements: str
databases:
  description:
    - Of each of O(databases) its own result, with C(database), C(warnings) and C(state), which is V(ok), V(changed),
      V(failed) or V(left) if it was not begun.
  returned: when O(databases) is given
  type: list
  elements: dict
foreign_window:
  description:
    - Whether somebody else has opened or closed a maintenance window since O(window); of one of O(databases) whether
      one is open.
  returned: when that is so
  type: bool
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

# What a run with nothing pending does not need is imported where it is needed: the parser and the engine take longer to
# load than the question what is pending takes to answer.
import contextlib
import dataclasses
import functools
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, connect_if_exists
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, Unparsed
from ansible_collections.settler.runbook.plugins.module_utils._files import read_migrations
from ansible_collections.settler.runbook.plugins.module_utils._maintenance import refuse_foreign_window
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module, teller
from ansible_collections.settler.runbook.plugins.module_utils._pending import pending_plan, refuse_unexpected
from ansible_collections.settler.runbook.plugins.module_utils._run import BlockerPolicy, Options, Outcome

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile
    from ansible_collections.settler.runbook.plugins.module_utils._hazards import FilePlan
    from ansible_collections.settler.runbook.plugins.module_utils._plan import Plan
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Parser, Script

ARGUMENTS: dict[str, t.Any] = {
    "directory": {"type": "path", "required": True},
    "optional": {"type": "list", "elements": "str", "default": []},
    "run_id": {"type": "str", "required": True},
    "job_id": {"type": "str"},
    "set_role": {"type": "str"},
    "project": {"type": "str", "default": "settler"},
    "ledger_schema": {"type": "str", "default": "runbook"},
    "phase": {"type": "str", "choices": ["all", "expand"], "default": "all"},
    "expected_plan": {"type": "str", "default": ""},
    "accept_copy": {"type": "bool", "default": False},
    "window": {"type": "str", "default": ""},
    "shapes": {"type": "dict", "default": {}},
    "hazards_allowed": {"type": "list", "elements": "str", "default": []},
    "hazard_min_bytes": {"type": "int", "default": 10485760},
    "lock_wait": {"type": "float", "default": 60.0},
    "long_transaction": {"type": "float", "default": 60.0},
    "lock_timeout": {"type": "float", "default": 2.0},
    "long_lock_timeout": {"type": "float", "default": 3600.0},
    "statement_timeout": {"type": "float", "default": 0.0},
    "lock_attempts": {"type": "int", "default": 10},
    "blocker_action": {"type": "str", "choices": ["wait", "cancel", "terminate"], "default": "wait"},
    "blocker_after": {"type": "float", "default": 30.0},
    "blocker_match": {"type": "list", "elements": "str", "default": []},
    "blocker_never": {"type": "list", "elements": "str", "default": []},
    "repair_invalid": {"type": "bool", "default": True},
    "analyze": {"type": "bool", "default": True},
    "refresh": {"type": "bool", "default": True},
    "batch_max_lag": {"type": "float", "default": 10.0},
    "batch_max_transaction": {"type": "float", "default": 300.0},
    "out_of_order": {"type": "list", "elements": "str", "default": []},
    "databases": {"type": "list", "elements": "str", "default": []},
    "canary": {"type": "str", "default": ""},
    "workers": {"type": "int", "default": 4},
    "max_failures": {"type": "int", "default": 1},
    "application_roles": {"type": "list", "elements": "str", "default": []},
    "progress_file": {"type": "path"},
    "scripts_file": {"type": "path"},
}


def options_of(params: t.Mapping[str, t.Any]) -> Options:
    """Return the engine's options.

    Raises:
        RunbookError: sessions are to be ended, but none is named.
    """
    if params["blocker_action"] != "wait" and not params["blocker_match"]:
        raise RunbookError(
            f"blocker_action is {params['blocker_action']}, but blocker_match names no application or role",
            hint="Name those that may be ended, for instance migrate_blocker_match: [reporting, 'batch-*'].",
        )
    named = [name for name in params["out_of_order"] if name.lower() != "false"]
    return Options(
        run_id=params["run_id"],
        job_id=params["job_id"],
        project=params["project"],
        schema=params["ledger_schema"],
        role=params["set_role"],
        phase=params["phase"],
        expected_plan=params["expected_plan"],
        accept_copy=params["accept_copy"],
        window=params["window"],
        hazards_allowed=tuple(params["hazards_allowed"]),
        hazard_min_bytes=params["hazard_min_bytes"],
        lock_wait=params["lock_wait"],
        long_transaction=params["long_transaction"],
        lock_timeout=params["lock_timeout"],
        long_lock_timeout=params["long_lock_timeout"],
        statement_timeout=params["statement_timeout"],
        lock_attempts=max(1, params["lock_attempts"]),
        blockers=BlockerPolicy(
            params["blocker_action"],
            params["blocker_after"],
            tuple(params["blocker_match"]),
            tuple(params["blocker_never"]),
        ),
        repair_invalid=params["repair_invalid"],
        analyze=params["analyze"],
        refresh=params["refresh"],
        batch_max_lag=params["batch_max_lag"],
        batch_max_transaction=params["batch_max_transaction"],
        out_of_order=any(name.lower() == "true" for name in named) or tuple(named),
    )


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Plan; then, unless in check mode, apply; in one database or in many."""
    params = module.params
    options = options_of(params)
    files = read_migrations(params["directory"], params["optional"])
    with contextlib.ExitStack() as stack:
        say = teller(stack, params["progress_file"])
        if params["databases"]:
            return _fleet(module, files, options, say)
        return _database(module, params["login_db"], files, options, say, _parser(params["scripts_file"]), module.warn)


def _fleet(
    module: AnsibleModule, files: t.Sequence[MigrationFile], options: Options, say: t.Callable[[str], None] | None
) -> dict[str, t.Any]:
    """Work in each database that is meant.

    Raises:
        RunbookError: one failed.
    """
    from ansible_collections.settler.runbook.plugins.module_utils._fleet import databases_of, run_fleet

    params = module.params
    with connect(params, application=f"runbook:{options.run_id}:fleet") as server:
        names = databases_of(server, params["databases"])
    parser = _parser(params["scripts_file"])

    @functools.cache
    def script_of(file: MigrationFile) -> Script:
        with contextlib.suppress(Unparsed):
            return parser([file])[0]
        return parser(files)[0]  # asks for all of them at once, before the first database is changed

    def parse_once(wanted: t.Sequence[MigrationFile]) -> list[Script]:
        return [script_of(file) for file in wanted]

    warnings: dict[str, list[str]] = {name: [] for name in names}

    def one(name: str) -> dict[str, t.Any]:
        told = (lambda line: say(f"{name}: {line}")) if say else None
        roles = tuple(role.replace("{database}", name) for role in params["application_roles"])
        own = dataclasses.replace(options, application_roles=roles)
        result = _database(module, name, files, own, told, parse_once, warnings[name].append)
        if told:
            told(f"{len(result['applied'])} applied, at version {result['head']}")
        return result

    results = run_fleet(
        names, one, canary=params["canary"], workers=params["workers"], max_failures=params["max_failures"]
    )
    for result in results:
        result["warnings"] = warnings[result["database"]]
        for warning in result["warnings"]:
            module.warn(f"{result['database']}: {warning}")
    states = {state: [one["database"] for one in results if one["state"] == state] for state in ("failed", "left")}
    if states["failed"]:
        first = next(one for one in results if one["state"] == "failed")
        raise RunbookError(
            f"{len(states['failed'])} of {len(results)} databases failed: {', '.join(states['failed'][:20])}"
            f"{', …' * (len(states['failed']) > 20)}; {len(states['left'])} were not begun\n"
            f"  {first['database']}: {first['msg']}",
            hint=first["hint"],
            databases=results,
            changed=any(one["state"] == "changed" for one in results),
        )
    return {
        "changed": any(one["changed"] for one in results),
        "databases": results,
        "applied": [],
        "diff": [{**one["diff"], "before_header": one["database"], "after_header": one["database"]} for one in results],
    }


def _database(
    module: AnsibleModule,
    name: str,
    files: t.Sequence[MigrationFile],
    options: Options,
    say: t.Callable[[str], None] | None,
    parser: Parser,
    warn: t.Callable[[str], None],
) -> dict[str, t.Any]:
    """Plan and, unless in check mode, apply in one database."""
    open_connection = connect_if_exists if module.check_mode else connect
    outcome = Outcome()
    connection = open_connection({**module.params, "login_db": name}, application=f"runbook:{options.run_id}:migrate")
    with connection or contextlib.nullcontext():
        todo = pending_plan(connection, files, options)
        result: dict[str, t.Any] = {
            "changed": bool(todo.pending),
            "diff": todo.as_diff(),
            "head": todo.target,
            "digest": todo.digest,
            "later": [file.file for file in todo.later],
            "blockers": [],
            "foreign_ledgers": [],
            "shape": "",
        }
        if connection and not todo.applied:
            result |= _history(connection, module.params["shapes"], warn)
        if not todo.pending:
            return {**result, "applied": []}
        if connection and options.application_roles:
            refuse_foreign_window(connection, options.application_roles)
        if module.check_mode or connection is None:
            plans = _planned(connection, todo, options, parser)
            result["diff"]["prepared"] = "".join([*(plan.as_text() for plan in plans), f"plan {todo.digest}\n"])
            return {**result, "applied": [plan.as_dict() for plan in plans]}
        from ansible_collections.settler.runbook.plugins.module_utils._migrate import migrate

        try:
            migrate(connection, files, options, outcome, say=say, parser=parser)
        except RunbookError as error:
            error.facts.update(_told(outcome))
            raise
        finally:
            for warning in outcome.warnings:
                warn(warning)
    return {**result, "changed": bool(outcome.applied), **_told(outcome)}


def _planned(
    connection: psycopg.Connection[t.Any] | None,
    todo: Plan,
    options: Options,
    parser: Parser,
) -> list[FilePlan]:
    """Return what each pending file would do, with advice.

    Raises:
        RunbookError: it is not the plan that was approved, or has hazards that nobody allows.
    """
    from ansible_collections.settler.runbook.plugins.module_utils._advice import with_advice
    from ansible_collections.settler.runbook.plugins.module_utils._hazards import refuse_hazards
    from ansible_collections.settler.runbook.plugins.module_utils._migrate import file_plans

    refuse_unexpected(todo, options)
    plans = file_plans(connection, parser(todo.pending), options)
    refuse_hazards(plans)
    return with_advice(plans, todo.pending)


def _parser(scripts_file: str | None) -> Parser:
    """Return what makes scripts of files; the parser is loaded when there is something to parse."""

    @functools.cache
    def loaded() -> Parser:
        from ansible_collections.settler.runbook.plugins.module_utils._scripts import parser_for

        return parser_for(scripts_file)

    def parse(files: t.Sequence[MigrationFile]) -> list[Script]:
        return loaded()(files)

    return parse


def _history(
    connection: psycopg.Connection[t.Any], shapes: t.Mapping[str, t.Any], warn: t.Callable[[str], None]
) -> dict[str, t.Any]:
    """Return, and warn of, what a database without a ledger has been through."""
    from ansible_collections.settler.runbook.plugins.module_utils._adopt import foreign_ledgers, shape_of

    found = [str(ledger) for ledger in foreign_ledgers(connection)]
    for ledger in found:
        warn(
            f"the database has the ledger of another tool: {ledger}; playbooks/adopt.yml takes over those of "
            "Flyway and dbmate, and migrate_baseline stands for all others"
        )
    return {"foreign_ledgers": found, "shape": shape_of(connection, shapes)}


def _told(outcome: Outcome) -> dict[str, t.Any]:
    """Return what the run did; warnings are Ansible's own."""
    told = dataclasses.asdict(outcome)
    del told["warnings"]
    return told


def main() -> None:
    """Run the module."""
    run_postgres_module(work, ARGUMENTS)


if __name__ == "__main__":
    main()
