"""A container engine for Molecule: the user's Docker where one answers, otherwise one of our own.

A Docker that answers is used as it is and left as it was. Otherwise root on Linux gets a dockerd with a
socket, data and a pid file of its own. Whatever answers on that socket is ours by construction, also after a
run that was killed, and is the only engine that is ever stopped here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools import apt, console
from tools.project import LOCAL, ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Not under .local: a socket's path has 108 characters at most, and images should outlive a clone.
_RUN = Path("/run/settler-runbook")
_DATA = Path("/var/cache/settler-runbook/docker")
_SOCKET = _RUN / "docker.sock"
_PID_FILE = _RUN / "docker.pid"
_KEEP = _RUN / "keep"
_LOG = LOCAL / "docker" / "dockerd.log"
OWN_HOST = f"unix://{_SOCKET}"

_ANSWER_SECONDS = 10
_START_SECONDS = 60
_STOP_SECONDS = 30


class NoEngineError(ToolError):
    """No container engine can be had here; the message says why."""


@dataclass(frozen=True)
class Engine:
    """A Docker that answers at `host`; `ours` if it is the one that we start and stop."""

    host: str
    version: str
    ours: bool

    def docker(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the client against this engine."""
        return _docker("--host", self.host, *arguments)


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """Lend an engine. At the end stop it if it is ours, unless somebody else uses it or wants it kept."""
    users_engine = _find()
    if users_engine is not None:
        yield users_engine
        return
    with _guard():
        own = _start()
        use = _open_locked("users", fcntl.LOCK_SH)
    try:
        yield own
    finally:
        with _guard():
            os.close(use)
            if not _KEEP.exists():
                _stop_unless_used()


def keep() -> None:
    """Leave our engine running at the end of every run, until `stop`."""
    _KEEP.touch()


def stop() -> bool:
    """Stop our engine; tell whether it was running."""
    with _guard():
        _KEEP.unlink(missing_ok=True)
        was_running = _pid() is not None
        if not _stop_unless_used():
            raise ToolError("another run is using our engine; it stops by itself when that run ends")
    return was_running


def configured_host() -> str:
    """Return where the user's own docker command would look for an engine."""
    if host := os.environ.get("DOCKER_HOST"):
        return host
    if shutil.which("docker"):
        context = _docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
        if context.returncode == 0 and context.stdout.strip():
            return context.stdout.strip()
    return "unix:///var/run/docker.sock"


def ask(host: str) -> tuple[str, str]:
    """Return the version of the engine at `host`, or "" and why there is none."""
    if shutil.which("docker") is None:
        return "", "there is no docker command"
    try:
        answer = _docker("--host", host, "version", "--format", "{{.Server.Version}}", timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {_ANSWER_SECONDS} s"
    return (answer.stdout.strip(), "") if answer.returncode == 0 else ("", last_line(answer.stderr))


def stop_cleanly_on_signals() -> None:
    """Make SIGTERM a Ctrl-C, so that `engine` gets to its end, and let neither disturb the cleaning up."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, _interrupt)


def _interrupt(_signal_number: int, _frame: object) -> None:
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    raise KeyboardInterrupt


def last_line(text: str) -> str:
    """Return the line in which a program says why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _docker(*arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=timeout,
    )


def _find() -> Engine | None:
    host = configured_host()
    version, reason = ask(host)
    if version:
        return Engine(host, version, ours=host == OWN_HOST)
    if os.environ.get("DOCKER_HOST"):
        raise NoEngineError(f"DOCKER_HOST={host} does not answer: {reason}")
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NoEngineError(f"{host} does not answer ({reason}), and only root on Linux can start an engine")
    return None


@contextlib.contextmanager
def _guard() -> Iterator[None]:
    """Let one process at a time start or stop our engine."""
    if os.geteuid() != 0:
        raise NoEngineError("only root can start or stop our engine")
    _RUN.mkdir(mode=0o700, exist_ok=True)
    lock = _open_locked("guard", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _open_locked(name: str, operation: int) -> int:
    """Return a descriptor that holds a lock; the kernel frees the lock of a process that is killed."""
    lock = os.open(_RUN / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, operation)
    except OSError:
        os.close(lock)
        raise
    return lock


def _start() -> Engine:
    """Return our engine: as a killed run or `keep` left it, or started, or installed first."""
    left = _answering()
    if left is not None:
        return left
    _stop()
    if shutil.which("dockerd") is None or shutil.which("docker") is None:
        _install()
    process = _launch()
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        started = _answering()
        if started is not None:
            return started
        time.sleep(0.1)
    _end(process.pid)
    raise NoEngineError(f"dockerd did not start ({_LOG}): {last_line(_LOG.read_text(errors='replace'))}")


def _answering() -> Engine | None:
    if not _SOCKET.exists():
        return None
    version, _ = ask(OWN_HOST)
    return Engine(OWN_HOST, version, ours=True) if version else None


def _install() -> None:
    if not apt.usable():
        raise NoEngineError("no engine answers, and there is no apt-get to install dockerd with")
    console.note("installing docker.io with apt-get")
    try:
        with apt.no_services():
            apt.install("docker.io", "iptables")
            if shutil.which("docker") is None:
                apt.install("docker-cli")  # a package of its own from Debian 13 on
    except ToolError as failure:
        raise NoEngineError(str(failure)) from failure


def _launch() -> subprocess.Popen[bytes]:
    """Start dockerd in a session of its own: a Ctrl-C must not reach it before we have cleaned up."""
    _LOG.parent.mkdir(parents=True, exist_ok=True)
    _DATA.mkdir(parents=True, exist_ok=True)
    with _LOG.open("wb") as log:
        try:
            return subprocess.Popen(
                [
                    *("dockerd", "--host", OWN_HOST, "--pidfile", str(_PID_FILE)),
                    *("--exec-root", str(_RUN / "docker"), "--data-root", str(_DATA)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as failure:
            raise NoEngineError(f"dockerd cannot be run: {failure}") from failure


def _stop_unless_used() -> bool:
    """Stop our engine unless a process holds the users' lock; tell whether it is stopped."""
    try:
        use = _open_locked("users", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _stop()
    os.close(use)
    return True


def _stop() -> None:
    pid = _pid()
    if pid is not None:
        _end(pid)
    for path in (_SOCKET, _PID_FILE):
        path.unlink(missing_ok=True)


def _pid() -> int | None:
    """Return the process that our pid file means, if that is still our dockerd and not a later namesake."""
    try:
        pid = int(_PID_FILE.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if str(_PID_FILE).encode() in command else None


def _end(pid: int) -> None:
    """End a process that may or may not be our child: ask first, then insist."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)
        deadline = time.monotonic() + _STOP_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if not Path(f"/proc/{pid}").exists():
                return
            time.sleep(0.05)
