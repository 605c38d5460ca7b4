# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an operator reads while a run goes: a line a task, with its time; failures as their message, not as data."""

from __future__ import annotations

DOCUMENTATION = r"""
name: operator
type: stdout
short_description: Short output for an operator
version_added: 0.1.0
description:
  - Prints a line for each task that does something, with how long it took, and the message of a task that failed.
  - Tasks that only compute, include or assert are left out while they succeed.
  - With C(-v) prints what P(ansible.builtin.default#callback) prints.
  - AWX and ansible-runner use their own output and ignore this one.
extends_documentation_fragment:
  - default_callback
  - result_format_callback
author:
  - The Settler database team (@settler)
"""

import time
import typing as t

from ansible.plugins.callback.default import CallbackModule as DefaultCallback
from ansible.utils.color import stringc

#: Actions that an operator does not wait for.
QUIET = frozenset(
    {
        "ansible.builtin.assert",
        "ansible.builtin.include_role",
        "ansible.builtin.include_tasks",
        "ansible.builtin.set_fact",
        "ansible.builtin.validate_argument_spec",
        "settler.runbook.phase",
        "settler.runbook.report",
    }
)
WIDTH = 88


class CallbackModule(DefaultCallback):  # type: ignore[misc]
    """Prints less than the default; the default does it with -v."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "settler.runbook.operator"

    def __init__(self) -> None:
        super().__init__()
        self._heading = ""
        self._started: dict[tuple[str, str], float] = {}
        self._several_hosts = False

    @property
    def _verbose(self) -> bool:
        return bool(self._display.verbosity)

    def v2_playbook_on_play_start(self, play: t.Any) -> None:
        """Keep the play's name: it is printed above the play's first line, and not at all if there is none."""
        if self._verbose:
            super().v2_playbook_on_play_start(play)
            return
        self._several_hosts = len(play.get_variable_manager()._inventory.get_hosts(play.hosts)) > 1
        mode = "  (check mode: nothing is changed)" if play.check_mode else ""
        self._heading = f"\n{play.get_name()}{mode}"

    def v2_playbook_on_task_start(self, task: t.Any, is_conditional: bool) -> None:
        """Print nothing yet: the line comes with the result."""
        if self._verbose:
            super().v2_playbook_on_task_start(task, is_conditional)

    def v2_runner_on_start(self, host: t.Any, task: t.Any) -> None:
        """Remember when a task began."""
        self._started[host.get_name(), task._uuid] = time.monotonic()
        if self._verbose:
            super().v2_runner_on_start(host, task)

    def v2_runner_on_ok(self, result: t.Any) -> None:
        """Print a task that did something."""
        if self._verbose:
            super().v2_runner_on_ok(result)
            return
        self._handle_warnings(result.result)
        if result.task.resolved_action in QUIET or result.task.action in QUIET:
            return
        self._line(result, *(("✔", "yellow") if result.result.get("changed") else ("✔", "green")))

    def v2_runner_on_failed(self, result: t.Any, ignore_errors: bool = False) -> None:
        """Print the message of what failed; the rest of a result is data, and -v shows it."""
        if self._verbose:
            super().v2_runner_on_failed(result, ignore_errors)
            return
        self._handle_warnings(result.result)
        self._line(result, "✘", "red")
        if "results" not in result.result:  # of a loop, the items have said it
            self._message(result)

    def v2_runner_on_unreachable(self, result: t.Any) -> None:
        """Print a host that does not answer."""
        if self._verbose:
            super().v2_runner_on_unreachable(result)
            return
        self._line(result, "✘", "red")
        self._message(result)

    def v2_runner_on_skipped(self, result: t.Any) -> None:
        """Print nothing."""
        if self._verbose:
            super().v2_runner_on_skipped(result)

    def v2_runner_item_on_ok(self, result: t.Any) -> None:
        """Print nothing: the loop's own line follows."""
        if self._verbose:
            super().v2_runner_item_on_ok(result)
        else:
            self._handle_warnings(result.result)

    def v2_runner_item_on_failed(self, result: t.Any) -> None:
        """Print which item failed, and why."""
        if self._verbose:
            super().v2_runner_item_on_failed(result)
            return
        self._display.display(stringc(f"    item {self._get_item_label(result.result)}", "red"))
        self._message(result)

    def v2_runner_item_on_skipped(self, result: t.Any) -> None:
        """Print nothing."""
        if self._verbose:
            super().v2_runner_item_on_skipped(result)

    def v2_playbook_on_include(self, included_file: t.Any) -> None:
        """Print nothing."""
        if self._verbose:
            super().v2_playbook_on_include(included_file)

    def v2_playbook_on_stats(self, stats: t.Any) -> None:
        """Print a line a database that failed or could not be reached; the summary has said the rest."""
        if self._verbose:
            super().v2_playbook_on_stats(stats)
            return
        for host in sorted(stats.processed):
            counts = stats.summarize(host)
            if counts["failures"] or counts["unreachable"]:
                self._display.display(stringc(f"\n✘ {host}: failed", "red"))

    def _line(self, result: t.Any, mark: str, colour: str) -> None:
        """Print one task."""
        if self._heading:
            self._display.display(stringc(self._heading, "bright blue"))
            self._heading = ""
        host = result.host.get_name()
        began = self._started.pop((host, result.task._uuid), time.monotonic())
        name = result.task.get_name().strip()
        if self._several_hosts:
            name = f"{host}: {name}"
        seconds = f"{time.monotonic() - began:.1f} s"
        self._display.display(f"  {stringc(mark, colour)} {name:<{WIDTH - 11}}{seconds:>9}")

    def _message(self, result: t.Any) -> None:
        """Print the message of a failure."""
        content = result.result
        text = content.get("msg") or content.get("stderr") or content.get("stdout") or "failed without a message"
        for line in str(text).splitlines():
            self._display.display(stringc(f"    {line}", "red"))
