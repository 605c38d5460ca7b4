"""A run that is killed: the next one finds out from the database what was in progress, and succeeds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tools import project

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.ansible.conftest import Deployment


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for a condition to be true; return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {condition}")


def start(deployment: Deployment, playbook: str) -> subprocess.Popen[bytes]:
    """Start a playbook in a process group of its own."""
    return subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            f"playbooks/{playbook}",
            "-i",
            str(deployment.inventory),
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
    wait_for(lambda: ready.query(sleeping))
    kill(process)

    wait_for(lambda: not ready.query(sleeping), seconds=10)  # the server notices that its client is gone
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
        wait_for(lambda: list(backups.glob(".*.partial")))
        kill(process)
    assert [path.name for path in backups.iterdir() if not path.name.startswith(".")] == []

    run = ready.play("backup.yml")
    assert run.rc == 0, run.output
    assert list(backups.glob(".*.partial")) == []
    assert len([path for path in backups.iterdir() if path.is_dir()]) == 1
