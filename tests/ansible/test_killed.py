"""A run that is killed: the next one finds out from the database what was in progress, and succeeds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.support import wait_until
from tools import project

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.ansible.conftest import Deployment
CHANCE = random.SystemRandom()
WRONG = "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY;\nDELETE FROM tenants WHERE slug LIKE '%7';\n"


def start(deployment: Deployment, playbook: str, **variables: Any) -> subprocess.Popen[bytes]:
    """Start a playbook in a process group of its own."""
    return subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            f"playbooks/{playbook}",
            "-i",
            str(deployment.inventory),
            "--extra-vars",
            json.dumps(variables),
        ],
        cwd=project.ROOT,
        env=project.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a playbook and every process that it has started, the module's included."""
    children = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split()[2:]
    parents = dict(zip(map(int, children[::2]), map(int, children[1::2]), strict=True))
    family = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        with contextlib.suppress(ProcessLookupError):  # it was at its end
            os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_run_killed_in_the_migration_is_followed_by_one_that_succeeds(ready: Deployment) -> None:
    slow = "CREATE TABLE half (id int);\nALTER TABLE half ENABLE ROW LEVEL SECURITY;\nSELECT pg_sleep({});\n"
    ready.migration("101_slow.sql", slow.format(120))
    sleeping = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(120)%'"

    process = start(ready, "migrate.yml")
    wait_until(lambda: ready.query(sleeping))
    kill(process)

    wait_until(lambda: not ready.query(sleeping), timeout=10)  # the server notices that its client is gone
    assert ready.query("SELECT to_regclass('public.half')") == [(None,)]
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        ready.connect(user="app")  # killed inside the window: the safe side

    ready.migration("101_slow.sql", slow.format(0))
    run = ready.play("migrate.yml", verify_unexpected="ignore")
    assert run.rc == 0, run.output
    assert ready.query("SELECT to_regclass('public.half') IS NOT NULL") == [(True,)]
    with ready.connect(user="app"):
        pass


def test_a_run_killed_in_the_backup_leaves_nothing_that_looks_like_one(ready: Deployment) -> None:
    backups = ready.folder / "inventory" / "backups" / ready.database
    with ready.connect() as blocker:
        blocker.execute("BEGIN")
        blocker.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")  # pg_dump waits for it
        process = start(ready, "backup.yml")
        wait_until(lambda: list(backups.glob(".*.partial")))
        kill(process)
    assert [path.name for path in backups.iterdir() if not path.name.startswith(".")] == []

    run = ready.play("backup.yml")
    assert run.rc == 0, run.output
    assert list(backups.glob(".*.partial")) == []
    assert len([path for path in backups.iterdir() if path.is_dir()]) == 1


def filled(deployment: Deployment) -> Deployment:
    """Give a deployment rows that can be lost."""
    deployment.query(
        "INSERT INTO tenants (name, slug) SELECT n, 'slug-' || n FROM generate_series(1, 300) n RETURNING 1"
    )
    return deployment


def content(deployment: Deployment, database: str | None = None) -> str:
    """Return all that is in a database but the ledger; one that a killed swap has closed is opened for it."""
    name = database or deployment.database
    closed = f"SELECT FROM pg_database WHERE datname = '{name}' AND NOT datallowconn"
    was_closed = bool(deployment.query(closed, "postgres"))
    with deployment.connect("postgres") as server:
        if was_closed:
            server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        try:
            return dataclasses.replace(deployment, database=name).dump("--exclude-table-data=runbook.*")
        finally:
            if was_closed:
                server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")


