# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Preflight: everything that can be known to make a run fail, before anything is changed."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible.module_utils.common.yaml import HAS_YAML
from ansible_collections.settler.runbook.plugins.module_utils._backup_folder import check_private
from ansible_collections.settler.runbook.plugins.module_utils._connection import (
    MAINTENANCE_DB,
    connect,
    connect_if_exists,
    prove_primary,
    set_role,
)
from ansible_collections.settler.runbook.plugins.module_utils._database import blind_tables
from ansible_collections.settler.runbook.plugins.module_utils._encryption import UNENCRYPTED, Encryption, prove
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._programs import find_programs
from ansible_collections.settler.runbook.plugins.module_utils._restorable import Obstacle, obstacles, slots
from ansible_collections.settler.runbook.plugins.module_utils._space import check_space

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

SUPPORTED = range(14, 19)

_SERVER = """
SELECT current_setting('server_version_num')::int / 10000, current_setting('server_version'),
    (SELECT rolsuper OR rolcreatedb FROM pg_catalog.pg_roles WHERE rolname = current_user),
    (SELECT system_identifier::text FROM pg_catalog.pg_control_system()),
    to_char(pg_postmaster_start_time() AT TIME ZONE 'UTC', 'YYYYMMDD"t"HH24MISSUS')
"""

_ROLES = """
SELECT want.name, r.oid IS NOT NULL, coalesce(r.rolsuper OR r.rolbypassrls, false),
    coalesce(pg_has_role(current_user, r.oid, 'MEMBER'), false),
    coalesce(pg_has_role(r.oid, owner.oid, 'MEMBER'), false)
FROM unnest(%(names)s::text[]) want(name)
LEFT JOIN pg_catalog.pg_roles r ON r.rolname = want.name
LEFT JOIN pg_catalog.pg_roles owner ON owner.rolname = %(owner)s
"""

_STRANGERS = """
SELECT count(*), coalesce(string_agg(DISTINCT pg_get_userbyid(c.relowner), ', '), '')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND pg_get_userbyid(c.relowner) <> %s
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = c.oid AND e.classid = 'pg_class'::regclass
                  AND e.deptype = 'e')
"""

_LONG = """
SELECT pid, usename, extract(epoch FROM clock_timestamp() - xact_start)::int
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - interval '1 minute'
ORDER BY xact_start LIMIT 5
"""

_EARLIER = """
SELECT pid, application_name, state FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'runbook:%' AND pid <> pg_backend_pid()
  AND application_name NOT LIKE '%:preflight'
"""


@dataclass(frozen=True)
class Row:
    """One check: C(status) is C(ok), C(warning) or C(failed)."""

    check: str
    status: str
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Wanted:
    """What the run is going to need; C(way_back) is what it may have to go back by: none, snapshot or dump."""

    owner: str | None = None
    application: str | None = None
    extensions: tuple[str, ...] = ()
    backup_directory: Path | None = None
    client_bin: str | None = None
    database_required: bool = True
    encryption: Encryption = UNENCRYPTED
    identity: Path | None = None
    way_back: str = "none"


def preflight(params: t.Mapping[str, t.Any], wanted: Wanted) -> tuple[list[Row], dict[str, t.Any]]:
    """Make all checks; one that fails does not keep the next from being made.

    Returns:
        the rows, and facts: C(server_version), C(server_major), C(exists), C(size_bytes), C(identity).
    """
    database = connect_if_exists(params, application="runbook:preflight")
    rows = [_exists(params["login_db"], database is not None, wanted), _libraries()]
    connection = database or connect(params, dbname=MAINTENANCE_DB, application="runbook:preflight")
    with connection:
        major, version, may_create, system, started = connection.execute(_SERVER).fetchone()  # type: ignore[misc]
        facts = {
            "server_version": version,
            "server_major": major,
            "exists": database is not None,
            "size_bytes": 0,
            # a copy of the server that was promoted has the same identifier, and was started at another moment
            "identity": f"{system}/{started}/{params['login_db']}",
        }
        rows += _server(connection, major, version)
        rows += _extensions(connection, wanted)
        rows += _roles(connection, wanted)
        if not may_create:
            rows.append(
                Row(
                    "rollback",
                    "failed",
                    f"{params['login_user']} lacks CREATEDB",
                    "ALTER ROLE … CREATEDB: a restore needs it.",
                )
            )
        if database is not None:
            (facts["size_bytes"],) = connection.execute("SELECT pg_database_size(current_database())").fetchone()  # type: ignore[misc]
            rows += _sessions(connection)
            if wanted.owner and not _failed(rows):
                rows += _objects(connection, wanted.owner)
                if not _failed(rows):  # what takes over tables of others takes over other objects, too
                    rows += _restorable(connection, wanted, wanted.owner)
    if wanted.backup_directory is not None:
        rows += _backup(wanted, params["login_db"], major, facts["size_bytes"])
        rows += _encryption(wanted)
    return rows, facts


def _failed(rows: t.Iterable[Row]) -> bool:
    return any(row.status == "failed" for row in rows)


def _exists(database: str, exists: bool, wanted: Wanted) -> Row:
    if exists or not wanted.database_required:
        return Row("database", "ok", f"{database} {'exists' if exists else 'will be made'}")
    return Row("database", "failed", f"{database} does not exist", "playbooks/setup.yml makes it.")


def _libraries() -> Row:
    """Check for what only verification needs, at the end of the window: everything else is needed to come here."""
    if HAS_YAML:
        return Row("libraries", "ok", "PyYAML")
    return Row(
        "libraries", "failed", "PyYAML is missing on this host", "apt-get install python3-yaml, or pip install PyYAML."
    )


