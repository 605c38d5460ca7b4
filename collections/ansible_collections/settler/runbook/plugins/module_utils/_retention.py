# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Retention: which backups may go. What one rule keeps stays, and so does the last one that was proven."""

from __future__ import annotations

import datetime as dt
import os
import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils import _manifest
from ansible_collections.settler.runbook.plugins.module_utils._backup_folder import remove_whole


def superfluous(
    backups: t.Sequence[t.Mapping[str, t.Any]], *, keep: int, keep_days: float, now: dt.datetime
) -> list[t.Mapping[str, t.Any]]:
    """Return the backups that no rule keeps.

    Args:
        backups: whole ones, newest first, as M(_manifest.list_backups) returns them.
        keep: so many of the newest stay; 0 is no rule.
        keep_days: younger ones stay; 0 is no rule. Without any rule all stay.
        now: the present, for the age.
    """
    if keep < 1 and keep_days <= 0:
        return []
    proven = next((row for row in backups if row["proof"]), None)
    return [
        row
        for row in backups[max(keep, 1) :]
        if row is not proven and not (keep_days > 0 and _age(row, now) < dt.timedelta(days=keep_days))
    ]


def _age(row: t.Mapping[str, t.Any], now: dt.datetime) -> dt.timedelta:
    return now - dt.datetime.fromisoformat(row["finished_at"])


def prune(directory: Path, made: t.Mapping[str, t.Any], *, keep: int, keep_days: float) -> list[str]:
    """Remove the superfluous ones of the backups that are like the one just made; return their paths.

    Like it are those of its database, environment and server, whole, under their own name and with nothing beside them
    that a backup does not have. All others are not ours to remove.
    """
    like = ("database", "environment", "system_identifier", "method")
    ours = [
        row
        for row in _manifest.list_backups(directory, made["database"])
        if not row["error"] and all(row.get(key) == made.get(key) for key in like) and _is_plain(Path(row["path"]), row)
    ]
    gone = [row["path"] for row in superfluous(ours, keep=keep, keep_days=keep_days, now=dt.datetime.now(dt.UTC))]
    for path in gone:
        remove_whole(Path(path))
    return gone


def _is_plain(folder: Path, manifest: t.Mapping[str, t.Any]) -> bool:
    """Tell whether a folder is what its manifest says and nothing else: no link, no other name, no folder of others."""
    folders = {Path(name).parent for name in manifest["files"]}
    wanted = {*manifest["files"], *map(str, folders - {Path()}), *_manifest.BESIDE}
    found = {os.path.relpath(path, folder) for path in folder.rglob("*")}
    return not folder.is_symlink() and folder.name == manifest["run_id"] and found <= wanted
