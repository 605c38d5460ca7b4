# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Notes what a phase of a run did, for the summary; works in the controller."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase

STATES = ["ok", "changed", "failed", "skipped"]
ARGUMENTS = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": STATES, "default": "ok"},
    "text": {"type": "str", "default": ""},
    "seconds": {"type": "float"},
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs C(settler.runbook.phase)."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Add the phase to the host's facts."""
        result = super().run(tmp, task_vars)
        _validation, phase = self.validate_argument_spec(argument_spec=ARGUMENTS)
        phases = [*noted(task_vars or {}), phase]
        run_id = (task_vars or {}).get("runbook_run_id", "")
        result.update(changed=False, ansible_facts={"runbook": {"run_id": run_id, "phases": phases}})
        return t.cast("dict[str, t.Any]", result)


def noted(task_vars: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    """Return the phases of this run; facts that a cache has kept of another run do not count."""
    facts = task_vars.get("ansible_facts", {}).get("runbook", {})
    return list(facts["phases"]) if facts and facts["run_id"] == task_vars.get("runbook_run_id", "") else []
