"""Preflight on a real server: what would make a run fail is found before anything is changed, and all of it at once."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _backup_folder, _preflight, _space
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._preflight import Wanted, preflight
from psycopg import sql

from tests.support import as_migrator, call_module, login, run_module


@pytest.fixture
def look(cluster, roles, tmp_path):
    """Make the checks; return what is not ok, and the facts."""
    wanted = Wanted(
        owner=roles.owner, application=roles.app, extensions=("pgcrypto", "uuid-ossp"),
        backup_directory=tmp_path / "backups" / "new", client_bin=cluster.state.bin,
    )  # fmt: skip

    def run(database, params=None, **changes):
        rows, facts = preflight(params or as_migrator(cluster, roles, database), replace(wanted, **changes))
        return [row for row in rows if row.status != "ok"], facts

    return run


def test_good_database_passes_every_check_and_its_facts_are_told(cluster, roles, new_database, connect, look):
    database = new_database()
    connect(database, role=roles.owner).execute("CREATE TABLE a (i int)")
    bad, facts = look(database)
    assert bad == []
    assert facts["exists"]
    assert facts["server_major"] == cluster.state.major
    assert facts["server_version"].startswith(str(cluster.state.major))
    assert facts["size_bytes"] > 1_000_000


def test_missing_database_fails_only_where_it_must_exist(look):
    (row,), facts = look("not_there_yet")
    assert (row.check, row.status, facts["exists"]) == ("database", "failed", False)
    assert "setup.yml" in row.hint
    assert look("not_there_yet", database_required=False)[0] == []


def test_what_only_verification_needs_is_asked_for_before(new_database, look, monkeypatch):
    monkeypatch.setattr(_preflight, "HAS_YAML", False)
    (row,), _facts = look(new_database())
    assert (row.check, row.status) == ("libraries", "failed")
    assert "PyYAML is missing" in row.detail


@pytest.mark.parametrize(
    ("changes", "check", "told"),
    [
        ({"owner": "nobody"}, "role", "nobody does not exist"),
        ({"application": "nobody"}, "role", "nobody does not exist"),
        ({"owner": "postgres"}, "role", "no member of postgres"),
        ({"application": "settler_owner"}, "role", "settler_owner is superuser, BYPASSRLS or owner"),
        ({"extensions": ("pgcrypto", "no_such")}, "extension", "no_such is not installed on the server"),
        ({"client_bin": "/nonexistent"}, "client programs", "no pg_dump and pg_restore"),
    ],
)
def test_each_missing_thing_is_named(new_database, look, changes, check, told):
    bad, _facts = look(new_database(), **changes)
    row = next(row for row in bad if row.check == check)
    assert row.status == "failed"
    assert told in row.detail
    assert row.hint


def test_application_that_is_not_bound_by_policies_fails(new_database, connect, look):
    database, admin = new_database(), connect("postgres")
    admin.execute("ALTER ROLE settler_app BYPASSRLS")
    try:
        (row,), _facts = look(database)
    finally:
        admin.execute("ALTER ROLE settler_app NOBYPASSRLS")
    assert "settler_app is superuser, BYPASSRLS or owner" in row.detail


def test_tables_of_other_owners_are_counted_and_the_way_out_is_told(new_database, connect, look):
    database = new_database()
    connect(database).execute("CREATE TABLE a (i int); CREATE VIEW v AS SELECT 1")
    (row,), _facts = look(database)
    assert row.check == "ownership"
    assert row.detail == "2 tables and views belong to postgres, not to settler_owner"
    assert "create_database_adopt_from=postgres" in row.hint


def test_owner_that_forced_row_security_blinds_fails(new_database, connect, roles, look):
    database = new_database()
    connect(database, role=roles.owner).execute(
        "CREATE TABLE a (i int); ALTER TABLE a ENABLE ROW LEVEL SECURITY; ALTER TABLE a FORCE ROW LEVEL SECURITY"
    )
    (row,), _facts = look(database)
    assert (row.check, row.status) == ("sight", "failed")
    assert "a" in row.detail


def test_login_without_createdb_cannot_roll_back(cluster, new_database, connect, look):
    database, admin = new_database(), connect("postgres")
    admin.execute("CREATE ROLE plain LOGIN PASSWORD 'plain-1' IN ROLE settler_owner, settler_app")
    name = sql.Identifier(database)
    try:
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO plain").format(name))
        (row,), _facts = look(database, login(cluster, database, "plain", "plain-1"))
        assert (row.check, row.detail) == ("rollback", "plain lacks CREATEDB")
    finally:
        admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM plain").format(name))
        admin.execute("DROP ROLE plain")


EVENT_TRIGGER = """
CREATE FUNCTION noted() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$;
ALTER FUNCTION noted() OWNER TO settler_owner;
CREATE EVENT TRIGGER "on ddl" ON ddl_command_end EXECUTE FUNCTION noted();
"""
OF_DUMP = [
    (EVENT_TRIGGER, "only a superuser can make: event trigger on ddl"),
    ("CREATE PUBLICATION everything FOR ALL TABLES", "only a superuser can make: publication everything"),
    (
        ("CREATE PUBLICATION every; ALTER PUBLICATION every OWNER TO settler_owner;"
         "ALTER PUBLICATION every SET TABLES IN SCHEMA public"),
        "only a superuser can make: publication every",
    ),
    ("CREATE EXTENSION pageinspect", "only a superuser can make: extension pageinspect"),
    ("CREATE LANGUAGE mine HANDLER plpgsql_call_handler", "only a superuser can make: language mine"),
    (
        ("CREATE FUNCTION f(int) RETURNS int IMMUTABLE LEAKPROOF LANGUAGE sql AS 'SELECT $1';"
         "ALTER FUNCTION f OWNER TO settler_owner"),
        "only a superuser can make: function f(integer)",
    ),
    ("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", "to its owner: function f() of postgres"),
    ("CREATE SCHEMA apart", "to its owner: schema apart of postgres"),
    ("ALTER SCHEMA public OWNER TO postgres", "to its owner: schema public of postgres"),
    ("CREATE SEQUENCE s", "to its owner: sequence s of postgres"),
    ("CREATE TYPE pair AS (a int, b int)", "to its owner: type pair of postgres"),
    ("CREATE DOMAIN d AS int CHECK (VALUE > 0)", "to its owner: type d of postgres"),
    ("SELECT lo_from_bytea(4242, 'x')", "to its owner: large object 4242 of postgres"),
    ("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'; ALTER FUNCTION f OWNER TO settler_migrator",
     "to its owner: function f() of settler_migrator"),
    ("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO settler_app", "privileges of: postgres"),
    (
        ("SET ROLE settler_owner; CREATE TABLE a (i int); GRANT SELECT ON a TO settler_app WITH GRANT OPTION;"
         "SET ROLE settler_app; GRANT SELECT ON a TO settler_migrator; RESET ROLE"),
        "another role than the owner has granted, of: table a by settler_app",
    ),
]  # fmt: skip
OF_NEITHER = [
    ("ALTER DATABASE {} SET log_min_duration_statement = 5000", "the setting log_min_duration_statement"),
    ("ALTER DATABASE {} SET app.key = 'a-secret'", "the setting app.key"),
    ("ALTER ROLE postgres IN DATABASE {} SET work_mem = '5MB'", "the setting work_mem"),
    (
        (
            "CREATE SUBSCRIPTION sub CONNECTION 'dbname=x' PUBLICATION p WITH (connect = false);"
            "ALTER SUBSCRIPTION sub SET (slot_name = NONE)"
        ),
        "a subscription stays with the failed database: sub",
    ),
]


@pytest.fixture
def tell(cluster, roles, connect, look):
    """Make what a superuser does to a database; return what preflight says for a way back, and how a drill ends."""
    made = []

    def run(database, statements, tmp_path):
        made.append(database)
        with connect(database) as session:
            session.execute(sql.SQL(statements).format(sql.Identifier(database)) if "{}" in statements else statements)
        told = {
            way: [
                (row.status, row.detail)
                for row in look(database, way_back=way)[0]
                if "the schema public of a new database" not in row.detail  # which 14 tells of each database
                and (row.check != "client programs" or cluster.state.major != 16)  # of which there are none here
            ]
            for way in WAYS
        }
        usual = {
            **as_migrator(cluster, roles, database), "directory": str(tmp_path / "backups"), "run_id": "r1",
            "environment": "test", "set_role": roles.owner, "client_bin": cluster.state.bin, "jobs": 1,
        }  # fmt: skip
        failed = call_module("backup", usual).get("failed") or call_module("drill", usual).get("failed")
        call_module("drill", {**usual, "state": "absent"})
        return told, failed

    yield run
    for database in made:
        with connect(database) as session:
            if session.execute("SELECT 1 FROM pg_subscription WHERE subname = 'sub'").fetchone():
                session.execute("DROP SUBSCRIPTION sub")


WAYS = ("dump", "snapshot", "none")


@pytest.mark.every_major
@pytest.mark.parametrize(("statements", "detail"), OF_DUMP)
def test_what_the_migrator_could_not_restore_is_refused_before_the_window(
    cluster, new_database, tell, tmp_path, statements, detail
):
    if cluster.state.major == 14 and "SCHEMA public" in statements:
        return  # there a new database is so
    told, failed = tell(new_database(), statements, tmp_path)
    assert {way: {status for status, _detail in rows} for way, rows in told.items()} == {
        "dump": {"failed"}, "snapshot": {"warning"}, "none": {"warning"},
    }  # fmt: skip
    assert detail in "\n".join(detail for _status, detail in told["dump"])
    if cluster.state.major != 16:
        assert failed


@pytest.mark.every_major
@pytest.mark.parametrize(("statements", "detail"), OF_NEITHER)
def test_what_no_snapshot_brings_back_either_is_refused_for_one_too(
    cluster, new_database, tell, tmp_path, statements, detail
):
    told, failed = tell(new_database(), statements, tmp_path)
    assert {way: {status for status, _detail in rows} for way, rows in told.items()} == {
        "dump": {"failed"}, "snapshot": {"failed"}, "none": {"warning"},
    }  # fmt: skip
    assert detail in told["dump"][0][1]
    assert "a-secret" not in told["dump"][0][1]
    if cluster.state.major != 16:
        assert failed


@pytest.mark.parametrize(("way_back", "status"), [("dump", "failed"), ("snapshot", "failed"), ("none", "warning")])
def test_prepared_transaction_that_lets_nobody_rename_the_database(new_database, connect, look, way_back, status):
    database = new_database()
    session = connect(database)
    session.execute("BEGIN; CREATE TABLE x (i int); PREPARE TRANSACTION 'held'")
    try:
        assert look(database, way_back=way_back)[0] == []  # a transaction manager has one for a moment
        time.sleep(5)
        (row,), _facts = look(database, way_back=way_back)
        assert (row.check, row.status) == ("rollback", status)
        assert "prepared transactions let nobody rename the database: held (postgres, " in row.detail
        assert "ROLLBACK PREPARED" in row.hint
    finally:
        session.execute("ROLLBACK PREPARED 'held'")


def test_what_the_owner_may_restore_because_it_is_a_superuser_is_told_by_nobody(new_database, connect, look):
    database, server = new_database(), connect("postgres")
    with connect(database) as session:
        for statements, _detail in OF_DUMP[:1] + OF_DUMP[3:5]:
            session.execute(statements)
    server.execute("ALTER ROLE settler_owner SUPERUSER")
    try:
        assert [row.check for row in look(database, way_back="dump", application=None)[0]] == []
    finally:
        server.execute("ALTER ROLE settler_owner NOSUPERUSER")


def test_settings_that_the_migrator_may_give_are_tried_and_left_as_they_are(new_database, connect, look):
    database, server = new_database(), connect("postgres")
    for command in (
        "ALTER DATABASE {} SET work_mem = '5MB'",
        'ALTER DATABASE {} SET search_path = public, "$user"',
        "ALTER ROLE settler_app IN DATABASE {} SET statement_timeout = '7s'",
    ):
        server.execute(sql.SQL(command).format(sql.Identifier(database)))
    query = "SELECT s.xmin, s.* FROM pg_db_role_setting s JOIN pg_database d ON d.oid = setdatabase WHERE datname = %s"
    before = server.execute(query, [database]).fetchall()
    assert look(database, way_back="dump")[0] == []
    assert server.execute(query, [database]).fetchall() == before


def test_backends_of_an_earlier_run_are_a_warning(new_database, connect, roles, look):
    database = new_database()
    session = connect(database, user=roles.migrator)
    session.execute("SET application_name = 'runbook:r7:migrate'")
    (row,), _facts = look(database)
    assert (row.check, row.status) == ("other run", "warning")
    assert f"pid {session.info.backend_pid} of runbook:r7:migrate" in row.detail


def test_long_transaction_is_a_warning(new_database, connect, roles, look, monkeypatch):
    database = new_database()
    session = connect(database, user=roles.app)
    session.execute("BEGIN; SELECT 1")
    monkeypatch.setattr(_preflight, "_LONG", _preflight._LONG.replace("1 minute", "1 microsecond"))
    (row,), _facts = look(database)
    assert (row.check, row.status) == ("long transaction", "warning")
    assert f"pid {session.info.backend_pid} (settler_app)" in row.detail


def test_full_disk_and_closed_or_shared_folder_fail(new_database, look, monkeypatch, tmp_path):
    database = new_database()
    tmp_path.chmod(0o777)
    assert "can be written by others" in look(database)[0][0].detail
    tmp_path.chmod(0o700)
    monkeypatch.setattr(_space.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1))
    assert "0 MB free" in look(database)[0][0].detail
    monkeypatch.setattr(_backup_folder.os, "access", lambda *_arguments: False)
    assert "is not writable" in look(database)[0][0].detail


def test_everything_that_is_wrong_is_told_at_once(new_database, look):
    bad, _facts = look(
        new_database(), owner="nobody", application="noone", extensions=("x",), client_bin="/nonexistent"
    )
    assert sorted(row.check for row in bad) == ["client programs", "extension", "role", "role"]


def test_nothing_is_made(new_database, look, tmp_path):
    look(new_database())
    assert list(tmp_path.iterdir()) == []


def test_module_fails_with_the_list_and_check_mode_only_warns(cluster, roles, new_database):
    arguments = {**as_migrator(cluster, roles, new_database()), "owner": "nobody", "extensions": ["no_such"]}
    result = run_module("preflight", arguments)
    assert result["failed"]
    assert result["msg"].startswith("2 of ")
    assert "  role: nobody does not exist" in result["msg"]
    assert "  extension: no_such" in result["msg"]
    assert {check["status"] for check in result["checks"]} == {"ok", "failed"}
    planned = run_module("preflight", arguments, check=True)
    assert not planned.get("failed")
    assert len(planned["warnings"]) == 2


def test_wrong_password_and_closed_port_say_where_and_who(cluster, roles, new_database, look):
    params = as_migrator(cluster, roles, new_database())
    with pytest.raises(RunbookError, match="as settler_migrator") as refused:
        look("x", {**params, "login_password": "wrong"})
    assert "wrong" not in refused.value.message.replace("wrong password", "")
    with pytest.raises(RunbookError, match=f"{cluster.state.host}:1 "):
        look("x", {**params, "login_port": 1})
