"""The maintenance window on a real server: the application is out, its open work is not torn off too early."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from tests.support import Background, as_migrator, call_module, login, migration, refused, run_module, wait_until


@pytest.fixture
def window(cluster, roles):
    """Run the module as the role does: as the migrator, who becomes the database's owner."""

    def run(database, state="present", check=False, **changes):
        arguments = {
            **as_migrator(cluster, roles, database), "state": state, "roles": [roles.app], "set_role": roles.owner,
            "drain": 0.2, "run_id": "r", "lock_wait": 60, **changes,
        }  # fmt: skip
        return call_module("maintenance", arguments, check=check)

    return run


def may_connect(connect, database, role="settler_app"):
    return (
        connect("postgres").execute("SELECT has_database_privilege(%s, %s, 'CONNECT')", [role, database]).fetchone()[0]
    )


def is_ended(session):
    try:
        session.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def test_idle_and_busy_sessions_are_ended_and_none_comes_back(new_database, connect, roles, window):
    database = new_database()
    idle = connect(database, user=roles.app)
    idle.execute("SET application_name = 'api'")
    busy = connect(database, user=roles.app)
    busy.execute("BEGIN; SELECT 1")
    other = connect(database, user=roles.migrator)
    pids = {idle.info.backend_pid, busy.info.backend_pid}
    result = window(database)
    assert result["changed"]
    assert is_ended(idle)
    assert is_ended(busy)
    assert not is_ended(other)
    assert {session["pid"] for session in result["ended"]} == pids
    assert {session["role"] for session in result["ended"]} == {"settler_app"}
    assert "api" in {session["application"] for session in result["ended"]}
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        connect(database, user=roles.app)


def test_open_transaction_may_finish_within_the_drain(new_database, connect, roles, window):
    database = new_database()
    connect(database, role=roles.owner).execute("CREATE TABLE a (i int)")
    busy = connect(database, user=roles.app)
    busy.execute("BEGIN; INSERT INTO a VALUES (1)")
    run = Background(lambda: window(database, drain=3600))
    wait_until(lambda: not may_connect(connect, database))
    busy.execute("INSERT INTO a VALUES (2); COMMIT")
    run.value()
    assert is_ended(busy)
    assert connect(database).execute("SELECT count(*) FROM a").fetchone() == (2,)


def test_transaction_that_outlasts_the_drain_is_rolled_back(new_database, connect, roles, window):
    database = new_database()
    connect(database, role=roles.owner).execute("CREATE TABLE a (i int)")
    busy = connect(database, user=roles.app)
    busy.execute("BEGIN; INSERT INTO a VALUES (1)")
    window(database)
    assert is_ended(busy)
    assert connect(database).execute("SELECT count(*) FROM a").fetchone() == (0,)


def test_sessions_in_other_databases_are_left_alone(new_database, connect, roles, window):
    database, other = new_database(), new_database()
    session = connect(other, user=roles.app)
    window(database)
    assert not is_ended(session)
    assert may_connect(connect, other)


def test_window_that_is_open_already_still_ends_sessions(new_database, connect, roles, window):
    database = new_database()
    session = connect(database, user=roles.app)
    connect("postgres").execute(
        sql.SQL("REVOKE CONNECT ON DATABASE {} FROM settler_app").format(sql.Identifier(database))
    )
    result = window(database)
    assert not result["changed"]
    assert len(result["ended"]) == 1
    assert is_ended(session)


def test_application_is_let_in_again(new_database, connect, roles, window):
    database = new_database()
    window(database)
    result = window(database, "absent")
    assert (result["changed"], result["ended"]) == (True, [])
    assert connect(database, user=roles.app).execute("SELECT 1").fetchone() == (1,)
    assert not window(database, "absent")["changed"]


def test_role_that_comes_in_through_another_one_is_no_silent_success(new_database, connect, roles, window):
    database, admin = new_database(), connect("postgres")
    name = sql.Identifier(database)
    admin.execute("CREATE ROLE door; GRANT door TO settler_app")
    try:
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO door").format(name))
        result = window(database)
        assert result.get("failed") or not may_connect(connect, database)
        if result.get("failed"):
            assert "settler_app" in result["msg"]
    finally:
        admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM door").format(name))
        admin.execute("DROP ROLE door")


