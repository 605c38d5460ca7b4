# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The ledger: a schema of its own in the migrated database, always named with its schema.

C(migrations) has a row for each file, written in the file's own transaction; a file that cannot be one transaction
has its row from the start, with a C(journal) of its statements. C(events) tells what happened and when; nothing is
ever deleted from it. No lock state is kept in tables: it would travel with dumps.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import json
import typing as t

from ansible_collections.settler.runbook.plugins.module_utils._connection import literal
from ansible_collections.settler.runbook.plugins.module_utils._files import CHECKSUM_ALGORITHM, MigrationFile
from ansible_collections.settler.runbook.plugins.module_utils._plan import LedgerRow, newest
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import dict_row, psycopg, sql

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
ALTER TABLE {schema}.migrations
    ADD COLUMN IF NOT EXISTS kind text NOT NULL DEFAULT 'versioned',
    ADD COLUMN IF NOT EXISTS state text NOT NULL DEFAULT 'applied',
    ADD COLUMN IF NOT EXISTS restore_point text,
    ADD COLUMN IF NOT EXISTS job_id text,
    ADD COLUMN IF NOT EXISTS backend_pid integer,
    ADD COLUMN IF NOT EXISTS touched bigint[];
COMMENT ON TABLE {schema}.migrations IS 'A row for each file: written in its transaction, or running until it is done';
CREATE TABLE IF NOT EXISTS {schema}.journal (
    file        text NOT NULL,
    statement   integer NOT NULL,
    line        integer NOT NULL,
    checksum    text NOT NULL,
    state       text NOT NULL,
    run_id      text NOT NULL,
    backend_pid integer NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    detail      jsonb NOT NULL DEFAULT '{{}}',
    PRIMARY KEY (file, statement)
);
COMMENT ON TABLE {schema}.journal IS 'How far each file came that is not one transaction';
CREATE TABLE IF NOT EXISTS {schema}.events (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_id  text NOT NULL,
    event   text NOT NULL,
    file    text,
    by_user text NOT NULL DEFAULT session_user,
    detail  jsonb NOT NULL DEFAULT '{{}}'
);
ALTER TABLE {schema}.events DROP CONSTRAINT IF EXISTS events_event_check;
ALTER TABLE {schema}.events ADD CONSTRAINT events_event_check CHECK (event IN (
    'applied', 'failed', 'repaired', 'baselined', 'adopted', 'rolled_back', 'blocker_ended', 'verified', 'proven'));
COMMENT ON TABLE {schema}.events IS 'What happened, in order; never deleted from';
CREATE OR REPLACE FUNCTION {schema}.keep_events() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    RAISE restrict_violation USING MESSAGE = TG_TABLE_SCHEMA || '.events is history: it is only added to';
END $$;
CREATE OR REPLACE TRIGGER events_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON {schema}.events
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.keep_events();
"""
#: The newest part of the ledger, a trigger: where it is, all of it is, because it is made as a whole.
_NEWEST = "events_kept"

#: A file's row and its event in one statement: planned once, answered with what the run must know.
_RECORD = """{event}
INSERT INTO {schema}.migrations AS m (file, version, name, kind, state, checksum, checksum_algorithm, duration_ms,
    statements, attempts, applied_by, applied_as, os_user, job_id, run_id, backend_pid, database_name, server_version,
    system_identifier, lsn_before, lsn_after, restore_point, touched)
VALUES (%(file)s, %(version)s, %(name)s, %(kind)s, %(state)s, %(checksum)s, {algorithm}, %(duration_ms)s,
    %(statements)s, %(attempts)s, session_user, current_user, {os_user}, {job_id}, {run_id}, pg_backend_pid(),
    current_database(), {server_version}, {system_identifier}, %(lsn_before)s::pg_lsn, pg_current_wal_insert_lsn(),
    %(restore_point)s, {touched}){again}
