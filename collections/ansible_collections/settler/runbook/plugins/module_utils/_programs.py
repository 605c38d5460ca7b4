# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""PostgreSQL's client programs: the right version, without secrets in arguments, with errors that can be read."""

from __future__ import annotations

import re
import shutil
import subprocess
import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

PROGRAMS = ("pg_dump", "pg_restore")
_FOLDERS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)


def find_programs(server_major: int, folder: str | None = None) -> tuple[Path, int]:
    """Return the folder of client programs that fit a server, and their major version.

    The oldest version that is not older than the server is taken: an older pg_dump refuses, and what a newer one
    writes an older pg_restore may not read.

    Args:
        server_major: such as 15.
        folder: the only folder to look in.

    Raises:
        RunbookError: none fits; names what was found.
    """
    found = {path: version for path in _candidates(folder) if (version := _major(path)) is not None}
    fitting = {path: version for path, version in found.items() if version >= server_major}
    if fitting:
        return min(fitting.items(), key=lambda item: item[1])
    there = ", ".join(f"{version} in {path}" for path, version in found.items()) or "none at all"
    raise RunbookError(
        f"no pg_dump and pg_restore of version {server_major} or newer on this host: found {there}",
        hint=f"Install postgresql-client-{server_major}, or name its folder in runbook_client_bin.",
    )


def _candidates(folder: str | None) -> list[Path]:
    if folder:
        return [Path(folder)]
    folders = [path for pattern in _FOLDERS for path in sorted(Path("/").glob(pattern.lstrip("/")))]
    on_path = shutil.which("pg_dump")
    # Debian's /usr/bin/pg_dump is a wrapper that picks a version by itself: only real folders count.
    if on_path and Path(on_path).resolve().name == "pg_dump":
        folders.append(Path(on_path).resolve().parent)
    return list(dict.fromkeys(folders))


def _major(folder: Path) -> int | None:
    """Return the version of a folder's programs; None if one is missing or does not start."""
    if not all((folder / program).is_file() for program in PROGRAMS):
        return None
    try:
        answer = subprocess.run(
            [folder / "pg_dump", "--version"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(\d+)", answer.stdout)
    return int(match[1]) if match else None


def start_program(command: t.Sequence[str | Path], environment: t.Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a program that works while the caller does something else; M(wait_program) ends it."""
    return subprocess.Popen(
        [str(part) for part in command],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_program(process: subprocess.Popen[str]) -> None:
    """Wait for a program's end.

    Raises:
        RunbookError: it failed; its last lines are the message.
    """
    try:
        _nothing, errors = process.communicate()
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        name = Path(process.args[0]).name  # type: ignore[index,arg-type]
        lines = [line for line in errors.strip().splitlines() if line][-6:]
        raise RunbookError(
            f"{name} failed with exit code {process.returncode}:\n" + "\n".join(f"  {line}" for line in lines)
        )


def run_program(command: t.Sequence[str | Path], environment: t.Mapping[str, str]) -> None:
    """Run a program to its end; raises what M(wait_program) raises."""
    wait_program(start_program(command, environment))
