"""Backups and restores on servers of their own: of another major, which works on a newer one only; killed ones."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import time

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._preflight import Wanted, preflight
from psycopg import sql

from tests.integration.test_rollback import content, named, readable, swap_back
from tests.support import (
    MODULES,
    call_module,
    defaults_of,
    login,
    run_module,
    run_on_small_disk,
    start_module,
    throw_away_cluster,
    wait_until,
)
from tools import majors
from tools.processes import servers_of

SCHEMA = """
CREATE TABLE tenants (id int PRIMARY KEY, name text NOT NULL, at timestamptz DEFAULT '2026-01-01 00:00+00');
CREATE TABLE jobs (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id int NOT NULL REFERENCES tenants);
CREATE VIEW names AS SELECT name FROM tenants WHERE id > 1;
CREATE INDEX ON tenants (lower(name));
INSERT INTO tenants SELECT n, 'tenant ü ' || n FROM generate_series(1, 50) n;
INSERT INTO jobs (tenant_id) SELECT n % 50 + 1 FROM generate_series(1, 200) n;
"""
CHANCE = random.SystemRandom()


@pytest.fixture
def other(request):
    """Yield a cluster of another major, or for 0 one more of the machine's own PostgreSQL."""
    binaries = majors.ensure(request.param) if request.param else None
    with throw_away_cluster(fsync=False, port=25101, binaries=binaries) as made:
        yield made


def fill(cluster):
    """Make a database as the superuser, whose name all these servers have; return its name."""
    name = "across"
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
        server.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
        server.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING UTF8 LOCALE 'C'").format(sql.Identifier(name))
        )
    with psycopg.connect(cluster.conninfo(name), autocommit=True) as session:
        session.execute(SCHEMA)
    return name


def call(module, cluster, folder, how=call_module, **changes):
    usual = {
        **login(cluster, "across"), "run_id": "r1", "environment": "test", "set_role": None,
        "ledger_schema": "runbook", "client_bin": cluster.state.bin, "jobs": 2, "directory": str(folder / "backups"),
    }  # fmt: skip
    own = {
        "backup": {"compression": "gzip:1", "lock_timeout": 10, "keep": 0, "keep_days": 0.0},
        "drill": {"state": "present", "src": None, "facts": {}},
        "snapshot": {"state": "present", "keep_hours": 24.0, "max_bytes": 2**31},
        "restore": {"run_id": "x1", "method": "auto", "confirm": "across", "accept_data_loss": True},
    }[module]
    arguments = usual | own | changes
    if how is not call_module:
        known = {*defaults_of(module), *login(cluster, "across")}
        arguments = {key: value for key, value in arguments.items() if value is not None and key in known}
    return how(module, arguments)


def databases(cluster):
    with psycopg.connect(cluster.conninfo("postgres")) as server:
        return {row[0] for row in server.execute("SELECT datname FROM pg_database")}


@pytest.mark.parametrize("other", [14], indirect=True)
def test_backup_of_a_newer_server_is_refused_before_anything_is_made(cluster, other, tmp_path):
    fill(cluster)
    call("backup", cluster, tmp_path)
    before = databases(other)
    told = call("drill", other, tmp_path)
    assert f"made on PostgreSQL {cluster.state.major}; this server is 14" in told["msg"]
    assert f"Restore it on PostgreSQL {cluster.state.major} or newer." in told["hint"]
    assert databases(other) == before


@pytest.mark.parametrize("other", [14], indirect=True)
def test_backup_of_14_comes_back_on_the_machines_own_and_on_the_newest(other, cluster, tmp_path):
    fill(other)
    made = call("backup", other, tmp_path)
    assert made["rows"] == 250
    assert call("drill", cluster, tmp_path)["fingerprints"] == 2
    with throw_away_cluster(fsync=False, port=25102, binaries=majors.ensure(18)) as newest:
        result = call("drill", newest, tmp_path)
        assert result["server_version"].startswith("18")
        assert (result["rows"], result["fingerprints"]) == (250, 2)
        with psycopg.connect(newest.conninfo(result["database"])) as session:
            assert session.execute("SELECT count(*), max(name) FROM names").fetchone() == (49, "tenant ü 9")
        call("drill", newest, tmp_path, state="absent")
        assert databases(newest) == {"postgres", "template0", "template1"}


