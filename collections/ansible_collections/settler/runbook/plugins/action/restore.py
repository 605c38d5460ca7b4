# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module restore, which says which way it goes and what that would lose before it acts."""

from __future__ import annotations

from ansible_collections.settler.runbook.plugins.action.migrate import ActionModule as Shown


class ActionModule(Shown):
    """Runs C(settler.runbook.restore)."""

    module = "settler.runbook.restore"
