# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Errors of the engine, and what an operator can do about PostgreSQL's own."""

from __future__ import annotations

import typing as t

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

_NO_EXTENSION = (
    "The server has no files of this extension: install the contrib package there (uuid-ossp and pgcrypto are in it)."
)

#: SQLSTATE -> what usually helps; where it depends on the cause, by words of the message in lower case, of which the
#: first that it has counts. PostgreSQL's own HINT is always kept beside it.
HINTS: dict[str, str | dict[str, str]] = {
    "0A000": {
        "is not available": _NO_EXTENSION,
        "cannot alter type of a column": "Something is built on the column: drop it, alter the column, make it again, "
        "all in this file.",
        "": "PostgreSQL cannot do that to such an object, or not in this version: its words say what it refuses.",
    },
    "22001": "A value is longer than its column allows: widen the column, or shorten the values before.",
    "22003": "A number is too large for its type: make the column bigint or numeric before.",
    "22P02": "A value does not fit its type. For a tenant context: SET app.current_tenant_id = '<uuid>' first.",
    "23502": "Rows with NULL exist. Fill them in an earlier statement, then set NOT NULL.",
    "23503": "Rows refer to rows that do not exist. Find and repair them before the constraint is added.",
    "23505": "Rows with the same key exist. Find and merge them before the unique index is made.",
    "23514": "Existing rows break the check. Repair them first.",
    "25001": "This statement cannot run inside a transaction block: put it into a file of its own that begins with the "
    "line -- runbook: no-transaction",
    "25006": "The server or the session is read-only: connect to the primary.",
    "2BP01": "Other objects depend on this one: change them first. CASCADE would drop them too.",
    "3D000": "The database does not exist: playbooks/setup.yml makes it.",
    "3F000": "The schema does not exist, or search_path does not name it.",
    "40P01": "Two sessions waited for each other. The run is safe to repeat.",
    "42501": "The role lacks the right: the owner role must own the objects (playbooks/create_database.yml "
    "gives them to it) and hold CREATE on the database for extensions.",
    "42601": "Not SQL that this server version knows. CREATE POLICY has no IF NOT EXISTS in any version.",
    "42701": "The column exists already: write ADD COLUMN IF NOT EXISTS.",
    "42703": "The column does not exist. A legacy table may lack it: add it with ADD COLUMN IF NOT EXISTS first.",
    "42704": {
        "configuration parameter": "Nobody has set it in this session: SET app.current_tenant_id = '<uuid>' first, or "
        "ask with current_setting('…', true), which answers NULL.",
        "operator class": "An extension brings it, such as pg_trgm or btree_gist: CREATE EXTENSION in an earlier "
        "statement.",
        'type "': "CREATE TYPE, or CREATE EXTENSION where one brings it, must come before its use; or search_path does "
        "not name its schema.",
        'role "': "playbooks/create_database.yml makes the roles; a migration only refers to those.",
        "": "There is no such object under this name. Where it may be missing: IF EXISTS.",
    },
    "42710": "The object exists already. For policies and triggers test pg_policy or use CREATE OR REPLACE TRIGGER.",
    "42804": {
        "foreign key": "Columns of a foreign key must have the type of those that they refer to.",
        "default for column": "The default does not fit the new type: DROP DEFAULT before, SET DEFAULT after.",
        "": "PostgreSQL does not convert this by itself. Say how: ALTER COLUMN … TYPE … USING column::type.",
    },
    "42830": "A foreign key refers to a primary key or a unique constraint: add one over just these columns first.",
    "42883": "The function does not exist with these argument types, or its extension is not there.",
    "42P01": "The table does not exist, or search_path does not name its schema.",
    "42P07": "The table or index exists already: write IF NOT EXISTS.",
    "42P13": {
        "cannot change": "CREATE OR REPLACE changes neither the result nor the parameters' names: DROP FUNCTION first, "
        "with what uses it.",
        "": "The declaration of the function and its body do not agree.",
    },
    "42P16": {
        "primary key": "The table has a primary key: DROP CONSTRAINT it in the same ALTER TABLE.",
        "view": "CREATE OR REPLACE VIEW only adds columns at the end: DROP VIEW first, with what uses it.",
        "": "The definition contradicts itself, or what the table has already.",
    },
    "42P17": {
        "overlap": "Another partition has a part of this range: choose bounds next to it, or DETACH that one first.",
        "immutable": "Only IMMUTABLE functions may be used here, whose result depends on nothing else: for instance "
        "(t AT TIME ZONE 'UTC')::date instead of t::date.",
        "infinite recursion": "The policy reads its own table: ask through a SECURITY DEFINER function instead.",
        "": "The definition is not one that can work: PostgreSQL's words say why.",
    },
    "53100": "The server's disk is full. Free space, then run again.",
    "53300": "No connection slot is left: end idle sessions, or raise max_connections or the CONNECTION LIMIT of the "
    "role or the database.",
    "55006": {
        "pending trigger events": "Rows were changed whose constraints are still to be checked: SET CONSTRAINTS ALL "
        "IMMEDIATE before this statement, or put it into a file of its own.",
        "": "Other sessions use the object or the database.",
    },
    "55P03": "Another session held the lock for longer than lock_timeout. Run again later, or end the blocker.",
    "55P04": "A new enum value can only be used after the transaction that adds it: put its use into the next file.",
    "57014": "The statement was cancelled or ran longer than statement_timeout.",
    "57P01": "Somebody has ended this session, or shut the server down. The run is safe to repeat.",
    "58P01": {
        "extension control file": _NO_EXTENSION,
        "": "The server looks for files on its own host: what COPY reads or a library of a function must be there.",
    },
}


