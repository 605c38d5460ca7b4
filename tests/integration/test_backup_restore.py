"""Backup and restore on a real server: the proof is of the dump's own snapshot, and nothing is lost on the way back."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _backup, _restore, _rollback
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot
from ansible_collections.settler.runbook.plugins.module_utils._connection import client_arguments, client_environment
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._database import properties, row_counts
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._fingerprint import Limits
from ansible_collections.settler.runbook.plugins.module_utils._manifest import (
    check_files,
    list_backups,
    read_manifest,
    seal,
)
from ansible_collections.settler.runbook.plugins.module_utils._migrate import Options as MigrateOptions
from ansible_collections.settler.runbook.plugins.module_utils._migrate import Outcome, migrate
from psycopg import sql

from tests.support import PROJECT, Background, as_migrator, login, migration, refused, start_module, wait_until

SCHEMA = """
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TABLE tenants (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), name text NOT NULL);
CREATE TABLE jobs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id uuid NOT NULL REFERENCES tenants,
    name text DEFAULT 'ü', how mood DEFAULT 'ok', code text UNIQUE);
CREATE TABLE "Odd name" (a serial, "b %s {}" numeric(9, 2) CHECK ("b %s {}" > 0));
CREATE INDEX jobs_name ON jobs (lower(name));
CREATE VIEW names AS SELECT name FROM jobs;
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.name := upper(NEW.name); RETURN NEW; END $$;
CREATE TRIGGER touch BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION touch();
ALTER TABLE jobs ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON jobs TO settler_app USING (tenant_id = current_setting('app.tenant')::uuid);
INSERT INTO tenants (name) SELECT 'tenant ' || n FROM generate_series(1, 3) n;
INSERT INTO jobs (tenant_id, name, code) SELECT id, 'job ' || n, name || n FROM tenants, generate_series(1, 40) n;
INSERT INTO "Odd name" ("b %s {}") VALUES (1.5), (2);
"""
COUNTS = {
    "public.Odd name": 2, "public.jobs": 120, "public.tenants": 3,
    "runbook.events": 2, "runbook.journal": 0, "runbook.migrations": 2,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("tidy_server")


@pytest.fixture
def params(cluster, roles):
    return lambda dbname: as_migrator(cluster, roles, dbname)


@pytest.fixture
def database(new_database, params):
    """A database with tables, rows and a ledger."""
    name = new_database()
    with engine_connect(params(name)) as session:
        files = [migration(SCHEMA), migration("SELECT 1;", "R__again.sql")]
        migrate(session, files, MigrateOptions(run_id="r0", role="settler_owner"), Outcome())
    return name


@pytest.fixture
def back_up(cluster, params, tmp_path):
    """Back a database up into the test's folder; return the manifest."""

    def run(dbname, run_id="b1", login_as=None, how=_backup.backup, **changes):
        options = _backup.Options(
            directory=tmp_path / "backups", run_id=run_id, environment="test", role="settler_owner",
            ledger_schema="runbook", client_bin=cluster.state.bin, jobs=1, limits=Limits(jobs=1), compression="gzip:1",
            lock_timeout=10, keep=0,
        )  # fmt: skip
        return how(login_as or params(dbname), replace(options, **changes))

    return run


@pytest.fixture
def restoring(cluster, tmp_path):
    """Return the options of a restore."""

    def options(dbname, run_id="b1", **changes):
        made = _rollback.Options(
            source=tmp_path / "backups" / dbname / run_id, run_id="x1", environment="test", role="settler_owner",
            ledger_schema="runbook", client_bin=cluster.state.bin, jobs=1, maintenance_work_mem="100 MB",
            confirm=dbname, accept_data_loss=False,
        )  # fmt: skip
        return replace(made, **changes)

    return options


@pytest.fixture
def restore(params, restoring):
    return lambda dbname, run_id="b1", **changes: _take_back(params(dbname), restoring(dbname, run_id, **changes))


