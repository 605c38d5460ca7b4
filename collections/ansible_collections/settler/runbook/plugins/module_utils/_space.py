# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Room for a backup: how much it will need, and how a full disk is recognised."""

from __future__ import annotations

import errno
import os
import shutil
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

if t.TYPE_CHECKING:
    from pathlib import Path

#: What a dump may be larger than the last one's ratio lets expect.
_GROWTH = 1.25
MORE_SPACE = "Free space, or set runbook_backup_directory to a larger disk."


def check_space(
    directory: Path, database: str, size: int, *, environment: str | None = None, compression: str | None = None
) -> int:
    """Refuse to start where the backup might not fit; return the bytes that are free.

    It is expected to be as much smaller than the database as the last one was; the first one, to be as large as the
    database.

    Args:
        directory: of all backups.
        database: its name.
        size: of the database in bytes.
        environment: only a backup of this one tells the ratio; None for any.
        compression: only a backup with this one tells the ratio; None for any.

    Raises:
        RunbookError: there is not enough room.
    """
    home = _manifest.home_of(directory, database)
    there = next(folder for folder in (home, *home.parents) if folder.is_dir())
    last = next(
        (
            row
            for row in _manifest.list_backups(directory, database)
            if not row["error"]
            and environment in (None, row["environment"])
            and compression in (None, row["compression"])
        ),
        None,
    )
    expected = int(size * last["bytes"] / last["size"] * _GROWTH) if last and last["size"] else size
    free = shutil.disk_usage(there).free
    if free < expected:
        why = f", as run {last['run_id']} lets expect" if last else ", and there is no backup yet to learn from"
        raise RunbookError(
            f"{home}: {free // 2**20} MB free, the backup may need {-(-expected // 2**20)} MB "
            f"(the database has {size // 2**20} MB{why}); nothing was written",
            hint=MORE_SPACE,
        )
    return free


def is_of_space(error: BaseException) -> bool:
    """Tell whether an error, or the program that it quotes, says that a disk or a quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, RunbookError):
        # age's words for it begin with a small letter
        return any(os.strerror(number).lower() in error.message.lower() for number in full)
    return isinstance(error, OSError) and error.errno in full
