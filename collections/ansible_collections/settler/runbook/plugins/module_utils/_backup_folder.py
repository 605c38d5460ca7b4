# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The folder of a database's backups: nobody else can write into it, one run at a time does, and it is tidied."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import signal
import stat
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._private import make_folder, take_lock

_PATIENCE_S = 5.0  # for processes that were killed to be gone


def check_private(folder: Path) -> None:
    """Refuse a folder into which, or into whose place, somebody else could put something, or into which we cannot.

    A part of the path that does not exist ends the look: it will be made for its owner only. A folder such as C(/tmp),
    where everybody writes and each may move only what is his own, may lie on the way, but holds no backups itself.

    Raises:
        RunbookError: names the part of the path, and what is wrong with it.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow the links that are looked for
    there = folder
    for part in (*reversed(folder.parents), folder):
        try:
            status = part.lstat()
        except FileNotFoundError:
            break
        there = part
        _refuse(folder, part, _problem(part, status, is_last=part == folder))
    _refuse(folder, there, "" if os.access(there, os.W_OK | os.X_OK) else "is not writable")


def _refuse(folder: Path, part: Path, problem: str) -> None:
    if problem:
        where = f"{folder}: it" if part == folder else f"{folder}: {part} on its path"
        raise RunbookError(
            f"no backup is kept in {where} {problem}; nothing was written",
            hint="Set runbook_backup_directory to a folder, without symbolic links on its path, that only the "
            "runbook's user and root can write to.",
        )


def _problem(part: Path, status: os.stat_result, *, is_last: bool) -> str:
    """Return what is wrong with a part of a path; empty if nothing is."""
    if stat.S_ISLNK(status.st_mode):
        return f"is a symbolic link (to {part.resolve()})"
    if not stat.S_ISDIR(status.st_mode):
        return "is no folder"
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user (uid {status.st_uid})"
    shared = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_of_one(status))
    if shared and (is_last or not status.st_mode & stat.S_ISVTX):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _is_of_one(status: os.stat_result) -> bool:
    """Tell whether a folder's group is the private group of its owner, as Debian gives one to each user."""
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return group.gr_gid == owner.pw_gid and group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name}


def make_private(folder: Path) -> None:
    """Make a folder and those above it for their owner only; one that exists is left as it is, if it is private.

    Raises:
        RunbookError: see M(check_private).
    """
    check_private(folder)
    make_folder(folder)


@contextlib.contextmanager
def only_one(home: Path) -> t.Iterator[t.TextIO]:
    """Hold the lock of a database's backups, and yield its file; the system frees it when the process dies.

    Raises:
        RunbookError: another run makes a backup of this database.
    """
    path = home / ".lock"
    path.touch(mode=0o600)
    with path.open("r+", encoding="ascii") as lock:
        if not take_lock(lock.fileno()):
            raise RunbookError(f"{home}: another backup is being written", hint="Wait for it, then run again.")
        yield lock


@dataclass(frozen=True)
class HalfMade:
    """The folder of an unfinished backup, which is locked as long as a process lives that has its descriptor."""

    folder: Path
    descriptor: int
    _lock: t.TextIO

    def note_group(self, group: int) -> None:
        """Write down the process group of the C(pg_dump) that has inherited the descriptor."""
        self._lock.seek(0)
        self._lock.write(f"{group}\n")
        self._lock.flush()


@contextlib.contextmanager
def half_made(folder: Path, lock: t.TextIO) -> t.Iterator[HalfMade]:
    """Make the folder of an unfinished backup, and lock it: by that the next run knows whom a killed one has left."""
    lock.truncate(0)
    folder.mkdir(mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        take_lock(descriptor)
        yield HalfMade(folder, descriptor, lock)
    finally:
        os.close(descriptor)


def remove_leftovers(home: Path, lock: t.TextIO) -> None:
    """Remove what killed runs have left half made or half removed, and end what still writes into it.

    Raises:
        RunbookError: a process that writes into it cannot be ended.
    """
    for leftover in home.glob(".*.partial"):
        descriptor = os.open(leftover, os.O_RDONLY)
        try:
            if not take_lock(descriptor):
                _end_orphans(leftover, descriptor, lock)
            shutil.rmtree(leftover)
        finally:
            os.close(descriptor)


def remove_whole(backup: Path) -> None:
    """Remove a backup so that, killed in between, it leaves nothing that could be taken for one."""
    leftover = backup.with_name(f".{backup.name}.partial")
    backup.rename(leftover)
    shutil.rmtree(leftover)


def _end_orphans(leftover: Path, descriptor: int, lock: t.TextIO) -> None:
    """End the group that is noted in the lock; while it has the folder's lock, no other group can have its number."""
    lock.seek(0)
    group = lock.read().strip()
    if group.isdigit():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(int(group), signal.SIGKILL)
    deadline = time.monotonic() + _PATIENCE_S
    while not take_lock(descriptor):
        if time.monotonic() > deadline:
            raise RunbookError(
                f"{leftover}: the pg_dump of a run that was killed still writes (process group {group or 'unknown'})",
                hint=f"End it: kill -9 -{group or '<its process group>'}; then run again.",
            )
        time.sleep(0.02)
