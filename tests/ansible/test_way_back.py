"""The way back of a run: by its snapshot, by a proven backup; what is kept of it; a rollback that fails itself."""

from __future__ import annotations

import json
import re
import shlex
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql

from tests.ansible.test_killed import kill, start
from tests.support import throw_away_cluster, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ansible.conftest import Deployment, Run

RUN = "20260101t000000-test"
WRONG = "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY;\nDELETE FROM matches;\n"


def diagnostics(deployment: Deployment) -> Path:
    return deployment.folder / "inventory" / "backups" / ".diagnostics" / deployment.database / RUN


def without_pg_restore(deployment: Deployment) -> str:
    """Return a folder of client programs of which pg_restore always fails."""
    folder = deployment.folder / "broken"
    folder.mkdir()
    for program in ("pg_dump", "pg_restore"):
        real = f"{deployment.cluster.state.bin}/{program}"
        text = f'#!/bin/sh\n[ "$1" = --version -o {program} = pg_dump ] && exec "{real}" "$@"\nexit 1\n'
        (folder / program).write_text(text, encoding="utf-8")
        (folder / program).chmod(0o755)
    return str(folder)


def verified_again(run: Run) -> list[str]:
    """Return how the verifications after a rollback ended."""
    phases = [
        event["event_data"]["res"]["ansible_facts"]["runbook"]["phases"]
        for event in run.events
        if event["event"] == "runner_on_ok" and "runbook" in event["event_data"]["res"].get("ansible_facts", {})
    ][-1]
    after = [phase["name"] for phase in phases].index("rollback")
    return [phase["state"] for phase in phases[after:] if phase["name"] == "verify"]


def test_a_failed_run_is_taken_back_by_its_snapshot_and_leaves_what_an_investigation_needs(ready: Deployment) -> None:
    ready.migration("902_wrong.sql", WRONG)
    secret = f"migrator of {ready.prefix}"
    before = ready.dump_without_events(), ready.row_counts()

    run = ready.play("migrate.yml", runbook_run_id=RUN, backup_snapshot=True)

    assert run.rc != 0
    assert f"swap in the snapshot {ready.database}_snapshot_20260101t000000_test" in run.output
    assert "taken back to the snapshot" in run.output
    assert verified_again(run) == ["ok"]
    assert (ready.dump_without_events(), ready.row_counts()) == before
    assert ready.query("SELECT relrowsecurity FROM pg_class WHERE relname = 'jobs'") == [(True,)]
    failed = f"{ready.database}_failed_20260101t000000_test"
    assert ready.databases() == [ready.database, failed]
    assert ready.query("SELECT count(*) FROM matches", failed) == [(0,)]
    event = "SELECT event, detail ->> 'method' FROM runbook.events ORDER BY id DESC LIMIT 1"
    assert ready.query(event) == [("rolled_back", "snapshot")]
    with ready.connect(user="app"):
        pass

    folder = diagnostics(ready)
    assert folder.stat().st_mode & 0o777 == 0o700
    kept = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert set(kept) >= {
        "error.txt", "plan.json", "ledger.json", "sessions.json", "settings.json", "sizes.json", "versions.json",
    }  # fmt: skip
    assert "public.jobs" in kept["error.txt"]
    assert "902_wrong.sql" in {row["file"] for row in json.loads(kept["ledger.json"])["migrations"]}
    assert json.loads(kept["plan.json"])[0]["file"] == "902_wrong.sql"
    assert "server_log" in json.loads(kept["left_out.json"]) or "server_log.txt" in kept
    assert str(folder) in run.output
    for name, text in kept.items():
        for known in (secret, f"application of {ready.prefix}", ready.cluster.state.password, "SCRAM-SHA-256$"):
            assert known not in text, name


def test_who_stood_in_the_way_is_kept_with_the_diagnostics(ready: Deployment) -> None:
    ready.migration("902_wide.sql", "ALTER TABLE jobs ADD wide int;\n")
    with ready.connect(user="migrator") as blocker:
        blocker.execute("BEGIN; SET application_name = 'nightly report'; SELECT count(*) FROM jobs")
        run = ready.play("migrate.yml", runbook_run_id=RUN, migrate_lock_attempts=2, migrate_lock_timeout=0.5)
        pid = blocker.info.backend_pid
    assert run.rc != 0
    assert "nothing was committed, the database is as it was" in run.output
    (told,) = json.loads((diagnostics(ready) / "failed.json").read_text(encoding="utf-8"))["blockers"]
    assert (told["pid"], told["application_name"]) == (pid, "nightly report")
    assert "SELECT count(*) FROM jobs" in told["query"]
    sessions = json.loads((diagnostics(ready) / "sessions.json").read_text(encoding="utf-8"))
    assert [one["application"] for one in sessions if one["pid"] == pid] == ["nightly report"]
    assert f"pid {pid}" in (diagnostics(ready) / "error.txt").read_text(encoding="utf-8")


