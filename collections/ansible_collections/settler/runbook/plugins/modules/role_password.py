#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Set a role's password without showing it to the server."""

from __future__ import annotations

DOCUMENTATION = r"""
module: role_password
short_description: Set a role's password as a SCRAM verifier that the client computes
version_added: 0.1.0
description:
  - libpq makes the SCRAM-SHA-256 verifier here, so that the password itself is in no SQL text, log or statistics view.
  - Whether the password is right already is read from the stored verifier, or, where the connecting role may not read
    it, found out by logging in.
  - A superuser's session also keeps the verifier out of the server's log.
options:
  role:
    description: Role whose password it is.
    type: str
    required: true
  password:
    description: The password.
    type: str
    required: true
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Set the application's password
  settler.runbook.role_password:
    login_host: db.example.org
    login_user: postgres
    login_password: "{{ runbook_admin_password }}"
    login_db: postgres
    role: settler_app
    password: "{{ runbook_app_password }}"
"""

RETURN = r"""
role:
  description: Role whose password it is.
  returned: always
  type: str
"""

import base64
import contextlib
import hashlib
import hmac
import re
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, libpq_parameters
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

from ansible_collections.community.postgresql.plugins.module_utils.saslprep import saslprep

VERIFIER = re.compile(r"SCRAM-SHA-256\$(\d+):([^$]+)\$([^:]+):(.+)")


def fits(password: str, verifier: str | None) -> bool:
    """Tell whether a password has this SCRAM-SHA-256 verifier (RFC 5803); any other kind of verifier does not fit."""
    match = VERIFIER.fullmatch(verifier or "")
    if not match:
        return False
    with contextlib.suppress(ValueError):  # PostgreSQL takes what SASLprep refuses as it is
        password = saslprep(password)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(match[2]), int(match[1]))
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    return hmac.compare_digest(base64.b64encode(stored).decode(), match[3])


def is_set(params: t.Mapping[str, t.Any], connection: psycopg.Connection[t.Any]) -> bool:
    """Tell whether the role has the password already."""
    try:
        row = connection.execute(
            "SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = %s", [params["role"]]
        ).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        login = {**libpq_parameters(params), "user": params["role"]}
        try:
            psycopg.connect(**login, dbname=params["login_db"], password=params["password"]).close()
        except psycopg.OperationalError as error:
            return "password" not in str(error)  # refused for another reason, after the password was right
        return True
    return bool(row) and fits(params["password"], row[0])


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Compare; set the password if it differs."""
    params = module.params
    role = params["role"]
    with connect(params, application="runbook:role_password") as connection:
        found = connection.execute("SELECT FROM pg_catalog.pg_roles WHERE rolname = %s", [role]).fetchone()
        if found is None and not module.check_mode:
            raise RunbookError(f"no such role: {role}", hint="playbooks/create_database.yml makes the roles.")
        if found is not None and is_set(params, connection):
            return {"changed": False, "role": role}
        if not module.check_mode:
            verifier = connection.pgconn.encrypt_password(
                params["password"].encode(), role.encode(), b"scram-sha-256"
            ).decode()
            superuser = connection.info.parameter_status("is_superuser") == "on"
            with connection.transaction():
                if superuser:
                    connection.execute("SET LOCAL log_statement = 'none'; SET LOCAL log_min_duration_statement = -1")
                    connection.execute("SET LOCAL log_min_error_statement = 'panic'")
                connection.execute(
                    sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier))
                )
    return {"changed": True, "role": role}


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "role": {"type": "str", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
        },
    )


if __name__ == "__main__":
    main()
