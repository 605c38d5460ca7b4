"""Fleet: many databases of one server in one call: canary, workers, an end after failures, and going on after it."""

from __future__ import annotations

import threading

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._fleet import databases_of, run_fleet
from ansible_collections.settler.runbook.plugins.modules.migrate import ARGUMENTS
from psycopg import sql

from tests.support import as_migrator, call_module, refused, run_module, wait_until, write_migrations

FILES = {"001_a.sql": "CREATE TABLE a (id int);\n", "002_b.sql": "ALTER TABLE a ADD COLUMN b int;\n"}


@pytest.fixture
def migrate_all(cluster, roles, tmp_path):
    """Run the module migrate on the folder, in many databases."""
    write_migrations(tmp_path, FILES)

    def run(databases, check=False, how=call_module, **changes):
        arguments = {
            **{name: option.get("default") for name, option in ARGUMENTS.items()},
            **as_migrator(cluster, roles, "postgres"),
            "directory": str(tmp_path),
            "run_id": "fleet-1",
            "set_role": roles.owner,
            "databases": databases,
            **changes,
        }
        return how("migrate", arguments, check=check)

    return run


def _states(result):
    return [one["state"] for one in result["databases"]]


def test_all_databases_are_migrated_and_a_second_run_has_nothing_to_do(new_database, migrate_all, ask):
    names = [new_database() for _ in range(5)]
    planned = migrate_all(names, check=True)
    assert _states(planned) == ["changed"] * 5
    assert ask(names[0], "SELECT to_regclass('a')") is None
    done = migrate_all(names, workers=3)
    assert (done["changed"], _states(done)) == (True, ["changed"] * 5)
    for name in names:
        assert ask(name, "SELECT count(*) FROM runbook.migrations") == 2
    again = migrate_all(names)
    assert (again["changed"], _states(again)) == (False, ["ok"] * 5)


def test_a_failure_is_told_with_its_database_and_a_repetition_does_only_what_is_left(
    new_database, migrate_all, connect, roles, ask
):
    names = [new_database() for _ in range(4)]
    connect(names[1], role=roles.owner).execute("CREATE TABLE a (other int)")
    stopped = migrate_all(names, workers=1)
    assert _states(stopped) == ["changed", "failed", "left", "left"]
    assert f"1 of 4 databases failed: {names[1]}; 2 were not begun" in stopped["msg"]
    assert "001_a.sql:1" in stopped["msg"]
    connect(names[1], role=roles.owner).execute("DROP TABLE a")
    assert _states(migrate_all(names, workers=1)) == ["ok", "changed", "changed", "changed"]


def test_a_canary_that_fails_leaves_the_others_alone(new_database, migrate_all, connect, roles, ask):
    names = [new_database() for _ in range(3)]
    connect(names[2], role=roles.owner).execute("CREATE TABLE a (other int)")
    assert _states(migrate_all(names, canary=names[2], max_failures=10)) == ["left", "left", "failed"]
    assert _states(migrate_all(names, max_failures=10)) == ["changed", "changed", "failed"]


def test_patterns_mean_databases_and_one_that_means_none_is_refused(new_database, migrate_all):
    name = new_database()
    assert [one["database"] for one in migrate_all([name[:-1] + "?", name], check=True)["databases"]].count(name) == 1
    result = migrate_all([name, "never_*"])
    assert "no database is meant by never_*; nothing was applied" in result["msg"]


def _do(server, command, *names):
    server.execute(sql.SQL(command).format(*map(sql.Identifier, names)))


@pytest.mark.every_major
@pytest.mark.usefixtures("tidy_server")
def test_copies_and_what_a_rollback_has_replaced_are_meant_by_no_pattern(new_database, cluster, roles, server):
    name = new_database()
    arguments = as_migrator(cluster, roles, name) | {"environment": "test", "set_role": roles.owner}
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [name]).fetchall())
    call_module("snapshot", arguments | {"run_id": "r1", "state": "present"})
    replaced = call_module("restore", arguments | {"run_id": "x1", "confirm": name})["failed_database"]
    copy = call_module("snapshot", arguments | {"run_id": "r2", "state": "present"})["name"]
    _do(server, "ALTER DATABASE {} ALLOW_CONNECTIONS true", copy)  # as while it is compared
    half_made = f"{name}_restore_r3"
    _do(server, "CREATE DATABASE {} CONNECTION LIMIT 0", half_made)
    assert databases_of(server, [f"{name}*"]) == [name]
    for beside, why in ((replaced, "put aside by a rollback of"), (copy, "snapshot of")):
        assert f"{beside} is no database to migrate (settler.runbook: {why} {name}, run " in (
            refused(databases_of, server, [f"{name}*", beside]).message
        )
    assert "no database is meant" in refused(databases_of, server, [half_made]).message
    _do(server, "DROP DATABASE {}", name)
    _do(server, "ALTER DATABASE {} RENAME TO {}", replaced, name)  # somebody wants it back
    assert databases_of(server, [f"{name}*"]) == [name]