@pytest.mark.parametrize("other", [14], indirect=True)
def test_backup_of_14_keeps_its_collation_on_a_server_of_another_provider(other, tmp_path):
    """What 14 does not tell is libc, which template0 elsewhere need not be."""
    fill(other)
    call("backup", other, tmp_path)
    with (
        throw_away_cluster(fsync=False, port=25102) as icu,
        psycopg.connect(icu.conninfo("postgres"), autocommit=True) as server,
    ):
        for statement in (
            "CREATE DATABASE other TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de-DE'",
            "ALTER DATABASE template0 RENAME TO template_of_libc",
            "ALTER DATABASE other RENAME TO template0",
            "UPDATE pg_database SET datcollversion = NULL WHERE datname = 'template0'",  # as initdb leaves it
        ):
            server.execute(statement)
        told = call("drill", icu, tmp_path)
        assert not told.get("failed"), told
        provider = "SELECT datlocprovider, datcollate FROM pg_database WHERE datname = %s"
        assert server.execute(provider, [told["database"]]).fetchone() == ("c", "C")


@pytest.mark.parametrize("other", [14], indirect=True)
def test_server_that_crashes_in_the_middle_of_a_restore_has_its_database_afterwards(other, tmp_path):
    """A backend that is killed takes all sessions of the server along: nothing can tidy up until it is back."""

    def seen():
        with psycopg.connect(other.conninfo("across")) as session:
            return session.execute("SELECT count(*), sum(hashtext(t::text)) FROM tenants t").fetchone()

    def pids():
        query = "SELECT pid FROM pg_stat_activity WHERE datname = 'across_restore_dies' AND query LIKE 'COPY%'"
        return [row[0] for row in server.execute(query)]

    fill(other)
    with psycopg.connect(other.conninfo("across"), autocommit=True) as session:
        session.execute("INSERT INTO tenants SELECT n, repeat('x', 100) FROM generate_series(100, 400000) n")
        backup = call("backup", other, tmp_path)
        before = seen()
        session.execute("UPDATE tenants SET name = 'changed' WHERE id = 1")
    after = seen()
    with psycopg.connect(other.conninfo("postgres"), autocommit=True) as server:
        process = call("restore", other, tmp_path, how=start_module, run_id="dies")
        pid = wait_until(pids)[0]
        os.kill(pid, signal.SIGKILL)
    output, _errors = process.communicate(timeout=300)
    assert json.loads(output)["failed"]
    wait_until(lambda: is_back(other))
    assert seen() == after

    result = call("restore", other, tmp_path, lost_directory=str(tmp_path / "lost"), only_run="", src=None,
                  allow_foreign="", progress_file=None)  # fmt: skip
    assert result["rows"] == backup["rows"]
    assert [(one["table"], one["rows"]) for one in result["lost"]] == [("public.tenants", 1)]
    assert seen() == before
    assert databases(other) == {"postgres", "template0", "template1", "across", "across_failed_x1"}


def is_back(cluster):
    try:
        with psycopg.connect(cluster.conninfo("across")):
            return True
    except psycopg.OperationalError:
        return False


# The whole server is killed


def fill_for_crashes(cluster):
    """Make a database that takes some time; pages are written so that a kill in the middle of one does no harm."""
    with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
        server.execute("ALTER SYSTEM SET full_page_writes = on")
        server.execute("SELECT pg_reload_conf()")
    fill(cluster)
    with psycopg.connect(cluster.conninfo("across"), autocommit=True) as session:
        session.execute(
            "INSERT INTO tenants SELECT n, md5(n::text) || repeat('x', 60) FROM generate_series(100, 30000) n"
        )
        session.execute("CHECKPOINT")


def seconds_of(call_it):
    began = time.monotonic()
    result = call_it()
    assert not result.get("failed"), result
    return time.monotonic() - began


