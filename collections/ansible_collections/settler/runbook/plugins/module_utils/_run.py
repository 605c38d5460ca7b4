# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A run: how it is to work, what it has done so far, and small things that all its parts need."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible_collections.settler.runbook.plugins.module_utils._psycopg import dict_row, psycopg

#: Another session stood in the way: the file was rolled back and may be tried again.
RETRYABLE = frozenset({"55P03", "40P01"})


@dataclass(frozen=True)
class BlockerPolicy:
    """What to do with sessions that hold a lock that a file waits for, C(after) seconds.

    C(action) is V(wait), V(cancel) or V(terminate). C(match) and C(never) have patterns (fnmatch) of application
    names and roles: only what matches the first and not the second is ever ended.
    """

    action: str = "wait"
    after: float = 30.0
    match: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to run. Times are in seconds.

    C(lock_timeout) is for locks that make others queue, C(long_lock_timeout) for
    commands such as CREATE INDEX CONCURRENTLY that block nobody and would leave something invalid.
    C(hazard_min_bytes) is how large a relation has to be for work on it to be a hazard; a loss of data always is.
    C(application_roles) are those whom another run may have kept out, where this one has no C(window) of its own.
    """

    run_id: str
    project: str = "settler"
    schema: str = "runbook"
    role: str | None = None
    job_id: str | None = None
    lock_wait: float = 60.0
    long_transaction: float = 60.0
    lock_timeout: float = 2.0
    long_lock_timeout: float = 3600.0
    statement_timeout: float = 0.0
    lock_attempts: int = 10
    blockers: BlockerPolicy = BlockerPolicy()
    out_of_order: bool | tuple[str, ...] = False
    phase: str = "all"
    expected_plan: str = ""
    accept_copy: bool = False
    window: str = ""
    application_roles: tuple[str, ...] = ()
    repair_invalid: bool = True
    analyze: bool = True
    refresh: bool = True
    hazards_allowed: tuple[str, ...] = ()
    hazard_min_bytes: int = 10 * 1024 * 1024
    batch_max_lag: float = 10.0
    batch_max_transaction: float = 300.0
    progress_interval: float = 5.0


@dataclass
class Applied:
    """One file that was applied.

    C(rows) are those that a batch file has changed, C(changes) the tables and columns whose data it says to change.
    """

    file: str
    version: str
    checksum: str
    statements: int
    duration_ms: int
    attempts: int
    kind: str = "versioned"
    rows: int | None = None
    changes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What a run did; filled while it goes, so that a failure can say how far it came.

    C(blockers) are the sessions that stood in the way of the file that was tried last, C(ended) those that the
    policy has cancelled or terminated, C(maintained) the tables that were analysed and the views that were refreshed.
    """

    applied: list[Applied] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    blockers: list[dict[str, t.Any]] = field(default_factory=list)
    ended: list[dict[str, t.Any]] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    analyzed: list[str] = field(default_factory=list)
    refreshed: list[str] = field(default_factory=list)


def rows_of(
    connection: psycopg.Connection[t.Any], query: t.LiteralString, parameters: t.Any = None
) -> list[dict[str, t.Any]]:
    """Return all rows as dictionaries."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()


def one_of(connection: psycopg.Connection[t.Any], query: str, *parameters: t.Any) -> t.Any:
    """Return the one value of a query."""
    row = connection.execute(query, list(parameters) or None).fetchone()
    assert row is not None
    return row[0]


def describe_session(row: t.Mapping[str, t.Any]) -> str:
    """Describe a session that stands in the way; a prepared transaction has none."""
    who = f"pid {row['pid']}" if row["pid"] else "no session"
    return (
        f"{who} ({row['usename']}, {row['application_name'] or 'no application name'}, {row['state']}, "
        f"{row['seconds']} s): {' '.join((row['query'] or '').split())}"
    )
