# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a run would do: a pure function of the files and the ledger."""

from __future__ import annotations

import hashlib
import json
import typing as t
from dataclasses import dataclass

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import REPEATABLE

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile

#: Files up to and without the first one of the phase contract.
EXPAND = "expand"


@dataclass(frozen=True)
class LedgerRow:
    """What the plan needs of a row of the ledger. C(state) is V(applied), or V(running) of a file that is half done."""

    file: str
    version: str
    checksum: str
    applied_at: str
    run_id: str
    state: str = "applied"
    kind: str = "versioned"

    @property
    def folder(self) -> str:
        """The optional folder of the file; empty for the main one."""
        return self.file.rpartition("/")[0]

    @property
    def order(self) -> int:
        """Position in the sequence of its folder; a repeatable file has none."""
        return int(self.version) if self.version else -1


@dataclass(frozen=True)
class Plan:
    """Files to apply, in order, the rows that stand, and the files that a later phase applies."""

    pending: tuple[MigrationFile, ...]
    applied: tuple[LedgerRow, ...]
    later: tuple[MigrationFile, ...] = ()

    @property
    def head(self) -> str | None:
        """The version that the database has now."""
        return newest([row for row in self.applied if not row.folder])

    @property
    def target(self) -> str | None:
        """The version that the database has after the run."""
        mine = [file for file in self.pending if not file.folder]
        return newest([*(row for row in self.applied if not row.folder), *mine])

    @property
    def digest(self) -> str:
        """A SHA-256 of what is pending: the same wherever the same texts are pending in the same order."""
        told = [
            [file.file, file.kind, file.checksum, file.verify.checksum if file.verify else ""] for file in self.pending
        ]
        return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()

    def as_diff(self) -> dict[str, str]:
        """Return C(before) and C(after) for C(--diff): a line a file."""
        before = {row.file: row.checksum[:12] for row in self.applied}
        after = {**before, **{file.file: file.checksum[:12] for file in self.pending}}
        return {
            "before_header": "ledger",
            "after_header": "ledger",
            "before": "".join(f"{file}  {checksum}\n" for file, checksum in before.items()),
            "after": "".join(f"{file}  {checksum}\n" for file, checksum in after.items()),
        }


def newest(versioned: t.Sequence[MigrationFile | LedgerRow]) -> str | None:
    """Return the greatest version; repeatable files have none."""
    return max((one.version for one in versioned if one.version), key=int, default=None)


def plan(
    files: t.Sequence[MigrationFile],
    rows: t.Sequence[LedgerRow],
    *,
    out_of_order: bool | t.Collection[str] = False,
    phase: str = "all",
) -> Plan:
    """Decide what is pending.

    Args:
        files: all migrations, in order.
        rows: all rows of the ledger.
        out_of_order: allow pending files that are older than the newest applied one: all, or those that are named.
        phase: V(expand) leaves out the first file of the phase contract and all after it.

    Raises:
        RunbookError: an applied file is gone or was changed, a pending one is older than an applied one, or needs
            one that is not there.
    """
    applied = {row.file: row for row in rows if row.state == "applied"}
    _refuse_differences(files, rows, applied)
    pending = [file for file in files if file.file not in applied or _changed(file, applied[file.file])]
    _refuse_late(pending, rows, out_of_order)
    later: list[MigrationFile] = []
    if phase == EXPAND:
        cut = next((at for at, file in enumerate(pending) if file.directives.phase == "contract"), len(pending))
        pending, later = pending[:cut], pending[cut:]
    _refuse_unmet(pending, applied)
    return Plan(
        tuple(pending), tuple(sorted(applied.values(), key=lambda row: (row.folder, row.order, row.file))), tuple(later)
    )


def _changed(file: MigrationFile, row: LedgerRow) -> bool:
    """Tell whether a repeatable file has to be applied again."""
    return file.kind == REPEATABLE and file.checksum != row.checksum


def _refuse_differences(
    files: t.Sequence[MigrationFile], rows: t.Sequence[LedgerRow], applied: t.Mapping[str, LedgerRow]
) -> None:
    """Raise if files that the ledger knows are gone or were changed."""
    on_disk = {file.file for file in files}
    folders = {file.folder for file in files}
    problems = [
        f"{row.file}: {'applied' if row.state == 'applied' else 'begun'} at {row.applied_at} (run {row.run_id}), "
        + (
            "but there is no such file now"
            if row.folder in folders or not row.folder
            else f"but the optional folder {row.folder} is not switched on (migrate_optional)"
        )
        for row in rows
        if row.file not in on_disk
    ]
    problems += [
        f"{file.path}: changed after it was applied at {applied[file.file].applied_at}: "
        f"checksum {file.checksum[:12]}, the ledger has {applied[file.file].checksum[:12]}"
        for file in files
        if file.kind != REPEATABLE and file.file in applied and file.checksum != applied[file.file].checksum
    ]
    if problems:
        raise RunbookError(
            "the files do not agree with the ledger; nothing was applied\n" + _listed(problems),
            hint="Bring back the file as it was applied; write what should change into a new file. Where the change "
            "is meant: playbooks/repair.yml -e repair_file=… -e repair_reason=…",
            problems=problems,
        )


def _refuse_late(
    pending: t.Sequence[MigrationFile], rows: t.Sequence[LedgerRow], allowed: bool | t.Collection[str]
) -> None:
    """Raise if pending files are older than what their sequence has."""
    newest: dict[str, int] = {}
    for row in rows:
        newest[row.folder] = max(newest.get(row.folder, -1), row.order)
    begun = {row.file for row in rows}
    late = [
        file
        for file in pending
        if file.version
        and file.order < newest.get(file.folder, -1)
        and file.file not in begun
        and not (allowed if isinstance(allowed, bool) else file.file in allowed)
    ]
    if late:
        raise RunbookError(
            "files are older than what the database has; nothing was applied\n"
            + _listed(
                [
                    f"{file.path}: version {file.version} comes before {newest[file.folder]:03d}, which is applied"
                    for file in late
                ]
            ),
            hint="Give them a newer number, or allow them once with -e migrate_out_of_order=true.",
            problems=[file.file for file in late],
        )


def _refuse_unmet(pending: t.Sequence[MigrationFile], applied: t.Mapping[str, LedgerRow]) -> None:
    """Raise if a file requires another one that comes later or never."""
    done = {name for row in applied.values() for name in (row.file, _short(row.folder, row.version)) if name}
    unmet = []
    for file in pending:
        unmet += [
            f"{file.path}: requires {need}, which is neither applied nor pending before it"
            for need in file.directives.requires
            if not {need, _short("", need), f"{file.folder}/{need}" if file.folder else need} & done
        ]
        done |= {file.file, _short(file.folder, file.version)}
    if unmet:
        raise RunbookError(
            "files require others; nothing was applied\n" + _listed(unmet),
            hint="Give the file a newer number, or add the file that it requires.",
            problems=unmet,
        )


def _short(folder: str, version: str) -> str:
    """Return what C(requires=) may call a version: its number without zeros in front, in its folder."""
    number = str(int(version)) if version.isdigit() else version
    return f"{folder}/{number}" if folder and number else number


def _listed(lines: t.Iterable[str]) -> str:
    """Indent lines below a message."""
    return "\n".join(f"  {line}" for line in lines)
