"""Restores on servers of their own: of another major, which works on a newer one only, and one that crashes."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.support import call_module, login, start_module, wait_until
from tools import majors
from tools.cluster import Cluster

SCHEMA = """
CREATE TABLE tenants (id int PRIMARY KEY, name text NOT NULL, at timestamptz DEFAULT '2026-01-01 00:00+00');
CREATE TABLE jobs (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id int NOT NULL REFERENCES tenants);
CREATE VIEW names AS SELECT name FROM tenants WHERE id > 1;
CREATE INDEX ON tenants (lower(name));
INSERT INTO tenants SELECT n, 'tenant ü ' || n FROM generate_series(1, 50) n;
INSERT INTO jobs (tenant_id) SELECT n % 50 + 1 FROM generate_series(1, 200) n;
"""


@pytest.fixture
def other(request):
    """Yield a cluster of another major, with the database's owner."""
    folder = Path(tempfile.mkdtemp(prefix="settler-pytest-other-", dir="/tmp"))
    folder.chmod(0o711)
    made = Cluster(folder / "cluster", fsync=False, port=55101, binaries=majors.ensure(request.param))
    try:
        made.up()
        yield made
    finally:
        made.down()
        shutil.rmtree(folder)


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
        "restore": {"run_id": "x1", "method": "auto", "confirm": "across", "accept_data_loss": True},
    }[module]
    arguments = usual | own | changes
    if how is not call_module:
        arguments = {key: value for key, value in arguments.items() if value is not None}
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
    folder = Path(tempfile.mkdtemp(prefix="settler-pytest-newest-", dir="/tmp"))
    folder.chmod(0o711)
    newest = Cluster(folder / "cluster", fsync=False, port=55102, binaries=majors.ensure(18))
    try:
        newest.up()
        result = call("drill", newest, tmp_path)
        assert result["server_version"].startswith("18")
        assert (result["rows"], result["fingerprints"]) == (250, 2)
        with psycopg.connect(newest.conninfo(result["database"])) as session:
            assert session.execute("SELECT count(*), max(name) FROM names").fetchone() == (49, "tenant ü 9")
        call("drill", newest, tmp_path, state="absent")
        assert databases(newest) == {"postgres", "template0", "template1"}
    finally:
        newest.down()
        shutil.rmtree(folder)


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
        pid = wait_until(pids, timeout=60)[0]
        os.kill(pid, signal.SIGKILL)
    output, _errors = process.communicate(timeout=60)
    assert json.loads(output)["failed"]
    wait_until(lambda: is_back(other), timeout=30)
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


def restart(cluster):
    program = str(majors.ensure(cluster.state.major)["pg_ctl"])
    subprocess.run(
        ["runuser", "-u", cluster.data.owner(), "--", program, "restart", "-w", "-D", str(cluster.data)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip
