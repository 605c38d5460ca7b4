"""All Molecule scenarios, against a PostgreSQL container or, where none can be had, a private cluster."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tools import console, postgres_image
from tools.binaries import ensure_binaries
from tools.cluster import Cluster
from tools.engine import NoEngineError, engine, stop_cleanly_on_signals
from tools.postgres_image import NoImageError
from tools.project import LOCAL, ROOT, ToolError, environment, remove, write_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCK = LOCAL / "molecule.lock"
_CLUSTER = LOCAL / "molecule-cluster"
_FOLDER = LOCAL / "molecule"
_LOGS = _FOLDER / "logs"
_STATE = _FOLDER / "state"

_LOCK_SECONDS = 600
_PATIENCE_SECONDS = 15
_TAIL_LINES = 40


class NoServerError(ToolError):
    """The server did not come up; the message says where to read why."""


@dataclass(frozen=True)
class Server:
    """What the scenarios run against: a name for the summary, and what create.yml has to know."""

    name: str
    variables: dict[str, str]


@dataclass
class Step:
    """A molecule process, with its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    watch: console.Stopwatch = field(default_factory=console.Stopwatch)

    def stop(self) -> None:
        """End molecule and the playbook under it."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal_number)
                self.process.wait(_PATIENCE_SECONDS)

    def report(self) -> bool:
        """Print the line of what has finished; of what has failed, also the end of its log."""
        text = self.log.read_text("utf-8", errors="replace")
        if self.process.returncode == 0:
            console.good(self.name, self.watch.seconds)
            return True
        actions = re.findall(r"(\w+)\] Executing", text)
        console.bad(f"{self.name}: {actions[-1] if actions else 'start'} failed", self.watch.seconds)
        for line in text.splitlines()[-_TAIL_LINES:]:
            print(f"      {line}")
        console.note(f"the whole log: {self.log.relative_to(ROOT)}")
        return False


class Molecule:
    """Starts molecule processes against one server."""

    def __init__(self, server: Server, lock: int) -> None:
        self._lock = lock
        self._environment = {
            **environment(),
            **server.variables,
            # Whatever the server is, it is dumped and restored with this machine's programs.
            "MOLECULE_CLIENT_BIN": str(ensure_binaries().folder),
            "ANSIBLE_NOCOLOR": "1",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }
        # Set on build machines, it makes every one of our hundreds of Python processes compile Ansible anew.
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def start(self, command: str, scenario: str) -> Step:
        """Start one command on one scenario.

        Every scenario has a state folder of its own: the shared one would say of all that they are prepared
        when one is. The process inherits the lock: while it lives, though we be killed, no other run begins.
        """
        log = _LOGS / f"{scenario if command == 'test' else command}.log"
        options = ["--destroy=never", "--no-command-borders"] if command == "test" else ["--no-command-borders"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["molecule", command, "--scenario-name", scenario, "--no-shared-state", *options],
                cwd=ROOT,
                env={**self._environment, "MOLECULE_EPHEMERAL_DIRECTORY": str(_STATE / scenario)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock,),
            )
        return Step(scenario if command == "test" else f"{command} the server", process, log)

    def run(self, command: str) -> bool:
        """Run one of the server's own commands to its end; tell whether it succeeded."""
        step = self.start(command, "default")
        try:
            step.process.wait()
        except BaseException:
            step.stop()
            raise
        return step.report()


def test(named: list[str], jobs: int) -> int:
    """Run the named scenarios, or else all, and return the exit status."""
    scenarios = _chosen(named)
    watch = console.Stopwatch()
    with _only_run() as lock:
        remove(_FOLDER)
        for folder in (_FOLDER, _LOGS, _STATE):
            folder.mkdir(mode=0o700)
        with _server(lock) as server:
            console.note(f"running against {server.name}")
            passed = _run_all(Molecule(server, lock), scenarios, jobs)
    print(f"\n{passed} passed, {len(scenarios) - passed} failed in {console.duration(watch.seconds)}")
    print(f"Molecule ran against {server.name}")
    return 0 if passed == len(scenarios) else 1


def _run_all(molecule: Molecule, scenarios: list[str], jobs: int) -> int:
    """Run the scenarios, some at a time (they share a server and nothing else); return how many passed."""
    waiting = list(scenarios)
    running: list[Step] = []
    passed = 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(molecule.start("test", waiting.pop(0)))
            for step in [step for step in running if step.process.poll() is not None]:
                running.remove(step)
                passed += step.report()
            time.sleep(0.1)
    finally:
        for step in running:
            step.stop()
    return passed