def test_a_snapshot_stays_for_its_time_and_a_later_run_drops_it(ready: Deployment) -> None:
    ready.migration(
        "902_two.sql", "CREATE TABLE two (id int PRIMARY KEY);\nALTER TABLE two ENABLE ROW LEVEL SECURITY;\n"
    )
    keep = {"backup_snapshot": True, "verify_unexpected": "ignore", "migrate_require_proven_backup": True}

    run = ready.play("migrate.yml", runbook_run_id=RUN, backup_snapshot_keep_hours=0.0, **keep)

    assert run.rc == 0, run.output
    assert ready.databases() == [ready.database]
    events = ready.query("SELECT event, detail ->> 'rows' IS NOT NULL FROM runbook.events WHERE event = 'proven'")
    assert events == [("proven", True)]
    ready.migration("903_three.sql", "ALTER TABLE two ADD three int;\n")
    run = ready.play(
        "migrate.yml", runbook_run_id="20260102t000000-test", **{**keep, "migrate_require_proven_backup": False}
    )
    assert run.rc == 0, run.output
    name = f"{ready.database}_snapshot_20260102t000000_test"
    assert ready.databases() == [ready.database, name]

    told = ready.play("status.yml").output
    assert f"{name}  20" in told
    assert "(0.0 h ago)" in told
    assert "stays 24.0 h" in told
    with ready.connect("postgres") as server:  # a day later
        (comment,) = server.execute(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", [name]
        ).fetchone() or ("",)
        passed = sql.Literal(comment.replace('"keep_hours": 24.0', '"keep_hours": 0.0'))
        server.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(sql.Identifier(name), passed))
    ready.migration("904_four.sql", "ALTER TABLE two ADD four int;\n")
    run = ready.play("migrate.yml", verify_unexpected="ignore")  # without a snapshot of its own
    assert run.rc == 0, run.output
    assert ready.databases() == [ready.database]


@pytest.mark.parametrize("playbook", ["migrate.yml", "backup.yml"])
def test_a_snapshot_whose_time_has_passed_goes_with_a_run_that_changes_nothing(
    ready: Deployment, playbook: str
) -> None:
    ready.migration("902_two.sql", "CREATE TABLE two (id int);\nALTER TABLE two ENABLE ROW LEVEL SECURITY;\n")
    run = ready.play("migrate.yml", backup_snapshot=True, backup_snapshot_keep_hours=0.001, verify_unexpected="ignore")
    assert run.rc == 0, run.output
    time.sleep(3.6)
    run = ready.play(playbook, verify_unexpected="ignore")
    assert run.rc == 0, run.output
    assert ready.databases() == [ready.database]


def test_a_drill_proves_the_newest_backup_and_a_damaged_one_lets_no_run_begin(ready: Deployment) -> None:
    assert ready.play("backup.yml", runbook_run_id=RUN).rc == 0
    backup = ready.folder / "inventory" / "backups" / ready.database / RUN

    run = ready.play("restore_drill.yml")

    assert run.rc == 0, run.output
    proof: dict[str, Any] = json.loads((backup / "proven.json").read_text(encoding="utf-8"))
    assert (proof["counts_match"], proof["fingerprints_match"], proof["catalogue_match"]) == (True, True, True)
    assert proof["verified"]
    assert proof["minutes"] > 0
    assert ready.databases() == [ready.database]
    event = "SELECT event, detail ->> 'backup' FROM runbook.events ORDER BY id DESC LIMIT 1"
    assert ready.query(event) == [("proven", str(backup))]

    ready.migration("902_two.sql", "CREATE TABLE two (id int PRIMARY KEY);\n")
    run = ready.play("migrate.yml", migrate_require_proven_backup=True, backup_method="pgbackrest")
    assert run.rc != 0
    assert "which backup_method pgbackrest cannot; nothing was changed" in " ".join(run.output.split())
    run = ready.play("migrate.yml", migrate_require_proven_backup=True, runbook_client_bin=without_pg_restore(ready))
    assert run.rc != 0
    assert "the change did not start" in run.output
    assert ready.query("SELECT to_regclass('public.two')") == [(None,)]
    assert ready.databases() == [ready.database]
    with ready.connect(user="app"):
        pass


