"""The real playbooks with encrypted backups, copies off the host, and a restore on another host."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tools import apt

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ansible.conftest import Deployment


@dataclass(frozen=True)
class Keys:
    """A pair of age keys: the text of the public one, the file of the private one."""

    public: str
    private: Path

    @property
    def secret(self) -> bytes:
        """Return what may be in no other file."""
        return self.private.read_bytes().splitlines()[-1]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Return a pair of keys; age and rclone are Debian's."""
    missing = [program for program in ("age", "rclone") if shutil.which(program) is None]
    if missing:
        assert apt.usable(), f"{missing} are missing, and only root can install them: apt-get install age rclone"
        apt.install("age", "rclone")
    private = tmp_path_factory.mktemp("keys") / "age.key"
    subprocess.run(["age-keygen", "--output", private], check=True, capture_output=True)
    public = subprocess.run(["age-keygen", "-y", private], check=True, capture_output=True, text=True).stdout.strip()
    return Keys(public, private)


def backups(deployment: Deployment) -> list[Path]:
    return sorted((deployment.folder / "inventory" / "backups" / deployment.database).glob("[!.]*"))


def test_a_failed_change_is_taken_back_by_its_own_encrypted_backup(ready: Deployment, keys: Keys) -> None:
    ready.migration("902_wrong.sql", "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY;\nDELETE FROM matches;\n")
    before = ready.dump_without_events(), ready.row_counts()
    encrypted = {"backup_encryption": "age", "backup_recipients": [keys.public]}

    refused = ready.play("migrate.yml", **encrypted)
    assert refused.rc != 0
    assert "neither rollback_identity nor backup_snapshot" in refused.output
    assert refused.tasks("maintenance") == []
    assert backups(ready) == []

    run = ready.play("migrate.yml", "-vvv", "--diff", **encrypted, rollback_identity=str(keys.private))
    assert run.rc != 0
    assert (ready.dump_without_events(), ready.row_counts()) == before, run.output
    with ready.connect(user="app"):
        pass
    (backup,) = backups(ready)
    assert {path.suffix for path in backup.rglob("*") if path.is_file()} == {".age", ".json"}
    kept = [path for path in ready.folder.rglob("*") if path.is_file()]
    assert len(kept) > 50
    assert [path for path in kept if keys.secret in path.read_bytes()] == []
    assert [path.name for path in backup.parent.iterdir() if path.name not in (".lock", backup.name)] == []


def test_an_encrypted_backup_is_proven_by_a_drill_with_the_key_only(ready: Deployment, keys: Keys) -> None:
    second = ready.folder / "second"
    second.mkdir()
    away = {"backup_copy_to": [str(second)]}
    assert ready.play("backup.yml", backup_encryption="age", backup_recipients=[keys.public], **away).rc == 0
    (backup,) = backups(ready)

    closed = ready.play("restore_drill.yml")
    assert closed.rc != 0
    assert "rollback_identity" in closed.output
    assert not (backup / "proven.json").exists()

    run = ready.play("restore_drill.yml", rollback_identity=str(keys.private), **away)
    assert run.rc == 0, run.output
    proof = json.loads((backup / "proven.json").read_text(encoding="utf-8"))
    assert json.loads((second / ready.database / backup.name / "proven.json").read_text(encoding="utf-8")) == proof
    assert (proof["counts_match"], proof["fingerprints_match"], proof["verified"]) == (True, True, True)
    assert ready.query("SELECT detail ->> 'backup' FROM runbook.events ORDER BY id DESC LIMIT 1") == [(str(backup),)]
    assert ready.databases() == [ready.database]
    assert [path.name for path in backup.parent.iterdir() if path.name not in (".lock", backup.name)] == []


def test_a_snapshot_leads_back_where_nobody_has_the_key(ready: Deployment, keys: Keys) -> None:
    ready.migration("902_wrong.sql", "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY;\nDELETE FROM matches;\n")
    before = ready.dump_without_events(), ready.row_counts()

    run = ready.play("migrate.yml", backup_encryption="age", backup_recipients=[keys.public], backup_snapshot=True)

    assert run.rc != 0
    assert "taken back to the snapshot" in run.output, run.output
    assert "and has its catalogue of then" in run.output
    assert (ready.dump_without_events(), ready.row_counts()) == before
    with ready.connect(user="app"):
        pass


def test_a_copy_that_is_there_is_not_made_again(ready: Deployment, keys: Keys) -> None:
    second = ready.folder / "second"
    second.mkdir()
    again = {"runbook_run_id": "same", "backup_copy_to": [str(second)]}
    assert ready.play("backup.yml", **again).rc == 0
    before = {path: path.stat().st_mtime_ns for path in second.rglob("*")}

    run = ready.play("backup.yml", **again)
    assert run.rc == 0, run.output
    assert run.changed() == []
    assert {path: path.stat().st_mtime_ns for path in second.rglob("*")} == before

    manifest = second / ready.database / "same" / "manifest.json"
    manifest.unlink()  # as a run that was killed leaves it
    run = ready.play("backup.yml", **again)
    assert run.rc == 0, run.output
    assert run.changed() == ["Copy the backup off the host"]
    assert manifest.exists()


def test_a_backup_is_fetched_and_restored_on_another_host(ready: Deployment, keys: Keys) -> None:
    second = ready.folder / "second"
    second.mkdir()
    made = ready.play(
        "backup.yml", backup_encryption="age", backup_recipients=[keys.public], backup_copy_to=[str(second)]
    )
    assert made.rc == 0, made.output
    assert "compared by checksum" in made.output
    ready.query("INSERT INTO tenants (name, slug) VALUES ('Late', 'late') RETURNING id")
    elsewhere = {"runbook_backup_directory": str(ready.folder / "other host"), "rollback_fetch_from": str(second)}
    confirmed = {"rollback_confirm": ready.database, "rollback_accept_data_loss": True}

    shown = ready.play("rollback.yml", "--check", **elsewhere)
    assert shown.rc == 0, shown.output
    assert "check mode ends here" in shown.output
    assert not (ready.folder / "other host").exists()

    done = ready.play("rollback.yml", **elsewhere, **confirmed, rollback_identity=str(keys.private))
    assert done.rc == 0, done.output
    assert ready.query("SELECT count(*) FROM tenants WHERE slug = 'late'") == [(0,)]


def test_a_copy_that_is_required_stops_the_change_and_one_that_is_not_warns(ready: Deployment, keys: Keys) -> None:
    ready.migration("902_two.sql", "CREATE TABLE two (id int);\nALTER TABLE two ENABLE ROW LEVEL SECURITY;\n")
    before = ready.dump()
    missing = {"backup_copy_to": [str(ready.folder / "unmounted")], "verify_unexpected": "ignore"}

    red = ready.play("migrate.yml", **missing)
    assert red.rc != 0
    assert "the backup itself is whole" in red.output
    assert "the database is as it was" in red.output
    assert ready.dump() == before
    with ready.connect(user="app"):
        pass

    green = ready.play("migrate.yml", **missing, backup_copy_required=False)
    assert green.rc == 0, green.output
    assert "no such folder" in green.output
    assert ready.query("SELECT count(*) FROM two") == [(0,)]
