"""A server whose write-ahead log goes to a real pgBackRest, for the tests of modules and of playbooks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.support import wait_until
from tools import apt
from tools.account import Account
from tools.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Archived:
    """A server whose write-ahead log goes to pgBackRest."""

    cluster: Cluster
    folder: Path
    config: Path

    def run(self, *command: str) -> str:
        """Run a command as the account of the server."""
        done = Account.for_server().run(list(command))
        assert done.returncode == 0, done.stdout
        return done.stdout

    def pgbackrest(self, command: str, *options: str) -> str:
        return self.run("pgbackrest", f"--config={self.config}", "--stanza=main", *options, command)

    def go_back(self, command: str) -> None:
        """Do as the report says: stop the server, run the command, start the server, wait until it is open."""
        self.stop()
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602
        assert done.returncode == 0, done
        self.start()
        wait_until(lambda: self.query("SELECT pg_is_in_recovery()") == [(False,)])

    def start(self) -> None:
        """Start the server, and tell pgBackRest its port: another server may have taken the old one meanwhile."""
        state = self.cluster.up()
        self.config.write_text(
            f"[global]\nrepo1-path={self.folder}/repo\nrepo1-retention-full=1\nlock-path={self.folder}/lock\n"
            "log-level-file=off\nstart-fast=y\ncompress-type=lz4\narchive-timeout=120\n"
            f"[main]\npg1-path={self.cluster.data}\npg1-port={state.port}\npg1-socket-path={state.socket}\n",
            encoding="utf-8",
        )

    def stop(self) -> None:
        self.run(f"{self.cluster.state.bin}/pg_ctl", "stop", "-D", str(self.cluster.data), "-m", "fast", "-w")

    def query(self, query: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        with psycopg.connect(self.cluster.conninfo(database), autocommit=True) as session:
            cursor = session.execute(query)
            return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def archived_server() -> Iterator[Archived]:
    """Yield a server with a stanza, made as pgBackRest's guide says; pgbackrest is Debian's."""
    if shutil.which("pgbackrest") is None:
        assert apt.usable(), "pgbackrest is missing, and only root can install it: apt-get install pgbackrest"
        apt.install("pgbackrest")
    account = Account.for_server()
    folder = Path(tempfile.mkdtemp(prefix=f"settler-pgbackrest-{os.getpid()}-", dir="/tmp"))
    folder.chmod(0o711)
    cluster = Cluster(folder / "cluster", fsync=False, port=26001)
    try:
        config = folder / "pgbackrest.conf"
        made = Archived(cluster, folder, config)
        made.start()
        for name in ("repo", "lock"):
            (folder / name).mkdir(mode=0o700)
            account.own(folder / name)
        hba = cluster.data / "pg_hba.conf"
        hba.write_text("local all postgres trust\n" + hba.read_text(encoding="utf-8"), encoding="utf-8")
        made.query(
            f"ALTER SYSTEM SET archive_command = 'pgbackrest --config={config} --stanza=main archive-push %p'",
        )
        made.query("ALTER SYSTEM SET archive_mode = on")
        made.stop()
        made.start()
        made.pgbackrest("stanza-create")
        yield made
    finally:
        cluster.down()
        shutil.rmtree(folder)