def _take_back(params, options):
    way = _rollback.choose(params, options)
    result = _rollback.roll_back(params, options, way)
    return {**result, "rows": way.manifest["rows"], "difference": way.difference or {}, "way": _rollback.describe(way)}


@pytest.mark.parametrize(
    ("server_has", "jobs", "expected"), [("64MB", 1, "100MB|off|2"), ("1GB", 1, "1GB|off|2"), ("1GB", 2, "1GB|off|0")]
)
def test_sessions_that_restore_have_memory_for_indexes_and_do_not_wait_for_the_disk(
    restoring, params, server, cluster, server_has, jobs, expected
):
    server.execute(sql.SQL("SET maintenance_work_mem = {}").format(server_has))
    server.execute(sql.SQL("ALTER ROLE settler_migrator SET maintenance_work_mem = {}").format(server_has))
    try:
        settings = _restore._tuned(server, restoring("any", jobs=jobs))
        names = ("maintenance_work_mem", "synchronous_commit", "max_parallel_maintenance_workers")
        show = f"SELECT {', '.join(f'current_setting({name!r})' for name in names)}"
        psql = [Path(cluster.state.bin) / "psql", "-X", "-At", *client_arguments(params("postgres"))]
        with client_environment(params("postgres"), settings) as environment:
            told = subprocess.check_output([*psql, "--dbname=postgres", "-c", show], env=environment, text=True)
    finally:
        server.execute("ALTER ROLE settler_migrator RESET maintenance_work_mem")
    assert told.strip() == expected


def test_memory_that_is_no_size_is_refused_before_anything_is_made(database, back_up, restore, server):
    back_up(database)
    before = databases(server)
    error = refused(restore, database, maintenance_work_mem="much")
    assert 'invalid size: "much"' in error.message
    assert "maintenance_work_mem" in error.message
    assert databases(server) == before


def databases(server):
    return {row[0] for row in server.execute("SELECT datname FROM pg_database")}


def state_of(params, dbname):
    """Return everything of a database that a restore has to bring back."""
    with engine_connect(params(dbname)) as session:
        about = properties(session)
        about["grants"] = sorted(map(json.dumps, about["grants"]))
        session.execute("SET ROLE settler_owner")
        return about, digest(snapshot(session)), row_counts(session)


def fake_program(folder, real, name, text):
    """Make a folder of client programs of which one is a script; $REAL is the real one."""
    folder.mkdir()
    for program in ("pg_dump", "pg_restore"):
        (folder / program).symlink_to(Path(real) / program)
    (folder / name).unlink()
    version = f'[ "$1" = --version ] && exec "{real}/{name}" --version\n'
    (folder / name).write_text(f'#!/bin/sh\n{version}REAL="{real}/{name}"\n{text}\n', encoding="utf-8")
    (folder / name).chmod(0o755)
    return str(folder)


# Backup


def test_manifest_says_what_is_in_the_backup(cluster, database, back_up, params):
    made = back_up(database)
    folder = Path(made["path"])
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert manifest["tables"] == COUNTS
    assert manifest["rows"] == sum(COUNTS.values())
    assert manifest["ledger_head"] == "001"
    assert (manifest["database"], manifest["environment"], manifest["run_id"]) == (database, "test", "b1")
    assert manifest["server_version"].startswith(str(cluster.state.major))
    assert (
        manifest["bytes"]
        == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        - (folder / "manifest.json").stat().st_size
    )
    assert manifest["catalogue_digest"] == state_of(params, database)[1]
    assert digest(json.loads((folder / "catalogue.json").read_text(encoding="utf-8"))) == manifest["catalogue_digest"]
    assert manifest["properties"]["owner"] == "settler_owner"


