# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module migrate and shows its progress while it works: a module can only speak at its end."""

from __future__ import annotations

import typing as t

from ansible_collections.settler.runbook.plugins.plugin_utils._parsing import ParsingAction
from ansible_collections.settler.runbook.plugins.plugin_utils._progress import progress_shown


class ActionModule(ParsingAction):
    """Runs C(settler.runbook.migrate)."""

    def _run_module(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        if self._task.check_mode:
            return super()._run_module(arguments, task_vars)
        alone = len(task_vars.get("ansible_play_hosts", [])) < 2
        with progress_shown(self, "" if alone else f"{task_vars['inventory_hostname']}: ") as path:
            return super()._run_module({**arguments, "progress_file": path}, task_vars)
