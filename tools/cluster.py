"""A private PostgreSQL cluster, for the demo and for the tests. Standard library only.

It lives in one folder, listens on a loopback port and a unix socket of its own, and never has anything to do with
another server. Where the account that runs it cannot reach the folder, as in a clone under /root, the cluster lies in
/var/tmp and a link stands in its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.account import Account
from tools.binaries import Binaries, ensure_binaries
from tools.processes import postmaster_of, servers_of, stop_servers_of
from tools.project import LOCAL, ToolError, environment, remove, write_private

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO_FOLDER = LOCAL / "cluster"
SECRETS_FILE = LOCAL / "secrets.json"
FIRST_PORT = 54329

_HOST = "127.0.0.1"
_SUPERUSER = "postgres"
_PREFIX = "settler-runbook-"
_ELSEWHERE = Path("/var/tmp")  # noqa: S108 - see _private_folder
_SHORT = Path("/tmp")  # noqa: S108 - see _private_folder; $TMPDIR may be as long as the path that we flee from
_LONGEST_SOCKET = 107
_PORT_TAKEN = re.compile(r"could not bind|could not create any TCP/IP sockets|Address already in use")


@dataclass(frozen=True)
class State:
    """How to reach the cluster: what ``<folder>.json`` says.

    ``socket`` is the folder that libpq takes for a host, and ``bin`` the one that has psql and the other clients.
    """

    host: str
    port: int
    socket: str
    user: str
    password: str
    bin: str
    data: str
    major: int


class Cluster:
    """One private cluster at ``directory``. ``up`` and ``down`` work from whatever state they find.

    It runs on the machine's own PostgreSQL, unless ``binaries`` names another one.
    """

    def __init__(
        self, directory: Path, *, fsync: bool = True, port: int | None = None, binaries: Binaries | None = None
    ) -> None:
        self.directory = Path(os.path.abspath(directory))  # noqa: PTH100 - resolve() would follow our own link
        self.state_file = self.directory.with_name(self.directory.name + ".json")
        self._fsync = fsync
        self._first_port = port
        self._binaries = binaries

    @property
    def state(self) -> State:
        """Return how to reach the cluster, which must have been brought up, by this process or by another one."""
        state = self._read_state()
        if state is None:
            raise ToolError(f"there is no cluster at {self.directory}: ./runbook cluster up makes one")
        return state

    @property
    def port(self) -> int:
        """Return the loopback port."""
        return self.state.port

    @property
    def data(self) -> Path:
        """Return the data folder, as PostgreSQL itself sees it."""
        return self.directory.resolve() / "data"

    @property
    def log_file(self) -> Path:
        """Return the server's log."""
        return self.directory / "server.log"

    def conninfo(self, dbname: str, user: str | None = None, password: str | None = None) -> str:
        """Return a libpq connection string: the superuser's with its password, or another user's with the given one."""
        state = self.state
        values: dict[str, object] = {"host": state.host, "port": state.port, "dbname": dbname}
        values["user"] = user or state.user
        if user is None or password is not None:
            values["password"] = state.password if user is None else password
        return " ".join(f"{key}={_quoted(str(value))}" for key, value in values.items())

    def is_running(self) -> bool:
        """Tell whether the server runs and lets us in."""
        state = self._read_state()
        return state is not None and postmaster_of(self.data) is not None and _lets_in(state)

    def up(self) -> State:
        """Bring the cluster up, from nothing or from what earlier runs left, and return when it answers."""
        binaries = self._binaries or ensure_binaries()
        account = Account.for_server()
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._place(account)
            state = self._adopt(binaries)
            if state is None:
                stop_servers_of(self.data)
                if not (self.data.exists() and self._password_file.exists()):
                    self._initialise(binaries, account)
                state = self._start(binaries, account)
            write_private(self.state_file, json.dumps(asdict(state), indent=2) + "\n")
        return state

    def down(self) -> bool:
        """Stop the server and remove all that belongs to it. Return whether there was anything to remove."""
        if not self.directory.parent.exists():
            return False
        with self._alone():
            state = self._read_state()
            folders = {self.directory.resolve(), _private_name(_ELSEWHERE, self.directory)}
            folders |= {_private_name(_SHORT, self.directory)} | ({Path(state.socket)} if state else set())
            existed = False
            for folder in folders:
                stop_servers_of(folder / "data")
                existed |= _remove_folder(folder, own=self.directory)
            remove(self.directory)
            remove(self.state_file)
        return existed

    # Where it lies

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep a second ``up`` or ``down`` waiting. The lock is on the folder around it: it leaves no file."""
        handle = os.open(self.directory.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _place(self, account: Account) -> None:
        """Have a folder, or a link to one elsewhere, that belongs to the account and that it reaches."""
        if self.directory.is_symlink() and not _is_private(self.directory.resolve(), account):
            self.directory.unlink()
        if not os.path.lexists(self.directory):
            if account.reaches(self.directory.parent):
                self.directory.mkdir(mode=0o700)
                account.own(self.directory)
            else:
                self.directory.symlink_to(_private_folder(_ELSEWHERE, self.directory, account))
        if not _is_private(self.directory.resolve(), account) or not account.reaches(self.directory.resolve()):
            raise ToolError(
                f"{self.directory} was made by another account than {account.name}, or cannot be reached by it: "
                "remove that cluster as its owner or as root with ./runbook demo-down, then try again"
            )

    @property
    def _password_file(self) -> Path:
        return self.directory / "password"

    def _socket_folder(self, account: Account) -> Path:
        """Return a folder for the socket whose path is short enough and says the same to libpq as to the server."""
        folder = self.directory.resolve() / "socket"
        if len(os.fsencode(f"{folder}/.s.PGSQL.65535")) > _LONGEST_SOCKET or not re.fullmatch(
            r"[\w./ -]+", str(folder)
        ):
            return _private_folder(_SHORT, self.directory, account)
        folder.mkdir(mode=0o700, exist_ok=True)
        account.own(folder)
        return folder

    # Its life

    def _adopt(self, binaries: Binaries) -> State | None:
        """Return the state of a server that already runs here and lets us in, also if our own file was lost."""
        if postmaster_of(self.data) is None:
            return None
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").split("\n")
            state = self._describe(binaries, port=int(lines[3]), socket_folder=Path(lines[4]))
            return state if _lets_in(state) else None
        return None

    def _initialise(self, binaries: Binaries, account: Account) -> None:
        """Make the data folder under another name: where it has its own name, it is complete."""
        unfinished = self.directory.resolve() / "data.new"
        remove(unfinished)
        remove(self.data)
        _write_for(account, self._password_file, secrets.token_urlsafe(24))
        command = [
            binaries["initdb"], "--pgdata", str(unfinished), "--username", _SUPERUSER, "--auth", "scram-sha-256",
            "--pwfile", str(self._password_file.resolve()), "--encoding", "UTF8", "--no-instructions",
            *([] if self._fsync else ["--no-sync"]),
        ]  # fmt: skip
        result = account.run([*command, "--locale", "C.UTF-8"])
        if "invalid locale" in result.stdout:
            remove(unfinished)
            result = account.run([*command, "--locale", "C"])
        if result.returncode != 0:
            raise ToolError(f"initdb failed:\n{result.stdout.strip()}")
        with (unfinished / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write("\ninclude_if_exists = 'runbook.conf'\n")
        unfinished.rename(self.data)

    def _start(self, binaries: Binaries, account: Account) -> State:
        major = (self.data / "PG_VERSION").read_text(encoding="utf-8").strip()
        if major != str(binaries.major):
            raise ToolError(
                f"{self.directory} was made by PostgreSQL {major}, and {binaries.folder} holds {binaries.major}: "
                "./runbook demo-down removes the old cluster"
            )
        socket_folder = self._socket_folder(account)
        log = self.directory.resolve() / "server.log"
        for port in self._free_ports():
            self._clear_traces(socket_folder)
            _write_for(account, self.data / "runbook.conf", self._configuration(port, socket_folder))
            seen = log.stat().st_size if log.exists() else 0
            command = [binaries["pg_ctl"], "start", "--pgdata", str(self.data), "--log", str(log)]
            result = account.run([*command, "--wait", "--timeout", "60", "--silent"])
            state = self._describe(binaries, port, socket_folder)
            if result.returncode == 0 and _lets_in(state):
                return state
            told = log.read_bytes()[seen:].decode("utf-8", "replace") if log.exists() else result.stdout
            if not _PORT_TAKEN.search(told):
                raise ToolError(f"the private server does not start; {log} says:\n{told[-3000:].strip()}")
        raise ToolError(f"there is no free port on {_HOST} from {FIRST_PORT} up")

    def _free_ports(self) -> Iterator[int]:
        """Yield the port that the cluster had, if it is free, and then those from the first one up."""
        known = self._read_state()
        first = self._first_port or FIRST_PORT
        for port in [*([known.port] if known else []), *range(first, min(first + 1000, 65536))]:
            if _is_free(port):
                yield port

    def _clear_traces(self, socket_folder: Path) -> None:
        """Remove what a killed server left. None of ours runs, but the pid in its files may be someone else's now."""
        if not servers_of(self.data):
            (self.data / "postmaster.pid").unlink(missing_ok=True)
            for file in socket_folder.glob(".s.PGSQL.*"):
                file.unlink()

    def _configuration(self, port: int, socket_folder: Path) -> str:
        fast = "" if self._fsync else "fsync = off\nsynchronous_commit = off\nfull_page_writes = off\n"
        return (
            "# Written by tools/cluster.py at every start.\n"
            f"listen_addresses = '{_HOST}'\n"
            f"port = {port}\n"
            f"unix_socket_directories = '{socket_folder}'\n"
            "password_encryption = 'scram-sha-256'\n"
            "timezone = 'UTC'\n"
            "max_prepared_transactions = 4\n"
            "cluster_name = 'settler-runbook'\n"
            "log_statement = 'ddl'\n"
            "log_line_prefix = '%m [%p] %q%u@%d %a: '\n"
        ) + fast

    def _describe(self, binaries: Binaries, port: int, socket_folder: Path) -> State:
        return State(
            host=_HOST,
            port=port,
            socket=str(socket_folder),
            user=_SUPERUSER,
            password=self._password_file.read_text(encoding="utf-8"),
            bin=str(binaries.client_folder),
            data=str(self.data),
            major=int((self.data / "PG_VERSION").read_text(encoding="utf-8")),
        )

    def _read_state(self) -> State | None:
        try:
            return State(**json.loads(self.state_file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None


def demo_cluster() -> Cluster:
    """Return the cluster of the demo."""
    return Cluster(DEMO_FOLDER)


def demo_secrets() -> dict[str, str]:
    """Return the demo's role passwords, made once; the local inventory reads the same file."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        known = json.loads(SECRETS_FILE.read_text(encoding="utf-8"))
        return {name: str(known[name]) for name in ("migrator", "app")}
    made = {name: secrets.token_urlsafe(24) for name in ("migrator", "app")}
    write_private(SECRETS_FILE, json.dumps(made, indent=2) + "\n")
    return made


def _lets_in(state: State, seconds: float = 10.0) -> bool:
    """Log in as the superuser, with the patience that a server in recovery needs. The password is no argument."""
    command = [
        str(Path(state.bin, "psql")), "--no-psqlrc", "--no-password", "--quiet", "--command", "SELECT 1",
        f"host={state.host} port={state.port} user={state.user} dbname=postgres connect_timeout=3",
    ]  # fmt: skip
    env = environment() | {"PGPASSWORD": state.password}
    deadline = time.monotonic() + seconds
    while True:
        result = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if result.returncode == 0:
            return True
        if time.monotonic() > deadline or b"password authentication failed" in result.stderr:
            return False
        time.sleep(0.2)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _private_name(base: Path, directory: Path) -> Path:
    """Return a name in a folder that everybody may write to: always the same, so that it is found again."""
    return base / (_PREFIX + hashlib.sha256(os.fsencode(directory)).hexdigest()[:12])


def _private_folder(base: Path, directory: Path, account: Account) -> Path:
    """Return a folder of the account's own in ``base``; where somebody took its name, one with a random name."""
    folder = _private_name(base, directory)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if _is_private(folder, account):
            return folder
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    account.own(folder)
    return folder


def _is_private(folder: Path, account: Account) -> bool:
    """Tell whether this is a real folder that belongs to the account and is closed to all others."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == account.uid and not status.st_mode & 0o077


def _remove_folder(folder: Path, own: Path) -> bool:
    """Remove the cluster's own folder, or one that carries our name; never what else a link or a file may name."""
    ours = folder == own or (folder.parent in (_ELSEWHERE, _SHORT) and folder.name.startswith(_PREFIX))
    if not ours or folder.is_symlink() or not folder.is_dir():
        return False
    remove(folder)
    return True


def _write_for(account: Account, path: Path, text: str) -> None:
    write_private(path, text)
    account.own(path)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