def test_every_key_of_a_manifest_is_documented(database, back_up):
    manifest = json.loads((Path(back_up(database)["path"]) / "manifest.json").read_text(encoding="utf-8"))
    text = (PROJECT / "docs" / "backup.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([a-z0-9_, ]+) \|", text.partition("## manifest.json")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert {key for row in rows for key in row.split(", ")} - {"key"} == set(manifest)


def test_manifest_has_the_roles_without_their_passwords(database, back_up, roles):
    made = back_up(database)
    assert {role["name"] for role in made["roles"]} >= {"settler_owner", "settler_app", "settler_migrator"}
    text = (Path(made["path"]) / "manifest.json").read_text(encoding="utf-8")
    assert "SCRAM" not in text
    assert roles.migrator_password not in text


def test_folders_and_files_are_for_their_owner_only(database, back_up, tmp_path):
    before = os.umask(0o002)
    try:
        folder = Path(back_up(database)["path"])
    finally:
        os.umask(before)
    for path in [tmp_path / "backups", folder.parent, folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert sorted(path.name for path in folder.iterdir()) == ["catalogue.json", "dump", "keys.json.gz", "manifest.json"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "b1"]


def test_counts_and_catalogue_are_of_the_dumps_own_snapshot(database, back_up, restore, connect, monkeypatch, roles):
    writer = connect(database, role=roles.owner, user=roles.migrator)

    def start_after_a_change(command, environment, **options):
        writer.execute(
            "INSERT INTO tenants (name) VALUES ('late'); CREATE TABLE late (i int); DELETE FROM \"Odd name\""
        )
        return start(command, environment, **options)

    start = _backup.start_program
    monkeypatch.setattr(_backup, "start_program", start_after_a_change)
    made = back_up(database)
    assert made["tables"] == COUNTS
    result = restore(database, accept_data_loss=True)  # compares what pg_dump has written with the manifest
    assert result["difference"] == {"public.Odd name": -2, "public.tenants": 1}
    assert connect(database).execute("SELECT count(*) FROM tenants").fetchone() == (3,)


def test_backup_while_the_application_writes_can_be_restored(database, back_up, restore, connect, roles):
    writer, stop = connect(database, role=roles.owner, user=roles.migrator), []

    def write():
        while not stop:
            writer.execute("INSERT INTO tenants (name) VALUES ('more'); UPDATE tenants SET name = 'x' WHERE name = 'y'")

    writing = Background(write)
    try:
        made = back_up(database)
    finally:
        stop.append(True)
        writing.value()
    assert restore(database, accept_data_loss=True)["rows"] == made["rows"]


def test_same_run_has_its_backup_already(database, back_up, connect, roles):
    first = back_up(database)
    connect(database, role=roles.owner, user=roles.migrator).execute("INSERT INTO tenants (name) VALUES ('later')")
    assert {**back_up(database), "pruned": []} == {**first, "pruned": []}
    assert "the run id b1 has been used before" in refused(back_up, database, fresh=True).message


def test_retention_keeps_the_newest_of_this_environment_and_touches_no_other(database, back_up, tmp_path):
    back_up(database, "old", environment="other")
    back_up(database, "damaged")
    (tmp_path / "backups" / database / "damaged" / "manifest.json").write_text("{", encoding="utf-8")
    pruned = [back_up(database, f"b{number}", keep=2)["pruned"] for number in range(4)]
    home = tmp_path / "backups" / database
    assert pruned == [[], [], [str(home / "b0")], [str(home / "b1")]]
    assert sorted(path.name for path in home.iterdir()) == [".lock", "b2", "b3", "damaged", "old"]


def test_role_that_is_blind_through_forced_row_security_is_refused(database, back_up, connect, roles, tmp_path):
    connect(database, role=roles.owner, user=roles.migrator).execute("ALTER TABLE jobs FORCE ROW LEVEL SECURITY")
    error = refused(back_up, database)
    assert "sees only a part of the rows of jobs" in error.message
    assert error.facts["tables"] == ["jobs"]
    assert refused(back_up, database, how=_backup.rehearse).facts["tables"] == ["jobs"]
    assert [path.name for path in (tmp_path / "backups" / database).iterdir()] == [".lock"]


def test_application_role_cannot_make_a_partial_backup(database, back_up, cluster, roles, tmp_path):
    mine = login(cluster, database, roles.app, roles.app_password)
    assert "partial" in refused(back_up, database, login_as=mine, role=None).message
    assert list_backups(tmp_path / "backups", database) == []


def test_what_a_killed_backup_left_is_removed(database, back_up, tmp_path):
    leftover = tmp_path / "backups" / database / ".dead.partial" / "dump"
    leftover.mkdir(parents=True)
    (leftover / "toc.dat").touch()
    back_up(database)
    assert sorted(path.name for path in leftover.parent.parent.iterdir()) == [".lock", "b1"]


def test_second_backup_at_the_same_time_is_refused(database, back_up, tmp_path):
    home = tmp_path / "backups" / database
    home.mkdir(parents=True)
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another backup is being written" in refused(back_up, database).message
    assert back_up(database)["rows"] == sum(COUNTS.values())


def test_pg_dump_that_fails_leaves_nothing_that_looks_like_a_backup(cluster, database, back_up, tmp_path):
    programs = fake_program(
        tmp_path / "bin", cluster.state.bin, "pg_dump", '"$REAL" "$@"; echo "disk full" >&2; exit 1'
    )
    error = refused(back_up, database, client_bin=programs)
    assert error.message == "pg_dump failed with exit code 1:\n  disk full"
    assert [path.name for path in (tmp_path / "backups" / database).iterdir()] == [".lock"]


def test_table_that_another_session_holds_is_waited_for_no_longer_than_told(
    database, back_up, connect, roles, tmp_path
):
    blocker = connect(database, role=roles.owner, user=roles.migrator)
    blocker.execute("BEGIN; LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
    run = Background(lambda: refused(back_up, database, lock_timeout=0.3))
    try:
        run.join(5)
        in_time = not run.is_alive()
    finally:
        blocker.execute("ROLLBACK")
    run.value()
    assert in_time, "waits as long as the lock is held"
    assert [path.name for path in (tmp_path / "backups" / database).iterdir()] == [".lock"]


def test_too_little_space_is_said_before_the_dump(database, back_up, monkeypatch):
    monkeypatch.setattr(_backup.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1))
    assert "0 MB free" in refused(back_up, database).message


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_compressions_can_be_read_back(database, back_up, restore, compression):
    back_up(database, compression=compression)
    assert restore(database)["rows"] == sum(COUNTS.values())


def test_password_with_every_special_sign_reaches_the_programs(cluster, database, back_up, server):
    password = "a:b\\c'd\"e *#ü$"
    server.execute(sql.SQL("CREATE ROLE special LOGIN PASSWORD {} IN ROLE settler_owner").format(sql.Literal(password)))
    try:
        server.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO special").format(sql.Identifier(database)))
        assert back_up(database, login_as=login(cluster, database, "special", password))["tables"] == COUNTS
    finally:
        server.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM special").format(sql.Identifier(database)))
        server.execute("DROP ROLE special")


# Restore


def test_restore_brings_back_everything_and_keeps_the_failed_database(
    database, back_up, restore, connect, params, server, roles
):
    name = sql.Identifier(database)
    for command in (
        "ALTER DATABASE {} CONNECTION LIMIT 17",
        "COMMENT ON DATABASE {} IS 'Settler''s «own»'",
        'ALTER DATABASE {} SET search_path = "$user", public, "Odd, schema"',
        "ALTER DATABASE {} SET application_name = 'it''s; set'",
        "ALTER DATABASE {} SET work_mem = '5MB'",
        "ALTER ROLE settler_app IN DATABASE {} SET statement_timeout = '7s'",
        "GRANT TEMPORARY ON DATABASE {} TO settler_app WITH GRANT OPTION",
    ):
        server.execute(sql.SQL(command).format(name))
    before = state_of(params, database)
    back_up(database, jobs=2)
    with connect(database, role=roles.owner, user=roles.migrator) as session:
        session.execute("DROP TABLE jobs CASCADE; CREATE TABLE stray (i int); ALTER TABLE tenants ADD COLUMN more int")
    result = restore(database, accept_data_loss=True, jobs=2)
    about, catalogue, counts = state_of(params, database)
    counts["runbook.events"] -= 1  # the event of the restore itself
    assert about == before[0]
    assert catalogue == before[1]
    assert counts == before[2]
    assert result["difference"]["public.jobs"] == -120
    assert result["failed_database"] == f"{database}_failed_x1"
    failed = connect(f"{database}_failed_x1")
    assert failed.execute("SELECT to_regclass('stray')::text, to_regclass('jobs')").fetchone() == ("stray", None)
    with connect(database) as session:
        last = "SELECT event, run_id, detail ->> 'failed_database' FROM runbook.events ORDER BY id DESC LIMIT 1"
        assert session.execute(last).fetchone() == ("rolled_back", "x1", f"{database}_failed_x1")
        assert session.execute("SELECT count(*) FROM pg_stats WHERE tablename = 'jobs'").fetchone() != (0,)
        assert session.execute(
            "INSERT INTO jobs (tenant_id) SELECT id FROM tenants LIMIT 1 RETURNING id"
        ).fetchone() == (121,)
    app = connect(database, user=roles.app)
    assert app.execute("SHOW statement_timeout").fetchone() == ("7s",)


def test_settings_that_only_a_superuser_may_give_come_back_with_one(
    cluster, database, back_up, restoring, server, params
):
    name = sql.Identifier(database)
    for command in (
        "ALTER DATABASE {} SET app.default_tier = 'free'",
        "ALTER DATABASE {} SET log_min_duration_statement = 5000",
        "ALTER ROLE settler_app IN DATABASE {} SET app.tier = 'x'",
        "ALTER ROLE settler_app IN DATABASE {} SET lock_timeout = '3s'",
    ):
        server.execute(sql.SQL(command).format(name))
    before = state_of(params, database)[0]
    back_up(database)
    _take_back(login(cluster, database), restoring(database))
    assert state_of(params, database)[0] == before


def test_setting_that_the_migrator_may_not_give_is_not_lost_in_silence(database, back_up, restore, server, params):
    server.execute(sql.SQL("ALTER DATABASE {} SET app.default_tier = 'free'").format(sql.Identifier(database)))
    back_up(database)
    before = state_of(params, database)
    try:
        told = str(restore(database))
    except RunbookError as error:
        told = error.message
        assert state_of(params, database) == before
        assert f"{database}_restore_x1" not in databases(server)
    assert "app.default_tier" in told
    assert "free" not in told


def test_value_that_a_server_does_not_take_is_not_told(database, back_up, restoring, server, cluster, params):
    made = back_up(database)
    about = {**made["properties"], "settings": [{"role": None, "settings": ["work_mem=a-secret"]}]}
    manifest = {key: value for key, value in made.items() if key not in ("path", "pruned")} | {"properties": about}
    (Path(made["path"]) / "manifest.json").write_text(seal(manifest), encoding="utf-8")
    before = state_of(params, database)
    error = refused(_take_back, login(cluster, database), restoring(database))
    assert "the setting work_mem, whose value this server does not take (22023)" in error.message
    assert "a-secret" not in error.message + error.hint
    assert error.__cause__ is None
    assert state_of(params, database) == before
    assert f"{database}_restore_x1" not in databases(server)


def test_database_with_default_rights_has_them_again(database, back_up, restore, server, params):
    server.execute(sql.SQL("GRANT CONNECT, TEMPORARY ON DATABASE {} TO PUBLIC").format(sql.Identifier(database)))
    server.execute(
        sql.SQL("REVOKE ALL ON DATABASE {} FROM settler_app, settler_migrator").format(sql.Identifier(database))
    )
    server.execute("UPDATE pg_database SET datacl = NULL WHERE datname = %s", [database])
    assert state_of(params, database)[0]["default_grants"]
    back_up(database)
    restore(database)
    rights = (
        "SELECT has_database_privilege('settler_app', %s, right_) FROM unnest(ARRAY['CONNECT', 'TEMPORARY']) right_"
    )
    assert server.execute(rights, [database]).fetchall() == [(True,), (True,)]


def test_restore_without_a_confirmation_is_refused_and_tells_the_difference(
    database, back_up, restore, connect, roles, server
):
    back_up(database)
    connect(database, role=roles.owner, user=roles.migrator).execute("INSERT INTO tenants (name) VALUES ('late')")
    before = databases(server)
    for confirm in ("", "other", database.upper()):
        error = refused(restore, database, confirm=confirm, accept_data_loss=True)
        assert "public.tenants: +1 rows since the backup" in error.message
        assert f"rollback_confirm={database}" in error.hint
    assert databases(server) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("INSERT INTO tenants (name) VALUES ('late')", "public.tenants: +1 rows"),
        ('DELETE FROM "Odd name" WHERE a = 1', "public.Odd name: -1 rows"),
        ("CREATE TABLE late AS SELECT 1", "public.late: +1 rows"),
    ],
)
def test_restore_that_would_lose_rows_is_refused(database, back_up, restore, connect, roles, server, change, told):
    back_up(database)
    connect(database, role=roles.owner, user=roles.migrator).execute(change)
    before = databases(server)
    error = refused(restore, database)
    assert told in error.message
    assert "rollback_accept_data_loss" in error.hint
    assert databases(server) == before