"""
#: Of a file that has a row. All others do without: it is a third of what the statement costs.
_AGAIN = """
ON CONFLICT (file) DO UPDATE SET (state, checksum, checksum_algorithm, applied_at, duration_ms, statements, attempts,
    applied_by, applied_as, os_user, job_id, run_id, backend_pid, database_name, server_version, system_identifier,
    lsn_before, lsn_after, restore_point, touched)
  = (excluded.state, excluded.checksum, excluded.checksum_algorithm, clock_timestamp(), excluded.duration_ms,
    excluded.statements, excluded.attempts, excluded.applied_by, excluded.applied_as, excluded.os_user,
    excluded.job_id, excluded.run_id, excluded.backend_pid, excluded.database_name, excluded.server_version,
    excluded.system_identifier, CASE m.state WHEN 'running' THEN m.lsn_before ELSE excluded.lsn_before END,
    excluded.lsn_after, CASE m.state WHEN 'running' THEN m.restore_point ELSE excluded.restore_point END,
    m.touched || excluded.touched)"""
_EVENT = "INSERT INTO {schema}.events (run_id, event, file, detail) VALUES ({run_id}, %(event)s, %(file)s, %(detail)s)"

#: What a file has locked in its transaction to write to it, or to make an index or statistics of it: what it touched.
_TOUCHED = """(SELECT array_agg(relation::bigint) FROM pg_catalog.pg_locks
    WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relation >= 16384
      AND mode IN ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock',
                   'ExclusiveLock', 'AccessExclusiveLock'))"""


class Ledger:
    """The ledger of one database, in one schema."""

    def __init__(self, connection: psycopg.Connection[t.Any], schema: str) -> None:
        self.connection = connection
        self.schema = schema
        #: Set once it was seen that nothing has to be made; the engine makes it with the first file otherwise.
        self.is_known_current = False
        self._server: dict[str, str] | None = None
        self._with_row: set[str] | None = None  # files that have a row, once they were read
        self._queries: dict[tuple[t.Any, ...], bytes] = {}

    def _compose(self, query: str) -> sql.Composed:
        schema = sql.Identifier(self.schema)
        return sql.SQL(query).format(schema=self._constant(schema) if "%" in query else schema)

    def exists(self) -> bool:
        """Tell whether the database has a ledger; works for a role that has no right on it."""
        return self._finds(
            "SELECT FROM pg_catalog.pg_attribute WHERE attname = 'file' AND attrelid = (SELECT c.oid "
            "FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = 'migrations')"
        )

    def is_current(self) -> bool:
        """Tell whether the ledger has all that this version writes; an older one is completed by M(create)."""
        return self._finds(
            "SELECT FROM pg_catalog.pg_trigger x JOIN pg_catalog.pg_class c ON c.oid = x.tgrelid "
            "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = 'events' AND x.tgname = %s",
            _NEWEST,
        )

    def _finds(self, query: t.LiteralString, *more: str) -> bool:
        row = self.connection.execute(f"SELECT EXISTS ({query})", [self.schema, *more]).fetchone()
        return bool(row and row[0])

    def create(self) -> None:
        """Make the ledger's schema and tables where they are missing."""
        self.connection.execute(self._compose(_TABLES))

    def rows(self) -> list[LedgerRow]:
        """Return the files that the ledger knows; none where there is no ledger yet."""
        self._with_row = set()
        if not self.exists():
            return []
        # A ledger that an older version made lacks columns: there their names mean what stands around the table.
        found = self.connection.execute(
            self._compose(
                "SELECT known.* FROM (VALUES ('applied', 'versioned')) AS missing (state, kind), LATERAL (SELECT "
                "file, version, checksum, to_char(applied_at, 'YYYY-MM-DD HH24:MI:SSOF'), run_id, state, kind "
                "FROM {schema}.migrations) AS known"
            )
        )
        rows = [LedgerRow(*row) for row in found]
        self._with_row = {row.file for row in rows}
        return rows

    def head(self) -> str | None:
        """Return the newest version that is applied, not counting optional folders; None where there is none."""
        return newest([row for row in self.rows() if row.state == "applied" and not row.folder])

    def applied(self) -> list[dict[str, t.Any]]:
        """Return the files with all that is known of them, oldest first."""
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

    def origin(self) -> tuple[str, str] | None:
        """Return system identifier and database of the server that the newest row is of, if that is another one.

        A ledger comes along in a copy, in a restore elsewhere, and through pg_upgrade. An C(adopted) event with the
        present identity says that somebody knows.
        """
        if not self.exists():
            return None
        row = self.connection.execute(
            self._compose(
                """
                WITH here AS (SELECT system_identifier::text AS id, current_database()::text AS db
                              FROM pg_catalog.pg_control_system())
                SELECT m.system_identifier, m.database_name FROM {schema}.migrations m, here
                WHERE NOT EXISTS (SELECT FROM {schema}.migrations o
                                  WHERE o.system_identifier = here.id AND o.database_name = here.db)
                  AND NOT EXISTS (SELECT FROM {schema}.events e WHERE e.event = 'adopted'
                                  AND e.detail->>'system_identifier' = here.id AND e.detail->>'database' = here.db)
                ORDER BY m.applied_at DESC LIMIT 1
                """
            )
        ).fetchone()
        return (row[0], row[1]) if row else None

    def adopt_copy(self, origin: tuple[str, str], *, run_id: str) -> None:
        """Note that this database is known to be a copy of another one."""
        server = self._server_facts()
        self.record_event(
            "adopted",
            run_id=run_id,
            system_identifier=server["system_identifier"],
            database=server["database"],
            from_system_identifier=origin[0],
            from_database=origin[1],
        )

    def record(self, file: MigrationFile, event: str, **facts: t.Any) -> None:
        """Write a file's row and its event in one round trip; the arguments are those of M(recording)."""
        self.connection.execute(self.recording(file, event, **facts))
        if self._with_row is not None:
            self._with_row.add(file.file)

    def recording(
        self,
        file: MigrationFile,
        event: str,
        *,
        run_id: str,
        job_id: str | None = None,
        state: str = "applied",
        duration_ms: int = 0,
        statements: int = 0,
        attempts: int = 0,
        lsn_before: str | None = None,
        restore_point: str | None = None,
        detail: t.Mapping[str, t.Any] | None = None,
        touched: bool = False,
    ) -> bytes:
        """Return the statement that writes a file's row and its event.

        The row has the OIDs of the relations that the transaction has touched, if C(touched), until M(forget_touched).
        """
        values: dict[str, str | int | None] = {
            "file": file.file,
            "version": file.version,
            "name": file.name,
            "kind": file.kind,
            "state": state,
            "checksum": file.checksum,
            "duration_ms": duration_ms,
            "statements": statements,
            "attempts": attempts,
            "lsn_before": lsn_before or self._server_facts()["lsn"],
            "restore_point": restore_point,
            "event": event,
            "detail": json.dumps({"checksum": file.checksum, **(detail or {})}, ensure_ascii=False),
        }
        again = self._with_row is None or file.file in self._with_row
        query = self._recording(run_id, job_id, bool(event), again, touched)
        return query % {name.encode(): literal(self.connection, value) for name, value in values.items()}

    def _recording(self, run_id: str, job_id: str | None, event: bool, again: bool, touched: bool) -> bytes:
        """Return the statement that records a file; composed once a run, with all that is the same for each file."""
        kind = (run_id, job_id, event, again, touched)
        if kind not in self._queries:
            server = self._server_facts()
            facts = {"run_id": run_id, "job_id": job_id, "os_user": _os_user(), "algorithm": CHECKSUM_ALGORITHM}
            facts |= {name: server[name] for name in ("server_version", "system_identifier")}
            constants = {name: self._constant(sql.Literal(value)) for name, value in facts.items()}
            constants["schema"] = self._constant(sql.Identifier(self.schema))
            told = sql.SQL(f"WITH told AS ({_EVENT})").format(**constants) if event else sql.SQL("")
            self._queries[kind] = (
                sql.SQL(_RECORD)
                .format(
                    **constants,
                    event=told,
                    again=sql.SQL(_AGAIN if again else ""),
                    touched=sql.SQL(_TOUCHED if touched else "NULL"),
                )
                .as_bytes(self.connection)
            )
        return self._queries[kind]

    def _constant(self, value: sql.Composable) -> sql.SQL:
        """Return a part of a query that is bound here later on, where a percent sign would be a parameter's."""
        return sql.SQL(value.as_string(self.connection).replace("%", "%%"))

    def record_adopted(self, file: MigrationFile, *, run_id: str, source: str, detail: t.Mapping[str, t.Any]) -> None:
        """Write the row and the event of a file that another tool has applied."""
        self.record(file, "adopted", run_id=run_id, detail={"source": source, **detail})

    def record_touched(self, file: str, relations: t.Collection[int]) -> None:
        """Note what a file has touched that is not one transaction."""
        self.connection.execute(
            self._compose("UPDATE {schema}.migrations SET touched = touched || %s::bigint[] WHERE file = %s"),
            [list(relations), file],
        )

    def touched(self) -> list[int]:
        """Return the OIDs of what files have touched, of this run or earlier ones, and nobody has taken care of yet."""
        found = self.connection.execute(
            self._compose("SELECT DISTINCT oid FROM {schema}.migrations, unnest(touched) AS oid ORDER BY oid")
        )
        return [row[0] for row in found]

    def forget_touched(self, relations: t.Collection[int]) -> None:
        """Note that care was taken of these."""
        self.connection.execute(
            self._compose("UPDATE {schema}.migrations SET touched = NULL WHERE touched <@ %s::bigint[]"),
            [list(relations)],
        )

    def record_event(self, event: str, *, run_id: str, file: str | None = None, **detail: t.Any) -> None:
        """Write an event; values of C(detail) must be JSON."""
        self.connection.execute(
            sql.SQL(_EVENT).format(
                schema=self._constant(sql.Identifier(self.schema)), run_id=sql.Placeholder("run_id")
            ),
            {"run_id": run_id, "event": event, "file": file, "detail": json.dumps(detail, ensure_ascii=False)},
        )

    def forget(self, file: str) -> None:
        """Delete the row and the journal of a file; the caller writes the event that says why."""
        self.connection.execute(self._compose("DELETE FROM {schema}.migrations WHERE file = %s"), [file])
        self.connection.execute(self._compose("DELETE FROM {schema}.journal WHERE file = %s"), [file])

    def decide(self, file: str, statement: int, state: str) -> None:
        """Settle a statement of which nobody else can know whether it was done."""
        self.connection.execute(
            self._compose(
                "UPDATE {schema}.journal SET state = %s, finished_at = clock_timestamp() "
                "WHERE file = %s AND statement = %s"
            ),
            [state, file, statement],
        )

    def set_checksum(self, file: MigrationFile) -> None:
        """Accept a file as it is now."""
        self.connection.execute(
            self._compose("UPDATE {schema}.migrations SET checksum = %s, checksum_algorithm = %s WHERE file = %s"),
            [file.checksum, CHECKSUM_ALGORITHM, file.file],
        )

    def journal(self, file: str) -> dict[int, dict[str, t.Any]]:
        """Return the journal of a file by the number of the statement, from 1."""
        with self.connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute(self._compose("SELECT * FROM {schema}.journal WHERE file = %s ORDER BY statement"), [file])
            return {row["statement"]: row for row in cursor}

    def note(
        self, file: str, statement: int, state: str, *, line: int, text: str, run_id: str, detail: t.Any = None
    ) -> None:
        """Write how a statement stands: C(running), C(done) or C(failed)."""
        self.connection.execute(
            self._compose(
                """
                INSERT INTO {schema}.journal AS j
                    (file, statement, line, checksum, state, run_id, backend_pid, finished_at, detail)
                VALUES (%(file)s, %(statement)s, %(line)s, %(checksum)s, %(state)s, %(run_id)s, pg_backend_pid(),
                    CASE WHEN %(state)s = 'running' THEN NULL ELSE clock_timestamp() END,
                    coalesce(%(detail)s::jsonb, '{{}}'))
                ON CONFLICT (file, statement) DO UPDATE SET
                    (line, checksum, state, run_id, backend_pid, finished_at, detail)
                  = (excluded.line, excluded.checksum, excluded.state, excluded.run_id, excluded.backend_pid,
                     excluded.finished_at, coalesce(%(detail)s::jsonb, j.detail))
                """
            ),
            {
                "file": file,
                "statement": statement,
                "line": line,
                "checksum": text_checksum(text),
                "state": state,
                "run_id": run_id,
                "detail": None if detail is None else json.dumps(detail, ensure_ascii=False),
            },
        )

    def _server_facts(self) -> dict[str, str]:
        """Return what each row says of the server; read once."""
        if self._server is None:
            row = self.connection.execute(
                "SELECT system_identifier::text, current_setting('server_version'), current_database(), "
                "pg_current_wal_insert_lsn()::text FROM pg_catalog.pg_control_system()"
            ).fetchone()
            assert row is not None
            self._server = dict(zip(("system_identifier", "server_version", "database", "lsn"), row, strict=True))
        return self._server


def text_checksum(text: str) -> str:
    """Return what the journal knows a statement by."""
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _os_user() -> str:
    """Return who runs this; a container may know no name for its user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def lock_key(database_oid: int, project: str) -> int:
    """Return the advisory lock's key, a signed 64-bit number: one for each project in each database."""
    digest = hashlib.sha256(f"settler.runbook:{project}:{database_oid}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