class RunbookError(Exception):
    """A failure that an operator can read.

    Args:
        message: what happened, to which file and line or object.
        hint: what to do next; empty if there is nothing better to say.
        facts: values for the module's result.
    """

    def __init__(self, message: str, *, hint: str = "", **facts: t.Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts

    def as_result(self) -> dict[str, t.Any]:
        """Return the arguments of C(fail_json)."""
        message = self.message + (f"\n  next: {self.hint}" if self.hint else "")
        return {"msg": message, "hint": self.hint, **self.facts}


class Unparsed(Exception):  # noqa: N818 - a question: the action plugin parses, and runs the module again
    """This host needs files parsed and has no parser.

    Args:
        message: what to say where nobody else has one either.
        facts: the files, for the module's result.
    """

    def __init__(self, message: str, **facts: t.Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def as_result(self) -> dict[str, t.Any]:
        """Return the arguments of C(fail_json)."""
        return {"msg": self.message, **self.facts}


def hint_for(sqlstate: str | None, message: str = "") -> str:
    """Return the hint for an SQLSTATE and the server's message, or an empty string."""
    hint = HINTS.get(sqlstate or "", "")
    return hint if isinstance(hint, str) else next(hint[cause] for cause in hint if cause in message.lower())


def hint_of(error: psycopg.Error) -> str:
    """Return the hint for an error of the server, or an empty string."""
    return hint_for(error.sqlstate, error.diag.message_primary or "")


def describe(error: psycopg.Error) -> str:
    """Return PostgreSQL's message with its SQLSTATE, DETAIL, HINT and CONTEXT, a line each."""
    diag = error.diag
    if diag.message_primary is None:
        return str(error).strip()
    lines = [f"{diag.message_primary} (SQLSTATE {diag.sqlstate})"]
    for title, value in (
        ("DETAIL", diag.message_detail),
        ("HINT", diag.message_hint),
        ("CONTEXT", diag.context),
    ):
        if value:
            lines.append(f"  {title}: {value}")
    return "\n".join(lines)


def from_postgres(error: psycopg.Error, doing: str) -> RunbookError:
    """Wrap an error of psycopg that happened while I(doing) something that no file is to blame for."""
    return RunbookError(
        f"{doing}: {describe(error)}",
        hint=hint_of(error),
        sqlstate=error.sqlstate or "",
    )