def test_backup_of_another_database_or_environment_is_refused(
    database, back_up, restoring, params, new_database, server
):
    back_up(database)
    other, before = new_database(), databases(server)
    wrong = replace(restoring(database), confirm=other)
    assert f"a backup of database {database}, not of {other}" in refused(_take_back, params(other), wrong).message
    wrong = restoring(database, environment="staging")
    assert "environment test, not of staging" in refused(_take_back, params(database), wrong).message
    for named in ("", "b1"):  # production's data is never replaced by another environment's
        for environment in ("prod", "eu-prod", "Customer_Production"):
            wrong = restoring(database, environment=environment, allow_foreign=named)
            error = refused(_take_back, params(database), wrong)
            assert f"no other environment's data ever replaces that of {environment}" in error.message
            assert error.hint == ""
    wrong = restoring(database, environment="blue", allow_foreign="b1", production="^blue$")
    assert "ever replaces that of blue" in refused(_take_back, params(database), wrong).message
    wrong = replace(wrong, production="(")
    assert "( is no regular expression" in refused(_take_back, params(database), wrong).message
    assert databases(server) | {other} == before | {other}


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "one flipped bit": flipped,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "one file too many": lambda path: path.with_name(f"{path.name}.extra").write_bytes(b"x"),
}


def test_any_damage_of_any_file_is_refused_before_anything_is_touched(
    database, back_up, restoring, params, tmp_path, server, monkeypatch
):
    whole = Path(back_up(database)["path"])
    monkeypatch.setattr(_rollback, "connect", lambda *_a, **_k: pytest.fail("connected"))
    monkeypatch.setattr(_rollback, "connect_if_exists", lambda *_a, **_k: pytest.fail("connected"))
    kinds = [
        "manifest.json",
        "catalogue.json",
        "dump/toc.dat",
        next(f"dump/{path.name}" for path in (whole / "dump").glob("*.dat.gz")),
    ]
    before = databases(server)
    for kind in kinds:
        for damage, do in DAMAGES.items():
            damaged = tmp_path / "damaged"
            shutil.copytree(whole, damaged)
            do(damaged / kind)
            if (kind, damage) == ("manifest.json", "truncated"):
                (damaged / kind).write_text((whole / kind).read_text(encoding="utf-8").rstrip()[:-1], encoding="utf-8")
            error = refused(_take_back, params(database), restoring(database, source=damaged))
            named = f"{kind}.extra" if damage == "one file too many" else Path(kind).name
            assert named in error.message, (kind, damage, error.message)
            shutil.rmtree(damaged)
    assert databases(server) == before


