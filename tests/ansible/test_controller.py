"""What the controller does for a host: it parses where the host cannot, and shows progress over any connection."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools import project
from tools.schema import files_of

if TYPE_CHECKING:
    from tests.ansible.conftest import Bastion, Deployment

FILES = {
    "102_two.sql": "CREATE TABLE two (id int PRIMARY KEY, done bool);\nALTER TABLE two ENABLE ROW LEVEL SECURITY;\n"
    "INSERT INTO two SELECT generate_series(1, 500);\n",
    "102_two.verify.sql": "SELECT 'too few' WHERE (SELECT count(*) FROM two) < 500;\n",
    "103_fill.batch.sql": "-- runbook: batch-table=public.two batch-key=id\n"
    "UPDATE two SET done = true WHERE id BETWEEN :from AND :to;\n",
    "104_index.sql": "-- runbook: no-transaction\nCREATE INDEX CONCURRENTLY two_done ON two (done);\n",
    "R__view.sql": "CREATE OR REPLACE VIEW twos WITH (security_invoker = false) AS SELECT count(*) FROM two;\n",
}


@pytest.fixture(params=["local", "ssh"])
def bare(request: pytest.FixtureRequest, ready: Deployment) -> dict[str, Any]:
    """Return the variables of a host whose Python has no pglast, on this machine or behind ssh."""
    if request.param == "ssh":
        bastion: Bastion = request.getfixturevalue("bastion")
        return bastion.variables()
    return {"ansible_python_interpreter": str(request.getfixturevalue("bare_python"))}


def on(deployment: Deployment, variables: dict[str, Any]) -> None:
    """Have the deployment's modules run elsewhere."""
    inventory = json.loads(deployment.inventory.read_text())
    (host,) = inventory["settler_database"]["hosts"].values()
    host.update(variables)
    deployment.inventory.write_text(json.dumps(inventory))


def result_of(run: Any, task: str) -> dict[str, Any]:
    """Return the result of a task."""
    return next(
        event["event_data"]["res"]
        for event in run.events
        if event["event"] in ("runner_on_ok", "runner_on_failed") and event["event_data"]["task"] == task
    )


def without_advice(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a plan says of each file, but for squawk's advice, which takes squawk on the host."""
    return [{**one, "advice": [], "text": []} for one in plan["applied"]]


def test_host_without_the_parser_is_migrated_as_one_with_it(ready: Deployment, bare: dict[str, Any]) -> None:
    for name, text in FILES.items():
        ready.migration(name, text)
    expected = result_of(ready.play("migrate.yml", "--check", "--diff"), "Plan | Compare files and ledger")
    on(ready, bare)

    plan = result_of(ready.play("migrate.yml", "--check", "--diff"), "Plan | Compare files and ledger")
    assert without_advice(plan) == without_advice(expected)
    status = ready.play("status.yml")
    assert status.rc == 0, status.output
    assert "CREATE INDEX" in status.output or "104_index.sql" in status.output

    there = set(Path("/var/tmp").glob("runbook-progress-*"))
    run = ready.play("migrate.yml", "-vvv", verify_unexpected="ignore")
    assert run.rc == 0, run.output
    assert ready.query("SELECT count(*) FROM two WHERE done") == [(500,)]
    assert ready.query("SELECT indisvalid FROM pg_index WHERE indexrelid = 'two_done'::regclass") == [(True,)]
    applied = result_of(run, "Apply what is pending")["applied"]
    assert [one["file"] for one in applied] == [name for name in sorted(FILES) if ".verify." not in name]
    assert "INSERT INTO two SELECT" not in run.output  # no file's text is told, not even to one who wants it all
    assert set(Path("/var/tmp").glob("runbook-progress-*")) <= there  # of other runs, or of killed ones


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("102_bad.sql", "CREATE TABLE two (id int);\nCOMMIT;\n", "102_bad.sql:2: transaction control: COMMIT"),
        ("102_bad.sql", "CREATE TABLE two (id int);\nDROP TABLE jobs;\n", "drop-table"),
        ("102_bad.verify.sql", "SET search_path = x;\n", "no question"),
    ],
)
def test_what_an_engine_refuses_is_refused_alike(
    ready: Deployment, bare_python: Path, name: str, text: str, told: str
) -> None:
    ready.migration("102_bad.sql", "CREATE TABLE two (id int);\n")
    path = ready.migration(name, text)
    on(ready, {"ansible_python_interpreter": str(bare_python)})
    run = ready.play("migrate.yml")
    assert run.rc != 0
    assert told in run.output
    assert str(path) in run.output or told == "drop-table"
    assert ready.query("SELECT to_regclass('two')") == [(None,)]


