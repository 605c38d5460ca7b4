# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""PostgreSQL's client programs: the right version, without secrets in arguments, with errors that can be read."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
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
    writes an older pg_restore may not read. For a server before 17 it must be before 17, too: a newer pg_restore begins
    with SET transaction_timeout, which that server does not know, so it restores nothing.

    Args:
        server_major: such as 15.
        folder: the only folder to look in.

    Raises:
        RunbookError: none fits; names what was found.
    """
    found = {path: version for path in _candidates(folder) if (version := _major(path)) is not None}
    end = 17 if server_major < 17 else None
    fitting = {path: major for path, major in found.items() if major >= server_major and (not end or major < end)}
    if fitting:
        return min(fitting.items(), key=lambda item: item[1])
    there = ", ".join(f"{version} in {path}" for path, version in found.items()) or "none at all"
    raise RunbookError(
        f"no pg_dump and pg_restore that fit a server of version {server_major} on this host (from {server_major}"
        f"{f' to {end - 1}, as pg_restore {end} cannot restore there' if end else ' on'}): found {there}",
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


def offers(folder: Path, method: str) -> bool:
    """Tell whether a C(pg_dump) can compress so: it says so before it finds no server."""
    nowhere = folder / "no-such-socket"
    answer = subprocess.run(
        [folder / "pg_dump", f"--compress={method}", "--format=custom", f"--host={nowhere}", "--no-password"],
        env={"PATH": os.defpath, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=10,
    )
    return str(nowhere) in answer.stderr


#: The best first, as tools/bench_backup.py measures them; every pg_dump has the last one.
_BEST = ("zstd:1", "lz4", "gzip:1")


def compression_for(folder: Path, major: int, wanted: str) -> tuple[str, str]:
    """Return a compression as it is called from version 16 on, and as this C(pg_dump) takes it.

    Args:
        folder: of the programs.
        major: their version; before 16 all that they take is a level of gzip.
        wanted: C(auto), or a method with or without a level.

    Raises:
        RunbookError: this C(pg_dump) cannot compress so.
    """
    if wanted == "auto":
        wanted = next(method for method in _BEST if method == _BEST[-1] or (major >= 16 and offers(folder, method)))
    method, _colon, level = wanted.partition(":")
    if major >= 16 and offers(folder, wanted):
        return wanted, wanted
    if major < 16 and (method == "none" or (method == "gzip" and level in ("", *"123456789"))):
        return wanted, "0" if method == "none" else level or "6"
    raise RunbookError(
        f"pg_dump {major} in {folder} cannot compress with {wanted}",
        hint="Set backup_compression: auto, which takes the best that it can.",
    )


def start_program(
    command: t.Sequence[str | Path], environment: t.Mapping[str, str], inherits: t.Collection[int] = ()
) -> subprocess.Popen[str]:
    """Start a program, in a process group of its own, that works while the caller does something else.

    M(wait_program) or M(end_program) ends it.

    Args:
        command: program and arguments.
        environment: all that it sees.
        inherits: open files that it gets as well, such as one with a lock.
    """
    # a pipe can be full, and its end is seen only when the last one that has it is gone
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with the process
    process = subprocess.Popen(
        [str(part) for part in command],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        text=True,
        pass_fds=tuple(inherits),
        process_group=0,
    )
    process.stderr = errors
    return process


def end_program(process: subprocess.Popen[str]) -> None:
    """End a program, and what it has started, at once."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_program(process: subprocess.Popen[str]) -> None:
    """Wait for a program's end.

    Raises:
        RunbookError: it failed; its last lines are the message. What it has started is ended, too.
    """
    try:
        process.wait()
    except BaseException:
        end_program(process)
        raise
    if process.returncode:
        end_program(process)
        assert process.stderr is not None
        process.stderr.seek(0)
        lines = [line for line in process.stderr.read().strip().splitlines() if line][-6:]
        name, code = Path(process.args[0]).name, process.returncode  # type: ignore[index,arg-type]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise RunbookError("\n  ".join([f"{name} {how}{':' if lines else ''}", *lines]))


def run_program(command: t.Sequence[str | Path], environment: t.Mapping[str, str]) -> None:
    """Run a program to its end; raises what M(wait_program) raises."""
    wait_program(start_program(command, environment))
