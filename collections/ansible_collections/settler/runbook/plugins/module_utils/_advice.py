# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Advice: what squawk, a linter of migrations, has to say beyond the hazards; where it is not installed, nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile
    from ansible_collections.settler.runbook.plugins.module_utils._hazards import FilePlan

#: Rules that no hazard covers, and that are no matter of taste. Timeouts and transactions are the engine's.
_RULES = frozenset({
    "adding-required-field",
    "ban-alter-domain-with-add-constraint",
    "ban-char-field",
    "ban-create-domain-with-constraint",
    "ban-drop-not-null",
    "ban-truncate-cascade",
    "prefer-bigint-over-smallint",
    "prefer-robust-stmts",
})  # fmt: skip
_SECONDS = 30


def with_advice(plans: t.Sequence[FilePlan], files: t.Sequence[MigrationFile]) -> list[FilePlan]:
    """Return the plans of files with what the linter says of each."""
    told = advice(files)
    return [
        dataclasses.replace(plan, advice=tuple(told.get(str(file.path), ())))
        for plan, file in zip(plans, files, strict=True)
    ]


def advice(files: t.Sequence[MigrationFile]) -> dict[str, list[str]]:
    """Return lines of advice by path of the file."""
    program = shutil.which("squawk", path=str(Path(sys.executable).parent)) or shutil.which("squawk")
    if not program or not files:
        return {}
    # a file in a transaction need not be robust: it is rolled back as a whole
    found: dict[str, list[str]] = {}
    for transactional in (True, False):
        paths = [str(file.path) for file in files if file.directives.transaction is transactional]
        flags = ["--assume-in-transaction"] if transactional else []
        for row in _findings(program, flags, paths) if paths else ():
            if row["rule_name"] in _RULES:
                found.setdefault(row["file"], []).append(
                    f"advice at line {row['line'] + 1}: {row['message']} ({row['rule_name']})"
                )
    return found


def _findings(program: str, flags: t.Sequence[str], paths: t.Sequence[str]) -> list[dict[str, t.Any]]:
    """Return what squawk reports; it ends 1 when it reports anything, and advice is never worth a failure."""
    try:
        run = subprocess.run(
            [program, "--reporter=json", *flags, *paths],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
        rows = json.loads(run.stdout or "[]")
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return rows if isinstance(rows, list) else []