def test_what_is_wrong_after_a_rollback_is_told_and_keeps_nobody_out(ready: Deployment) -> None:
    with ready.connect() as server:
        server.execute("CREATE POLICY open ON jobs USING (true)")
    ready.migration("902_wrong.sql", WRONG)
    before = ready.dump_without_events()

    run = ready.play("migrate.yml", runbook_run_id=RUN)

    assert run.rc != 0
    assert "taken back to the backup" in run.output
    assert verified_again(run) == ["failed"]
    assert "of the database as it was before:" in run.output
    assert ready.dump_without_events() == before
    with ready.connect(user="app"):
        pass


def test_a_drill_on_another_server_proves_the_backup_here(ready: Deployment) -> None:
    assert ready.play("backup.yml", runbook_run_id=RUN).rc == 0
    with throw_away_cluster(fsync=False, port=25103) as other:
        state = other.state
        with psycopg.connect(other.conninfo("postgres"), autocommit=True) as server:
            for role in ("owner", "app"):
                server.execute(f"CREATE ROLE {ready.prefix}_{role}")
            migrator = f"{ready.prefix}_migrator LOGIN CREATEDB PASSWORD 'elsewhere'"
            server.execute(f"CREATE ROLE {migrator} IN ROLE {ready.prefix}_owner, {ready.prefix}_app")
        there = {
            "login_host": state.host, "login_port": state.port, "login_user": f"{ready.prefix}_migrator",
            "login_password": "elsewhere",
        }  # fmt: skip
        run = ready.play("restore_drill.yml", drill_connection=there)
        assert run.rc == 0, run.output
        with psycopg.connect(other.conninfo("postgres")) as server:
            left = server.execute("SELECT datname FROM pg_database WHERE NOT datistemplate").fetchall()
        assert left == [("postgres",)]
    backup = ready.folder / "inventory" / "backups" / ready.database / RUN
    assert json.loads((backup / "proven.json").read_text(encoding="utf-8"))["verified"]
    event = "SELECT event, detail ->> 'backup' FROM runbook.events ORDER BY id DESC LIMIT 1"
    assert ready.query(event) == [("proven", str(backup))]
    assert ready.databases() == [ready.database]


def test_what_the_rollback_could_not_bring_back_is_refused_before_the_window(ready: Deployment) -> None:
    name = sql.Identifier(ready.database)
    with ready.connect() as server:
        server.execute(sql.SQL("ALTER DATABASE {} SET log_min_duration_statement = 5000").format(name))
        server.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    ready.migration("902_two.sql", "CREATE TABLE two (id int PRIMARY KEY);\n")
    before = ready.dump_without_events()

    for snapshot, told in ((False, 2), (True, 1)):
        run = ready.play("migrate.yml", backup_snapshot=snapshot)
        assert run.rc != 0
        assert f"{told} of " in run.output, run.output
        assert "log_min_duration_statement" in run.output
        assert ready.dump_without_events() == before
    assert not (ready.folder / "inventory" / "backups").exists()
    assert ready.play("backup.yml").rc == 0

    with ready.connect() as server:
        server.execute(sql.SQL("ALTER DATABASE {} RESET log_min_duration_statement").format(name))
    run = ready.play("migrate.yml", backup_snapshot=True)
    assert run.rc == 0, run.output
    assert "publication everything" in run.output


def test_a_rollback_that_fails_drops_nothing_keeps_the_application_out_and_says_what_to_do(ready: Deployment) -> None:
    ready.migration("902_wrong.sql", WRONG)

    run = ready.play("migrate.yml", runbook_run_id=RUN, runbook_client_bin=without_pg_restore(ready))

    assert run.rc != 0
    assert "THE ROLLBACK FAILED. Nothing was dropped, the application is kept out" in run.output
    assert f"rollback_confirm={ready.database}" in run.output
    assert "playbooks/maintenance.yml" in run.output
    assert ready.query("SELECT count(*) FROM matches") == [(0,)]
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        ready.connect(user="app")
    assert "public.jobs" in (diagnostics(ready) / "error.txt").read_text(encoding="utf-8")

    backup = ready.folder / "inventory" / "backups" / ready.database / RUN
    run = ready.play(
        "rollback.yml", rollback_confirm=ready.database, rollback_accept_data_loss="true", rollback_backup=str(backup)
    )
    assert run.rc == 0, run.output
    assert ready.query("SELECT relrowsecurity FROM pg_class WHERE relname = 'jobs'") == [(True,)]
    with ready.connect(user="app"):
        pass


