"""Small helpers that unit and integration tests share: files, module options, modules run as Ansible runs them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from unittest import mock

import psycopg
import pytest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._files import (
    MigrationFile,
    checksum,
    read_migration,
)

from tools.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PROJECT = Path(__file__).resolve().parent.parent
COLLECTIONS = PROJECT / "collections"
MODULES = COLLECTIONS / "ansible_collections/settler/runbook/plugins/modules"

#: How the folders of throw-away clusters begin.
CLUSTERS = "settler-pytest-"

T = TypeVar("T")


def migration(text: str, name: str = "001_test.sql", verify: str = "") -> MigrationFile:
    """Return a migration that lies in no folder; its kind is that of its name."""
    kind = "repeatable" if name.startswith("R__") else "batch" if name.endswith(".batch.sql") else "versioned"
    version, _underscore, title = name.removesuffix(".sql").removesuffix(".batch").removeprefix("R_").partition("_")
    check = MigrationFile(version, title, Path("/migrations") / name.replace(".sql", ".verify.sql"), verify, "")
    return MigrationFile(
        version, title, Path("/migrations") / name, text, checksum(text), kind, verify=check if verify else None
    )


def files(*texts: str) -> list[MigrationFile]:
    """Return migrations 001, 002 and so on that lie in no folder."""
    return [migration(text, f"{number:03d}_step.sql") for number, text in enumerate(texts, 1)]


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> RunbookError:
    """Return the error that a call must end in."""
    with pytest.raises(RunbookError) as caught:
        call(*arguments, **options)
    return caught.value


def write_migrations(folder: Path, files: Mapping[str, str | bytes]) -> list[MigrationFile]:
    """Write migrations into a folder and read them back."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return [read_migration(folder / name) for name in files]


def login(cluster: Any, dbname: str, user: str | None = None, password: str | None = None) -> dict[str, Any]:
    """Return a module's connection options: the superuser's, or another role's."""
    state = cluster.state
    return {
        "login_host": state.host,
        "login_port": state.port,
        "login_user": user or state.user,
        "login_password": state.password if user is None else password,
        "login_db": dbname,
        "ssl_mode": "prefer",
    }


def as_migrator(cluster: Any, roles: Any, dbname: str) -> dict[str, Any]:
    """Return the connection options that the runbook works with."""
    return login(cluster, dbname, roles.migrator, roles.migrator_password)


def start_module(name: str, arguments: Mapping[str, Any], *, check: bool = False) -> subprocess.Popen[str]:
    """Start a module as a process of its own, with JSON on its standard input, as at C(-vvv --diff)."""
    internal = {"_ansible_check_mode": check, "_ansible_diff": True, "_ansible_verbosity": 3}
    process = subprocess.Popen(
        [sys.executable, MODULES / f"{name}.py"],
        env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, **internal}}))
    process.stdin.close()
    process.stdin = None
    return process


def run_module(name: str, arguments: Mapping[str, Any], *, check: bool = False) -> dict[str, Any]:
    """Run a module to its end; the result has all that it has printed as C(_output)."""
    output, errors = start_module(name, arguments, check=check).communicate()
    assert output.strip(), errors
    result: dict[str, Any] = json.loads(output)
    return {**result, "_output": output + errors}


def run_on_small_disk(folder: Path, size: str, script: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Run a shell script that runs a module, while a folder is a disk of its own; return its result and its errors."""
    mounted = f'mount -t tmpfs -o size={size},mode=700 none "{folder}" && {script}'
    # a mount namespace of its own: nothing has to be unmounted, and who is not root may mount, too
    command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", mounted]
    done = subprocess.run(
        command,
        input=json.dumps({"ANSIBLE_MODULE_ARGS": dict(arguments)}),
        env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout), done.stderr


@functools.cache
def defaults_of(name: str) -> dict[str, Any]:
    """Return the options of a module with their defaults, as Ansible would fill them in."""
    module = importlib.import_module(f"ansible_collections.settler.runbook.plugins.modules.{name}")
    options: dict[str, Any] = {}
    with mock.patch.object(module, "run_postgres_module", lambda _work, spec, **_more: options.update(spec)):
        module.main()
    return {option: spec.get("default") for option, spec in options.items()}


def call_module(name: str, arguments: Mapping[str, Any], *, check: bool = False) -> dict[str, Any]:
    """Do a module's work in this process: half a second faster, for tests that do not look at its output."""
    module = importlib.import_module(f"ansible_collections.settler.runbook.plugins.modules.{name}")
    as_ansible = SimpleNamespace(
        params=defaults_of(name) | dict(arguments), check_mode=check, warn=lambda _warning: None
    )
    try:
        result: dict[str, Any] = module.work(as_ansible)
    except RunbookError as error:
        return {"failed": True, **error.as_result()}
    except psycopg.Error as error:
        return {"failed": True, **from_postgres(error, name).as_result()}
    return result


class Background(threading.Thread, Generic[T]):
    """A call that runs beside the test; C(value) waits for it and raises what it raised."""

    def __init__(self, call: Callable[..., T], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._call: Callable[[], T] = functools.partial(call, *arguments)
        self._value: T
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001 - raised again by value()
            self._error = error

    def value(self, timeout: float = 120) -> T:
        self.join(timeout)
        assert not self.is_alive(), f"not done after {timeout} s"
        if self._error:
            raise self._error
        return self._value


@contextlib.contextmanager
def throw_away_cluster(**options: Any) -> Iterator[Cluster]:
    """Yield a running cluster of this session's own, with the options of C(Cluster); it is destroyed afterwards.

    Its folder carries our process's number, so that a later session removes what this one could not.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{CLUSTERS}{os.getpid()}-", dir="/tmp"))
    folder.chmod(0o711)  # the account that runs the server has to pass
    cluster = Cluster(folder / "cluster", **options)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(question: Callable[[], Any], timeout: float = 120) -> Any:
    """Ask until the answer is true; return it."""
    deadline = time.monotonic() + timeout
    while not (answer := question()):
        assert time.monotonic() < deadline, f"not so after {timeout} s"
        time.sleep(0.01)
    return answer
