# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a run would do: a pure function of the files and the ledger."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile


@dataclass(frozen=True)
class LedgerRow:
    """What the plan needs of a row of the ledger."""

    file: str
    version: str
    checksum: str
    applied_at: str
    run_id: str


@dataclass(frozen=True)
class Plan:
    """Files to apply, in order, and the rows that stand."""

    pending: tuple[MigrationFile, ...]
    applied: tuple[LedgerRow, ...]

    @property
    def head(self) -> str | None:
        """The version that the database has now."""
        return max(self.applied, key=lambda row: int(row.version)).version if self.applied else None

    @property
    def target(self) -> str | None:
        """The version that the database has after the run."""
        versions = [*(row.version for row in self.applied), *(file.version for file in self.pending)]
        return max(versions, key=int, default=None)

    def as_diff(self) -> dict[str, str]:
        """Return C(before) and C(after) for C(--diff): a line a file."""
        before = [f"{row.file}  {row.checksum[:12]}" for row in self.applied]
        after = [f"{file.file}  {file.checksum[:12]}" for file in self.pending]
        return {
            "before_header": "ledger",
            "after_header": "ledger",
            "before": "".join(f"{line}\n" for line in before),
            "after": "".join(f"{line}\n" for line in before + after),
        }


def plan(files: t.Sequence[MigrationFile], applied: t.Sequence[LedgerRow], *, out_of_order: bool = False) -> Plan:
    """Decide what is pending.

    Args:
        files: all migrations, in order.
        applied: all rows of the ledger.
        out_of_order: allow a pending file that is older than the newest applied one.

    Raises:
        RunbookError: an applied file is gone or was changed, or a pending one is older than an applied one.
    """
    known = {row.file: row for row in applied}
    on_disk = {file.file for file in files}
    problems = [
        f"{row.file}: applied at {row.applied_at} (run {row.run_id}), but there is no such file now"
        for row in applied
        if row.file not in on_disk
    ]
    problems += [
        f"{file.path}: changed after it was applied at {known[file.file].applied_at}: "
        f"checksum {file.checksum[:12]}, the ledger has {known[file.file].checksum[:12]}"
        for file in files
        if file.file in known and file.checksum != known[file.file].checksum
    ]
    if problems:
        raise RunbookError(
            "the files do not agree with the ledger; nothing was applied\n" + _listed(problems),
            hint="Bring back the file as it was applied; write what should change into a new file.",
            problems=problems,
        )
    pending = tuple(file for file in files if file.file not in known)
    newest = max((int(row.version) for row in applied), default=-1)
    late = [file for file in pending if file.order < newest]
    if late and not out_of_order:
        raise RunbookError(
            "files are older than what the database has; nothing was applied\n"
            + _listed(
                [f"{file.path}: version {file.version} comes before {newest:03d}, which is applied" for file in late]
            ),
            hint="Give them a newer number, or allow them once with -e migrate_out_of_order=true.",
            problems=[file.file for file in late],
        )
    return Plan(pending, tuple(sorted(applied, key=lambda row: int(row.version))))


def _listed(lines: t.Iterable[str]) -> str:
    """Indent lines below a message."""
    return "\n".join(f"  {line}" for line in lines)