def test_restore_of_a_database_that_is_gone_needs_no_confirmation(database, back_up, restore, server, params):
    back_up(database)
    before = state_of(params, database)[1]
    server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database)))
    result = restore(database, confirm="")
    assert result["failed_database"] == ""
    assert state_of(params, database)[1] == before


def test_half_restore_is_dropped_by_the_next_and_nothing_else(database, back_up, restore, server, new_database):
    back_up(database)
    ours, others, unmarked = (new_database() for _ in range(3))
    for name, comment in ((ours, f"settler.runbook: being restored for {database}, run r"),
                          (others, f"settler.runbook: being restored for {database}2, run r"),
                          (unmarked, f"not settler.runbook: being restored for {database}, run r")):  # fmt: skip
        server.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(sql.Identifier(name), sql.Literal(comment)))
    restore(database)
    assert databases(server) & {ours, others, unmarked} == {others, unmarked}


def test_restore_that_is_killed_leaves_the_database_and_the_next_one_cleans_up(
    cluster, database, back_up, restore, server, params, tmp_path
):
    made = back_up(database)
    before = state_of(params, database)
    programs = fake_program(
        tmp_path / "bin", cluster.state.bin, "pg_restore", f'echo $$ > "{tmp_path}/pid"; exec sleep 60'
    )
    arguments = {
        **params(database), "src": made["path"], "run_id": "dies", "environment": "test", "confirm": database,
        "set_role": "settler_owner", "client_bin": programs,
    }  # fmt: skip
    runner = start_module("restore", arguments)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text(encoding="utf-8").strip())
    runner.kill()
    runner.wait()
    os.kill(int(pid.read_text(encoding="utf-8")), signal.SIGKILL)
    assert f"{database}_restore_dies" in databases(server)
    assert state_of(params, database) == before
    restore(database)
    assert f"{database}_restore_dies" not in databases(server)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('echo "broken" >&2; exit 1', "pg_restore failed with exit code 1"),
        ('exec "$REAL" --schema-only "$@"', "public.jobs: 0 rows, the manifest says 120"),
        ('exec "$REAL" --section=pre-data --section=data "$@"', "not the catalogue of its backup"),
    ],
)  # fmt: skip
def test_restore_that_does_not_match_its_manifest_never_takes_the_place(
    cluster, database, back_up, restore, params, server, tmp_path, text, told
):
    back_up(database)
    before = state_of(params, database)
    programs = fake_program(tmp_path / "bin", cluster.state.bin, "pg_restore", text)
    assert told in refused(restore, database, client_bin=programs).message
    assert f"{database}_restore_x1" not in databases(server)
    assert state_of(params, database) == before
    assert restore(database)["rows"] == sum(COUNTS.values())