def test_a_run_id_that_was_used_before_takes_no_old_backup(ready: Deployment) -> None:
    """What the application wrote between the two runs is in no backup of the first one."""
    ready.migration("902_wrong.sql", "SELECT 1 / 0;\n")
    assert ready.play("migrate.yml", runbook_run_id=RUN).rc != 0
    before = ready.row_counts()
    with ready.connect() as server:
        server.execute("INSERT INTO tenants (name, slug) VALUES ('since', 'since')")
    ready.migration("902_wrong.sql", WRONG)

    run = ready.play("migrate.yml", runbook_run_id=RUN)

    assert run.rc != 0
    assert f"the run id {RUN} has been used before: there is a backup in " in run.output
    assert "the change did not start; the database is as it was" in run.output
    assert {table: rows for table, rows in ready.row_counts().items() if rows != before[table]} == {
        "tenants": before["tenants"] + 1
    }
    with ready.connect(user="app"):
        pass
    assert "has been used before" in (diagnostics(ready) / "error.txt").read_text(encoding="utf-8")


def test_a_slip_in_a_variable_of_verification_is_found_before_the_window(ready: Deployment) -> None:
    """Afterwards it would look as if the change had failed, and a good one would be taken back."""
    ready.migration("902_two.sql", "CREATE TABLE two (id int);\n")
    run = ready.play("migrate.yml", verify_unexpected="ignor")
    assert run.rc != 0
    assert "value of verify_unexpected must be one of" in run.output
    assert "Change | Keep the application out" not in run.output
    assert ready.query("SELECT to_regclass('public.two')") == [(None,)]
    assert ready.databases() == [ready.database]


def test_a_rollback_by_hand_keeps_what_an_investigation_needs(ready: Deployment) -> None:
    assert ready.play("backup.yml").rc == 0
    assert ready.play("rollback.yml", runbook_run_id=RUN).rc != 0  # it is not confirmed
    assert not diagnostics(ready).exists()

    run = ready.play("rollback.yml", runbook_run_id=RUN, rollback_confirm=ready.database)

    assert run.rc == 0, run.output
    assert str(diagnostics(ready)) in run.output
    assert {"rollback.json", "ledger.json", "sizes.json"} <= {path.name for path in diagnostics(ready).iterdir()}


def test_a_run_killed_in_its_rollback_can_be_taken_back_by_hand(ready: Deployment) -> None:
    ready.migration("902_wrong.sql", WRONG)
    before = ready.row_counts()
    rolling = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'runbook:%:restore'"

    process = start(ready, "migrate.yml")
    wait_until(lambda: ready.query(rolling, "postgres"))
    kill(process)
    wait_until(lambda: not ready.query(rolling, "postgres"), timeout=30)

    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        ready.connect(user="app")
    run = ready.play("rollback.yml", rollback_confirm=ready.database, rollback_accept_data_loss="true")
    assert run.rc == 0, run.output
    assert ready.row_counts() == before
    with ready.connect(user="app"):
        pass


def test_a_database_with_an_odd_name_is_set_up_taken_back_backed_up_and_proven(oddly_named: Deployment) -> None:
    for playbook in ("setup.yml", "backup.yml", "restore_drill.yml", "status.yml"):
        run = oddly_named.play(playbook)
        assert run.rc == 0, run.output
    before = oddly_named.dump_without_events()
    failed = f"{oddly_named.database}_failed_20260101t000000_test"
    oddly_named.migration("902_wrong.sql", WRONG)

    run = oddly_named.play("migrate.yml", runbook_run_id=RUN, backup_snapshot=True)

    assert run.rc != 0
    assert "taken back to the snapshot" in run.output
    assert oddly_named.dump_without_events() == before
    assert oddly_named.databases() == [oddly_named.database, failed]
    (drop,) = re.findall(r"DROP DATABASE .*", run.output)
    with oddly_named.connect("postgres") as server:
        server.execute(drop)
    assert oddly_named.databases() == [oddly_named.database]

    oddly_named.migration("902_wrong.sql", "SELECT 1;\n")
    run = oddly_named.play("migrate.yml")
    assert run.rc == 0, run.output
    (way,) = re.findall(r"the way back: (.*)", run.output)
    words = shlex.split(way)
    assert json.loads(words[-1]) == {"rollback_confirm": oddly_named.database}
    run = oddly_named.play("rollback.yml", rollback_confirm=oddly_named.database, rollback_accept_data_loss=True)
    assert run.rc == 0, run.output
    with oddly_named.connect(user="app"):
        pass