@contextlib.contextmanager
def _server(lock: int) -> Iterator[Server]:
    """Lend a server with nothing on it; whatever was started for it is stopped at the end."""
    with contextlib.ExitStack() as stack:
        yield _choose(stack, lock)


def _choose(stack: contextlib.ExitStack, lock: int) -> Server:
    """Return a container if one can be had, otherwise the private cluster with the reason in its name."""
    wanted = os.environ.get("MOLECULE_TARGET", "auto")
    if wanted not in ("auto", "container", "cluster"):
        raise ToolError(f"MOLECULE_TARGET={wanted}: it can be auto, container or cluster")
    if wanted == "cluster":
        return stack.enter_context(_cluster(lock, "MOLECULE_TARGET=cluster asks for it"))
    try:
        return stack.enter_context(_container(lock))
    except (NoEngineError, NoImageError, NoServerError) as failure:
        if wanted == "container":
            raise
        console.bad(f"no container: {failure}")
        return stack.enter_context(_cluster(lock, f"no container can be had: {failure}"))


@contextlib.contextmanager
def _container(lock: int) -> Iterator[Server]:
    watch = console.Stopwatch()
    with engine() as found:
        console.good(f"Docker {found.version}{' of our own' if found.ours else ''}", watch.seconds)
        watch = console.Stopwatch()
        image = postgres_image.ensure(found)
        console.good(f"image {image}", watch.seconds)
        server = Server(
            f"a container of the image {image}",
            {"DOCKER_HOST": found.host, "MOLECULE_POSTGRES_IMAGE": image.name},
        )
        with _created(Molecule(server, lock)):
            yield server


@contextlib.contextmanager
def _cluster(lock: int, reason: str) -> Iterator[Server]:
    watch = console.Stopwatch()
    cluster = Cluster(_CLUSTER, fsync=False)
    try:
        state = cluster.up()
        console.good(f"private PostgreSQL {state.major} cluster", watch.seconds)
        # Where the inventory's password lookup finds it; for a container the lookup makes it.
        write_private(_FOLDER / "admin.password", state.password)
        address = {"host": state.host, "port": state.port, "user": state.user}
        server = Server(
            f"a private PostgreSQL {state.major} cluster, because {reason}",
            {"MOLECULE_CLUSTER": json.dumps(address)},
        )
        with _created(Molecule(server, lock)):
            yield server
    finally:
        cluster.down()


@contextlib.contextmanager
def _created(molecule: Molecule) -> Iterator[None]:
    """Run create.yml, which tells the inventory where the server is, and in any case destroy.yml."""
    try:
        if not molecule.run("create"):
            raise NoServerError(f"create.yml failed, see {(_LOGS / 'create.log').relative_to(ROOT)}")
        yield
    finally:
        molecule.run("destroy")


@contextlib.contextmanager
def _only_run() -> Iterator[int]:
    """Let one run at a time use this clone's folder; wait for what a killed run has left at work."""
    LOCAL.mkdir(exist_ok=True)
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        watch = console.Stopwatch()
        while not _locked(lock):
            if watch.seconds > _LOCK_SECONDS:
                raise ToolError(f"another run has held {_LOCK} for more than {_LOCK_SECONDS} s")
            if watch.seconds < 1:
                console.note("waiting for another run, or what is left of a killed one")
            time.sleep(1)
        yield lock
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _chosen(named: list[str]) -> list[str]:
    """Return the scenarios to run; `default` is none, it only makes and removes the server."""
    known = {path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml")} - {"default"}
    if unknown := set(named) - known:
        raise ToolError(f"molecule/ has no scenario {', '.join(sorted(unknown))}")
    if not known:
        raise ToolError("molecule/ has no scenario: nothing would be tested")
    return sorted(named or known)


def main() -> int:
    """Run all scenarios, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tools.molecule_run", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="all of molecule/ by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="scenarios at a time")
    arguments = parser.parse_args()
    console.prepare()
    stop_cleanly_on_signals()
    try:
        return test(arguments.scenarios, max(1, arguments.jobs))
    except ToolError as failure:
        console.error(str(failure))
        return 1
    except KeyboardInterrupt:
        console.error("interrupted; what was started is stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
