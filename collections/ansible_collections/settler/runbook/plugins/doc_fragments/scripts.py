# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The option of modules that need migrations parsed."""

from __future__ import annotations


class ModuleDocFragment:
    """Said once for all of them."""

    DOCUMENTATION = r"""
options:
  scripts_file:
    description:
      - File with the migrations parsed, for a host that has no pglast.
      - Given by the action plugin of the module's name. It parses on the controller what the module hands to it, and
        then runs the module again.
    type: path
requirements:
  - pglast >= 7 on the host where the module runs, or on the controller
"""