def killed_after(deployment: Deployment, seconds: float, playbook: str, **variables: Any) -> None:
    """Kill a playbook with all its processes some seconds after it was started; wait until its sessions are gone."""
    process = start(deployment, playbook, **variables)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    kill(process)
    ours = f"datname LIKE '{deployment.database}%' OR application_name LIKE 'runbook:{variables['runbook_run_id']}:%'"
    wait_until(lambda: not deployment.query(f"SELECT FROM pg_stat_activity WHERE {ours}", "postgres"))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and how many seconds it takes."""
    began = time.monotonic()
    return call(), time.monotonic() - began


def moments(first: float, whole: float) -> list[float]:
    """Return five moments from the first one that matters to the end: with two playbooks that is ten."""
    return [first + (whole - first) * (number + CHANCE.random()) / 5 for number in range(5)]


def test_kills_at_five_moments_of_a_run_that_fails_leave_the_old_or_the_new_database_and_a_way_back(
    ready: Deployment,
) -> None:
    """From the window to the end of the automatic rollback: ansible-playbook, its modules, pg_dump and pg_restore."""
    filled(ready)
    before = content(ready)
    ready.migration("902_wrong.sql", WRONG)
    confirmed = {"rollback_confirm": ready.database, "rollback_accept_data_loss": True}
    run, whole = timed(lambda: ready.play("migrate.yml", runbook_run_id="whole"))
    assert "taken back to the backup" in run.output, run.output
    assert content(ready) == before
    wrong = content(ready, f"{ready.database}_failed_whole")
    assert "\tslug-7\t" in before
    assert "\tslug-7\t" not in wrong
    for number, seconds in enumerate(moments(whole * 0.25, whole)):
        run_id = f"dies{number}"
        killed_after(ready, seconds, "migrate.yml", runbook_run_id=run_id)
        names = ready.databases()
        assert ready.database in names
        now = content(ready)
        if f"{ready.database}_failed_{run_id}" in names:
            assert content(ready, f"{ready.database}_failed_{run_id}") == wrong
            assert now == before
        elif now != before:
            assert now == wrong
            run = ready.play("rollback.yml", runbook_run_id=f"mends{number}", **confirmed)
            assert run.rc == 0, run.output
            assert content(ready) == before
            with ready.connect(user="app"):
                pass
    run, seconds = timed(lambda: ready.play("migrate.yml", runbook_run_id="last"))
    assert "taken back to the backup" in run.output, run.output
    assert seconds < 5 * whole
    assert content(ready) == before
    assert [name for name in ready.databases() if "_restore_" in name] == []
    with ready.connect(user="app"):
        pass


def test_kills_at_five_moments_of_a_rollback_leave_the_old_or_the_new_database_and_the_next_mends_it(
    ready: Deployment,
) -> None:
    filled(ready)
    before = content(ready)
    assert ready.play("backup.yml", runbook_run_id="first").rc == 0
    ready.query("DELETE FROM tenants WHERE slug LIKE '%7' RETURNING 1")
    after = content(ready)
    confirmed = {"rollback_confirm": ready.database, "rollback_accept_data_loss": True}
    run, whole = timed(lambda: ready.play("rollback.yml", runbook_run_id="whole", **confirmed))
    assert run.rc == 0, run.output
    assert content(ready) == before
    swap_back(ready, "whole")
    for number, seconds in enumerate(moments(whole * 0.3, whole)):
        run_id = f"dies{number}"
        killed_after(ready, seconds, "rollback.yml", runbook_run_id=run_id, **confirmed)
        names = ready.databases()
        assert ready.database in names
        if f"{ready.database}_failed_{run_id}" in names:
            assert content(ready) == before
            assert content(ready, f"{ready.database}_failed_{run_id}") == after
            swap_back(ready, run_id)
        else:
            assert content(ready) == after
    run, seconds = timed(lambda: ready.play("rollback.yml", runbook_run_id="last", **confirmed))
    assert run.rc == 0, run.output
    assert seconds < 5 * whole
    assert content(ready) == before
    assert ready.databases() == [ready.database, f"{ready.database}_failed_last"]
    with ready.connect(user="app"):
        pass


def swap_back(deployment: Deployment, run_id: str) -> None:
    """Bring back the state before a rollback."""
    with deployment.connect("postgres") as server:
        server.execute(f"DROP DATABASE {deployment.database} WITH (FORCE)")
        server.execute(f"ALTER DATABASE {deployment.database}_failed_{run_id} RENAME TO {deployment.database}")
