"""The way back on a real server: a snapshot is swapped in, a backup restored; faults leave what was there."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import random
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils import (
    _lost,
    _manifest,
    _restore,
    _rollback,
    _snapshot,
    _swap,
)
from psycopg import sql

from tests.support import (
    MODULES,
    as_migrator,
    call_module,
    defaults_of,
    login,
    migration,
    run_module,
    run_on_small_disk,
    start_module,
    wait_until,
)

SCHEMA = """
SET ROLE settler_owner;
CREATE TABLE tenants (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE jobs (id int PRIMARY KEY, tenant_id int REFERENCES tenants, note text);
CREATE TABLE "Odd/näme" (a int, b text);
INSERT INTO tenants SELECT n, 'tenant ' || n FROM generate_series(1, 5) n;
INSERT INTO jobs SELECT n, n % 5 + 1, 'note ' || n FROM generate_series(1, 300) n;
INSERT INTO "Odd/näme" VALUES (1, 'one'), (1, 'one'), (2, 'two');
"""
CHANCE = random.SystemRandom()
pytestmark = pytest.mark.usefixtures("tidy_server")


@pytest.fixture
def database(new_database, connect):
    name = new_database()
    with connect(name) as session:
        session.execute(SCHEMA)
    return name


@pytest.fixture
def call(cluster, roles, tmp_path):
    """Call a module as the roles do; what a test says wins."""
    usual = {"run_id": "r1", "environment": "test", "set_role": roles.owner, "ledger_schema": "runbook"}
    own = {
        "backup": {
            "directory": str(tmp_path / "backups"), "client_bin": cluster.state.bin, "jobs": 1, "compression": "auto",
            "lock_timeout": 10, "keep": 0, "keep_days": 0.0,
        },
        "restore": {
            "run_id": "x1", "directory": str(tmp_path / "backups"), "src": None, "method": "auto", "only_run": "",
            "changes": [], "allow_foreign": "", "confirm": "", "accept_data_loss": False,
            "lost_directory": str(tmp_path / "kept" / "lost"),
            "client_bin": cluster.state.bin, "jobs": 1, "progress_file": None,
        },
        "snapshot": {"state": "present", "keep_hours": 24.0, "max_bytes": 2**31},
        "snapshot_info": {},
        "drill": {
            "state": "present", "directory": str(tmp_path / "backups"), "src": None, "facts": {},
            "client_bin": cluster.state.bin, "jobs": 1,
        },
    }  # fmt: skip

    def run(module, dbname, how=call_module, check=False, **changes):
        arguments = as_migrator(cluster, roles, dbname) | usual | own[module] | changes
        if how is not call_module:
            known = {*defaults_of(module), *login(cluster, dbname)}
            arguments = {key: value for key, value in arguments.items() if value is not None and key in known}
        return how(module, arguments, check=check)

    return run


def named(server, prefix):
    found = server.execute("SELECT datname FROM pg_database WHERE starts_with(datname, %s) ORDER BY 1", [prefix])
    return [row[0] for row in found]


def content(connect, dbname):
    """Return all rows of the tables, by which a test knows a database again."""
    with connect(dbname) as session:
        session.execute("SET search_path = public")
        return {
            name: session.execute(
                sql.SQL("SELECT t::text FROM {} t ORDER BY 1").format(sql.Identifier(name))
            ).fetchall()
            for (name,) in session.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
            ).fetchall()
        }


def change(connect, dbname):
    with connect(dbname) as session:
        session.execute(
            "INSERT INTO tenants VALUES (6, 'six'); UPDATE jobs SET note = 'changed, \"so\"' WHERE id = 7; "
            "DELETE FROM jobs WHERE id = 8; INSERT INTO \"Odd/näme\" VALUES (1, 'one'), (3, NULL)"
        )


@pytest.mark.parametrize("action", ["snapshot", "restore"])
def test_prepared_transaction_is_named_and_everything_stays_as_it_was(call, database, connect, server, action):
    call("backup", database)
    with connect(database) as session:
        session.execute("BEGIN; INSERT INTO jobs SELECT * FROM jobs WHERE false; PREPARE TRANSACTION 'held'")
    try:
        arguments = {} if action == "snapshot" else {"confirm": database, "accept_data_loss": True}
        told = call(action, database, **arguments)
        assert f"prepared transactions hold {database}: held (postgres, " in told["msg"]
        assert "ROLLBACK PREPARED" in told["hint"]
        assert named(server, database) == [database]
        assert connect(database).execute("SELECT count(*) >= 0 FROM jobs").fetchone() == (True,)
    finally:
        connect(database).execute("ROLLBACK PREPARED 'held'")


# The snapshot


@pytest.mark.every_major
def test_snapshot_is_swapped_in_with_all_that_belongs_to_the_database(call, database, connect, server, cluster):
    for command in (
        "COMMENT ON DATABASE {} IS 'Settler''s; own'",
        "ALTER DATABASE {} SET work_mem = '5MB'",
        "ALTER DATABASE {} CONNECTION LIMIT 17",
        "GRANT TEMPORARY ON DATABASE {} TO settler_app WITH GRANT OPTION",
    ):
        server.execute(sql.SQL(command).format(sql.Identifier(database)))
    about = """SELECT pg_get_userbyid(datdba), datconnlimit, shobj_description(oid, 'pg_database'), datallowconn,
        (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(datacl) a),
        (SELECT setconfig FROM pg_db_role_setting WHERE setdatabase = d.oid)
        FROM pg_database d WHERE datname = %s"""
    before = server.execute(about, [database]).fetchone(), content(connect, database)
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())

    taken = call("snapshot", database)
    assert (taken["changed"], taken["name"]) == (True, f"{database}_snapshot_r1")
    assert taken["strategy"] in (("file_copy", "clone") if cluster.state.major >= 18 else ("file_copy",))
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        connect(taken["name"])
    assert not call("snapshot", database)["changed"]
    assert f"there is a snapshot, {taken['name']}" in call("snapshot", database, fresh=True)["msg"]

    change(connect, database)
    result = call("restore", database, confirm=database, accept_data_loss=True)
    assert (result["method"], result["failed_database"]) == ("snapshot", f"{database}_failed_x1")
    assert (server.execute(about, [database]).fetchone(), content(connect, database)) == before
    assert named(server, f"{database}_") == [f"{database}_failed_x1"]
    assert ("6,six",) not in content(connect, database)["tenants"]


def test_snapshot_is_refused_while_somebody_is_connected_or_it_would_be_too_large(call, database, connect, server):
    session = connect(database)
    told = call("snapshot", database)
    assert f"pid {session.info.backend_pid}" in told["msg"]
    session.close()
    assert "allowed are 1 MB" in call("snapshot", database, max_bytes=2**20)["msg"]
    assert named(server, f"{database}_") == []


def test_space_on_the_servers_own_disk_is_looked_at_where_it_can_be_seen(call, cluster, database, monkeypatch):
    seen = call("snapshot", database, check=True)
    assert "disk not seen" in seen["space"]
    as_superuser = login(cluster, database)
    assert "MB free on the server" in call("snapshot", database, check=True, **as_superuser)["space"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2, 1, 1))
    assert "0 MB free" in call("snapshot", database, check=True, **as_superuser)["msg"]


def test_only_our_own_snapshots_are_dropped_and_only_after_their_time(call, database, server, new_database):
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot", database, run_id="young")
    call("snapshot", database, run_id="old", keep_hours=0.0)
    others = [f"{database}_snapshot_theirs", f"{database}_snapshot_text"]
    for name in others:
        server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    mark = sql.Literal(f"settler.runbook: snapshot of {database}, run x; no JSON")
    server.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(sql.Identifier(others[1]), mark))

    assert call("snapshot", database, state="absent", check=True)["dropped"] == [f"{database}_snapshot_old"]
    assert call("snapshot", database, run_id="new")["dropped"] == [f"{database}_snapshot_old"]
    kept = sorted([*others, f"{database}_snapshot_young", f"{database}_snapshot_new"])
    assert named(server, f"{database}_") == kept
    assert not call("snapshot", database, state="absent")["changed"]
    assert named(server, f"{database}_") == kept


@pytest.mark.parametrize("state", ["present", "absent"])
def test_copy_that_could_not_be_marked_any_more_is_dropped_by_the_next_run(call, database, server, state, new_database):
    """Killed between CREATE DATABASE and COMMENT."""
    template = sql.Identifier(new_database())
    half, theirs = f"{database}_snapshot_dead", f"{database}_snapshot_theirs"
    for name, options in ((half, "ALLOW_CONNECTIONS false CONNECTION LIMIT 0"), (theirs, "ALLOW_CONNECTIONS false")):
        make = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER settler_owner " + options)
        server.execute(make.format(sql.Identifier(name), template))
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    assert call("snapshot", database, state=state, check=True)["dropped"] == [half]
    assert call("snapshot", database, state=state)["dropped"] == [half]
    assert named(server, f"{database}_") == [*([f"{database}_snapshot_r1"] if state == "present" else []), theirs]


def test_half_made_database_of_a_long_name_is_dropped_though_the_name_was_cut(call, server, connect, new_database):
    database = new_database()
    long = database + "ä" * 20
    server.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(database), sql.Identifier(long)))
    with connect(long) as session:
        session.execute(SCHEMA)
    half = _swap.names_for(long, "20261123t031500-4f2a").restored
    assert not half.startswith(long)
    server.execute(sql.SQL("CREATE DATABASE {} OWNER settler_owner CONNECTION LIMIT 0").format(sql.Identifier(half)))
    call("backup", long)
    assert call("restore", long, confirm=long)["failed_database"]
    assert half not in named(server, database)


def test_snapshot_that_is_killed_before_its_mark_is_known_by_how_it_came_into_being(
    call, database, server, monkeypatch
):
    """What a kill leaves at that point: set_mark is never reached."""
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    monkeypatch.setattr(_snapshot, "set_mark", lambda *_arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call("snapshot", database, run_id="dead")
    monkeypatch.undo()
    assert named(server, f"{database}_") == [f"{database}_snapshot_dead"]
    assert call("snapshot", database)["dropped"] == [f"{database}_snapshot_dead"]
    assert named(server, f"{database}_") == [f"{database}_snapshot_r1"]


def test_snapshots_are_listed_with_age_and_size(call, database, server):
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot", database, keep_hours=3.0)
    call("snapshot", database, run_id="r2", keep_hours=0.0)
    listed = call("snapshot_info", database)["snapshots"]
    assert {one["name"]: (one["keep_hours"], one["expired"]) for one in listed} == {
        f"{database}_snapshot_r1": (3.0, False), f"{database}_snapshot_r2": (0.0, True),
    }  # fmt: skip
    for one in listed:
        assert 0 <= one["age_hours"] < 0.1
        assert one["bytes"] > 5_000_000


def test_snapshot_lets_nobody_in_while_it_is_compared(call, database, server, monkeypatch):
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    name = call("snapshot", database)["name"]
    open_meanwhile = []

    def look(*arguments, **options):
        query = "SELECT datallowconn FROM pg_database WHERE datname = %s"
        open_meanwhile.append(server.execute(query, [name]).fetchone()[0])
        return compared(*arguments, **options)

    compared = _rollback.lost_rows
    monkeypatch.setattr(_rollback, "lost_rows", look)
    assert "rollback_confirm" in call("restore", database)["hint"]
    assert open_meanwhile == [False]


def test_settings_in_a_snapshots_mark_are_not_kept_of_a_failed_run(call, database, server, cluster, roles, tmp_path):
    server.execute(sql.SQL("ALTER DATABASE {} SET app.signing = 'v-hidden'").format(sql.Identifier(database)))
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot", database)
    folder = tmp_path / "kept"
    of_run = {"directory": str(folder), "run_id": "r1", "since": "2026-01-01T00:00:00+00:00"}
    call_module("diagnostics", as_migrator(cluster, roles, database) | of_run)
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert f'"settler.runbook: snapshot of {database}, run r1"' in texts["sizes.json"]
    assert [name for name, text in texts.items() if "v-hidden" in text] == []


# Drills


def test_two_drills_of_a_database_leave_each_others_scratch_database(call, database, server):
    call("backup", database)
    nightly = call("drill", database, run_id="nightly")["database"]
    change = call("drill", database, run_id="change")["database"]
    assert named(server, f"{database}_drill") == [change, nightly]
    call("drill", database, run_id="nightly", state="absent")
    assert named(server, f"{database}_drill") == [change]
    call("drill", database, run_id="change", state="absent")
    assert named(server, f"{database}_drill") == []


def test_drill_that_restores_meanwhile_keeps_its_scratch_database(call, database, server, monkeypatch):
    """The one comes while the other has made its database, marked or not yet, and is connected to none."""
    call("backup", database)
    seen = []

    def in_between(*arguments, **options):
        if not seen:
            seen.append("again")
            assert "restores" in call("drill", database, run_id="nightly")["msg"]
            change = call("drill", database, run_id="change")["database"]
            seen.append(change)
        return done(*arguments, **options)

    done = _restore._load
    monkeypatch.setattr(_restore, "_load", in_between)
    nightly = call("drill", database, run_id="nightly")["database"]
    assert named(server, f"{database}_drill") == sorted([seen[1], nightly])


def test_what_killed_drills_left_is_dropped_by_the_next(call, database, server, new_database):
    call("backup", database)
    mark = f"settler.runbook: restore drill of {database}, run "
    comments = {
        "half": f"{mark}half", "old": f"{mark}old; restored 2026-01-01T00:00:00+00:00", "theirs": "ours", "bare": None,
        "young": f"{mark}young; restored 2999-01-01T00:00:00+00:00",
    }  # fmt: skip
    for run, comment in comments.items():
        name = sql.Identifier(f"{database}_drill_{run}")
        limit = "CONNECTION LIMIT 0" if comment is None else ""
        server.execute(sql.SQL("CREATE DATABASE {} OWNER settler_owner " + limit).format(name))
        server.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(name, sql.Literal(comment)))
    call("drill", database, run_id="now", state="absent")
    assert named(server, f"{database}_drill") == [f"{database}_drill_theirs", f"{database}_drill_young"]


def test_drill_takes_the_newest_backup_that_it_can_restore(call, database):
    made = Path(call("backup", database)["path"])
    manifest = _manifest.read_manifest(made)
    other = made.parent / "r2"
    other.mkdir(mode=0o700)
    later = {
        **manifest,
        "files": {},
        "method": "pgbackrest",
        "run_id": "r2",
        "finished_at": "2999-01-01T00:00:00+00:00",
    }
    (other / "manifest.json").write_text(_manifest.seal(later), encoding="utf-8")
    assert call("drill", database, check=True)["path"] == str(made)
    shutil.rmtree(made)
    assert "no whole backup by pg_dump" in call("drill", database, check=True)["msg"]


# What would be lost


@pytest.mark.parametrize("way", ["snapshot", "dump"])
def test_lost_rows_are_told_and_written_into_files_first(call, database, connect, server, tmp_path, way):
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot" if way == "snapshot" else "backup", database)
    before = content(connect, database)
    change(connect, database)
    with connect(database) as session:
        session.execute(
            "SET ROLE settler_owner; CREATE TABLE late AS SELECT 1 AS one; ALTER TABLE tenants ADD more int"
        )
    after = content(connect, database)

    told = call("restore", database)
    assert f"rollback_confirm={database}" in told["hint"]
    assert "public.tenants" in told["msg"]
    told = call("restore", database, confirm=database)
    assert "rollback_accept_data_loss=true" in told["hint"]
    assert call("restore", database, check=True)["difference"] == told["difference"]
    assert content(connect, database) == after
    assert named(server, f"{database}_failed") == []

    result = call("restore", database, confirm=database, accept_data_loss=True)
    assert result["method"] == way
    assert content(connect, database) == before
    lost = {one["table"]: one for one in result["lost"]}
    assert {table: one["rows"] for table, one in lost.items()} == {
        "public.Odd/näme": 2, "public.jobs": 1, "public.late": 1, "public.tenants": 1,
    }  # fmt: skip
    assert [table for table, one in lost.items() if not one["keyed"]] == ["public.Odd/näme", "public.late"]
    rows = {}
    for table, one in lost.items():
        path = Path(one["file"])
        assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
        with path.open(encoding="utf-8", newline="") as file:
            rows[table] = sorted(csv.DictReader(file), key=lambda row: next(iter(row.values())))
    assert rows["public.jobs"] == [{"id": "7", "tenant_id": "3", "note": 'changed, "so"'}]
    assert rows["public.tenants"] == [{"id": "6", "name": "six", "more": ""}]
    assert rows["public.Odd/näme"] == [{"a": "1", "b": "one"}, {"a": "3", "b": ""}]
    assert content(connect, f"{database}_failed_x1") == after


@pytest.mark.parametrize("others", [None, _lost.Others("3", frozenset(), ())], ids=["all", "of others"])
def test_lost_rows_are_found_by_a_join_and_not_one_by_one(database, connect, others):
    session = connect(database)
    own = {"note": _lost._Column("text", False, None)}
    _lost._note(session, None, "public", "jobs", ["id"])
    query = _lost._missing("public", "jobs", ["id"], {} if others else own, others)
    plan = "\n".join(row[0] for row in session.execute(sql.SQL("EXPLAIN {}").format(query)))
    assert " Join" in plan
    assert "SubPlan" not in plan


def test_lost_rows_of_tables_whose_names_read_alike_are_in_files_of_their_own(call, database, connect, tmp_path):
    with connect(database) as session:
        session.execute(
            'CREATE SCHEMA "a.b" AUTHORIZATION settler_owner; CREATE SCHEMA a AUTHORIZATION settler_owner; '
            "SET ROLE settler_owner; "
            'CREATE TABLE "a.b".c (v text); CREATE TABLE a."b.c" (v text); INSERT INTO a."b.c" VALUES (\'was\')'
        )
    call("backup", database)
    with connect(database) as session:
        session.execute("INSERT INTO \"a.b\".c VALUES ('one'); UPDATE a.\"b.c\" SET v = 'two'; DELETE FROM jobs")
    kept = tmp_path / "kept" / "lost" / "a%2Eb.c.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("of an earlier rollback", encoding="utf-8")
    result = call("restore", database, confirm=database, accept_data_loss=True)
    files = {Path(one["file"]).name: Path(one["file"]).read_text(encoding="utf-8") for one in result["lost"]}
    assert files == {"a%2Eb.c.2.csv": "v\none\n", "a.b%2Ec.csv": "v\ntwo\n"}
    assert kept.read_text(encoding="utf-8") == "of an earlier rollback"


def test_rows_that_cannot_be_kept_stop_the_rollback_and_leave_nothing(call, database, connect, server, tmp_path):
    call("backup", database)
    with connect(database) as session:
        session.execute("INSERT INTO jobs SELECT n, 1, repeat('x', 100) FROM generate_series(1000, 40000) n")
    after = content(connect, database)
    small = tmp_path / "small"
    small.mkdir()

    def on_a_small_disk(name, arguments, check):
        script = f'"{sys.executable}" "{MODULES}/{name}.py"; find "{small}" -type f >&2'
        told, errors = run_on_small_disk(small, "1m", script, arguments)
        assert errors == ""
        return told

    (tmp_path / "kept").write_text("no folder", encoding="utf-8")
    options = {"confirm": database, "accept_data_loss": True}
    for told, why in (
        (
            call("restore", database, **options, how=on_a_small_disk, lost_directory=str(small / "lost")),
            "No space left",
        ),
        (call("restore", database, **options), "File exists"),
    ):
        assert "rows that would be lost cannot be written into" in told["msg"]
        assert why in told["msg"]
        assert "runbook_diagnostics_directory" in told["hint"]
        assert named(server, f"{database}_") == []
    assert content(connect, database) == after


@pytest.mark.parametrize("way", ["dump", "snapshot"])
def test_of_partitions_only_those_with_a_lost_row_are_told(call, database, connect, server, way):
    with connect(database) as session:
        session.execute(
            "SET ROLE settler_owner; CREATE TABLE months (id int, at date, v text) PARTITION BY RANGE (at); "
            "CREATE TABLE months_1 PARTITION OF months FOR VALUES FROM ('2026-01-01') TO ('2026-02-01'); "
            "CREATE TABLE months_2 PARTITION OF months FOR VALUES FROM ('2026-02-01') TO ('2026-03-01'); "
            "CREATE TABLE still (LIKE months) PARTITION BY RANGE (at); "
            "CREATE TABLE still_1 PARTITION OF still DEFAULT; "
            "INSERT INTO months SELECT n, date '2026-01-20' + n, 'v' FROM generate_series(0, 19) n; "
            "INSERT INTO still SELECT * FROM months"
        )
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot" if way == "snapshot" else "backup", database)
    with connect(database) as session:
        session.execute("INSERT INTO months VALUES (3, '2026-01-23', 'v'), (4, '2026-01-24', 'w')")
    result = call("restore", database, confirm=database, accept_data_loss=True)
    assert [(one["table"], one["rows"], one["keyed"]) for one in result["lost"]] == [("public.months_1", 2, False)]


def test_value_that_was_changed_since_is_seen_though_no_count_differs(call, database, connect):
    call("backup", database)
    with connect(database) as session:
        session.execute("UPDATE jobs SET note = 'other' WHERE id = 1")
    told = call("restore", database, confirm=database)
    assert told["changed_tables"] == ["public.jobs"]
    assert "public.jobs: as many rows as in the backup, with other values" in told["msg"]


@pytest.mark.parametrize("way", ["dump", "snapshot"])
def test_value_in_a_column_that_the_backup_has_not_is_lost(call, database, connect, server, way):
    """The most usual rollback by hand: a release has added a column, and the application has filled it."""
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot" if way == "snapshot" else "backup", database)
    with connect(database) as session:
        session.execute(
            "SET ROLE settler_owner; ALTER TABLE tenants ADD more text, ADD fixed int NOT NULL DEFAULT 7, "
            "ADD word varchar(9) DEFAULT 'it''s'::varchar(9), ADD twice int GENERATED ALWAYS AS (id * 2) STORED, "
            "ADD price numeric(10,2) DEFAULT 0; "
            "ALTER TABLE jobs ADD done boolean DEFAULT false; "
            'ALTER TABLE "Odd/näme" ADD c int; UPDATE tenants SET more = NULL'
        )
    told = call("restore", database, check=True)
    assert "msg" not in told, told
    assert (told["difference"], told["changed_tables"]) == ({}, [])

    with connect(database) as session:
        session.execute(
            "UPDATE tenants SET more = 'filled' WHERE id IN (2, 3); UPDATE tenants SET fixed = 8 WHERE id = 4"
        )
        session.execute("UPDATE jobs SET done = true WHERE id = 5")
    told = call("restore", database, confirm=database)
    assert "rollback_accept_data_loss=true" in told["hint"]
    assert "public.tenants" in told["msg"]
    assert "public.jobs" in told["msg"]
    result = call("restore", database, confirm=database, accept_data_loss=True)
    assert "msg" not in result, result
    assert {one["table"]: one["rows"] for one in result["lost"]} == {"public.jobs": 1, "public.tenants": 3}
    (file,) = [Path(one["file"]) for one in result["lost"] if one["table"] == "public.tenants"]
    rows = list(csv.DictReader(file.open(encoding="utf-8", newline="")))
    assert sorted((row["id"], row["more"], row["fixed"]) for row in rows) == [
        ("2", "filled", "7"), ("3", "filled", "7"), ("4", "", "8"),
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["dump", "snapshot"])
def test_value_in_a_column_that_has_another_type_now_is_compared(call, database, connect, server, way):
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot" if way == "snapshot" else "backup", database)
    with connect(database) as session:
        session.execute("SET ROLE settler_owner; ALTER TABLE tenants ALTER name TYPE varchar(90)")
        session.execute("ALTER TABLE jobs ALTER tenant_id TYPE bigint")
        session.execute("UPDATE tenants SET name = 'other' WHERE id = 2; UPDATE jobs SET tenant_id = 3 WHERE id = 1")
    result = call("restore", database, confirm=database, accept_data_loss=True)
    assert {one["table"]: one["rows"] for one in result["lost"]} == {"public.jobs": 1, "public.tenants": 1}


@pytest.mark.parametrize("way", ["dump", "snapshot"])
def test_rows_that_others_write_in_the_window_of_a_run_are_kept(call, apply, database, connect, server, way, tmp_path):
    """A superuser's job, say: the window keeps out the application. It never stops the rollback."""
    apply(database, [migration("SELECT 1;", "001_step.sql")])
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    for module in ("snapshot", "backup") if way == "snapshot" else ("backup",):
        call(module, database)
    batch = (
        "-- runbook: batch-table=jobs batch-key=id changes=jobs.tenant_id\n"
        "UPDATE jobs SET tenant_id = 1 WHERE id BETWEEN :from AND :to;"
    )
    filled = (
        "ALTER TABLE tenants ADD made timestamptz DEFAULT clock_timestamp(); INSERT INTO tenants VALUES (6, 'six'); "
        "UPDATE jobs SET note = 'wrong' WHERE id < 50; CREATE TABLE fresh AS SELECT 1 AS i;"
    )
    steps = [("001_step.sql", "SELECT 1;"), ("002_fill.batch.sql", batch), ("003_fill.sql", filled)]
    apply(database, [migration(text, name) for name, text in steps], run_id="r1")
    with connect(database) as others:
        others.execute("INSERT INTO tenants (id, name) VALUES (70, 'theirs'), (71, 'theirs')")
        others.execute("UPDATE jobs SET note = 'theirs' WHERE id = 299; DELETE FROM jobs WHERE id = 298")
        others.execute("INSERT INTO fresh VALUES (2)")

    arguments = {"only_run": "r1", "changes": ["jobs.tenant_id"], "confirm": database, "accept_data_loss": True}
    result = call("restore", database, **arguments)

    assert result["method"] == way
    assert {one["table"]: one["rows"] for one in result["lost"]} == {"public.jobs": 1, "public.tenants": 2}
    for one in result["lost"]:
        assert Path(one["file"]).read_text(encoding="utf-8").count("theirs") == one["rows"]
    assert "('70', 'theirs')" not in str(content(connect, database)["tenants"])
    event = "SELECT detail -> 'lost' FROM runbook.events WHERE event = 'rolled_back'"
    assert connect(database).execute(event).fetchone() == ({"public.jobs": 1, "public.tenants": 2},)


def test_rows_of_others_that_cannot_be_kept_do_not_stop_the_way_back(call, apply, database, connect, server, tmp_path):
    apply(database, [migration("SELECT 1;", "001_step.sql")])
    call("backup", database)
    apply(
        database, [migration("SELECT 1;", "001_step.sql"), migration("DELETE FROM jobs;", "002_wrong.sql")], run_id="r1"
    )
    with connect(database) as others:
        others.execute("INSERT INTO tenants VALUES (70, 'theirs')")
    (tmp_path / "kept").write_text("no folder", encoding="utf-8")
    result = call("restore", database, only_run="r1", confirm=database, accept_data_loss=True)
    assert (result.get("failed"), result["lost"]) == (None, [])
    assert len(content(connect, database)["jobs"]) == 300


def test_table_of_which_only_some_rows_were_compared_is_named(call, database, connect):
    with connect(database) as session:
        session.execute(
            "SET ROLE settler_owner; CREATE TABLE large (id int PRIMARY KEY, v int); "
            "INSERT INTO large SELECT n, n FROM generate_series(1, 20000) n"
        )
    call("backup", database, fingerprint_sample_above=100_000)
    told = call("restore", database, check=True)["way"]
    assert "public.large: as many rows as in the backup; of one in " in told
    assert "every other table is as it was in the backup" in told
    with connect(database) as session:
        session.execute("UPDATE large SET v = 0")
    told = call("restore", database, check=True)["way"]
    assert "public.large: as many rows as in the backup, with other values" in told
    assert "of one in" not in told


@pytest.mark.parametrize("way", ["dump", "snapshot"])
@pytest.mark.parametrize(
    "late",
    [
        "INSERT INTO tenants VALUES (7, 'late')",
        "UPDATE tenants SET name = 'late' WHERE id = 3",
        "DELETE FROM jobs WHERE id = 9; INSERT INTO jobs VALUES (9, 2, 'late')",
        "ALTER TABLE tenants ALTER name TYPE text USING name || ' late'",
    ],
)
def test_row_written_until_the_last_moment_stops_the_swap(call, database, connect, server, monkeypatch, way, late):
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot" if way == "snapshot" else "backup", database)

    def write_late(*arguments, **options):
        with connect(database) as session:
            session.execute(late)
        return proven(*arguments, **options)

    proven = _rollback.apply_properties
    monkeypatch.setattr(_rollback, "apply_properties", write_late)
    told = call("restore", database, confirm=database)
    assert "was written to until now" in told["msg"]
    after = content(connect, database)
    assert "late" in str(after)
    assert named(server, f"{database}_") == ([f"{database}_snapshot_r1"] if way == "snapshot" else [])
    monkeypatch.undo()
    result = call("restore", database, confirm=database, accept_data_loss=True)
    assert sum(one["rows"] for one in result["lost"]) == (5 if late.startswith("ALTER") else 1)
    assert "late" not in str(content(connect, database))


def test_row_of_a_transaction_that_was_open_at_the_first_look_stops_the_swap(call, database, connect, monkeypatch):
    call("backup", database)
    early = connect(database)
    early.execute("BEGIN; UPDATE tenants SET name = 'late' WHERE id = 3")

    def commit_late(*arguments, **options):
        early.execute("COMMIT")
        early.close()
        return proven(*arguments, **options)

    proven = _rollback.apply_properties
    monkeypatch.setattr(_rollback, "apply_properties", commit_late)
    told = call("restore", database, confirm=database)
    assert "was written to until now" in told["msg"]
    assert "public.tenants: 1 rows are new or changed since" in told["msg"]


def test_what_nobody_touched_since_the_first_look_is_not_read_again(call, database, connect, monkeypatch):
    call("backup", database)
    read = []
    monkeypatch.setattr(_lost, "content", lambda _session, _table, _schema, name: read.append(name))

    def write_late(*arguments, **options):
        with connect(database) as session:
            session.execute("UPDATE jobs SET note = 'late' WHERE id = 3")
        return proven(*arguments, **options)

    proven = _rollback.apply_properties
    monkeypatch.setattr(_rollback, "apply_properties", write_late)
    assert call("restore", database, confirm=database)["failed_database"]
    assert read == ["jobs", "jobs"]


# How long it takes


def test_minutes_are_those_of_a_drill_for_the_size_or_twice_the_dump(call, database, tmp_path):
    def told(run_id):
        source = tmp_path / "backups" / database / run_id
        return call("restore", database, check=True, src=str(source))

    def rewrite(run_id, **changes):
        folder = tmp_path / "backups" / database / run_id
        text = _manifest.seal({**_manifest.read_manifest(folder), **changes})
        (folder / "manifest.json").write_text(text, encoding="utf-8")

    for run_id in ("small", "large"):
        call("backup", database, run_id=run_id)
    rewrite("large", size=4_000_000_000, duration_s=150)
    rewrite("small", size=1_000_000_000, duration_s=30)
    assert told("large")["minutes"] == 5
    assert "about 5 minutes (estimated as twice the dump, because no drill has measured it)" in told("large")["way"]
    proof = {"counts_match": True, "minutes": 3.0}
    _manifest.write_proof(tmp_path / "backups" / database / "small", proof)
    assert told("large")["minutes"] == 12
    assert "about 12 minutes (estimated by the drill of small, for its size)" in told("large")["way"]
    assert "about 3 minutes (measured by its drill)" in told("small")["way"]
    rewrite("small", environment="other")
    assert told("large")["minutes"] == 5


# Which backup


def test_newer_of_a_snapshot_and_a_backup_is_taken_though_they_are_of_one_second(call, database, server, tmp_path):
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot", database)
    at = call("snapshot_info", database)["snapshots"][0]["at"]
    made = Path(call("backup", database, run_id="b2")["path"])
    second, _dot, fraction = at.rstrip("Z").partition(".")
    for changed, expected in ((-1, "snapshot"), (1, "dump")):
        time_of_backup = f"{second}.{int(fraction) + changed:06d}Z"
        manifest = {**_manifest.read_manifest(made), "snapshot_time": time_of_backup}
        (made / "manifest.json").write_text(_manifest.seal(manifest), encoding="utf-8")
        assert call("restore", database, check=True)["method"] == expected


def test_run_that_committed_nothing_has_nothing_to_take_back(call, database, server):
    call("backup", database)
    result = call("restore", database, only_run="r1", confirm=database)
    assert (result["changed"], result["method"]) == (False, "none")
    assert "committed nothing" in result["way"]
    assert named(server, f"{database}_") == []


def test_without_any_way_back_nothing_is_touched(call, database):
    assert "no snapshot and no whole backup" in call("restore", database, confirm=database)["msg"]
    assert "no snapshot of" in call("restore", database, confirm=database, method="snapshot")["msg"]


def test_backup_of_another_server_or_database_must_be_named(call, database, new_database, connect, tmp_path):
    made = Path(call("backup", database)["path"])
    other = new_database()
    error = call("restore", other, src=str(made), confirm=other)
    assert "allow_foreign_backup=r1" in error["hint"]
    manifest = _manifest.read_manifest(made)
    (made / "manifest.json").write_text(_manifest.seal({**manifest, "system_identifier": "42"}), encoding="utf-8")
    error = call("restore", database, src=str(made), confirm=database)
    assert "a backup of another server (system 42" in error["msg"]
    result = call("restore", other, src=str(made), confirm=other, allow_foreign="r1", accept_data_loss=True)
    assert result["failed_database"] == f"{other}_failed_x1"
    assert content(connect, other) == content(connect, database)


def test_pgbackrest_backup_is_only_told(call, database, server):
    made = Path(call("backup", database)["path"])
    manifest = _manifest.read_manifest(made)
    command = "pgbackrest --stanza=settler --set=20261123-031500F restore"
    (made / "manifest.json").write_text(
        _manifest.seal({**manifest, "method": "pgbackrest", "restore_command": command}), encoding="utf-8"
    )
    told = call("restore", database, src=str(made), confirm=database)
    assert command in told["msg"]
    assert named(server, f"{database}_") == []


# What the target lacks


@pytest.mark.every_major
def test_server_that_lacks_a_role_is_refused_and_told_how_it_was(call, database, connect, server, cluster):
    if cluster.state.major == 16:  # the only clients to be had are of 15, which is too old, and of 18
        assert "no pg_dump and pg_restore that fit a server of version 16" in call("backup", database)["msg"]
        return
    options = ", INHERIT FALSE, SET FALSE" if cluster.state.major >= 16 else ""
    server.execute(
        "CREATE ROLE auditor LOGIN PASSWORD 'of-the-auditor' NOINHERIT CONNECTION LIMIT 3 "
        "VALID UNTIL '2030-01-01 00:00+00';"
        "ALTER ROLE auditor SET search_path = \"$user\", 'a,b'; ALTER ROLE auditor SET statement_timeout = '5s';"
        "ALTER ROLE auditor SET app.key = 'a-secret'; COMMENT ON ROLE auditor IS 'Reads; it''s ours';"
        f"GRANT settler_app TO auditor WITH ADMIN OPTION{options}; GRANT settler_owner TO auditor"
    )
    about = """SELECT rolcanlogin, rolcreatedb, rolinherit, rolconnlimit, rolvaliduntil, rolconfig::text,
        shobj_description(oid, 'pg_authid'), (SELECT string_agg(to_jsonb(m)::text, ';' ORDER BY m.roleid)
        FROM (SELECT to_jsonb(m) - 'oid' - 'member' AS m, roleid FROM pg_auth_members m WHERE member = r.oid) m)
        FROM pg_roles r WHERE rolname = 'auditor'"""
    server.execute("SELECT set_config('TimeZone', 'UTC', false)")
    try:
        with connect(database) as session:
            session.execute("GRANT SELECT ON jobs TO auditor")
        call("backup", database)
        server.execute("ALTER ROLE auditor RESET app.key")
        before = server.execute(about).fetchone()
        with connect(database) as session:
            session.execute("DROP OWNED BY auditor")
    finally:
        server.execute("DROP ROLE auditor")
    told = call("restore", database, confirm=database, accept_data_loss=True)
    assert told["missing_roles"] == ["auditor"]
    assert "secret" not in told["msg"] + told["hint"]
    assert "of-the-auditor" not in told["msg"] + told["hint"]
    assert named(server, f"{database}_") == []
    server.execute(told["hint"].rpartition("makes them by: ")[2])
    try:
        assert server.execute(about).fetchone() == before
        told = call("restore", database, confirm=database, accept_data_loss=True)
        if cluster.state.major == 14:  # where preflight tells of it before the window
            assert "schema public" in told["msg"]
        else:
            assert told["method"] == "dump"
    finally:
        for name in named(server, database):
            connect(name).execute("DROP OWNED BY auditor")
        server.execute("DROP ROLE auditor")


def test_server_that_lacks_an_extension_or_is_older_is_refused(call, database, server):
    made = Path(call("backup", database)["path"])
    manifest = _manifest.read_manifest(made)
    catalogue = json.loads((made / "catalogue.json").read_text(encoding="utf-8"))
    catalogue["extensions"]["postgis"] = "3.4"

    def tell(**changes):
        (made / "catalogue.json").write_text(json.dumps(catalogue), encoding="utf-8")
        files = _manifest.file_digests(made)
        (made / "manifest.json").write_text(_manifest.seal({**manifest, "files": files, **changes}), encoding="utf-8")
        return call("restore", database, confirm=database)

    told = tell()
    assert told["missing_extensions"] == ["postgis"]
    assert "nothing was touched" in told["msg"]
    told = tell(server_version="99.1 (Debian)")
    assert "made on PostgreSQL 99; this server is 15" in told["msg"]
    assert named(server, f"{database}_") == []


# Faults on the way


def test_client_that_will_not_leave_stops_the_swap_and_is_named(call, database, connect, server, monkeypatch):
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("snapshot", database)
    change(connect, database)
    after = content(connect, database)
    monkeypatch.setattr(_swap, "LEAVE_SECONDS", 0.3)
    stubborn = connect(database, user="settler_app")
    pid = stubborn.info.backend_pid
    os.kill(pid, signal.SIGSTOP)  # cannot answer to pg_terminate_backend
    try:
        told = call("restore", database, confirm=database, accept_data_loss=True)
        assert f"pid {pid} (settler_app)" in told["msg"]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert content(connect, database) == after
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        connect(f"{database}_snapshot_r1")
    monkeypatch.undo()
    result = call("restore", database, confirm=database, accept_data_loss=True)
    assert result["method"] == "snapshot"


def test_autovacuum_at_work_stops_no_snapshot_and_no_rollback(call, database, connect, server, monkeypatch):
    monkeypatch.setattr(_swap, "LEAVE_SECONDS", 0.5)

    def begin_to_vacuum():
        with connect(database) as session:  # a page in a tenth of a second, more than can be done meanwhile
            session.execute(
                "CREATE TABLE IF NOT EXISTS wide (id int, v text) WITH (autovacuum_vacuum_cost_delay = 100, "
                "autovacuum_vacuum_cost_limit = 1, autovacuum_vacuum_threshold = 0, "
                "autovacuum_vacuum_scale_factor = 0); "
                "INSERT INTO wide SELECT n, repeat('x', 1000) FROM generate_series(1, 5000) n; UPDATE wide SET id = 0; "
                "ALTER TABLE wide OWNER TO settler_owner"
            )
        at_work = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND backend_type = 'autovacuum worker'"
        return wait_until(lambda: server.execute(at_work, [database]).fetchone())

    try:
        server.execute("ALTER SYSTEM SET autovacuum_naptime = 1")
        server.execute("SELECT pg_reload_conf()")
        begin_to_vacuum()
        assert call("snapshot", database)["changed"]
        begin_to_vacuum()
        told = call("restore", database, confirm=database, accept_data_loss=True)
        assert told.get("method") == "snapshot", told["msg"]
    finally:
        server.execute("ALTER SYSTEM RESET autovacuum_naptime")
        server.execute("SELECT pg_reload_conf()")


@pytest.fixture
def half_swapped(call, database, new_database, server):
    """A database that has a backup, and lets nobody in because a rollback was killed just before its swap."""
    call("backup", database)
    half, real = sql.Identifier(new_database()), sql.Identifier(database)
    mark = sql.Literal(f"settler.runbook: being restored for {database}, run dead")
    server.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(half, mark))
    server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(real))
    return database


