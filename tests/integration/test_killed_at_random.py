"""Fifty runs that are killed at a random moment, and fifty pairs of runs at once: the end is always the same."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._catalog import digest, snapshot

from tests.support import as_migrator, run_module, start_module, write_migrations

FILES = {
    "001_tables.sql": "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, n text);\n"
    "INSERT INTO t (id, n) SELECT g, md5(g::text) FROM generate_series(1, 3000) g;\n"
    "CREATE VIEW small AS SELECT id FROM t WHERE v < 10;\n",
    "002_indexes.sql": "-- runbook: no-transaction\nCREATE INDEX CONCURRENTLY t_n ON t (n);\n"
    "INSERT INTO t (id, n) VALUES (0, 'zero');\nCREATE UNIQUE INDEX CONCURRENTLY t_u ON t (n, id);\nVACUUM t;\n",
    "003_fill.batch.sql": "-- runbook: batch-table=public.t batch-key=id batch-size=20 batch-target=20ms\n"
    "UPDATE t SET v = v + 1 WHERE id BETWEEN :from AND :to;\n",
    "004_more.sql": "ALTER TABLE t ADD COLUMN m int;\nUPDATE t SET m = v + 1;\nALTER TABLE t ALTER m SET NOT NULL;\n",
    "R__sum.sql": "CREATE OR REPLACE VIEW total AS SELECT sum(v) AS v, sum(m) AS m, count(*) AS n FROM t;\n",
}
ROUNDS = 50


@pytest.fixture
def arguments(cluster, roles, tmp_path):
    """Return the module's arguments for a database."""
    write_migrations(tmp_path, FILES)

    def of(database, run_id="run-1"):
        return {
            **as_migrator(cluster, roles, database),
            "directory": str(tmp_path),
            "run_id": run_id,
            "set_role": roles.owner,
            "lock_wait": 60,
        }

    return of


@pytest.fixture
def state(connect):
    """Return what a database holds: catalogue, rows, and what the ledger says is done."""

    def of(database):
        with connect(database) as session:
            ledger = "SELECT array_agg(concat_ws(' ', file, state, checksum) ORDER BY file) FROM runbook.migrations"
            journal = (
                "SELECT array_agg(concat_ws(' ', file, statement, state, checksum) ORDER BY 1) FROM runbook.journal"
            )
            return (
                digest(snapshot(session)),
                session.execute("SELECT * FROM t ORDER BY id").fetchall(),
                session.execute("SELECT count(*) FROM pg_index WHERE NOT indisvalid").fetchone(),
                session.execute(ledger).fetchone(),
                session.execute(journal).fetchone(),
                session.execute(
                    "SELECT file, count(*) FROM runbook.events WHERE event = 'applied' GROUP BY 1"
                ).fetchall(),
            )

    return of


@pytest.mark.slow
def test_a_run_after_a_killed_one_ends_as_if_nothing_had_happened(new_database, arguments, state):
    undisturbed = new_database()
    began = time.monotonic()
    assert not run_module("migrate", arguments(undisturbed)).get("failed")
    seconds = time.monotonic() - began
    wanted = state(undisturbed)
    dice, moments = random.Random(20261124), []  # noqa: S311 - the same moments each time
    for number in range(ROUNDS):
        database = new_database()
        process = start_module("migrate", arguments(database))
        moments.append(dice.uniform(0.3 * seconds, 1.05 * seconds))
        time.sleep(moments[-1])
        process.send_signal(signal.SIGKILL)
        process.communicate()
        result = run_module("migrate", arguments(database, "run-2"))
        assert not result.get("failed"), f"round {number}, killed after {moments[-1]:.3f} s: {result['msg']}"
        assert state(database) == wanted, f"round {number}, killed after {moments[-1]:.3f} s"


@pytest.mark.slow
def test_two_runs_at_once_apply_everything_once(new_database, arguments, state):
    wanted = None
    for number in range(ROUNDS):
        database = new_database()
        pair = [start_module("migrate", arguments(database, run_id)) for run_id in "ab"]
        results = [json.loads(process.communicate()[0]) for process in pair]
        assert not any(result.get("failed") for result in results), f"round {number}: {results}"
        assert sorted(len(result["applied"]) for result in results) == [0, len(FILES)], f"round {number}"
        wanted = wanted or state(database)
        assert state(database) == wanted, f"round {number}"
