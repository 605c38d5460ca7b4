# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tenant isolation, proved as the application role, with rows of two probe tenants, in a transaction rolled back.

The proof needs no knowledge of the schema but three names: the tenant table, the tenant column, and the setting that
carries the context. It is safe beside writers: its locks are those of an INSERT, it waits for a lock half a second and
then gives way, and all that it writes are rows that nobody else can see.
"""

from __future__ import annotations

import time
import typing as t
import uuid
from dataclasses import dataclass, field

from ansible_collections.settler.runbook.plugins.module_utils import _exposure, _trespass
from ansible_collections.settler.runbook.plugins.module_utils._errors import describe
from ansible_collections.settler.runbook.plugins.module_utils._probe_rows import (
    ProofError,
    Settings,
    insert_nobodys,
    insert_probes,
    isolated_tables,
)
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._trespass import Tried
from ansible_collections.settler.runbook.plugins.module_utils._verify import Check

_ATTEMPTS = 4  # to get all locks; each waits half a second at most for each
#: One snapshot, so that what others commit meanwhile makes no difference. The lock timeout is shorter than
#: deadlock_timeout: whoever else waits goes first.
_BEGIN = (
    "BEGIN ISOLATION LEVEL REPEATABLE READ {mode}; SET LOCAL lock_timeout = '500ms'; "
    "SET LOCAL statement_timeout = '30s'; SET LOCAL idle_in_transaction_session_timeout = '60s'"
)

#: What a role must not be, each as a question.
_ROLE = """
SELECT rolsuper AS "superuser", rolbypassrls AS "BYPASSRLS",
    rolcreaterole AS "CREATEROLE, by which it can become others",
    rolreplication AS "REPLICATION, which reads all files",
    EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = %(schema)s AND c.relkind IN ('r', 'p', 'v', 'm')
              AND pg_has_role(r.oid, c.relowner, 'MEMBER')) AS "owner of the tables",
    EXISTS (SELECT FROM pg_catalog.pg_roles x
            WHERE (x.rolsuper OR x.rolbypassrls) AND pg_has_role(r.oid, x.oid, 'MEMBER')) AS "member of a superuser",
    EXISTS (SELECT FROM pg_catalog.pg_roles x WHERE x.rolname IN ('pg_read_server_files', 'pg_write_server_files',
            'pg_execute_server_program') AND pg_has_role(r.oid, x.oid, 'MEMBER')) AS "member of a role past policies",
    EXISTS (SELECT FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) c
            WHERE s.setrole IN (0, r.oid) AND c LIKE %(setting)s || '=%%' AND s.setdatabase IN
                  (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())))
        AS "given a tenant by ALTER ROLE or DATABASE"
