"""The real playbooks, run as AWX runs them, against a real server."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml

from tools import project

if TYPE_CHECKING:
    from tests.ansible.conftest import Deployment


def test_setup_makes_a_verified_database_and_a_second_run_changes_nothing(deployment: Deployment) -> None:
    first = deployment.play("setup.yml")
    assert first.rc == 0, first.output
    assert "and verified" in first.output
    assert deployment.query("SELECT file FROM runbook.migrations ORDER BY 1")[0] == ("001_initial_schema.sql",)

    second = deployment.play("setup.yml")
    assert second.rc == 0, second.output
    assert second.changed() == []


def test_setup_lets_the_application_work_and_keeps_public_out(ready: Deployment) -> None:
    tenant = ready.query("INSERT INTO tenants (name, slug) VALUES ('One', 'one') RETURNING id")[0][0]
    with ready.connect(user="app") as app:
        app.execute("SELECT set_config('app.current_tenant_id', %s, false)", [str(tenant)])
        app.execute("INSERT INTO users (tenant_id, email, password_hash) VALUES (%s, 'a@example.org', 'x')", [tenant])
        assert app.execute("SELECT email FROM users").fetchall() == [("a@example.org",)]
        for forbidden in ("CREATE TABLE mine (id int)", "SELECT * FROM runbook.migrations", "DROP TABLE users"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                app.execute(forbidden)
    public = "SELECT FROM pg_database, aclexplode(datacl) WHERE datname = current_database() AND grantee = 0"
    assert ready.query(public) == []


def test_setup_in_check_mode_on_a_fresh_server_shows_the_plan_and_writes_nothing(deployment: Deployment) -> None:
    run = deployment.play("setup.yml", "--check", "--diff")
    assert run.rc == 0, run.output
    assert "001_initial_schema.sql" in run.output
    assert deployment.databases() == []
    assert deployment.query(f"SELECT FROM pg_roles WHERE rolname LIKE '{deployment.database}%'", "postgres") == []


def test_setup_refuses_a_database_with_tables(deployment: Deployment) -> None:
    counts = deployment.make_legacy()
    run = deployment.play("setup.yml")
    assert run.rc != 0
    assert "playbooks/migrate.yml" in run.output
    assert deployment.row_counts() == counts


def test_a_legacy_database_is_migrated_and_keeps_every_row(taken_over: Deployment) -> None:
    before = taken_over.row_counts()
    run = taken_over.play("migrate.yml")
    assert run.rc == 0, run.output
    after = taken_over.row_counts()
    assert {name: after[name] for name in before} == before
    assert len(after) == 28
    assert taken_over.query("SELECT count(*) FROM jobs WHERE tenant_id IS NULL") == [(0,)]

    second = taken_over.play("migrate.yml")
    assert second.rc == 0, second.output
    assert second.changed() == []
    assert "nothing to do" in second.output
    assert "Dump the database with its proof" not in second.tasks("backup")  # only old snapshots are looked for


def test_optional_partitions_are_made_verified_and_backed_up(ready: Deployment) -> None:
    ready.query("INSERT INTO audit_logs (event) VALUES ('before') RETURNING id")
    run = ready.play("migrate.yml", migrate_optional=["table_partitions"], verify_unexpected="fail")
    assert run.rc == 0, run.output
    assert ready.query("SELECT event, tableoid::regclass::text FROM audit_logs") == [
        ("before", "partitions.audit_logs_history")
    ]
    wrong = ready.play("verify.yml", verify_unexpected="ignore")
    assert wrong.rc != 0, "the expectation without the folder is another one"
    assert ready.play("backup.yml", migrate_optional=["table_partitions"]).rc == 0


def test_a_legacy_database_whose_tables_belong_to_others_is_refused_with_the_way_out(deployment: Deployment) -> None:
    deployment.make_legacy()
    refused = deployment.play("create_database.yml")
    assert refused.rc != 0
    assert "create_database_adopt_from" in refused.output

    schema = deployment.dump()
    assert deployment.play("migrate.yml").rc != 0
    assert deployment.dump() == schema


def test_an_error_in_the_last_statement_leaves_the_database_byte_for_byte(taken_over: Deployment) -> None:
    path = taken_over.sql / "migrations" / "001_initial_schema.sql"
    good = path.read_text(encoding="utf-8")
    path.write_text(good + "\nALTER TABLE jobs\n  ADD COLUMN broken no_such_type;\n", encoding="utf-8")
    line = good.count("\n") + 3
    before = taken_over.dump(), taken_over.row_counts()

    run = taken_over.play("migrate.yml")

    assert run.rc != 0
    assert f"001_initial_schema.sql:{line}: type" in run.output
    assert "42704" in run.output
    assert "nothing was committed" in run.output
    assert (taken_over.dump(), taken_over.row_counts()) == before
    with taken_over.connect(user="app"):
        pass  # the window is closed again

    path.write_text(good, encoding="utf-8")
    assert taken_over.play("migrate.yml").rc == 0


def test_an_error_in_a_later_file_takes_nothing_but_itself_back(ready: Deployment) -> None:
    ready.migration("101_bad.sql", "CREATE TABLE two (id int);\nINSERT INTO two VALUES ('no number');\n")
    before = ready.dump_without_events()

    run = ready.play("migrate.yml")

    assert run.rc != 0
    assert "101_bad.sql:2" in run.output
    assert ready.dump_without_events() == before
    event = ready.query("SELECT event, file, detail ->> 'sqlstate' FROM runbook.events ORDER BY id DESC LIMIT 1")
    assert event == [("failed", "101_bad.sql", "22P02")]


def test_a_failed_verification_takes_a_committed_change_back(ready: Deployment) -> None:
    ready.migration("101_wrong.sql", "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY;\nDELETE FROM matches;\n")
    before = ready.dump_without_events(), ready.row_counts()

    run = ready.play("migrate.yml", runbook_run_id="20260101t000000-test")

    assert run.rc != 0
    assert "public.jobs" in run.output
    assert "taken back to the backup" in run.output
    assert (ready.dump_without_events(), ready.row_counts()) == before
    failed = f"{ready.database}_failed_20260101t000000_test"
    assert failed in ready.databases()
    assert ready.query("SELECT count(*) FROM matches", failed) == [(0,)]
    with ready.connect(user="app"):
        pass


def test_the_application_is_kept_out_while_the_change_runs(ready: Deployment) -> None:
    ready.migration(
        "101_look.sql",
        "CREATE TABLE seen AS SELECT has_database_privilege("
        f"'{ready.prefix}_app', current_database(), 'CONNECT') AS app_may_connect;\n"
        "ALTER TABLE seen ENABLE ROW LEVEL SECURITY;\n",
    )
    with ready.connect(user="app") as app:
        run = ready.play("migrate.yml")
        assert run.rc == 0, run.output
        with pytest.raises(psycopg.OperationalError):
            app.execute("SELECT 1")
    assert ready.query("SELECT app_may_connect FROM seen") == [(False,)]
    with ready.connect(user="app"):
        pass


def test_rollback_refuses_without_its_confirmations_and_then_goes_back(ready: Deployment) -> None:
    assert ready.play("backup.yml").rc == 0
    ready.query("INSERT INTO tenants (name, slug) VALUES ('Late', 'late') RETURNING id")
    before = ready.row_counts()

    unconfirmed = ready.play("rollback.yml")
    assert unconfirmed.rc != 0
    assert f"rollback_confirm={ready.database}" in unconfirmed.output
    losing = ready.play("rollback.yml", rollback_confirm=ready.database)
    assert losing.rc != 0
    assert "public.tenants: +1 rows" in losing.output
    assert ready.row_counts() == before

    done = ready.play("rollback.yml", rollback_confirm=ready.database, rollback_accept_data_loss="true")
    assert done.rc == 0, done.output
    assert ready.query("SELECT count(*) FROM tenants WHERE slug = 'late'") == [(0,)]
    assert ready.play("verify.yml").rc == 0


def test_check_mode_of_every_playbook_writes_nothing(ready: Deployment) -> None:
    assert ready.play("backup.yml").rc == 0
    ready.migration("101_two.sql", "CREATE TABLE two (id int);\n")
    kept = ready.folder / "inventory"
    before = ready.dump(), ready.databases(), sorted(kept.rglob("*"))
    names = [
        "adopt",
        "backup",
        "create_database",
        "fleet",
        "maintenance",
        "migrate",
        "repair",
        "restore_drill",
        "rollback",
        "status",
        "verify",
    ]
    own: dict[str, dict[str, Any]] = {
        "adopt": {"migrate_baseline": "005"},
        "fleet": {"migrate_databases": [ready.database]},
        "repair": {"repair_file": "001_initial_schema.sql", "repair_reason": "a try", "repair_action": "forget"},
    }
    for name in names:
        run = ready.play(f"{name}.yml", "--check", "--diff", **own.get(name, {}))
        assert run.rc == 0, run.output
        assert (ready.dump(), ready.databases(), sorted(kept.rglob("*"))) == before, name
    assert sorted(path.stem for path in project.ROOT.glob("playbooks/*.yml")) == sorted([*names, "guard", "setup"])


def test_only_the_plan_that_was_shown_is_applied(ready: Deployment) -> None:
    ready.migration("101_two.sql", "CREATE TABLE two (id int);\n")
    shown = ready.play("migrate.yml", "--check")
    assert shown.rc == 0, shown.output
    found = re.search(r"-e migrate_expected_plan=([0-9a-f]{64})", shown.output)
    assert found
    digest = found[1]
    assert f"plan {digest}" in shown.output
    assert f"plan {digest}" in ready.play("status.yml").output
    ready.migration("102_three.sql", "CREATE TABLE three (id int);\n")
    run = ready.play("migrate.yml", migrate_expected_plan=digest)
    assert run.rc != 0
    assert "this is not the plan that was approved" in run.output
    (ready.sql / "migrations" / "102_three.sql").unlink()
    assert ready.play("migrate.yml", migrate_expected_plan=digest).rc == 0


def test_changed_file_is_accepted_by_repair_with_a_reason(ready: Deployment) -> None:
    first = ready.migration("101_two.sql", "CREATE TABLE two (id int);\nALTER TABLE two ENABLE ROW LEVEL SECURITY;\n")
    assert ready.play("migrate.yml", verify_unexpected="ignore").rc == 0
    first.write_text("-- why it is there\n" + first.read_text())
    refused = ready.play("migrate.yml", verify_unexpected="ignore")
    assert refused.rc != 0
    assert "playbooks/repair.yml" in refused.output
    assert ready.play("repair.yml", repair_file="101_two.sql").rc != 0
    run = ready.play("repair.yml", repair_file="101_two.sql", repair_reason="a comment only")
    assert run.rc == 0, run.output
    assert "101_two.sql: checksum" in run.output
    assert ready.play("migrate.yml", verify_unexpected="ignore").rc == 0


def test_a_migration_that_changes_data_unasked_is_taken_back(ready: Deployment) -> None:
    tenant = ready.query("INSERT INTO tenants (name, slug) VALUES ('One', 'one') RETURNING id")[0][0]
    file = ready.migration("101_two.sql", "UPDATE tenants SET name = lower(name);\n")
    run = ready.play("migrate.yml")
    assert run.rc != 0
    assert "public.tenants.name" in run.output
    assert f"changed: {tenant}" in run.output
    assert "-- runbook: changes=tenants.name" in run.output
    assert ready.query("SELECT name FROM tenants") == [("One",)]

    file.write_text("-- runbook: changes=tenants.name\n" + file.read_text())
    run = ready.play("migrate.yml")
    assert run.rc == 0, run.output
    assert "data of " in run.output
    assert ready.query("SELECT name FROM tenants") == [("one",)]


def test_a_long_migration_is_not_silent(ready: Deployment) -> None:
    ready.migration("101_long.sql", "CREATE TABLE two (id int);\nSELECT pg_sleep(7);\nDROP TABLE two;\n")
    run = ready.play("migrate.yml")
    assert run.rc == 0, run.output
    assert "… 101_long.sql (1 of 1): statement 2 of 3, line 2, " in run.output
    assert any("101_long.sql (1 of 1)" in event.get("stdout", "") for event in run.events)


def test_status_tells_what_is_applied_pending_connected_and_backed_up(ready: Deployment) -> None:
    assert ready.play("backup.yml").rc == 0
    ready.migration("101_two.sql", "CREATE TABLE two (id int);\n")
    with ready.connect(user="app"):
        run = ready.play("status.yml")
    assert run.rc == 0, run.output
    assert run.changed() == []
    for told in ("001_initial_schema.sql", "101_two.sql", f"1 of {ready.prefix}_app", "1 pending"):
        assert told in run.output
    for told in ("(0.0 h ago)", "rows,", "not proven"):
        assert told in run.output
    backup = next((ready.folder / "inventory" / "backups" / ready.database).glob("[!.]*"))
    next((backup / "dump").glob("*.dat*")).unlink()
    assert f"{backup.name}  damaged: " in ready.play("status.yml").output


def test_status_of_a_database_that_does_not_exist(deployment: Deployment) -> None:
    run = deployment.play("status.yml", runbook_connection="{{ runbook_admin_connection }}")
    assert run.rc == 0, run.output
    assert "does not exist: playbooks/setup.yml makes it" in run.output


def test_a_report_of_the_run_is_written_for_its_owner_only(ready: Deployment) -> None:
    assert ready.play("migrate.yml", runbook_run_id="run-1").rc == 0
    path = ready.folder / "inventory" / "reports" / f"test-{ready.database}-run-1.json"
    report = json.loads(path.read_text())
    assert [phase["name"] for phase in report["phases"]] == ["preflight", "verify"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_inventory_without_the_group_ends_red(deployment: Deployment) -> None:
    deployment.inventory.write_text(json.dumps({"others": {"hosts": {"somebody": {}}}}))
    run = deployment.play("migrate.yml")
    assert run.rc != 0
    assert "no host in group settler_database" in run.output


def test_a_limit_to_a_host_outside_the_group_ends_red(deployment: Deployment) -> None:
    inventory = json.loads(deployment.inventory.read_text())
    inventory["others"] = {"hosts": {"somebody": {}}}
    deployment.inventory.write_text(json.dumps(inventory))
    run = deployment.play("migrate.yml", "--limit", "somebody")
    assert run.rc != 0
    assert "--limit leaves no host of group settler_database" in run.output


def test_another_environment_than_expected_ends_red(deployment: Deployment) -> None:
    run = deployment.play("migrate.yml", runbook_expected_environment="prod")
    assert run.rc != 0
    assert "expected was prod" in run.output


@pytest.mark.parametrize("password", ["", "CHANGE_ME", "your_secure_password"])
def test_placeholders_for_a_password_are_refused(deployment: Deployment, password: str) -> None:
    run = deployment.play("migrate.yml", runbook_migrator_password=password)
    assert run.rc != 0
    assert "placeholder" in run.output


def test_no_secret_is_printed_kept_or_logged(deployment: Deployment) -> None:
    """Everything that a run prints at -vvv, keeps, or makes the server log."""
    with deployment.connect("postgres") as server:
        server.execute("ALTER SYSTEM SET log_statement = 'all'")
        server.execute("SELECT pg_reload_conf()")
    try:
        deployment.make_legacy()
        runs = [
            deployment.play("create_database.yml", "-vvv", "--diff", create_database_adopt_from=["postgres"]),
            deployment.play("migrate.yml", "-vvv", "--diff"),
            deployment.play(
                "rollback.yml",
                "-vvv",
                "--diff",
                rollback_confirm=deployment.database,
                rollback_accept_data_loss=True,
            ),
        ]
    finally:
        with deployment.connect("postgres") as server:
            server.execute("ALTER SYSTEM RESET log_statement")
            server.execute("SELECT pg_reload_conf()")
    assert [run.rc for run in runs] == [0, 0, 0], "\n".join(run.output for run in runs)
    secrets = [
        f"migrator of {deployment.database}".encode(),
        f"application of {deployment.database}".encode(),
        deployment.cluster.state.password.encode(),
    ]
    hosts = deployment.inventory
    kept = [path for path in deployment.folder.rglob("*") if path.is_file() and path != hosts]
    assert len(kept) > 100
    for secret in secrets:
        assert [str(path) for path in kept if secret in path.read_bytes()] == []
        assert secret not in deployment.cluster.log_file.read_bytes()


@pytest.mark.parametrize("environment", ["staging", "prod"])
def test_an_inventory_without_its_secrets_ends_red_before_it_connects(environment: str, deployment: Deployment) -> None:
    deployment.inventory = project.ROOT / "inventories" / environment
    for playbook in ("migrate.yml", "setup.yml"):
        run = deployment.play(playbook)
        assert run.rc != 0
        assert f"In {environment} they come from the environment" in run.output
        assert "cannot connect" not in run.output


def test_all_inventories_have_the_same_keys() -> None:
    keys = {}
    for environment in ("local", "staging", "prod"):
        folder = project.ROOT / "inventories" / environment / "group_vars" / "settler_database"
        variables = yaml.safe_load((folder / "main.yml").read_text())
        keys[environment] = {
            name: sorted(value) if isinstance(value, dict) else None for name, value in variables.items()
        }
    assert keys["local"] == keys["staging"] == keys["prod"]
