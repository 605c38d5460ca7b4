# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Folders for what nobody else may read: gone afterwards, and what a killed run has left is gone with the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import typing as t
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, for their owner only; what exists is left as it is."""
    for part in (*reversed(folder.parents), folder):
        part.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def private_folder(place: Path, pattern: str, about: str = "") -> t.Iterator[Path]:
    """Yield a folder of our own that is removed in the end; its lock says that it is in use.

    Args:
        place: where it lies.
        pattern: of its name, with one star. What nobody holds of that name is removed first, so it must be only ours.
        about: the first part of what the star stands for.
    """
    remove_abandoned(place, pattern)
    folder, handle = _made(place, pattern, about)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _made(place: Path, pattern: str, about: str) -> tuple[Path, int]:
    before, after = pattern.split("*")
    while True:
        folder = Path(tempfile.mkdtemp(prefix=before + about, suffix=after, dir=place))
        with contextlib.suppress(FileNotFoundError):  # another run took it for abandoned before it was locked
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                return folder, handle
            os.close(handle)


def take_lock(handle: int) -> bool:
    """Take the lock of an open file or folder, unless another one has it; the system frees it with the process."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_abandoned(place: Path, pattern: str, *, seconds: float = 0) -> None:
    """Remove the files and folders of a name that are our user's, that nobody holds, and that are so old."""
    for path in place.glob(pattern):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # gone by now, or none of ours
            continue
        try:
            status = os.fstat(handle)
            if status.st_uid == os.geteuid() and status.st_mtime <= time.time() - seconds and take_lock(handle):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        finally:
            os.close(handle)