def killed_in(process, cluster, seconds):
    """Kill every process of the server so long after a module was started; return what the module says of it."""
    time.sleep(seconds)
    for pid in servers_of(cluster.data):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert "Traceback" not in output + errors, output + errors
    cluster.up()
    return json.loads(output)


def moments(whole):
    """Return ten moments of what takes so long; before them only Python starts."""
    return [whole * (0.3 + 0.07 * number) * CHANCE.uniform(0.95, 1.05) for number in range(10)]


@pytest.mark.parametrize("other", [0], indirect=True)
def test_server_killed_at_ten_moments_of_a_backup_leaves_its_data_and_no_half_backup(other, tmp_path):
    def connect(name):
        return psycopg.connect(other.conninfo(name), autocommit=True)

    fill_for_crashes(other)
    before = content(connect, "across")
    whole = seconds_of(lambda: call("backup", other, tmp_path, how=run_module))
    home, failures = tmp_path / "backups" / "across", 0
    for number, seconds in enumerate(moments(whole)):
        process = call("backup", other, tmp_path, how=start_module, run_id=f"dies{number}")
        told = killed_in(process, other, seconds)
        failures += bool(told.get("failed"))
        assert (home / f"dies{number}").exists() != bool(told.get("failed"))
        assert content(connect, "across") == before
        for backup in home.glob("[!.]*"):
            _manifest.check_files(backup, _manifest.read_manifest(backup))
    assert failures, "no kill came in time"
    assert seconds_of(lambda: call("backup", other, tmp_path, run_id="last")) < 20
    assert call("drill", other, tmp_path)["path"] == str(home / "last")
    assert [path.name for path in home.glob(".*")] == [".lock"]


@pytest.mark.parametrize("other", [0], indirect=True)
@pytest.mark.parametrize("way", ["dump", "snapshot"])
def test_server_killed_at_ten_moments_of_a_rollback_has_the_old_or_the_new_database(other, tmp_path, way):
    def connect(name):
        return psycopg.connect(other.conninfo(name), autocommit=True)

    fill_for_crashes(other)
    assert not call("backup" if way == "dump" else "snapshot", other, tmp_path).get("failed")
    with connect("postgres") as server:
        mark = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = 'across_snapshot_r1'"
        comment = server.execute(mark).fetchone()
    before = content(connect, "across")
    with connect("across") as session:
        session.execute("UPDATE tenants SET name = 'changed' WHERE id = 1; DELETE FROM jobs WHERE id = 7")
    after = content(connect, "across")
    whole = seconds_of(lambda: call("restore", other, tmp_path, how=run_module, run_id="whole"))
    with connect("postgres") as server:
        swap_back(server, "across", "whole", comment)
    failures = 0
    for number, seconds in enumerate(moments(whole)):
        run_id = f"dies{number}"
        told = killed_in(call("restore", other, tmp_path, how=start_module, run_id=run_id), other, seconds)
        failures += bool(told.get("failed"))
        with connect("postgres") as server:
            if f"across_failed_{run_id}" in named(server, "across"):
                assert readable(server, connect, "across") == before
                assert readable(server, connect, f"across_failed_{run_id}") == after
                swap_back(server, "across", run_id, comment)
            else:
                assert readable(server, connect, "across") == after
    assert failures, "no kill came in time"
    assert seconds_of(lambda: call("restore", other, tmp_path)) < 20
    assert content(connect, "across") == before
    assert content(connect, "across_failed_x1") == after
    assert databases(other) == {"postgres", "template0", "template1", "across", "across_failed_x1"}