FROM pg_catalog.pg_roles r WHERE rolname = %(role)s
"""

_DRAWN = """
SELECT seqrelid::regclass::text FROM pg_catalog.pg_sequence
WHERE has_sequence_privilege(seqrelid, 'SELECT, USAGE') ORDER BY 1
"""


@dataclass
class Proof:
    """What was found, what could not be tried, and what is left behind: numbers of sequences do not roll back."""

    rows: list[Check] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tables(self) -> int:
        """Return how many tables were tried."""
        return len({row.object for row in self.rows if row.check == "tenant isolation: select"})


def prove(connection: psycopg.Connection[t.Any], settings: Settings) -> Proof:
    """Prove that one tenant's session neither sees nor changes another's rows.

    Args:
        connection: autocommit; its role must be able to write the tables (as their owner) and to become the
            application role. Where nothing can be written, such as on a standby, only the reading is proved.
        settings: what is isolated.

    Returns:
        a row a table or view and kind of trespass. Everything is rolled back, and no sequence is drawn from.
    """
    began = time.monotonic()
    proof = Proof(_role(connection, settings))
    if all(check.status == "ok" for check in proof.rows):
        _prove_all(connection, settings, proof)
        proof.drawn = _drawn(connection)
    proof.seconds = round(time.monotonic() - began, 3)
    return proof


def _role(connection: psycopg.Connection[t.Any], settings: Settings) -> list[Check]:
    cursor = connection.execute(_ROLE, {"role": settings.role, "schema": settings.schema, "setting": settings.setting})
    row = cursor.fetchone()
    if row is None:
        return [Check("application role", settings.role, "failed", "present", "missing")]
    return [
        Check("application role", settings.role, "failed" if wrong else "ok", f"not {what}", what if wrong else "not")
        for what, wrong in zip((column.name for column in cursor.description or ()), row, strict=True)
    ]


def _prove_all(connection: psycopg.Connection[t.Any], settings: Settings, proof: Proof) -> None:
    """Make the proof, again where a lock was not to be had in time."""
    writable = connection.execute(
        "SELECT NOT pg_is_in_recovery() AND current_setting('transaction_read_only') = 'off'"
    ).fetchone()
    prove_what, mode = (_prove_writing, "READ WRITE") if writable and writable[0] else (_prove_reading, "READ ONLY")
    for left in reversed(range(_ATTEMPTS)):
        try:
            connection.execute(_BEGIN.format(mode=mode).encode())
            rows, unproved = prove_what(connection, settings)
        except psycopg.errors.LockNotAvailable as error:
            if left:
                continue
            proof.rows.append(_unprovable(settings, describe(error), "Somebody holds a lock on a table. Try again."))
        except (ProofError, psycopg.Error) as error:
            text = describe(error) if isinstance(error, psycopg.Error) else str(error)
            proof.rows.append(_unprovable(settings, text, ""))
        else:
            proof.rows += rows
            proof.unproved += unproved
        finally:
            connection.execute("ROLLBACK")
        return


def _unprovable(settings: Settings, text: str, hint: str) -> Check:
    return Check("tenant isolation", settings.schema, "failed", "provable", text, hint)


def _prove_writing(connection: psycopg.Connection[t.Any], settings: Settings) -> tuple[list[Check], list[str]]:
    tables = isolated_tables(connection, settings)
    views = _trespass.views(connection, settings)
    party = _trespass.Party(*(str(uuid.uuid4()) for _tenant in range(3)))
    mine = insert_probes(connection, settings, tables, party.mine)
    nobodys = insert_nobodys(connection, settings, tables, mine)
    with _trespass.Session(connection, settings) as session:
        alone = [_trespass.contents(session, view, None) for view in views]  # no context was ever set here
    connection.execute("SAVEPOINT alone")
    other = insert_probes(connection, settings, tables, party.other)
    insert_probes(connection, settings, [], party.third)  # no rows: no unique key hides what the policy lets through
    tried = [Tried(table, table.name, mine[table.oid], other[table.oid], nobodys.get(table.oid)) for table in tables]
    tried += _partitions(connection, tried)
    for each in tried:
        _trespass.point_at_rows(connection, each)
    rows: list[Check] = []
    with _trespass.Session(connection, settings) as session:
        crowded = [_trespass.contents(session, view, None) for view in views]
        open_ones = [each for each in tried if session.may_touch(each.table.oid)]
        for each in open_ones:
            rows += _trespass.try_unset(session, each)
        for view in views:
            rows += _trespass.read_view_unset(session, view)
        for each in open_ones:
            rows += _trespass.try_table(session, each, party)
        for each in tried:
            if each not in open_ones:
                rows.append(Check("tenant isolation", each.table.name, "ok", "no access", "no access"))
        for view in views:
            rows += _trespass.try_view(session, view, party)
        with_other = [_trespass.contents(session, view, party.mine) for view in views]
    connection.execute("ROLLBACK TO SAVEPOINT alone")
    with _trespass.Session(connection, settings) as session:
        without = [_trespass.contents(session, view, party.mine) for view in views]
    for view, *seen in zip(views, alone, crowded, without, with_other, strict=True):
        rows += _trespass.compare_contents(view, *seen)
    return rows + _exposure.look(connection, settings, tables), []


def _partitions(connection: psycopg.Connection[t.Any], tried: t.Sequence[Tried]) -> list[Tried]:
    """Return the partitions of the tables: the policies of the whole do not hold where one is named itself."""
    rows = connection.execute(
        "SELECT p.root::bigint, c.oid::bigint, n.nspname, c.relname "
        "FROM unnest(%s::oid[]) p (root), pg_partition_tree(p.root) x, pg_catalog.pg_class c, "
        "pg_catalog.pg_namespace n "
        "WHERE x.relid = c.oid AND n.oid = c.relnamespace AND x.level > 0 ORDER BY 3, 4",
        [[each.table.oid for each in tried]],
    ).fetchall()
    of = {each.table.oid: each for each in tried}
    return [
        Tried(
            of[root].table._replace(oid=oid, schema=schema, name=name),
            of[root].whole,
            *(probe if probe and probe.place == oid else None for probe in of[root][2:]),
        )
        for root, oid, schema, name in rows
    ]


def _prove_reading(connection: psycopg.Connection[t.Any], settings: Settings) -> tuple[list[Check], list[str]]:
    """Prove what can be without a row of one's own: with the rows that are there, nobody's context sees one."""
    tables = isolated_tables(connection, settings)
    views = _trespass.views(connection, settings)
    tried = [Tried(table, table.name) for table in tables if table.tenant]
    tried += _partitions(connection, tried)
    party = _trespass.Party(*(str(uuid.uuid4()) for _tenant in range(3)))
    rows: list[Check] = []
    with _trespass.Session(connection, settings) as session:
        tried = [each for each in tried if session.may_touch(each.table.oid)]
        for each in tried:
            rows += _trespass.try_unset(session, each)
        for view in views:
            rows += _trespass.read_view_unset(session, view)
        for each in tried:
            rows += _trespass.try_table(session, each, party)
        for view in views:
            rows += _trespass.try_view(session, view, party)
    rows += _exposure.look(connection, settings, tables)
    indirect = [table.name for table in tables if not table.tenant]
    unproved = ["insert, update and delete across the border: nothing can be written here"]
    if indirect:
        unproved.append(f"{', '.join(indirect)}: no tenant column, and no probe row can be made here")
    return rows, unproved


def _drawn(connection: psycopg.Connection[t.Any]) -> list[str]:
    """Return the sequences that this session has drawn from; a look at them would say what others did, too."""
    try:
        connection.execute("SELECT lastval()")
    except psycopg.errors.ObjectNotInPrerequisiteState:
        return []
    except psycopg.errors.InsufficientPrivilege:
        return ["one that cannot be read"]
    drawn = []
    for (name,) in connection.execute(_DRAWN).fetchall():
        try:
            connection.execute(sql.SQL("SELECT currval({})").format(sql.Literal(name)))
        except psycopg.errors.ObjectNotInPrerequisiteState:
            continue
        drawn.append(name)
    return drawn
