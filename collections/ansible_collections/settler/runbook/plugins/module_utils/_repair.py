# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Repair of the ledger: what only a person can know is said by one, with a reason, and kept as an event."""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile
    from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger

ACTIONS = ("accept", "forget", "done", "again")


def repair(
    ledger: Ledger,
    files: t.Sequence[MigrationFile],
    name: str,
    action: str,
    *,
    reason: str,
    run_id: str,
    check: bool = False,
) -> tuple[str, str]:
    """Correct what the ledger says of one file.

    Args:
        ledger: the database's ledger, on a session that may write it and holds the run's lock.
        files: all migrations.
        name: the file, as the ledger names it.
        action: V(accept) the file as it is now; V(forget) its row and journal; of the statement that a run was
            stopped in, V(done) says that it was carried out, V(again) that it was not.
        reason: why, for the event.
        run_id: of this repair.
        check: only say what would change.

    Returns:
        What the ledger says before and after; equal where nothing has to change.

    Raises:
        RunbookError: no reason, or nothing that this action could mean.
    """
    if not reason.strip():
        raise RunbookError("a repair needs a reason", hint="Say it with -e repair_reason='…': the ledger keeps it.")
    row = next((row for row in ledger.rows() if row.file == name), None)
    file = next((file for file in files if file.file == name), None)
    if action == "forget" and row is None:
        return "no row", "no row"
    if row is None:
        raise RunbookError(
            f"{name}: the ledger has no row for it",
            hint="Files are named as playbooks/status.yml shows them: "
            + ", ".join(r.file for r in ledger.rows())
            + ".",
        )
    if action == "accept":
        if file is None:
            raise RunbookError(f"{name}: there is no such file now", hint="To have it forgotten: repair_action=forget.")
        before, after = f"checksum {row.checksum}", f"checksum {file.checksum}"
        effect: t.Callable[[], None] = lambda: ledger.set_checksum(file)  # noqa: E731 - one of three, called below
    elif action == "forget":
        before, after = f"{row.state}, checksum {row.checksum}", "no row"
        effect = lambda: ledger.forget(name)  # noqa: E731
    else:
        entry = next((entry for entry in ledger.journal(name).values() if entry["state"] == "running"), None)
        if entry is None or row.state != "running":
            return f"{row.state}, no statement in doubt", f"{row.state}, no statement in doubt"
        state = "done" if action == "done" else "failed"
        before, after = f"statement {entry['statement']} running", f"statement {entry['statement']} {state}"
        effect = lambda: ledger.decide(name, entry["statement"], state)  # noqa: E731
    if before != after and not check:
        with ledger.connection.transaction():
            effect()
            ledger.record_event(
                "repaired", run_id=run_id, file=name, action=action, reason=reason, before=before, after=after
            )
    return before, after