@pytest.mark.parametrize("other", [16], indirect=True)
def test_the_servers_log_since_the_run_began_is_kept_without_secrets(other, tmp_path):
    with psycopg.connect(other.conninfo("postgres"), autocommit=True) as server:
        server.execute("ALTER SYSTEM SET logging_collector = on")
        server.execute("CREATE ROLE reader LOGIN PASSWORD 'reader-secret'")
        server.execute("SELECT 1 AS of_before_the_run")
    folder = tmp_path / "kept"
    arguments = {
        **login(other, "postgres", "reader", "reader-secret"), "directory": str(folder), "run_id": "r1",
        "since": dt.datetime.now(dt.UTC).isoformat(), "set_role": None, "ledger_schema": "runbook",
        "notes": {"error": "PASSWORD 'of a note'", "plan": [{"password": "p-secret", "url": "postgresql://u:u-secret@h/d"}]},
    }  # fmt: skip
    assert set(call_module("diagnostics", arguments)["left_out"]) == {"server_log"}
    with psycopg.connect(other.conninfo("postgres"), autocommit=True) as server:
        server.execute(
            "GRANT EXECUTE ON FUNCTION pg_current_logfile(), pg_stat_file(text), "
            "pg_read_file(text, bigint, bigint, boolean) TO reader"
        )
    restart(other)
    time.sleep(1.1)  # the log is cut by whole seconds
    arguments["since"] = dt.datetime.now(dt.UTC).isoformat()
    with psycopg.connect(other.conninfo("postgres"), autocommit=True) as server:
        for statement in ("ALTER ROLE nobody PASSWORD 'hunter-2'", "SELECT 1 / 0"):
            with pytest.raises(psycopg.Error):
                server.execute(statement)
    result = call_module("diagnostics", arguments)
    assert result["left_out"] == {}
    log = (folder / "server_log.txt").read_text(encoding="utf-8")
    assert "division by zero" in log
    assert "ready to accept connections" not in log
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert sorted(texts) == result["files"]
    for secret in ("hunter-2", "reader-secret", "of a note", "p-secret", "u-secret", other.state.password):
        assert [name for name, text in texts.items() if secret in text] == []


def test_of_diagnostics_on_a_full_disk_the_small_ones_are_kept(cluster, tmp_path):
    small, after = tmp_path / "small", tmp_path / "after"
    small.mkdir()
    arguments = {
        **login(cluster, "postgres"), "directory": str(small / "kept"), "run_id": "r1",
        "since": dt.datetime.now(dt.UTC).isoformat(), "notes": {"huge": "x" * 2**21, "error": "what happened"},
    }  # fmt: skip
    script = f'"{sys.executable}" "{MODULES}/diagnostics.py"; cp -a "{small}/kept" "{after}"'
    result, _errors = run_on_small_disk(small, "1m", script, arguments)
    assert not result.get("failed"), result
    assert result["left_out"]["huge"] == "No space left on device"
    assert sorted(path.name for path in after.iterdir()) == result["files"]
    assert (after / "error.txt").read_text() == "what happened"
    assert "huge.txt" not in result["files"]
    assert json.loads((after / "left_out.json").read_text())["huge"] == "No space left on device"


@pytest.mark.parametrize("other", [16], indirect=True)
@pytest.mark.parametrize(
    ("settings", "may_list", "note"),
    [
        ({"log_line_prefix": "[%p] %m "}, True, ""),
        ({"log_destination": "jsonlog"}, True, ""),
        ({"log_destination": "csvlog"}, True, ""),
        ({"log_line_prefix": "%n "}, False, "an earlier one needs the right to call pg_ls_logdir()"),
        ({"log_line_prefix": "%p "}, True, "log_line_prefix has no time"),
    ],
)
def test_the_servers_log_is_kept_in_any_format_and_across_a_rotation(other, tmp_path, settings, may_list, note):
    with psycopg.connect(other.conninfo("postgres"), autocommit=True) as server:
        server.execute("ALTER SYSTEM SET logging_collector = on")
        server.execute("ALTER SYSTEM SET log_filename = 'log-%Y%m%d%H%M%S'")
        for name, value in settings.items():
            server.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        server.execute("CREATE ROLE reader LOGIN PASSWORD 'reader-secret'")
        functions = "pg_current_logfile(), pg_stat_file(text), pg_read_file(text, bigint, bigint, boolean)"
        server.execute(f"GRANT EXECUTE ON FUNCTION {functions}{', pg_ls_logdir()' if may_list else ''} TO reader")
    restart(other)
    since = dt.datetime.now(dt.UTC)
    with psycopg.connect(other.conninfo("postgres"), autocommit=True) as server:
        (first,) = server.execute("SELECT pg_current_logfile()").fetchone()
        with pytest.raises(psycopg.errors.UndefinedTable):
            server.execute("SELECT FROM before_the_rotation")
        wait_until(lambda: dt.datetime.now(dt.UTC) - since > dt.timedelta(seconds=1.1))  # another name for the file
        server.execute("SELECT pg_rotate_logfile()")
        wait_until(lambda: server.execute("SELECT pg_current_logfile()").fetchone() != (first,))
        with pytest.raises(psycopg.errors.UndefinedTable):
            server.execute("SELECT FROM after_the_rotation")
    arguments = {
        **login(other, "postgres", "reader", "reader-secret"), "directory": str(tmp_path / "kept"), "run_id": "r1",
        "since": since.isoformat(), "set_role": None, "ledger_schema": "runbook", "notes": {},
    }  # fmt: skip
    assert call_module("diagnostics", arguments)["left_out"] == {}
    log = (tmp_path / "kept" / "server_log.txt").read_text(encoding="utf-8")
    assert "after_the_rotation" in log
    assert ("before_the_rotation" in log) == may_list
    assert log.startswith("(") == bool(note)
    assert note in log.splitlines()[0]


