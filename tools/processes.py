"""The server processes of one data folder, found by what they are and never by a name alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

_PROC = Path("/proc")
# How a server is asked to stop, and how long it is given: fast shutdown, immediate shutdown, the end.
_STOP = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 3.0), (signal.SIGKILL, 10.0))


def servers_of(data: Path) -> set[int]:
    """Return the PostgreSQL processes that work in this data folder, also if it was deleted under them.

    Every process of a server has its data folder as its working directory. That holds for backends whose postmaster was
    killed, too, and cannot be confused with another server's, whatever a stale postmaster.pid says.
    """
    if (_PROC / "self" / "cwd").exists():
        return {int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit() and _works_in(entry, data)}
    return _postmaster_by_ps(data)


def postmaster_of(data: Path) -> int | None:
    """Return the live postmaster of this data folder; a stale postmaster.pid names none."""
    try:
        pid = int((data / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
    except (OSError, ValueError):
        return None
    return pid if pid in servers_of(data) else None


def stop_servers_of(data: Path) -> None:
    """Stop everything that works in this data folder, gently at first."""
    for number, seconds in _STOP:
        targets = servers_of(data)
        if number == signal.SIGINT:
            targets &= {postmaster_of(data)}
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if _gone(data, seconds if targets else 0.5):
            return


def _gone(data: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while servers_of(data):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _works_in(process: Path, data: Path) -> bool:
    with contextlib.suppress(OSError):
        if (process / "comm").read_text(encoding="utf-8").strip() == "postgres":
            return str((process / "cwd").readlink()).removesuffix(" (deleted)") == str(data)
    return False


def _postmaster_by_ps(data: Path) -> set[int]:
    """Do the same where there is no /proc (macOS), for the postmaster: its backends end with it."""
    listing = subprocess.run(["ps", "-axo", "pid=,command="], capture_output=True, encoding="utf-8", check=False).stdout
    found = set()
    for line in listing.splitlines():
        pid, _, command = line.strip().partition(" ")
        if "postgres" in command and command.endswith(f" -D {data}"):
            found.add(int(pid))
    return found
