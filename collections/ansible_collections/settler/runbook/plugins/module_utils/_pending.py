# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is pending in a database, without a lock and without a write.

A run with nothing to do ends here, so this needs neither the parser nor the engine: loading them takes longer than
asking.
"""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._plan import Plan, plan

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg
    from ansible_collections.settler.runbook.plugins.module_utils._run import Options


def pending_plan(
    connection: psycopg.Connection[t.Any] | None, files: t.Sequence[MigrationFile], options: Options
) -> Plan:
    """Return the plan without a lock and without a write; no connection means no database: everything is pending."""
    rows = []
    if connection:
        ledger = Ledger(connection, options.schema)
        refuse_copy(ledger, options)
        rows = ledger.rows()
    return plan(files, rows, out_of_order=options.out_of_order, phase=options.phase)


def refuse_unexpected(todo: Plan, options: Options) -> None:
    """Raise if a plan was approved and this is another one; an empty one is what is left of any."""
    if options.expected_plan and todo.pending and todo.digest != options.expected_plan:
        raise RunbookError(
            f"this is not the plan that was approved: digest {todo.digest}, expected {options.expected_plan}\n"
            + "\n".join(f"  {file.file}  {file.checksum[:12]}" for file in todo.pending),
            hint="Look at the plan (--check --diff), then approve its digest with -e migrate_expected_plan=….",
            digest=todo.digest,
        )


def refuse_copy(ledger: Ledger, options: Options) -> tuple[str, str] | None:
    """Raise if the ledger came along from another server or database, unless that is accepted; returns from where."""
    origin = ledger.origin()
    if origin and not options.accept_copy:
        raise RunbookError(
            f"the ledger was written in database {origin[1]} of another server or under another name "
            f"(system identifier {origin[0]}): this database is a copy, a restore, or was upgraded",
            hint="If it is the one that you mean: -e migrate_accept_copy=true, once.",
        )
    return origin
