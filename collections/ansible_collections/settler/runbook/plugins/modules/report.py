#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Documentation of the action plugin of this name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: report
short_description: Print the summary of a run, and write it as a file
version_added: 0.1.0
description:
  - Prints a line for each phase of a run, its outcome, and what to do next, in the terminal and in AWX's job output.
  - An action plugin. It works in the controller, connects nowhere and costs no process.
options:
  title:
    description: First line.
    type: str
    required: true
  phases:
    description: What the run did, in order. Without it the phases that M(settler.runbook.phase) has noted.
    type: list
    elements: dict
    suboptions:
      name:
        description: Name of the phase.
        type: str
        required: true
      state:
        description: How it went.
        type: str
        choices: [ok, changed, failed, skipped]
        default: ok
      text:
        description: What it did, in one line; further lines are printed below.
        type: str
        default: ''
      seconds:
        description: How long it took, in seconds.
        type: float
  outcome:
    description: What the run came to.
    type: str
    required: true
  state:
    description: How the run went.
    type: str
    choices: [ok, changed, failed, skipped]
    default: ok
  facts:
    description: Further facts, printed below the outcome; empty ones are left out.
    type: dict
    default: {}
  hints:
    description: Lines that say what to do next.
    type: list
    elements: str
    default: []
  path:
    description: File on the controller that the summary is written to as JSON, mode 0600. Not written in check mode.
    type: path
attributes:
  action:
    description: Runs in the controller.
    support: full
  check_mode:
    description: Prints in check mode too, and writes no file.
    support: full
  diff_mode:
    description: Changes nothing that could be shown.
    support: N/A
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Print the summary
  settler.runbook.report:
    title: Settler runbook · migrate · prod
    phases:
      - name: migrate
        state: changed
        text: 002_add_index.sql
        seconds: 1.3
    outcome: migrated
    path: /var/log/settler/20261123t031500-4f2a.json
"""

RETURN = r"""
path:
  description: The file that was written.
  returned: when O(path) is given, outside check mode
  type: str
"""