def lets_in(server, database):
    return server.execute("SELECT datallowconn FROM pg_database WHERE datname = %s", [database]).fetchone()[0]


def test_rollback_that_was_killed_just_before_its_swap_can_be_repeated(call, half_swapped, server):
    assert call("restore", half_swapped, confirm=half_swapped)["failed_database"] == f"{half_swapped}_failed_x1"
    assert lets_in(server, half_swapped)


@pytest.mark.parametrize("options", [{"only_run": "r1"}, {}])
def test_half_done_swap_is_mended_before_anything_looks_into_the_database(call, half_swapped, server, options):
    told = call("restore", half_swapped, **options)
    assert "committed nothing" in told["way"] if options else "rollback_confirm" in told["hint"]
    assert lets_in(server, half_swapped)


def test_half_done_swap_is_told_by_check_mode_and_by_all_others_who_cannot_connect(call, half_swapped, server):
    for told in (call("restore", half_swapped, check=True), call("backup", half_swapped, run_id="r2")):
        assert "a rollback was killed just before its swap" in told["msg"]
        assert "playbooks/rollback.yml" in told["hint"]
    assert not lets_in(server, half_swapped)


def test_run_id_that_has_taken_back_before_is_refused_before_anything_is_made(call, database, server):
    call("backup", database)
    assert call("restore", database, confirm=database)["failed_database"]
    for check in (True, False):
        told = call("restore", database, confirm=database, check=check)
        assert f"there is {database}_failed_x1; nothing was touched" in told["msg"]
        assert "runbook_run_id" in told["hint"]
    assert named(server, f"{database}_") == [f"{database}_failed_x1"]