@pytest.mark.every_major
def test_database_in_the_window_of_another_run_fails_and_the_others_do_not(
    new_database, migrate_all, server, roles, ask
):
    names = [new_database() for _ in range(3)]
    _do(server, "REVOKE CONNECT ON DATABASE {} FROM {}", names[1], roles.app)
    for check in (True, False):
        result = migrate_all(names, check=check, application_roles=["nobody", roles.app], max_failures=2)
        assert _states(result) == ["changed", "failed", "changed"]
        assert f"a maintenance window of another run is open: {roles.app} may not connect" in result["msg"]
        assert result["databases"][1]["foreign_window"]
    assert ask(names[1], "SELECT to_regclass('a')") is None
    _do(server, "GRANT CONNECT ON DATABASE {} TO {}", names[1], roles.app)
    assert _states(migrate_all(names, application_roles=[roles.app])) == ["ok", "changed", "ok"]


def test_role_of_the_application_may_be_each_databases_own_and_have_its_rights_from_another(
    new_database, migrate_all, server, roles
):
    name = new_database()
    own = f"{name}_app"
    _do(server, "CREATE ROLE {} LOGIN", own)
    try:
        asked = {"application_roles": ["{database}_app"], "check": True}
        assert _states(migrate_all([name], **asked)) == [
            "changed"
        ]  # it has no rights there: no application of this one
        _do(server, "GRANT {} TO {}", roles.app, own)
        assert _states(migrate_all([name], **asked)) == ["changed"]  # may connect, as a member
        _do(server, "REVOKE CONNECT ON DATABASE {} FROM {}", name, roles.app)
        assert _states(migrate_all([name], **asked)) == ["failed"]
    finally:
        _do(server, "DROP ROLE {}", own)


def test_warnings_are_told_with_their_database_and_are_in_its_result(new_database, migrate_all, connect, roles):
    names = [new_database() for _ in range(3)]
    for name in names[1:]:
        connect(name, user=roles.app).execute("BEGIN; SELECT 1")
    with connect(names[2], role=roles.owner) as session:
        session.execute("CREATE TABLE a (other int)")
    result = migrate_all(names, how=run_module, long_transaction=0, workers=1, progress_file=None)
    assert _states(result) == ["changed", "changed", "failed"]
    assert [len(one["warnings"]) for one in result["databases"]] == [0, 1, 1]
    assert result["databases"][1]["warnings"][0].startswith("an open transaction may hold locks")
    told = [f"{name}: an open transaction" in str(result["warnings"]) for name in names]
    assert told == [False, True, True]


def test_no_more_than_the_workers_run_at_once():
    running, most, lock = 0, 0, threading.Lock()
    all_three = threading.Barrier(3)

    def work(name):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if name != "canary":
            all_three.wait(5)  # broken if fewer than three run at once
        with lock:
            running -= 1
        return {"changed": True}

    run_fleet(["canary", *"abcdef"], work, workers=3)
    assert most == 3


def test_after_a_failure_what_runs_is_finished_and_nothing_more_is_begun():
    failed = threading.Event()

    def work(name):
        if name == "a":
            raise RunbookError("no")
        if name == "b":
            failed.wait(0.2)
        return {"changed": True}

    results = run_fleet(["canary", *"abcdef"], work, workers=2)
    states = {one["database"]: one["state"] for one in results}
    assert (states["a"], states["b"], states["f"]) == ("failed", "changed", "left")


def test_a_canary_that_is_none_of_the_databases_is_refused():
    assert "is none of the databases" in refused(run_fleet, ["a"], lambda name: {"changed": False}, canary="b").message
