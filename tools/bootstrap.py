"""The virtual environment: made from requirements.lock, trusted while its stamp says that it still fits."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tools import apt, console
from tools.project import LOCAL, ROOT, VENV, VENV_PYTHON, ToolError, remove

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = ROOT / "requirements.lock"
_STAMP = VENV / ".runbook-stamp"
_UV = VENV / "bin" / "uv"
_WITNESSES = (VENV_PYTHON, _UV, VENV / "bin" / "ansible-playbook")

# pip's name of a setting → uv's variable for it, and what uv separates several values with.
_PIP_TO_UV = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
}


def ensure() -> bool:
    """Make .venv what the lock says. Return whether anything had to be done; a second run costs nothing."""
    if _fits():
        return False
    with _only_one():
        if _fits():
            return False
        if not _is_whole() or _stamped()[1:] != _fingerprint()[1:]:
            _create()
        # From here to the new stamp the environment is half made, and an interrupted run leaves it so.
        _STAMP.unlink(missing_ok=True)
        _sync()
        _STAMP.write_text("\n".join(_fingerprint()) + "\n", encoding="utf-8")
    return True


def compile_lock(options: list[str]) -> int:
    """Compile requirements.lock anew, keeping the pins that still fit. Only the default index counts."""
    ensure()
    env = {name: value for name, value in _uv_environment().items() if name not in ("UV_INDEX", "UV_FIND_LINKS")}
    command = [
        str(_UV), "pip", "compile", "--quiet", "--no-config", "--universal", "--python-version", "3.11",
        "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--group", "dev",
        "--custom-compile-command", "./runbook lock", "--output-file", LOCK.name, *options, "pyproject.toml",
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def _fits() -> bool:
    return _is_whole() and _stamped() == _fingerprint()


def _is_whole() -> bool:
    return all(os.access(path, os.X_OK) for path in _WITNESSES)


def _stamped() -> list[str]:
    """Return what the environment was made from; nothing, if it was never finished."""
    return _STAMP.read_text(encoding="utf-8").splitlines() if _STAMP.exists() else []


def _fingerprint() -> list[str]:
    """Return what it has to be made from: the lock, which can be installed over another one, and what cannot change.

    The path counts because the scripts in it hold it: an environment that was moved along with its clone is broken.
    """
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    return [f"lock sha256:{digest}", f"python {platform.python_version()} {_base_python()}", f"venv {VENV}"]


def _base_python() -> str:
    """Return the interpreter behind shims, links and an active virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Let one process at a time make the environment; the others wait and find it made."""
    LOCAL.mkdir(exist_ok=True)
    folder = os.open(LOCAL, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _create() -> None:
    remove(VENV)
    if importlib.util.find_spec("ensurepip") is None:
        _install_venv_module()
    _run([_base_python(), "-m", "venv", str(VENV)], "the virtual environment could not be made")


def _install_venv_module() -> None:
    """Debian leaves ensurepip out of its Python until python3-venv is there."""
    if not apt.usable() or not _base_python().startswith("/usr/bin/"):
        raise ToolError(
            f"{_base_python()} cannot make virtual environments (no ensurepip). "
            "On Debian or Ubuntu: apt-get install python3-venv, then run this again."
        )
    console.note("installing python3-venv with apt-get")
    apt.install("python3-venv")


def _sync() -> None:
    if not os.access(_UV, os.X_OK):
        _install_uv()
    # Wheels only, each pinned by its hash: no code of a package runs, and any of the user's indexes may serve it.
    _run(
        [str(_UV), "pip", "sync", "--quiet", "--require-hashes", "--no-build", "--index-strategy", "unsafe-best-match",
         "--python", str(VENV_PYTHON), str(LOCK)],
        "the packages of requirements.lock could not be installed",
        env=_uv_environment(),
    )  # fmt: skip


def _install_uv() -> None:
    """Install uv as the lock pins it, hashes included, with pip: the only installer that is there at first."""
    pin = re.search(r"^uv==(?:.*\\\n)+.*\n", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        raise ToolError("requirements.lock pins no uv: run ./runbook lock where uv is installed")
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "uv.txt")
        requirements.write_text(pin.group(), encoding="utf-8")
        _run(
            [str(VENV_PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--require-hashes", "--requirement", str(requirements)],
            "pip could not install uv",
        )  # fmt: skip


def _uv_environment() -> dict[str, str]:
    """Return our environment with the user's pip configuration said in uv's words; uv's own words win."""
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    settings = _pip_configuration(VENV_PYTHON)
    for name, (variable, separator) in _PIP_TO_UV.items():
        if name in settings and variable not in env:
            env[variable] = separator.join(settings[name].split())
    if "SSL_CERT_FILE" not in env and _system_has_certificates():
        env.setdefault("UV_SYSTEM_CERTS", "true")
    return env


def _system_has_certificates() -> bool:
    """Tell whether the system trusts anyone. If so, uv shall trust the same, as pip does, and not only its own list."""
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or (paths.capath and any(Path(paths.capath).glob("*"))))


def _pip_configuration(python: Path) -> dict[str, str]:
    """Return pip's effective settings: a variable wins over [install], and that over [global]."""
    listing = subprocess.run(
        [str(python), "-m", "pip", "config", "list"], capture_output=True, encoding="utf-8", check=False
    )
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.stdout.splitlines():
        key, equals, value = line.partition("=")
        section, dot, name = key.rpartition(".")
        if equals and dot and section in found:
            found[section][name] = str(ast.literal_eval(value))
    return found["global"] | found["install"] | found[":env:"]


def _run(command: list[str], failure: str, env: dict[str, str] | None = None) -> None:
    result = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        raise ToolError(f"{failure} (exit status {result.returncode}):\n{result.stdout.strip()}")
