# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all modules do alike: arguments, missing libraries, and the one place that turns errors into results."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    connection_argument_spec,
    database_argument_spec,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, Unparsed, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import PSYCOPG_IMPORT_ERROR, psycopg

Work = t.Callable[[AnsibleModule], dict[str, t.Any]]


def run_postgres_module(work: Work, argument_spec: dict[str, t.Any], **options: t.Any) -> None:
    """Run a module that connects to a database: its result is what C(work) returns, its failure what it raises."""
    specification = {**connection_argument_spec(), **database_argument_spec(), **argument_spec}
    module = AnsibleModule(argument_spec=specification, supports_check_mode=True, **options)
    if PSYCOPG_IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("psycopg"), exception=PSYCOPG_IMPORT_ERROR)
    try:
        result = work(module)
    except (RunbookError, Unparsed) as error:
        module.fail_json(**error.as_result())
    except psycopg.Error as error:
        module.fail_json(**from_postgres(error, f"database {module.params['login_db']}").as_result())
    except OSError as error:
        module.fail_json(msg=f"{error.filename or module.tmpdir}: {error.strerror or error}")
    module.exit_json(**result)
