#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep the application out of a database, and let it in again."""

from __future__ import annotations

DOCUMENTATION = r"""
module: maintenance
short_description: Keep application roles out of a database, and let them in again
version_added: 0.1.0
description:
  - With O(state=present) takes the right to connect from the application roles, lets their open transactions finish
    for O(drain) seconds, and ends their sessions. From then on they can write nothing.
  - With O(state=absent) gives the right back.
  - The login must be a member of the application roles; otherwise it neither sees nor may end their sessions.
  - Nothing is stored. A run that was killed leaves the application out; running with O(state=absent) mends it.
options:
  state:
    description: Whether the window is open.
    type: str
    choices: [present, absent]
    required: true
  roles:
    description: Application roles. Superusers, owners, and any role while PUBLIC may connect, are refused.
    type: list
    elements: str
    required: true
  set_role:
    description: Role to become for granting and revoking, usually the database's owner.
    type: str
  drain:
    description: Seconds that open transactions get to finish before their sessions are ended.
    type: float
    default: 5.0
  lock_wait:
    description:
      - Seconds to wait for other runs that are at work in the database. If one still is, the window is not opened.
      - What a killed run has left on the server is gone after a second or two.
    type: float
    default: 15.0
  run_id:
    description: Name of this run.
    type: str
    default: ''
extends_documentation_fragment:
  - settler.runbook.connection
  - settler.runbook.connection.database
  - settler.runbook.attributes
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Keep the application out
  settler.runbook.maintenance:
    login_host: db.example.org
    login_user: settler_migrator
    login_password: "{{ runbook_migrator_password }}"
    login_db: settler
    set_role: settler_owner
    roles: [settler_app]
    state: present
"""

RETURN = r"""
ended:
  description: Sessions that were ended.
  returned: always
  type: list
  elements: dict
  contains:
    pid:
      description: Process id of the session.
      type: int
      returned: always
    role:
      description: Its role.
      type: str
      returned: always
    application:
      description: Its application_name.
      type: str
      returned: always
    state:
      description: What it did.
      type: str
      returned: always
window:
  description: Which window was opened, for the option O(settler.runbook.migrate#module:window); empty where none was.
  returned: always
  type: str
foreign_window:
  description: Whether another run is at work, so that it is not for this one to let the application in again.
  returned: when another run is at work
  type: bool
"""

import typing as t

from ansible_collections.settler.runbook.plugins.module_utils import _maintenance
from ansible_collections.settler.runbook.plugins.module_utils._connection import connect, connect_if_exists
from ansible_collections.settler.runbook.plugins.module_utils._module import run_postgres_module

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Compare who may connect with what is wanted; change it if it differs."""
    params = module.params
    application = f"runbook:{params['run_id']}:maintenance"
    connection = (connect_if_exists if module.check_mode else connect)(params, application=application)
    if connection is None:
        return {"changed": False, "ended": [], "window": ""}
    with connection:
        roles = params["roles"]
        opening = params["state"] == "present"
        if opening and not module.check_mode:
            _maintenance.check(connection, roles)
        out = set(_maintenance.kept_out(connection, roles))
        changed = out != set(roles) if opening else bool(out)
        after = sorted(roles) if opening else []
        result = {
            "changed": changed,
            "ended": [],
            "window": "",
            "diff": {"before": {"kept_out": sorted(out)}, "after": {"kept_out": after}},
        }
        if module.check_mode:
            return result
        owner = params["set_role"]
        if opening:
            # also when nothing changes: a session that was open before stays until it is ended
            _maintenance.refuse_other_runs(connection, params["run_id"], wait=params["lock_wait"])
            result["ended"], result["window"] = _maintenance.close_to(
                connection, roles, owner=owner, drain=params["drain"]
            )
        elif changed:
            _maintenance.open_to(connection, roles, owner=owner)
        return result


def main() -> None:
    """Run the module."""
    run_postgres_module(
        work,
        {
            "state": {"type": "str", "choices": ["present", "absent"], "required": True},
            "roles": {"type": "list", "elements": "str", "required": True},
            "set_role": {"type": "str"},
            "drain": {"type": "float", "default": 5.0},
            "lock_wait": {"type": "float", "default": 15.0},
            "run_id": {"type": "str", "default": ""},
        },
    )


if __name__ == "__main__":
    main()