def _server(connection: psycopg.Connection[t.Any], major: int, version: str) -> list[Row]:
    rows = [Row("server version", "ok", version)]
    if major not in SUPPORTED:
        span = f"{SUPPORTED.start} to {SUPPORTED.stop - 1}"
        rows = [Row("server version", "failed", version, f"PostgreSQL {span} is supported.")]
    try:
        prove_primary(connection)
    except RunbookError as error:
        rows.append(Row("primary", "failed", error.message, error.hint))
    return rows


def _extensions(connection: psycopg.Connection[t.Any], wanted: Wanted) -> list[Row]:
    there = {row[0] for row in connection.execute("SELECT name FROM pg_catalog.pg_available_extensions")}
    return [
        Row("extension", "ok", name)
        if name in there
        else Row(
            "extension",
            "failed",
            f"{name} is not installed on the server",
            "Install PostgreSQL's contrib package there.",
        )
        for name in wanted.extensions
    ]


def _roles(connection: psycopg.Connection[t.Any], wanted: Wanted) -> list[Row]:
    """Check that the owner is ours to become, and that row level security holds for the application."""
    names = [name for name in (wanted.owner, wanted.application) if name]
    if not names:
        return []
    rows = []
    for name, exists, unbound, ours, owns in connection.execute(
        _ROLES, {"names": names, "owner": wanted.owner}
    ).fetchall():
        if not exists:
            rows.append(
                Row(
                    "role",
                    "failed",
                    f"{name} does not exist",
                    "playbooks/create_database.yml makes the roles.",
                )
            )
        elif not ours:
            rows.append(Row("role", "failed", f"this login is no member of {name}", f"GRANT {name} TO the migrator."))
        elif name == wanted.application and (unbound or owns):
            rows.append(
                Row(
                    "role",
                    "failed",
                    f"{name} is superuser, BYPASSRLS or owner",
                    "Policies do not hold for it.",
                )
            )
        else:
            rows.append(Row("role", "ok", name))
    return rows


def _objects(connection: psycopg.Connection[t.Any], owner: str) -> list[Row]:
    """Check that the owner owns all tables and sees all their rows."""
    count, roles = connection.execute(_STRANGERS, [owner]).fetchone()  # type: ignore[misc]
    if count:
        hint = (
            f"ansible-playbook playbooks/create_database.yml -e create_database_adopt_from={roles.replace(', ', ',')}"
        )
        return [Row("ownership", "failed", f"{count} tables and views belong to {roles}, not to {owner}", hint)]
    set_role(connection, owner)
    blind = blind_tables(connection)
    if blind:
        hint = "Without FORCE ROW LEVEL SECURITY the owner sees all rows; a backup must."
        return [Row("sight", "failed", f"{owner} sees only a part of {', '.join(blind)}", hint)]
    return [Row("ownership", "ok", f"{owner} owns all tables and sees all rows")]


def _restorable(connection: psycopg.Connection[t.Any], wanted: Wanted, owner: str) -> list[Row]:
    """Check that the run could take the database back; where it has not to, what a restore could not is a warning."""
    if wanted.backup_directory is None and wanted.way_back == "none":
        return []
    connection.execute("RESET ROLE")
    rows = [
        Row("rollback", "failed" if _in_the_way(wanted.way_back, found) else "warning", found.detail, found.hint)
        for found in obstacles(connection, owner)
    ]
    if names := slots(connection):
        hint = "After a rollback they have to be made again, and what reads them starts anew."
        rows.append(Row("rollback", "warning", f"replication slots would stay with the failed database: {names}", hint))
    return rows


def _in_the_way(way_back: str, obstacle: Obstacle) -> bool:
    return way_back == "dump" or (way_back == "snapshot" and not obstacle.copied)


def _sessions(connection: psycopg.Connection[t.Any]) -> list[Row]:
    """Look for long transactions, which make DDL wait, and for backends of earlier runs."""
    rows = [
        Row(
            "long transaction",
            "warning",
            f"pid {pid} ({user}) is open for {seconds} s",
            "DDL will wait for it.",
        )
        for pid, user, seconds in connection.execute(_LONG).fetchall()
    ]
    rows += [
        Row(
            "other run",
            "warning",
            f"pid {pid} of {name} is {state}",
            "It is waited for, or ends when its client is gone.",
        )
        for pid, name, state in connection.execute(_EARLIER).fetchall()
    ]
    return rows


def _encryption(wanted: Wanted) -> list[Row]:
    """Check that a backup can be encrypted, and read again where the run may have to."""
    if wanted.encryption.method == "none":
        return []
    try:
        return [Row("encryption", "ok", prove(wanted.encryption, wanted.identity, must_open=wanted.way_back == "dump"))]
    except RunbookError as error:
        return [Row("encryption", "failed", error.message, error.hint)]


def _backup(wanted: Wanted, database: str, server_major: int, size: int) -> list[Row]:
    """Check that client programs fit, that the folder is private and writable and the disk large enough."""
    assert wanted.backup_directory is not None
    rows = []
    try:
        folder, major = find_programs(server_major, wanted.client_bin)
        rows.append(Row("client programs", "ok", f"{major} in {folder}"))
    except RunbookError as error:
        rows.append(Row("client programs", "failed", error.message, error.hint))
    try:
        check_private(wanted.backup_directory)
        free = check_space(wanted.backup_directory, database, size)
    except RunbookError as error:
        rows.append(Row("backup folder", "failed", error.message, error.hint))
    else:
        rows.append(Row("backup folder", "ok", f"{wanted.backup_directory}, {free // 2**20} MB free"))
    return rows
