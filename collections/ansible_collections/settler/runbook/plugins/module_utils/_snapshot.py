# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A snapshot: a copy of the database on its own server, made while nobody is connected. The way back takes seconds.

Nobody can connect to it until it takes the database's place. Its comment says whose it is and how long it stays; only
what has such a comment is ever dropped. It is no backup: a server that is lost takes it along.
"""

from __future__ import annotations

import json
import shutil
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._connection import MAINTENANCE_DB, connect
from ansible_collections.settler.runbook.plugins.module_utils._database import properties
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError, from_postgres
from ansible_collections.settler.runbook.plugins.module_utils._ledger import Ledger
from ansible_collections.settler.runbook.plugins.module_utils._manifest import used_run_id
from ansible_collections.settler.runbook.plugins.module_utils._prepared import refuse_prepared
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._swap import (
    SNAPSHOT,
    beside,
    drop,
    mark,
    only_one,
    set_mark,
    unmarked,
)

if t.TYPE_CHECKING:
    import datetime as dt

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})

_SIZE = """
SELECT pg_database_size(current_database()), pg_snapshot_xmin(pg_current_snapshot())::text,
    CASE WHEN pg_has_role(current_user, 'pg_read_all_settings', 'USAGE') THEN current_setting('data_directory') END
"""

#: By its role, because other roles' backend_type is hidden; autovacuum has none, and leaves by itself.
_SESSIONS = """
SELECT pid, usename, application_name FROM pg_catalog.pg_stat_activity
WHERE datname = %s AND usename IS NOT NULL AND pid <> pg_backend_pid() ORDER BY pid
"""


#: Who owns a database, or may connect to it, may know how large it is.
_FOUND = """
SELECT datname, shobj_description(oid, 'pg_database'), clock_timestamp(),
    CASE WHEN has_database_privilege(oid, 'CONNECT') THEN pg_database_size(oid) END
FROM pg_catalog.pg_database WHERE starts_with(shobj_description(oid, 'pg_database'), %s)
"""


@dataclass(frozen=True)
class Options:
    """What to make. C(max_bytes) is the largest database that is copied, C(keep_hours) how long the copy stays.

    C(fresh) refuses the copy that an earlier run of the same id has made; without it that one is returned.
    """

    run_id: str
    environment: str
    ledger_schema: str
    max_bytes: int
    keep_hours: float
    fresh: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that stands on the server; C(bytes) is None where the role may not know.

    C(transaction) is the oldest one that was not over before it was made; an older version has not noted it.
    """

    name: str
    run_id: str
    environment: str
    at: str
    age_hours: float
    keep_hours: float
    bytes: int | None
    properties: t.Mapping[str, t.Any]
    transaction: str = ""

    @property
    def expired(self) -> bool:
        """Whether its time has passed: the next run drops it."""
        return self.age_hours >= self.keep_hours


