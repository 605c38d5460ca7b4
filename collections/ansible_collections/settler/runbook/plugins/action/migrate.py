# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs a module and shows its progress while it works: a module can only speak at its end."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import typing as t
from pathlib import Path

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

_LOOK_SECONDS = 0.5


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs C(settler.runbook.migrate)."""

    _supports_check_mode = True
    module = "settler.runbook.migrate"

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; where it shares our files, show what it appends to its progress file."""
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        with contextlib.ExitStack() as stack:
            if self._connection.transport == "local" and not self._task.check_mode:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runbook-"))) / "progress"
                arguments["progress_file"] = str(path)
                stack.enter_context(_shown(path))
            result.update(self._execute_module(module_name=self.module, module_args=arguments, task_vars=task_vars))
        return t.cast("dict[str, t.Any]", result)


@contextlib.contextmanager
def _shown(path: Path) -> t.Iterator[None]:
    """Show each line that is appended to a file, until the end of the block."""
    ended = threading.Event()

    def follow() -> None:
        shown = 0
        while not ended.wait(_LOOK_SECONDS):
            if path.exists():
                lines = path.read_text(encoding="utf-8").split("\n")[:-1]
                for line in lines[shown:]:
                    Display().display(f"    … {line}")
                shown = len(lines)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
