"""Deployments to run the real playbooks against: a database of its own, its roles, an inventory, and ansible-runner."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import shutil
import socket
import subprocess
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ansible_runner
import psycopg
import pytest
from psycopg import sql

from tests.support import free_port
from tools import apt, generate, inventory, legacy, project

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.cluster import Cluster

_numbers = itertools.count(1)


@dataclass
class Run:
    """What a playbook run came to."""

    rc: int
    output: str
    events: list[dict[str, Any]]
    folder: Path

    def changed(self) -> list[str]:
        """Return the names of the tasks that changed something, or in check mode would."""
        return [
            event["event_data"]["task"]
            for event in self.events
            if event["event"] == "runner_on_ok" and event["event_data"]["res"].get("changed")
        ]

    def tasks(self, role: str) -> list[str]:
        """Return the names of the tasks of a role that ran."""
        return [
            event["event_data"]["task"]
            for event in self.events
            if event["event"] == "runner_on_ok" and event["event_data"].get("role") == role
        ]


@dataclass
class Deployment:
    """A database deployment: an inventory, a copy of sql/ that a test may change, ways to look into the database."""

    cluster: Cluster
    database: str
    prefix: str  # of its roles
    folder: Path
    sql: Path
    inventory: Path
    number: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def play(self, playbook: str, *options: str, **variables: Any) -> Run:
        """Run a playbook as AWX does: through ansible-runner, from the project's folder."""
        folder = self.folder / f"run{next(self.number)}"
        folder.mkdir()
        done = ansible_runner.run(
            private_data_dir=str(folder),
            project_dir=str(project.ROOT),
            playbook=f"playbooks/{playbook}",
            inventory=str(self.inventory),
            extravars=variables,
            cmdline=" ".join(options),
            envvars=project.environment(),
            settings={"suppress_env_files": True},
            quiet=True,
            cancel_callback=lambda: False,  # without one, runner takes Ctrl-C and SIGTERM for itself
        )
        return Run(done.rc, (Path(done.config.artifact_dir) / "stdout").read_text(), list(done.events), folder)

    def connect(self, database: str | None = None, user: str | None = None) -> psycopg.Connection[Any]:
        """Connect as the superuser, or as one of the deployment's roles: C(app) or C(migrator)."""
        name = database or self.database
        if user is None:
            return psycopg.connect(self.cluster.conninfo(name), autocommit=True)
        password = {"app": "application", "migrator": "migrator"}[user] + f" of {self.prefix}"
        return psycopg.connect(self.cluster.conninfo(name, f"{self.prefix}_{user}", password), autocommit=True)

    def query(self, query: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """Return the rows of a query, run as the superuser."""
        with self.connect(database) as connection:
            return connection.execute(query).fetchall()

    def make_legacy(self) -> dict[str, int]:
        """Make the database as an old installation script did, as the superuser; return its row counts."""
        with self.connect("postgres") as server:
            server.execute(f"CREATE DATABASE {self.database} TEMPLATE template0 ENCODING UTF8 LOCALE 'C.UTF-8'")
        with self.connect() as connection:
            legacy.create(connection, "oldest")
            generate.fill(connection, shape="oldest", rows=2000, seed=7)
        return self.row_counts()

    def row_counts(self) -> dict[str, int]:
        """Return the row counts of all tables outside the ledger."""
        names = self.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")
        count = "SELECT count(*) FROM {}"
        return {name: self.query(count.format(name))[0][0] for (name,) in names}

    def dump(self, *options: str) -> str:
        """Return the database as pg_dump writes it, without the token that differs each time."""
        command = [f"{self.cluster.state.bin}/pg_dump", *options, self.cluster.conninfo(self.database)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return "\n".join(line for line in text.splitlines() if "restrict" not in line)

    def dump_without_events(self) -> str:
        """Return the dump without the events of the ledger, which a failure adds to."""
        text = self.dump("--exclude-table-data=runbook.events")
        return "\n".join(line for line in text.splitlines() if "events_id_seq'" not in line)

    def migration(self, name: str, text: str) -> Path:
        """Write a migration."""
        path = self.sql / "migrations" / name
        path.write_text(text, encoding="utf-8")
        return path

    def databases(self) -> list[str]:
        """Return the names of the databases that belong to the deployment."""
        rows = self.query("SELECT datname FROM pg_database ORDER BY 1", "postgres")
        return [name for (name,) in rows if name == self.database or name.startswith(f"{self.database}_")]


@pytest.fixture
def deployment(cluster: Cluster, tmp_path: Path) -> Iterator[Deployment]:
    """Yield a deployment whose database and roles do not exist yet."""
    with _deployment(cluster, tmp_path) as made:
        yield made


@pytest.fixture
def oddly_named(cluster: Cluster, tmp_path: Path) -> Iterator[Deployment]:
    """Yield a deployment that is not there yet, whose name shells, YAML, SQL and file systems read otherwise.

    No percent sign and no double quote: community.postgresql does not write them as a part of the name.
    """
    with _deployment(cluster, tmp_path, ending=" ü it's; $x/y #1") as made:
        yield made


@pytest.fixture
def ready(cluster: Cluster, tmp_path: Path, _set_up: str) -> Iterator[Deployment]:
    """Yield a deployment that setup.yml has made: a copy of one, because that takes a tenth of the time."""
    with _deployment(cluster, tmp_path, copy_of=_set_up) as made:
        yield made


@pytest.fixture
def taken_over(cluster: Cluster, tmp_path: Path, _legacy: str) -> Iterator[Deployment]:
    """Yield a legacy deployment that create_database.yml has taken over, likewise a copy."""
    with _deployment(cluster, tmp_path, copy_of=_legacy) as made:
        yield made


@pytest.fixture(scope="session")
def _set_up(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _deployment(cluster, tmp_path_factory.mktemp("set_up")) as made:
        run = made.play("setup.yml")
        assert run.rc == 0, run.output
        yield made.database


@pytest.fixture(scope="session")
def _legacy(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _deployment(cluster, tmp_path_factory.mktemp("legacy")) as made:
        made.make_legacy()
        run = made.play("create_database.yml", create_database_adopt_from=["postgres"])
        assert run.rc == 0, run.output
        yield made.database


@contextlib.contextmanager
def _deployment(cluster: Cluster, folder: Path, copy_of: str | None = None, ending: str = "") -> Iterator[Deployment]:
    """Yield a deployment, whose database's name may have an ending; afterwards nothing of it is left on the server."""
    prefix = copy_of or f"settler_play_{next(_numbers)}"
    database = f"settler_play_{next(_numbers)}" if copy_of else prefix + ending
    shutil.copytree(project.ROOT / "sql", folder / "sql")
    hosts = inventory.write(
        folder / "inventory",
        cluster,
        database,
        runbook_sql_directory=str(folder / "sql"),
        runbook_owner_role=f"{prefix}_owner",
        runbook_migrator_role=f"{prefix}_migrator",
        runbook_app_role=f"{prefix}_app",
        runbook_migrator_password=f"migrator of {prefix}",
        runbook_app_password=f"application of {prefix}",
        migrate_accept_copy=copy_of is not None,
    )
    made = Deployment(cluster, database, prefix, folder, folder / "sql", hosts)
    if copy_of:
        with made.connect("postgres") as server:
            server.execute(f"CREATE DATABASE {database} TEMPLATE {copy_of} OWNER {prefix}_owner")
            server.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
            server.execute(f"GRANT CONNECT ON DATABASE {database} TO {prefix}_migrator, {prefix}_app")
    try:
        yield made
    finally:
        with made.connect("postgres") as server:
            for name in made.databases():
                server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
            for role in ("app", "migrator", "owner") if not copy_of else ():
                server.execute(f"DROP ROLE IF EXISTS {prefix}_{role}")


@dataclass
class Bastion:
    """A host that is reached over ssh, whose Python has psycopg and no pglast."""

    port: int
    key: Path
    known_hosts: Path
    python: Path

    def variables(self) -> dict[str, str | int]:
        """Return the variables of a host in the inventory that stand for it."""
        return {
            "ansible_connection": "ssh",
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": getpass.getuser(),
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.known_hosts} -o IdentitiesOnly=yes -F /dev/null",
            "ansible_python_interpreter": str(self.python),
        }


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a virtual environment whose Python has psycopg, and no pglast."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    ours = Path(psycopg.__file__).parent.parent
    for name in ("psycopg", "psycopg_binary", "psycopg_binary.libs", "typing_extensions.py", "yaml"):
        (site / name).symlink_to(ours / name)
    for module, rc in {"psycopg": 0, "pglast": 1}.items():
        assert (
            subprocess.run([python, "-c", f"import {module}"], stderr=subprocess.DEVNULL, check=False).returncode == rc
        )
    return python


@pytest.fixture(scope="session")
def bastion(tmp_path_factory: pytest.TempPathFactory, bare_python: Path) -> Iterator[Bastion]:
    """Yield a host behind an ssh server of our own, on 127.0.0.1, with keys made for it."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None:
        with apt.no_services():
            apt.install("openssh-server")
        server = "/usr/sbin/sshd"
    folder = tmp_path_factory.mktemp("bastion")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    port = free_port()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "StrictModes": "no",  # the folder of the tests lies in /tmp
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd leaves its rights
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server, "-D", "-e", "-f", str(folder / "config")], stderr=log)
        try:
            _wait_for_port(port, process, folder / "log")
            yield Bastion(port, folder / "user", folder / "known_hosts", bare_python)
        finally:
            process.terminate()
            process.wait()


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server listens."""
    while True:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
