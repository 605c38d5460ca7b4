# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Attribute texts of the modules, said once."""

from __future__ import annotations


class ModuleDocFragment:
    """Fragments C(attributes) (modules that change), C(attributes.info) (those that only read)."""

    DOCUMENTATION = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/settler.runbook.postgres) in C(module_defaults) to give the connection once.
    support: full
    membership:
      - settler.runbook.postgres
  check_mode:
    description: In check mode the module reads, says what it would do, and writes nothing.
    support: full
  diff_mode:
    description: Returns what it changes as C(before) and C(after).
    support: full
  idempotent:
    description: A second run with the same arguments changes nothing.
    support: full
"""

    INFO = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/settler.runbook.postgres) in C(module_defaults) to give the connection once.
    support: full
    membership:
      - settler.runbook.postgres
  check_mode:
    description: Reads only, so check mode makes no difference.
    support: full
  diff_mode:
    description: Changes nothing, so there is nothing to show.
    support: N/A
  idempotent:
    description: Changes nothing.
    support: full
"""
