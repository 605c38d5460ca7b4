"""Preflight on a real server: what would make a run fail is found before anything is changed, and all of it at once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _backup_folder, _preflight, _space
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._preflight import Wanted, preflight
from psycopg import sql

from tests.support import as_migrator, login, run_module


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
