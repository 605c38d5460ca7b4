"""A real pgbouncer in front of the server: locks and settings would be a fiction, so nothing is ever begun there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect as engine_connect

from tests.support import as_migrator, free_port, refused, run_module, wait_until, write_migrations
from tools import apt
from tools.account import Account

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PLACES = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"


@pytest.fixture(scope="module")
def pgbouncer() -> str:
    """Return the program, installed from Debian's package where it is missing and that may be done."""
    if shutil.which("pgbouncer", path=_PLACES) is None:
        assert apt.usable(), "pgbouncer is missing, and only root can install it: apt-get install pgbouncer"
        with apt.no_services():
            apt.install("pgbouncer")
    program = shutil.which("pgbouncer", path=_PLACES)
    assert program, "the package pgbouncer has no pgbouncer"
    return program


@pytest.fixture
def pooled(cluster, roles, tmp_path, pgbouncer) -> Iterator[Callable[[str], int]]:
    """Yield what starts a pooler in a mode before the cluster, and returns its port."""
    started: list[subprocess.Popen[bytes]] = []

    def start(mode: str) -> int:
        port = free_port()
        account, folder = Account.for_server(), Path("/tmp") / f"settler-pooler-{os.getpid()}-{mode}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        (folder / "users").write_text(f'"{roles.migrator}" "{roles.migrator_password}"\n', encoding="utf-8")
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={cluster.state.port}\n[pgbouncer]\npool_mode = {mode}\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = plain\n"
            f"auth_file = {folder}/users\nignore_startup_parameters = extra_float_digits\n",
            encoding="utf-8",
        )
        for path in (folder, *folder.iterdir()):
            account.own(path)
        switch = {"user": account.uid, "group": account.gid, "extra_groups": []} if os.geteuid() == 0 else {}
        with (tmp_path / "pgbouncer.log").open("wb") as log:
            started.append(
                subprocess.Popen([pgbouncer, f"{folder}/pgbouncer.ini"], cwd="/", stdout=log, stderr=log, **switch)
            )
        wait_until(lambda: started[-1].poll() is not None or _answers(port))
        assert started[-1].poll() is None, (tmp_path / "pgbouncer.log").read_text()
        return port

    yield start
    for process in started:
        process.kill()
        process.wait()
    for folder in Path("/tmp").glob(f"settler-pooler-{os.getpid()}-*"):
        shutil.rmtree(folder)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_pooler_is_refused_and_nothing_is_begun(cluster, roles, tmp_path, new_database, connect, pooled, mode):
    database = new_database()
    params = {**as_migrator(cluster, roles, database), "login_port": pooled(mode)}
    with psycopg.connect(
        host="127.0.0.1", port=params["login_port"], dbname=database, user=roles.migrator,
        password=roles.migrator_password, prepare_threshold=None,
    ) as plain:  # fmt: skip
        assert plain.execute("SELECT 1").fetchone() == (1,)  # it is the pooler that works, and we that refuse
    for _again in range(3):  # a server connection that is used again may have had a luckier number
        error = refused(engine_connect, params)
        assert "goes through a pooler" in error.message
        assert "Connect to PostgreSQL itself" in error.hint
    folder = tmp_path / "migrations"
    write_migrations(folder, {"001_t.sql": "CREATE TABLE t (i int);"})
    result = run_module("migrate", {**params, "directory": str(folder), "run_id": "r", "set_role": roles.owner})
    assert result["failed"]
    assert "goes through a pooler" in result["msg"]
    with connect(database) as session:
        assert session.execute("SELECT to_regclass('t'), to_regnamespace('runbook')").fetchone() == (None, None)
