"""A physical standby as the target: refused before anything is begun, with its primary's address; reading works."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.support import Background, as_migrator, free_port, migration, run_module, wait_until, write_migrations
from tools.account import Account
from tools.binaries import find_binaries

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def standby(cluster) -> Iterator[int]:
    """Yield the port of a streaming standby of the cluster."""
    programs, account = find_binaries(), Account.for_server()
    assert programs is not None
    port = free_port()
    folder = Path("/tmp") / f"settler-standby-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    account.own(folder)
    data = folder / "data"

    def run(*command: str) -> None:
        done = account.run(list(command))
        assert done.returncode == 0, done.stdout

    try:
        run(programs["pg_basebackup"], "-R", "-X", "stream", "-c", "fast", "-D", str(data),
            "-d", cluster.conninfo("postgres"))  # fmt: skip
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c hot_standby=on"
        options += " -c wal_receiver_status_interval=1"
        run(programs["pg_ctl"], "-D", str(data), "-l", f"{folder}/log", "-w", "-o", options, "start")
        yield port
    finally:
        account.run([programs["pg_ctl"], "-D", str(data), "-m", "immediate", "stop"])
        shutil.rmtree(folder)


def there_as_superuser(cluster, standby):
    """Open a session of the superuser on the standby."""
    there = cluster.conninfo("postgres").replace(f"port='{cluster.state.port}'", f"port='{standby}'")
    return psycopg.connect(there, autocommit=True)


TENANTS = """
CREATE TABLE tenants (id uuid PRIMARY KEY DEFAULT gen_random_uuid());
CREATE TABLE jobs (tenant_id uuid NOT NULL REFERENCES tenants);
ALTER TABLE tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobs ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON tenants USING (id::text = current_setting('app.current_tenant_id', true));
CREATE POLICY own ON jobs USING (tenant_id::text = current_setting('app.current_tenant_id', true));
INSERT INTO tenants DEFAULT VALUES;
INSERT INTO jobs SELECT id FROM tenants;
"""


def arguments_of_verify(cluster, roles, database):
    """Return all that verify is asked for in a change window."""
    isolation = {"role": roles.app}
    return {**as_migrator(cluster, roles, database), "set_role": roles.owner, "isolation": isolation, "record": True}


def test_standby_is_refused_by_name_of_its_primary_and_can_be_read(
    cluster, roles, tmp_path, new_database, connect, standby
):
    database = new_database()
    connect(database, role=roles.owner).execute(TENANTS)
    with connect("postgres") as server:
        server.execute(f"GRANT pg_read_all_stats TO {roles.migrator}")
        (sent,) = server.execute("SELECT pg_current_wal_lsn()::text").fetchone()
    with there_as_superuser(cluster, standby) as there:
        wait_until(lambda: there.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [sent]).fetchone()[0])
        wait_until(lambda: there.execute("SELECT count(*) FROM pg_stat_wal_receiver").fetchone()[0])
    write_migrations(tmp_path, {"001_t.sql": "CREATE TABLE t (i int);"})
    arguments = {
        **as_migrator(cluster, roles, database),
        "login_port": standby,
        "directory": str(tmp_path),
        "run_id": "r",
        "set_role": roles.owner,
    }
    planned = run_module("migrate", arguments, check=True)
    assert [one["file"] for one in planned["applied"]] == ["001_t.sql"]
    result = run_module("migrate", arguments)
    assert result["failed"]
    assert f"127.0.0.1:{standby} is a standby: nothing can be written there" in result["msg"]
    assert f"Connect to its primary, 127.0.0.1:{cluster.state.port}" in result["hint"]
    looked = run_module("preflight", {**as_migrator(cluster, roles, database), "login_port": standby})
    assert looked["failed"]
    assert f"127.0.0.1:{standby} is a standby" in looked["msg"]
    assert f"Connect to its primary, 127.0.0.1:{cluster.state.port}" in looked["msg"]
    verified = run_module("verify", {**arguments_of_verify(cluster, roles, database), "login_port": standby})
    assert not verified.get("failed"), verified["msg"]
    assert (verified["changed"], verified["recorded"], verified["isolated_tables"]) == (False, False, 2)
    assert verified["unproved"] == ["insert, update and delete across the border: nothing can be written here"]
    with connect("postgres") as server:
        server.execute(f"REVOKE pg_read_all_stats FROM {roles.migrator}")


def test_batches_wait_for_a_standby_that_lags(cluster, roles, new_database, connect, standby, apply, ask):
    database, said = new_database(), []
    table = migration(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT g, 0 FROM generate_series(1, 9) g;"
    )
    apply(database, [table])
    text = (
        "-- runbook: batch-table=public.t batch-key=id batch-size=1\nUPDATE t SET v = 1 WHERE id BETWEEN :from AND :to;"
    )
    lag = "SELECT pg_logical_emit_message(false, '', ''), max(replay_lag) > interval '1 s' FROM pg_stat_replication"
    with connect("postgres") as server, there_as_superuser(cluster, standby) as there:
        server.execute(f"GRANT pg_read_all_stats TO {roles.migrator}")
        there.execute("SELECT pg_wal_replay_pause()")
        wait_until(lambda: server.execute(lag).fetchone()[1])
        files = [table, migration(text, "002_fill.batch.sql")]
        run = Background(lambda: apply(database, files, say=said.append, batch_max_lag=1, progress_interval=0.1))
        told = re.compile(r".*: batches wait for standby \S+ \(127\.0\.0\.1, pid \d+\), which is \d+ s behind")
        wait_until(lambda: len(list(filter(told.fullmatch, said))) >= 2 or not run.is_alive())
        assert ask(database, "SELECT count(*) FROM t WHERE v = 0") > 0
        there.execute("SELECT pg_wal_replay_resume()")
        assert run.value().applied[0].rows == 9
