"""Every module that changes something, run as Ansible runs it: check, run, check, run; and no secret at -vvv."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.support import PROJECT, as_migrator, login, run_module, write_migrations

SERVER = """
SELECT jsonb_agg(to_jsonb(x) ORDER BY x) FROM (
    SELECT datname, datdba, datacl, datconnlimit, datallowconn, shobj_description(oid, 'pg_database')
    FROM pg_database) x
UNION ALL SELECT jsonb_agg(to_jsonb(x) ORDER BY x) FROM (
    SELECT rolname, rolsuper, rolcanlogin, rolbypassrls, rolpassword FROM pg_authid) x
UNION ALL SELECT jsonb_agg(to_jsonb(s) ORDER BY s) FROM pg_db_role_setting s
"""


@pytest.fixture
def database(new_database, connect, roles):
    name = new_database()
    connect(name, role=roles.owner, user=roles.migrator).execute(
        "CREATE TABLE kept (i int PRIMARY KEY); INSERT INTO kept VALUES (1), (2)"
    )
    return name


@pytest.fixture
def state(cluster, database, tmp_path):
    """Return everything that a module may change: the server, the database, the test's folder."""

    def read():
        with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as session:
            server = session.execute(SERVER).fetchall()
        dump = subprocess.run(
            [f"{cluster.state.bin}/pg_dump", cluster.conninfo(database)], capture_output=True, text=True, check=True
        ).stdout
        files = {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in tmp_path.rglob("*")
        }
        return server, re.sub(r"^\\(un)?restrict .*$", "", dump, flags=re.MULTILINE), files

    return read


@pytest.fixture
def module_cases(cluster, roles, database, tmp_path, connect):
    """Return the options of a module in a database that it has something to do in."""
    mine = as_migrator(cluster, roles, database)
    admin = login(cluster, database)

    def migrate():
        write_migrations(tmp_path / "migrations", {"001_a.sql": "CREATE TABLE a (i int);", "002_b.sql": "SELECT 1;"})
        return {**mine, "directory": str(tmp_path / "migrations"), "run_id": "r1", "set_role": roles.owner}

    def backup():
        return {
            **mine, "directory": str(tmp_path / "backups"), "run_id": "r1", "environment": "test",
            "set_role": roles.owner, "client_bin": cluster.state.bin,
        }  # fmt: skip

    def maintenance(state="present"):
        return {**mine, "state": state, "roles": [roles.app], "set_role": roles.owner, "drain": 0}

    def reopening():
        run_module("maintenance", maintenance())
        return maintenance("absent")

    def ownership():
        connect(database).execute("CREATE TABLE stray (i int)")
        return {**admin, "owner": roles.owner, "adopt_from": ["postgres"]}

    def role_password():
        connect("postgres").execute("CREATE ROLE someone LOGIN")
        return {**admin, "role": "someone", "password": "Hidden-7f3a"}

    yield {
        "migrate": ("migrate", migrate),
        "backup": ("backup", backup),
        "maintenance": ("maintenance", maintenance),
        "reopening": ("maintenance", reopening),
        "ownership": ("ownership", ownership),
        "role_password": ("role_password", role_password),
    }
    connect("postgres").execute("DROP ROLE IF EXISTS someone")


def look_at_migrate(planned, done, idle):
    planned["diff"].pop("prepared", "")  # the plan, which only check mode shows
    assert planned["diff"] == done["diff"]
    assert planned["head"] == done["head"] == idle["head"] == "002"
    assert [step["file"] for step in planned["applied"]] == [step["file"] for step in done["applied"]]
    assert idle["applied"] == []
    assert idle["diff"]["before"] == idle["diff"]["after"] == planned["diff"]["after"]


def look_at_backup(planned, done, idle):
    assert (planned["rows"], planned["tables"], planned["path"]) == (2, 1, "")
    assert (done["rows"], done["tables"]) == (idle["rows"], idle["tables"]) == (2, 1)
    assert Path(done["path"]).is_dir()
    assert idle["path"] == done["path"]


LOOK = {"migrate": look_at_migrate, "backup": look_at_backup}


@pytest.mark.parametrize("case", ["migrate", "backup", "maintenance", "reopening", "ownership", "role_password"])
def test_check_run_check_run_is_changed_changed_ok_ok(module_cases, state, case):
    name, prepare = module_cases[case]
    options = prepare()
    before = state()
    first = run_module(name, options, check=True)
    assert state() == before
    second = run_module(name, options)
    after = state()
    third = run_module(name, options, check=True)
    fourth = run_module(name, options)
    results = [first, second, third, fourth]
    assert not [result["msg"] for result in results if result.get("failed")]
    assert [result["changed"] for result in results] == [True, True, False, False]
    assert after != before
    assert state() == after
    for result in results:
        assert options["login_password"] not in result["_output"]
        assert "Hidden-7f3a" not in result["_output"]
    if case in LOOK:
        LOOK[case](first, second, third)


def test_restore_only_shows_in_check_mode_and_each_run_needs_its_own_name(
    module_cases, state, cluster, roles, database, connect
):
    made = run_module("backup", module_cases["backup"][1]())
    options = {
        **as_migrator(cluster, roles, database), "src": made["path"], "environment": "test", "set_role": roles.owner,
        "client_bin": cluster.state.bin, "run_id": "x1",
    }  # fmt: skip
    before = state()
    planned = run_module("restore", options, check=True)
    assert planned["changed"]
    assert planned["rows"] == 2
    assert f"{database}_failed_x1: as it is now" in planned["diff"]["after"]
    assert run_module("restore", options)["failed"]
    assert state() == before
    kept = []
    try:
        for run in ("x1", "x2"):
            done = run_module("restore", {**options, "run_id": run, "confirm": database})
            kept.append(done["failed_database"])
            assert done["changed"]
        assert kept == [f"{database}_failed_x1", f"{database}_failed_x2"]
        repeated = run_module("restore", {**options, "run_id": "x2", "confirm": database})
        assert repeated["failed"]
        assert kept[1] in repeated["msg"]
    finally:
        with connect("postgres") as server:
            found = server.execute(
                "SELECT datname FROM pg_database WHERE starts_with(datname, %s)", [f"{database}_"]
            ).fetchall()
            for (name,) in found:
                server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  module_defaults:
    group/settler.runbook.postgres: "{{ connection }}"
  tasks:
    - settler.runbook.preflight: {owner: settler_owner, application: settler_app}
    - settler.runbook.role_password: "{{ admin | combine({'role': 'someone', 'password': secret}) }}"
    - settler.runbook.migrate: {directory: "{{ folder }}/migrations", run_id: r1, set_role: settler_owner}
    - settler.runbook.migration_info: {directory: "{{ folder }}/migrations"}
    - settler.runbook.backup:
        {directory: "{{ folder }}/backups", run_id: r1, environment: test, set_role: settler_owner}
    - settler.runbook.verify: {set_role: settler_owner}
    - settler.runbook.maintenance: {state: present, roles: [settler_app], set_role: settler_owner}
    - settler.runbook.restore: {src: "{{ folder }}/backups/none", run_id: r1, environment: test}
      ignore_errors: true
    - settler.runbook.migrate: {login_password: "{{ wrong }}", directory: "{{ folder }}/migrations", run_id: r1}
      ignore_errors: true
"""


def test_no_secret_is_printed_at_vvv_with_diff(module_cases, cluster, roles, database, tmp_path):
    module_cases["migrate"][1]()
    module_cases["role_password"][1]()
    (tmp_path / "play.yml").write_text(PLAY, encoding="utf-8")
    secrets = {"secret": "Hidden-7f3a", "wrong": "Wrong-5c1e"}
    variables = {
        **secrets, "connection": as_migrator(cluster, roles, database), "admin": login(cluster, database),
        "folder": str(tmp_path), "ansible_python_interpreter": sys.executable,
    }  # fmt: skip
    (tmp_path / "vars.json").write_text(json.dumps(variables), encoding="utf-8")
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", "-vvv", "--diff",
         "-e", f"@{tmp_path}/vars.json", tmp_path / "play.yml"],
        cwd=PROJECT,
        env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_LOCAL_TEMP": str(tmp_path / "t")},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    assert "001_a.sql" in output
    assert re.search(r"ok=9 +changed=4 .*ignored=2", output), output[-500:]
    for secret in (*secrets.values(), roles.migrator_password, cluster.state.password):
        assert secret not in output
