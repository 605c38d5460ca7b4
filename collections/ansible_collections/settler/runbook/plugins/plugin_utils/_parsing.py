# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Action plugins of modules that need migrations parsed: where the host has no parser, the controller parses."""

from __future__ import annotations

import json
import platform
import sys
import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.settler.runbook.plugins.module_utils._files import MigrationFile
from ansible_collections.settler.runbook.plugins.module_utils._scripts import from_data, key_of, parsed, unpack
from ansible_collections.settler.runbook.plugins.module_utils._statements import PGLAST_IMPORT_ERROR


class ParsingAction(ActionBase):  # type: ignore[misc]
    """Runs the module of the plugin's own name."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; where it asks for files to be parsed, run it again with the scripts."""
        result = super().run(tmp, task_vars)
        result.update(self._run_module(dict(self._task.args), task_vars or {}))
        return t.cast("dict[str, t.Any]", result)

    def _run_module(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        name = "settler.runbook." + type(self).__module__.rpartition(".")[2]
        scripts: dict[str, t.Any] = {}
        while True:
            result = self._execute_module(module_name=name, module_args=arguments, task_vars=task_vars)
            question = result.pop("unparsed", None)
            if question is None:
                return t.cast("dict[str, t.Any]", result)
            unable = (
                f"{result['msg']}, for {task_vars['inventory_hostname']}, and on the controller {platform.node()} "
                f"({sys.executable}); nothing was changed"
                if PGLAST_IMPORT_ERROR
                else ""
            )
            files = from_data(list[MigrationFile], unpack(question))
            if any(key_of(file) in scripts for file in files):  # what we sent did not arrive: asking again is no use
                return {**result, "msg": f"{result['msg']}, and it did not accept the scripts that the controller made"}
            scripts |= parsed(files, unable)
            arguments["scripts_file"] = self._sent("scripts.json", json.dumps(scripts))

    def _sent(self, name: str, text: str) -> str:
        """Put a file into the task's temporary folder on the host; returns its path there."""
        shell = self._connection._shell
        if shell.tmpdir is None:
            self._make_tmp_path()
        path = shell.join_path(shell.tmpdir, name)
        self._transfer_data(path, text)
        self._fixup_perms2((shell.tmpdir, path))
        return t.cast("str", path)