def test_statement_newer_than_the_grammar_is_warned_of_alike(ready: Deployment, bare_python: Path) -> None:
    ready.migration("102_new.sql", "SELECT 1 NEWER THAN THE GRAMMAR;\n")
    on(ready, {"ansible_python_interpreter": str(bare_python)})
    run = ready.play("migrate.yml")
    assert run.rc != 0
    warnings = result_of(run, "Apply what is pending")["warnings"]
    assert any("102_new.sql:1: " in one and "the statement is sent unchecked" in one for one in warnings), warnings


def test_fleet_is_parsed_once_for_all_its_databases(ready: Deployment, bare_python: Path) -> None:
    ready.migration("102_two.sql", FILES["102_two.sql"])
    ready.migration("103_three.sql", "CREATE TABLE three (id int);\nALTER TABLE three ENABLE ROW LEVEL SECURITY;\n")
    other = f"{ready.database}_other"
    with ready.connect("postgres") as server:
        server.execute(f"CREATE DATABASE {other} TEMPLATE {ready.database} OWNER {ready.prefix}_owner")
    on(ready, {"ansible_python_interpreter": str(bare_python)})
    run = ready.play("fleet.yml", migrate_databases=[ready.database, other])
    assert run.rc == 0, run.output
    for database in (ready.database, other):
        assert ready.query("SELECT to_regclass('three') IS NOT NULL", database) == [(True,)]


def test_baseline_is_proved_by_files_that_the_controller_parsed(ready: Deployment, bare_python: Path) -> None:
    with ready.connect() as connection:
        connection.execute("DROP SCHEMA runbook CASCADE")
    on(ready, {"ansible_python_interpreter": str(bare_python)})
    run = ready.play("adopt.yml", migrate_baseline="005")
    assert run.rc == 0, run.output
    files = [name for (name,) in ready.query("SELECT file FROM runbook.migrations ORDER BY 1")]
    assert files == sorted(file.file for file in files_of() if file.version)


def test_no_parser_on_either_side_names_both(ready: Deployment, bare_python: Path, tmp_path: Path) -> None:
    ready.migration("102_two.sql", FILES["102_two.sql"])
    on(ready, {"ansible_python_interpreter": str(bare_python)})
    (tmp_path / "without").mkdir()
    (tmp_path / "without/pglast.py").write_text("raise ImportError('not here')\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "playbooks/migrate.yml", "-i", ready.inventory],
        cwd=project.ROOT,
        env={**project.environment(), "PYTHONPATH": str(tmp_path / "without")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    told = " ".join((done.stdout + done.stderr).split())
    assert f"({bare_python}), for test-{ready.database}, and on the controller" in told
    assert "nothing was changed" in told
    assert ready.query("SELECT to_regclass('two')") == [(None,)]


def test_a_thousand_files_are_parsed_for_a_host_behind_ssh(ready: Deployment, bastion: Bastion) -> None:
    for number in range(1000, 2000):
        ready.migration(f"{number:04}_x.sql", f"CREATE TABLE x{number} (id int, note text DEFAULT '{'x' * 200}');\n")
    on(ready, bastion.variables())
    run = ready.play("migrate.yml", "--check")
    assert run.rc == 0, run.output
    assert len(result_of(run, "Plan | Compare files and ledger")["applied"]) == 1000


def test_progress_is_shown_live_over_ssh(ready: Deployment, bastion: Bastion) -> None:
    ready.migration("102_one.sql", "CREATE TABLE two (id int);\n")
    ready.migration("103_long.sql", "SELECT 1;\nSELECT pg_sleep(12);\nDROP TABLE two;\n")
    on(ready, bastion.variables())
    there = set(Path("/var/tmp").glob("runbook-progress-*"))
    seen_while_asleep: list[bool] = []

    def look() -> None:
        stdout = ready.folder / "run1" / "artifacts"
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(12)%' AND state = 'active'"
        while not seen_while_asleep:
            told = any("(2 of 2): statement 2 of 3" in path.read_text() for path in stdout.glob("*/stdout"))
            if told:
                seen_while_asleep.append(ready.query(asleep) == [(1,)])
            time.sleep(0.1)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    run = ready.play("migrate.yml", verify_unexpected="ignore")
    assert run.rc == 0, run.output
    thread.join(5)
    assert "… 103_long.sql (2 of 2): statement 2 of 3, line 2, " in run.output
    verbose = [event["stdout"] for event in run.events if event["event"] == "verbose"]
    assert any("103_long.sql (2 of 2): statement 2 of 3" in line for line in verbose)
    assert seen_while_asleep == [True]
    assert set(Path("/var/tmp").glob("runbook-progress-*")) <= there


def test_check_mode_is_quiet(ready: Deployment, bastion: Bastion) -> None:
    ready.migration("102_one.sql", "CREATE TABLE two (id int);\n")
    on(ready, bastion.variables())
    run = ready.play("migrate.yml", "--check", "-vvv")
    assert run.rc == 0, run.output
    assert "runbook-progress-" not in run.output
    assert "    … " not in run.output
