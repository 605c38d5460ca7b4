"""migrate.yml on a server that pgBackRest backs up: what fails after a commit is for an operator, who is told how."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.ansible.conftest import _deployment
from tests.pgbackrest import Archived, archived_server
from tools.account import Account

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def archived() -> Iterator[Archived]:
    with archived_server() as made:
        yield made


def test_a_failed_change_stays_closed_and_the_command_leads_back(archived: Archived, tmp_path: Path) -> None:
    with _deployment(archived.cluster, tmp_path) as deployment:
        assert deployment.play("setup.yml").rc == 0
        functions = "FUNCTION pg_create_restore_point(text), pg_switch_wal()"
        with deployment.connect() as server:
            server.execute(f"GRANT EXECUTE ON {functions} TO {deployment.prefix}_migrator")
            server.execute("INSERT INTO tenants (name, slug) VALUES ('Ours', 'ours')")
        deployment.migration("902_wrong.sql", "UPDATE tenants SET name = 'Theirs';\n")
        before = deployment.dump_without_events()

        run = deployment.play(
            "migrate.yml",
            backup_method="pgbackrest",
            backup_pgbackrest_config=str(archived.config),
            backup_pgbackrest_account=Account.for_server().name,
        )
        assert run.rc != 0
        assert "public.tenants.name" in run.output, "nothing was compared with the data before"
        assert "THE ROLLBACK FAILED" in run.output
        (path,) = (deployment.folder / "inventory" / "backups" / deployment.database).glob("[!.]*/manifest.json")
        command = json.loads(path.read_text())["restore_command"]
        assert run.output.count(command) >= 2, run.output  # beside the backup, and as what to do next
        with pytest.raises(psycopg.OperationalError):
            deployment.connect(user="app")

        archived.go_back(command)
        opened = deployment.play("maintenance.yml")
        assert opened.rc == 0, opened.output
        with deployment.connect(user="app"):
            pass
        assert deployment.dump_without_events() == before
        assert deployment.play("verify.yml").rc == 0