def test_login_that_does_not_see_the_sessions_is_no_silent_success(cluster, new_database, connect, roles, window):
    database, admin = new_database(), connect("postgres")
    name = sql.Identifier(database)
    admin.execute("CREATE ROLE stranger LOGIN PASSWORD 'stranger-1' IN ROLE settler_owner")
    try:
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO stranger").format(name))
        session = connect(database, user=roles.app)
        result = window(database, login_user="stranger", login_password="stranger-1")
        assert is_ended(session) or "may not end the sessions of settler_app" in result["msg"]
    finally:
        admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM stranger").format(name))
        admin.execute("DROP ROLE stranger")


@pytest.mark.parametrize(
    ("out", "told"),
    [
        (["postgres"], "postgres: superuser or owner"),
        (["settler_owner"], "settler_owner: superuser or owner"),
        (["settler_app", "settler_migrator"], "settler_migrator: superuser or owner"),
        (["settler_app", "nobody"], "no such role: nobody"),
    ],
)
def test_roles_that_cannot_be_kept_out_are_refused(new_database, connect, roles, window, out, told):
    database = new_database()
    session = connect(database, user=roles.app)
    result = window(database, roles=out)
    assert result["failed"]
    assert told in result["msg"]
    assert not is_ended(session)
    assert may_connect(connect, database)


def test_window_is_refused_while_public_may_connect(new_database, connect, roles, window):
    database = new_database()
    connect("postgres").execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO PUBLIC").format(sql.Identifier(database)))
    session = connect(database, user=roles.app)
    result = window(database)
    assert result["failed"]
    assert "PUBLIC may connect" in result["msg"]
    assert not is_ended(session)


def test_check_mode_says_what_would_change_and_touches_nothing(new_database, connect, roles, window):
    database = new_database()
    session = connect(database, user=roles.app)
    result = window(database, check=True)
    assert result["changed"]
    assert result["diff"] == {"before": {"kept_out": []}, "after": {"kept_out": ["settler_app"]}}
    assert not is_ended(session)
    assert may_connect(connect, database)


def test_check_mode_knows_no_database_that_is_yet_to_be_made(cluster, roles, window):
    assert not window("not_there_yet", check=True)["changed"]
    assert window("not_there_yet")["sqlstate"] == "3D000"


def test_it_works_without_becoming_another_role(cluster, new_database, connect, roles):
    database = new_database()
    session = connect(database, user=roles.app)
    run_module("maintenance", {**login(cluster, database), "state": "present", "roles": [roles.app], "drain": 0})
    assert is_ended(session)


# Other runs


@pytest.mark.every_major
def test_window_is_another_one_after_anybody_has_opened_or_closed_one(new_database, connect, window, apply):
    database = new_database()
    first = window(database)["window"]
    apply(database, [migration("SELECT 1", "001_a.sql")], window=first)  # it is still ours
    apply(database, [migration("SELECT 1", "001_a.sql")], window=first)
    for state in ("present", "absent"):
        mine = window(database)["window"]
        window(database, state, run_id="other")
        error = refused(apply, database, [migration("SELECT 1", "001_a.sql"), migration("SELECT 2", "002_b.sql")],
                        window=mine)  # fmt: skip
        assert "since this run opened its window" in error.message
        assert error.facts["foreign_window"] is True
    with connect(database) as session:
        assert session.execute("SELECT file FROM runbook.migrations").fetchall() == [("001_a.sql",)]
    window(database, run_id="r")


@pytest.mark.parametrize("step", ["backup", "migrate", "verify", "restore"])
def test_window_is_not_opened_while_another_run_is_at_work(new_database, connect, cluster, window, step):
    database = new_database()
    with psycopg.connect(cluster.conninfo(database), application_name=f"runbook:other:{step}"):
        result = window(database, lock_wait=0.2)
        assert "another run is at work in this database" in result["msg"]
        assert f"runbook:other:{step}" in result["msg"]
        assert result["foreign_window"] is True
        assert may_connect(connect, database)
    assert window(database)["window"]


def test_own_sessions_and_those_that_only_look_are_not_in_the_way(new_database, cluster, window):
    database = new_database()
    for name in ("runbook:r:backup", "runbook:other:info", "runbook:preflight", "api"):
        with psycopg.connect(cluster.conninfo(database), application_name=name):
            assert window(database)["window"]


def test_window_waits_for_what_a_killed_run_has_left(new_database, connect, cluster, window):
    database = new_database()
    left = psycopg.connect(cluster.conninfo(database), application_name="runbook:killed:migrate")
    opening = Background(lambda: window(database))
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = 'runbook:r:maintenance'"
    wait_until(lambda: connect("postgres").execute(waiting, [database]).fetchone()[0])
    left.close()
    assert opening.value()["window"]
