"""A real pgBackRest with a server of its own: back up, break, and go back by the command that was printed."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.settler.runbook.plugins.module_utils._manifest import read_manifest

from tests.pgbackrest import Archived, archived_server
from tests.support import as_migrator, call_module, login, run_module, wait_until
from tools.account import Account

if TYPE_CHECKING:
    from collections.abc import Iterator

DATABASE = "settler_whole"


@pytest.fixture(scope="module")
def archived() -> Iterator[Archived]:
    with archived_server() as made:
        made.query(f"CREATE DATABASE {DATABASE}")
        made.query("CREATE ROLE settler_login LOGIN PASSWORD 'whole'")
        papers = "CREATE TABLE papers (id int PRIMARY KEY); INSERT INTO papers SELECT generate_series(1, 100)"
        made.query(papers, DATABASE)
        yield made


@pytest.fixture
def arguments(archived, tmp_path) -> dict[str, Any]:
    own = {"directory": str(tmp_path / "backups"), "environment": "test", "stanza": "main", "type": "incr"}
    own |= {"config": str(archived.config), "account": Account.for_server().name, "archive_timeout": 20.0}
    own |= {"set_role": None, "ledger_schema": "runbook", "connect_params": {}, "run_id": "w1"}
    return {**login(archived.cluster, DATABASE), **own}


def back_up(arguments: dict[str, Any], *, check: bool = False, **changes: Any) -> dict[str, Any]:
    return call_module("backup_pgbackrest", arguments | changes, check=check)


def restoring(arguments: dict[str, Any], path: str) -> dict[str, Any]:
    own = {"src": path, "confirm": DATABASE, "accept_data_loss": True, "run_id": "x1", "jobs": 1, "identity": None}
    own |= {"method": "auto", "directory": None, "only_run": "", "allow_foreign": "", "lost_directory": None}
    return {**arguments, **own, "client_bin": None, "progress_file": None}


def test_four_runs_and_back_by_the_command_that_was_printed(archived, arguments, tmp_path):
    assert back_up(arguments, check=True)["changed"] is True
    assert not (tmp_path / "backups").exists()
    made = run_module("backup_pgbackrest", {key: value for key, value in arguments.items() if value is not None})
    assert made["changed"] is True, made
    assert back_up(arguments, check=True)["changed"] is False
    assert back_up(arguments)["changed"] is False

    manifest = read_manifest(Path(made["path"]))
    assert (manifest["method"], manifest["label"][-1]) == ("pgbackrest", "F")  # the first one is a full one
    assert (manifest["label"], manifest["lsn"]) == (made["label"], made["lsn"])
    assert made["label"] in archived.pgbackrest("info")
    (row,) = run_module("backup_info", {"directory": str(tmp_path / "backups"), "database": DATABASE})["backups"]
    assert (row["method"], row["label"], row["error"]) == ("pgbackrest", made["label"], "")

    archived.query("DELETE FROM papers WHERE id > 10; DROP TABLE IF EXISTS late; CREATE TABLE late (id int)", DATABASE)
    refused = call_module("restore", restoring(arguments, made["path"]))
    assert refused["failed"]
    assert "nothing was touched" in refused["msg"]
    assert made["restore_command"] in refused["msg"]
    assert archived.query("SELECT count(*) FROM papers", DATABASE) == [(10,)]

    archived.go_back(made["restore_command"])
    assert archived.query("SELECT count(*), to_regclass('late') FROM papers", DATABASE) == [(100, None)]
    (reached,) = archived.query(f"SELECT pg_current_wal_lsn() >= '{made['lsn']}'", DATABASE)
    assert reached == (True,)

    again = back_up(arguments, run_id="w2", type="diff")  # on the new timeline
    assert (again.get("failed"), again["label"][:16], again["label"][-1]) == (None, made["label"], "D"), again


def test_a_row_of_after_the_backup_but_before_the_restore_point_comes_back(archived, arguments):
    """The restore point counts, not the backup: a run that is continued has a backup from before."""
    archived.pgbackrest("backup", "--type=full", "--annotation=settler-run=w3")
    archived.query("INSERT INTO papers VALUES (1001)", DATABASE)
    made = back_up(arguments, run_id="w3")
    assert made["label"] in archived.pgbackrest("info")
    assert archived.pgbackrest("info").count("full backup") == 1, "the killed run's backup was taken a second time"
    archived.query("INSERT INTO papers VALUES (1002)", DATABASE)
    archived.go_back(made["restore_command"])
    assert archived.query("SELECT id FROM papers WHERE id > 1000", DATABASE) == [(1001,)]


def test_data_that_a_migration_has_changed_is_named(archived, arguments):
    archived.query("CREATE TABLE ledgers (id int PRIMARY KEY, sum int); INSERT INTO ledgers VALUES (1, 10)", DATABASE)
    made = back_up(arguments, run_id="w7")
    assert set(read_manifest(Path(made["path"]))["files"]) == {"keys.json.gz"}
    verify = {**login(archived.cluster, DATABASE), "before": made["path"], "unexpected": "ignore"}
    same = call_module("verify", verify)
    assert (same.get("failed"), same["compared_tables"]) == (None, 2), same
    archived.query("UPDATE ledgers SET sum = 11; DELETE FROM papers WHERE id = 7", DATABASE)
    changed = call_module("verify", verify)
    assert {row["object"] for row in changed["checks"]} == {"public.ledgers.sum", "public.papers"}
    assert "By id: gone: 7." in changed["msg"]

    archived.query("DROP TABLE ledgers; INSERT INTO papers VALUES (7)", DATABASE)
    without = back_up(arguments, run_id="w8", fingerprints=False)
    assert read_manifest(Path(without["path"]))["files"] == {}
    assert "without fingerprints" in call_module("verify", {**verify, "before": without["path"]})["msg"]


def test_a_role_that_does_not_see_all_rows_is_refused_before_anything_is_taken(archived, arguments):
    before = archived.pgbackrest("info")
    archived.query("ALTER TABLE papers ENABLE ROW LEVEL SECURITY; GRANT SELECT ON papers TO settler_login", DATABASE)
    refused = back_up(arguments, run_id="w10", set_role="settler_login")
    archived.query("ALTER TABLE papers DISABLE ROW LEVEL SECURITY", DATABASE)
    assert "sees only a part of the rows of papers" in refused["msg"]
    assert archived.pgbackrest("info") == before


def test_manifests_of_expired_backups_are_removed_and_no_others(archived, arguments, tmp_path):
    old = back_up(arguments, run_id="w4", type="full")
    assert old["changed"], old
    foreign = tmp_path / "backups" / DATABASE / "foreign"
    shutil.copytree(old["path"], foreign)
    (foreign / "manifest.json").write_text("{}", encoding="utf-8")
    new = back_up(arguments, run_id="w5", type="full")  # repo1-retention-full=1
    assert new["pruned"] == [old["path"]]
    assert sorted(path.name for path in foreign.parent.iterdir()) == [".lock", "foreign", "w5"]


def test_a_restore_point_that_is_not_archived_is_no_backup(archived, arguments, tmp_path):
    archived.pgbackrest("backup", "--type=incr", "--annotation=settler-run=w6")
    (command,) = archived.query("SELECT setting FROM pg_settings WHERE name = 'archive_command'", DATABASE)
    try:
        archived.query("ALTER SYSTEM SET archive_command = '/bin/false'", DATABASE)
        archived.query("SELECT pg_reload_conf()", DATABASE)
        wait_until(lambda: archived.query("SHOW archive_command", DATABASE) == [("/bin/false",)])
        failed = back_up(arguments, run_id="w6", archive_timeout=0.5)
    finally:
        archived.query(f"ALTER SYSTEM SET archive_command = '{command[0]}'", DATABASE)
        archived.query("SELECT pg_reload_conf()", DATABASE)
    assert failed["failed"]
    assert "not in pgBackRest's archive" in failed["msg"]
    assert not (tmp_path / "backups" / DATABASE / "w6").exists()
    assert back_up(arguments, run_id="w6")["changed"] is True


def test_what_would_go_wrong_is_said_before_anything_is_taken(
    archived, arguments, cluster, roles, tmp_path, new_database
):
    before = archived.pgbackrest("info")
    mine = login(archived.cluster, DATABASE, "settler_login", "whole")
    refused = back_up(arguments | mine)
    assert "GRANT EXECUTE ON FUNCTION pg_create_restore_point(text), pg_switch_wal() TO settler_login" in refused["msg"]
    assert (
        "does not exist" in back_up(arguments, stanza="other")["msg"]
        or "missing stanza" in back_up(arguments, stanza="other")["msg"]
    )
    assert "no account nobody-at-all" in back_up(arguments, account="nobody-at-all")["msg"]
    other = as_migrator(cluster, roles, new_database())
    assert "archive_mode" in back_up(arguments | other)["msg"]
    archived.query(
        "GRANT EXECUTE ON FUNCTION pg_create_restore_point(text), pg_switch_wal() TO settler_login", DATABASE
    )
    assert back_up(arguments | mine, check=True)["changed"] is True
    assert archived.pgbackrest("info") == before


def test_a_stanza_of_another_server_is_refused(archived, arguments):
    with _other_system(archived) as told:
        refused = back_up(arguments, run_id="w9")
    assert "of another server" in refused["msg"]
    assert told in refused["msg"]


@contextlib.contextmanager
def _other_system(archived: Archived) -> Iterator[str]:
    """Have the repository speak of another system identifier, as one does whose stanza was made for another server."""
    folder = archived.folder / "bin"
    folder.mkdir()
    folder.chmod(0o755)
    (system,) = archived.query("SELECT system_identifier::text FROM pg_control_system()", DATABASE)
    real = shutil.which("pgbackrest")
    (folder / "pgbackrest").write_text(f'#!/bin/sh\n{real} "$@" | sed s/{system[0]}/4711/g\n', encoding="utf-8")
    (folder / "pgbackrest").chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield "4711"
    finally:
        os.environ["PATH"] = before
