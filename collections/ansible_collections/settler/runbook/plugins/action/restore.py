# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module restore, which says which way it goes and what that would lose before it acts."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.settler.runbook.plugins.plugin_utils._progress import progress_shown


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs C(settler.runbook.restore)."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; show what it appends to its progress file."""
        result = super().run(tmp, task_vars)
        variables = task_vars or {}
        alone = len(variables.get("ansible_play_hosts", [])) < 2
        with progress_shown(self, "" if alone else f"{variables['inventory_hostname']}: ") as path:
            result.update(
                self._execute_module(
                    module_name="settler.runbook.restore",
                    module_args={**self._task.args, "progress_file": path},
                    task_vars=task_vars,
                )
            )
        return t.cast("dict[str, t.Any]", result)