def look(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Tell whether a snapshot could be made, and what was checked of the space for it; make nothing.

    Raises:
        RunbookError: it would be too large.
    """
    with connect(params, application=f"runbook:{options.run_id}:snapshot") as connection:
        row = connection.execute(_SIZE).fetchone()
        assert row is not None
        size, transaction, data_directory = row
        checked = _check_space(params, size, data_directory, options)
        content = {
            "environment": options.environment,
            "transaction": transaction,
            "ledger_head": Ledger(connection, options.ledger_schema).head(),
            "properties": properties(connection),
        }
    return {
        "name": beside(params["login_db"], "snapshot", options.run_id),
        "bytes": size,
        "space": checked,
        "content": content,
    }


def _check_space(params: t.Mapping[str, t.Any], size: int, data_directory: str | None, options: Options) -> str:
    if size > options.max_bytes:
        raise RunbookError(
            f"no snapshot of {params['login_db']}: it has {size // 2**20} MB, allowed are "
            f"{options.max_bytes // 2**20} MB; nothing was done",
            hint="Set backup_snapshot_max_bytes after a look at the server's disk, or backup_snapshot: false.",
        )
    host = params["login_host"]
    folder = Path(data_directory or "")
    if not data_directory or not (host in _LOCAL or host.startswith("/")) or not folder.is_dir():
        return "disk not seen, size below the limit"
    free = shutil.disk_usage(folder).free
    if free < 2 * size:  # a copy, and as much again for what the migration writes
        raise RunbookError(
            f"no snapshot of {params['login_db']}: {free // 2**20} MB free in {folder}, a copy and the migration may "
            f"need {2 * size // 2**20} MB; nothing was done",
            hint="Free space, or set backup_snapshot: false.",
        )
    return f"{free // 2**20} MB free on the server"


def take(params: t.Mapping[str, t.Any], options: Options) -> dict[str, t.Any]:
    """Copy the database; the result has C(name), C(strategy), C(bytes), C(space), C(duration_s) and C(changed).

    Raises:
        RunbookError: it would be too large, somebody is connected, or the server refuses.
    """
    started = time.monotonic()
    looked = look(params, options)
    name, content = looked["name"], looked.pop("content")
    database = params["login_db"]
    with connect(params, dbname=MAINTENANCE_DB, application=f"runbook:{options.run_id}:snapshot") as connection:
        only_one(connection, database)
        if any(snapshot.name == name for snapshot in found(connection, database)):
            if options.fresh:
                raise used_run_id(options.run_id, f"a snapshot, {name}")
            return {**looked, "changed": False, "strategy": "", "duration_s": 0.0}
        _check_alone(connection, database)
        strategy = _copy(connection, database, name, content["properties"]["owner"])
        at = connection.execute(
            "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
        ).fetchone()
        assert at is not None
        text = json.dumps({**content, "at": at[0], "keep_hours": options.keep_hours}, ensure_ascii=False)
        set_mark(connection, name, f"{mark(SNAPSHOT, database)}{options.run_id}; {text}")
    return {**looked, "changed": True, "strategy": strategy, "duration_s": round(time.monotonic() - started, 2)}


def _check_alone(connection: psycopg.Connection[t.Any], database: str) -> None:
    refuse_prepared(connection, database)
    sessions = connection.execute(_SESSIONS, [database]).fetchall()
    if sessions:
        told = ", ".join(f"pid {pid} ({user}, {application or 'no name'})" for pid, user, application in sessions)
        raise RunbookError(
            f"no snapshot of {database}: {len(sessions)} sessions are connected: {told}; nothing was done",
            hint="A snapshot is made inside the window, with nobody connected: end these sessions, then run again.",
        )


def _copy(connection: psycopg.Connection[t.Any], database: str, name: str, owner: str) -> str:
    """Copy with the fastest strategy of the server; return its name.

    From 15 on the default writes every page to the write-ahead log; file_copy copies files. 18 can have the file system
    share them.
    """
    version = connection.info.server_version
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {} ALLOW_CONNECTIONS false CONNECTION LIMIT 0{}").format(
        sql.Identifier(name),
        sql.Identifier(database),
        sql.Identifier(owner),
        sql.SQL(" STRATEGY file_copy" if version >= 150000 else ""),
    )
    if version >= 180000:
        try:
            connection.execute("SET file_copy_method = clone")
            connection.execute(statement)
        except psycopg.Error:  # this platform or file system shares no files; what else is wrong comes again below
            connection.execute("SET file_copy_method = copy")
        else:
            return "clone"
    try:
        connection.execute(statement)
    except psycopg.Error as error:
        raise from_postgres(error, f"no snapshot of {database}") from error
    return "file_copy"


def found(connection: psycopg.Connection[t.Any], database: str) -> list[Snapshot]:
    """Return the snapshots of a database, newest first; what cannot be read is none of ours."""
    snapshots = []
    for name, comment, now, size in connection.execute(_FOUND, [mark(SNAPSHOT, database)]):
        run_id, _separator, text = comment.removeprefix(mark(SNAPSHOT, database)).partition("; ")
        try:
            content = json.loads(text)
            age, keep = _age_hours(content["at"], now), float(content["keep_hours"])
            about = content["environment"], content["at"], age, keep, size, content["properties"]
            snapshots.append(Snapshot(name, run_id, *about, content.get("transaction", "")))
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(snapshots, key=lambda snapshot: snapshot.at, reverse=True)


def _age_hours(at: str, now: dt.datetime) -> float:
    return (now - type(now).fromisoformat(at)).total_seconds() / 3600


def expire(params: t.Mapping[str, t.Any], run_id: str, *, own: bool, check: bool = False) -> list[str]:
    """Drop the snapshots of a database whose time has passed, or that a killed run left half made; return their names.

    Args:
        params: the module's options.
        run_id: of this run.
        own: drop also this run's, because it is over.
        check: only return the names.

    Raises:
        RunbookError: a rollback, which may be about to swap one in, or another snapshot does not end.
    """
    database = params["login_db"]
    with connect(params, dbname=MAINTENANCE_DB, application=f"runbook:{run_id}:snapshot") as connection:
        if not check:
            only_one(connection, database)
        names = [snapshot.name for snapshot in found(connection, database) if snapshot.expired]
        names = [name for name in names if own or name != beside(database, "snapshot", run_id)]
        names += unmarked(connection, SNAPSHOT, database)
        for name in names if not check else ():
            drop(connection, name, force=False)
    return names
