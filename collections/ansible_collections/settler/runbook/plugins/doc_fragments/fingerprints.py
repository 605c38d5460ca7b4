# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The options of modules that make fingerprints of data."""

from __future__ import annotations


class ModuleDocFragment:
    """Said once for all of them; C(_fingerprint.limits_spec) has the same."""

    DOCUMENTATION = r"""
options:
  fingerprint_sample_above:
    description:
      - Size in bytes of a table above which only a part of its rows is hashed for the fingerprint, the same part each
        time. All rows are counted. What reads the data again later reads the same part.
    type: int
    default: 4294967296
  fingerprint_keys:
    description:
      - Of about so many rows of each table the key is kept, so that a difference can be traced to rows. These keys are
        data of the database. V(0) keeps none.
    type: int
    default: 20000
"""