@pytest.mark.parametrize("options", [{}, {"check": True}, {"confirm": "", "only_run": "r1"}])
def test_rollback_waits_for_no_lock_for_long_and_names_who_holds_it(
    call, apply, database, connect, server, monkeypatch, options
):
    apply(database, [migration("SELECT 1;", "001_step.sql")], run_id="r1")
    call("backup", database)
    monkeypatch.setattr(_rollback, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(_restore, "LOCK_SECONDS", 0.2)
    table = "runbook.migrations" if "only_run" in options else "jobs"
    with connect(database) as holder:
        holder.execute("SET application_name = 'a report'; BEGIN")
        holder.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        told = call("restore", database, **{"confirm": database, **options})
        assert "could not be read; nothing was touched" in told["msg"]
        assert f"pid {holder.info.backend_pid} (" in told["msg"]
        assert "a report" in told["msg"]
    assert named(server, f"{database}_") == []


def test_check_mode_of_a_backup_waits_no_longer_than_the_backup(call, database, connect):
    with connect(database) as holder:
        holder.execute("BEGIN; LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        told = call("backup", database, check=True, lock_timeout=0.2)
        assert f"pid {holder.info.backend_pid} (" in told["msg"]


def test_second_rollback_at_the_same_time_is_refused(call, database, server, monkeypatch):
    call("backup", database)
    monkeypatch.setattr(_swap, "LEAVE_SECONDS", 0.3)
    _swap.only_one(server, database)
    assert "another run takes" in call("restore", database, confirm=database)["msg"]


@pytest.mark.parametrize("way", ["snapshot", "dump"])
def test_kills_at_ten_moments_leave_the_old_or_the_new_database(call, database, connect, server, way):
    """The module is killed, with its pg_restore; each time the next one finds all that was there."""
    wait_until(lambda: not server.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    call("backup" if way == "dump" else "snapshot", database)
    comment = server.execute(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", [f"{database}_snapshot_r1"]
    ).fetchone()
    before = content(connect, database)
    change(connect, database)
    after = content(connect, database)
    began = time.monotonic()
    call("restore", database, run_id="whole", confirm=database, accept_data_loss=True, how=run_module)
    whole = time.monotonic() - began
    assert content(connect, database) == before
    swap_back(server, database, "whole", comment)
    for number in range(10):
        run_id = f"dies{number}"
        process = call("restore", database, run_id=run_id, confirm=database, accept_data_loss=True, how=start_module)
        time.sleep(whole * (0.3 + 0.07 * number) * CHANCE.uniform(0.95, 1.05))
        kill_with_children(process)
        wait_until(functools.partial(is_over, server, run_id))
        names = named(server, database)
        assert database in names
        if f"{database}_failed_{run_id}" in names:
            assert readable(server, connect, database) == before
            assert readable(server, connect, f"{database}_failed_{run_id}") == after
            swap_back(server, database, run_id, comment)
        else:
            assert readable(server, connect, database) == after
    result = call("restore", database, confirm=database, accept_data_loss=True)
    assert result["method"] == way
    assert content(connect, database) == before
    assert content(connect, f"{database}_failed_x1") == after
    assert named(server, f"{database}_restore") == []


def is_over(server, run_id):
    """Tell whether all sessions of a killed run have ended."""
    query = "SELECT FROM pg_stat_activity WHERE application_name LIKE %s OR application_name = 'pg_restore'"
    return not server.execute(query, [f"runbook:{run_id}:%"]).fetchall()


def kill_with_children(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    family = [process.pid, *(map(int, children.read_text(encoding="ascii").split()) if process.poll() is None else ())]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def swap_back(server, database, run_id, comment):
    """Bring back the state before a rollback; the comment is the snapshot's, if it was one."""
    names = (database, f"{database}_snapshot_r1", f"{database}_failed_{run_id}")
    real, snapshot, failed = (sql.Identifier(name) for name in names)
    if comment:
        server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(real))
        server.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(real, snapshot))
        server.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(snapshot, sql.Literal(comment[0])))
    else:
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(real))
    server.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(failed, real))


def readable(server, connect, name):
    """Return a database's content, also of one that is closed."""
    database = sql.Identifier(name)
    closed = server.execute("SELECT NOT datallowconn FROM pg_database WHERE datname = %s", [name]).fetchone()[0]
    if closed:
        server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(database))
    found = content(connect, name)
    if closed:
        server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(database))
    return found
