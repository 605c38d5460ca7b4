# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module migration_info; parses for it where its host cannot."""

from __future__ import annotations

from ansible_collections.settler.runbook.plugins.plugin_utils._parsing import ParsingAction


class ActionModule(ParsingAction):
    """Runs C(settler.runbook.migration_info)."""
