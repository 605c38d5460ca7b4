# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The ledger: a schema of its own in the migrated database, always named with its schema.

C(migrations) has a row for each applied file, written in the file's own transaction. C(events) tells what
happened and when; nothing is ever deleted from it. No lock state is kept in tables: it would travel with dumps.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._files import CHECKSUM_ALGORITHM, MigrationFile
from ansible_collections.settler.runbook.plugins.module_utils._plan import LedgerRow
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql

_TABLES = """
CREATE SCHEMA IF NOT EXISTS {schema};
COMMENT ON SCHEMA {schema} IS 'Ledger of the database runbook: what was applied, when, by whom';
CREATE TABLE IF NOT EXISTS {schema}.migrations (
    file               text PRIMARY KEY,
    version            text NOT NULL,
    name               text NOT NULL,
    checksum           text NOT NULL,
    checksum_algorithm text NOT NULL,
    applied_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    duration_ms        bigint NOT NULL,
    statements         integer NOT NULL,
    attempts           integer NOT NULL,
    applied_by         text NOT NULL,
    applied_as         text NOT NULL,
    os_user            text NOT NULL,
    run_id             text NOT NULL,
    database_name      text NOT NULL,
    server_version     text NOT NULL,
    system_identifier  text NOT NULL,
    lsn_before         pg_lsn NOT NULL,
    lsn_after          pg_lsn NOT NULL
);
COMMENT ON TABLE {schema}.migrations IS 'A row for each applied file, written in the transaction of that file';
CREATE TABLE IF NOT EXISTS {schema}.events (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_id  text NOT NULL,
    event   text NOT NULL CHECK (event IN ('applied', 'failed', 'repaired', 'baselined', 'adopted', 'rolled_back')),
    file    text,
    by_user text NOT NULL DEFAULT session_user,
    detail  jsonb NOT NULL DEFAULT '{{}}'
);
COMMENT ON TABLE {schema}.events IS 'What happened, in order; never deleted from';
"""

_INSERT = """
INSERT INTO {schema}.migrations (file, version, name, checksum, checksum_algorithm, duration_ms, statements, attempts,
    applied_by, applied_as, os_user, run_id, database_name, server_version, system_identifier, lsn_before, lsn_after)
SELECT %s, %s, %s, %s, %s, %s, %s, %s, session_user, current_user, %s, %s, current_database(),
    current_setting('server_version'), system_identifier::text, %s::pg_lsn, pg_current_wal_insert_lsn()
FROM pg_catalog.pg_control_system()
"""


class Ledger:
    """The ledger of one database, in one schema."""

    def __init__(self, connection: psycopg.Connection[t.Any], schema: str) -> None:
        self.connection = connection
        self.schema = schema

    def _compose(self, query: str) -> sql.Composed:
        return sql.SQL(query).format(schema=sql.Identifier(self.schema))

    def exists(self) -> bool:
        """Tell whether the database has a ledger; works for a role that has no right on it."""
        row = self.connection.execute(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = 'migrations')",
            [self.schema],
        ).fetchone()
        return bool(row and row[0])

    def create(self) -> None:
        """Make the ledger's schema and tables where they are missing."""
        self.connection.execute(self._compose(_TABLES))

    def rows(self) -> list[LedgerRow]:
        """Return the applied files; none where there is no ledger yet."""
        if not self.exists():
            return []
        found = self.connection.execute(
            self._compose(
                "SELECT file, version, checksum, to_char(applied_at, 'YYYY-MM-DD HH24:MI:SSOF'), run_id "
                "FROM {schema}.migrations"
            )
        )
        return [LedgerRow(*row) for row in found]

    def applied(self) -> list[dict[str, t.Any]]:
        """Return the applied files with all that is known of them, oldest first."""
        if not self.exists():
            return []
        found = self.connection.execute(
            self._compose("SELECT to_jsonb(m) FROM {schema}.migrations m ORDER BY applied_at, version")
        )
        return [row[0] for row in found]

    def events(self, limit: int) -> list[dict[str, t.Any]]:
        """Return the newest events, newest first."""
        if not self.exists():
            return []
        found = self.connection.execute(
            self._compose("SELECT to_jsonb(e) FROM {schema}.events e ORDER BY id DESC LIMIT %s"), [limit]
        )
        return [row[0] for row in found]

    def record_applied(
        self,
        file: MigrationFile,
        *,
        run_id: str,
        duration_ms: int,
        statements: int,
        attempts: int,
        lsn_before: str,
    ) -> None:
        """Write the row and the event of an applied file, in the transaction that applied it."""
        self.connection.execute(
            self._compose(_INSERT),
            [
                file.file,
                file.version,
                file.name,
                file.checksum,
                CHECKSUM_ALGORITHM,
                duration_ms,
                statements,
                attempts,
                getpass.getuser(),
                run_id,
                lsn_before,
            ],
        )
        self.record_event("applied", run_id=run_id, file=file.file, checksum=file.checksum)

    def record_event(self, event: str, *, run_id: str, file: str | None = None, **detail: t.Any) -> None:
        """Write an event; values of C(detail) must be JSON."""
        self.connection.execute(
            self._compose("INSERT INTO {schema}.events (run_id, event, file, detail) VALUES (%s, %s, %s, %s)"),
            [run_id, event, file, json.dumps(detail, ensure_ascii=False)],
        )


def lock_key(database_oid: int, project: str) -> int:
    """Return the advisory lock's key, a signed 64-bit number: one for each project in each database."""
    digest = hashlib.sha256(f"settler.runbook:{project}:{database_oid}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
