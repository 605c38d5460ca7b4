# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all modules do alike: arguments, missing libraries, and the one place that turns errors into results."""

from __future__ import annotations

import contextlib
import os
import typing as t
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    connection_argument_spec,
    database_argument_spec,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, Unparsed, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._private import remove_abandoned, take_lock
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import PSYCOPG_IMPORT_ERROR, psycopg

#: What the controller calls a file of progress, and for how long after its last line it may still read it.
_PROGRESS = f"runbook-progress-{'[0-9a-f]' * 32}"
_PROGRESS_SECONDS = 3600.0

Work = t.Callable[[AnsibleModule], dict[str, t.Any]]


def run_postgres_module(work: Work, argument_spec: dict[str, t.Any], **options: t.Any) -> None:
    """Run a module that connects to a database: its result is what C(work) returns, its failure what it raises."""
    specification = {**connection_argument_spec(), **database_argument_spec(), **argument_spec}
    module = AnsibleModule(argument_spec=specification, supports_check_mode=True, **options)
    if PSYCOPG_IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("psycopg"), exception=PSYCOPG_IMPORT_ERROR)
    _finish(module, work)


def run_module(work: Work, argument_spec: dict[str, t.Any]) -> None:
    """Run a module that connects to no database, likewise."""
    _finish(AnsibleModule(argument_spec=argument_spec, supports_check_mode=True), work)


def _finish(module: AnsibleModule, work: Work) -> None:
    try:
        result = work(module)
    except (RunbookError, Unparsed) as error:
        module.fail_json(**error.as_result())
    except psycopg.Error as error:
        module.fail_json(**from_postgres(error, f"database {module.params.get('login_db')}").as_result())
    except OSError as error:
        module.fail_json(msg=f"{error.filename or module.tmpdir}: {error.strerror or error}")
    module.exit_json(**result)


def teller(stack: contextlib.ExitStack, path: str | None) -> t.Callable[[str], None] | None:
    """Return what appends a line to the progress file, or None where there is none to write."""
    if not path:
        return None
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError:  # progress is a comfort, not a condition
        return None
    stack.callback(os.close, handle)
    take_lock(handle)
    # the controller removes its file; where it was killed nobody does. It reads the last lines after the lock is free.
    remove_abandoned(Path(path).parent, _PROGRESS, seconds=_PROGRESS_SECONDS)

    def tell(line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, for instance
            os.write(handle, f"{line}\n".encode())  # in one piece: several threads may tell

    return tell
