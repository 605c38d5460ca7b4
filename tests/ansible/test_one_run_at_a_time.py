"""Two runs of one database: refused before the window in one play, and from job to job wherever they could meet."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

from tests.ansible.test_killed import kill, start
from tests.support import wait_until

if TYPE_CHECKING:
    from tests.ansible.conftest import Deployment

PENDING = "CREATE TABLE two (id int);\nALTER TABLE two ENABLE ROW LEVEL SECURITY;\n"
APPLIED = "SELECT to_regclass('public.two') IS NOT NULL"


def may_connect(deployment: Deployment) -> bool:
    """Tell whether the application may connect."""
    try:
        deployment.connect(user="app").close()
    except psycopg.OperationalError:
        return False
    return True


def test_two_hosts_of_a_play_that_are_one_database_are_refused(ready: Deployment) -> None:
    ready.migration("102_two.sql", PENDING)
    inventory = json.loads(ready.inventory.read_text())
    hosts = inventory["settler_database"]["hosts"]
    ((name, host),) = hosts.items()
    hosts["alias"] = {**host, "runbook_connection": {**host["runbook_connection"], "login_host": "localhost"}}
    ready.inventory.write_text(json.dumps(inventory))
    before = ready.dump()

    run = ready.play("migrate.yml")
    assert run.rc != 0
    told = " ".join(run.output.split())
    assert f"{name} and alias are one database" in told
    assert f"alias and {name} are one database" in told
    assert ready.dump() == before
    assert may_connect(ready)
    assert ready.play("migrate.yml", "--limit localhost,alias", verify_unexpected="ignore").rc == 0


def test_run_does_not_open_its_window_while_another_one_is_at_work(ready: Deployment) -> None:
    ready.migration("102_two.sql", PENDING)
    with psycopg.connect(ready.cluster.conninfo(ready.database), application_name="runbook:other:backup"):
        run = ready.play("migrate.yml")
    assert run.rc != 0
    assert "another run is at work in this database" in run.output
    assert "runbook:other:backup" in run.output
    assert "Change | Let the application in again" not in run.changed()
    assert ready.query(APPLIED) == [(False,)]
    assert may_connect(ready)


@pytest.mark.parametrize("what", ["GRANT", "REVOKE"])
def test_run_whose_window_another_one_took_over_applies_nothing(ready: Deployment, what: str) -> None:
    """Between two steps of a run there is no session to be seen, so the other one comes in; the first one finds out."""
    ready.migration("102_two.sql", PENDING)
    backups = ready.folder / "inventory" / "backups" / ready.database
    with ready.connect() as blocker:
        blocker.execute("BEGIN")
        blocker.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")  # keeps the first run in its backup
        process = start(ready, "migrate.yml")
        wait_until(lambda: list(backups.glob(".*.partial")))
        with ready.connect("postgres") as other:
            change = sql.SQL("{} CONNECT ON DATABASE {} {} {}").format(
                sql.SQL(what),
                sql.Identifier(ready.database),
                sql.SQL("TO" if what == "GRANT" else "FROM"),
                sql.Identifier(f"{ready.prefix}_app"),
            )
            other.execute(change)
    assert process.wait() != 0
    assert ready.query(APPLIED) == [(False,)]
    assert may_connect(ready) is (what == "GRANT")  # as the other one has left it

    run = ready.play("migrate.yml", verify_unexpected="ignore")
    assert run.rc == 0, run.output
    assert ready.query(APPLIED) == [(True,)]
    assert may_connect(ready)


def test_window_of_a_killed_run_is_taken_over_at_once(ready: Deployment) -> None:
    ready.migration("102_two.sql", PENDING)
    backups = ready.folder / "inventory" / "backups" / ready.database
    with ready.connect() as blocker:
        blocker.execute("BEGIN")
        blocker.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        process = start(ready, "migrate.yml")
        wait_until(lambda: list(backups.glob(".*.partial")))
        kill(process)
    assert not may_connect(ready)
    run = ready.play("migrate.yml", verify_unexpected="ignore")
    assert run.rc == 0, run.output
    assert may_connect(ready)
