# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Prints the summary of a run; works in the controller, so it costs no process."""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.color import stringc
from ansible.utils.display import Display
from ansible_collections.settler.runbook.plugins.action.phase import ARGUMENTS as PHASE
from ansible_collections.settler.runbook.plugins.action.phase import noted

MARKS = {
    "ok": ("✔", "green"),
    "changed": ("✔", "yellow"),
    "failed": ("✘", "red"),
    "skipped": ("–", "dark gray"),
}
WIDTH = 88
ARGUMENTS = {
    "title": {"type": "str", "required": True},
    "phases": {"type": "list", "elements": "dict", "options": PHASE},
    "outcome": {"type": "str", "required": True},
    "state": {"type": "str", "choices": list(MARKS), "default": "ok"},
    "facts": {"type": "dict", "default": {}},
    "hints": {"type": "list", "elements": "str", "default": []},
    "path": {"type": "path"},
}


class ActionModule(ActionBase):
    """Runs C(settler.runbook.report)."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Print; write the file if one is wanted."""
        result = super().run(tmp, task_vars)
        _validation, content = self.validate_argument_spec(argument_spec=ARGUMENTS)
        if content["phases"] is None:
            content["phases"] = noted(task_vars or {})
        Display().display("\n" + "\n".join(render(content)) + "\n")
        result["changed"] = False
        path = content.pop("path")
        if path and not self._task.check_mode:
            write(Path(path), content)
            result["path"] = path
        return t.cast("dict[str, t.Any]", result)


def render(content: t.Mapping[str, t.Any]) -> list[str]:
    """Return the summary's lines: a title, a line a phase, the outcome, facts, hints."""
    rule = "─" * WIDTH
    width = max([10, *(len(phase["name"]) for phase in content["phases"])])
    lines = [f"  {content['title']}", f"  {rule}"]
    for phase in content["phases"]:
        seconds = "" if phase["seconds"] is None else f"{phase['seconds']:.1f} s"
        first, *more = phase["text"].splitlines() or [""]
        room = WIDTH - width - 4
        lines.append(f"  {marked(phase['state'])} {phase['name']:<{width}}  {first:<{room - 9}}{seconds:>9}".rstrip())
        lines += [f"    {'':<{width}}  {line}" for line in more]
    mark, colour = MARKS[content["state"]]
    lines += [f"  {rule}", "  " + stringc(f"{mark} {content['outcome']}", colour)]
    label = max([0, *(len(name) for name in content["facts"])])
    lines += [f"    {name:<{label}}  {value}" for name, value in content["facts"].items() if value not in ("", None)]
    if content["hints"]:
        lines += ["", *(f"    {hint}" for hint in content["hints"])]
    return lines


def marked(state: str) -> str:
    """Return a state's mark in its colour."""
    return t.cast("str", stringc(*MARKS[state]))


def write(path: Path, content: t.Mapping[str, t.Any]) -> None:
    """Write the report as JSON, whole or not at all, for its owner only."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.touch(mode=0o600)
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
        partial.rename(path)
    except OSError as error:
        raise AnsibleActionFail(f"{error.filename}: {error.strerror}") from error