@pytest.mark.parametrize("other", [0], indirect=True)
def test_replication_slots_which_stay_with_the_failed_database_are_told_by_preflight(other):
    fill(other)
    with psycopg.connect(other.conninfo("postgres"), autocommit=True) as server:
        server.execute("ALTER SYSTEM SET wal_level = logical")
    restart(other)
    with psycopg.connect(other.conninfo("across"), autocommit=True) as session:
        session.execute("SELECT pg_create_logical_replication_slot('out', 'pgoutput')")
    params = login(other, "across")
    rows, _facts = preflight(params, Wanted(owner=params["login_user"], way_back="dump"))
    (row,) = [row for row in rows if row.status != "ok"]
    assert (row.status, row.check) == ("warning", "rollback")
    assert row.detail == "replication slots would stay with the failed database: out"


def restart(cluster):
    program = str(majors.ensure(cluster.state.major)["pg_ctl"])
    subprocess.run(
        ["runuser", "-u", cluster.data.owner(), "--", program, "restart", "-w", "-D", str(cluster.data)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip


@pytest.fixture
def small_disk():
    """Yield a server and a tablespace of it on a disk of 32 MB."""
    with throw_away_cluster() as cluster, contextlib.ExitStack() as stack:
        place = cluster.data.parent / "small"
        place.mkdir()
        owner = cluster.data.stat()
        options = f"size=32m,mode=700,uid={owner.st_uid},gid={owner.st_gid}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", place], check=True)
        with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as server:
            server.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(sql.Literal(str(place))))
        yield cluster


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("what", ["restore", "drill"])
def test_full_disk_of_the_server_leaves_the_database_and_its_room(small_disk, tmp_path, what):
    def connect(name):
        return psycopg.connect(small_disk.conninfo(name), autocommit=True)

    with connect("postgres") as server:
        server.execute("CREATE DATABASE across TEMPLATE template0 TABLESPACE small")
    with connect("across") as session:
        session.execute("CREATE TABLE wide AS SELECT n, repeat(md5(n::text), 30) AS v FROM generate_series(1, 18000) n")
    assert call("backup", small_disk, tmp_path)["rows"] == 18000
    rows = "SELECT count(*), sum(hashtextextended(wide::text, 0)) FROM wide"
    before = connect("across").execute(rows).fetchone()

    told = call(what, small_disk, tmp_path, run_id="x1")
    assert "the server's disk is full; what was restored so far is dropped again" in told["msg"]
    assert "No space left on device" in told["msg"]
    assert "Make room on the server" in told["hint"]
    assert databases(small_disk) == {"across", "postgres", "template0", "template1"}
    with connect("across") as session:  # there is room for what the application writes
        assert session.execute(rows).fetchone() == before
        session.execute("INSERT INTO wide SELECT n, repeat('x', 1000) FROM generate_series(1, 3000) n")
