# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""psycopg, or the reason why it is missing: the modules say it in words instead of a traceback."""

from __future__ import annotations

import gc
import traceback

# A module lives for seconds, and nearly all that it makes (code, parse trees, rows) lives as long as it does. To look
# for garbage among that after each 700 objects costs a sixth of its start.
gc.set_threshold(50_000)

PSYCOPG_IMPORT_ERROR: str | None = None
try:
    import psycopg
    from psycopg import pq, sql
    from psycopg.rows import dict_row
except ImportError:
    PSYCOPG_IMPORT_ERROR = traceback.format_exc()
    psycopg = pq = sql = dict_row = None  # type: ignore[assignment]

__all__ = ["PSYCOPG_IMPORT_ERROR", "dict_row", "pq", "psycopg", "sql"]
