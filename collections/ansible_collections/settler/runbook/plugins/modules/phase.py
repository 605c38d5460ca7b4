#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Documentation of the action plugin of this name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: phase
short_description: Note what a phase of a run did, for its summary
version_added: 0.1.0
description:
  - Adds a line to the summary that M(settler.runbook.report) prints.
  - An action plugin. It works in the controller, connects nowhere and costs no process.
options:
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
attributes:
  action:
    description: Runs in the controller.
    support: full
  check_mode:
    description: Notes in check mode too.
    support: full
  diff_mode:
    description: Changes nothing that could be shown.
    support: N/A
seealso:
  - module: settler.runbook.report
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Note the phase
  settler.runbook.phase:
    name: backup
    state: changed
    text: 37,400 rows of 13 tables
    seconds: 1.1
"""

RETURN = r"""
ansible_facts:
  description: The phases of the run so far.
  returned: always
  type: dict
  contains:
    runbook:
      description: The run and its phases.
      type: dict
      returned: always
      contains:
        run_id:
          description: Name of the run, from the variable C(runbook_run_id).
          type: str
          returned: always
        phases:
          description: The phases in order, as they were noted.
          type: list
          elements: dict
          returned: always
"""
