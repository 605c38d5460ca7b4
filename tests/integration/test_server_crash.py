"""A server that crashes: what a run reports has lasted, and what is lost is lost together with its ledger row.

The commits of a row of files do not wait for the disk, only the last one does.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._migrate import migrate
from ansible_collections.settler.runbook.plugins.module_utils._run import Options, Outcome
from psycopg import sql

from tests.support import (
    files,
    login,
    run_module,
    start_module,
    throw_away_cluster,
    wait_until,
    write_migrations,
)
from tools.processes import servers_of

if TYPE_CHECKING:
    from tools.cluster import Cluster

COUNT = 60
STEPS = [f"CREATE TABLE t{number} (i) AS VALUES (1);" for number in range(COUNT)]
TABLES = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
LEDGER = "SELECT count(*) FROM runbook.migrations"


class Server:
    """A cluster of its own whose log writer sleeps, so that what nobody has waited for is in memory only."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._number = 0
        self.execute("postgres", "ALTER SYSTEM SET wal_writer_delay = '2s'")
        self.execute("postgres", "ALTER SYSTEM SET wal_writer_flush_after = '1GB'")
        self.execute("postgres", "SELECT pg_reload_conf()")

    def execute(self, database, query):
        with psycopg.connect(self.cluster.conninfo(database), autocommit=True) as session:
            cursor = session.execute(query)
            return cursor.fetchone()[0] if cursor.description else None

    def new_database(self):
        self._number += 1
        self.execute("postgres", sql.SQL("CREATE DATABASE crash_{}").format(sql.SQL(str(self._number))))
        return f"crash_{self._number}"

    def crash(self):
        """Kill all processes at once, as a power cut does; start the server again."""
        for pid in servers_of(self.cluster.data):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.cluster.up()

    def parameters(self, database):
        return login(self.cluster, database)

    def apply(self, database, steps):
        outcome = Outcome()
        with engine_connect(self.parameters(database)) as session:
            migrate(session, steps, Options(run_id="run-1", analyze=False, refresh=False), outcome)
            self.crash()  # before the session's end can do anything for what it has committed
        return outcome


@pytest.fixture(scope="module")
def server():
    with throw_away_cluster(port=25201) as cluster:
        yield Server(cluster)


def test_commit_that_nobody_waits_for_is_lost_here(server):
    """Otherwise the other tests could not fail."""
    database = server.new_database()
    with psycopg.connect(server.cluster.conninfo(database), autocommit=True) as session:
        session.execute("SET synchronous_commit = off")
        session.execute("CREATE TABLE t (i int)")
        server.crash()
    assert server.execute(database, TABLES) == 0


def test_run_that_has_ended_well_has_lasted(server):
    database = server.new_database()
    assert len(server.apply(database, files(*STEPS)).applied) == COUNT
    assert (server.execute(database, TABLES), server.execute(database, LEDGER)) == (COUNT, COUNT)


@pytest.mark.parametrize("last", ["SELECT 1/0;", "-- runbook: role=nobody_of_this_name\nSELECT 1;"])
def test_what_a_failed_run_had_applied_has_lasted(server, last):
    database = server.new_database()
    done = Outcome()
    with (
        engine_connect(server.parameters(database)) as session,
        contextlib.suppress(psycopg.OperationalError),  # the session's end on a server that is gone
    ):
        with pytest.raises(RunbookError):
            migrate(session, files(*STEPS[:5], last), Options(run_id="r", analyze=False, refresh=False), done)
        server.crash()
    assert len(done.applied) == 5
    assert (server.execute(database, TABLES), server.execute(database, LEDGER)) == (5, 5)


def test_file_that_gives_the_lock_away_has_lasted_as_well(server):
    database = server.new_database()
    done = Outcome()
    steps = files(*STEPS[:5], "SELECT pg_advisory_unlock_all();", STEPS[5])
    with engine_connect(server.parameters(database)) as session:
        with pytest.raises(RunbookError, match="lock is gone"):
            migrate(session, steps, Options(run_id="r", analyze=False, refresh=False), done)
        server.crash()
    assert len(done.applied) == 6
    assert (server.execute(database, TABLES), server.execute(database, LEDGER)) == (5, 6)


@pytest.mark.slow
def test_run_after_a_crash_in_the_middle_ends_as_if_nothing_had_happened(server, tmp_path):
    write_migrations(tmp_path, {f"{number:03d}_step.sql": step for number, step in enumerate(STEPS, 1)})
    arguments = {"directory": str(tmp_path), "run_id": "run-1", "analyze": False, "refresh": False, "lock_wait": 60}
    dice, came = random.Random(20261126), set()  # noqa: S311 - the same moments each time
    for _ in range(4):
        database = server.new_database()
        process = start_module("migrate", {**server.parameters(database), **arguments})
        wait_for_ledger(server, database)
        time.sleep(dice.uniform(0, 0.15))
        server.crash()
        output, _errors = process.communicate()
        exists = server.execute(database, "SELECT to_regclass('runbook.migrations') IS NOT NULL")
        rows = server.execute(database, LEDGER) if exists else 0
        assert server.execute(database, TABLES) == rows, output
        came.add(rows)
        result = run_module("migrate", {**server.parameters(database), **arguments, "run_id": "run-2"})
        assert len(result["applied"]) == COUNT - rows, result
        assert (server.execute(database, TABLES), server.execute(database, LEDGER)) == (COUNT, COUNT)
    assert any(0 <= rows < COUNT for rows in came), came


def wait_for_ledger(server, database):
    """Return once the run's first file is seen."""
    with psycopg.connect(server.cluster.conninfo(database), autocommit=True) as session:
        wait_until(lambda: session.execute("SELECT to_regclass('runbook.migrations') IS NOT NULL").fetchone()[0])