def test_sessions_of_the_application_are_ended_for_the_swap(database, back_up, restore, connect, roles):
    back_up(database)
    app = connect(database, user=roles.app)
    restore(database)
    with pytest.raises(psycopg.OperationalError):
        app.execute("SELECT 1")


def test_session_that_may_not_be_ended_stops_the_swap_and_the_database_lets_in_again(
    database, back_up, restore, connect, server, roles
):
    back_up(database)
    stranger = connect(database)
    pid = stranger.info.backend_pid
    error = refused(restore, database)
    assert f"pid {pid}" in error.message
    assert "pg_terminate_backend" in error.hint
    assert connect(database, user=roles.app).execute("SELECT 1").fetchone() == (1,)
    assert f"{database}_failed_x1" not in databases(server)
    stranger.close()
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [pid]).fetchall())
    assert restore(database)["failed_database"] == f"{database}_failed_x1"


@pytest.mark.parametrize("name", ["we\"ird na'me", "-Ünï 漢字 {} %s ", "a=b"])
def test_databases_may_have_any_name(database, back_up, restore, params, server, name):
    server.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(database), sql.Identifier(name)))
    made = back_up(name)
    before = state_of(params, name)[1]
    assert restore(name)["failed_database"] == f"{name}_failed_x1"
    assert state_of(params, name)[1] == before
    assert made["database"] == name


def test_check_touches_nothing(database, back_up, restoring, params, server):
    back_up(database)
    before = databases(server), state_of(params, database)
    way = _rollback.choose(params(database), restoring(database))
    _rollback.weigh(params(database), restoring(database), way)
    assert way.difference == {}
    assert (databases(server), state_of(params, database)) == before
