"""Where things are, and the environment in which the project's programs run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent
LOCAL = ROOT / ".local"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
COLLECTION = ROOT / "collections" / "ansible_collections" / "settler" / "runbook"

# A user's settings that would point our programs at other servers, code or configuration.
# Without bytecode, each of the many processes of one playbook would compile Ansible anew.
_FOREIGN = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE")
_OUR_ANSIBLE = ("ANSIBLE_FORCE_COLOR", "ANSIBLE_NOCOLOR")


class ToolError(Exception):
    """A failure whose message is all that the user needs: what happened and what to do."""


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for our own programs: the project's venv and ansible.cfg, nobody else's.

    libpq's PG* variables go (PG_BIN is ours and stays), and so do ANSIBLE_* ones. Ansible refuses to
    start in a locale that is not UTF-8, which is what a bare machine or LC_ALL=C has.
    """
    env = {name: value for name, value in (os.environ if base is None else base).items() if not _is_foreign(name)}
    env["PATH"] = os.pathsep.join([str(VENV / "bin"), env.get("PATH", os.defpath)])
    env["VIRTUAL_ENV"] = str(VENV)
    env["ANSIBLE_CONFIG"] = str(ROOT / "ansible.cfg")
    if "UTF-8" not in (env.get("LC_ALL") or env.get("LC_CTYPE") or env.get("LANG") or "").upper().replace(
        "UTF8", "UTF-8"
    ):
        env["LC_ALL"] = "en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8"
    return env


def libpq_variables() -> dict[str, str]:
    """Return what ``environment`` takes away of libpq's, for a command that goes to a server of the user's choice."""
    return {name: value for name, value in os.environ.items() if _is_libpq(name)}


def _is_libpq(name: str) -> bool:
    return name.startswith("PG") and not name.startswith("PG_")


def _is_foreign(name: str) -> bool:
    if name.startswith("ANSIBLE_"):
        return name not in _OUR_ANSIBLE
    return name in _FOREIGN or _is_libpq(name)


def write_private(path: Path, text: str) -> None:
    """Write a file with mode 0600, whole or not at all: readers never see half of a password file."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a tree, and be content if there is nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)
